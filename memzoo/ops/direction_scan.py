"""The linear recurrence without inputs, of which only the direction is kept, block by block.

    h_t = A_t h_{t-1} / |A_t h_{t-1}|

A product of T matrices grows or shrinks like exp(T), and leaves the floating-point numbers after a hundred tokens. Its
direction does not depend on when, or how often, it is divided by a positive number, so each form divides where it
likes: `scan` at every token, the others at every product of two matrices. The divisor needs no gradient either.
A transition that nearly annihilates the state makes what follows sensitive to rounding, in every form: measured in
float32 with random transitions [3, 3] to [16, 16], three seeds each, gradients of each form, of `scan` too, are within
2e-5 of float64's, mostly within 5e-6.

Source: Blelloch, "Prefix Sums and Their Applications" (1990), sec. 1.4, for the associative form, whose monoid is that
of matrices up to a positive factor. A product that holds a reset is the vector that begins there, and a flag says so.

Dims: B batch, T time, N blocks, K block size, C chunk, M chunks. Inside, a block is G blocks of J with one length:
      G = 1, J = K for full transitions, G = K, J = 1 for diagonal ones; Y = J + 1.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.contract import positive
from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.recur import recur

FORMS = ("scan", "associative", "chunk")


def step(h_NGJ, A_NGJJ, begins, start_NGJ):
    """One token. This is the definition."""
    h_NGJ = direction(_apply(A_NGJJ, jnp.where(begins, start_NGJ, h_NGJ)))
    return h_NGJ, h_NGJ


def direction(h: jax.Array, axes: tuple[int, ...] = (-2, -1)) -> jax.Array:
    """h / |h| over `axes`, however small or large h is; 0 where it is 0."""
    h = _rescaled(h, axes)
    square = jnp.sum(h * h, axis=axes, keepdims=True)
    return h * lax.rsqrt(jnp.where(square > 0, square, 1))


def direction_scan(
    A: jax.Array,
    start_NK: jax.Array,
    h_BNK: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (h_BTNK, h_BNK), every state and the last one, in float32 or wider.

    A: the transitions of each block, real, [B, T, N, K, K], or [B, T, N, K] if they are diagonal.
    start_NK: what a new sequence begins with. h_BNK: the incoming state, start_NK by default. Both may have any length;
    what comes out has length 1 in each block. A block that a transition maps to 0 stays 0.
    reset_BT: bool, where True the token begins a new sequence. impl: 'scan', 'associative', 'chunk' or 'auto'.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have.
    """
    positive(chunk=chunk)
    check_impl("direction_scan", impl, FORMS)
    transitions: dict[str, Any] = {"A_BTNK" if jnp.ndim(A) == 4 else "A_BTNKK": A}
    check_shapes(**transitions, start_NK=start_NK, h_BNK=h_BNK, reset_BT=reset_BT)
    return _forms(A, start_NK, h_BNK, reset_BT, impl=impl, chunk=chunk)


@partial(jax.jit, static_argnames=("impl", "chunk"))  # so that a call outside of jit does not compile its scans anew
def _forms(A, start_NK, h_BNK, reset_BT, impl, chunk):
    dtype = jnp.result_type(A, start_NK, jnp.float32, *([] if h_BNK is None else [h_BNK]))
    B, T, N, K = A.shape[:4]
    A_BTNGJJ = (A[..., None, None] if A.ndim == 4 else A[:, :, :, None]).astype(dtype)
    G, J = A_BTNGJJ.shape[3:5]
    start_NGJ = start_NK.astype(dtype).reshape(N, G, J)
    h_BNK = jnp.broadcast_to(start_NK, (B, N, K)) if h_BNK is None else h_BNK
    h_BNGJ = h_BNK.astype(dtype).reshape(B, N, G, J)
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
    if impl == "auto":
        impl = "scan" if T == 1 or jax.default_backend() == "cpu" else "chunk"
    if impl == "scan":
        h_BTNGJ, _ = recur(partial(step, start_NGJ=start_NGJ), h_BNGJ, (A_BTNGJJ, reset_BT))
    else:
        # The first token of the call begins a sequence too: it begins with what came in.
        cut_BT = reset_BT.at[:, 0].set(True)
        first_BNGJ = jnp.where(_wide(reset_BT[:, 0], 3), start_NGJ, h_BNGJ)
        begin_BTNGJ = jnp.broadcast_to(start_NGJ, (B, T, N, G, J)).at[:, 0].set(first_BNGJ)
        v_BTNGJ = jnp.where(_wide(cut_BT, 3), _apply(A_BTNGJJ, begin_BTNGJ), 0)
        map_BTNGJY = jnp.concatenate([jnp.where(_wide(cut_BT, 4), 0, A_BTNGJJ), v_BTNGJ[..., None]], axis=-1)
        all_states = _associative if impl == "associative" else partial(_chunked, C=chunk)
        h_BTNGJ = all_states(_rescaled(map_BTNGJY), cut_BT)
    h_BTNK = h_BTNGJ.reshape(B, T, N, K)
    return h_BTNK, h_BTNK[:, -1]


def _rescaled(x, axes=(-3, -2, -1)):
    """x over its largest entry, which counts as a constant."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    return x / jnp.where(largest > 0, largest, 1)


def _wide(cut, axes):
    return cut.reshape(*cut.shape, *[1] * axes)


def _apply(A_GJJ, h_GJ):
    return jnp.matmul(A_GJJ, h_GJ[..., None], precision="highest")[..., 0]


def _after(map_NGJY, before_NGJY, cut):
    """The later map after the earlier one, or alone if it holds a cut, whatever the earlier one holds."""
    cut = _wide(cut, 4)
    both_NGJY = jnp.matmul(map_NGJY[..., :-1], jnp.where(cut, 0, before_NGJY), precision="highest")
    return _rescaled(jnp.where(cut, map_NGJY, both_NGJY))


def _associative(map_BTNGJY, cut_BT):
    def combine(left, right):
        return _after(right[0], left[0], right[1]), left[1] | right[1]

    return direction(lax.associative_scan(combine, (map_BTNGJY, cut_BT), axis=1)[0][..., -1])


def _chunked(map_BTNGJY, cut_BT, C):
    """The map of each chunk, all chunks side by side; the states between chunks; then the states inside them.

    A product may all but annihilate the state that it meets, and what is left of it is then mostly rounding. The
    tokens one by one do not have that, so the states between chunks are taken once more from where they lead.
    """
    B, T, *block, Y = map_BTNGJY.shape
    M = -(-T // C)

    def split(z):
        z = jnp.pad(z, [(0, 0), (0, M * C - T)] + [(0, 0)] * (z.ndim - 2))
        return jnp.moveaxis(z.reshape(B, M, C, *z.shape[2:]), 2, 0)

    tokens = split(map_BTNGJY), split(cut_BT)

    def compose(map_BMNGJY, token):
        return _after(token[0], map_BMNGJY, token[1]), None

    identity_BMNGJY = jnp.broadcast_to(jnp.eye(Y - 1, Y, dtype=map_BTNGJY.dtype), (B, M, *block, Y))
    map_BMNGJY, _ = lax.scan(compose, identity_BMNGJY, tokens)

    def move(h_NGJ, map_cut):
        map_NGJY, cut = map_cut
        cut = _wide(cut, 3)
        moved_NGJ = _apply(map_NGJY[..., :-1], jnp.where(cut, 0, h_NGJ))
        return direction(jnp.where(cut, map_NGJY[..., -1], moved_NGJ)), h_NGJ

    chunks = jnp.moveaxis(map_BMNGJY, 1, 0), jnp.moveaxis(jnp.any(tokens[1], axis=0), 1, 0)
    _, before_MBNGJ = lax.scan(move, jnp.zeros((B, *block), map_BTNGJY.dtype), chunks)

    def within(h_BMNGJ, token):
        h_BMNGJ, _ = move(h_BMNGJ, token)
        return h_BMNGJ, h_BMNGJ

    before_BMNGJ = jnp.moveaxis(before_MBNGJ, 0, 1)
    led_BMNGJ, _ = lax.scan(within, lax.stop_gradient(before_BMNGJ), tokens)
    again_BMNGJ = jnp.concatenate([before_BMNGJ[:, :1], led_BMNGJ[:, :-1]], axis=1)
    before_BMNGJ += lax.stop_gradient(again_BMNGJ - before_BMNGJ)  # its gradient is that of the products
    _, h_CBMNGJ = lax.scan(within, before_BMNGJ, tokens)
    return jnp.moveaxis(h_CBMNGJ, 0, 2).reshape(B, M * C, *block)[:, :T]
