"""Facts of the Mamba-2 paper, arXiv:2405.21060."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import mamba2


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_is_multiplication_by_a_semiseparable_matrix(impl):
    """M_ij = C_i' A_i ... A_{j+1} B_j dt_j per head, sec. 3.2; two groups of two heads share B and C."""
    rng = np.random.default_rng(0)
    T, H, P, N, G = 70, 4, 3, 5, 2
    C, B, x = rng.normal(size=(T, G, N)), rng.normal(size=(T, G, N)), rng.normal(size=(T, H, P))
    dt, A, D = rng.uniform(0.01, 0.5, (T, H)), -rng.uniform(1, 16, H), rng.normal(size=H)
    expected = np.zeros((T, H, P))
    for h in range(H):
        for i in range(T):
            for j in range(i + 1):
                decay = np.prod(np.exp(dt[j + 1 : i + 1, h] * A[h]))
                expected[i, h] += C[i, h // 2] @ B[j, h // 2] * decay * dt[j, h] * x[j, h]
        expected[:, h] += D[h] * x[:, h]
    C, B, x, dt, A, D = (jnp.asarray(z, jnp.float32) for z in (C, B, x, dt, A, D))
    ssd = jax.jit(mamba2.ssd, static_argnums=8)
    y_BTHP, _ = ssd(C[None], B[None], x[None], dt[None], A, D, jnp.zeros((1, H, N, P)), None, impl)
    np.testing.assert_allclose(y_BTHP[0], expected, atol=2e-5)


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def test_initial_steps_and_decays():
    mixer = memzoo.make("mamba2", width=2, head_dim=1, state_size=3)
    init = jax.jit(jax.vmap(lambda key: mixer.init(key, jnp.zeros((1, 1, 2)))))
    p = init(jax.random.split(jax.random.key(0), 300))["params"]  # of 4 heads each
    A, log_dt = np.exp(np.float64(p["A_log"]).ravel()), np.log(np.log1p(np.exp(np.float64(p["dt"]["bias"]).ravel())))
    assert distance_from_uniform((A - 1) / 15) < 0.06
    assert distance_from_uniform((log_dt - np.log(1e-3)) / np.log(100)) < 0.06


def test_default_head_dim_divides_small_widths():
    sizes = {width: memzoo.make("mamba2", width=width).sizes()[:2] for width in (256, 48, 5)}
    assert sizes == {256: (8, 64), 48: (3, 32), 5: (5, 2)}
    with pytest.raises(ValueError, match="head_dim = 7"):
        memzoo.make("mamba2", width=8, head_dim=7).sizes()
    with pytest.raises(ValueError, match="groups = 3"):
        memzoo.make("mamba2", width=8, head_dim=4, groups=3).sizes()
