"""S5: one state-space model of many inputs and outputs, whose matrix is diagonal and starts as HiPPO's.

    h_t = exp(dt Lambda) h_{t-1} + (exp(dt Lambda) - 1) / Lambda B x_t              discretisation 'zoh'
    h_t = (2 + dt Lambda) / (2 - dt Lambda) h_{t-1} + 2 dt / (2 - dt Lambda) B x_t                'bilinear'
    y_t = 2 Re(C h_t) + D x_t                                        each state has a conjugate, which need not be kept

Source: Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence Modeling" (2022), arXiv:2208.04933,
sec. 3 and the appendix on initialisation: Lambda from HiPPO-N, block-diagonal with `blocks` copies, and B and C in its
eigenvectors; a step dt of its own for each state.
Differs: this is the SSM alone, since the nonlinearity and the residual around it belong to the model. Real parts of
Lambda stay below -1e-4, the released code's option for sequences of unbounded length. It draws B with variance
1 / state_size; here it is LeCun's, 1 / width. Its third way to draw C, 'lecun_normal' of variance 1 / (width
state_size), is left out.

Dims: B batch, T time, D width, J blocks, P = state_size / J, real, N = state_size / 2 complex states, K = N / J of them
      in a block, E = 2 N, real parts before imaginary ones.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops import hippo


class State(NamedTuple):
    h_BN: jax.Array  # complex


def step(h_N, x_D, a_N, b_N, B_ND, C_DN, D_D):
    """One token, a and b as discretised. This is the definition; every faster form is tested against it."""
    h_N = a_N * h_N + b_N * (B_ND @ x_D)
    return h_N, 2 * (C_DN @ h_N).real + D_D * x_D


class S5(nn.Module):
    """x_BTD -> (y_BTD, State). The state is complex64, or complex128 when `dtype` is float64.

    Raises ValueError, by name, for an odd state size, blocks that do not divide it into even sizes, a discretisation or
    an initialisation that there is not, and for inputs, state or resets that do not fit.
    """

    width: int
    state_size: int | None = None  # 2 N, even; width, or one more
    blocks: int | None = None  # J; 8, or the largest divisor of 8 that divides N
    discretisation: str = "zoh"  # 'bilinear'
    C_init: str = "trunc_standard_normal"  # of variance 1 / state_size, in HiPPO's eigenvectors; or 'complex_normal', 1
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int]:
        """(N, J)"""
        contract.positive(width=self.width)
        size = self.width + self.width % 2 if self.state_size is None else self.state_size
        if not contract.whole_number(size) or size < 2 or size % 2:
            raise ValueError(f"state_size: expected an even integer >= 2, a conjugate for each state, got {size!r}")
        J = math.gcd(8, size // 2) if self.blocks is None else self.blocks
        contract.divisible("state_size / 2", size // 2, "blocks", J)
        known = {"discretisation": ("zoh", "bilinear"), "C_init": ("trunc_standard_normal", "complex_normal")}
        for field, names in known.items():
            if (got := getattr(self, field)) not in names:
                nearest = contract.nearest(str(got), names)
                raise ValueError(f"{field}: expected {' or '.join(map(repr, names))}, got {got!r}; {nearest}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {self.dt_min}, {self.dt_max}")
        return size // 2, J

    def initial_state(self, batch: int) -> State:
        dtype = jnp.promote_types(contract.state_dtype(self.dtype), jnp.complex64)
        return State(jnp.zeros((batch, self.sizes()[0]), dtype))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (N, J), D = self.sizes(), self.width
        wide = contract.state_dtype(self.dtype)
        Lambda_K, V_PK = upper_half(2 * N // J)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        real_N = param("Lambda_real", lambda _, __, dtype: jnp.tile(Lambda_K.real, J).astype(dtype), N)
        imaginary_N = param("Lambda_imag", lambda _, __, dtype: jnp.tile(Lambda_K.imag, J).astype(dtype), N)
        Lambda_N = lax.complex(jnp.minimum(real_N, -1e-4), imaginary_N)
        dt_N = jnp.exp(param("log_dt", log_uniform(self.dt_min, self.dt_max), N))
        B_ED = param("B", eigenvector_B(V_PK, J), 2 * N, D)
        C_init = eigenvector_C(V_PK, J) if self.C_init != "complex_normal" else nn.initializers.normal(0.5**0.5)
        C_DE = param("C", C_init, D, 2 * N)
        D_D = param("D", nn.initializers.normal(1.0), D)

        a_N, b_N = (ops.zero_order_hold if self.discretisation == "zoh" else bilinear)(Lambda_N, dt_N)
        y_BTD, h_BN = s5(x_BTD.astype(self.dtype), a_N, b_N, B_ED, C_DE, D_D, state.h_BN, reset_BT, self.impl)
        return y_BTD, State(h_BN)


def bilinear(Lambda, dt):
    """The step by the trapezoid rule, of the state and of the input."""
    return (2 + dt * Lambda) / (2 - dt * Lambda), 2 * dt / (2 - dt * Lambda)


def s5(x_BTD, a_N, b_N, B_ED, C_DE, D_D, h_BN, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTD, h_BN)."""
    N = a_N.size
    B_ND, C_DN = lax.complex(B_ED[:N], B_ED[N:]), lax.complex(C_DE[:, :N], C_DE[:, N:])
    if impl == "scan":
        one = partial(step, a_N=a_N, b_N=b_N, B_ND=B_ND, C_DN=C_DN, D_D=D_D)
        y_BTD, h_BN = ops.recur(one, h_BN, ops.widen((x_BTD,)), reset_BT)
        return y_BTD.astype(x_BTD.dtype), h_BN
    # x and y are real: one real product each, not four, with real and imaginary parts side by side.
    dot = partial(jnp.einsum, preferred_element_type=D_D.dtype)
    B_ND = b_N[:, None] * B_ND
    u_BTE = dot("btd,ed->bte", x_BTD, jnp.concatenate([B_ND.real, B_ND.imag]).astype(x_BTD.dtype))
    u_BTN = lax.complex(u_BTE[..., :N], u_BTE[..., N:])
    h_BTN, h_BN = ops.linear_scan(jnp.broadcast_to(a_N, u_BTN.shape), u_BTN, h_BN, reset_BT, impl=impl)
    h_BTE = jnp.concatenate([h_BTN.real, -h_BTN.imag], axis=-1).astype(x_BTD.dtype)
    y_BTD = 2 * dot("bte,de->btd", h_BTE, C_DE.astype(x_BTD.dtype)) + D_D * x_BTD
    return y_BTD.astype(x_BTD.dtype), h_BN


def upper_half(P):
    """HiPPO-N's eigenvalues above the real axis, [K], and their eigenvectors, [P, K]."""
    normal = hippo.legs_normal(P)
    return normal.Lambda_N[P // 2 :], normal.V_NN[:, P // 2 :]


def eigenvector_B(V_PK, J):
    """V* B for a real B of LeCun's, block by block: [2 N, D]."""

    def init(key, shape, dtype=float):
        P, D = len(V_PK), shape[1]
        B_DJP = nn.initializers.lecun_normal()(key, (D, J * P)).reshape(D, J, P)
        B_ND = jnp.einsum("pk,djp->jkd", V_PK.conj(), B_DJP, precision="highest").reshape(-1, D)
        return jnp.concatenate([B_ND.real, B_ND.imag]).astype(dtype)

    return init


def eigenvector_C(V_PK, J):
    """C V for a complex C, both of whose parts are LeCun's, block by block: [D, 2 N]."""

    def init(key, shape, dtype=float):
        P, D = len(V_PK), shape[0]
        real, imaginary = (nn.initializers.lecun_normal()(key, (J * P, D)) for key in jax.random.split(key))
        C_JPD = lax.complex(real, imaginary).reshape(J, P, D)
        C_DN = jnp.einsum("jpd,pk->djk", C_JPD, V_PK, precision="highest").reshape(D, -1)
        return jnp.concatenate([C_DN.real, C_DN.imag], axis=1).astype(dtype)

    return init


def log_uniform(low, high):
    """The logarithm of what is uniform in it."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))
