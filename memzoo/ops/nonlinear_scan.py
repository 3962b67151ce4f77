"""The nonlinear recurrence, token by token or by Newton's method for all tokens at once.

    h_t = step(h_{t-1}, x_t)
    newton, again and again:  h_t <- f_t + J_t (h_{t-1} - g_{t-1}),  g the last guess, f_t = step(g_{t-1}, x_t)

An iteration is linear in h, so one associative scan solves it. Each one settles the first token not yet settled,
whatever the dynamics, so T iterations are always enough; contractive dynamics need a handful. Measured in float32: a
GRU or an LSTM as initialised takes 5 for T from 128 to 2,048 (15 and 28 with J's diagonal); a GRU whose recurrent
kernels are 3 times as large is chaotic, and takes 175 for T = 512.

Source: Lim, Zhu, Selfridge, Kasim, "Parallelizing non-linear sequential models over the sequence length" (2023),
arXiv:2309.12252, sec. 3 (DEER); with J's diagonal, Gonzalez, Warrington, Smith, Linderman, "Towards Scalable and
Stable Parallelization of Nonlinear RNNs" (2024), arXiv:2407.19115, sec. 4 (quasi-DEER).
Differs: stops when each token follows from the one before to rounding, not when guesses come within a tolerance; what
overflows in a guess or in a product of Jacobians becomes 0, which leaves the plain iteration h_t <- f_t there; the
diagonal is damped by holding it within [-1, 1]; the gradient is the fixed point's whatever the kind of J, by the same
iteration on the adjoint.

Dims: B batch, T time, X any one axis of channels, M blocks of E channels that do not meet in `step`, X = M E; row and
column of a Jacobian [X, X] are both channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo.contract import check_reset, divisible, nearest
from memzoo.ops import newton
from memzoo.ops.checks import check_impl, check_shapes

FORMS = ("scan", "newton")
JACOBIANS = ("auto", "full", "block", "diagonal")
SMALL = 64  # channels of a block up to which "auto" takes T matrices of them


def nonlinear_scan(
    step: Callable[[jax.Array, Any], jax.Array],
    h_BX: jax.Array,
    xs: Any,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    jacobian: str = "auto",
    blocks: int = 1,
    max_iterations: int | None = None,
    guess_BTX: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (h_BTX, h_BX), every state and the last one, in float32 or wider.

    step: (h_X, x) -> h_X for one row and one token; may close over arrays, which get their gradients in every form.
    h_BX: the incoming state. xs: any pytree of arrays [B, T, ...]; `step` sees one without B and T.
    reset_BT: bool, where True the state before the token is 0.
    impl: 'scan', 'newton' or 'auto', which is 'scan' on a CPU, where newton is 20 to 130 times slower, and elsewhere
    'newton' if T is long and blocks are small, with `scan` for the call that does not settle in 32 iterations.
    jacobian, blocks, max_iterations, guess_BTX: of 'newton' alone, see newton_scan.
    `scan` is differentiable any number of times and in both modes; `newton`, and so 'auto' where it takes it, once and
    in reverse: where that is not enough, say 'scan'.
    Raises ValueError for arguments that do not fit, NotImplementedError for a form this op does not have.
    """
    check_impl("nonlinear_scan", impl, FORMS)
    kinds: dict[str, Any] = {"jacobian": jacobian, "blocks": blocks, "guess_BTX": guess_BTX}
    if impl == "newton":
        return newton_scan(step, h_BX, xs, reset_BT, max_iterations=max_iterations, **kinds)[:2]
    h_BX, jaxpr, closed_over = _check(step, h_BX, xs, reset_BT)
    T, X = jax.tree.leaves(xs)[0].shape[1], h_BX.shape[-1]
    _check_newton(X, max_iterations, **kinds, shape=jax.tree.leaves(xs)[0].shape[:2])
    if impl == "auto" and jax.default_backend() != "cpu" and T >= 1024 and X // blocks <= SMALL:
        limit = 32 if max_iterations is None else max_iterations
        return newton_scan(step, h_BX, xs, reset_BT, max_iterations=limit, fallback=True, **kinds)[:2]
    return newton.token_by_token(jaxpr, closed_over, h_BX, xs, reset_BT)


def newton_scan(
    step: Callable[[jax.Array, Any], jax.Array],
    h_BX: jax.Array,
    xs: Any,
    reset_BT: jax.Array | None = None,
    *,
    jacobian: str = "auto",
    blocks: int = 1,
    max_iterations: int | None = None,
    guess_BTX: jax.Array | None = None,
    fallback: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """nonlinear_scan(impl='newton'), and how many iterations it took: (h_BTX, h_BX, iterations), an int32.

    jacobian: what an iteration knows of it, and holds in memory. 'full': all, T matrices [X, X]. 'block': what is in
    its `blocks` diagonal blocks, T times [M, E, E]; as few iterations if the channels of different blocks, which lie
    one after the other, do not meet in `step`. 'diagonal': T vectors [X], more iterations. 'auto': 'block' if E <= 64,
    else 'diagonal'. Values and gradients are the same.
    max_iterations: if it ends the iteration too soon, tokens that are not yet right are NaN, up to the next reset, or,
    with `fallback`, the call is done by `scan`. By default it is T, which never does. Tokens after a state that is not
    finite are NaN as well.
    guess_BTX: where the iteration starts, zeros by default; the states of a call before, with weights or inputs a
    little different, save iterations. It has no gradient.
    """
    h_BX, jaxpr, closed_over = _check(step, h_BX, xs, reset_BT)
    B, T = jax.tree.leaves(xs)[0].shape[:2]
    blocks = _check_newton(h_BX.shape[-1], max_iterations, jacobian, blocks, guess_BTX, (B, T))
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
    guess_BTX = jnp.zeros((B, T, h_BX.shape[-1]), h_BX.dtype) if guess_BTX is None else guess_BTX.astype(h_BX.dtype)
    how = blocks, T if max_iterations is None else max_iterations, fallback
    h_BTX, iterations = newton.fixed_point(jaxpr, how, h_BX, xs, reset_BT, closed_over, lax.stop_gradient(guess_BTX))
    return h_BTX, h_BTX[:, -1], iterations


def check_jacobian(jacobian: str) -> None:
    """Raises ValueError for a name that 'newton' does not know, with the nearest one."""
    if jacobian not in JACOBIANS:
        raise ValueError(
            f"jacobian: expected one of {', '.join(JACOBIANS)}, got {jacobian!r}; {nearest(str(jacobian), JACOBIANS)}"
        )


def _check_newton(X, max_iterations, jacobian, blocks, guess_BTX, shape):
    """How many blocks the Jacobian is taken to have, and 0 for its diagonal alone."""
    check_jacobian(jacobian)
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"max_iterations: expected None or an integer >= 1, got {max_iterations}")
    E = divisible("channels of h_BX", X, "blocks", blocks)
    if guess_BTX is not None and np.shape(guess_BTX) != (*shape, X):
        raise ValueError(f"guess_BTX: expected shape {[*shape, X]}, got {list(np.shape(guess_BTX))}")
    if jacobian == "auto":
        jacobian = "block" if E <= SMALL else "diagonal"
    return {"full": 1, "block": blocks, "diagonal": 0}[jacobian]


def _check(step, h_BX, xs, reset_BT):
    """(h_BX in float32 or wider, the jaxpr of `step`, the arrays that it closes over), after checking that all fit."""
    check_shapes(h_BX=h_BX)
    h_BX = jnp.asarray(h_BX)
    if jnp.issubdtype(h_BX.dtype, jnp.complexfloating):
        raise ValueError(f"h_BX: expected a real dtype, got {h_BX.dtype}")
    leaves = jax.tree_util.tree_leaves_with_path(xs)
    if not leaves:
        raise ValueError(f"xs: expected at least one array [B, T, ...], got {xs!r}")
    B, X = h_BX.shape
    for path, x in leaves:
        if np.ndim(x) < 2 or np.shape(x)[:2] != (B, np.shape(leaves[0][1])[1]) or np.shape(x)[1] == 0:
            name = f"xs{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name}: expected shape [B = {B}, one T >= 1 for all, ...], got {list(np.shape(x))}")
    if reset_BT is not None:
        check_reset(reset_BT, *np.shape(leaves[0][1])[:2])
    h_BX = h_BX.astype(jnp.promote_types(h_BX.dtype, jnp.float32))
    x = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[2:], jnp.result_type(x)), xs)
    # Matmuls in fewer bits than the state has would make `step` a staircase, on which Newton's method cannot settle.
    with jax.default_matmul_precision("highest"):
        jaxpr, h_X = jax.make_jaxpr(step, return_shape=True)(jax.ShapeDtypeStruct((X,), h_BX.dtype), x)
    if jax.tree.map(lambda h: (h.shape, h.dtype), h_X) != ((X,), h_BX.dtype):
        raise ValueError(f"step: expected it to return {h_BX.dtype}[{X}], as the state is, got {h_X}")
    return h_BX, jaxpr.jaxpr, jaxpr.consts
