"""S4D, the diagonal state space: S4 without its low rank, each state a decaying oscillation.

    x_t = A_t x_{t-1} + B_t u_t        y_t = 2 Re(C x_t) + D u_t        A_t = exp(dt A),  B_t = (exp(dt A) - 1) / A B
    out = GLU(W gelu(y_t))

    lin   A_n = -1/2 + i pi n                                    B = 1
    inv   A_n = -1/2 + i (N' / pi) (N' / (2n + 1) - 1)           B = 1          N' = 2 N, the size of the state
    legs  A_n, the eigenvalues of HiPPO-LegS' normal part        B, half of HiPPO's

Source: Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models" (2022),
arXiv:2206.11893, sec. 3 (discretisations, parameters), sec. 4 (initialisations; that B is halved for legs).
Differs: this is the released layer without dropout. The released code does not halve B of legs, and clamps its
imaginary parts at +-2, which depend on the phases of its eigenvectors; here these make B real. `conv` is the paper's,
`chunk` convolves inside chunks.

Dims: B batch, T time, D width, N conjugate pairs of the state.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo import contract, ops
from memzoo.ops import hippo

INITS = ("lin", "inv", "legs")
DISCRETISATIONS = ("zoh", "bilinear")


class State(NamedTuple):
    x_BDN: jax.Array  # complex, the half of each conjugate pair


def step(x_N, u, A_N, B_N, C_N, D):
    """One token, one feature; A and B are those of a step. This is the definition."""
    x_N = A_N * x_N + B_N * u
    return x_N, 2 * jnp.real(C_N @ x_N) + D * u


class S4D(nn.Module):
    """x_BTD -> (y_BTD, State). The state is complex64, or complex128 when `dtype` is float64.

    Raises ValueError, by name, for an odd state_size, an unknown init or discretisation, steps that are not
    0 < dt_min <= dt_max, and for inputs, state or resets that do not fit.
    """

    width: int
    state_size: int = 64  # 2 N
    init_A: str = "legs"  # or 'inv', 'lin'
    discretisation: str = "zoh"  # or 'bilinear'
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    impl: str = "auto"  # 'scan', 'associative', 'chunk', 'conv'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def size(self) -> int:
        """N"""
        contract.positive(width=self.width, state_size=self.state_size)
        N = contract.divisible("state_size", self.state_size, "the two of a conjugate pair", 2)
        for field, value, known in (
            ("init_A", self.init_A, INITS),
            ("discretisation", self.discretisation, DISCRETISATIONS),
        ):
            if value not in known:
                expected = ", ".join(known)
                raise ValueError(f"{field}: expected one of {expected}; {contract.nearest(str(value), known)}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {self.dt_min}, {self.dt_max}")
        return N

    def initial_state(self, batch: int) -> State:
        wide = jnp.promote_types(contract.state_dtype(self.dtype), jnp.complex64)
        return State(jnp.zeros((batch, self.width, self.size()), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        N, D, wide = self.size(), self.width, contract.state_dtype(self.dtype)
        frequency_N, b_N = spectrum(self.init_A, N)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        dt_D1 = jnp.exp(param("log_dt", log_uniform(self.dt_min, self.dt_max), D))[:, None]
        decay_DN = jnp.exp(param("log_decay", same(math.log(0.5)), D, N))
        A_DN = lax.complex(-decay_DN, param("frequency", same(frequency_N), D, N))
        B_DN = lax.complex(*param("B", same(np.stack([b_N, 0 * b_N])[:, None]), 2, D, N))
        C_DN = lax.complex(*param("C", nn.initializers.normal(0.5**0.5), 2, D, N))
        D_D = param("D", nn.initializers.normal(1.0), D)
        if self.discretisation == "zoh":
            A_DN, scale_DN = ops.zero_order_hold(A_DN, dt_D1)
        else:
            half_DN = dt_D1 / 2 * A_DN
            A_DN, scale_DN = (1 + half_DN) / (1 - half_DN), dt_D1 / (1 - half_DN)

        u_BTD = x_BTD.astype(self.dtype)
        y_BTD, x_BDN = s4d(u_BTD.astype(wide), A_DN, scale_DN * B_DN, C_DN, D_D, state.x_BDN, reset_BT, self.impl)
        y_BTD = nn.gelu(y_BTD.astype(self.dtype), approximate=False)
        y_BTE = nn.Dense(2 * D, dtype=self.dtype, param_dtype=self.param_dtype, name="out")(y_BTD)
        return nn.glu(y_BTE), State(x_BDN)


def s4d(u_BTD, A_DN, B_DN, C_DN, D_D, x_BDN, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTD, x_BDN)."""
    if impl == "scan":
        token = lambda x_DN, u_D: jax.vmap(step)(x_DN, u_D, A_DN, B_DN, C_DN, D_D)
        return ops.recur(token, x_BDN, (u_BTD,), reset_BT)
    op = ops.time_invariant if impl == "conv" else ops.diagonal_ssm
    y_BTD, x_BDN = op(u_BTD, A_DN, B_DN, 2 * C_DN, x_BDN, reset_BT, impl=impl)
    return y_BTD + D_D * u_BTD, x_BDN


def spectrum(init, N):
    """(Im A_N, B_N) at the start, where Re A is -1/2."""
    n = np.arange(N)
    if init == "legs":
        form = hippo.legs_normal(2 * N)
        return form.Lambda_N[N:].imag, form.B_N[N:].real / 2
    return np.pi * n if init == "lin" else 2 * N / np.pi * (2 * N / (2 * n + 1) - 1), np.ones(N)


def log_uniform(low, high):
    """log dt, such that the features' memories of 1 / dt tokens are spread evenly over the orders of magnitude."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))


def same(value):
    """The same for every feature."""
    return lambda key, shape, dtype=float: jnp.broadcast_to(jnp.asarray(value, dtype), shape)
