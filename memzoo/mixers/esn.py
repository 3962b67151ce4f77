"""Echo state network: a random recurrent network that is never trained, and a linear readout that is.

    h_t = (1 - a) h_{t-1} + a tanh(W h_{t-1} + W_in x_t + b)        y_t = W_out h_t + b_out

W, W_in and b are the collection "reservoir": drawn with the parameters, no gradient reaches them. The readout is a
parameter, for gradient descent or for `memzoo.learners.ridge`, to which the features h go as the intermediate
"features". `ESN.echo_state` says whether the reservoir forgets its start.

Source: Jaeger, "The 'echo state' approach to analysing and training recurrent neural networks" (2001), GMD report 148;
with leaky units as in Lukosevicius, "A Practical Guide to Applying Echo State Networks" (2012), sec. 2.
Differs: the guide's readout sees x_t too, which a model's residual carries here; W is dense, and scaled to its own
spectral radius. W_in is uniform in +-input_scale / sqrt(D), so that many inputs do not saturate what one does not.

Dims: B batch, T time, D width, N units.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.initial import within
from memzoo.ops.reservoir import EchoState, echo_state, of_radius


class State(NamedTuple):
    h_BN: jax.Array


def step(h_N, u_N, W_NN, leak):
    """One token; u = W_in x + b. This is the definition; every faster form is tested against it."""
    return (1 - leak) * h_N + leak * jnp.tanh(W_NN @ h_N + u_N)


class ESN(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a leak outside of (0, 1], scales below 0, and for sizes, inputs, state or resets
    that do not fit.
    """

    width: int
    units: int = 100  # N
    leak: float = 1.0  # a
    spectral_radius: float = 0.9  # of W
    input_scale: float = 1.0
    bias_scale: float = 0.0
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan: how 'newton' iterates, not what it finds
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def size(self) -> int:
        """N"""
        contract.positive(width=self.width, units=self.units)
        ops.check_jacobian(self.jacobian)
        contract.check_numbers(self)
        if not 0 < self.leak <= 1:
            raise ValueError(f"leak: expected a number in (0, 1], got {self.leak}")
        for name in ("spectral_radius", "input_scale", "bias_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        return self.units

    def initial_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.size()), contract.state_dtype(self.dtype)))

    def echo_state(self, variables: Any) -> EchoState:
        """Its condition, from what `init` returned: radius < 1 is necessary, contraction < 1 sufficient."""
        return echo_state(variables["reservoir"]["W"], 1 - self.leak, self.leak)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        N, D, wide = self.size(), self.width, contract.state_dtype(self.dtype)

        def fixed(name, init, *shape):
            draw = lambda: init(self.make_rng("params"), shape, self.param_dtype)
            return lax.stop_gradient(self.variable("reservoir", name, draw).value)

        W_NN = fixed("W", of_radius(self.spectral_radius), N, N).astype(wide)
        W_DN = fixed("W_in", within(self.input_scale * D**-0.5), D, N).astype(self.dtype)
        b_N = fixed("b", within(self.bias_scale), N).astype(wide)
        u_BTN = jnp.matmul(x_BTD.astype(self.dtype), W_DN, preferred_element_type=wide) + b_N

        def token(h_N, u_N):
            return step(h_N, u_N, W_NN, self.leak)

        h_BTN, h_BN = ops.nonlinear_scan(token, state.h_BN, u_BTN, reset_BT, impl=self.impl, jacobian=self.jacobian)
        self.sow("intermediates", "features", h_BTN)
        out = nn.Dense(D, name="out", dtype=self.dtype, param_dtype=self.param_dtype)
        return out(h_BTN), State(h_BN)
