"""HiPPO's matrices against the bases that they come from, their normal plus low rank form, and steps of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from memzoo.ops import hippo

AGO = np.array([0.05, 0.2, 0.33, 0.5, 0.75, 0.95])


def impulse(measure, N, ago):
    """What an impulse leaves after a while: exp(A ago) B."""
    A, B = hippo.transition(measure, N)
    return np.stack([scipy.linalg.expm(A * t) @ B for t in ago])


def test_kernels_of_legs_and_lagt_have_closed_forms():
    """exp(-t) sqrt(2n+1) P_n(2 exp(-t) - 1), and exp(-t) L_n(t)."""
    n, t = np.arange(9), np.array([0.01, 0.3, 1.0, 4.0])[:, None]
    legs = np.exp(-t) * np.sqrt(2 * n + 1) * scipy.special.eval_legendre(n, 2 * np.exp(-t) - 1)
    lagt = np.exp(-t) * scipy.special.eval_laguerre(n, t)
    for measure, want in (("legs", legs), ("lagt", lagt)):
        np.testing.assert_allclose(impulse(measure, 9, t[:, 0]), want, atol=1e-12)
        np.testing.assert_allclose(hippo.kernel(measure, 9, t[:, 0]), want, atol=1e-12)


def test_kernels_of_legt_and_fout_are_a_window():
    """Its basis during the last 1 of time, and 0 before."""
    for measure, N, near in (("legt", 96, 0.15), ("fout", 256, 0.01)):
        got = impulse(measure, N, np.append(AGO, [1.1, 1.4]))[:, :4]
        want = np.vstack([hippo.basis(measure, N, AGO)[:, :4], np.zeros((2, 4))])
        np.testing.assert_allclose(got, want, atol=near)
        np.testing.assert_allclose(hippo.kernel(measure, N, np.append(AGO, [1.1, 1.4]))[:, :4], want, atol=1e-12)
    k = 2 * np.pi * AGO
    fourier = np.stack([np.ones(6), np.zeros(6), 2**0.5 * np.cos(k), 2**0.5 * np.sin(k)], 1)
    np.testing.assert_allclose(hippo.basis("fout", 4, AGO), fourier, atol=1e-12)


def test_legt_with_the_coefficients_of_lmu_is_lmu():
    """Voelker et al., eq. 2: a_ij = (2i+1) (-1 if i < j, else (-1)^(i-j+1)), b_i = (2i+1) (-1)^i."""
    A = [[(2 * i + 1) * (-1 if i < j else (-1) ** (i - j + 1)) for j in range(7)] for i in range(7)]
    got_A, got_B = hippo.transition("lmu", 7)
    np.testing.assert_allclose(got_A, A, rtol=1e-12)
    np.testing.assert_allclose(got_B, [(2 * i + 1) * (-1) ** i for i in range(7)], rtol=1e-12)


@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
@pytest.mark.parametrize("N", [2, 7, 64])
def test_normal_plus_low_rank(measure, N):
    if measure == "fout" and N % 2:
        pytest.skip("fout has pairs")
    A, B = hippo.transition(measure, N)
    L, P, b, V = hippo.normal(measure, N)
    np.testing.assert_allclose(V.conj().T @ V, np.eye(N), atol=1e-12)
    np.testing.assert_allclose(V @ (np.diag(L) - P.T @ P.conj()) @ V.conj().T, A, atol=1e-12 * np.abs(A).max())
    np.testing.assert_allclose(V @ b, B, atol=1e-12 * N)
    np.testing.assert_allclose(L.real, -0.5 if measure == "legs" else 0, atol=1e-12)
    for x in (L, P, b, V):
        np.testing.assert_allclose(x[..., ::-1], x.conj(), atol=1e-12)
    assert np.all(np.diff(L.imag) >= 0)


def test_zoh_and_bilinear_are_a_step_of_the_ode():
    A, B = hippo.transition("legt", 6)
    both = scipy.linalg.expm(0.3 * np.block([[A, B[:, None]], [np.zeros((1, 7))]]))
    got_A, got_B = hippo.zoh(A, B, 0.3)
    np.testing.assert_allclose(got_A, both[:6, :6], atol=1e-13)
    np.testing.assert_allclose(got_B, both[:6, 6], atol=1e-13)
    A, B = hippo.transition("legs", 64)  # a matrix that is far from normal
    np.testing.assert_allclose(hippo.expm(0.1 * A), scipy.linalg.expm(0.1 * A), atol=1e-11)
    with jax.enable_x64(True):
        for alpha in (0.0, 0.5, 1.0):  # their error is of the order dt^2, or dt^3 for the bilinear rule
            order = 3 if alpha == 0.5 else 2
            wrong = []
            for dt in (0.01, 0.005):
                step, _ = hippo.bilinear(jnp.asarray(A[:4, :4]), jnp.asarray(B[:4]), dt, alpha)
                wrong.append(np.abs(step - scipy.linalg.expm(A[:4, :4] * dt)).max())
            np.testing.assert_allclose(np.log2(wrong[0] / wrong[1]), order, atol=0.1)


@pytest.mark.parametrize("N", [1, 5, 64])
@pytest.mark.parametrize("k", [0, 1, 2, 30, 5000])
@pytest.mark.cases(3)
def test_a_step_of_legs(N, k):
    """zoh is the exponential in logarithmic time; the bilinear one in O(N) is the dense solve."""
    A, B = hippo.transition("legs", N)
    c = np.random.default_rng(0).standard_normal(N)
    f, first = 0.7, np.eye(N)[0]
    with jax.enable_x64(True):
        got = [np.asarray(step(jnp.asarray(c), f, k)) for step in (hippo.legs_zoh, hippo.legs_bilinear)]
    if k == 0:
        want = [f * first] * 2
    else:
        E = scipy.linalg.expm(A * np.log1p(1 / k))
        zoh = E @ c + np.linalg.solve(A, (E - np.eye(N)) @ B * f)
        want = [zoh, np.linalg.solve(np.eye(N) - A / (2 * k), (np.eye(N) + A / (2 * k)) @ c + B * f / k)]
    np.testing.assert_allclose(got, want, atol=2e-12)
    single = hippo.legs_zoh(jnp.asarray(c, jnp.float32), f, k)
    np.testing.assert_allclose(single, want[0], atol=3e-6)


def test_stretching_twice_is_stretching_once():
    c = jnp.asarray(np.random.default_rng(1).standard_normal(9), jnp.float32)
    twice = hippo.legs_stretch(hippo.legs_stretch(c, 3, 10), 10, 47)
    np.testing.assert_allclose(twice, hippo.legs_stretch(c, 3, 47), atol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(
        ValueError, match="state_size: expected an even number for 'fout', a sine for each cosine, got 7"
    ):
        hippo.transition("fout", 7)
    with pytest.raises(ValueError, match=r"measure: .*did you mean legs"):
        hippo.transition("leggs", 4)
    with pytest.raises(ValueError, match="measure: expected one of legs, legt, fout"):
        hippo.normal("lagt", 4)
