"""Leaky RNN: no gates, but each unit learns a time constant of its own beside the recurrent weights.

    h_t = f((1 - 1/tau) h_{t-1} + (W x_t + U h_{t-1} + b) / tau)        f = leaky ReLU, tau >= 1, U without a diagonal
    y_t = W_out h_t

Source: Khajehabdollahi, Zeraati, Giannakakis, Schaefer, Martius, Levina, "Emergent mechanisms for long timescales
depend on training curriculum and affect performance in memory tasks" (2023), arXiv:2309.12927, and its released code,
whose second model has f around the drive alone: h_t = (1 - 1/tau) h_{t-1} + f(W x_t + U h_{t-1} + b) / tau.
Differs: the state begins at 0, not with noise; one bias, where the code adds two. y is always a projection of h, so
that width and hidden are free.

Dims: B batch, T time, D width, F hidden, G = F: a recurrent kernel [G, F] goes from units to units.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.initial import like_torch, within

AROUND = ("all", "drive")
SLOPE = 0.01  # of f below 0


class State(NamedTuple):
    h_BF: jax.Array


def step(h_F, a_F, U_GF, tau_F, around="all"):
    """One token; a = W x + b. This is the definition; every faster form is tested against it."""
    f = partial(nn.leaky_relu, negative_slope=SLOPE)
    drive_F = a_F + h_F @ U_GF
    if around == "drive":
        return (1 - 1 / tau_F) * h_F + f(drive_F) / tau_F
    return f((1 - 1 / tau_F) * h_F + drive_F / tau_F)


class LeakyRNN(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Time constants are the parameter `tau`, in tokens; one below 1 acts as 1, and has no gradient.
    Raises ValueError, by name, for an unknown place of the nonlinearity, time constants that do not begin in
    1 <= tau_min <= tau_max, and for inputs, state or resets that do not fit.
    """

    width: int
    hidden: int | None = None  # F; width
    around: str = "all"  # what the nonlinearity is around; or 'drive'
    tau_min: float = 1.0  # of the time constants at the start
    tau_max: float = 2.0
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan: how 'newton' iterates, not what it finds
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> int:
        """F"""
        F = self.hidden if self.hidden is not None else self.width
        contract.positive(width=self.width, hidden=F)
        ops.check_jacobian(self.jacobian)
        if self.around not in AROUND:
            nearest = contract.nearest(str(self.around), AROUND)
            raise ValueError(f"around: expected 'all' or 'drive', got {self.around!r}; {nearest}")
        if not 1 <= self.tau_min <= self.tau_max:
            raise ValueError(f"tau_min, tau_max: expected 1 <= tau_min <= tau_max, got {self.tau_min}, {self.tau_max}")
        return F

    def initial_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.sizes()), contract.state_dtype(self.dtype)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        F, D, wide = self.sizes(), x_BTD.shape[-1], contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": like_torch}

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        dot = partial(lax.dot_general, preferred_element_type=wide)
        start = within(F**-0.5)  # as the recurrent weights, which the released code gives this bias
        a_BTF = nn.Dense(F, name="in", bias_init=start, dot_general=dot, **kinds)(x_BTD).astype(wide)
        U_GF = jnp.where(jnp.eye(F, dtype=bool), 0, param("recurrent", like_torch, F, F))
        tau_F = jnp.maximum(param("tau", between(self.tau_min, self.tau_max), F), 1)

        def token(h_F, a_F):
            return step(h_F, a_F, U_GF, tau_F, self.around)

        h_BTF, h_BF = ops.nonlinear_scan(token, state.h_BF, a_BTF, reset_BT, impl=self.impl, jacobian=self.jacobian)
        return nn.Dense(D, use_bias=False, name="out", **kinds)(h_BTF), State(h_BF)


def between(low, high):
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, jnp.float32, low, high).astype(dtype)
