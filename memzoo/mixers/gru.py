"""GRU: one state, a gate that decides how much of it to keep, and one that decides how much of it the update sees.

    r, z = sigmoid(W x_t + U h_{t-1} + b)           n = tanh(W x_t + b + r (U h_{t-1} + b'))       each its own W, U, b
    h_t = z h_{t-1} + (1 - z) n                     y_t = W_out h_t

Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation"
(2014), arXiv:1406.1078, sec. 2.3, eq. 5-8.
Differs: r acts after the recurrent matmul, as in the paper's first version and in cuDNN, so that one matmul serves all
gates; its last version, eq. 8, has U (r h_{t-1}). Biases as in cuDNN; recurrent kernels orthogonal; y is always a
projection of h, so that width and hidden are free.

Dims: B batch, T time, D width, F hidden, E = 3 F gates in the order r, z, n.
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


def step(h_F, a_E, U_FE, b_F):
    """One token; a = W x + b. This is the definition; every faster form is tested against it."""
    (ar_F, az_F, an_F), (ur_F, uz_F, un_F) = jnp.split(a_E, 3), jnp.split(h_F @ U_FE, 3)
    r_F, z_F = nn.sigmoid(ar_F + ur_F), nn.sigmoid(az_F + uz_F)
    n_F = jnp.tanh(an_F + r_F * (un_F + b_F))
    return z_F * h_F + (1 - z_F) * n_F


class GRU(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for inputs, state or resets that do not fit.
    """

    width: int
    hidden: int | None = None  # width
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan: how 'newton' iterates, not what it finds
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> int:
        """F"""
        F = self.hidden if self.hidden is not None else self.width
        contract.positive(width=self.width, hidden=F)
        ops.check_jacobian(self.jacobian)
        return F

    def initial_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.sizes()), contract.state_dtype(self.dtype)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        F, D, wide = self.sizes(), x_BTD.shape[-1], contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        gates: dict[str, Any] = {"dot_general": partial(lax.dot_general, preferred_element_type=wide)}
        a_BTE = nn.Dense(3 * F, name="in", **gates, **kinds)(x_BTD).astype(wide)
        U_FE = self.param("recurrent", orthogonal, (F, 3 * F), self.param_dtype).astype(wide)
        b_F = self.param("recurrent_bias", nn.initializers.zeros, (F,), self.param_dtype).astype(wide)

        def token(h_F, a_E):
            return step(h_F, a_E, U_FE, b_F)

        h_BTF, h_BF = ops.nonlinear_scan(token, state.h_BF, a_BTE, reset_BT, impl=self.impl, jacobian=self.jacobian)
        return nn.Dense(D, use_bias=False, name="out", **kinds)(h_BTF), State(h_BF)


def orthogonal(key, shape, dtype=float):
    """One orthogonal matrix [F, F] per gate."""
    F, E = shape
    one = partial(nn.initializers.orthogonal(), shape=(F, F), dtype=jnp.promote_types(dtype, jnp.float32))
    return jnp.concatenate([one(key) for key in jax.random.split(key, E // F)], axis=1).astype(dtype)
