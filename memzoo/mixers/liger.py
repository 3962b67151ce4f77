"""Liger: the weights of a softmax layer as gated linear attention, whose gates are its keys, and a softmax window.

    S_t = diag(alpha_t) S_{t-1} + phi(k_t) v_t'        alpha_t = sigmoid(k_t)^(1 / tau)        phi = softmax over K
    y_t = (1 - beta) S_t' phi(q_t) + beta softmax(q_t' K_t / sqrt(K)) V_t        K_t, V_t of the last `window` tokens

In the window queries and keys are rotated by their places, in the memory they are not. No parameter is new: each has
the name and shape that it has in `attention`, whose weights load as they are, to be fine-tuned in one stage.

Source: Lan, Sun, Hu, Du, Cheng, "Liger: Linearizing Large Language Models to Gated Recurrent Structures" (2025),
arXiv:2503.01496, eq. 7, 9 and 10, with the gates of GLA in table 1; tau = 16 from the released code
(OpenSparseLLMs/Linearization), as are a gate for each key channel, from keys that are not rotated, and no normaliser.
Differs: the pooling of keys to gates is the identity, which it is in the released code too; rotated are the pairs
(0, 1), (2, 3), ... of channels, as in `attention`.

Dims: B batch, T time, D width, H heads, G key heads, R = H / G queries per key head, K key and V value (both head_dim),
      W window.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.window_attention import Cache, empty_cache, turns
from memzoo.ops.window_attention import step as window_step


class State(NamedTuple):
    """The memory, and a ring of the window, with keys before rotation. Once full, position_B <= 2 W."""

    S_BGKV: jax.Array
    k_BGWK: jax.Array
    v_BGWV: jax.Array
    position_B: jax.Array


def step(state, q_RK, k_K, v_V, turn_WK, tau, beta):
    """One token, one key head and its queries. This is the definition; the chunk form is tested against it."""
    S_KV, *cache = state
    alpha_K = jnp.exp(nn.log_sigmoid(k_K) / tau)
    S_KV = alpha_K[:, None] * S_KV + jnp.outer(nn.softmax(k_K), v_V)
    cache, near_RV = window_step(Cache(*cache), q_RK, k_K, v_V, turn_WK)
    return State(S_KV, *cache), (1 - beta) * nn.softmax(q_RK) @ S_KV + beta * near_RV


class Liger(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for fields out of their range, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_heads: int | None = None  # as many as heads; fewer are shared
    head_dim: int | None = None  # width / heads
    window: int = 64
    window_share: float = 0.5  # beta, of the output; the rest is the memory's
    gate_temperature: float = 16.0  # tau: the larger, the slower the memory forgets
    rope_base: float = 10_000.0
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(G, R, K)"""
        contract.positive(heads=self.heads, window=self.window)
        G = self.heads if self.key_heads is None else self.key_heads
        R = contract.divisible("heads", self.heads, "key_heads", G)
        K = self.head_dim
        if K is None:
            K = contract.divisible("width", self.width, "heads", self.heads)
        if not contract.whole_number(K) or K < 2 or K % 2:
            raise ValueError(f"head_dim: expected an even integer >= 2, to rotate pairs, got {K!r}")
        if not 0 <= self.window_share <= 1:
            raise ValueError(f"window_share: expected a number in 0 ... 1, got {self.window_share}")
        for name in ("gate_temperature", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        return G, R, K

    def initial_state(self, batch: int) -> State:
        (G, _, K), wide = self.sizes(), contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, G, K, K), wide), *empty_cache(batch, G, self.window, K, K, wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        check_impl("liger", self.impl, ("scan", "chunk"))
        fresh = state is None
        state = contract.begin(self, x_BTD, state, reset_BT)
        (G, R, K), (B, T, D) = self.sizes(), x_BTD.shape
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        q_BTGRK = nn.DenseGeneral((G * R, K), name="q", **kinds)(x_BTD).reshape(B, T, G, R, K)
        k_BTGK = nn.DenseGeneral((G, K), name="k", **kinds)(x_BTD)
        v_BTGV = nn.DenseGeneral((G, K), name="v", **kinds)(x_BTD)

        xs = q_BTGRK, k_BTGK, v_BTGV
        if self.impl == "scan" or (self.impl == "auto" and T == 1):
            turn_WK = turns(self.window, K, self.rope_base, contract.state_dtype(self.dtype))
            axes = State._make((0, 0, 0, None))  # the key heads share a position
            one = partial(step, turn_WK=turn_WK, tau=self.gate_temperature, beta=self.window_share)
            heads = jax.vmap(one, in_axes=(axes, 0, 0, 0), out_axes=(axes, 0))
            y_BTGRV, state = ops.recur(heads, state, ops.widen(xs), reset_BT)
        else:
            numbers = self.gate_temperature, self.window_share, self.rope_base
            y_BTGRV, state = chunked(*xs, state, reset_BT, *numbers, fresh)
        y_BTHV = y_BTGRV.astype(self.dtype).reshape(B, T, G * R, K)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), state


def chunked(q_BTGRK, k_BTGK, v_BTGV, state, reset_BT, tau, beta, base, fresh):
    """All T tokens. Returns (y_BTGRV, State)."""
    S_BGKV, *cache = state
    near_BTGRV, cache = ops.window_attention(
        q_BTGRK, k_BTGK, v_BTGV, Cache(*cache), reset_BT, rope_base=base, fresh=fresh, impl="chunk"
    )
    q_wide, k_wide = ops.widen((q_BTGRK, k_BTGK))
    R, shape = q_BTGRK.shape[3], (*q_BTGRK.shape[:2], -1, q_BTGRK.shape[-1])
    to_heads = lambda x_BTGX: jnp.repeat(x_BTGX, R, axis=2)  # of one key head all queries read the same memory
    q_BTHK, k_BTHK = nn.softmax(q_wide).reshape(shape), to_heads(nn.softmax(k_wide))
    args = q_BTHK.astype(v_BTGV.dtype), k_BTHK.astype(v_BTGV.dtype), to_heads(v_BTGV)
    log_alpha_BTHK = to_heads(nn.log_sigmoid(k_wide) / tau)
    S_BHKV = jnp.repeat(S_BGKV, R, axis=1)
    y_BTHV, S_BHKV = ops.linear_attention(*args, log_alpha_BTHK, S_BHKV, reset_BT, impl="chunk")
    y_BTGRV = (1 - beta) * y_BTHV.reshape(near_BTGRV.shape) + beta * near_BTGRV
    return y_BTGRV, State(S_BHKV[:, ::R], *cache)
