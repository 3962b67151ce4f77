"""OmegaNet: its recurrence written out, Titans' rule as its case of one token and features that are the key itself.

Dims: T time, D width, H heads, K key, V value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers.omega_net import bias
from tests.miras import sigmoid
from tests.omega import written_out

T, D, H, K, V = 7, 6, 3, 3, 4


def make(name="omega_net", **fields):
    return memzoo.make(name, width=D, heads=H, key_dim=K, value_dim=V, **fields)


def parameters(mixer):
    """With every gate away from where it begins."""
    rng = np.random.default_rng(0)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
    return jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), p)


def tokens():
    return np.random.default_rng(1).normal(size=(1, T, D)).astype("float32")


def test_is_its_recurrence_written_out():
    mixer = make(window=3, chunk=4, step=0.3, hidden=5)
    p = parameters(mixer)
    y_1TD, _ = jax.jit(mixer.apply)({"params": p}, tokens())

    def gates(x):
        theta, eta, gamma, alpha = np.split(sigmoid(x), 4)
        return 0.3 * (1 - eta) * theta, eta, alpha, np.ones(H), gamma

    wide = jax.tree.map(np.float64, p)
    features = wide["features"] / np.linalg.norm(wide["features"])
    want_TD = written_out(wide, np.float64(tokens()[0]), (H, K, V), features, 3, 4, gates)
    np.testing.assert_allclose(y_1TD[0], want_TD, atol=1e-5)


@pytest.mark.long
def test_one_token_and_the_key_itself_are_titans_rule():
    """A degree of 1 has the key and a constant feature, whose share s_0 is 0 here."""
    titans = make("titans", persistent=0, chunk=4, step=0.3, hidden=5)
    p = parameters(titans)
    theta, eta, alpha = np.split(p["gates"]["kernel"], 3, axis=1)
    theta_bias, eta_bias, alpha_bias = np.split(p["gates"]["bias"], 3)
    gates = {
        "kernel": np.concatenate([theta, eta, 0 * theta, alpha], axis=1),
        "bias": np.concatenate([theta_bias, eta_bias, np.full(H, 50), alpha_bias]),  # gamma = 1
    }
    W0 = np.concatenate([np.zeros((H, 5, 1)), p["memory_0"]], axis=2)
    own = p | {"gates": gates, "features": np.array([0, 1]), "memory_0": W0}
    own = jax.tree.map(np.float32, own)
    mixer = make(window=1, degree=1, chunk=4, step=0.3, hidden=5)
    y_1TD, _ = jax.jit(mixer.apply)({"params": own}, tokens())
    want_1TD, _ = jax.jit(titans.apply)({"params": p}, tokens())
    np.testing.assert_allclose(y_1TD, want_1TD, atol=1e-5)


def test_begins_with_the_series_of_exp_and_forgets_a_hundredth():
    theta_H, eta_H, gamma_H, alpha_H = np.split(sigmoid(np.float64(bias(None, (4 * H,)))), 4)
    np.testing.assert_allclose([theta_H, eta_H, gamma_H, alpha_H], [[0.5] * H] * 3 + [[0.01] * H], rtol=1e-6)
    mixer = memzoo.make("omega_net", width=16, heads=2, degree=3)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 16)))["params"]
    np.testing.assert_allclose(p["features"] ** 2, [1, 1, 1 / 2, 1 / 6], rtol=1e-6)
    np.testing.assert_allclose(np.std(p["memory_0"]), 165**-0.5, rtol=0.05)  # 5,280 numbers


def test_bad_fields_are_named():
    for match, fields in {
        "width: expected a positive multiple of heads = 4": {"width": 6},
        "degree: expected an integer >= 1, got 0": {"width": 8, "degree": 0},
        "window: expected an integer >= 1, got 0": {"width": 8, "window": 0},
        "memory_layers: expected an integer >= 1, got 0": {"width": 8, "memory_layers": 0},
        "hidden: expected an integer >= 1, got 0": {"width": 8, "hidden": 0},
        "step: expected None or a finite number > 0, got inf": {"width": 8, "step": np.inf},
    }.items():
        with pytest.raises(ValueError, match=match):
            memzoo.make("omega_net", **fields).initial_state(1)
