"""Fast and Forgetful Memory: traces of the past that fade and turn, every rate of fading with every rate of turning.

    gamma_mc = exp(-|alpha_m| + i omega_c)        x~_t = (W_1 x_t + b_1) sigmoid(W_2 x_t + b_2)
    S_t = gamma S_{t-1} + x~_t 1'                 g_t = sigmoid(W_4 x_t + b_4)
    y_t = LN(W_3 [Re S_t; Im S_t] + b_3) g_t + (W_5 x_t + b_5) (1 - g_t)

Source: Morad, Kortvelesy, Liwicki, Prorok, "Reinforcement Learning with Fast and Forgetful Memory" (2023),
arXiv:2310.04128, sec. 4; sizes, initialisation, the LayerNorm without parameters and its place before the output gate
from the code of the paper's experiments.
Differs: alpha is clipped nowhere, since powers of gamma are never inverted. An episode may end anywhere in a call: the
released JAX version's scan combines `done` flags by the later one alone, which is not associative; here they are OR-ed.
That version has LN after the output gate, and alpha from e down to 1e-6 at the start: neither is so here.

Dims: B batch, T time, D width, M traces, C contexts, X = M C.
"""

import math
import sys
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.initial import within


class State(NamedTuple):
    S_BMC: jax.Array  # complex


def step(S_MC, x_M, alpha_M, omega_C):
    """One token; x is x~. This is the definition; every faster form is tested against it."""
    gamma_MC = jnp.exp(-jnp.abs(alpha_M)[:, None] + 1j * omega_C)
    S_MC = gamma_MC * S_MC + x_M[:, None]
    return S_MC, S_MC


class FFM(nn.Module):
    """x_BTD -> (y_BTD, State). The state is complex64, or complex128 when `dtype` is float64.

    Raises ValueError, by name, for sizes below 1, for periods out of order or not finite, and for inputs, state or
    resets that do not fit.
    """

    width: int
    traces: int = 32  # M, the paper's memory size
    contexts: int = 4  # C
    min_period: float = 1.0  # of omega at the start, in tokens
    max_period: float = 1024.0  # and what the slowest trace takes to fade to 1%
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int]:
        """(M, C)"""
        contract.positive(width=self.width, traces=self.traces, contexts=self.contexts)
        if not 0 < self.min_period <= self.max_period:
            periods = f"{self.min_period}, {self.max_period}"
            raise ValueError(f"min_period, max_period: expected 0 < min_period <= max_period, got {periods}")
        return self.traces, self.contexts

    def initial_state(self, batch: int) -> State:
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, *self.sizes()), jnp.promote_types(wide, jnp.complex64)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (M, C), D, wide = self.sizes(), self.width, contract.state_dtype(self.dtype)

        def dense(name, size, inputs, dtype=self.dtype):
            init, kinds = within(inputs**-0.5), {"dtype": dtype, "param_dtype": self.param_dtype}
            return nn.Dense(size, kernel_init=init, bias_init=init, name=name, **kinds)

        x_BTM = dense("in", M, D)(x_BTD) * nn.sigmoid(dense("in_gate", M, D, wide)(x_BTD))
        alpha_M = self.param("alpha", fading(self.max_period), (M,), self.param_dtype).astype(wide)
        omega_C = self.param("omega", turning(self.min_period, self.max_period), (C,), self.param_dtype).astype(wide)
        S_BTMC, S_BMC = aggregate(x_BTM.astype(wide), alpha_M, omega_C, state.S_BMC, reset_BT, self.impl)

        S_BTX = S_BTMC.reshape(*x_BTM.shape[:2], M * C)
        z_BTD = dense("mix", D, 2 * M * C)(jnp.concatenate([S_BTX.real, S_BTX.imag], axis=-1))
        z_BTD = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_scale=False, use_bias=False)(z_BTD)
        g_BTD = nn.sigmoid(dense("out_gate", D, D, wide)(x_BTD))
        y_BTD = z_BTD * g_BTD + dense("skip", D, D)(x_BTD) * (1 - g_BTD)
        return y_BTD.astype(self.dtype), State(S_BMC)


def aggregate(x_BTM, alpha_M, omega_C, S_BMC, reset_BT, impl="auto"):
    """All T tokens. Returns (S_BTMC, S_BMC)."""
    if impl == "scan":
        return ops.recur(lambda S_MC, x_M: step(S_MC, x_M, alpha_M, omega_C), S_BMC, (x_BTM,), reset_BT)
    (B, T, M), C = x_BTM.shape, omega_C.size
    fade_M1, turn_C = jnp.exp(-jnp.abs(alpha_M))[:, None], lax.complex(jnp.cos(omega_C), jnp.sin(omega_C))
    gamma_BTX = jnp.broadcast_to((fade_M1 * turn_C).reshape(M * C), (B, T, M * C))
    x_BTX = jnp.repeat(x_BTM, C, axis=-1)
    S_BTX, S_BX = ops.linear_scan(gamma_BTX, x_BTX, S_BMC.reshape(B, M * C), reset_BT, impl=impl)
    return S_BTX.reshape(B, T, M, C), S_BX.reshape(B, M, C)


def fading(max_period):
    """Evenly from -0.673, which leaves 1% of a trace after 7 tokens, to what leaves 1% after max_period.

    0.673 is log(1.8e308) / 1024 - 0.02: the experiments' form takes gamma^-1024, which has to stay within float64.
    """
    fastest = 0.02 - math.log(sys.float_info.max) / 1024
    slowest = max(math.log(0.01) / max_period, fastest)
    return lambda key, shape, dtype=float: jnp.linspace(fastest, slowest, *shape, dtype=dtype)


def turning(min_period, max_period):
    """Periods evenly from one to the other."""
    return lambda key, shape, dtype=float: (2 * math.pi / jnp.linspace(min_period, max_period, *shape)).astype(dtype)
