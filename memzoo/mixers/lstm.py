"""LSTM: a cell that adds what an input gate lets in, and keeps what a forget gate does not let go.

    i, f, o = sigmoid(W x_t + U h_{t-1} + b)        g = tanh(W x_t + U h_{t-1} + b)        each with its own W, U, b
    c_t = f c_{t-1} + i g                           h_t = o tanh(c_t)                      y_t = W_out h_t

Source: Gers, Schmidhuber, Cummins, "Learning to Forget: Continual Prediction with LSTM" (2000), Neural Computation 12,
sec. 3, on Hochreiter, Schmidhuber, "Long Short-Term Memory" (1997).
Differs: fully connected blocks of one cell each, and tanh for both squashing functions (the paper's are logistic, in
[-2, 2] and [-1, 1]), as everyone has it since; forget bias 1, as Jozefowicz, Zaremba, Sutskever, "An Empirical
Exploration of Recurrent Network Architectures" (2015), advise; recurrent kernels orthogonal; y is always a projection
of h, so that width and hidden are free.

Dims: B batch, T time, D width, F hidden, E = 4 F gates in the order i, f, g, o, X = 2 F: h and c in one row.
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
    c_BF: jax.Array


def step(h_F, c_F, a_E, U_FE):
    """One token; a = W x + b. This is the definition; every faster form is tested against it."""
    i_F, f_F, g_F, o_F = jnp.split(a_E + h_F @ U_FE, 4)
    c_F = nn.sigmoid(f_F) * c_F + nn.sigmoid(i_F) * jnp.tanh(g_F)
    return nn.sigmoid(o_F) * jnp.tanh(c_F), c_F


class LSTM(nn.Module):
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
        shape, wide = (batch, self.sizes()), contract.state_dtype(self.dtype)
        return State(jnp.zeros(shape, wide), jnp.zeros(shape, wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        F, D, wide = self.sizes(), x_BTD.shape[-1], contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        gates: dict[str, Any] = {
            "dot_general": partial(lax.dot_general, preferred_element_type=wide),
            "bias_init": remember,
        }
        a_BTE = nn.Dense(4 * F, name="in", **gates, **kinds)(x_BTD)
        U_FE = self.param("recurrent", orthogonal, (F, 4 * F), self.param_dtype)

        h_BTF, state = lstm(a_BTE.astype(wide), U_FE.astype(wide), state, reset_BT, self.impl, self.jacobian)
        return nn.Dense(D, use_bias=False, name="out", **kinds)(h_BTF), state


def lstm(a_BTE, U_FE, state, reset_BT=None, impl="auto", jacobian="auto"):
    """All T tokens. Returns (h_BTF, State)."""

    def token(s_X, a_E):
        return jnp.concatenate(step(*jnp.split(s_X, 2), a_E, U_FE))

    s_BX = jnp.concatenate(state, axis=-1)
    s_BTX, s_BX = ops.nonlinear_scan(token, s_BX, a_BTE, reset_BT, impl=impl, jacobian=jacobian)
    return jnp.split(s_BTX, 2, axis=-1)[0], State(*jnp.split(s_BX, 2, axis=-1))


def remember(key, shape, dtype=float):
    """Biases 0 but for the forget gates' 1."""
    return jnp.repeat(jnp.array([0, 1, 0, 0], dtype), shape[0] // 4)


def orthogonal(key, shape, dtype=float):
    """One orthogonal matrix [F, F] per gate."""
    F, E = shape
    one = partial(nn.initializers.orthogonal(), shape=(F, F), dtype=jnp.promote_types(dtype, jnp.float32))
    return jnp.concatenate([one(key) for key in jax.random.split(key, E // F)], axis=1).astype(dtype)
