"""The linear recurrence whose transitions are matrices, real or complex.

    h_t = A_t h_{t-1} + x_t

Source: Blelloch, "Prefix Sums and Their Applications" (1990), sec. 1.4, for the associative form, whose monoid is that
of affine maps, (B, y) after (A, x) being (B A, B x + y). A map that holds a reset has no A, and says so by a flag.

A product of matrices costs X times what a matrix times the state does: `scan` does the least work, and the other forms
buy depth with it. Products of many transitions appear in those alone, so A should not grow what it acts on.

Dims: B batch, T time, X any one axis of channels, C chunk, N chunks, Y = X + 1; H heads, K key, V value.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.contract import positive
from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.recur import recur

FORMS = ("scan", "associative", "chunk")


def step(h_X, A_XX, x_X):
    """One token. This is the definition."""
    h_X = A_XX @ h_X + x_X
    return h_X, h_X


def affine_scan(
    A_BTXX: jax.Array,
    x_BTX: jax.Array | None = None,
    h_BX: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (h_BTX, h_BX), every state and the last one, in float32 or wider.

    A_BTXX: real or complex. x_BTX: zeros by default, which leaves products of matrices acting on h_BX.
    h_BX: the incoming state, zeros by default.
    reset_BT: bool, where True the state before the token is 0. impl: 'scan', 'associative', 'chunk' or 'auto'.
    All forms are differentiable in A, x and h, any number of times; forward mode is `scan`'s alone.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have.
    """
    positive(chunk=chunk)
    check_impl("affine_scan", impl, FORMS)
    check_shapes(x_BTX=x_BTX, A_BTXX=A_BTXX, h_BX=h_BX, reset_BT=reset_BT)
    return _forms(A_BTXX, x_BTX, h_BX, reset_BT, impl=impl, chunk=chunk)


@partial(jax.jit, static_argnames=("impl", "chunk"))  # so that a call outside of jit does not compile its scans anew
def _forms(A_BTXX, x_BTX, h_BX, reset_BT, impl, chunk):
    dtype = jnp.result_type(*[z for z in (A_BTXX, x_BTX, h_BX) if z is not None], jnp.float32)
    B, T, X, _ = A_BTXX.shape
    A_BTXX = A_BTXX.astype(dtype)
    x_BTX = jnp.zeros((B, T, X), dtype) if x_BTX is None else x_BTX.astype(dtype)
    h_BX = jnp.zeros((B, X), dtype) if h_BX is None else h_BX.astype(dtype)
    if impl == "auto":
        impl = "scan" if T == 1 or jax.default_backend() == "cpu" else "chunk"
    if impl == "scan":
        return recur(step, h_BX, (A_BTXX, x_BTX), reset_BT)
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
    h_BTX = _all_states(A_BTXX, x_BTX, h_BX, reset_BT, impl, chunk)
    return h_BTX, h_BTX[:, -1]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _all_states(A_BTXX, x_BTX, h_BX, reset_BT, impl, chunk):
    if impl == "chunk":
        return _chunked(A_BTXX, x_BTX, h_BX, reset_BT, chunk)
    return _associative(A_BTXX, x_BTX.at[:, 0].add(_times(A_BTXX[:, 0], h_BX, reset_BT[:, 0])), reset_BT)


def _all_states_fwd(A_BTXX, x_BTX, h_BX, reset_BT, impl, chunk):
    h_BTX = _all_states(A_BTXX, x_BTX, h_BX, reset_BT, impl, chunk)
    return h_BTX, (A_BTXX, h_BX, reset_BT, h_BTX)


def _all_states_bwd(impl, chunk, saved, dh_BTX):
    """The adjoint is the same recurrence backwards in time: dx_t = dh_t + A_{t+1}' dx_{t+1}."""
    A_BTXX, h_BX, reset_BT, h_BTX = saved
    flip = partial(jnp.flip, axis=1)
    transposed_BTXX = jnp.swapaxes(A_BTXX, 2, 3)
    next_BTXX, next_BT = (jnp.roll(z, -1, axis=1) for z in (transposed_BTXX, reset_BT.at[:, 0].set(True)))
    dx_BTX = flip(_all_states(flip(next_BTXX), flip(dh_BTX), jnp.zeros_like(h_BX), flip(next_BT), impl, chunk))
    before_BTX = jnp.concatenate([h_BX[:, None], h_BTX[:, :-1]], axis=1)
    dA_BTXX = jnp.where(reset_BT[..., None, None], 0, dx_BTX[..., :, None] * before_BTX[..., None, :])
    return dA_BTXX, dx_BTX, _times(transposed_BTXX[:, 0], dx_BTX[:, 0], reset_BT[:, 0]), None


_all_states.defvjp(_all_states_fwd, _all_states_bwd)


def _times(A, h, cut):
    """A h, and 0 at a cut, whatever A and h hold: a product with 0 would let an inf or a NaN pass."""
    return jnp.where(cut[..., None], 0, jnp.matmul(A, h[..., None], precision="highest")[..., 0])


def _associative(A_BTXX, x_BTX, cut_BT):
    def combine(left, right):
        (A, x, cut), (B, y, later_cut) = left, right
        BA = jnp.where(later_cut[..., None, None], 0, jnp.matmul(B, A, precision="highest"))
        return BA, _times(B, x, later_cut) + y, cut | later_cut  # OR: what holds one cut is cut

    return lax.associative_scan(combine, (A_BTXX, x_BTX, cut_BT), axis=1)[1]


def _chunked(A_BTXX, x_BTX, h_BX, cut_BT, C):
    """The affine map of each chunk, all chunks side by side; the states between chunks; then the states inside them."""
    B, T, X = x_BTX.shape
    N = -(-T // C)

    def split(z):
        z = jnp.pad(z, [(0, 0), (0, N * C - T)] + [(0, 0)] * (z.ndim - 2))
        return jnp.moveaxis(z.reshape(B, N, C, *z.shape[2:]), 2, 0)

    tokens = split(A_BTXX), split(x_BTX), split(cut_BT)

    def compose(map_BNXY, token):  # the matrix, and beside it what a zero state would have become
        A_BNXX, x_BNX, cut_BN = token
        map_BNXY = jnp.where(cut_BN[..., None, None], 0, jnp.matmul(A_BNXX, map_BNXY, precision="highest"))
        return map_BNXY.at[..., -1].add(x_BNX), None

    identity_BNXY = jnp.broadcast_to(jnp.eye(X, X + 1, dtype=x_BTX.dtype), (B, N, X, X + 1))
    map_BNXY, _ = lax.scan(compose, identity_BNXY, tokens)

    def across(h_BX, chunk):
        map_BXY, cut_B = chunk
        return _times(map_BXY[..., :-1], h_BX, cut_B) + map_BXY[..., -1], h_BX

    chunks = jnp.moveaxis(map_BNXY, 1, 0), jnp.moveaxis(jnp.any(tokens[2], axis=0), 1, 0)
    _, before_NBX = lax.scan(across, h_BX, chunks)

    def within(h_BNX, token):
        A_BNXX, x_BNX, cut_BN = token
        h_BNX = _times(A_BNXX, h_BNX, cut_BN) + x_BNX
        return h_BNX, h_BNX

    _, h_CBNX = lax.scan(within, jnp.moveaxis(before_NBX, 0, 1), tokens)
    return jnp.moveaxis(h_CBNX, 0, 2).reshape(B, N * C, X)[:, :T]


def matrix_states(M_BTHKK: jax.Array, X_BTHKV: jax.Array, S_BHKV: jax.Array, reset_BT: jax.Array | None) -> jax.Array:
    """Every state of S_t = M_t S_{t-1} + X_t, [B, T, H, K, V], by the same monoid: its columns share M_t."""
    reset_BT = jnp.zeros(X_BTHKV.shape[:2], bool) if reset_BT is None else reset_BT
    S_BHKV = jnp.where(reset_BT[:, 0, None, None, None], 0, S_BHKV)

    def combine(left, right):
        (M, X, r), (L, Y, s) = left, right
        return jnp.where(s, L, L @ M), jnp.where(s, Y, L @ X + Y), r | s

    with jax.default_matmul_precision("highest"):  # as in the definition
        xs = M_BTHKK, X_BTHKV.at[:, 0].add(M_BTHKK[:, 0] @ S_BHKV), reset_BT[..., None, None, None]
        return lax.associative_scan(combine, xs, axis=1)[1]
