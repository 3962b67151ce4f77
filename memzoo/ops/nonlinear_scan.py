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
gradient is the fixed point's for the diagonal too, by the same iteration on the adjoint.

Dims: B batch, T time, X any one axis of channels; row and column of a Jacobian [X, X] are both channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo.contract import check_reset, nearest
from memzoo.ops.affine_scan import affine_scan
from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.linear_scan import linear_scan
from memzoo.ops.recur import recur

FORMS = ("scan", "newton")
JACOBIANS = ("full", "diagonal")


def nonlinear_scan(
    step: Callable[[jax.Array, Any], jax.Array],
    h_BX: jax.Array,
    xs: Any,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    jacobian: str = "full",
    max_iterations: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (h_BTX, h_BX), every state and the last one, in float32 or wider.

    step: (h_X, x) -> h_X for one row and one token; may close over arrays, which get their gradients in every form.
    h_BX: the incoming state. xs: any pytree of arrays [B, T, ...]; `step` sees one without B and T.
    reset_BT: bool, where True the state before the token is 0.
    impl: 'scan', 'newton' or 'auto', which is 'scan': on a CPU newton is 20 to 130 times slower.
    jacobian, max_iterations: of 'newton' alone, see newton_scan.
    `scan` is differentiable any number of times and in both modes; `newton` once, in reverse.
    Raises ValueError for arguments that do not fit, NotImplementedError for a form this op does not have.
    """
    check_impl("nonlinear_scan", impl, FORMS)
    if impl == "newton":
        return newton_scan(step, h_BX, xs, reset_BT, jacobian=jacobian, max_iterations=max_iterations)[:2]
    _check_newton(jacobian, max_iterations)
    h_BX, jaxpr, closed_over = _check(step, h_BX, xs, reset_BT)

    def once(h_X, x):
        h_X = _token(jaxpr, closed_over, h_X, x)
        return h_X, h_X

    return recur(once, h_BX, (xs,), reset_BT)


def newton_scan(
    step: Callable[[jax.Array, Any], jax.Array],
    h_BX: jax.Array,
    xs: Any,
    reset_BT: jax.Array | None = None,
    *,
    jacobian: str = "full",
    max_iterations: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """nonlinear_scan(impl='newton'), and how many iterations it took: (h_BTX, h_BX, iterations), an int32.

    jacobian: 'full' takes few iterations, each with T matrices [X, X] in memory; 'diagonal' takes more, each with T
    vectors [X]. Values and gradients are the same.
    max_iterations: if it ends the iteration too soon, tokens that are not yet right are NaN, up to the next reset. By
    default it is T, which never does. Tokens after a state that is not finite are NaN as well.
    """
    _check_newton(jacobian, max_iterations)
    h_BX, jaxpr, closed_over = _check(step, h_BX, xs, reset_BT)
    B, T = jax.tree.leaves(xs)[0].shape[:2]
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
    limit = T if max_iterations is None else max_iterations
    h_BTX, iterations = _fixed_point(jaxpr, jacobian, limit, h_BX, xs, reset_BT, closed_over)
    return h_BTX, h_BTX[:, -1], iterations


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fixed_point(jaxpr, jacobian, limit, h_BX, xs, reset_BT, closed_over):
    def evaluate(h_BTX):
        f_BTX, pull = jax.vjp(partial(_tokens, jaxpr, closed_over, xs), _before(h_BTX, reset_BT, h_BX))
        return f_BTX, _jacobian(jacobian, f_BTX, lambda df_BTX: pull(df_BTX)[0])

    return _iterate(evaluate, jnp.zeros((*reset_BT.shape, h_BX.shape[-1]), h_BX.dtype), reset_BT, limit)


def _fixed_point_fwd(jaxpr, jacobian, limit, h_BX, xs, reset_BT, closed_over):
    h_BTX, iterations = _fixed_point(jaxpr, jacobian, limit, h_BX, xs, reset_BT, closed_over)
    return (h_BTX, iterations), (h_BX, xs, reset_BT, closed_over, h_BTX)


def _fixed_point_bwd(jaxpr, jacobian, limit, saved, cotangents):
    """The adjoint runs backwards in time, a_t = dh_t + J_{t+1}' a_{t+1}, and dx_t = (df_t / dx_t)' a_t.

    It is linear, so with the full J the first iteration solves it; the diagonal one goes on until it does, too.
    """
    h_BX, xs, reset_BT, closed_over, h_BTX = saved
    dh_BTX, _ = cotangents
    f_BTX, pull = jax.vjp(partial(_tokens, jaxpr), closed_over, xs, _before(h_BTX, reset_BT, h_BX))

    def to_before(a_BTX):  # J_t' a_t, which is 0 where the token began afresh, whatever J and a hold
        return jnp.where(reset_BT[..., None], 0, pull(a_BTX)[2])

    def shift(x, end):  # what is at t + 1 comes to t, and time runs backwards
        return jnp.flip(jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], end)], axis=1), axis=1)

    J = shift(_jacobian(jacobian, f_BTX, to_before), 0)
    J = jnp.swapaxes(J, 2, 3) if jacobian == "full" else J

    def evaluate(back_BTX):
        return jnp.flip(dh_BTX, axis=1) + shift(to_before(jnp.flip(back_BTX, axis=1)), 0), J

    back_BTX, _ = _iterate(evaluate, jnp.zeros_like(h_BTX), shift(reset_BT, True), h_BTX.shape[1])
    a_BTX = jnp.flip(back_BTX, axis=1)
    dclosed_over, dxs, _ = pull(a_BTX)
    return to_before(a_BTX)[:, 0], dxs, None, dclosed_over


_fixed_point.defvjp(_fixed_point_fwd, _fixed_point_bwd)


def _iterate(evaluate, h_BTX, cut_BT, limit):
    """Solves h = f(h) from a first guess, where f_t sees h_{t-1} alone, and not even that if cut_t.

    evaluate: h_BTX -> f_BTX and its Jacobians. Returns (h_BTX, iterations); for the NaNs see newton_scan.
    """
    eps, tiny = 8 * jnp.finfo(h_BTX.dtype).eps, jnp.finfo(h_BTX.dtype).tiny
    ends_BT = jnp.concatenate([cut_BT[:, 1:], jnp.ones_like(cut_BT[:, :1])], axis=1)

    def iteration(carry):
        h_BTX, _, _, n = carry
        h_BTX = _finite(h_BTX)
        f_BTX, J = evaluate(h_BTX)
        J = _finite(J)
        change_BTX = _finite(_linear(J, f_BTX - h_BTX, cut_BT))

        # A token is right if all before it, back to the last cut, follow from the ones before them to rounding.
        size_BT = jnp.max(jnp.abs(f_BTX) + _times(jnp.abs(J), jnp.abs(_before(h_BTX, cut_BT))), axis=-1)
        off_BT = ~(jnp.max(jnp.abs(f_BTX - h_BTX), axis=-1) <= eps * size_BT + tiny) & ~ends_BT
        earlier_BT = jnp.cumsum(off_BT, axis=1) - off_BT
        right_BT = earlier_BT == lax.cummax(jnp.where(cut_BT, earlier_BT, 0), axis=1)
        # A right value that is not finite makes no guess: the tokens after it are beyond help.
        more = jnp.any(right_BT & off_BT & jnp.all(jnp.isfinite(f_BTX), axis=-1))

        # f + J change rather than h + change: where nothing earlier has changed this is `step` itself, bit for bit.
        return f_BTX + _times(J, _before(change_BTX, cut_BT)), right_BT, more, n + 1

    start = h_BTX, cut_BT, jnp.bool_(True), jnp.int32(0)
    h_BTX, right_BT, _, n = lax.while_loop(lambda carry: carry[2] & (carry[3] < limit), iteration, start)
    return jnp.where(right_BT[..., None], h_BTX, jnp.nan), n


def _token(jaxpr, closed_over, h_X, x):
    return jax.core.eval_jaxpr(jaxpr, closed_over, h_X, *jax.tree.leaves(x))[0]


def _tokens(jaxpr, closed_over, xs, before_BTX):
    """`step` for all tokens at once, each from the state before it."""
    return jax.vmap(jax.vmap(partial(_token, jaxpr, closed_over)))(before_BTX, xs)


def _before(h_BTX, cut_BT, h_BX=None):
    """The state before each token, from h_BX or 0 on, and 0 at cuts."""
    first_BX = jnp.zeros_like(h_BTX[:, 0]) if h_BX is None else h_BX
    return jnp.where(cut_BT[..., None], 0, jnp.concatenate([first_BX[:, None], h_BTX[:, :-1]], axis=1))


def _jacobian(jacobian, f_BTX, pull):
    """df_t / dh_{t-1}, [B, T, X, X] or its diagonal [B, T, X], from pull: df_BTX -> dh_BTX."""
    unit_XX = jnp.eye(f_BTX.shape[-1], dtype=f_BTX.dtype)

    def row(unit_X):
        return pull(jnp.broadcast_to(unit_X, f_BTX.shape))

    if jacobian == "full":
        return jnp.moveaxis(jax.vmap(row)(unit_XX), 0, 2)
    # A few rows at a time, as all of them at once are the full Jacobian in memory.
    diagonal_XBT = lax.map(lambda unit_X: jnp.sum(row(unit_X) * unit_X, -1), unit_XX, batch_size=8)
    return jnp.moveaxis(diagonal_XBT, 0, 2)


def _times(J, h_BTX):
    return J * h_BTX if J.ndim == 3 else jnp.einsum("...xy,...y->...x", J, h_BTX, precision="highest")


def _linear(J, x_BTX, cut_BT):
    """h_t = J_t h_{t-1} + x_t, from 0 at the start and at cuts."""
    if J.ndim == 3:
        return linear_scan(J, x_BTX, None, cut_BT, impl="associative")[0]
    return affine_scan(J, x_BTX, None, cut_BT, impl="associative")[0]


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def check_jacobian(jacobian: str) -> None:
    """Raises ValueError for a name that 'newton' does not know, with the nearest one."""
    if jacobian not in JACOBIANS:
        expected = " or ".join(map(repr, JACOBIANS))
        raise ValueError(f"jacobian: expected {expected}, got {jacobian!r}; {nearest(str(jacobian), JACOBIANS)}")


def _check_newton(jacobian, max_iterations):
    check_jacobian(jacobian)
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"max_iterations: expected None or an integer >= 1, got {max_iterations}")


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
