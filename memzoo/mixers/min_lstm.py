"""minLSTM: an LSTM whose gates and candidate do not see the state, with forget and input gates that sum to 1.

    f, i = sigmoid(W x_t + b), each its own W, b        c_t = g(W_c x_t + b_c)
    f' = f / (f + i)        i' = i / (f + i)            g(x) = x + 1/2 for x >= 0, else sigmoid(x)
    h_t = f' h_{t-1} + i' c_t                           y_t = W_out h_t + b_out

Source: Feng, Tung, Ahmed, Bengio, Hajimirsadeghi, "Were RNNs All We Needed?" (2024), arXiv:2410.01201, sec. 3.2; g and
the log-space form, appendix B; biases, initialisation, forget_bias and the projection of h as in the released code.
Differs: h is computed as it stands, not as the exponential of a log-space scan: the recurrence is a weighted mean, so
nothing can overflow, and without g it may change sign. A new sequence begins at 0, as in the released code by default.

Dims: B batch, T time, D width, F hidden, E = 2 F gates in the order f, i.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.initial import within


class State(NamedTuple):
    h_BF: jax.Array


def g(x):
    """Continuous, increasing, and positive: so is h, whose logarithm the paper's parallel form takes."""
    return jnp.where(x >= 0, x + 0.5, nn.sigmoid(x))


def normalised(f, i):
    """f' and i' from f and i before their sigmoids. Both may underflow; the ratio i / f does not."""
    log_ratio = nn.log_sigmoid(i) - nn.log_sigmoid(f)
    return nn.sigmoid(-log_ratio), nn.sigmoid(log_ratio)


def step(h_F, f_F, i_F, c_F, act):
    """One token; f, i and c before their nonlinearities. This is the definition of every faster form."""
    f_F, i_F = normalised(f_F, i_F)
    h_F = f_F * h_F + i_F * act(c_F)
    return h_F, h_F


class MinLSTM(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for sizes below 1, a forget bias that is not finite, and for inputs, state or resets
    that do not fit.
    """

    width: int
    expand: int = 1  # hidden = expand * width
    positive: bool = True  # or c = W_c x + b_c without g, the paper's vanilla form of appendix A
    forget_bias: float = 0.0  # added to f's bias at the start: the larger, the longer the memory
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def size(self) -> int:
        """F"""
        contract.positive(width=self.width, expand=self.expand)
        return self.expand * self.width

    def initial_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.size()), contract.state_dtype(self.dtype)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        F, wide = self.size(), contract.state_dtype(self.dtype)

        def dense(name, size, inputs, dtype=self.dtype, bias=None):
            init, kinds = within(inputs**-0.5), {"dtype": dtype, "param_dtype": self.param_dtype}
            return nn.Dense(size, kernel_init=init, bias_init=bias or init, name=name, **kinds)

        gates_BTE = dense("gates", 2 * F, self.width, wide, forget_first(self.forget_bias, self.width**-0.5))(x_BTD)
        f_BTF, i_BTF = jnp.split(gates_BTE, 2, axis=-1)
        c_BTF = dense("candidate", F, self.width)(x_BTD).astype(wide)
        h_BTF, h_BF = min_lstm(f_BTF, i_BTF, c_BTF, state.h_BF, reset_BT, self.positive, self.impl)
        return dense("out", self.width, F)(h_BTF), State(h_BF)


def min_lstm(f_BTF, i_BTF, c_BTF, h_BF, reset_BT, positive=True, impl="auto"):
    """All T tokens. Returns (h_BTF, h_BF)."""
    act = g if positive else (lambda c: c)
    if impl == "scan":
        return ops.recur(partial(step, act=act), h_BF, (f_BTF, i_BTF, c_BTF), reset_BT)
    f_BTF, i_BTF = normalised(f_BTF, i_BTF)
    return ops.linear_scan(f_BTF, i_BTF * act(c_BTF), h_BF, reset_BT, impl=impl)


def forget_first(forget_bias, bound):
    """within(bound), and forget_bias more for the first half, the forget gates."""
    return lambda key, shape, dtype=float: within(bound)(key, shape, dtype).at[: shape[0] // 2].add(forget_bias)
