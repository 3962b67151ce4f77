"""Elman network: the simple recurrent network, whose hidden units see their own last values beside the token.

    h_t = tanh(W x_t + U h_{t-1} + b)        y_t = W_out h_t

Source: Elman, "Finding Structure in Time" (1990), Cognitive Science 14, 179-211; in the notation of Lipton, Berkowitz,
Elkan, "A Critical Review of Recurrent Neural Networks for Sequence Learning" (2015), arXiv:1506.00019.
Differs: tanh, where Elman has the logistic function and context units that begin at 0.5. `relu` is the IRNN of Le,
Jaitly, Hinton, "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units" (2015), arXiv:1504.00941:
its recurrent kernel begins as the identity, though its W there begins far smaller, with deviation 0.001; that of tanh
begins orthogonal. y is always a projection of h, so that width and hidden are free.

Dims: B batch, T time, D width, F hidden, G = F: a recurrent kernel [G, F] goes from units to units.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops

ACTIVATIONS = {"tanh": jnp.tanh, "relu": nn.relu}


class State(NamedTuple):
    h_BF: jax.Array


def step(h_F, a_F, U_GF, activation=jnp.tanh):
    """One token; a = W x + b. This is the definition; every faster form is tested against it."""
    return activation(a_F + h_F @ U_GF)


class Elman(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for an unknown activation, and for inputs, state or resets that do not fit.
    """

    width: int
    hidden: int | None = None  # F; width
    activation: str = "tanh"  # or 'relu', which keeps any state >= 0 at the start
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan: how 'newton' iterates, not what it finds
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> int:
        """F"""
        F = self.hidden if self.hidden is not None else self.width
        contract.positive(width=self.width, hidden=F)
        ops.check_jacobian(self.jacobian)
        if self.activation not in ACTIVATIONS:
            nearest = contract.nearest(str(self.activation), ACTIVATIONS)
            raise ValueError(f"activation: expected 'tanh' or 'relu', got {self.activation!r}; {nearest}")
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

        dot = partial(lax.dot_general, preferred_element_type=wide)
        a_BTF = nn.Dense(F, name="in", dot_general=dot, **kinds)(x_BTD).astype(wide)
        start = identity if self.activation == "relu" else orthogonal
        U_GF = self.param("recurrent", start, (F, F), self.param_dtype).astype(wide)

        def token(h_F, a_F):
            return step(h_F, a_F, U_GF, ACTIVATIONS[self.activation])

        h_BTF, h_BF = ops.nonlinear_scan(token, state.h_BF, a_BTF, reset_BT, impl=self.impl, jacobian=self.jacobian)
        return nn.Dense(D, use_bias=False, name="out", **kinds)(h_BTF), State(h_BF)


def orthogonal(key, shape, dtype=float):
    wide = jnp.promote_types(dtype, jnp.float32)
    return nn.initializers.orthogonal()(key, shape, wide).astype(dtype)


def identity(key, shape, dtype=float):
    return jnp.eye(*shape, dtype=dtype)
