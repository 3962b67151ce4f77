"""Facts of the LRU paper, arXiv:2303.06349."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo


def eigenvalues(params):
    p = params["params"]
    return np.exp(-np.exp(np.float64(p["log_nu"])) + 1j * np.exp(np.float64(p["log_theta"])))


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def test_eigenvalues_are_uniform_on_the_ring():
    mixer = memzoo.make("lru", width=1, state_size=4000, r_min=0.5, r_max=0.9, max_phase=1.0)
    eigenvalue = eigenvalues(jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 1))))
    assert distance_from_uniform((np.abs(eigenvalue) ** 2 - 0.5**2) / (0.9**2 - 0.5**2)) < 0.03
    assert distance_from_uniform(np.angle(eigenvalue)) < 0.03


def test_white_noise_comes_out_of_the_recurrence_as_loud_as_it_went_in():
    """gamma = sqrt(1 - |lambda|^2): E |h|^2 = E |B x|^2."""
    mixer = memzoo.make("lru", width=1, state_size=6, r_max=0.9, impl="scan")
    x_BTD = jax.random.normal(jax.random.key(1), (1000, 60, 1))
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    _, state = jax.jit(mixer.apply)(params, x_BTD)
    B = np.asarray(params["params"]["B"])[:, 0]
    np.testing.assert_allclose(np.mean(np.abs(state.h_BN) ** 2, 0), B[:6] ** 2 + B[6:] ** 2, rtol=0.2)


def test_an_impulse_shows_the_kernel():
    """y_t = Re(C lambda^t gamma B) + [t = 0] D, in closed form."""
    mixer = memzoo.make("lru", width=2, state_size=3)
    x_BTD = jnp.zeros((2, 20, 2)).at[jnp.arange(2), 0, jnp.arange(2)].set(1)  # one row for each channel
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    p = {name: np.float64(x) for name, x in params["params"].items()}
    B, C = p["B"][:3] + 1j * p["B"][3:], p["C"][:, :3] + 1j * p["C"][:, 3:]
    powers = eigenvalues(params) ** np.arange(20)[:, None]
    kernel = np.einsum("dn,tn,n,nb->btd", C, powers, np.exp(p["log_gamma"]), B).real
    kernel[:, 0] += np.diag(p["D"])
    np.testing.assert_allclose(jax.jit(mixer.apply)(params, x_BTD)[0], kernel, atol=1e-5)


def test_a_ring_that_is_none_is_refused():
    with pytest.raises(ValueError, match="r_min"):
        memzoo.make("lru", width=2, r_min=0.9, r_max=0.5).init(jax.random.key(0), jnp.zeros((1, 1, 2)))


@pytest.mark.parametrize("field", ("r_min", "r_max", "max_phase"))
@pytest.mark.parametrize("bad", (float("inf"), float("nan"), "1"))
def test_what_is_no_finite_number_is_refused(field, bad):
    with pytest.raises(ValueError, match=f"{field}: expected a finite number, got {bad!r}"):
        memzoo.make("lru", width=2, **{field: bad})
