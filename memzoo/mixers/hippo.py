"""HiPPO-RNN: a gated RNN that reads and writes a memory of all its past, kept as coefficients of polynomials.

    g = sigmoid(W [c_{t-1}, x_t] + b)        h_t = (1 - g) h_{t-1} + g tanh(W [c_{t-1}, x_t] + b)      each its own W, b
    f_t = L h_t + b        c_t = A_t c_{t-1} + B_t f_t        y_t = W_out h_t

The memory alone, of given signals, is `ops.hippo_memory`, and the past it holds `reconstruct` beside it.

Source: Gu, Dao, Ermon, Rudra, Re, "HiPPO: Recurrent Memory with Optimal Polynomial Projections" (2020),
arXiv:2008.07669, sec. 2.4 and fig. 2 (the cell), sec. 3 (legs).
Differs: legs' steps are exact by default, not bilinear, so that c_t is the projection of f's past at every step. The
order is the paper's, h before f and c; the released code writes f from h_{t-1} and x_t and reads c_t. The weights of
the gate and of the update begin as in the released code, f's as they would there for h alone, and biases at 0. y is
always a projection of h, so that width and hidden are free.

Dims: B batch, T time, D width, F hidden, E = 2 F the gate and the update, M signals, N coefficients, X = F + M N.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.hippo_memory import positions
from memzoo.ops.hippo_memory import step as memory_step


class State(NamedTuple):
    h_BF: jax.Array
    c_BMN: jax.Array
    position_B: jax.Array  # tokens so far, int32


def step(h_F, c_MN, a_E, k, U_SE, L_FM, b_M, remember):
    """One token after k others; a = W x + b. This is the definition; every faster form is tested against it."""
    g_F, n_F = jnp.split(a_E + c_MN.ravel() @ U_SE, 2)
    g_F = nn.sigmoid(g_F)
    h_F = (1 - g_F) * h_F + g_F * jnp.tanh(n_F)
    f_M = h_F @ L_FM + b_M
    return h_F, jax.vmap(remember, (0, 0, None))(c_MN, f_M, k)


class HiPPO(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is; the position is int32.

    Raises ValueError, by name, for an unknown measure or discretisation, a timescale that is not positive, and for
    inputs, state or resets that do not fit.
    """

    width: int
    hidden: int | None = None  # F; width
    state_size: int | None = None  # N; hidden
    signals: int = 1  # M, remembered side by side
    measure: str = "legs"  # or 'legt', 'lagt'
    discretisation: str = "zoh"  # or 'bilinear'
    timescale: float = 100.0  # tokens: legt's window, lagt's mean age; legs has none
    impl: str = "auto"  # 'scan', 'newton'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(F, M, N)"""
        F = self.width if self.hidden is None else self.hidden
        N = F if self.state_size is None else self.state_size
        contract.positive(width=self.width, hidden=F, state_size=N, signals=self.signals)
        memory_step(self.measure, N, self.discretisation, self.timescale)  # refuses what cannot be
        return F, self.signals, N

    def initial_state(self, batch: int) -> State:
        (F, M, N), wide = self.sizes(), contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, F), wide), jnp.zeros((batch, M, N), wide), jnp.zeros(batch, jnp.int32))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (F, M, N), (B, T, D), wide = self.sizes(), x_BTD.shape, contract.state_dtype(self.dtype)
        remember = memory_step(self.measure, N, self.discretisation, self.timescale)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        gates: dict[str, Any] = {"dot_general": partial(lax.dot_general, preferred_element_type=wide)}
        start = gate_and_update(D + M * N)
        a_BTE = nn.Dense(2 * F, name="in", kernel_init=start, **gates, **kinds)(x_BTD).astype(wide)
        U_SE = param("recurrent", start, M * N, 2 * F)
        L_FM = param("signal", nn.initializers.lecun_uniform(), F, M)
        b_M = param("signal_bias", nn.initializers.zeros, M)
        k_BT = positions(state.position_B, T, reset_BT)

        def token(x_X, a_k):
            h_F, c_MN = step(x_X[:F], x_X[F:].reshape(M, N), *a_k, U_SE, L_FM, b_M, remember)
            return jnp.concatenate([h_F, c_MN.ravel()])

        x_BX = jnp.concatenate([state.h_BF, state.c_BMN.reshape(B, M * N)], axis=1)
        x_BTX, x_BX = ops.nonlinear_scan(token, x_BX, (a_BTE, k_BT), reset_BT, impl=self.impl)
        y_BTD = nn.Dense(D, use_bias=False, name="out", **kinds)(x_BTX[..., :F].astype(self.dtype))
        return y_BTD, State(x_BX[:, :F], x_BX[:, F:].reshape(B, M, N), k_BT[:, -1] + 1)


def gate_and_update(inputs):
    """Side by side: the gate's weights normal by the number of all inputs, the update's by Glorot, for these alone."""
    glorot = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")

    def init(key, shape, dtype=float):
        half = shape[0], shape[1] // 2
        of_gate, of_update = jax.random.split(key)
        gate = inputs**-0.5 * jax.random.normal(of_gate, half, dtype)
        return jnp.concatenate([gate, glorot(of_update, half, dtype)], axis=1)

    return init
