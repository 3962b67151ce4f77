"""Residual reservoir memory network: a ring that keeps all inputs as they were, and a residual reservoir that reads it.

    m_t = C m_{t-1} + V x_t                                                C a shift along the ring
    h_t = alpha O h_{t-1} + beta tanh(W h_{t-1} + W_m m_t + W_in x_t + b)        y_t = W_out h_t + b_out

Nothing fades in m: what M tokens bring can be read from it exactly, and after M tokens the ring comes around and adds
the new to the old. It never forgets its start, so that the echo-state condition is that of h alone, which is the
residual echo state network's. V, W, W_m, W_in, b and O are the collection "reservoir", which is not trained; features
(h alone) and readout are those of `esn`.

Source: Pinna, Ceni, Gallicchio, "Residual Reservoir Memory Networks" (2025), arXiv:2508.09925, and its released code;
the ring is that of Gallicchio, Ceni, "Reservoir Memory Networks" (ESANN 2024).
Differs: alpha and beta, which the paper chooses for each task, are `res_esn`'s, with which h has the necessary half of
its echo-state condition if O is random or cyclic, and not if it is the identity. W is scaled to its own spectral
radius; O is uniform on the orthogonal group; W_m, W_in and V are uniform in +-scale / sqrt(inputs). The ring has no
bias, which is 0 in all of the code's configurations. `newton` turns the inputs instead of m, which then is a sum.

Dims: B batch, T time, D width, M units of the ring, N units.
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
    m_BM: jax.Array
    h_BN: jax.Array


def step(m_M, h_N, v_M, u_N, W_NN, W_NM, O, alpha, beta):
    """One token; v = V x, u = W_in x + b. This is the definition; every faster form is tested against it."""
    m_M = jnp.roll(m_M, 1) + v_M
    return m_M, alpha * O(h_N) + beta * jnp.tanh(W_NN @ h_N + W_NM @ m_M + u_N)


class ResRMN(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for an unknown residual, alpha outside of [0, 1], beta not above 0, scales below 0, and
    for sizes, inputs, state or resets that do not fit.
    """

    width: int
    memory_units: int = 100  # M, in the paper as many as there are tokens
    units: int = 100  # N
    residual: str = "random"  # O: 'random', 'cyclic', or 'identity', which wants a smaller alpha: see `echo_state`
    alpha: float = 0.9
    beta: float = 0.2
    spectral_radius: float = 0.9  # of W
    memory_input_scale: float = 1.0  # of V
    memory_scale: float = 1.0  # of W_m
    input_scale: float = 1.0
    bias_scale: float = 0.0
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan: how 'newton' iterates, not what it finds
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int]:
        """(M, N)"""
        contract.positive(width=self.width, memory_units=self.memory_units, units=self.units)
        contract.check_numbers(self)
        ops.check_jacobian(self.jacobian)
        check_residual(self.residual)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1], got {self.alpha}")
        if not self.beta > 0:
            raise ValueError(f"beta: expected a number > 0, got {self.beta}")
        for name in ("spectral_radius", "memory_input_scale", "memory_scale", "input_scale", "bias_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        return self.memory_units, self.units

    def initial_state(self, batch: int) -> State:
        wide = contract.state_dtype(self.dtype)
        return State(*(jnp.zeros((batch, size), wide) for size in self.sizes()))

    def echo_state(self, variables: Any) -> EchoState:
        """The condition of h: radius < 1 is necessary, contraction < 1 sufficient for it to forget its own start."""
        fixed = variables["reservoir"]
        return echo_state(fixed["W"], self.alpha, self.beta, turn(self.residual, fixed.get("O")))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (M, N), D, wide = self.sizes(), self.width, contract.state_dtype(self.dtype)

        def fixed(name, init, *shape):
            draw = lambda: init(self.make_rng("params"), shape, self.param_dtype)
            return lax.stop_gradient(self.variable("reservoir", name, draw).value)

        W_NN = fixed("W", of_radius(self.spectral_radius), N, N).astype(wide)
        W_NM = fixed("W_m", within(self.memory_scale * M**-0.5), N, M).astype(wide)
        W_DN = fixed("W_in", within(self.input_scale * D**-0.5), D, N).astype(self.dtype)
        V_DM = fixed("V", within(self.memory_input_scale * D**-0.5), D, M).astype(self.dtype)
        b_N = fixed("b", within(self.bias_scale), N).astype(wide)
        O_NN = fixed("O", orthogonal, N, N).astype(wide) if self.residual == "random" else None
        x_BTD = x_BTD.astype(self.dtype)
        v_BTM, u_BTN = (jnp.matmul(x_BTD, W, preferred_element_type=wide) for W in (V_DM, W_DN))
        matrices = W_NN, W_NM, turn(self.residual, O_NN), self.alpha, self.beta
        h_BTN, state = res_rmn(v_BTM, u_BTN + b_N, *matrices, state, reset_BT, self.impl, self.jacobian)
        self.sow("intermediates", "features", h_BTN)
        out = nn.Dense(D, name="out", dtype=self.dtype, param_dtype=self.param_dtype)
        return out(h_BTN), state


def res_rmn(v_BTM, u_BTN, W_NN, W_NM, O, alpha, beta, state, reset_BT, impl="auto", jacobian="auto"):
    """All T tokens. Returns (h_BTN, State)."""
    if impl == "scan":

        def both(state, v_M, u_N):
            m_M, h_N = step(*state, v_M, u_N, W_NN, W_NM, O, alpha, beta)
            return State(m_M, h_N), h_N

        return ops.recur(both, state, (v_BTM, u_BTN), reset_BT)

    m_BTM = ring(v_BTM, state.m_BM, reset_BT)
    u_BTN = u_BTN + jnp.einsum("btm,nm->btn", m_BTM, W_NM, precision="highest")

    def token(h_N, u_N):
        return alpha * O(h_N) + beta * jnp.tanh(W_NN @ h_N + u_N)

    h_BTN, h_BN = ops.nonlinear_scan(token, state.h_BN, u_BTN, reset_BT, impl=impl, jacobian=jacobian)
    return h_BTN, State(m_BTM[:, -1], h_BN)


def ring(v_BTM, m_BM, reset_BT):
    """m_t = C m_{t-1} + v_t for all t: as C^-t m_t is the sum of C^-s v_s, nothing depends on an order."""
    _, T, M = v_BTM.shape
    turned_TM = (jnp.arange(M) + jnp.arange(1, T + 1)[:, None]) % M  # place by place, where C^-t takes from
    back_TM = (jnp.arange(M) - jnp.arange(1, T + 1)[:, None]) % M
    v_BTM = jnp.take_along_axis(v_BTM, turned_TM[None], axis=2)
    n_BTM, _ = ops.linear_scan(jnp.ones_like(v_BTM), v_BTM, m_BM, reset_BT)
    return jnp.take_along_axis(n_BTM, back_TM[None], axis=2)
