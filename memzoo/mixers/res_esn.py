"""Residual echo state network: an echo state network whose state also goes around by an orthogonal matrix.

    h_t = alpha O h_{t-1} + beta tanh(W h_{t-1} + W_in x_t + b)        y_t = W_out h_t + b_out

O is a random orthogonal matrix, a shift along a ring, or the identity, with which it is a leaky echo state network if
alpha = 1 - beta. What O keeps is neither squashed nor mixed, so a small beta remembers long. W, W_in, b and O are the
collection "reservoir", which is not trained; features and readout are those of `esn`. The paper's deep network is a
stack of these, each layer fed by the one before; a model's layers are such a stack, with trained ones between.

Source: Pinna, Ceni, Gallicchio, "Deep Residual Echo State Networks: exploring residual orthogonal connections in
untrained Recurrent Neural Networks" (2025), arXiv:2508.21172, and its released code; the single layer is of Ceni,
Gallicchio, "Residual Echo State Networks" (2024), Neurocomputing.
Differs: both papers choose alpha and beta for each task, and with their code's defaults, 1 and 1, it never forgets its
start; here they are those of the 2024 code for NARMA30. With them the necessary half of the echo-state condition holds
for a random or cyclic O if units are many (radius 0.92 to 0.96 for 30 and more), but not for the identity (1.01 to
1.08), which wants alpha = 0.8 (0.91 to 0.98); the sufficient half never does. W is scaled to its own spectral radius,
not to that of the circular law; O is uniform on the orthogonal group, not the Q of uniform entries; W_in is uniform in
+-input_scale / sqrt(D).

Dims: B batch, T time, D width, N units.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.initial import within
from memzoo.ops.reservoir import EchoState, check_residual, echo_state, of_radius, orthogonal, turn


class State(NamedTuple):
    h_BN: jax.Array


def step(h_N, u_N, W_NN, O, alpha, beta):
    """One token; u = W_in x + b, O a function. This is the definition; every faster form is tested against it."""
    return alpha * O(h_N) + beta * jnp.tanh(W_NN @ h_N + u_N)


class ResESN(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for an unknown residual, alpha outside of [0, 1], beta not above 0, scales below 0, and
    for sizes, inputs, state or resets that do not fit.
    """

    width: int
    units: int = 100  # N
    residual: str = "random"  # O: 'random', 'cyclic', or 'identity', which wants a smaller alpha: see `echo_state`
    alpha: float = 0.9
    beta: float = 0.2
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
        contract.check_numbers(self)
        ops.check_jacobian(self.jacobian)
        check_residual(self.residual)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1], got {self.alpha}")
        if not self.beta > 0:
            raise ValueError(f"beta: expected a number > 0, got {self.beta}")
        for name in ("spectral_radius", "input_scale", "bias_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        return self.units

    def initial_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.size()), contract.state_dtype(self.dtype)))

    def echo_state(self, variables: Any) -> EchoState:
        """Its condition, from what `init` returned: radius < 1 is necessary, contraction < 1 sufficient."""
        fixed = variables["reservoir"]
        return echo_state(fixed["W"], self.alpha, self.beta, turn(self.residual, fixed.get("O")))

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
        O_NN = fixed("O", orthogonal, N, N).astype(wide) if self.residual == "random" else None
        u_BTN = jnp.matmul(x_BTD.astype(self.dtype), W_DN, preferred_element_type=wide) + b_N
        O = turn(self.residual, O_NN)

        def token(h_N, u_N):
            return step(h_N, u_N, W_NN, O, self.alpha, self.beta)

        h_BTN, h_BN = ops.nonlinear_scan(token, state.h_BN, u_BTN, reset_BT, impl=self.impl, jacobian=self.jacobian)
        self.sow("intermediates", "features", h_BTN)
        out = nn.Dense(D, name="out", dtype=self.dtype, param_dtype=self.param_dtype)
        return out(h_BTN), State(h_BN)
