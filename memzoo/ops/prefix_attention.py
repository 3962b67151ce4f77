"""Softmax attention over the last `window` tokens and, from everywhere alike, over a few in front of all of them.

    y_t = softmax([q_t' P, turn(q_t, t)' turn(K, j)] / sqrt(K)) [U ; V]        P, U of the prefix, K, V of tokens j

The tokens of the prefix have no place, those of the window have rotary places. To `window_attention` the prefix is one
token without a value, whose logit is log sum exp(q_t' P / sqrt(K)). As that differs from query to query, a channel more
takes it off all logits, [q_t, -logit]' [k_j, 1], and leaves 0 of it. A channel more of the values, of ones, tells what
part of the softmax is the window's; the rest is the prefix's.

Source: the sliding window with a prefix of Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time"
(2024), arXiv:2501.00663, eq. 26-27 and fig. 3b.
Differs: the paper's prefix stands at places before the text, ever further away; here it is as near to all tokens.

Dims: B batch, T time, H heads, K key, V value, U tokens of the prefix, W window.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.chunks import matmul
from memzoo.ops.rotary import places, turn
from memzoo.ops.window_attention import FORMS, Cache, empty_cache, window_attention


class PrefixCache(NamedTuple):
    """The window, in which keys and values have a channel more, of ones, and the place of the next token."""

    window: Cache
    place_B: jax.Array


def empty_prefix_cache(batch: int, heads: int, window: int, K: int, V: int, dtype: Any) -> PrefixCache:
    """What a sequence begins with."""
    cache = empty_cache(batch, heads, window, K + 1, V + 1, dtype)
    return PrefixCache(cache, cache.position_B)


def prefix_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    prefix_k_UHK: jax.Array,
    prefix_v_UHV: jax.Array,
    cache: PrefixCache,
    reset_BT: jax.Array | None = None,
    *,
    rope_base: float = 10_000.0,
    fresh: bool = False,
    impl: str = "auto",
    chunk: int = 256,
) -> tuple[jax.Array, PrefixCache]:
    """All T tokens. Returns (y_BTHV in the dtype of v, PrefixCache).

    The prefix may have no token. fresh: the cache is empty. impl, chunk: of `window_attention`.
    Raises ValueError, by name, for shapes, dtypes or numbers that do not fit, NotImplementedError for a form this op
    does not have.
    """
    check_impl("prefix_attention", impl, FORMS)
    of_prefix = {"prefix_k_UHK": prefix_k_UHK, "prefix_v_UHV": prefix_v_UHV}
    sizes = check_shapes("U", q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, reset_BT=reset_BT, **of_prefix)
    T, K, U = (sizes[axis] for axis in "TKU")
    wide = cache.window.k_BGMK.dtype
    place_BT = places(cache.place_B, T, reset_BT)

    scores_BTHU = matmul("bthk,uhk->bthu", q_BTHK, prefix_k_UHK.astype(q_BTHK.dtype)) * K**-0.5
    logit_BTH1 = jax.nn.logsumexp(scores_BTHU, axis=-1, keepdims=True) if U else jnp.zeros((*q_BTHK.shape[:3], 1), wide)
    prefix_BTHV = matmul("bthu,uhv->bthv", jax.nn.softmax(scores_BTHU), prefix_v_UHV.astype(wide))

    def beside(x_BTHX, channel_BTH1):
        return jnp.concatenate(
            [x_BTHX, jnp.broadcast_to(channel_BTH1, (*x_BTHX.shape[:3], 1)).astype(x_BTHX.dtype)], -1
        )

    # `window_attention` divides by sqrt(K + 1)
    q_BTHK = beside(turn(q_BTHK, place_BT, rope_base) * ((K + 1) / K) ** 0.5, -logit_BTH1 * (K + 1) ** 0.5)
    k_BTHK, v_BTHV = beside(turn(k_BTHK, place_BT, rope_base), 1), beside(v_BTHV, 1)
    y_BTHRV, window = window_attention(
        q_BTHK[:, :, :, None], k_BTHK, v_BTHV, cache.window, reset_BT,
        empty_U=(0.0,) if U else (), fresh=fresh, impl=impl, chunk=chunk,
    )  # fmt: skip
    y_BTHV, part_BTH1 = jnp.split(y_BTHRV[:, :, :, 0].astype(wide), [-1], axis=-1)
    y_BTHV = y_BTHV + (1 - part_BTH1) * prefix_BTHV
    return y_BTHV.astype(v_BTHV.dtype), PrefixCache(window, place_BT[:, -1] + 1)
