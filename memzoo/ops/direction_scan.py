"""The linear recurrence without inputs, of which only the direction is kept: blocks of matrices, one length for all.

    h_t = A_t h_{t-1} / |A_t h_{t-1}|

A product of T matrices grows or shrinks like exp(T), and leaves the floating-point numbers after a hundred tokens. Its
direction does not depend on when, or how often, it is divided by a positive number, so each form divides where it
likes: `scan` at every token, the others at every product of two matrices. The divisor needs no gradient either.
A product keeps its largest entries to rounding, and gradients live in the smaller ones: measured in float32 at T = 70,
with random transitions, gradients of `associative` and `chunk` are within 3e-5 of those of `scan`, mostly within 5e-6.

Source: Blelloch, "Prefix Sums and Their Applications" (1990), sec. 1.4, for the associative form, whose monoid is that
of matrices up to a positive factor. A product that holds a reset is the vector that begins there, and a flag says so.

Dims: B batch, T time, N blocks, K block size, Y = K + 1, C chunk, M chunks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.contract import positive
from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.recur import recur

FORMS = ("scan", "associative", "chunk")


def step(h_NK, A_NKK, begins, start_NK):
    """One token. This is the definition."""
    h_NK = jnp.where(begins, start_NK, h_NK)
    h_NK = direction(jnp.einsum("nij,nj->ni", A_NKK, h_NK))
    return h_NK, h_NK


def direction(h: jax.Array) -> jax.Array:
    """h / |h| over the last two axes, however small or large h is; 0 where it is 0."""
    h = _rescaled(h, axes=(-2, -1))
    square = jnp.sum(h * h, axis=(-2, -1), keepdims=True)
    return h * lax.rsqrt(jnp.where(square > 0, square, 1))


def direction_scan(
    A_BTNKK: jax.Array,
    start_NK: jax.Array,
    h_BNK: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (h_BTNK, h_BNK), every direction and the last one, in float32 or wider.

    A_BTNKK: block-diagonal transitions, real. start_NK: what a new sequence begins with. h_BNK: the incoming state,
    start_NK by default. Both may have any length. A state that a transition maps to 0 stays there.
    reset_BT: bool, where True the token begins a new sequence. impl: 'scan', 'associative', 'chunk' or 'auto'.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have.
    """
    positive(chunk=chunk)
    check_impl("direction_scan", impl, FORMS)
    check_shapes(A_BTNKK=A_BTNKK, start_NK=start_NK, h_BNK=h_BNK, reset_BT=reset_BT)
    return _forms(A_BTNKK, start_NK, h_BNK, reset_BT, impl=impl, chunk=chunk)


@partial(jax.jit, static_argnames=("impl", "chunk"))  # so that a call outside of jit does not compile its scans anew
def _forms(A_BTNKK, start_NK, h_BNK, reset_BT, impl, chunk):
    dtype = jnp.result_type(A_BTNKK, start_NK, jnp.float32, *([] if h_BNK is None else [h_BNK]))
    B, T, N, K, _ = A_BTNKK.shape
    A_BTNKK, start_NK = A_BTNKK.astype(dtype), start_NK.astype(dtype)
    h_BNK = jnp.broadcast_to(start_NK, (B, N, K)) if h_BNK is None else h_BNK.astype(dtype)
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
    if impl == "auto":
        impl = "scan" if T == 1 or jax.default_backend() == "cpu" else "chunk"
    if impl == "scan":
        return recur(partial(step, start_NK=start_NK), h_BNK, (A_BTNKK, reset_BT))
    # The first token of the call begins a sequence too: it begins with what came in.
    cut_BT = reset_BT.at[:, 0].set(True)
    first_BNK = jnp.where(reset_BT[:, 0, None, None], start_NK, h_BNK)
    begin_BTNK = jnp.broadcast_to(start_NK, (B, T, N, K)).at[:, 0].set(first_BNK)
    v_BTNK = jnp.where(_wide(cut_BT, 2), _apply(A_BTNKK, begin_BTNK), 0)
    map_BTNKY = jnp.concatenate([jnp.where(_wide(cut_BT, 3), 0, A_BTNKK), v_BTNK[..., None]], axis=-1)
    all_states = _associative if impl == "associative" else partial(_chunked, C=chunk)
    h_BTNK = all_states(_rescaled(map_BTNKY), cut_BT)
    return h_BTNK, h_BTNK[:, -1]


def _rescaled(x, axes=(-3, -2, -1)):
    """x over its largest entry, which counts as a constant."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    return x / jnp.where(largest > 0, largest, 1)


def _wide(cut, axes):
    return cut.reshape(*cut.shape, *[1] * axes)


def _apply(A_NKK, h_NK):
    return jnp.matmul(A_NKK, h_NK[..., None], precision="highest")[..., 0]


def _after(map_NKY, before_NKY, cut):
    """The later map after the earlier one, or alone if it holds a cut, whatever the earlier one holds."""
    cut = _wide(cut, 3)
    both_NKY = jnp.matmul(map_NKY[..., :-1], jnp.where(cut, 0, before_NKY), precision="highest")
    return _rescaled(jnp.where(cut, map_NKY, both_NKY))


def _associative(map_BTNKY, cut_BT):
    def combine(left, right):
        return _after(right[0], left[0], right[1]), left[1] | right[1]

    return direction(lax.associative_scan(combine, (map_BTNKY, cut_BT), axis=1)[0][..., -1])


def _chunked(map_BTNKY, cut_BT, C):
    """The map of each chunk, all chunks side by side; the states between chunks; then the states inside them."""
    B, T, N, K, Y = map_BTNKY.shape
    M = -(-T // C)

    def split(z):
        z = jnp.pad(z, [(0, 0), (0, M * C - T)] + [(0, 0)] * (z.ndim - 2))
        return jnp.moveaxis(z.reshape(B, M, C, *z.shape[2:]), 2, 0)

    tokens = split(map_BTNKY), split(cut_BT)

    def compose(map_BMNKY, token):
        return _after(token[0], map_BMNKY, token[1]), None

    identity_BMNKY = jnp.broadcast_to(jnp.eye(K, Y, dtype=map_BTNKY.dtype), (B, M, N, K, Y))
    map_BMNKY, _ = lax.scan(compose, identity_BMNKY, tokens)

    def move(h_NK, map_cut):
        map_NKY, cut = map_cut
        cut = _wide(cut, 2)
        moved_NK = _apply(map_NKY[..., :-1], jnp.where(cut, 0, h_NK))
        return direction(jnp.where(cut, map_NKY[..., -1], moved_NK)), h_NK

    chunks = jnp.moveaxis(map_BMNKY, 1, 0), jnp.moveaxis(jnp.any(tokens[1], axis=0), 1, 0)
    _, before_MBNK = lax.scan(move, jnp.zeros((B, N, K), map_BTNKY.dtype), chunks)

    def within(h_BMNK, token):
        h_BMNK, _ = move(h_BMNK, token)
        return h_BMNK, h_BMNK

    _, h_CBMNK = lax.scan(within, jnp.moveaxis(before_MBNK, 0, 1), tokens)
    return jnp.moveaxis(h_CBMNK, 0, 2).reshape(B, M * C, N, K)[:, :T]
