"""S4, the structured state space: HiPPO's memory of each feature, learned, as a recurrence and as a convolution.

    A = Lambda - P P*
    x_t = (I - dt A / 2)^-1 ((I + dt A / 2) x_{t-1} + dt B u_t)        y_t = 2 Re(C x_t) + D u_t
    out = GLU(W gelu(y_t))

    K^(w) = 2 (q_CB - (1 + w) q_CP (I + (1 + w) q_PP)^-1 q_PB)
    q_ab = sum_n a_n b_n / (2 (1 - w) / dt - (1 + w) Lambda_n)

K^ at the L-th roots of unity w, with C (I - A_t^L) for C, is the Fourier transform of the kernel, A_t being the step's
matrix: one power of it is taken, the L-th, where the recurrence takes L. `associative` is by powers of A_t, dense; so
is the kernel of `auto`, which for 64 states is 1 to 3 times as fast on a CPU as Cauchy's matrix, that of `conv`.

Source: Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces" (2021), arXiv:2111.00396,
sec. 3 (normal plus low rank), appendix C (the recurrence in O(N), the kernel by Cauchy's matrix); Lambda - P P*, which
is stable, Goel, Gu, Donahue, Re, "It's Raw! Audio Generation with State-Space Models" (2022), arXiv:2202.09729; legt,
fout and dt, Gu, Johnson, Timalsina, Rudra, Re, "How to Train Your HiPPO" (2022), arXiv:2206.12037.
Differs: this is the released layer without dropout, each feature with A and B of its own. legt and fout see a window of
1 / dt tokens, as in the papers; the released code's is 2 / dt. B is real at the start, by the choice of eigenvectors;
the released code clamps its imaginary parts at +-2. C is what it is for every L; the released code learns
C (I - A_t^L) for one L. K^ is multiplied out, so that nothing is divided by 1 + w, and taken inside of the unit circle,
for a long kernel piece by piece.

Dims: B batch, T time, D width, N conjugate pairs of the state, R rank of P, L length, F frequencies, X = 2 N, the real
parts of the pairs before the imaginary ones.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops import hippo
from memzoo.ops.time_invariant import kernel_length, strides


class State(NamedTuple):
    x_BDN: jax.Array  # complex, the half of each conjugate pair


def step(x_N, u, dt, Lambda_N, P_RN, B_N, C_N, D):
    """One token, one feature. This is the definition; every faster form is tested against it."""
    pair = lambda a_RN, b_XN: 2 * jnp.real(a_RN @ b_XN.T)  # of both halves of the pairs
    x_N = x_N + dt / 2 * (Lambda_N * x_N - pair(P_RN.conj(), x_N) @ P_RN) + dt * B_N * u
    # (I - dt A / 2)^-1 by Woodbury's identity.
    d_N = 1 / (1 - dt / 2 * Lambda_N)
    low_RR = inverse(2 / dt * jnp.eye(len(P_RN), dtype=dt.dtype) + pair(P_RN.conj(), d_N * P_RN))
    x_N = d_N * (x_N - (low_RR @ pair(P_RN.conj(), d_N * x_N)) @ P_RN)
    return x_N, pair(C_N, x_N) + D * u


class S4(nn.Module):
    """x_BTD -> (y_BTD, State). The state is complex64, or complex128 when `dtype` is float64.

    Raises ValueError, by name, for an odd state_size, an unknown measure, steps that are not 0 < dt_min <= dt_max, and
    for inputs, state or resets that do not fit.
    """

    width: int
    state_size: int = 64  # 2 N
    measure: str = "legs"  # or 'legt', 'fout'
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    impl: str = "auto"  # 'scan', 'associative', 'conv'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def size(self) -> int:
        """N"""
        contract.positive(width=self.width)
        hippo.check(self.measure, self.state_size, ("legs", "legt", "fout"))
        N = contract.divisible("state_size", self.state_size, "the two of a conjugate pair", 2)
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
        form = hippo.normal(self.measure, 2 * N)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        def pairs(name, init, *shape):
            return lax.complex(*param(name, init, 2, D, *shape))

        Lambda_N, P_RN, B_N = form.Lambda_N[N:], form.P_RN[:, N:], form.B_N[N:]
        dt_D = jnp.exp(param("log_dt", log_uniform(self.dt_min, self.dt_max), D))
        decay_DN = jnp.exp(param("log_decay", same(jnp.log(jnp.maximum(-Lambda_N.real, 1e-4))), D, N))
        Lambda_DN = lax.complex(-decay_DN, param("frequency", same(Lambda_N.imag), D, N))
        P_DRN = pairs("P", same_pairs(P_RN), *P_RN.shape)
        B_DN, C_DN = pairs("B", same_pairs(B_N), N), pairs("C", nn.initializers.normal(0.5**0.5), N)
        D_D = param("D", nn.initializers.normal(1.0), D)

        u_BTD = x_BTD.astype(self.dtype)
        system = dt_D, Lambda_DN, P_DRN, B_DN, C_DN, D_D
        y_BTD, x_BDN = s4(u_BTD.astype(wide), system, state.x_BDN, reset_BT, self.impl)
        y_BTD = nn.gelu(y_BTD.astype(self.dtype), approximate=False)
        y_BTE = nn.Dense(2 * D, dtype=self.dtype, param_dtype=self.param_dtype, name="out")(y_BTD)
        return nn.glu(y_BTE), State(x_BDN)


def s4(u_BTD, system, x_BDN, reset_BT, impl="auto"):
    """All T tokens of the systems (dt, Lambda, P, B, C, D). Returns (y_BTD, x_BDN)."""
    T = u_BTD.shape[1]
    if impl == "scan" or (impl == "auto" and T == 1):
        token = lambda x_DN, u_D: jax.vmap(step)(x_DN, u_D, *system)
        return ops.recur(token, x_BDN, (u_BTD,), reset_BT)
    A_DXX, B_DX, C_DX = jax.vmap(real)(*system)
    kernel_DL = kernel(system, A_DXX, C_DX, kernel_length(T, reset_BT)) if impl == "conv" else None
    x_BDX = jnp.concatenate([x_BDN.real, x_BDN.imag], axis=-1)
    y_BTD, x_BDX = ops.time_invariant(u_BTD, A_DXX, B_DX, C_DX, x_BDX, reset_BT, impl=impl, kernel_HL=kernel_DL)
    return y_BTD + system[-1] * u_BTD, lax.complex(*jnp.split(x_BDX, 2, axis=-1))


def real(dt, Lambda_N, P_RN, B_N, C_N, D):
    """The step as real matrices that act on [Re x, Im x], one feature: (A_XX, B_X, C_X)."""
    system = dt, Lambda_N, P_RN, B_N, C_N, D
    eye_NN = jnp.eye(B_N.size, dtype=B_N.dtype)
    parts = lambda x: jnp.concatenate([x.real, x.imag], axis=-1)
    A_XX = jax.vmap(lambda x_N: parts(step(x_N, 0.0, *system)[0]), out_axes=1)(jnp.concatenate([eye_NN, 1j * eye_NN]))
    return A_XX, parts(step(jnp.zeros_like(B_N), 1.0, *system)[0]), 2 * parts(C_N.conj())


def kernel(system, A_DXX, C_DX, L, block=256):
    """The first L values of each feature's kernel, [D, L], from its generating function at the roots of unity.

    Taken at the roots times exp(-1 / L), which is the kernel times exp(-j / L). K^ has no poles at Lambda, but both of
    its terms do, next to w = 1 for legt and fout, and what cancels between them is lost in float32: the more, the
    larger L dt is. So L is at most `block` here; further values are the first ones of C A_t^block, C A_t^(2 block), ...
    Measured over 8,192 tokens, dt up to 0.1, relative to a feature's largest output: legs 6e-6, legt 1.2e-5, fout
    2.2e-5, where the recurrence errs by 2e-6, 4e-6 and 1.1e-5. In one piece legt had 9e-5, and fout 4e-5.
    """
    L, wanted = min(block, 1 << (L - 1).bit_length()), L
    C_GDX = strides(jnp.swapaxes(A_DXX, 1, 2), C_DX, L, -(-wanted // L) + 1)
    C_GDX = C_GDX[:-1] - math.exp(-1) * C_GDX[1:]
    C_DGN = jnp.moveaxis(lax.complex(*jnp.split(C_GDX / 2, 2, axis=-1)).conj(), 0, 1)
    angle_F, r = 2 * math.pi / L * jnp.arange(L // 2 + 1, dtype=C_DX.dtype), math.exp(-1 / L)
    less_F = lax.complex(-math.expm1(-1 / L) + 2 * r * jnp.sin(angle_F / 2) ** 2, r * jnp.sin(angle_F))  # 1 - w

    @jax.checkpoint  # or the gradient would keep a matrix [F, N] of each feature
    def transform(feature):
        dt, Lambda_N, P_RN, B_N, C_GN = feature
        a_F, s_F = 2 / dt * less_F, 2 - less_F
        # v / (a - s Lambda) and its conjugate's share, over the common denominator.
        left_YN, right_ZN = jnp.concatenate([C_GN, P_RN.conj()]), jnp.concatenate([B_N[None], P_RN])
        v_YZN = left_YN[:, None] * right_ZN
        over_FN = 1 / ((a_F[:, None] - s_F[:, None] * Lambda_N) * (a_F[:, None] - s_F[:, None] * Lambda_N.conj()))
        dot = lambda x_FN, v_YZN: jnp.einsum("fn,yzn->fyz", x_FN, 2 * v_YZN.real, precision="highest")
        sums = lambda v_YZN: lax.complex(dot(over_FN.real, v_YZN), dot(over_FN.imag, v_YZN))
        q_FYZ = a_F[:, None, None] * sums(v_YZN) - s_F[:, None, None] * sums(v_YZN * Lambda_N.conj())
        q_FGZ, q_FRZ = q_FYZ[:, : len(C_GN)], q_FYZ[:, len(C_GN) :]
        low_FRR = inverse(jnp.eye(len(P_RN)) + s_F[:, None, None] * q_FRZ[..., 1:])
        low_FR = jnp.sum(low_FRR * q_FRZ[:, None, :, 0], axis=-1)
        low_FG = jnp.sum(q_FGZ[..., 1:] * low_FR[:, None], axis=-1)
        return 2 * (q_FGZ[..., 0] - s_F[:, None] * low_FG)

    dt_D, Lambda_DN, P_DRN, B_DN, _, _ = system
    K_DFG = lax.map(transform, (dt_D, Lambda_DN, P_DRN, B_DN, C_DGN), batch_size=8)
    K_DLG = jnp.fft.irfft(K_DFG, L, axis=1) * jnp.exp(jnp.arange(L, dtype=C_DX.dtype) / L)[:, None]
    return jnp.swapaxes(K_DLG, 1, 2).reshape(len(dt_D), -1)[:, :wanted]


def inverse(W):
    """Of [..., R, R] for the ranks there are, 1 and 2."""
    if W.shape[-1] == 1:
        return 1 / W
    a, b, c, d = W[..., 0, 0], W[..., 0, 1], W[..., 1, 0], W[..., 1, 1]
    adjugate = jnp.stack([jnp.stack([d, -b], -1), jnp.stack([-c, a], -1)], -2)
    return adjugate / (a * d - b * c)[..., None, None]


def log_uniform(low, high):
    """log dt, such that the features' memories of 1 / dt tokens are spread evenly over the orders of magnitude."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))


def same(value):
    """The same for every feature."""
    return lambda key, shape, dtype=float: jnp.broadcast_to(jnp.asarray(value, dtype), shape)


def same_pairs(value):
    """The same for every feature, real parts and imaginary ones."""
    return lambda key, shape, dtype=float: jnp.stack(
        [jnp.broadcast_to(jnp.asarray(part, dtype), shape[1:]) for part in (value.real, value.imag)]
    )
