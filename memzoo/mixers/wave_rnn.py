"""Wave-RNN: channels of units on a ring, along which a local convolution carries the past as a travelling wave.

    h_t = relu(u * h_{t-1} + V x_t + b)        * along the ring, from channels to channels        y_t = W_out h_t

Source: Keller, Muller, Sejnowski, Welling, "Traveling Waves Encode the Recent Past and Enhance Sequence Learning"
(2023), arXiv:2309.08045, sec. 2; details from its released code.
Differs: biases begin at 0, where the convolution's are small random numbers in the code: so each channel begins as a
shift register, whose place -k mod N holds the sum of the inputs of k tokens ago, and of N more, and 2 N, for nothing
forgets yet. y is always a projection of h, so that width and ring are free. The Jacobian's diagonal begins at 0, so
newton is for small rings, with all of it: as begun, 161 iterations for 1,024 tokens of noise, and 1,009 with the
diagonal.

Dims: B batch, T time, D width, C channels, N places on a ring, W width of the convolution, X = C N, E = C: u leads from
channels [C] to channels [E].
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh, "identity": lambda x: x}


class State(NamedTuple):
    h_BCN: jax.Array


def step(h_CN, a_CN, u_WCE, activation=nn.relu):
    """One token; a = V x + b. This is the definition; every faster form is tested against it."""
    W = len(u_WCE)
    h_WCN = jnp.stack([jnp.roll(h_CN, W // 2 - w, axis=-1) for w in range(W)])  # h at place n - W // 2 + w
    return activation(jnp.einsum("wcn,wce->en", h_WCN, u_WCE) + a_CN)


class WaveRNN(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for an unknown activation, a convolution whose width is not odd, below 3 or larger than
    the ring, and for inputs, state or resets that do not fit.
    """

    width: int
    channels: int = 6
    places: int = 100  # of each channel's ring: tokens until the wave meets itself
    conv_width: int = 3
    activation: str = "relu"  # or 'tanh', 'identity'
    impl: str = "auto"  # 'scan', 'newton'
    jacobian: str = "auto"  # see ops.newton_scan: how 'newton' iterates, not what it finds
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(C, N, W)"""
        C, N, W = self.channels, self.places, self.conv_width
        contract.positive(width=self.width, channels=C, places=N, conv_width=W)
        ops.check_jacobian(self.jacobian)
        if W % 2 == 0 or not 3 <= W <= N:
            raise ValueError(f"conv_width: expected an odd integer from 3 to places = {N}, got {W}")
        if self.activation not in ACTIVATIONS:
            nearest = contract.nearest(str(self.activation), ACTIVATIONS)
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}; {nearest}"
            )
        return C, N, W

    def initial_state(self, batch: int) -> State:
        C, N, _ = self.sizes()
        return State(jnp.zeros((batch, C, N), contract.state_dtype(self.dtype)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (C, N, W), B, D = self.sizes(), len(x_BTD), self.width
        wide = contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        dot = partial(lax.dot_general, preferred_element_type=wide)
        a_BTCN = nn.DenseGeneral((C, N), name="in", kernel_init=at_place_0(C, N), dot_general=dot, **kinds)(x_BTD)
        u_WCE = self.param("conv", shift, (W, C, C), self.param_dtype).astype(wide)

        def token(h_X, a_CN):
            return step(h_X.reshape(C, N), a_CN, u_WCE, ACTIVATIONS[self.activation]).ravel()

        how: dict[str, Any] = {"impl": self.impl, "jacobian": self.jacobian}
        h_BX = state.h_BCN.reshape(B, C * N)
        h_BTX, h_BX = ops.nonlinear_scan(token, h_BX, a_BTCN.astype(wide), reset_BT, **how)
        return nn.Dense(D, use_bias=False, name="out", **kinds)(h_BTX), State(h_BX.reshape(B, C, N))


def at_place_0(C, N):
    """Each channel takes the sum of the inputs, at one place. DenseGeneral asks for a matrix [D, C N]."""

    def init(key, shape, dtype=float):
        return jnp.zeros((shape[0], C, N), dtype).at[:, :, 0].set(1).reshape(shape)

    return init


def shift(key, shape, dtype=float):
    """Each channel takes what it held one place up."""
    W, C, _ = shape
    return jnp.zeros(shape, dtype).at[W // 2 + 1].set(jnp.eye(C, dtype=dtype))
