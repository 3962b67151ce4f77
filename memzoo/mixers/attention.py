"""Softmax attention over a cache of the last `window` tokens, the present one included, and the `sinks` first ones.

    y = softmax(q' K / sqrt(d)) V        over the cache, queries and keys rotated by their places in it

Token p since the last reset sees the tokens j with p - window < j <= p or j < sinks. The cache grows to sinks + window
tokens and stays there, and its rotary places are its own, not the text's: the query stands at
min(p, sinks + window - 1), a sink at j, a token of the window p - j before the query. Up to p = sinks + window - 1 all
of this is plain causal attention, so it is that for a window as long as the text.

Source: Vaswani et al., "Attention Is All You Need" (2017), arXiv:1706.03762, eq. 1; rotary places: Su et al.,
"RoFormer" (2021), arXiv:2104.09864, eq. 34; grouped keys: Ainslie et al., "GQA" (2023), arXiv:2305.13245; sinks and
places in the cache: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2023), arXiv:2309.17453,
sec. 3.2, whose four sinks are the default here.
Differs: the present token counts as one of the window.

Dims: B batch, T time, D width, H heads, G key heads, R = H / G queries per key head, K key and V value (both head_dim),
      E = K + V, S sinks, W window, M = S + W slots of the cache, N blocks, C queries of a block, L keys in its reach,
      X any number of tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.chunks import matmul

BLOCK = 256  # queries at a time in the chunk form, or the window if that is shorter


class State(NamedTuple):
    """The sinks, then a ring, with keys before rotation. Once full, only the next slot counts: position_B <= M + W."""

    k_BGMK: jax.Array
    v_BGMV: jax.Array
    position_B: jax.Array


def step(state, q_RK, k_K, v_V, turn_MK, S):
    """One token, one key head and its queries. This is the definition; the chunk form is tested against it."""
    k_MK, v_MV, p = state
    M = len(k_MK)
    k_MK, v_MV = k_MK.at[slot(p, S, M)].set(k_K), v_MV.at[slot(p, S, M)].set(v_V)
    m_M, j_M = jnp.arange(M), held(p, S, M)
    place = jnp.minimum(p, M - 1)
    place_M = jnp.where(m_M < S, m_M, place - (p - j_M))
    q_RK, turned_MK = rotate(q_RK, turn_MK[place]), rotate(k_MK, turn_MK[place_M])
    scores_RM = matmul("rk,mk->rm", q_RK, turned_MK) * q_RK.shape[-1] ** -0.5
    filled_M = (m_M <= j_M) & (j_M <= p)
    y_RV = matmul("rm,mv->rv", nn.softmax(jnp.where(filled_M, scores_RM, -jnp.inf)), v_MV)
    return State(k_MK, v_MV, bounded(p, S, M) + 1), y_RV


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


class Attention(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for fields out of their range, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_heads: int | None = None  # as many as heads; fewer are shared
    head_dim: int | None = None  # width / heads
    window: int = 1024
    sinks: int = 4
    rope_base: float = 10_000.0
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """(G, R, K, M)"""
        contract.positive(heads=self.heads, window=self.window)
        G = self.heads if self.key_heads is None else self.key_heads
        R = contract.divisible("heads", self.heads, "key_heads", G)
        K = self.head_dim
        if K is None:
            K = contract.divisible("width", self.width, "heads", self.heads)
        if K < 2 or K % 2:
            raise ValueError(f"head_dim: expected an even integer >= 2, to rotate pairs, got {K}")
        if not contract.whole_number(self.sinks) or self.sinks < 0:
            raise ValueError(f"sinks: expected an integer >= 0, got {self.sinks!r}")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base: expected a number > 0, got {self.rope_base}")
        return G, R, K, self.sinks + self.window

    def initial_state(self, batch: int) -> State:
        G, _, K, M = self.sizes()
        shape, wide = (batch, G, M, K), contract.state_dtype(self.dtype)
        return State(jnp.zeros(shape, wide), jnp.zeros(shape, wide), jnp.zeros(batch, jnp.int32))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        check_impl("attention", self.impl, ("scan", "chunk"))
        fresh = state is None
        state = contract.begin(self, x_BTD, state, reset_BT)
        (G, R, K, M), (B, T, D), S = self.sizes(), x_BTD.shape, self.sinks
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        q_BTGRK = nn.DenseGeneral((G * R, K), name="q", **kinds)(x_BTD).reshape(B, T, G, R, K)
        k_BTGK = nn.DenseGeneral((G, K), name="k", **kinds)(x_BTD)
        v_BTGV = nn.DenseGeneral((G, K), name="v", **kinds)(x_BTD)

        if self.impl == "scan" or (self.impl == "auto" and T == 1):
            turn_MK = turns(M, K, self.rope_base, contract.state_dtype(self.dtype))
            axes = State._make((0, 0, None))  # the key heads share a position
            heads = jax.vmap(partial(step, turn_MK=turn_MK, S=S), in_axes=(axes, 0, 0, 0), out_axes=(axes, 0))
            y_BTGRV, state = ops.recur(heads, state, ops.widen((q_BTGRK, k_BTGK, v_BTGV)), reset_BT)
        else:
            y_BTGRV, state = chunk(q_BTGRK, k_BTGK, v_BTGV, state, reset_BT, S, self.rope_base, fresh)
        y_BTHV = y_BTGRV.astype(self.dtype).reshape(B, T, G * R, K)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), state


def chunk(q_BTGRK, k_BTGK, v_BTGV, state, reset_BT, S, base, fresh):
    """All T tokens, a block of queries at a time. Returns (y_BTGRV, State).

    Time counts from the first token of this call: the cache lies at times < 0. A fresh one is left out.
    """
    (B, T, _, _, K), M, wide = q_BTGRK.shape, state.k_BGMK.shape[2], state.k_BGMK.dtype
    W, P = M - S, 0 if fresh else M  # P rows come before the new tokens: the sinks, then the last W tokens in order
    N = -(-T // min(BLOCK, W))
    C = -(-T // N)
    L = min(W + C, N * C) if fresh else W + C
    turn_XK = turns(max(L, M), K, base, wide)

    position_B = bounded(state.position_B, S, M)
    start_BT = jnp.broadcast_to(-position_B[:, None], (B, T))  # when each token's text began
    if reset_BT is not None:
        start_BT = lax.cummax(jnp.where(reset_BT, jnp.arange(T, dtype=jnp.int32), start_BT), axis=1)

    kv_BXGE = jnp.concatenate([k_BTGK, v_BTGV], axis=-1)
    if not fresh:
        cache_BMGE = jnp.concatenate([state.k_BGMK, state.v_BGMV], axis=-1).swapaxes(1, 2).astype(kv_BXGE.dtype)
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

    def block(xs):
        n, *queries_and_sinks = xs
        row = jnp.clip(P + n * C - W, 0, padded_BXGE.shape[1] - L)
        near_BLGE = lax.dynamic_slice_in_dim(padded_BXGE, row, L, axis=1)
        return attend(*queries_and_sinks, near_BLGE, n * C, row - P, turn_XK, W)

    sinks_BXGE = tokens(jnp.repeat(start_BT[:, ::C], S, axis=1), jnp.tile(jnp.arange(S), N))
    sinks_NBSGE = jnp.moveaxis(sinks_BXGE.reshape(B, N, S, *sinks_BXGE.shape[2:]), 1, 0)
    xs = jnp.arange(N), blocks(pad(q_BTGRK)), blocks(pad(start_BT)), sinks_NBSGE
    body = jax.checkpoint(block, prevent_cse=False) if N > 1 else block  # the backward keeps no [T, L] scores
    y_BNCGRV = jnp.moveaxis(lax.map(body, xs), 0, 1)
    y_BTGRV = y_BNCGRV.reshape(B, N * C, *y_BNCGRV.shape[3:])[:, :T]

    last_B1 = T - 1 - start_BT[:, -1:]
    j_BM = held(last_B1, S, M)
    filled_BM = (jnp.arange(M) <= j_BM) & (j_BM <= last_B1)
    cache_BGME = only(filled_BM, tokens(start_BT[:, -1:], j_BM)).swapaxes(1, 2).astype(wide)
    return y_BTGRV, State(*jnp.split(cache_BGME, [K], axis=-1), bounded(last_B1[:, 0], S, M) + 1)


def attend(q_BCGRK, start_BC, sinks_BSGE, near_BLGE, q_time, near_time, turn_XK, W):
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

    def scores(q_turn, kv_BXGE):
        k_BXGK = rotate(kv_BXGE[..., :K], turn_XK[: kv_BXGE.shape[1], None])
        return matmul("bcgrk,bxgk->bgrcx", rotate(q_BCGRK, q_turn[..., None, None, :]), k_BXGK)

    place_BC = jnp.minimum(t_C1[:, 0] - start_BC, S + W - 1)
    near_turn_CK = lax.dynamic_slice_in_dim(turn_XK, q_time - near_time, C)
    scores_BGRCX = jnp.concatenate([scores(turn_XK[place_BC], sinks_BSGE), scores(near_turn_CK, near_BLGE)], axis=-1)
    p_BGRCX = nn.softmax(jnp.where(seen_BCX[:, None, None], scores_BGRCX * K**-0.5, -jnp.inf)).astype(near_BLGE.dtype)
    v_BXGV = jnp.concatenate([sinks_BSGE, near_BLGE], axis=1)[..., K:]
    return matmul("bgrcx,bxgv->bcgrv", p_BGRCX, v_BXGV).astype(v_BXGV.dtype)


def take(x_BXGE, row_BX):
    return jnp.take_along_axis(x_BXGE, row_BX[..., None, None], axis=1, mode="clip")


def only(seen_BX, x_BXGE):
    return jnp.where(seen_BX[..., None, None], x_BXGE, 0)


def turns(n, K, base, dtype):
    """cos and sin of 0 ... n - 1 times K / 2 frequencies, [n, K]; in float64 first, as large angles lose digits."""
    angle = np.arange(n)[:, None] * base ** (-np.arange(0, K, 2) / K)
    return jnp.asarray(np.concatenate([np.cos(angle), np.sin(angle)], axis=-1), dtype)


def rotate(x_XK, turn_XK):
    """Turns the pairs (0, 1), (2, 3), ... of the last axis."""
    cos, sin = jnp.split(turn_XK, 2, axis=-1)
    a, b = x_XK[..., ::2], x_XK[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x_XK.shape).astype(x_XK.dtype)
