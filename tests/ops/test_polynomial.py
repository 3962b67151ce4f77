"""Features whose products are a polynomial in the product of keys; matrices made nearly orthogonal.

Dims: K key, N = degree + 1, O outputs, I inputs.
"""

import numpy as np
import pytest

from memzoo.ops.newton_schulz import newton_schulz
from memzoo.ops.polynomial import polynomial, size, taylor


def test_products_of_features_are_the_polynomial():
    rng = np.random.default_rng(0)
    q_K, k_K, s_N = rng.normal(size=5) / 2, rng.normal(size=5) / 2, rng.normal(size=5)
    for degree in (1, 2, 4):
        phi = lambda x_K, degree=degree: np.asarray(polynomial(np.float32(x_K), s_N[: degree + 1]))
        want = sum(s_N[i] ** 2 * (q_K @ k_K) ** i for i in range(degree + 1))
        np.testing.assert_allclose(phi(q_K) @ phi(k_K), want, rtol=1e-5)
        assert phi(q_K).shape == (size(5, degree),)


def test_taylors_features_near_exp():
    rng = np.random.default_rng(1)
    q_K, k_K = (x_K / np.linalg.norm(x_K) for x_K in rng.normal(size=(2, 4)))
    errors = []
    for degree in (1, 2, 3, 4):
        phi = lambda x_K, degree=degree: np.asarray(polynomial(np.float32(x_K), taylor(degree)))
        errors.append(abs(phi(q_K) @ phi(k_K) - np.exp(q_K @ k_K)))
    x = abs(q_K @ k_K)
    assert all(e <= 1.01 * np.exp(x) * x ** (d + 1) / np.prod(range(1, d + 2)) for d, e in enumerate(errors, 1))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_singular_values_come_into_the_published_band(shape):
    """After 5 steps, between 0.68 and 1.21 all that began between |X| / 100 and |X|; singular vectors remain."""
    rng = np.random.default_rng(2)
    U, _, Vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = np.geomspace(0.02, 1, 12)
    got = np.asarray(newton_schulz(np.float32(100 * U * values @ Vt)))
    found = np.diag(U.T @ got @ Vt.T)
    np.testing.assert_allclose(got, U * found @ Vt, atol=1e-4)
    assert found.min() > 0.68 and found.max() < 1.21


def test_what_is_nearly_zero_remains_so():
    """So that a memory with nothing to learn is left alone."""
    X_OI = np.random.default_rng(3).normal(size=(4, 6))
    norm = lambda scale: np.linalg.norm(newton_schulz(np.float32(scale * X_OI)))
    assert norm(0) == 0 and norm(1e-9) < 0.01 and norm(1) > 1.5
