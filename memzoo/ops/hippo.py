"""HiPPO: linear systems whose state holds the past of their input as coefficients of an orthogonal basis.

    d/dt c = A c + B f                  legt, fout: the last 1 of time; lagt: all of it, fading with age 1
    d/dt c = (A c + B f) / t            legs: all of it, evenly. Without the 1 / t it fades, and is S4's default.

    legs  A = -sqrt(2n+1) sqrt(2k+1) where n > k, -(n+1) where n = k      B = sqrt(2n+1)                basis p_n
    legt  A = -sqrt(2n+1) sqrt(2k+1), times (-1)^(n-k) where n < k        B = sqrt(2n+1)                basis p_n
    lagt  A = -1 where n >= k                                             B = 1                         basis L_n
    fout  A = turn_nk - 2 b_n b_k,  turn: 2 pi j between cos_j and sin_j  B = 2 b,  b = p(0)            basis of Fourier

with p_n(x) = sqrt(2n+1) P_n(2x - 1) on [0, 1], L_n Laguerre's polynomials, and Fourier's basis 1, 0, sqrt(2) cos_1,
sqrt(2) sin_1, ... where the 0 is sin_0, so that each cosine has its sine.

Source: Gu, Dao, Ermon, Rudra, Re, "HiPPO: Recurrent Memory with Optimal Polynomial Projections" (2020),
arXiv:2008.07669, sec. 2.3 (legt, lagt), sec. 3 (legs); Voelker, Kajic, Eliasmith, "Legendre Memory Units" (2019) (lmu);
Gu, Johnson, Timalsina, Rudra, Re, "How to Train Your HiPPO" (2022), arXiv:2206.12037 (fout, kernels of legs);
Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces" (2021), arXiv:2111.00396 (normal plus
low rank).
Differs: a window of 1 for legt and fout, as in the papers; the released S4 runs both at half that speed. The released
code's lagt has A + 1/2, which fades half as fast.

All but `bilinear` and what begins with `legs_` is NumPy in float64: constants, made while a mixer is traced.

Dims: N coefficients, R rank, X points, Q = N points of Gauss's quadrature; row and column of [N, N] are coefficients.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo.contract import nearest, positive

MEASURES = ("legs", "legt", "lagt", "fout")


class Normal(NamedTuple):
    """A = V (diag(Lambda) - P P*) V*, B = V B', with V unitary; Lambda by rising imaginary part.

    Conjugates mirror each other: Lambda[::-1] is conj(Lambda), and so for B, P and the columns of V. So a real system
    of even size is twice the real part of its upper half, [N / 2:].
    """

    Lambda_N: np.ndarray
    P_RN: np.ndarray
    B_N: np.ndarray
    V_NN: np.ndarray


def transition(measure: str, N: int) -> tuple[np.ndarray, np.ndarray]:
    """(A_NN, B_N) of one of MEASURES, or of 'lmu', which is legt with the coefficients of Voelker et al.

    Raises ValueError for another name, and for fout of an odd size, whose last cosine would lack its sine.
    """
    check(measure, N, (*MEASURES, "lmu"))
    n = np.arange(N)
    root = np.sqrt(2 * n + 1)
    if measure == "legs":
        return -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0), root
    if measure == "lagt":
        return -np.tril(np.ones((N, N))), np.ones(N)
    if measure == "fout":
        turn, b = 2 * np.pi * (n // 2) * (n % 2), fourier(N, np.zeros(1))[0]
        turn_NN = np.diag(turn[1:], -1) - np.diag(turn[1:], 1)  # one entry per pair: those between pairs are 0
        return turn_NN - 2 * np.outer(b, b), 2 * b
    sign = np.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1)
    A_NN, B_N = -sign * np.outer(root, root), root
    if measure == "lmu":
        scale = (-1.0) ** n * root
        return scale[:, None] * A_NN / scale, scale * B_N
    return A_NN, B_N


def normal(measure: str, N: int) -> Normal:
    """The normal plus low rank form of legs (rank 1), legt (2) and fout (1), computed without an eigensolver for fout.

    Raises ValueError for another measure.
    """
    check(measure, N, ("legs", "legt", "fout"))
    A_NN, B_N = transition(measure, N)
    n = np.arange(N)
    if measure == "legs":
        P_RN = np.sqrt(n + 0.5)[None]
    elif measure == "legt":
        P_RN = np.stack([np.where(n % 2 == r, np.sqrt(2 * n + 1), 0) for r in (0, 1)])
    else:
        P_RN = B_N[None] / np.sqrt(2)
    A_NN = A_NN + P_RN.T @ P_RN
    if measure == "fout":
        j = np.arange(N // 2)
        V = np.zeros((N, N // 2), complex)
        V[2 * j, j], V[2 * j + 1, j] = 0.5**0.5, -1j * 0.5**0.5
        upper = 2j * np.pi * j
    else:  # a multiple of the identity plus a skew-symmetric matrix
        real = A_NN[0, 0]
        imaginary, V = np.linalg.eigh(-1j * (A_NN - real * np.eye(N)))
        upper, V = real + 1j * imaginary[N // 2 :], V[:, N // 2 :]
        if N % 2:  # the one in the middle is real
            upper[0] = real
            V[:, 0] = np.real(V[:, 0] / V[np.argmax(np.abs(V[:, 0])), 0])
            V[:, 0] /= np.linalg.norm(V[:, 0])
    # Where V* B is not 0, a phase that makes it positive, so that the form does not depend on the eigensolver.
    b = V.conj().T @ B_N
    V = V * np.where(np.abs(b) > 1e-9, b / np.maximum(np.abs(b), 1e-9), 1)
    mirror = lambda x: np.concatenate([x[..., ::-1][..., : N // 2].conj(), x], -1)
    V, Lambda = mirror(V), mirror(upper)
    return Normal(Lambda, P_RN @ V.conj(), V.conj().T @ B_N, V)


def legs_normal(N: int) -> Normal:
    """HiPPO-N, the normal part of legs, whose eigenvalues all have the real part -1/2."""
    return normal("legs", N)


def basis(measure: str, N: int, ago_X: np.ndarray) -> np.ndarray:
    """The basis [X, N] at times `ago_X` before now, such that f(now - ago) = sum_n c_n basis_n(ago).

    In units of the measure's time: of the window for legt and fout, of the mean age for lagt, of the whole past for
    legs as a memory, which lies in [0, 1].
    """
    check(measure, N, MEASURES)
    ago_X = np.asarray(ago_X, np.float64)
    if measure == "lagt":
        return np.polynomial.laguerre.lagvander(ago_X, N - 1)
    if measure == "fout":
        return fourier(N, ago_X)
    return legendre(N, 1 - ago_X)


def kernel(measure: str, N: int, ago_X: np.ndarray) -> np.ndarray:
    """exp(A ago) B in closed form, [X, N]: what an impulse leaves in each coefficient. For legt and fout it is the
    limit of many coefficients, for all but those near the end."""
    check(measure, N, MEASURES)
    ago_X = np.asarray(ago_X, np.float64)
    if measure == "legs":
        return np.exp(-ago_X)[:, None] * legendre(N, np.exp(-ago_X))
    weight_X = np.exp(-ago_X) if measure == "lagt" else (ago_X >= 0) & (ago_X <= 1)
    return weight_X[:, None] * basis(measure, N, ago_X)


def legendre(N: int, x_X: np.ndarray) -> np.ndarray:
    """p_n(x), orthonormal on [0, 1]: [X, N]."""
    return np.polynomial.legendre.legvander(2 * x_X - 1, N - 1) * np.sqrt(2 * np.arange(N) + 1)


def fourier(N: int, x_X: np.ndarray) -> np.ndarray:
    """1, 0, sqrt(2) cos 2 pi x, sqrt(2) sin 2 pi x, ..., orthonormal on [0, 1]: [X, N]."""
    j = np.arange(N) // 2
    angle_XN = 2 * np.pi * j * x_X[:, None]
    return np.where(np.arange(N) % 2, np.sin(angle_XN), np.cos(angle_XN)) * np.where(j == 0, 1, np.sqrt(2))


def bilinear(A_NN, B_N, dt, alpha: float = 0.5):
    """One step dt of d/dt c = A c + B f by the generalised bilinear transform, in JAX: (A_NN, B_N).

    alpha: 0 is Euler's method, 1 the backward one, 1/2 the bilinear (trapezoid) rule.
    """
    eye_NN = jnp.eye(B_N.size, dtype=A_NN.dtype)
    right = jnp.concatenate([eye_NN + (1 - alpha) * dt * A_NN, dt * B_N[:, None]], axis=1)
    both = jnp.linalg.solve(eye_NN - alpha * dt * A_NN, right)
    return both[:, :-1], both[:, -1]


def zoh(A_NN: np.ndarray, B_N: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
    """One step dt of d/dt c = A c + B f, exact for an f that is constant during it: (A_NN, B_N)."""
    N = B_N.size
    both = np.zeros((N + 1, N + 1))
    both[:N, :N], both[:N, N] = dt * A_NN, dt * B_N
    both = expm(both)
    return both[:N, :N], both[:N, N]


def expm(A: np.ndarray) -> np.ndarray:
    """The matrix exponential in float64, by Taylor's series of A / 2^s and s squarings."""
    s = max(0, int(np.ceil(np.log2(max(np.linalg.norm(A, 1), 1e-300)))) + 2)
    A = A / 2.0**s
    term = out = np.eye(len(A))
    for i in range(1, 16):  # 2^-2i / i! is below rounding
        term = term @ A / i
        out = out + term
    for _ in range(s):
        out = out @ out
    return out


@jax.checkpoint  # or the gradient would keep a matrix of each step
def legs_stretch(c_N: jax.Array, short: jax.Array, long: jax.Array) -> jax.Array:
    """From legs' coefficients of a past that is `short` to those of one that is `long`, and 0 since: exp(A log(long /
    short)) c, where 0 <= short <= long and 0 < long.

    c_n is the integral of f p_n over the past. Stretched, it is s sum_q w_q p_n(s x_q) f(x_q) with s = short / long, by
    Gauss's quadrature, which is exact, with f interpolated at its nodes. What is computed is the difference from c,
    without which float32 would forget in ten thousand steps.
    """
    N = c_N.size
    x_Q, w_Q, between_QQ, weight_Q = _nodes(N)
    p_QN = jnp.asarray(legendre(N, x_Q), c_N.dtype)
    short, long = (lax.stop_gradient(jnp.asarray(k, c_N.dtype)) for k in (short, long))
    # l_j(s x_q) = (weight_j / (s x_q - x_j)) / (sum over j), j the row.
    far_QQ = jnp.asarray(between_QQ, c_N.dtype) - ((long - short) / long) * jnp.asarray(x_Q, c_N.dtype)
    at_Q = jnp.arange(N)
    share_QQ = jnp.asarray(weight_Q, c_N.dtype)[:, None] / jnp.where(far_QQ == 0, jnp.finfo(c_N.dtype).tiny, far_QQ)
    scale = jnp.max(jnp.abs(share_QQ), axis=0)
    share_QQ = share_QQ / scale
    share_QQ = share_QQ / jnp.sum(share_QQ, axis=0)
    off_QQ = share_QQ.at[at_Q, at_Q].set(0)
    change_QQ = off_QQ.at[at_Q, at_Q].set(-jnp.sum(off_QQ, axis=0))
    f_Q = jnp.asarray(w_Q, c_N.dtype) * (p_QN @ c_N)
    return (short / long) * (c_N + p_QN.T @ (change_QQ @ f_Q))


def legs_zoh(c_N: jax.Array, f: jax.Array, k: jax.Array) -> jax.Array:
    """legs' coefficients of k + 1 steps from those of k, exactly, f being constant during a step. At k = 0, f alone."""
    now_N = jnp.zeros_like(c_N).at[0].set(f)
    return now_N + legs_stretch(c_N - now_N, k, k + 1)


def legs_bilinear(c_N: jax.Array, f: jax.Array, k: jax.Array) -> jax.Array:
    """The same by the bilinear rule with dt = 1 / k, (I - A / 2k)^-1 ((I + A / 2k) c + B f / k), in O(N) operations.

    Row n of (I - d A) x = u is (1 + d (n+1)) x_n + d sqrt(2n+1) S_n = u_n, where S_n sums sqrt(2j+1) x_j over j < n:
    so S follows a linear recurrence in n.
    """
    n_N = jnp.arange(c_N.size, dtype=c_N.dtype)
    root_N = jnp.sqrt(2 * n_N + 1)
    d = 0.5 / jnp.maximum(jnp.asarray(k, c_N.dtype), 1)
    before = lambda x_N: jnp.cumsum(x_N) - x_N
    u_N = c_N + d * (2 * root_N * f - root_N * before(root_N * c_N) - (n_N + 1) * c_N)
    along = 1 + d * (n_N + 1)

    def combine(left, right):
        (a, x), (b, y) = left, right
        return b * a, b * x + y

    _, S_N = lax.associative_scan(combine, ((1 - d * n_N) / along, root_N * u_N / along))
    S_N = jnp.concatenate([jnp.zeros_like(S_N[:1]), S_N[:-1]])
    x_N = (u_N - d * root_N * S_N) / along
    return jnp.where(k == 0, jnp.zeros_like(c_N).at[0].set(f), x_N)


@functools.cache
def _nodes(N):
    """Gauss's nodes and weights on [0, 1], nodes less nodes [row, column] = x_column - x_row, barycentric weights."""
    x_Q, w_Q = np.polynomial.legendre.leggauss(N)
    sign_Q = (-1.0) ** np.arange(N)
    weight_Q = sign_Q * np.sqrt((1 - x_Q**2) * w_Q)
    x_Q, w_Q = (x_Q + 1) / 2, w_Q / 2
    return x_Q, w_Q, x_Q - x_Q[:, None], weight_Q


def check(measure: str, N: int, known: tuple[str, ...] = MEASURES) -> None:
    """Raises ValueError for a measure that is not among `known`, and for a size that it cannot have."""
    if measure not in known:
        expected = ", ".join(known)
        raise ValueError(f"measure: expected one of {expected}; got {measure!r}, {nearest(str(measure), known)}")
    positive(state_size=N)
    if measure == "fout" and N % 2:
        raise ValueError(f"state_size: expected an even number for 'fout', a sine for each cosine, got {N}")
