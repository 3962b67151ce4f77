"""LRU, the linear recurrent unit: a complex diagonal recurrence that its parameters cannot make unstable.

    lambda = exp(-exp(nu) + i exp(theta))
    h_t = lambda h_{t-1} + gamma B x_t        y_t = Re(C h_t) + D x_t

Source: Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De, "Resurrecting Recurrent Neural Networks for Long Sequences"
(2023), arXiv:2303.06349, sec. 3.3 (lambda), sec. 3.4 (gamma, learned as its logarithm), appendix A (initialisation).
Differs: none; this is the recurrence alone, since the GLU and the residual around it belong to the model. The ring's
default is the whole disk, r_min = 0 and r_max = 1, as in the paper's code; for long memories the paper raises r_min.

Dims: B batch, T time, D width, N state size, E = 2 N, real parts before imaginary ones.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops


class State(NamedTuple):
    h_BN: jax.Array  # complex


def step(h_N, x_D, lambda_N, gamma_N, B_ND, C_DN, D_D):
    """One token. This is the definition; every faster form is tested against it."""
    h_N = lambda_N * h_N + gamma_N * (B_ND @ x_D)
    return h_N, (C_DN @ h_N).real + D_D * x_D


class LRU(nn.Module):
    """x_BTD -> (y_BTD, State). The state is complex64, or complex128 when `dtype` is float64.

    Raises ValueError, by name, for a ring outside of 0 <= r_min < r_max <= 1, a phase that is not a finite number > 0,
    and for inputs, state or resets that do not fit.
    """

    width: int
    state_size: int | None = None  # N, complex; width
    r_min: float = 0.0  # of |lambda| at the start
    r_max: float = 1.0
    max_phase: float = 2 * math.pi  # of arg(lambda) at the start
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def size(self) -> int:
        """N"""
        N = self.width if self.state_size is None else self.state_size
        contract.positive(width=self.width, state_size=N)
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(f"r_min, r_max: expected 0 <= r_min < r_max <= 1, got {self.r_min}, {self.r_max}")
        if not self.max_phase > 0:
            raise ValueError(f"max_phase: expected a number > 0, got {self.max_phase}")
        return N

    def initial_state(self, batch: int) -> State:
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, self.size()), jnp.promote_types(wide, jnp.complex64)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        N, D = self.size(), self.width
        wide = contract.state_dtype(self.dtype)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        nu_N = param("log_nu", ring(self.r_min, self.r_max), N)
        theta_N = param("log_theta", phase(self.max_phase), N)
        gamma_N = jnp.exp(param("log_gamma", lambda *_: log_gamma(nu_N).astype(self.param_dtype), N))
        r_N, theta_N = jnp.exp(-jnp.exp(nu_N)), jnp.exp(theta_N)
        lambda_N = lax.complex(r_N * jnp.cos(theta_N), r_N * jnp.sin(theta_N))
        B_ED = param("B", normal(2 * D), 2 * N, D)
        C_DE = param("C", normal(N), D, 2 * N)
        D_D = param("D", normal(1), D)

        x_BTD = x_BTD.astype(self.dtype)
        y_BTD, h_BN = lru(x_BTD, lambda_N, gamma_N, B_ED, C_DE, D_D, state.h_BN, reset_BT, self.impl)
        return y_BTD, State(h_BN)


def lru(x_BTD, lambda_N, gamma_N, B_ED, C_DE, D_D, h_BN, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTD, h_BN)."""
    N = lambda_N.size
    if impl == "scan":
        B_ND, C_DN = lax.complex(B_ED[:N], B_ED[N:]), lax.complex(C_DE[:, :N], C_DE[:, N:])
        one = partial(step, lambda_N=lambda_N, gamma_N=gamma_N, B_ND=B_ND, C_DN=C_DN, D_D=D_D)
        y_BTD, h_BN = ops.recur(one, h_BN, ops.widen((x_BTD,)), reset_BT)
        return y_BTD.astype(x_BTD.dtype), h_BN
    # x and y are real: one real product each, not four, with real and imaginary parts side by side.
    dot = partial(jnp.einsum, preferred_element_type=gamma_N.dtype)
    B_ED = (jnp.tile(gamma_N, 2)[:, None] * B_ED).astype(x_BTD.dtype)
    u_BTE = dot("btd,ed->bte", x_BTD, B_ED)
    u_BTN = lax.complex(u_BTE[..., :N], u_BTE[..., N:])
    h_BTN, h_BN = ops.linear_scan(jnp.broadcast_to(lambda_N, u_BTN.shape), u_BTN, h_BN, reset_BT, impl=impl)
    h_BTE = jnp.concatenate([h_BTN.real, -h_BTN.imag], axis=-1).astype(x_BTD.dtype)
    y_BTD = dot("bte,de->btd", h_BTE, C_DE.astype(x_BTD.dtype)) + D_D * x_BTD
    return y_BTD.astype(x_BTD.dtype), h_BN


def ring(r_min, r_max):
    """log(-log|lambda|), where lambda is uniform on the ring: its squared modulus is.

    Drawn as 1 - |lambda|^2, which float32 resolves near the unit circle; never 0, nor so near 1 that the log is.
    """

    def init(key, shape, dtype=float):
        inside = 1 - r_max**2 + (r_max**2 - r_min**2) * (1 - jax.random.uniform(key, shape, jnp.float32))
        inside = jnp.minimum(inside, 1 - jnp.finfo(jnp.float32).eps)
        return jnp.log(-0.5 * jnp.log1p(-inside)).astype(dtype)

    return init


def phase(max_phase):
    """log(arg lambda), uniform in (0, max_phase]."""
    return lambda key, shape, dtype=float: jnp.log(max_phase * (1 - jax.random.uniform(key, shape))).astype(dtype)


def log_gamma(nu_N):
    """log sqrt(1 - |lambda|^2): then white noise comes out of the recurrence as loud as it went in."""
    return 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu_N)))


def normal(variance):
    return nn.initializers.normal(variance**-0.5)
