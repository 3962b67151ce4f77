"""A memory that learns while it reads: gradient descent on the weights of a small network, token by token.

    g_t = sum_i gamma_i d loss(M(W'; k_i), v_i) / dW'      i the last `window` tokens, W' the weights as the chunk began
    S_t = eta_t S_{t-1} + theta_t g_t                      momentum
    A_t = (1 - alpha_t) A_{t-1} - rate_t direction(S_t)    W_t = weights(A_t)
    y_t = M(W_t; q_t)                                      the memory reads after its own write

With chunk = 1, W' = W_{t-1}, this is gradient descent as such; with longer chunks all gradients of a chunk are taken at
once. A chunk begins every `chunk` tokens from the last reset on, wherever calls begin and end. A_0 is learned, and the
decay alpha fades it as all else.

Source: Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States" (2024), arXiv:2407.04620, for
chunks; Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time" (2025), arXiv:2501.00663, for momentum and
decay; Behrouz, Razaviyayn, Zhong, Mirrokni, "It's All Connected" (2025), arXiv:2504.13173, for `weights`; Behrouz et
al., "ATLAS" (2025), arXiv:2505.23735, for the window and `direction`.

Dims: B batch, T time, H heads, K key, V what the loss is told, P = window - 1 tokens before, R rows of all matrices, H,
O and I of a matrix: heads, outputs and inputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract
from memzoo.contract import positive
from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.memory import (
    HEADS,
    Apply,
    Gates,
    MemoryState,
    Rule,
    Weights,
    add,
    each,
    kept,
    memory_state,
    read,
    rows,
    seen,
)
from memzoo.ops.memory_chunk import chunks

FORMS = ("scan", "chunk")


def memorize(
    memory: Callable[[Apply, jax.Array, Any], jax.Array],
    objective: Callable[[jax.Array, jax.Array], jax.Array],
    A: Weights,
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    gates: Gates,
    state: MemoryState | None = None,
    reset_BT: jax.Array | None = None,
    *,
    rule: Rule | None = None,
    fixed: Any = None,
    chunk: int = 1,
    impl: str = "auto",
    aligned: bool = False,
) -> tuple[jax.Array, MemoryState]:
    """All T tokens. Returns (what the memory reads, [B, T, H, ...] in the dtype of v, and MemoryState).

    memory: (apply, x_TK, fixed) -> y_T.., a network over rows of x, of which none sees another. It calls
    apply(name, x_TI) -> x_TO once for each matrix `name` of weights. fixed: a pytree of arrays [H, ...], of which it
    gets one head's: what of the network does not change while it reads, such as norms.
    objective: (y, v_V) -> the loss of one token, twice differentiable. v may tell it more than the value: it has any V.
    A: A_0, matrices [H, O, I] by name. chunk: part of what is computed, not of how.
    impl: 'scan', 'chunk' (all tokens of a chunk at once) or 'auto'. Both are differentiable in all arrays, exactly.
    aligned: the caller knows that in every row of `state` a chunk begins, as is known of no state. With no resets given
    'chunk' then does a third of the work. Where it is not so, the result is wrong.
    Raises ValueError for arguments that do not fit, NotImplementedError for a form this op does not have.
    """
    rule = Rule() if rule is None else rule
    positive(chunk=chunk, window=rule.window)
    check_impl("memorize", impl, FORMS)
    named: dict[str, Any] = gates._asdict()
    by_row = gates.alpha_BTH is not None and jnp.ndim(gates.alpha_BTH) == 4
    if by_row:
        named["alpha_BTHR"] = named.pop("alpha_BTH")
    check_shapes(q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, reset_BT=reset_BT, **named)
    R = sum(W.shape[1] for W in A.values())
    if by_row and named["alpha_BTHR"].shape[-1] != R:
        raise ValueError(f"alpha_BTHR: expected R = {R}, the rows of A, got shape {list(named['alpha_BTHR'].shape)}")
    (B, T, _, K), V = q_BTHK.shape, v_BTHV.shape[-1]
    wide = jnp.result_type(q_BTHK, k_BTHK, v_BTHV, jnp.float32)
    A, fixed, xs = jax.tree.map(
        lambda x: jnp.asarray(x, wide), (A, fixed, (q_BTHK, k_BTHK, v_BTHV, *_all(gates, wide)))
    )
    for name, W in A.items():
        arrays: dict[str, Any] = {"q_BTHK": q_BTHK, f"A[{name!r}]_HOI": W}
        check_shapes(**arrays)
    shapes: Any = {name: W.shape for name, W in A.items()}
    kinds: dict[str, Any] = {"momentum": gates.eta_BTH is not None, "window": rule.window, "chunk": chunk}
    fresh = partial(memory_state, B, shapes, K, V, wide, **kinds)
    aligned = reset_BT is None and (aligned or state is None)
    if state is None:
        state = fresh()
    contract.check_state(state, jax.eval_shape(fresh))
    if rule.window == 1:  # from here on no tokens, rather than nothing
        state = state._replace(k_BPHK=xs[1][:, :0], v_BPHV=xs[2][:, :0], gamma_BPH=xs[3][:, :0])
    _check_memory(memory, A, fixed, xs[1])
    with jax.default_matmul_precision("highest"):  # of what is descended: rounding there is learned, too
        if impl == "scan" or (impl == "auto" and (T == 1 or chunk == 1)):
            y_BTHV, state = _fold(partial(step, memory, objective, rule, chunk), A, fixed, state, xs, reset_BT)
        else:
            y_BTHV, state = chunks(memory, objective, rule, A, fixed, state, xs, reset_BT, chunk, aligned)
    if rule.window == 1:
        state = state._replace(k_BPHK=(), v_BPHV=(), gamma_BPH=())
    return y_BTHV.astype(v_BTHV.dtype), state


def step(memory, objective, rule, chunk, A0, fixed, state, q_K, k_K, v_V, theta, eta, alpha_R, rate, gamma):
    """One token of one head: (state, y). This is the definition."""
    A, S, anchor = add(A0, state.A), state.S, add(A0, state.anchor)
    anchor = jax.tree.map(lambda now, before: jnp.where(state.place_B == 0, now, before), A, anchor or A)
    k_PK, v_PV = seen(state, k_K[None], v_V[None])
    gamma_P = jnp.append(state.gamma_BPH, gamma)

    def loss(W):
        return sum(gamma_P[p] * objective(read(memory, W, k_PK[p], fixed), v_PV[p]) for p in range(len(gamma_P)))

    g = jax.grad(loss)(each(rule.weights, anchor))
    S = {name: theta * g[name] + (eta * S[name] if S else 0) for name in g}
    d = each(rule.direction, S)
    stay = rows(1 - alpha_R, A)
    A = {name: stay[name][:, None] * A[name] - rate * d[name] for name in A}
    y_V = read(memory, each(rule.weights, A), q_K, fixed)
    less = lambda W: {name: W[name] - A0[name] for name in W}
    place = (state.place_B + 1) % chunk
    past = kept(gamma_P[1:], k_PK[1:], v_PV[1:])
    return MemoryState(less(A), S if state.S else {}, less(anchor) if state.anchor else {}, *past, place), y_V


def _fold(one, A0, fixed, state, xs, reset_BT):
    def row(state, x, reset):
        if reset is not None:
            state = jax.tree.map(lambda s: jnp.where(reset, jnp.zeros_like(s), s), state)
        return jax.vmap(one, in_axes=(0, 0, HEADS, *[0] * 8), out_axes=(HEADS, 0))(A0, fixed, state, *x)

    def token(state, x_reset):
        return jax.vmap(row)(state, *x_reset)

    state, y_TBHV = lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (xs, reset_BT)))
    return jnp.moveaxis(y_TBHV, 0, 1), state


def _check_memory(memory, A, fixed, k_BTHK):
    used: list[str] = []

    def network(W, x_1K, fixed):
        def apply(name, x_1I):
            used.append(name)
            if name not in W:
                raise ValueError(f"memory: expected a matrix of A, one of {sorted(W)}, got {name!r}")
            return x_1I @ W[name].T

        return memory(apply, x_1K, fixed)

    one = lambda tree: jax.tree.map(lambda x: x[0], tree)
    jax.eval_shape(network, one(A), k_BTHK[0, :1, 0], one(fixed))
    if sorted(used) != sorted(A):
        raise ValueError(f"memory: expected one use of each matrix of A, {sorted(A)}, got {sorted(used)}")


def _all(gates, dtype):
    """All gates, alpha as [B, T, H, R or 1]."""
    like = gates.theta_BTH
    one, zero = jnp.ones(like.shape, dtype), jnp.zeros(like.shape, dtype)
    defaults = (like, zero, zero, one, one)
    theta, eta, alpha, rate, gamma = (default if g is None else g for g, default in zip(gates, defaults, strict=True))
    return theta, eta, alpha if alpha.ndim == 4 else alpha[..., None], rate, gamma
