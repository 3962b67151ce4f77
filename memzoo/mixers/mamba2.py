"""Mamba-2: a state-space model with one input-dependent decay per head, which is linear attention in other words.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t'        y_t = h_t' C_t + D x_t

Source: Dao, Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality" (2024), arXiv:2405.21060, sec. 7.1-7.2 and fig. 6; sizes and initialisation from the released code (mamba_ssm).
The recurrence, one token at a time and in chunks, is `ops.ssd`, which HAX has too.
Differs: h is [N, P], the paper's transpose; dt and the other projections are separate, so that dt is float32.

Dims: B batch, T time, D width, H heads, P channels of a head, N state size, G groups of heads that share B and C,
      W conv width, L = W - 1 past inputs, E = H P + 2 G N, the channels of x, B and C, I = H P / G.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.initial import log_uniform, small_step, within
from memzoo.ops.ssd import ssd


class State(NamedTuple):
    h_BHNP: jax.Array
    past_BLE: jax.Array


class Mamba2(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for sizes that do not divide one another, and for inputs, state or resets that do not
    fit.
    """

    width: int
    expand: int = 2
    head_dim: int | None = None  # P; 64, or the largest divisor of 64 that also divides expand width
    state_size: int = 128  # N
    groups: int = 1
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'associative', 'chunk', 'pallas'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int, int]:
        """(H, P, N, G, L)"""
        contract.positive(width=self.width, expand=self.expand, state_size=self.state_size, conv_width=self.conv_width)
        inner = self.expand * self.width
        P = math.gcd(64, inner) if self.head_dim is None else self.head_dim
        H = contract.divisible("expand * width", inner, "head_dim", P)
        contract.divisible("heads = expand * width / head_dim", H, "groups", self.groups)
        return H, P, self.state_size, self.groups, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        H, P, N, G, L = self.sizes()
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, H, N, P), wide), jnp.zeros((batch, L, H * P + 2 * G * N), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, P, N, G, L), (B, T, D) = self.sizes(), x_BTD.shape
        wide = contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        xBC_BTE = nn.Dense(H * P + 2 * G * N, name="xBC", **kinds)(x_BTD)
        f_WE = self.param("conv", within((L + 1) ** -0.5), (L + 1, xBC_BTE.shape[-1]), self.param_dtype)
        bias_E = self.param("conv_bias", within((L + 1) ** -0.5), xBC_BTE.shape[-1:], self.param_dtype)
        xBC_BTE, past_BLE = ops.short_conv(xBC_BTE, f_WE, state.past_BLE, reset_BT)
        xBC_BTE = nn.silu(xBC_BTE + bias_E.astype(self.dtype))
        x_BTE, B_BTE, C_BTE = jnp.split(xBC_BTE, [H * P, H * P + G * N], axis=-1)
        x_BTHP = x_BTE.reshape(B, T, H, P)
        B_BTGN, C_BTGN = B_BTE.reshape(B, T, G, N), C_BTE.reshape(B, T, G, N)

        dt = nn.Dense(H, bias_init=small_step, dtype=wide, param_dtype=self.param_dtype, name="dt")
        dt_BTH = nn.softplus(dt(x_BTD))
        A_H = -jnp.exp(self.param("A_log", log_uniform(1.0, 16.0), (H,), self.param_dtype).astype(wide))
        D_H = self.param("D", nn.initializers.ones, (H,), self.param_dtype).astype(wide)

        y_BTHP, h_BHNP = ssd(C_BTGN, B_BTGN, x_BTHP, dt_BTH, A_H, D_H, state.h_BHNP, reset_BT, self.impl)

        z_BTHP = nn.DenseGeneral((H, P), name="gate", **kinds)(x_BTD)
        y_BTGI = (y_BTHP * nn.silu(z_BTHP)).reshape(B, T, G, H * P // G)
        norm: dict[str, Any] = {
            "epsilon": 1e-5,
            "feature_axes": (-2, -1),
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        y_BTGI = nn.RMSNorm(name="norm", **norm)(y_BTGI)
        y_BTD = nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTGI)
        return y_BTD, State(h_BHNP, past_BLE)
