"""LEM, Long Expressive Memory: two coupled states that each choose, unit by unit and token by token, how far to move.

    d, e = dt sigmoid(W x_t + U y_{t-1} + b)                           each its own W, U, b; steps of z and of y
    z_t = (1 - d) z_{t-1} + d tanh(W x_t + U y_{t-1} + b)              each its own W, U, b
    y_t = (1 - e) y_{t-1} + e tanh(W x_t + U z_t + b)                  o_t = W_out y_t

Source: Rusch, Mishra, Erichson, Mahoney, "Long Expressive Memory for Sequence Modeling" (2021), arXiv:2110.04744,
eq. 3; initial weights from its released code.
Differs: one bias each, where the code adds two. The output o is a projection of y, so that width and hidden are free.

Dims: B batch, T time, D width, F hidden, G = F, E = 4 F what x decides in the order d, e, z, y, K = 3 F what y decides,
X = 2 F: y and z in one row. Recurrent kernels [G, K] and [G, F] go from units to units.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.initial import within


class State(NamedTuple):
    y_BF: jax.Array
    z_BF: jax.Array


def step(y_F, z_F, a_E, U_GK, U_GF, dt):
    """One token; a = W x + b. This is the definition; every faster form is tested against it."""
    (ad_F, ae_F, az_F, ay_F), (ud_F, ue_F, uz_F) = jnp.split(a_E, 4), jnp.split(y_F @ U_GK, 3)
    d_F, e_F = dt * nn.sigmoid(ad_F + ud_F), dt * nn.sigmoid(ae_F + ue_F)
    z_F = (1 - d_F) * z_F + d_F * jnp.tanh(az_F + uz_F)
    y_F = (1 - e_F) * y_F + e_F * jnp.tanh(ay_F + z_F @ U_GF)
    return y_F, z_F


class LEM(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is; it stays within +-1.

    Raises ValueError, by name, for a step that is not in 0 < dt <= 1, and for inputs, state or resets that do not fit.
    """

    width: int
    hidden: int | None = None  # F; width
    dt: float = 1.0  # the longest step; errors change by a factor of exp(O(T dt)) over T tokens, so small for long ones
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan: how 'newton' iterates, not what it finds
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> int:
        """F"""
        F = self.hidden if self.hidden is not None else self.width
        contract.positive(width=self.width, hidden=F)
        ops.check_jacobian(self.jacobian)
        if not 0 < self.dt <= 1:
            raise ValueError(f"dt: expected a number in (0, 1], got {self.dt}")
        return F

    def initial_state(self, batch: int) -> State:
        shape, wide = (batch, self.sizes()), contract.state_dtype(self.dtype)
        return State(jnp.zeros(shape, wide), jnp.zeros(shape, wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        F, D, wide = self.sizes(), x_BTD.shape[-1], contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        start = within(F**-0.5)  # all of the cell, whatever its fan in
        gates: dict[str, Any] = {
            "dot_general": partial(lax.dot_general, preferred_element_type=wide),
            "kernel_init": start,
            "bias_init": start,
        }
        a_BTE = nn.Dense(4 * F, name="in", **gates, **kinds)(x_BTD).astype(wide)
        U_GK = self.param("from_y", start, (F, 3 * F), self.param_dtype).astype(wide)
        U_GF = self.param("from_z", start, (F, F), self.param_dtype).astype(wide)

        def token(s_X, a_E):
            return jnp.concatenate(step(*jnp.split(s_X, 2), a_E, U_GK, U_GF, self.dt))

        how: dict[str, Any] = {"impl": self.impl, "jacobian": self.jacobian}
        s_BTX, s_BX = ops.nonlinear_scan(token, jnp.concatenate(state, axis=-1), a_BTE, reset_BT, **how)
        o_BTD = nn.Dense(D, use_bias=False, name="out", **kinds)(s_BTX[..., :F])
        return o_BTD, State(*jnp.split(s_BX, 2, axis=-1))
