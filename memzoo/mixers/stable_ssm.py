"""StableSSM: a diagonal state-space model whose decays are a function of the weights that suits gradient descent.

    h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A x_t        A = f(w) + i omega        per channel, with N states
    y_t = glu(W gelu(2 Re(C h_t) + D x_t) + b)

    best  f(w) = -1 / (w^2 + 0.1)     exp  f(w) = -e^w     softplus  f(w) = -log(1 + e^w)     direct  f(w) = w

The gradient of a loss in w goes as |f'(w)| / f(w)^2. In units of |w| that is 2 for 'best', however long the memory, and
grows without bound for the others as f(w) nears 0: what they learn of long memories overshoots.

Source: Wang, Li, "StableSSM: Alleviating the Curse of Memory in State-space Models through Stable Reparameterization"
(2023), arXiv:2311.14495; w^2 + 0.1, the initialisation, the zero-order hold and the layer around it (S4D's, with gelu
and glu) from the released code.
Differs: 'direct' starts at f(w) = -0.5 as the others do; the released code starts it at +0.5, which explodes. It is
there to compare with, and nothing keeps it stable.

Dims: B batch, T time, D width, N state size, complex, E = 2 N, real parts before imaginary ones.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops

OFFSET = 0.1  # the paper's b; its a is 1
DECAYS = {
    "best": lambda w: -1 / (jnp.square(w) + OFFSET),
    "exp": lambda w: -jnp.exp(w),
    "softplus": lambda w: -nn.softplus(w),
    "direct": lambda w: w,
}
WEIGHTS = {  # their inverses, where memory lasts for `time`
    "best": lambda time: math.sqrt(time - OFFSET),
    "exp": lambda time: -math.log(time),
    "softplus": lambda time: math.log(math.expm1(1 / time)),
    "direct": lambda time: -1 / time,
}


class State(NamedTuple):
    h_BDN: jax.Array  # complex


def step(h_DN, x_D, a_DN, b_DN, C_DN, D_D):
    """One token, a = exp(dt A), b = (a - 1) / A. This is the definition; every faster form is tested against it."""
    h_DN = a_DN * h_DN + b_DN * x_D[:, None]
    return h_DN, 2 * jnp.sum(C_DN * h_DN, -1).real + D_D * x_D


class StableSSM(nn.Module):
    """x_BTD -> (y_BTD, State). The state is complex64, or complex128 when `dtype` is float64.

    Raises ValueError, by name, for a reparameterisation that there is not, and for inputs, state or resets that do not
    fit.
    """

    width: int
    state_size: int = 32  # N, complex, per channel
    reparameterisation: str = "best"  # 'exp', 'softplus', 'direct'
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def size(self) -> int:
        """N"""
        contract.positive(width=self.width, state_size=self.state_size)
        if self.reparameterisation not in DECAYS:
            expected, nearest = ", ".join(DECAYS), contract.nearest(str(self.reparameterisation), DECAYS)
            raise ValueError(
                f"reparameterisation: expected one of {expected}, got {self.reparameterisation!r}; {nearest}"
            )
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {self.dt_min}, {self.dt_max}")
        return self.state_size

    def initial_state(self, batch: int) -> State:
        dtype = jnp.promote_types(contract.state_dtype(self.dtype), jnp.complex64)
        return State(jnp.zeros((batch, self.width, self.size()), dtype))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        N, D = self.size(), self.width
        wide = contract.state_dtype(self.dtype)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        w_DN = param("w", nn.initializers.constant(WEIGHTS[self.reparameterisation](2.0)), D, N)
        omega_DN = param("omega", lambda _, shape, dtype: math.pi * jnp.ones(shape, dtype) * jnp.arange(N), D, N)
        dt_D = jnp.exp(param("log_dt", log_uniform(self.dt_min, self.dt_max), D))
        C_DE = param("C", nn.initializers.normal(0.5**0.5), D, 2 * N)
        D_D = param("D", nn.initializers.normal(1.0), D)
        A_DN = lax.complex(DECAYS[self.reparameterisation](w_DN), omega_DN)
        C_DN = lax.complex(C_DE[:, :N], C_DE[:, N:])

        x_BTD = x_BTD.astype(self.dtype)
        y_BTD, h_BDN = stable_ssm(x_BTD, A_DN, C_DN, dt_D, D_D, state.h_BDN, reset_BT, self.impl)
        out = nn.Dense(2 * D, dtype=self.dtype, param_dtype=self.param_dtype, name="out")
        return nn.glu(out(nn.gelu(y_BTD, approximate=False))), State(h_BDN)


def stable_ssm(x_BTD, A_DN, C_DN, dt_D, D_D, h_BDN, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTD, h_BDN)."""
    a_DN, b_DN = ops.zero_order_hold(A_DN, dt_D[:, None])
    if impl == "scan":
        one = partial(step, a_DN=a_DN, b_DN=b_DN, C_DN=C_DN, D_D=D_D)
        y_BTD, h_BDN = ops.recur(one, h_BDN, ops.widen((x_BTD,)), reset_BT)
        return y_BTD.astype(x_BTD.dtype), h_BDN
    y_BTD, h_BDN = ops.diagonal_ssm(ops.widen(x_BTD), a_DN, b_DN, 2 * C_DN, h_BDN, reset_BT, impl=impl)
    return (y_BTD + D_D * x_BTD).astype(x_BTD.dtype), h_BDN


def log_uniform(low, high):
    """The logarithm of what is uniform in it."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))
