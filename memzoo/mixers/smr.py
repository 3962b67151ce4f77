"""SMR, state memory replay: before a state-space model, each input is rescaled by what the last few inputs were.

    v_t = 2 sigmoid(sum_w m_w x_{t-w} + b) x_t               m: W learnable memories per channel
    h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A v_t        A = -exp(log_rate) + i omega, per channel, with N states
    y_t = glu(W gelu(2 Re(C h_t) + D v_t) + b)

A sample that comes early or late is one of the wrong size to a model with a fixed dt: replayed inputs may correct it,
and, unlike a dt that depends on the input, leave the model a convolution of v.

Source: Qi, Gao, Zhang, Li, Liu, Wu, Zhou, "SMR: State Memory Replay for Long Sequence Modeling" (2024),
arXiv:2405.17534: an input times a convolution of the inputs, plugged in before an SSM, which here is S4D-Lin of Gu,
Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models" (2022), arXiv:2206.11893.
Differs: details are ours: one filter per channel, of width 4, and a doubled sigmoid, so that memories of 0, which they
start with, leave the SSM as it is, and no input is more than doubled.

Dims: B batch, T time, D width, N state size, complex, W conv width, P = W - 1 past inputs, E = 2 N, real parts before
      imaginary ones.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops


class State(NamedTuple):
    h_BDN: jax.Array  # complex
    past_BPD: jax.Array


def step(h_DN, x_D, replay_D, a_DN, b_DN, C_DN, D_D):
    """One token, replay = sum m x + b, a and b as discretised. This is the definition; every faster form is tested
    against it."""
    v_D = 2 * nn.sigmoid(replay_D) * x_D
    h_DN = a_DN * h_DN + b_DN * v_D[:, None]
    return h_DN, 2 * jnp.sum(C_DN * h_DN, -1).real + D_D * v_D


class SMR(nn.Module):
    """x_BTD -> (y_BTD, State). The state is complex64 and float32, or complex128 and float64 when `dtype` is float64.

    Raises ValueError, by name, for sizes below 1, and for inputs, state or resets that do not fit.
    """

    width: int
    state_size: int = 32  # N, complex, per channel
    conv_width: int = 4  # W, memories per channel
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int]:
        """(N, P)"""
        contract.positive(width=self.width, state_size=self.state_size, conv_width=self.conv_width)
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {self.dt_min}, {self.dt_max}")
        return self.state_size, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        (N, P), wide = self.sizes(), contract.state_dtype(self.dtype)
        h_BDN = jnp.zeros((batch, self.width, N), jnp.promote_types(wide, jnp.complex64))
        return State(h_BDN, jnp.zeros((batch, P, self.width), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (N, P), D = self.sizes(), self.width
        wide = contract.state_dtype(self.dtype)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        x_BTD = x_BTD.astype(self.dtype)
        m_WD = param("memories", nn.initializers.zeros, P + 1, D)
        replay_BTD, past_BPD = ops.short_conv(x_BTD.astype(wide), m_WD, state.past_BPD, reset_BT)
        replay_BTD = replay_BTD + param("memories_bias", nn.initializers.zeros, D)

        log_rate_DN = param("log_rate", nn.initializers.constant(math.log(0.5)), D, N)
        omega_DN = param("omega", lambda _, shape, dtype: math.pi * jnp.ones(shape, dtype) * jnp.arange(N), D, N)
        dt_D = jnp.exp(param("log_dt", log_uniform(self.dt_min, self.dt_max), D))
        C_DE = param("C", nn.initializers.normal(0.5**0.5), D, 2 * N)
        D_D = param("D", nn.initializers.normal(1.0), D)
        a_DN, b_DN = ops.zero_order_hold(lax.complex(-jnp.exp(log_rate_DN), omega_DN), dt_D[:, None])
        C_DN = lax.complex(C_DE[:, :N], C_DE[:, N:])

        y_BTD, h_BDN = smr(x_BTD, replay_BTD, a_DN, b_DN, C_DN, D_D, state.h_BDN, reset_BT, self.impl)
        out = nn.Dense(2 * D, dtype=self.dtype, param_dtype=self.param_dtype, name="out")
        return nn.glu(out(nn.gelu(y_BTD, approximate=False))), State(h_BDN, past_BPD)


def smr(x_BTD, replay_BTD, a_DN, b_DN, C_DN, D_D, h_BDN, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTD, h_BDN)."""
    if impl == "scan":
        one = partial(step, a_DN=a_DN, b_DN=b_DN, C_DN=C_DN, D_D=D_D)
        y_BTD, h_BDN = ops.recur(one, h_BDN, ops.widen((x_BTD, replay_BTD)), reset_BT)
    else:
        v_BTD = 2 * nn.sigmoid(replay_BTD) * x_BTD
        y_BTD, h_BDN = ops.diagonal_ssm(v_BTD, a_DN, b_DN, 2 * C_DN, h_BDN, reset_BT, impl=impl)
        y_BTD = y_BTD + D_D * v_BTD
    return y_BTD.astype(x_BTD.dtype), h_BDN


def log_uniform(low, high):
    """The logarithm of what is uniform in it."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))
