"""RG-LRU, the recurrence of Griffin and RecurrentGemma: a real diagonal LRU with a recurrence gate and an input gate.

    r_t, i_t = sigmoid(W u_t + b)                 each its own W, b
    a_t = a^(c r_t),  a = sigmoid(Lambda),  c = 8
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t
    y_t = W_out (h_t gelu(W_gate x_t + b)) + b    u = conv(W_in x + b)

Source: De, Smith, Fernando, Botev, et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient
Language Models" (2024), arXiv:2402.19427, sec. 2.4 (the RG-LRU), fig. 2c (the block around it, which is what this mixer
is), sec. 4.1 (16 blocks in the gates' W), appendix A (log a_t); conv, biases and hidden from recurrentgemma.
Differs: recurrentgemma scales a sequence's first input by 1, not by sqrt(1 - a_1^2), and starts with a itself in
[0.9, 0.999], not a^c; both are the paper's here. It clips the gradient of the square root, which is exact here: through
the gates it is bounded, and it is 0 where a_t rounds to 1.

Dims: B batch, T time, D width, F hidden, H heads (blocks of the gates), K = F / H, W conv width, P = W - 1 past inputs.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops

POWER = 8.0  # the paper's c


class State(NamedTuple):
    h_BF: jax.Array
    past_BPF: jax.Array


def step(h_F, u_F, r_F, i_F, log_a_F):
    """One token. This is the definition; every faster form is tested against it."""
    log_a_F = POWER * r_F * log_a_F
    h_F = jnp.exp(log_a_F) * h_F + root(log_a_F) * (i_F * u_F)
    return h_F, h_F


def root(log_a):
    """sqrt(1 - a^2), with gradient 0 rather than infinite where a is 1."""
    below_1 = log_a < 0
    return jnp.where(below_1, jnp.sqrt(-jnp.expm1(2 * jnp.where(below_1, log_a, -1.0))), 0.0)


class RGLRU(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a hidden size that heads do not divide, and for inputs, state or resets that do not
    fit.
    """

    width: int
    hidden: int | None = None  # F; width as in recurrentgemma, about 4/3 width in the paper
    heads: int | None = None  # H; 16, or the largest divisor of 16 that also divides hidden
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """(F, H, K, P)"""
        F = self.width if self.hidden is None else self.hidden
        contract.positive(width=self.width, hidden=F, conv_width=self.conv_width)
        H = math.gcd(16, F) if self.heads is None else self.heads
        given = "width" if self.hidden is None else "hidden"
        return F, H, contract.divisible(given, F, "heads", H), self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        F, _, _, P = self.sizes()
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, F), wide), jnp.zeros((batch, P, F), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (F, H, K, P), (B, T, D) = self.sizes(), x_BTD.shape
        wide = contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        u_BTF = nn.Dense(F, name="in", **kinds)(x_BTD)
        f_WF = self.param("conv", nn.initializers.normal(0.1 * (P + 1) ** -0.5), (P + 1, F), self.param_dtype)
        bias_F = self.param("conv_bias", nn.initializers.zeros, (F,), self.param_dtype)
        u_BTF, past_BPF = ops.short_conv(u_BTF, f_WF, state.past_BPF, reset_BT)
        u_BTF = u_BTF + bias_F.astype(self.dtype)

        def gate(name):
            W_HKJ = self.param(name, lecun_blocks, (H, K, K), self.param_dtype).astype(wide)
            b_F = self.param(name + "_bias", nn.initializers.zeros, (F,), self.param_dtype).astype(wide)
            u_BTHK = u_BTF.astype(wide).reshape(B, T, H, K)
            return nn.sigmoid(jnp.einsum("bthk,hkj->bthj", u_BTHK, W_HKJ).reshape(B, T, F) + b_F)

        log_a_F = nn.log_sigmoid(self.param("Lambda", ring(0.9, 0.999), (F,), self.param_dtype).astype(wide))
        r_BTF, i_BTF = gate("recurrence_gate"), gate("input_gate")
        y_BTF, h_BF = rg_lru(u_BTF, r_BTF, i_BTF, log_a_F, state.h_BF, reset_BT, self.impl)

        y_BTF = y_BTF * nn.gelu(nn.Dense(F, name="gate", **kinds)(x_BTD))
        return nn.Dense(D, name="out", **kinds)(y_BTF), State(h_BF, past_BPF)


def rg_lru(u_BTF, r_BTF, i_BTF, log_a_F, h_BF, reset_BT, impl="auto"):
    """All T tokens. Returns (h_BTF, h_BF)."""
    if impl == "scan":
        xs = ops.widen((u_BTF, r_BTF, i_BTF))
        h_BTF, h_BF = ops.recur(partial(step, log_a_F=log_a_F), h_BF, xs, reset_BT)
    else:
        log_a_BTF = POWER * r_BTF * log_a_F
        x_BTF = root(log_a_BTF) * (i_BTF * u_BTF)
        h_BTF, h_BF = ops.linear_scan(jnp.exp(log_a_BTF), x_BTF, h_BF, reset_BT, impl=impl)
    return h_BTF.astype(u_BTF.dtype), h_BF


def ring(low, high):
    """Lambda such that a^c is uniform in [low, high]."""

    def init(key, shape, dtype=float):
        a = jax.random.uniform(key, shape, jnp.float32, low, high) ** (1 / POWER)
        return (jnp.log(a) - jnp.log1p(-a)).astype(dtype)

    return init


# Each block is a layer of its own: its fan in is K.
lecun_blocks = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
