"""Polarised Mamba: Mamba with one state that never forgets and one that always does.

    dt_t, B_t, C_t = softplus(W x_t + b), W_B x_t, W_C x_t
    h_t = Abar_t h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t        Abar_t = (1, exp(dt_t A), 0)

Source: Wang, Cai, Wang, Zhu, Srivastava, Wang, Li, "Understanding and Mitigating Bottlenecks of State Space Models
through the Lens of Recency and Over-smoothing" (2024), arXiv:2501.00658, sec. 6 and appendix E.5.1; the rest is Mamba,
arXiv:2312.00752, and its released code.
Differs: the paper's 0 is exp(-1000 dt), its code's exp(-100 dt), which is 0.9 at dt = 1e-3; here both are exact. A
state with Abar = 0 is what its token writes, so it is added to y and not carried. h and A are transposed, and the
projections of dt, B and C are separate, as in `mamba`.

Dims: B batch, T time, D width, E = expand D channels, N learned states, M = ones + N states carried, Q = M + zeros,
      R rank of dt, W conv width, P = W - 1 past inputs.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.initial import like_torch, small_step, within


class State(NamedTuple):
    h_BME: jax.Array
    past_BPE: jax.Array


def step(h_ME, x_E, dt_E, A_ME, B_M, C_M, now, D_E):
    """One token; A's first rows are 0, and now = C . B of the states with Abar = 0. This is the definition."""
    h_ME = jnp.exp(dt_E * A_ME) * h_ME + jnp.outer(B_M, dt_E * x_E)
    return h_ME, C_M @ h_ME + now * dt_E * x_E + D_E * x_E


class PolarizedMamba(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for sizes, inputs, state or resets that do not fit.
    """

    width: int
    expand: int = 2
    state_size: int = 16  # N, per channel
    ones: int = 1  # states with Abar = 1
    zeros: int = 1  # states with Abar = 0
    dt_rank: int | None = None  # R; width / 16, rounded up
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int, int]:
        """(E, N, M, R, P)"""
        R = -(-self.width // 16) if self.dt_rank is None else self.dt_rank
        contract.positive(width=self.width, expand=self.expand, dt_rank=R)
        contract.positive(state_size=self.state_size, conv_width=self.conv_width)
        for name, states in (("ones", self.ones), ("zeros", self.zeros)):
            if not contract.whole_number(states) or states < 0:
                raise ValueError(f"{name}: expected an integer >= 0, got {states!r}")
        return self.expand * self.width, self.state_size, self.ones + self.state_size, R, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        E, _, M, _, P = self.sizes()
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, M, E), wide), jnp.zeros((batch, P, E), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (E, N, M, R, P), D = self.sizes(), self.width
        wide = contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}
        plain: dict[str, Any] = {"use_bias": False, "kernel_init": like_torch}

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype)

        x_BTE, z_BTE = jnp.split(nn.Dense(2 * E, name="in", **plain, **kinds)(x_BTD), 2, axis=-1)
        conv = within((P + 1) ** -0.5)
        f_WE, bias_E = param("conv", conv, P + 1, E), param("conv_bias", conv, E)
        x_BTE, past_BPE = ops.short_conv(x_BTE, f_WE, state.past_BPE, reset_BT)
        x_BTE = nn.silu(x_BTE + bias_E.astype(self.dtype))

        dt_BTR = nn.Dense(R, name="dt_low", **plain, **gates)(x_BTE)
        dt = nn.Dense(E, name="dt", kernel_init=within(R**-0.5), bias_init=small_step, **gates)
        dt_BTE = nn.softplus(dt(dt_BTR))
        A_NE = -jnp.exp(param("A_log", log_integers, N, E).astype(wide))
        A_ME = jnp.pad(A_NE, ((self.ones, 0), (0, 0)))
        dot = partial(jnp.einsum, "bte,eq->btq", preferred_element_type=wide)
        B_EQ, C_EQ = (param(name, like_torch, E, M + self.zeros) for name in ("B", "C"))
        B_BTQ, C_BTQ = dot(x_BTE, B_EQ.astype(self.dtype)), dot(x_BTE, C_EQ.astype(self.dtype))
        now_BT = jnp.sum(B_BTQ[..., M:] * C_BTQ[..., M:], -1)
        D_E = param("D", nn.initializers.ones, E).astype(wide)

        xs = x_BTE, dt_BTE, A_ME, B_BTQ[..., :M], C_BTQ[..., :M], now_BT, D_E
        y_BTE, h_BME = polarized(*xs, state.h_BME, reset_BT, self.impl)
        y_BTD = nn.Dense(D, name="out", **plain, **kinds)(y_BTE * nn.silu(z_BTE))
        return y_BTD, State(h_BME, past_BPE)


def polarized(x_BTE, dt_BTE, A_ME, B_BTM, C_BTM, now_BT, D_E, h_BME, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTE, h_BME)."""
    if impl == "scan":

        def token(h_ME, x_E, dt_E, B_M, C_M, now):
            return step(h_ME, x_E, dt_E, A_ME, B_M, C_M, now, D_E)

        y_BTE, h_BME = ops.recur(token, h_BME, ops.widen((x_BTE, dt_BTE, B_BTM, C_BTM, now_BT)), reset_BT)
        return y_BTE.astype(x_BTE.dtype), h_BME
    y_BTE, h_BME = ops.selective_scan(x_BTE, dt_BTE, A_ME, B_BTM, C_BTM, h_BME, reset_BT, impl=impl)
    return (y_BTE + (now_BT[..., None] * dt_BTE + D_E) * x_BTE).astype(x_BTE.dtype), h_BME


def log_integers(key, shape, dtype=float):
    """log A = log(1 .. N) in each channel: the real part of S4D's eigenvalues."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[0] + 1, dtype=dtype))[:, None], shape)
