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
      M slots of the cache: the sinks and the window.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.window_attention import Cache, empty_cache

BLOCK = 256  # queries at a time in the chunk form, or the window if that is shorter


class State(NamedTuple):
    """The sinks, then a ring, with keys before rotation. Once full, only the next slot counts: position_B <= M + W."""

    k_BGMK: jax.Array
    v_BGMV: jax.Array
    position_B: jax.Array


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
        return State(*empty_cache(batch, G, M, K, K, contract.state_dtype(self.dtype)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        check_impl("attention", self.impl, ("scan", "chunk"))
        fresh = state is None
        state = contract.begin(self, x_BTD, state, reset_BT)
        (G, R, K, _), (B, T, D) = self.sizes(), x_BTD.shape
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        q_BTGRK = nn.DenseGeneral((G * R, K), name="q", **kinds)(x_BTD).reshape(B, T, G, R, K)
        k_BTGK = nn.DenseGeneral((G, K), name="k", **kinds)(x_BTD)
        v_BTGV = nn.DenseGeneral((G, K), name="v", **kinds)(x_BTD)

        args = q_BTGRK, k_BTGK, v_BTGV, Cache(*state), reset_BT
        seen: dict[str, Any] = {"sinks": self.sinks, "rope_base": self.rope_base, "fresh": fresh}
        y_BTGRV, cache = ops.window_attention(*args, **seen, impl=self.impl, chunk=BLOCK)
        y_BTHV = y_BTGRV.astype(self.dtype).reshape(B, T, G * R, K)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), State(*cache)
