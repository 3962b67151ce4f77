"""LSSL, the linear state-space layer: an ODE per feature whose matrix is HiPPO's, with a step of its own.

    A_t = (I - a dt A)^-1 (I + (1 - a) dt A)        B_t = (I - a dt A)^-1 dt B
    x_t = A_t x_{t-1} + B_t u_t        y_t = C x_t + D u_t        out = W gelu(y_t)
    A = -P (T^-1 + diag(c)) Q, B = P b, where T is tridiagonal, P and Q diagonal

Source: Gu, Johnson, Goel, Saab, Dao, Rudra, Re, "Combining Recurrent, Convolutional, and Continuous-time Models with
Linear State-Space Layers" (2021), arXiv:2110.13985, sec. 2 (the discretisation), sec. 3 (the three views), sec. 4 and
appendix (the trained A, quasiseparable, which at the start is HiPPO's).
Differs: one output per feature, so C has one row (the paper's M = 1). A is shared by the features, as in the released
code, and a dense matrix once it is made: the paper's fast product with a quasiseparable one is not taken. Untrained,
lagt has the paper's A, the released code's less 1/2. legt starts without the released code's noise of 1e-2 on T.

Dims: B batch, T time, D width, N state size.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo import contract, ops
from memzoo.ops import hippo


class State(NamedTuple):
    x_BDN: jax.Array


def step(x_N, u, A_NN, B_N, C_N, D):
    """One token, one feature; A and B are those of a step. This is the definition."""
    x_N = A_NN @ x_N + B_N * u
    return x_N, C_N @ x_N + D * u


class LSSL(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for an unknown measure, an alpha outside of [0, 1], or at which the initial A blows up,
    steps that are not 0 < dt_min <= dt_max, and for inputs, state or resets that do not fit.
    """

    width: int
    state_size: int = 64  # N
    measure: str = "legs"  # or 'legt', 'lagt'
    alpha: float = 0.5  # 0 is Euler's method, 1 the backward one, 1/2 the bilinear rule
    trained: bool = True  # False is LSSL-fixed: A is a constant, and dt gets no gradient
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    impl: str = "auto"  # 'scan', 'associative', 'conv'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def size(self) -> int:
        """N"""
        contract.positive(width=self.width)
        hippo.check(self.measure, self.state_size, ("legs", "legt", "lagt"))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1], got {self.alpha}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {self.dt_min}, {self.dt_max}")
        if not bounded(self.measure, self.state_size, self.alpha, self.dt_max):
            raise ValueError(
                f"alpha: expected one at which steps of dt_max = {self.dt_max} do not blow up a state of state_size = "
                f"{self.state_size}, got {self.alpha}; 0.5 and above never do, less does not at a smaller dt_max"
            )
        return self.state_size

    def initial_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.width, self.size()), contract.state_dtype(self.dtype)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        N, D, wide = self.size(), self.width, contract.state_dtype(self.dtype)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        dt_D = jnp.exp(param("log_dt", log_uniform(self.dt_min, self.dt_max), D))
        if self.trained:
            start = {f"A_{part}": value for part, value in quasiseparable(self.measure, N).items()}
            A_NN, B_N = matrices(**{name[2:]: param(name, same(value), *value.shape) for name, value in start.items()})
        else:
            A_NN, B_N = (jnp.asarray(z, wide) for z in hippo.transition(self.measure, N))
            dt_D = lax.stop_gradient(dt_D)
        C_DN = param("C", nn.initializers.normal(1.0), D, N)
        D_D = param("D", nn.initializers.normal(1.0), D)
        A_DNN, B_DN = jax.vmap(lambda dt: hippo.bilinear(A_NN, B_N, dt, self.alpha))(dt_D)

        u_BTD = x_BTD.astype(self.dtype).astype(wide)
        y_BTD, x_BDN = lssl(u_BTD, A_DNN, B_DN, C_DN, D_D, state.x_BDN, reset_BT, self.impl)
        y_BTD = nn.gelu(y_BTD.astype(self.dtype), approximate=False)
        return nn.Dense(D, dtype=self.dtype, param_dtype=self.param_dtype, name="out")(y_BTD), State(x_BDN)


def lssl(u_BTD, A_DNN, B_DN, C_DN, D_D, x_BDN, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTD, x_BDN)."""
    if impl == "scan":
        token = lambda x_DN, u_D: jax.vmap(step)(x_DN, u_D, A_DNN, B_DN, C_DN, D_D)
        return ops.recur(token, x_BDN, (u_BTD,), reset_BT)
    y_BTD, x_BDN = ops.time_invariant(u_BTD, A_DNN, B_DN, C_DN, x_BDN, reset_BT, impl=impl)
    return y_BTD + D_D * u_BTD, x_BDN


def matrices(below, diagonal, above, left, right, shift, b):
    """(A_NN, B_N) from the diagonals of T, P, Q, c and b."""
    T_NN = jnp.diag(diagonal) + jnp.diag(below, -1) + jnp.diag(above, 1)
    return -left[:, None] * (jnp.linalg.inv(T_NN) + jnp.diag(shift)) * right, left * b


@functools.cache
def bounded(measure, N, alpha, dt):
    """Whether no power of the initial step's matrix is large. Eigenvalues in the unit circle are not enough, as A is
    far from normal: those of legs with 64 states, alpha = 0.4 and dt = 0.1 are all there, and its powers reach 1e18."""
    if alpha >= 0.5:
        return True  # A + A* is negative, so that no step lengthens the state
    A_NN, _ = hippo.transition(measure, N)
    power_NN = np.linalg.solve(np.eye(N) - alpha * dt * A_NN, np.eye(N) + (1 - alpha) * dt * A_NN)
    for _ in range(14):  # up to the power 2^13
        if not np.linalg.norm(power_NN) < 1e3:  # which leaves float32 four digits
            return False
        power_NN = power_NN @ power_NN
    return True


def quasiseparable(measure, N):
    """What `matrices` makes HiPPO's of: T^-1 sums what is before, for legt with signs that alternate after it."""
    n = np.arange(N)
    root = np.ones(N) if measure == "lagt" else np.sqrt(2 * n + 1)
    below, diagonal, above = -np.ones(N - 1), np.ones(N), np.zeros(N - 1)
    if measure == "legt" and N > 1:
        below, diagonal, above = below / 2, np.where((n == 0) | (n == N - 1), 0.5, 0), above + 0.5
    shift = -n / (2 * n + 1) if measure == "legs" else np.zeros(N)
    parts = {"below": below, "diagonal": diagonal, "above": above}
    return parts | {"left": root, "right": root, "shift": shift, "b": np.ones(N)}


def log_uniform(low, high):
    """log dt, such that the features' memories of 1 / dt tokens are spread evenly over the orders of magnitude."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))


def same(value):
    return lambda key, shape, dtype=float: jnp.asarray(value, dtype)
