"""Newton's method for all tokens of a nonlinear recurrence at once; see nonlinear_scan, which it serves.

`step` comes as a jaxpr and the arrays that it closes over, so that these get their gradients.

Dims: B batch, T time, X channels, M blocks of E channels, X = M E.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.ops.affine_scan import affine_scan
from memzoo.ops.linear_scan import linear_scan
from memzoo.ops.recur import recur


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fixed_point(jaxpr, how, h_BX, xs, reset_BT, closed_over, guess_BTX):
    """(h_BTX, iterations).

    how: (blocks of the Jacobian, or 0 for its diagonal alone; a bound on iterations; whether what that leaves
    undone is done token by token, or NaN).
    """
    blocks, limit, fallback = how

    def evaluate(h_BTX):
        f_BTX, pull = jax.vjp(partial(_tokens, jaxpr, closed_over, xs), _before(h_BTX, reset_BT, h_BX))
        J = _jacobian(blocks, f_BTX, lambda df_BTX: pull(df_BTX)[0])
        return f_BTX, J if blocks else jnp.clip(J, -1, 1)

    h_BTX, iterations, unsettled = _iterate(evaluate, guess_BTX, reset_BT, limit)
    if fallback:
        h_BTX = lax.cond(unsettled, lambda: token_by_token(jaxpr, closed_over, h_BX, xs, reset_BT)[0], lambda: h_BTX)
    return h_BTX, iterations


def _fixed_point_fwd(jaxpr, how, h_BX, xs, reset_BT, closed_over, guess_BTX):
    h_BTX, iterations = fixed_point(jaxpr, how, h_BX, xs, reset_BT, closed_over, guess_BTX)
    return (h_BTX, iterations), (h_BX, xs, reset_BT, closed_over, h_BTX)


def _fixed_point_bwd(jaxpr, how, saved, cotangents):
    """The adjoint runs backwards in time, a_t = dh_t + J_{t+1}' a_{t+1}, and dx_t = (df_t / dx_t)' a_t.

    It is linear, so with all of J the first iteration solves it; with less it goes on until it does, too.
    """
    blocks = how[0]
    h_BX, xs, reset_BT, closed_over, h_BTX = saved
    dh_BTX, _ = cotangents
    f_BTX, pull = jax.vjp(partial(_tokens, jaxpr), closed_over, xs, _before(h_BTX, reset_BT, h_BX))

    def to_before(a_BTX):  # J_t' a_t, which is 0 where the token began afresh, whatever J and a hold
        return jnp.where(reset_BT[..., None], 0, pull(a_BTX)[2])

    def shift(x, end):  # what is at t + 1 comes to t, and time runs backwards
        return jnp.flip(jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], end)], axis=1), axis=1)

    J = shift(_jacobian(blocks, f_BTX, to_before), 0)
    J = J if J.ndim == 3 else jnp.swapaxes(J, 3, 4)

    def evaluate(back_BTX):
        return jnp.flip(dh_BTX, axis=1) + shift(to_before(jnp.flip(back_BTX, axis=1)), 0), J

    back_BTX, _, _ = _iterate(evaluate, jnp.zeros_like(h_BTX), shift(reset_BT, True), h_BTX.shape[1])
    a_BTX = jnp.flip(back_BTX, axis=1)
    dclosed_over, dxs, _ = pull(a_BTX)
    return to_before(a_BTX)[:, 0], dxs, None, dclosed_over, jnp.zeros_like(h_BTX)


fixed_point.defvjp(_fixed_point_fwd, _fixed_point_bwd)


def _iterate(evaluate, h_BTX, cut_BT, limit):
    """Solves h = f(h) from a first guess, where f_t sees h_{t-1} alone, and not even that if cut_t.

    evaluate: h_BTX -> f_BTX and its Jacobians. Returns (h_BTX, iterations, whether it could have gone on); for the NaNs
    see newton_scan.
    """
    eps, tiny = 8 * jnp.finfo(h_BTX.dtype).eps, jnp.finfo(h_BTX.dtype).tiny
    ends_BT = jnp.concatenate([cut_BT[:, 1:], jnp.ones_like(cut_BT[:, :1])], axis=1)

    def iteration(carry):
        h_BTX, _, _, n = carry
        h_BTX = _finite(h_BTX)
        f_BTX, J = evaluate(h_BTX)
        J = _finite(J)
        change_BTX = _finite(_linear(J, f_BTX - h_BTX, cut_BT))

        # A token is right if all before it, back to the last cut, follow from the ones before them to rounding, and
        # are finite: each channel in its own size, as large ones would hide what small ones still lack.
        size_BTX = jnp.abs(f_BTX) + _times(jnp.abs(J), jnp.abs(_before(h_BTX, cut_BT)))
        settled_BTX = (jnp.abs(f_BTX - h_BTX) <= eps * size_BTX + tiny) & jnp.isfinite(size_BTX)
        off_BT = ~jnp.all(settled_BTX, axis=-1) & ~ends_BT
        earlier_BT = jnp.cumsum(off_BT, axis=1) - off_BT
        right_BT = earlier_BT == lax.cummax(jnp.where(cut_BT, earlier_BT, 0), axis=1)
        # A right value that is not finite makes no guess: the tokens after it are beyond help.
        more = jnp.any(right_BT & off_BT & jnp.all(jnp.isfinite(f_BTX), axis=-1))

        # f + J change rather than h + change: where nothing earlier has changed this is `step` itself, bit for bit.
        return f_BTX + _times(J, _before(change_BTX, cut_BT)), right_BT, more, n + 1

    start = h_BTX, cut_BT, jnp.bool_(True), jnp.int32(0)
    h_BTX, right_BT, more, n = lax.while_loop(lambda carry: carry[2] & (carry[3] < limit), iteration, start)
    return jnp.where(right_BT[..., None], h_BTX, jnp.nan), n, more


def token_by_token(jaxpr, closed_over, h_BX, xs, reset_BT):
    def once(h_X, x):
        h_X = _token(jaxpr, closed_over, h_X, x)
        return h_X, h_X

    return recur(once, h_BX, (xs,), reset_BT)


def _token(jaxpr, closed_over, h_X, x):
    return jax.core.eval_jaxpr(jaxpr, closed_over, h_X, *jax.tree.leaves(x))[0]


def _tokens(jaxpr, closed_over, xs, before_BTX):
    """`step` for all tokens at once, each from the state before it."""
    return jax.vmap(jax.vmap(partial(_token, jaxpr, closed_over)))(before_BTX, xs)


def _before(h_BTX, cut_BT, h_BX=None):
    """The state before each token, from h_BX or 0 on, and 0 at cuts."""
    first_BX = jnp.zeros_like(h_BTX[:, 0]) if h_BX is None else h_BX
    return jnp.where(cut_BT[..., None], 0, jnp.concatenate([first_BX[:, None], h_BTX[:, :-1]], axis=1))


def _jacobian(blocks, f_BTX, pull):
    """df_t / dh_{t-1}, its blocks [B, T, M, E, E] or diagonal [B, T, X], from pull: df_BTX -> dh_BTX."""
    B, T, X = f_BTX.shape
    if blocks == X:  # channels do not meet, so one pull tells all of them apart
        return pull(jnp.ones_like(f_BTX))
    along = lambda unit_X: pull(jnp.broadcast_to(unit_X, f_BTX.shape))
    if blocks:  # row e of all blocks at once
        E = X // blocks
        rows_EBTX = jax.vmap(along)(jnp.tile(jnp.eye(E, dtype=f_BTX.dtype), (1, blocks)))
        return jnp.moveaxis(rows_EBTX.reshape(E, B, T, blocks, E), 0, 3)
    # Some rows at a time, as all of them at once are the full Jacobian in memory.
    row = lambda unit_X: jnp.sum(along(unit_X) * unit_X, -1)
    return jnp.moveaxis(lax.map(row, jnp.eye(X, dtype=f_BTX.dtype), batch_size=8), 0, 2)


def _times(J, h_BTX):
    if J.ndim == 3:
        return J * h_BTX
    h_BTME = h_BTX.reshape(J.shape[:4])
    return jnp.einsum("...xy,...y->...x", J, h_BTME, precision="highest").reshape(h_BTX.shape)


def _linear(J, x_BTX, cut_BT):
    """h_t = J_t h_{t-1} + x_t, from 0 at the start and at cuts."""
    if J.ndim == 3:
        return linear_scan(J, x_BTX, None, cut_BT, impl="associative")[0]
    B, T, M, E, _ = J.shape
    rows = lambda z: jnp.moveaxis(z, 2, 1).reshape(B * M, T, *z.shape[3:])
    cut_RT = jnp.repeat(cut_BT, M, axis=0)
    h_RTE = affine_scan(rows(J), rows(x_BTX.reshape(B, T, M, E)), None, cut_RT, impl="associative")[0]
    return jnp.moveaxis(h_RTE.reshape(B, M, T, E), 1, 2).reshape(B, T, M * E)


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)
