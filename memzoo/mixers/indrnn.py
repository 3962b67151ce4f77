"""IndRNN: units that remember on their own, each with one recurrent weight; they meet only between layers.

    h_t = relu(W x_t + u h_{t-1} + b), u times h unit by unit        |u| <= growth^(1/T)        y_t = W_out h_t

Source: Li, Li, Cook, Zhu, Gao, "Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper RNN"
(2018), arXiv:1803.04831, sec. 3.
Differs: the bound on u, by which an error grows to at most `growth` times itself over T tokens, holds inside the layer,
where the paper clips weights after each update; a weight beyond it acts as the bound and has no gradient, so that it
stays where it is, while a clipped one may come back. W begins as in the released code; normalisation belongs to the
model. y is always a projection of h, so that width and hidden are free.

Dims: B batch, T time, D width, F hidden.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops


class State(NamedTuple):
    h_BF: jax.Array


def step(h_F, a_F, u_F):
    """One token; a = W x + b. This is the definition; every faster form is tested against it."""
    return nn.relu(a_F + u_F * h_F)


class IndRNN(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a growth below 1, a lower end of the initial weights outside of [0, bound), and for
    inputs, state or resets that do not fit.
    """

    width: int
    hidden: int | None = None  # F; width
    horizon: int = 784  # T: over so many tokens an error may grow ...
    growth: float = 2.0  # ... to so many times itself
    u_min: float = 0.0  # of the weights u at the start; the paper's last layer begins at growth^(-1/T)
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan; all of it is its diagonal here
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, float]:
        """F and the bound on u."""
        F = self.hidden if self.hidden is not None else self.width
        contract.positive(width=self.width, hidden=F, horizon=self.horizon)
        ops.check_jacobian(self.jacobian)
        if not self.growth >= 1:
            raise ValueError(f"growth: expected a number >= 1, got {self.growth}")
        bound = float(self.growth ** (1 / self.horizon))
        if not 0 <= self.u_min < bound:
            raise ValueError(f"u_min: expected a number in [0, growth^(1/horizon) = {bound:.6g}), got {self.u_min}")
        return F, bound

    def initial_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.sizes()[0]), contract.state_dtype(self.dtype)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (F, bound), D, wide = self.sizes(), x_BTD.shape[-1], contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        dot = partial(lax.dot_general, preferred_element_type=wide)
        a_BTF = nn.Dense(F, name="in", kernel_init=quiet, dot_general=dot, **kinds)(x_BTD).astype(wide)
        u_F = self.param("recurrent", between(self.u_min, bound), (F,), self.param_dtype).astype(wide)
        u_F = jnp.clip(u_F, -bound, bound)

        how: dict[str, Any] = {"impl": self.impl, "jacobian": self.jacobian, "blocks": F}
        h_BTF, h_BF = ops.nonlinear_scan(lambda h_F, a_F: step(h_F, a_F, u_F), state.h_BF, a_BTF, reset_BT, **how)
        return nn.Dense(D, use_bias=False, name="out", **kinds)(h_BTF), State(h_BF)


quiet = nn.initializers.variance_scaling(2 / 65, "fan_in", "uniform")
"""He's for a leaky ReLU of slope 8, as in the released code."""


def between(low, high):
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, jnp.float32, low, high).astype(dtype)
