"""Based's linear attention: softmax attention with exp(x) replaced by 1 + x + x^2 / 2, so that it fits in a state.

    S_t = S_{t-1} + phi(k_t) v_t'      z_t = z_{t-1} + phi(k_t)      y_t = S_t' phi(q_t) / z_t' phi(q_t)
    phi(q)' phi(k) = 1 + x + x^2 / 2       x = q' k / sqrt(K)

Source: Arora, Eyuboglu, Zhang, Timalsina, Alberti, Zinsley, Zou, Rudra, Ré, "Simple linear attention language models
balance the recall-throughput tradeoff" (2024), arXiv:2402.18668, the Taylor linear attention; sizes from the released
code (HazyResearch/based), where width 1,024 has 16 heads.
Differs: phi keeps each product of two channels once, 1 + K + K (K + 1) / 2 features in place of 1 + K + K^2; the
denominator has a floor of 1/2, which it never falls below but by rounding, where the code adds 1e-12. Based's model
puts short convolutions and softmax over small windows between these layers: mixers of their own.

Dims: B batch, T time, D width, H heads, K key, V value, E features of a key.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops import taylor
from memzoo.ops.taylor import FLOOR, phi


class State(NamedTuple):
    S_BHEV: jax.Array
    z_BHE: jax.Array


def step(state, q_K, k_K, v_V):
    """One token, one head. This is the definition; every faster form is tested against it."""
    S_EV, z_E = state
    S_EV = S_EV + jnp.outer(phi(k_K), v_V)
    z_E = z_E + phi(k_K)
    return State(S_EV, z_E), phi(q_K) @ S_EV / jnp.maximum(phi(q_K) @ z_E, FLOOR)


class Based(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int | None = None  # of 64 channels, or of the largest divisor of 64 that also divides width
    feature_dim: int = 16  # K, per head
    value_dim: int | None = None  # per head; width / heads
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V)"""
        contract.positive(width=self.width, feature_dim=self.feature_dim)
        H = self.width // math.gcd(64, self.width) if self.heads is None else self.heads
        per_head = contract.divisible("width", self.width, "heads", H)
        V = self.value_dim if self.value_dim is not None else per_head
        contract.positive(value_dim=V)
        return H, self.feature_dim, V

    def initial_state(self, batch: int) -> State:
        (H, K, V), wide = self.sizes(), contract.state_dtype(self.dtype)
        E = taylor.size(K)
        return State(jnp.zeros((batch, H, E, V), wide), jnp.zeros((batch, H, E), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V), D = self.sizes(), self.width
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        q_BTHK = nn.DenseGeneral((H, K), name="q", **kinds)(x_BTD)
        k_BTHK = nn.DenseGeneral((H, K), name="k", **kinds)(x_BTD)
        v_BTHV = nn.DenseGeneral((H, V), name="v", **kinds)(x_BTD)
        y_BTHV, state = taylor_attention(q_BTHK, k_BTHK, v_BTHV, state, reset_BT, self.impl)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), state


def taylor_attention(q_BTHK, k_BTHK, v_BTHV, state, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, State)."""
    if impl == "scan":
        y_BTHV, state = ops.recur(jax.vmap(step), state, ops.widen((q_BTHK, k_BTHK, v_BTHV)), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), state
    q_BTHE, k_BTHE = (phi(x).astype(v_BTHV.dtype) for x in ops.widen((q_BTHK, k_BTHK)))
    y_BTHV, total_BTH, S_BHEV, z_BHE = ops.normalised_linear_attention(
        q_BTHE, k_BTHE, v_BTHV, None, *state, reset_BT, impl=impl
    )
    return (y_BTHV / jnp.maximum(total_BTH, FLOOR)[..., None]).astype(v_BTHV.dtype), State(S_BHEV, z_BHE)
