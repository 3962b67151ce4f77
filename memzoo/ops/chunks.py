"""What the chunked forms share: cutting time into chunks, decays inside a chunk, and products that respect both.

Three rules keep them exact. Every exponent is a difference of cumulative log-decays that cannot be positive, masked
with -inf before `exp`. The cumulative sums are kept as a coarse part, exact in float32, and a fine remainder, so that
a difference of two small numbers survives a strong decay before them. Resets cut a chunk into segments, and a pair of
tokens, or a token and the incoming state, see each other only inside one segment.

Dims: B batch, T time, H heads, K key, N chunks, C chunk, R sets of rows,
      X anything after time and heads, Z all leading axes in one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ROWS = 16  # of forward substitution
COARSE = 2.0**-6  # log-decays are split into multiples of this and a remainder below it
FLOOR = -2000.0  # exp of it is 0 in float64 too


def matmul(equation: str, *operands: jax.Array) -> jax.Array:
    """einsum that accumulates in float32 at least and, unlike the default on GPU and TPU, rounds no float32 operand."""
    wide = jnp.promote_types(jnp.result_type(*operands), jnp.float32)
    exact = all(x.dtype == wide for x in operands)
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=wide)


def split(x_BTX: jax.Array, C: int) -> jax.Array:
    """[B, T, H, ...] to [N, B, H, C, ...], or [B, T] to [N, B, C].

    Padded with zeros in front, where they neither write nor forget. (Behind, they would put the last token's write at a
    distance of 0 from the end of its chunk: see `products`.)
    """
    B, T = x_BTX.shape[:2]
    N = -(-T // C)
    x = jnp.pad(x_BTX, [(0, 0), (N * C - T, 0)] + [(0, 0)] * (x_BTX.ndim - 2))
    x = jnp.moveaxis(x.reshape(B, N, C, *x_BTX.shape[2:]), 1, 0)
    return jnp.moveaxis(x, 2, 3) if x_BTX.ndim > 2 else x


def join(x_NBHCX: jax.Array, T: int) -> jax.Array:
    """The inverse of split: [N, B, H, C, ...] to [B, T, H, ...]."""
    x = jnp.moveaxis(jnp.moveaxis(x_NBHCX, 3, 2), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, -T:]


def layout(B: int, T: int, H: int, K: int, V: int, C: int) -> tuple[int, int]:
    """(tokens in a piece, pieces): a piece is as many chunks as are worth computing side by side.

    On a CPU matmuls want a few dozen in a batch, and temporaries that stay in its caches; elsewhere, a full chip.
    """
    N = -(-T // C)
    few, floats = (16, 2**18) if jax.default_backend() == "cpu" else (1024, 2**26)
    together = max(1, min(few, floats // (K * V)) // (B * H))
    together = 1 << (together.bit_length() - 1)  # a power of 2 divides the usual T, so that nothing is padded
    pieces = -(-N // together)
    return -(-N // pieces) * C, pieces


def pad(x_BTX: jax.Array, length: int) -> jax.Array:
    """Zeros in front, up to `length` tokens, where they neither write nor forget.

    (Behind, they would put the last token's write at a distance of 0 from the end of its chunk: see `products`.)
    """
    return jnp.pad(x_BTX, [(0, 0), (length - x_BTX.shape[1], 0)] + [(0, 0)] * (x_BTX.ndim - 2))


def fold(x_BTX: jax.Array, C: int) -> jax.Array:
    """[B, M C, H, ...] to [B M, H, C, ...], or [B, M C] to [B M, C]: the M chunks of each row become rows."""
    x = x_BTX.reshape(-1, C, *x_BTX.shape[2:])
    return jnp.swapaxes(x, 1, 2) if x.ndim > 2 else x


def unfold(x_BHCX: jax.Array, B: int) -> jax.Array:
    """The inverse of fold: [B M, H, C, ...] to [B, M C, H, ...]."""
    x = jnp.swapaxes(x_BHCX, 1, 2)
    return x.reshape(B, -1, *x.shape[2:])


def sweep(one: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, pieces: int, *, reverse: bool = False):
    """Folds `carry, ys = one(carry, xs)` over pieces of time, in which axis 1 of xs and ys is cut: (carry, ys).

    As lax.scan, but arrays stay batch first, and no copy of them with time in front is made.
    """
    if pieces == 1:
        return one(carry, xs)

    def cut(x, n):
        return lax.dynamic_slice_in_dim(x, n * (x.shape[1] // pieces), x.shape[1] // pieces, axis=1)

    def body(i, carry_and_ys):
        carry, ys = carry_and_ys
        n = pieces - 1 - i if reverse else i
        carry, new = one(carry, jax.tree.map(lambda x: cut(x, n), xs))
        put = lambda y, x: lax.dynamic_update_slice_in_dim(y, x, n * x.shape[1], axis=1)
        return carry, jax.tree.map(put, ys, new)

    _, shapes = jax.eval_shape(one, carry, jax.tree.map(lambda x: cut(x, 0), xs))
    ys = jax.tree.map(lambda y: jnp.zeros((y.shape[0], y.shape[1] * pieces, *y.shape[2:]), y.dtype), shapes)
    return lax.fori_loop(0, pieces, body, (carry, ys))


def states(d: "Decay", write: Any, state: Any, *, reverse: bool = False) -> tuple[Any, Any]:
    """state <- whole state + write from chunk to chunk, for chunks folded into rows: (before each, after the last).

    state: a pytree of arrays [B, H, K, ...]; write: one of [B M, H, K, ...].
    """
    B = jax.tree.leaves(state)[0].shape[0]
    by_chunk = lambda x: jnp.moveaxis(x.reshape(B, -1, *x.shape[1:]), 1, 0)

    def chunk(state, x):
        whole, unbroken, write = x
        return jax.tree.map(lambda s, w: jnp.where(unbroken, whole * s, 0) + w, state, write), state

    xs = jax.tree.map(by_chunk, (d.whole(), d.unbroken(), write))
    state, before = lax.scan(chunk, state, xs, reverse=reverse)
    return jax.tree.map(lambda s: jnp.moveaxis(s, 0, 1).reshape(-1, *s.shape[2:]), before), state


class Decay(NamedTuple):
    """Decays and segments inside one chunk. The log-decays and what comes of them have a last axis of K or 1."""

    coarse_BHCK: jax.Array  # cumulative log-decay, in multiples of COARSE
    fine_BHCK: jax.Array  # and the rest of it, from the start of the segment
    segment_B1C: jax.Array  # how many resets so far

    def between(self, i, j):
        """log of the decay from token j to token i, slices of the C axis; positive where j comes after i."""
        coarse, fine = self.coarse_BHCK, self.fine_BHCK
        return (coarse[..., i, :] - coarse[..., j, :]) + (fine[..., i, :] - fine[..., j, :])

    def from_start(self) -> jax.Array:
        """Decay of the incoming state as token i sees it: [B, H, C, K or 1], 0 after a reset."""
        return jnp.where(self.segment_B1C[..., None] == 0, jnp.exp(self.coarse_BHCK + self.fine_BHCK), 0)

    def to_end(self) -> jax.Array:
        """Decay of token j's write as the outgoing state holds it: [B, H, C, K or 1], 0 before a reset."""
        last_B11 = self.segment_B1C[..., -1:]
        log_BHCK = self.between(slice(-1, None), slice(None)).at[..., -1, :].set(0)  # 0 anyway: see `products`
        return jnp.where((self.segment_B1C == last_B11)[..., None], jnp.exp(log_BHCK), 0)

    def whole(self) -> jax.Array:
        """Decay of the incoming state over the chunk: [B, H, K or 1, 1], 0 if there is a reset."""
        return self.from_start()[..., -1, :, None]

    def unbroken(self) -> jax.Array:
        """True where the chunk has no reset: [B, 1, 1, 1]."""
        return self.segment_B1C[..., -1:, None] == 0


def decay(log_decay_NBHCK: jax.Array, reset_NBC: jax.Array) -> Decay:
    """Sums log-decays and resets along each chunk. Leading axes N are kept, for a scan over the chunks."""
    # Coarse sums stay below 2^24 multiples, which are exact in float32; exp of the floor is 0 all the same.
    exact = -(2.0**24) * COARSE / log_decay_NBHCK.shape[-2]
    floor = FLOOR if log_decay_NBHCK.dtype == jnp.float64 else max(FLOOR, exact)
    clipped = jnp.maximum(log_decay_NBHCK, floor)
    coarse = jnp.round(lax.stop_gradient(clipped) / COARSE) * COARSE
    segment_NB1C = jnp.cumsum(reset_NBC, axis=-1, dtype=jnp.int32)[..., None, :]
    # Fine sums begin anew with each segment, so that a gradient is 0 across a reset and not what rounding leaves of it.
    before_CC = np.tri(log_decay_NBHCK.shape[-2], dtype=bool)
    summed_NB1CC = before_CC & (segment_NB1C[..., :, None] == segment_NB1C[..., None, :])
    fine = jnp.matmul(summed_NB1CC.astype(clipped.dtype), clipped - coarse, precision="highest")
    return Decay(jnp.cumsum(coarse, axis=-2), fine, segment_NB1C)


def gradient_of(d: Decay, d_fine: jax.Array) -> Decay:
    """The cotangent of a Decay whose coarse part and segments have none."""
    no_gradient: Any = np.zeros(d.segment_B1C.shape, jax.dtypes.float0)
    return Decay(jnp.zeros_like(d.coarse_BHCK), d_fine, no_gradient)


def scaled(x: jax.Array, by: jax.Array) -> jax.Array:
    """x * by, taken in the dtype of `by` and returned in that of x."""
    return (x.astype(by.dtype) * by).astype(x.dtype)


def products(q_RBHCK: jax.Array, k_BHCK: jax.Array, d: Decay) -> jax.Array:
    """P_ij = sum_K q_iK k_jK exp(decay from j to i), for j <= i in one segment, else 0: [R, B, H, C, C].

    A token's own write has not decayed. Here and in `to_end` that is written as a constant 0, not as a difference of
    equals: its gradient is large where decay is strong, and would drown the small ones it cancels among.
    """
    C = k_BHCK.shape[-2]
    row, column = jnp.arange(C)[:, None], jnp.arange(C)[None, :]
    seen_B1CC = (row >= column) & (d.segment_B1C[..., :, None] == d.segment_B1C[..., None, :])
    if d.fine_BHCK.shape[-1] > 1:
        return jnp.where(seen_B1CC, _products_per_key(q_RBHCK, k_BHCK, d), 0)
    coarse, fine = d.coarse_BHCK[..., 0], d.fine_BHCK[..., 0]
    log_BHCC = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    log_BHCC = jnp.where(row == column, 0, jnp.where(seen_B1CC, log_BHCC, -jnp.inf))
    return matmul("rbhik,bhjk->rbhij", q_RBHCK, k_BHCK) * jnp.exp(log_BHCC)


def _products_per_key(q_RBHCK, k_BHCK, d):
    """By halves: a pair of tokens meets where their block is cut in two, and both decay to the cut, exponents <= 0."""
    C = k_BHCK.shape[-2]
    size = 1 << (C - 1).bit_length()
    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - C), (0, 0)], mode="edge")
    q, k, coarse, fine = (pad(x) for x in (q_RBHCK, k_BHCK, d.coarse_BHCK, d.fine_BHCK))
    P = matmul("rbhck,bhck->rbhc", q, k)[..., None, None]  # [R, B, H, size, 1, 1], blocks of one token
    half = 1
    while half < size:
        c, f, q_cut, k_cut = (x.reshape(*x.shape[:-2], -1, 2 * half, x.shape[-1]) for x in (coarse, fine, q, k))
        mid = slice(half - 1, half)
        to_late = jnp.exp((c[..., half:, :] - c[..., mid, :]) + (f[..., half:, :] - f[..., mid, :]))
        from_early = jnp.exp((c[..., mid, :] - c[..., :half, :]) + (f[..., mid, :] - f[..., :half, :]))
        q_late, k_early = scaled(q_cut[..., half:, :], to_late), scaled(k_cut[..., :half, :], from_early)
        corner = matmul("rbhnik,bhnjk->rbhnij", q_late, k_early)
        X, Y = P[..., 0::2, :, :], P[..., 1::2, :, :]
        top, bottom = jnp.concatenate([X, jnp.zeros_like(X)], -1), jnp.concatenate([corner, Y], -1)
        P = jnp.concatenate([top, bottom], -2)
        half *= 2
    return P[..., 0, :C, :C]


def unit_lower_inverse(A: jax.Array) -> jax.Array:
    """(I + A)^-1 for strictly lower triangular A [..., C, C]: 16-row forward substitution, then block merge.

    Neumann doubling (I - A)(I + A^2)(I + A^4)... is wrong by many orders of magnitude when keys are correlated.
    """
    C = A.shape[-1]
    size = min(ROWS, C)
    if C % size or (C // size) & (C // size - 1):
        padded = size * (1 << (-(-C // size) - 1).bit_length())
        A = jnp.pad(A, [(0, 0)] * (A.ndim - 2) + [(0, padded - C)] * 2)
        return unit_lower_inverse(A)[..., :C, :C]
    blocks = jnp.stack([A[..., m : m + size, m : m + size] for m in range(0, C, size)], axis=-3)
    inverse = _substitute(blocks)  # [..., C / size, size, size]
    while size < C:  # [[X, 0], [A21, Y]] inverts to [[X', 0], [-Y' A21 X', Y']]
        lower = jnp.stack([A[..., m + size : m + 2 * size, m : m + size] for m in range(0, C, 2 * size)], axis=-3)
        X, Y = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -matmul("...ij,...jk->...ik", Y, matmul("...ij,...jk->...ik", lower, X))
        inverse = jnp.concatenate(
            [jnp.concatenate([X, jnp.zeros_like(X)], -1), jnp.concatenate([corner, Y], -1)], axis=-2
        )
        size *= 2
    return inverse[..., 0, :, :]


def _substitute(A):
    """Row by row, the batch in the minor axis so that every step is one long vector operation."""
    n = A.shape[-1]
    A_ijZ = jnp.moveaxis(A.reshape(-1, n, n), 0, -1)
    rows = []
    for i in range(n):
        row_jZ = jnp.zeros((n, A_ijZ.shape[-1]), A.dtype).at[i].set(1)
        for j in range(i):
            row_jZ = row_jZ - A_ijZ[i, j] * rows[j]
        rows.append(row_jZ)
    return jnp.moveaxis(jnp.stack(rows), -1, 0).reshape(A.shape)


@jax.custom_vjp
def known_inverse(A: jax.Array, inverse: jax.Array) -> jax.Array:
    """`inverse`, computed before as (I + A)^-1, with the gradient that it has in A."""
    return inverse


def _known_inverse_fwd(A, inverse):
    return inverse, inverse


def _known_inverse_bwd(inverse, d_inverse):
    dA = -matmul("...ji,...jk->...ik", inverse, matmul("...ij,...kj->...ik", d_inverse, inverse))
    return jnp.tril(dA, -1), jnp.zeros_like(inverse)


known_inverse.defvjp(_known_inverse_fwd, _known_inverse_bwd)
