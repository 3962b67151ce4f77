"""A memory that learns while it reads: gradient descent on the weights of a small network, token by token.

    g_t = sum_i gamma_i d loss(M(W'; k_i), v_i) / dW'      i the last `window` tokens, W' the weights as the chunk began
    S_t = eta_t S_{t-1} + theta_t g_t                      momentum
    A_t = (1 - alpha_t) A_{t-1} - rate_t direction(S_t)    W_t = weights(A_t)
    y_t = M(W_t; q_t)                                      the memory reads after its own write

With chunk = 1, W' = W_{t-1}, this is gradient descent as such; with longer chunks all gradients of a chunk are taken at
once. A chunk begins every `chunk` tokens from the last reset on, wherever calls begin and end. A_0 is learned, and the
decay alpha fades it as all else.

Source: Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States" (2024), arXiv:2407.04620, for
chunks and their dual form; Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time" (2025),
arXiv:2501.00663, for momentum and decay; Behrouz, Razaviyayn, Zhong, Mirrokni, "It's All Connected" (2025),
arXiv:2504.13173, for `weights`; Behrouz et al., "ATLAS" (2025), arXiv:2505.23735, for the window and `direction`.
Differs: the dual form is for any network of matrices and any linear rule. A gradient with respect to a matrix is an
outer product per token, so S_t and A_t are kept as coefficients of those, and no matrix is formed but at chunks' ends.

Dims: B batch, T time, H heads, K key, V value, C chunk, P = window - 1 tokens before, E = P + C, O and I the outputs
and inputs of a matrix of weights, Z the matrices that S and A are sums of: what came in, A_0, and gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract
from memzoo.contract import positive
from memzoo.ops.checks import check_impl, check_shapes

FORMS = ("scan", "chunk")
Weights = dict[str, jax.Array]
Apply = Callable[[str, jax.Array], jax.Array]


class Gates(NamedTuple):
    """What each token does, all [B, T, H]; None is what leaves the rule simpler."""

    theta_BTH: jax.Array  # step size, of the gradient
    eta_BTH: jax.Array | None = None  # momentum kept, in [0, 1]; 0
    alpha_BTH: jax.Array | None = None  # weights forgotten, in [0, 1]; 0
    rate_BTH: jax.Array | None = None  # step size, of the direction; 1
    gamma_BTH: jax.Array | None = None  # weight of the token in the window's loss; 1


class Rule(NamedTuple):
    """How gradients become weights. Functions of one matrix [..., O, I], differentiable at 0; None is the identity."""

    direction: Callable[[jax.Array], jax.Array] | None = None
    weights: Callable[[jax.Array], jax.Array] | None = None
    window: int = 1  # tokens whose loss is descended at once


class MemoryState(NamedTuple):
    """Zeros at the start of a sequence: A and the anchor as they differ from A_0. Matrices [B, H, O, I] by name."""

    A: Weights
    S: Weights  # empty without momentum
    anchor: Weights  # as A: what the chunk's gradients are taken at; empty for chunk = 1
    k_BPHK: Any  # the tokens of the window, the last one last; () for window = 1
    v_BPHV: Any
    gamma_BPH: Any  # 0 where no token has been
    place_B: jax.Array  # int32, tokens of the chunk that have been


def memory_state(
    batch: int,
    shapes: dict[str, tuple[int, int, int]],
    K: int,
    V: int,
    dtype: Any,
    *,
    momentum: bool,
    window: int,
    chunk: int,
) -> MemoryState:
    """The state at the start of a sequence. shapes: [H, O, I] of each matrix."""
    zeros = {name: jnp.zeros((batch, *shape), dtype) for name, shape in shapes.items()}
    H, P = next(iter(shapes.values()))[0], window - 1
    k, v, gamma = (jnp.zeros((batch, P, H, *of), dtype) if P else () for of in ((K,), (V,), ()))
    place_B = jnp.zeros((batch,), jnp.int32)
    return MemoryState(zeros, zeros if momentum else {}, zeros if chunk > 1 else {}, k, v, gamma, place_B)


def dense(W: Weights) -> Apply:
    """The network's matrices as a function: name, x_..I -> x_..O."""
    return lambda name, x: x @ W[name].T


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
) -> tuple[jax.Array, MemoryState]:
    """All T tokens. Returns (y_BTHV, MemoryState).

    memory: (apply, x_TK, fixed) -> y_TV, a network over rows of x, of which none sees another. It calls
    apply(name, x_TI) -> x_TO once for each matrix `name` of weights. fixed: a pytree of arrays [H, ...], of which it
    gets one head's: what of the network does not change while it reads, such as norms.
    objective: (y_V, v_V) -> the loss of one token, twice differentiable.
    A: A_0, matrices [H, O, I] by name. chunk: part of what is computed, not of how.
    impl: 'scan', 'chunk' (all tokens of a chunk at once) or 'auto'. Both are differentiable in all arrays, exactly.
    Raises ValueError for arguments that do not fit, NotImplementedError for a form this op does not have.
    """
    rule = Rule() if rule is None else rule
    positive(chunk=chunk, window=rule.window)
    check_impl("memorize", impl, FORMS)
    check_shapes(q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, reset_BT=reset_BT, **gates._asdict())
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
    aligned = state is None and reset_BT is None
    if state is None:
        state = fresh()
    contract.check_state(state, jax.eval_shape(fresh))
    if rule.window == 1:  # from here on no tokens, rather than nothing
        state = state._replace(k_BPHK=xs[1][:, :0], v_BPHV=xs[2][:, :0], gamma_BPH=xs[3][:, :0])
    _check_memory(memory, A, fixed, xs[1])
    with jax.default_matmul_precision("highest"):  # of what is descended: rounding there is learned, too
        if impl == "scan" or (impl == "auto" and (T == 1 or chunk == 1)):
            one = partial(step, memory, objective, rule, chunk)
            y_BTHV, state = _fold(one, A, fixed, state, xs, reset_BT)
        else:
            one = partial(_chunk, memory, objective, rule)
            y_BTHV, state = _chunks(one, A, fixed, state, xs, reset_BT, chunk, aligned)
    if rule.window == 1:
        state = state._replace(k_BPHK=(), v_BPHV=(), gamma_BPH=())
    return y_BTHV.astype(v_BTHV.dtype), state


def step(memory, objective, rule, chunk, A0, fixed, state, q_K, k_K, v_V, theta, eta, alpha, rate, gamma):
    """One token of one head: (state, y_V). This is the definition."""
    A, S, anchor = _add(A0, state.A), state.S, _add(A0, state.anchor)
    anchor = jax.tree.map(lambda now, before: jnp.where(state.place_B == 0, now, before), A, anchor or A)
    k_PK, v_PV = _seen(state, k_K[None], v_V[None])
    gamma_P = jnp.append(state.gamma_BPH, gamma)

    def loss(W):
        return sum(gamma_P[p] * objective(_read(memory, W, k_PK[p], fixed), v_PV[p]) for p in range(len(gamma_P)))

    g = jax.grad(loss)(_each(rule.weights, anchor))
    S = {name: theta * g[name] + (eta * S[name] if S else 0) for name in g}
    d = _each(rule.direction, S)
    A = {name: (1 - alpha) * A[name] - rate * d[name] for name in A}
    y_V = _read(memory, _each(rule.weights, A), q_K, fixed)
    less = lambda W: {name: W[name] - A0[name] for name in W}
    place = (state.place_B + 1) % chunk
    past = k_PK[1:], v_PV[1:], gamma_P[1:]
    return MemoryState(less(A), S if state.S else {}, less(anchor) if state.anchor else {}, *past, place), y_V


def _seen(state, k_CK, v_CV):
    """The window's tokens and these. Where none has been there is the first of these, as 0 may have no gradient."""
    been_P1 = state.gamma_BPH[:, None] != 0
    past = jnp.where(been_P1, state.k_BPHK, k_CK[:1]), jnp.where(been_P1, state.v_BPHV, v_CV[:1])
    return jnp.concatenate([past[0], k_CK]), jnp.concatenate([past[1], v_CV])


def _check_memory(memory, A, fixed, k_BTHK):
    used: list[str] = []

    def read(W, x_1K, fixed):
        def apply(name, x_1I):
            used.append(name)
            if name not in W:
                raise ValueError(f"memory: expected a matrix of A, one of {sorted(W)}, got {name!r}")
            return dense(W)(name, x_1I)

        return memory(apply, x_1K, fixed)

    one = lambda tree: jax.tree.map(lambda x: x[0], tree)
    jax.eval_shape(read, one(A), k_BTHK[0, :1, 0], one(fixed))
    if sorted(used) != sorted(A):
        raise ValueError(f"memory: expected one use of each matrix of A, {sorted(A)}, got {sorted(used)}")


def _read(memory, W, x_K, fixed):
    return memory(dense(W), x_K[None], fixed)[0]


def _each(f, W):
    return W if f is None else {name: f(w) for name, w in W.items()}


def _add(A0, W):
    return {name: A0[name] + W[name] for name in W}


def _all(gates, dtype):
    like = gates.theta_BTH
    one, zero = jnp.ones(like.shape, dtype), jnp.zeros(like.shape, dtype)
    rest = zip(gates[1:], (zero, zero, one, one), strict=True)
    return like, *(default if gate is None else gate for gate, default in rest)


HEADS: Any = MemoryState(*(0, 0, 0, 1, 1, 1, None))  # type: ignore[arg-type]  # the axis of heads in a row's state


def _fold(one, A0, fixed, state, xs, reset_BT):
    def row(state, x, reset):
        if reset is not None:
            state = jax.tree.map(lambda s: jnp.where(reset, jnp.zeros_like(s), s), state)
        return jax.vmap(one, in_axes=(0, 0, HEADS, *[0] * 8), out_axes=(HEADS, 0))(A0, fixed, state, *x)

    def token(state, x_reset):
        return jax.vmap(row)(state, *x_reset)

    state, y_TBHV = lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (xs, reset_BT)))
    return jnp.moveaxis(y_TBHV, 0, 1), state


def _chunks(one, A0, fixed, state, xs, reset_BT, C, aligned):
    """Blocks of C tokens, one after the other. One that begins with a chunk and has no reset has a single anchor."""
    B, T = xs[0].shape[:2]
    N = -(-T // C)
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT

    def blocks(x):  # filled up with the last token, as 0 may have no gradient; it is not `there`
        x = jnp.pad(x, ((0, 0), (0, N * C - T), *[(0, 0)] * (x.ndim - 2)), "constant" if x.dtype == bool else "edge")
        return jnp.moveaxis(x.reshape(B, N, C, *x.shape[2:]), 1, 0)

    def rows(several):
        head = jax.vmap(partial(one, several), in_axes=(0, 0, HEADS, *[1] * 8, None, None), out_axes=(HEADS, 1))
        return jax.vmap(partial(head, A0, fixed))

    @partial(jax.checkpoint, prevent_cse=False)
    def block(state, x):
        if aligned:
            return rows(False)(state, *x)
        # What came in must not pass a reset at the first token, NaN neither, nor its gradient.
        reset_BC = x[-2]
        first = lambda s: reset_BC[:, 0].reshape(-1, *[1] * (s.ndim - 1))
        state = jax.tree.map(lambda s: jnp.where(first(s), jnp.zeros_like(s), s), state)
        several = jnp.any(state.place_B != 0) | jnp.any(reset_BC[:, 1:])
        return lax.cond(several, rows(True), rows(False), state, *x)

    state, y_NBCHV = lax.scan(block, state, tuple(map(blocks, (*xs, reset_BT, jnp.ones((B, T), bool)))))
    return jnp.moveaxis(y_NBCHV, 0, 1).reshape(B, N * C, *y_NBCHV.shape[3:])[:, :T], state


def _chunk(memory, objective, rule, several, A0, fixed, state, q_CK, k_CK, v_CV, *rest):
    """C tokens of one head: (MemoryState, y_CV). `there_C` is False for what fills the last block up.

    If there are `several` anchors, the tokens before the next chunk, those after, and those after a reset have one
    each: the one that came, what has been reached where that chunk begins, and A_0.
    """
    *gates, reset_C, there_C = rest
    theta_C, eta_C, alpha_C, rate_C, gamma_C = gates
    C, P = len(theta_C), len(state.gamma_BPH)
    c, count = jnp.arange(C), jnp.sum(there_C)
    k_EK, v_EV = _seen(state, k_CK, v_CV)
    gamma_E = jnp.concatenate([state.gamma_BPH, gamma_C])
    if several:
        sequence_C = jnp.cumsum(reset_C)
        begins = (C - state.place_B) % C  # the token that the next chunk begins with
        phase_C = jnp.where(sequence_C > 0, 2, jnp.where(c < begins, 0, 1))
    else:
        sequence_C, begins, phase_C = jnp.zeros_like(c), 0, jnp.zeros_like(c)
    sequence_E = jnp.concatenate([jnp.zeros(P, sequence_C.dtype), sequence_C])

    # S and A as coefficients of A that came, S that came, A_0, and the gradients at each anchor.
    e = jnp.arange(P + C) - P
    seen_CE = (e <= c[:, None]) & (e > c[:, None] - rule.window) & (sequence_E == sequence_C[:, None])
    write_CE = jnp.where(seen_CE & there_C[:, None], theta_C[:, None] * gamma_E, 0)
    write_CE = [jnp.where(phase_C[:, None] == p, write_CE, 0) for p in range(3 if several else 1)]
    write_CZ = jnp.concatenate([jnp.zeros((C, 3), theta_C.dtype), *write_CE], axis=1)
    came_Z, momentum_Z, fresh_Z = jnp.eye(3, write_CZ.shape[1], dtype=theta_C.dtype)
    eta_C = jnp.where(reset_C, 0, jnp.where(there_C, eta_C, 1))
    stay_C, rate_C = jnp.where(there_C, 1 - alpha_C, 1), jnp.where(there_C, rate_C, 0)
    S_CZ = _scan(eta_C, write_CZ, momentum_Z)

    def decayed(start, fresh, x_C):
        """A_t = stay_t A_{t-1} - rate_t x_t, from `start` and, at resets, from `fresh`."""
        wide = lambda z_C: z_C.reshape(-1, *[1] * (x_C.ndim - 1))
        x_C = jnp.where(wide(reset_C), wide(stay_C) * fresh, 0) - wide(rate_C) * x_C
        return _scan(jnp.where(reset_C, 0, stay_C), x_C, start)

    A_CZ = decayed(came_Z + fresh_Z, fresh_Z, S_CZ)
    before = {name: jnp.stack([W, state.S.get(name, jnp.zeros_like(W)), A0[name]]) for name, W in state.A.items()}

    def gradients(anchor):
        """dloss/dW of each token is the outer product of these: {name: (delta_EO, x_EI)}."""
        W = _each(rule.weights, _add(A0, anchor))
        taken = {}

        def loss(taps):
            def apply(name, x_EI):
                taken[name] = x_EI
                return x_EI @ W[name].T + taps[name]

            y_EV = memory(apply, k_EK, fixed)
            return jnp.sum(jax.vmap(objective)(y_EV, v_EV)), dict(taken)

        delta, x = jax.grad(loss, has_aux=True)({name: jnp.zeros((P + C, len(w)), w.dtype) for name, w in W.items()})
        return {name: (delta[name], x[name]) for name in W}

    def form(coefficient_Z, known, name):
        """The matrix that has these coefficients, as far as gradients are `known`, one dict for each anchor."""
        delta_O, x_I = (jnp.concatenate([g[name][i] for g in known]) for i in (0, 1))
        coefficient_E = coefficient_Z[..., 3 : 3 + len(x_I)]
        outer = jnp.einsum("...e,eo,ei->...oi", coefficient_E, delta_O, x_I)
        return jnp.einsum("...b,boi->...oi", coefficient_Z[..., :3], before[name]) + outer

    def reached(known, name):
        """A_t of all tokens, [C, O, I]."""
        if rule.direction is None:
            return form(A_CZ, known, name)
        return decayed(before[name][0] + A0[name], A0[name], rule.direction(form(S_CZ, known, name)))

    linear = rule.direction is None
    known = [gradients(state.anchor or state.A if several else state.A)]
    anchors = [state.anchor or state.A if several else state.A]
    if several:
        at = jnp.maximum(begins - 1, 0)
        there = {n: form(A_CZ[at], known, n) if linear else reached(known, n)[at] for n in A0}
        anchors.append({n: jnp.where(begins == 0, state.A[n], there[n] - A0[n]) for n in A0})
        anchors.append({n: jnp.zeros_like(A0[n]) for n in A0})
        known += [gradients(anchor) for anchor in anchors[1:]]

    if linear and rule.weights is None:

        def apply(name, x_CI):
            delta_ZO, x_ZI = (jnp.concatenate([g[name][i] for g in known]) for i in (0, 1))
            own_BCO = jnp.einsum("boi,ci->bco", before[name], x_CI)
            return jnp.einsum("cb,bco->co", A_CZ[:, :3], own_BCO) + ((x_CI @ x_ZI.T) * A_CZ[:, 3:]) @ delta_ZO

        y_CV = memory(apply, q_CK, fixed)
        A = {name: form(A_CZ[-1], known, name) for name in A0}
    else:
        A_C = {name: reached(known, name) for name in A0}
        y_CV = jax.vmap(lambda W, q_K: _read(memory, W, q_K, fixed))(_each(rule.weights, A_C), q_CK)
        A = {name: A_COI[-1] for name, A_COI in A_C.items()}
    A = {name: A[name] - A0[name] for name in A0}
    S = {name: form(S_CZ[-1], known, name) for name in state.S}
    anchor = {n: jnp.stack([W[n] for W in anchors])[phase_C[count - 1]] for n in state.anchor}

    tail = lambda z_E: lax.dynamic_slice_in_dim(z_E, count, P)
    same_P = tail(sequence_E) == sequence_C[-1]
    past = [jnp.where(same_P.reshape(-1, *[1] * (z.ndim - 1)), tail(z), 0) for z in (k_EK, v_EV, gamma_E)]
    since = jnp.where(sequence_C[-1] > 0, -jnp.max(jnp.where(reset_C, c, 0)), state.place_B)
    return MemoryState(A, S, anchor, *past, (since + count).astype(jnp.int32) % C), y_CV


def _scan(a_C, x_C, start):
    """h_t = a_t h_{t-1} + x_t, for x of any rank."""

    def combine(left, right):
        (a, x), (b, y) = left, right
        return b * a, b * x + y

    a_C = a_C.reshape(-1, *[1] * (x_C.ndim - 1))
    return lax.associative_scan(combine, (a_C, x_C.at[0].add(a_C[0] * start)))[1]
