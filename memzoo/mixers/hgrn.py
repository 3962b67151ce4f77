"""HGRN: a complex diagonal recurrence whose forget gate cannot fall below a bound.

    f_t = bound + (1 - bound) sigmoid(W_f x_t + b_f)        c_t = silu(W_r x_t + b_r) + i silu(W_i x_t + b_i)
    h_t = f_t exp(i theta) h_{t-1} + (1 - f_t) c_t          y_t = W_o (LN([Re h_t; Im h_t]) silu(W_g x_t + b_g)) + b_o

Source: Qin, Yang, Zhong, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling" (2023),
arXiv:2311.04823, sec. 3.2 (HGRU: the gates, theta independent of the input, the lower bound); the initialisation, the
activations and the order of LayerNorm and output gate from the released code (hgru-pytorch).
Differs: in the paper the bound rises from layer to layer, and all are learned at once, a cumulative sum of a softmax
over layers for each channel. A mixer knows no other layer, so `lower_bound` is one fixed number, 0 by default. A stack
in which it rises gives layer l = 0, 1, ... its l / layers, where the paper's bounds start: memzoo.models.hybrid does.

Dims: B batch, T time, D width, N state size, E = 2 N, real parts before imaginary ones.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.initial import within


class State(NamedTuple):
    h_BN: jax.Array  # complex


def step(h_N, f_N, c_N, theta_N):
    """One token. This is the definition; every faster form is tested against it."""
    h_N = f_N * jnp.exp(1j * theta_N) * h_N + (1 - f_N) * c_N
    return h_N, h_N


class HGRN(nn.Module):
    """x_BTD -> (y_BTD, State). The state is complex64, or complex128 when `dtype` is float64.

    Raises ValueError, by name, for a bound outside of [0, 1), and for inputs, state or resets that do not fit.
    """

    width: int
    state_size: int | None = None  # N, complex; width
    lower_bound: float = 0.0  # of the forget gate; the paper's first layer has 0
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def size(self) -> int:
        """N"""
        N = self.width if self.state_size is None else self.state_size
        contract.positive(width=self.width, state_size=N)
        if not 0 <= self.lower_bound < 1:
            raise ValueError(f"lower_bound: expected 0 <= lower_bound < 1, got {self.lower_bound}")
        return N

    def initial_state(self, batch: int) -> State:
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, self.size()), jnp.promote_types(wide, jnp.complex64)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        N, D, wide = self.size(), self.width, contract.state_dtype(self.dtype)

        def dense(name, size, inputs, dtype=self.dtype):
            init, kinds = within(inputs**-0.5), {"dtype": dtype, "param_dtype": self.param_dtype}
            return nn.Dense(size, kernel_init=init, bias_init=init, name=name, **kinds)

        f_BTN = nn.sigmoid(dense("forget", N, D, wide)(x_BTD))
        f_BTN = self.lower_bound + (1 - self.lower_bound) * f_BTN
        c_BTE = nn.silu(dense("in", 2 * N, D)(x_BTD)).astype(wide)
        c_BTN = lax.complex(c_BTE[..., :N], c_BTE[..., N:])
        theta_N = self.param("theta", rotary, (N,), self.param_dtype).astype(wide)

        h_BTN, h_BN = hgru(f_BTN, c_BTN, theta_N, state.h_BN, reset_BT, self.impl)

        gate_BTE = nn.silu(dense("gate", 2 * N, D)(x_BTD))
        h_BTE = jnp.concatenate([h_BTN.real, h_BTN.imag], axis=-1)
        h_BTE = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(h_BTE)
        return dense("out", D, 2 * N)(h_BTE * gate_BTE), State(h_BN)


def hgru(f_BTN, c_BTN, theta_N, h_BN, reset_BT, impl="auto"):
    """All T tokens. Returns (h_BTN, h_BN)."""
    if impl == "scan":
        return ops.recur(lambda h_N, f_N, c_N: step(h_N, f_N, c_N, theta_N), h_BN, (f_BTN, c_BTN), reset_BT)
    turn_N = lax.complex(jnp.cos(theta_N), jnp.sin(theta_N))
    return ops.linear_scan(f_BTN * turn_N, (1 - f_BTN) * c_BTN, h_BN, reset_BT, impl=impl)


def rotary(key, shape, dtype=float):
    """10000^(-2 n / N): a turn per token from 1 down to 1e-8, twice the range of rotary position codes."""
    return 10000 ** (-2 * jnp.arange(*shape, dtype=dtype) / shape[0])
