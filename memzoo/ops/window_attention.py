"""Softmax attention over the last `window` tokens, the present one included, and the `sinks` first ones: a cache.

    y = softmax([q' K / sqrt(d), empty]) [V ; 0]        over the cache, and over logits of tokens whose values are 0

Token p since the last reset sees the tokens j with p - window < j <= p or j < sinks. The cache grows to sinks + window
tokens and stays there. With `rope_base`, queries and keys are rotated by their places in it, not in the text: the query
stands at min(p, sinks + window - 1), a sink at j, a token of the window p - j before the query.

Source: Vaswani et al., "Attention Is All You Need" (2017), arXiv:1706.03762, eq. 1; rotary places: Su et al.,
"RoFormer" (2021), arXiv:2104.09864, eq. 34; places in the cache: Xiao et al., "Efficient Streaming Language Models with
Attention Sinks" (2023), arXiv:2309.17453, sec. 3.2, where tokens without a value are its "Zero Sink", of logit 0.

Dims: B batch, T time, G key heads, R queries per key head, K key and V value, E = K + V, S sinks, W window,
      M = S + W slots of the cache, U tokens without a value, N blocks, C queries of a block, L keys in its reach,
      X any number of tokens.
"""

import numbers
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo.contract import positive, whole_number
from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.chunks import matmul
from memzoo.ops.recur import recur, widen

FORMS = ("scan", "chunk")


class Cache(NamedTuple):
    """The sinks, then a ring, with keys before rotation. Once full, only the next slot counts: position_B <= M + W."""

    k_BGMK: jax.Array
    v_BGMV: jax.Array
    position_B: jax.Array


def step(cache, q_RK, k_K, v_V, turn_MK=None, S=0, empty_U=()):
    """One token, one key head and its queries. This is the definition; the chunk form is tested against it."""
    k_MK, v_MV, p = cache
    M = len(k_MK)
    k_MK, v_MV = k_MK.at[slot(p, S, M)].set(k_K), v_MV.at[slot(p, S, M)].set(v_V)
    m_M, j_M = jnp.arange(M), held(p, S, M)
    place = jnp.minimum(p, M - 1)
    place_M = jnp.where(m_M < S, m_M, place - (p - j_M))
    q_RK, turned_MK = turned(q_RK, turn_MK, place), turned(k_MK, turn_MK, place_M)
    scores_RM = matmul("rk,mk->rm", q_RK, turned_MK) * q_RK.shape[-1] ** -0.5
    filled_M = (m_M <= j_M) & (j_M <= p)
    y_RV = matmul("rm,mv->rv", softmax(jnp.where(filled_M, scores_RM, -jnp.inf), empty_U), v_MV)
    return Cache(k_MK, v_MV, bounded(p, S, M) + 1), y_RV


def softmax(scores_X, empty_U=()):
    """What of the softmax along the last axis is left to these scores, beside tokens without a value."""
    logits_U = jnp.broadcast_to(jnp.asarray(empty_U, scores_X.dtype), (*scores_X.shape[:-1], len(empty_U)))
    return jax.nn.softmax(jnp.concatenate([scores_X, logits_U], axis=-1))[..., : scores_X.shape[-1]]


def slot(p, S, M):
    """Where the cache keeps token p."""
    return jnp.where(p < S, p, S + (p - S) % (M - S))


def held(p, S, M):
    """The last token up to p that slot m is for. The slot is empty where that is below m or above p."""
    m_M = jnp.arange(M)
    return jnp.where(m_M < S, m_M, p - (p - m_M) % (M - S))


def bounded(p, S, M):
    """p, or a smaller position with a full cache and the same slot, so that no text is too long for int32."""
    return jnp.where(p < M, p, M + (p - M) % (M - S))


def empty_cache(batch: int, key_heads: int, slots: int, K: int, V: int, dtype: jnp.dtype) -> Cache:
    """What a sequence begins with. slots: sinks + window."""
    zeros = lambda n: jnp.zeros((batch, key_heads, slots, n), dtype)
    return Cache(zeros(K), zeros(V), jnp.zeros(batch, jnp.int32))


def window_attention(
    q_BTGRK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    cache: Cache,
    reset_BT: jax.Array | None = None,
    *,
    sinks: int = 0,
    rope_base: float | None = None,
    empty_U: jax.Array | tuple = (),
    fresh: bool = False,
    impl: str = "auto",
    chunk: int = 256,
) -> tuple[jax.Array, Cache]:
    """All T tokens. Returns (y_BTGRV, Cache), y in the dtype of v, the cache in its own.

    cache: of sinks + window slots. fresh: it is empty, so that the chunk form may leave it out.
    rope_base: of the rotary places; None is no places. empty_U: logits of tokens that all see, whose values are 0.
    impl: 'scan', 'chunk' or 'auto'. chunk: queries at a time in the chunk form, or the window if that is shorter.
    Raises ValueError, by name, for shapes, dtypes or numbers that do not fit, NotImplementedError for a form this op
    does not have.
    """
    positive(chunk=chunk)
    check_impl("window_attention", impl, FORMS)
    k_BGMK, v_BGMV, _ = cache
    sizes = check_shapes(q_BTGRK=q_BTGRK, k_BTGK=k_BTGK, v_BTGV=v_BTGV, k_BGMK=k_BGMK, v_BGMV=v_BGMV, reset_BT=reset_BT)
    T, M, K, wide = sizes["T"], sizes["M"], sizes["K"], k_BGMK.dtype
    if not whole_number(sinks) or sinks < 0:
        raise ValueError(f"sinks: expected an integer >= 0, got {sinks!r}")
    positive(window=M - sinks)
    if rope_base is not None and not (isinstance(rope_base, numbers.Real) and 0 < rope_base < np.inf):
        raise ValueError(f"rope_base: expected a finite number > 0, or None, got {rope_base!r}")
    if rope_base is not None and K % 2:
        raise ValueError(f"q_BTGRK: expected an even K, to rotate pairs by rope_base, got {list(q_BTGRK.shape)}")
    if jnp.asarray(empty_U).ndim != 1:
        raise ValueError(f"empty_U: expected one axis of logits, got shape {list(jnp.asarray(empty_U).shape)}")
    if impl == "scan" or (impl == "auto" and T == 1):
        axes = Cache._make((0, 0, None))  # the key heads share a position
        one = partial(step, turn_MK=turns(M, K, rope_base, wide), S=sinks, empty_U=empty_U)
        heads = jax.vmap(one, in_axes=(axes, 0, 0, 0), out_axes=(axes, 0))
        y_BTGRV, cache = recur(heads, cache, widen((q_BTGRK, k_BTGK, v_BTGV)), reset_BT)
        return y_BTGRV.astype(v_BTGV.dtype), cache
    return _chunked(q_BTGRK, k_BTGK, v_BTGV, cache, reset_BT, sinks, rope_base, empty_U, fresh, chunk)


def _chunked(q_BTGRK, k_BTGK, v_BTGV, cache, reset_BT, S, base, empty_U, fresh, block):
    """A block of queries at a time.

    Time counts from the first token of this call: the cache lies at times < 0. A fresh one is left out.
    """
    (B, T, _, _, K), M, wide = q_BTGRK.shape, cache.k_BGMK.shape[2], cache.k_BGMK.dtype
    W, P = M - S, 0 if fresh else M  # P rows come before the new tokens: the sinks, then the last W tokens in order
    N = -(-T // min(block, W))
    C = -(-T // N)
    L = min(W + C, N * C) if fresh else W + C
    turn_XK = turns(max(L, M), K, base, wide)

    position_B = bounded(cache.position_B, S, M)
    start_BT = jnp.broadcast_to(-position_B[:, None], (B, T))  # when each token's text began
    if reset_BT is not None:
        start_BT = lax.cummax(jnp.where(reset_BT, jnp.arange(T, dtype=jnp.int32), start_BT), axis=1)

    kv_BXGE = jnp.concatenate([k_BTGK, v_BTGV], axis=-1)
    if not fresh:
        cache_BMGE = jnp.concatenate([cache.k_BGMK, cache.v_BGMV], axis=-1).swapaxes(1, 2).astype(kv_BXGE.dtype)
        past_BWGE = take(cache_BMGE, slot(position_B[:, None] + jnp.arange(-W, 0), S, M))
        kv_BXGE = jnp.concatenate([cache_BMGE[:, :S], past_BWGE, kv_BXGE], axis=1)

    def tokens(start_BX, j_X):
        """The tokens j of the texts that began then."""
        time_BX = start_BX + j_X
        return take(kv_BXGE, jnp.where((time_BX < 0) & (j_X < S), j_X, P + time_BX))

    def pad(x_BXZ):
        return jnp.pad(x_BXZ, [(0, 0), (0, N * C - T)] + [(0, 0)] * (x_BXZ.ndim - 2))

    def blocks(x_BXZ):
        return jnp.moveaxis(x_BXZ.reshape(B, N, -1, *x_BXZ.shape[2:]), 1, 0)

    padded_BXGE = pad(kv_BXGE)

    def one(xs):
        n, *queries_and_sinks = xs
        row = jnp.clip(P + n * C - W, 0, padded_BXGE.shape[1] - L)
        near_BLGE = lax.dynamic_slice_in_dim(padded_BXGE, row, L, axis=1)
        return attend(*queries_and_sinks, near_BLGE, n * C, row - P, turn_XK, W, empty_U)

    sinks_BXGE = tokens(jnp.repeat(start_BT[:, ::C], S, axis=1), jnp.tile(jnp.arange(S), N))
    sinks_NBSGE = jnp.moveaxis(sinks_BXGE.reshape(B, N, S, *sinks_BXGE.shape[2:]), 1, 0)
    xs = jnp.arange(N), blocks(pad(q_BTGRK)), blocks(pad(start_BT)), sinks_NBSGE
    body = jax.checkpoint(one, prevent_cse=False) if N > 1 else one  # the backward keeps no [T, L] scores
    y_BNCGRV = jnp.moveaxis(lax.map(body, xs), 0, 1)
    y_BTGRV = y_BNCGRV.reshape(B, N * C, *y_BNCGRV.shape[3:])[:, :T]

    last_B1 = T - 1 - start_BT[:, -1:]
    j_BM = held(last_B1, S, M)
    filled_BM = (jnp.arange(M) <= j_BM) & (j_BM <= last_B1)
    cache_BGME = only(filled_BM, tokens(start_BT[:, -1:], j_BM)).swapaxes(1, 2).astype(wide)
    return y_BTGRV, Cache(*jnp.split(cache_BGME, [K], axis=-1), bounded(last_B1[:, 0], S, M) + 1)


def attend(q_BCGRK, start_BC, sinks_BSGE, near_BLGE, q_time, near_time, turn_XK, W, empty_U=()):
    """A block of queries over what is near, and over the sinks of the text that the block begins in.

    A sink inside the window is met there; so is any sink of a text that begins later in the block, since C <= W.
    """
    C, S, L, K = q_BCGRK.shape[1], sinks_BSGE.shape[1], near_BLGE.shape[1], q_BCGRK.shape[-1]
    t_C1, start_BC1 = q_time + jnp.arange(C)[:, None], start_BC[:, :, None]
    near_L, sinks_B1S = near_time + jnp.arange(L), start_BC1[:, :1] + jnp.arange(S)
    near_BCL = (near_L <= t_C1) & (near_L > t_C1 - W) & (near_L >= start_BC1)
    sinks_BCS = (sinks_B1S <= t_C1 - W) & (sinks_B1S >= start_BC1)
    seen_BCX = jnp.concatenate([sinks_BCS, near_BCL], axis=-1)

    # what nobody in the block may see is cut off, not only masked: it may be NaN
    sinks_BSGE = only(sinks_B1S[:, 0] < q_time, sinks_BSGE)
    near_BLGE = only(near_L >= start_BC[:, :1], near_BLGE)

    def scores(place_BC, kv_BXGE):
        k_BXGK = turned(kv_BXGE[..., :K], turn_XK, jnp.arange(kv_BXGE.shape[1])[:, None])
        return matmul("bcgrk,bxgk->bgrcx", turned(q_BCGRK, turn_XK, place_BC[..., None, None]), k_BXGK)

    place_BC, near_place_C = jnp.minimum(t_C1[:, 0] - start_BC, S + W - 1), q_time - near_time + jnp.arange(C)
    scores_BGRCX = jnp.concatenate([scores(place_BC, sinks_BSGE), scores(near_place_C, near_BLGE)], axis=-1)
    p_BGRCX = softmax(jnp.where(seen_BCX[:, None, None], scores_BGRCX * K**-0.5, -jnp.inf), empty_U)
    v_BXGV = jnp.concatenate([sinks_BSGE, near_BLGE], axis=1)[..., K:]
    return matmul("bgrcx,bxgv->bcgrv", p_BGRCX.astype(v_BXGV.dtype), v_BXGV).astype(v_BXGV.dtype)


def take(x_BXGE, row_BX):
    return jnp.take_along_axis(x_BXGE, row_BX[..., None, None], axis=1, mode="clip")


def only(seen_BX, x_BXGE):
    return jnp.where(seen_BX[..., None, None], x_BXGE, 0)


def turns(n, K, base, dtype):
    """cos and sin of 0 ... n - 1 times K / 2 frequencies, [n, K]; in float64 first, as large angles lose digits."""
    if base is None:
        return None
    angle = np.arange(n)[:, None] * base ** (-np.arange(0, K, 2) / K)
    return jnp.asarray(np.concatenate([np.cos(angle), np.sin(angle)], axis=-1), dtype)


def turned(x_XK, turn_XK, place_X):
    """Rotated to its place, where there are places."""
    return x_XK if turn_XK is None else rotate(x_XK, turn_XK[place_X])


def rotate(x_XK, turn_XK):
    """Turns the pairs (0, 1), (2, 3), ... of the last axis."""
    cos, sin = jnp.split(turn_XK, 2, axis=-1)
    a, b = x_XK[..., ::2], x_XK[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x_XK.shape).astype(x_XK.dtype)
