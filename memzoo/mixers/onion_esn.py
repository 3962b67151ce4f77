"""Onion echo state network: small reservoirs side by side, whose eigenvalues fill one ring each, and so one time scale.

    h^i_t = (1 - a) h^i_{t-1} + a tanh(W_i h^i_{t-1} + W_in^i x_t + b^i)        i = 1 .. M
    r_{i-1} <= |eigenvalues of W_i| <= r_i,    r_i = sqrt(i / M) spectral_radius        y_t = W_out [h^1 .. h^M] + b_out

An inner reservoir forgets within a few tokens, the outermost one last. The rings have equal areas, so that all of them
together fill the disk as evenly as one random matrix does. W_i, W_in and b are the collection "reservoir", which is not
trained; features and readout are those of `esn`.

Source: Tortorella, Micheli, "Onion Echo State Networks: A Preliminary Analysis of Dynamics" (ICANN 2024), groups of
units, each with an annular segment of the spectrum; used and carried over to quantum reservoirs by Tandon et al.,
"Quantum Reservoir Computing for Corrosion Prediction in Aerospace" (2025), arXiv:2505.22837.
Differs: nothing of how W_i is made is taken from there. It is normal: rotations by angles and radii that are uniform on
the ring's area, in a random orthogonal basis. Then |W_i|_2 is its spectral radius, and without a leak both halves of
the echo-state condition are one. W_in is uniform in +-input_scale / sqrt(D).

Dims: B batch, T time, D width, M rings, E units of a ring, N = M E.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.initial import within
from memzoo.ops.reservoir import EchoState, echo_state, orthogonal


class State(NamedTuple):
    h_BN: jax.Array


def step(h_N, u_N, W_MEE, leak):
    """One token; u = W_in x + b. This is the definition; every faster form is tested against it."""
    Wh_ME = jnp.einsum("mef,mf->me", W_MEE, h_N.reshape(W_MEE.shape[:2]))
    return (1 - leak) * h_N + leak * jnp.tanh(Wh_ME.reshape(-1) + u_N)


class OnionESN(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for units that are no multiple of the rings, a leak outside of (0, 1], scales below 0,
    and for sizes, inputs, state or resets that do not fit.
    """

    width: int
    units: int = 100  # N
    rings: int = 4  # M, the innermost first
    leak: float = 1.0  # a
    spectral_radius: float = 0.9  # the outermost ring's outer radius
    input_scale: float = 1.0
    bias_scale: float = 0.0
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan: how 'newton' iterates, not what it finds
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int]:
        """(M, E)"""
        contract.positive(width=self.width, rings=self.rings)
        contract.check_numbers(self)
        ops.check_jacobian(self.jacobian)
        if not 0 < self.leak <= 1:
            raise ValueError(f"leak: expected a number in (0, 1], got {self.leak}")
        for name in ("spectral_radius", "input_scale", "bias_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        return self.rings, contract.divisible("units", self.units, "rings", self.rings)

    def initial_state(self, batch: int) -> State:
        M, E = self.sizes()
        return State(jnp.zeros((batch, M * E), contract.state_dtype(self.dtype)))

    def echo_state(self, variables: Any) -> EchoState:
        """Its condition, ring by ring [M], from what `init` returned: see `esn`."""
        return jax.vmap(lambda W_EE: echo_state(W_EE, 1 - self.leak, self.leak))(variables["reservoir"]["W"])

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (M, E), D, wide = self.sizes(), self.width, contract.state_dtype(self.dtype)

        def fixed(name, init, *shape):
            draw = lambda: init(self.make_rng("params"), shape, self.param_dtype)
            return lax.stop_gradient(self.variable("reservoir", name, draw).value)

        W_MEE = fixed("W", onion(self.spectral_radius), M, E, E).astype(wide)
        W_DN = fixed("W_in", within(self.input_scale * D**-0.5), D, M * E).astype(self.dtype)
        b_N = fixed("b", within(self.bias_scale), M * E).astype(wide)
        u_BTN = jnp.matmul(x_BTD.astype(self.dtype), W_DN, preferred_element_type=wide) + b_N

        def token(h_N, u_N):
            return step(h_N, u_N, W_MEE, self.leak)

        h_BTN, h_BN = ops.nonlinear_scan(
            token, state.h_BN, u_BTN, reset_BT, impl=self.impl, jacobian=self.jacobian, blocks=M
        )
        self.sow("intermediates", "features", h_BTN)
        out = nn.Dense(D, name="out", dtype=self.dtype, param_dtype=self.param_dtype)
        return out(h_BTN), State(h_BN)


def onion(radius):
    """W_MEE, the i-th with eigenvalues in pairs r exp(+-i phi), uniform on the i-th ring; one +-r if E is odd."""

    def init(key, shape, dtype=float):
        M, E, _ = shape
        wide = jnp.promote_types(dtype, jnp.float32)
        keys = jax.random.split(key, 4)
        area_MP = (jnp.arange(M)[:, None] + jax.random.uniform(keys[0], (M, (E + 1) // 2), wide)) / M
        r_MP, phi_MP = radius * jnp.sqrt(area_MP), jnp.pi * jax.random.uniform(keys[1], area_MP.shape, wide)
        if E % 2:
            phi_MP = phi_MP.at[:, -1].set(jnp.pi * jax.random.bernoulli(keys[2], shape=(M,)))
        cos, sin = (jax.vmap(jnp.diag)(r_MP * f(phi_MP)) for f in (jnp.cos, jnp.sin))
        turns_MEE = jnp.block([[cos, -sin], [sin, cos]])[:, :E, :E]  # of an odd E, the last one is half a pair
        Q_MEE = jax.vmap(lambda key: orthogonal(key, (E, E), wide))(jax.random.split(keys[3], M))
        return jnp.einsum("mef,mfg,mhg->meh", Q_MEE, turns_MEE, Q_MEE, precision="highest").astype(dtype)

    return init
