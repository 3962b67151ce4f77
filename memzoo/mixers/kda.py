"""Kimi Delta Attention: a matrix memory that writes by the delta rule and forgets each of its keys at its own rate.

    S_t = (I - beta_t k_t k_t') diag(alpha_t) S_{t-1} + beta_t k_t v_t'        y_t = S_t' q_t

Source: Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture" (2025), arXiv:2510.26692, eq. 1; the
layer around it in the section on neural parameterisation. The decay alpha_t = exp(-rate softplus(W2 W1 x_t + b)), the
sizes and the initialisation are those of the authors' released code (flash-linear-attention).
Differs: one convolution over q, k and v together.

Dims: B batch, T time, D width, H heads, K key, V value, R gate rank, W conv width, P = W - 1 past inputs,
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


def step(S_KV, q_K, k_K, v_V, beta, log_alpha_K):
    """One token, one head. This is the definition; every faster form is tested against it."""
    S_KV = jnp.exp(log_alpha_K)[:, None] * S_KV
    S_KV = S_KV + beta * jnp.outer(k_K, v_V - k_K @ S_KV)
    return S_KV, q_K @ S_KV


class KDA(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # per head; width / heads
    value_dim: int | None = None  # per head; width / heads
    gate_rank: int | None = None  # of the decay and of the output gate; value_dim
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int, int]:
        """(H, K, V, R, P)"""
        per_head = contract.divisible("width", self.width, "heads", self.heads)
        K = self.key_dim if self.key_dim is not None else per_head
        V = self.value_dim if self.value_dim is not None else per_head
        R = self.gate_rank if self.gate_rank is not None else V
        contract.positive(key_dim=K, value_dim=V, gate_rank=R, conv_width=self.conv_width)
        return self.heads, K, V, R, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        H, K, V, _, P = self.sizes()
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, H, K, V), wide), jnp.zeros((batch, P, H * (2 * K + V)), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V, R, P), (B, T, D) = self.sizes(), x_BTD.shape
        wide = contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}

        qkv_BTE = nn.Dense(H * (2 * K + V), use_bias=False, name="qkv", **kinds)(x_BTD)
        f_WE = self.param("conv", short_filter, (P + 1, qkv_BTE.shape[-1]), self.param_dtype)
        qkv_BTE, past_BPE = ops.short_conv(qkv_BTE, f_WE, state.past_BPE, reset_BT)
        qkv_BTHE = nn.silu(qkv_BTE).reshape(B, T, H, 2 * K + V)
        q_BTHK, k_BTHK, v_BTHV = jnp.split(qkv_BTHE, [K, 2 * K], axis=-1)
        q_BTHK, k_BTHK = ops.unit(q_BTHK) * K**-0.5, ops.unit(k_BTHK)

        beta_BTH = nn.sigmoid(nn.Dense(H, use_bias=False, name="beta", **gates)(x_BTD))
        rate_H = jnp.exp(self.param("log_rate", log_uniform(1.0, 16.0), (H,), self.param_dtype).astype(wide))
        low_BTR = nn.Dense(R, use_bias=False, name="dt_in", **gates)(x_BTD)
        dt_BTHK = nn.softplus(nn.DenseGeneral((H, K), bias_init=small_step, name="dt_out", **gates)(low_BTR))
        log_alpha_BTHK = -rate_H[:, None] * dt_BTHK

        args = q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_alpha_BTHK
        y_BTHV, S_BHKV = kimi_delta_attention(*args, state.S_BHKV, reset_BT, self.impl)

        low_BTR = nn.Dense(R, use_bias=False, name="gate_in", **kinds)(x_BTD)
        gate_BTHV = nn.DenseGeneral((H, V), name="gate_out", **kinds)(low_BTR)
        y_BTHV = nn.RMSNorm(epsilon=1e-5, name="norm", **kinds)(y_BTHV) * nn.sigmoid(gate_BTHV)
        y_BTD = nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="out", **kinds)(y_BTHV)
        return y_BTD, State(S_BHKV, past_BPE)


def kimi_delta_attention(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_alpha_BTHK, S_BHKV, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, S_BHKV)."""
    xs = q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_alpha_BTHK
    if impl == "scan":
        y_BTHV, S_BHKV = ops.recur(jax.vmap(step), S_BHKV, ops.widen(xs), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), S_BHKV
    return ops.delta_rule(*xs, S_BHKV, reset_BT, impl=impl)
