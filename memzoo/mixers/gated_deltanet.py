"""Gated DeltaNet: a matrix memory that forgets by a gate and writes by the delta rule.

    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}' k_t)'        y_t = S_t' q_t

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024), arXiv:2412.06464,
eq. 10; block of fig. 1; decay a_t = exp(-rate softplus(dt_t)) as in Mamba-2.
Differs: S is [K, V], the paper's transpose; one convolution over q, k and v together.

Dims: B batch, T time, D width, H heads, K key, V value, W conv width, P = W - 1 past inputs,
      E = H (2 K + V), the channels of q, k and v.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.initial import log_uniform, short_filter, small_step


class State(NamedTuple):
    S_BHKV: jax.Array
    past_BPE: jax.Array


def step(S_KV, q_K, k_K, v_V, beta, log_a):
    """One token, one head. This is the definition; every faster form is tested against it."""
    S_KV = jnp.exp(log_a) * S_KV
    S_KV = S_KV + beta * jnp.outer(k_K, v_V - k_K @ S_KV)
    return S_KV, q_K @ S_KV


class GatedDeltaNet(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # per head; 3/4 width / heads, the paper's 6 D^2 parameters
    value_dim: int | None = None  # per head; twice key_dim, the paper's expand_v = 2
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'associative', 'chunk', 'pallas'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """(H, K, V, P)"""
        per_head = contract.divisible("width", self.width, "heads", self.heads)
        K = self.key_dim if self.key_dim is not None else max(1, per_head * 3 // 4)
        V = self.value_dim if self.value_dim is not None else 2 * K
        contract.positive(key_dim=K, value_dim=V, conv_width=self.conv_width)
        return self.heads, K, V, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        H, K, V, P = self.sizes()
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, H, K, V), wide), jnp.zeros((batch, P, H * (2 * K + V)), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V, P), (B, T, D) = self.sizes(), x_BTD.shape
        wide = contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}

        qkv_BTE = nn.Dense(H * (2 * K + V), name="qkv", **kinds)(x_BTD)
        f_WE = self.param("conv", short_filter, (P + 1, qkv_BTE.shape[-1]), self.param_dtype)
        qkv_BTE, past_BPE = ops.short_conv(qkv_BTE, f_WE, state.past_BPE, reset_BT)
        qkv_BTHE = nn.silu(qkv_BTE).reshape(B, T, H, 2 * K + V)
        q_BTHK, k_BTHK, v_BTHV = jnp.split(qkv_BTHE, [K, 2 * K], axis=-1)
        q_BTHK, k_BTHK = ops.unit(q_BTHK) * K**-0.5, ops.unit(k_BTHK)

        beta_BTH = nn.sigmoid(nn.Dense(H, use_bias=False, name="beta", **gates)(x_BTD))
        rate_H = jnp.exp(self.param("log_rate", log_uniform(1.0, 16.0), (H,), self.param_dtype).astype(wide))
        log_a_BTH = -rate_H * nn.softplus(nn.Dense(H, bias_init=small_step, name="dt", **gates)(x_BTD))

        args = q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_a_BTH
        y_BTHV, S_BHKV = gated_delta_rule(*args, state.S_BHKV, reset_BT, self.impl)

        gate_BTHV = nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD)
        y_BTHV = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y_BTHV) * nn.silu(gate_BTHV)
        y_BTD = nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV)
        return y_BTD, State(S_BHKV, past_BPE)


def gated_delta_rule(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_a_BTH, S_BHKV, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, S_BHKV)."""
    xs = q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_a_BTH
    if impl == "scan":
        y_BTHV, S_BHKV = ops.recur(jax.vmap(step), S_BHKV, ops.widen(xs), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), S_BHKV
    return ops.delta_rule(*xs, S_BHKV, reset_BT, impl=impl)
