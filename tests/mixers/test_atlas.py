"""ATLAS: its recurrence written out, OmegaNet as what it is without Muon, and how it begins.

Dims: T time, D width, H heads, K key, V value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers.atlas import bias
from tests.miras import sigmoid
from tests.omega import written_out

T, D, H, K, V = 7, 6, 3, 3, 4


def make(name="atlas", **fields):
    return memzoo.make(name, width=D, heads=H, key_dim=K, value_dim=V, window=3, chunk=4, hidden=5, **fields)


def parameters(mixer):
    """With every gate away from where it begins."""
    rng = np.random.default_rng(0)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
    return jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), p)


def tokens():
    return np.random.default_rng(1).normal(size=(1, T, D)).astype("float32")


def newton_schulz(S):
    """By its singular values."""
    U, s, Vt = np.linalg.svd(S, full_matrices=False)
    s = s / np.sqrt(np.sum(s**2) + 1e-6)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U * s @ Vt


def test_is_its_recurrence_written_out():
    mixer = make(step=0.3)
    p = parameters(mixer)
    y_1TD, _ = jax.jit(mixer.apply)({"params": p}, tokens())

    def gates(x):
        theta, eta, rate, gamma, alpha = np.split(sigmoid(x), 5)
        return theta, eta, alpha, 0.3 * rate, gamma

    wide = jax.tree.map(np.float64, p)
    features = wide["features"] / np.linalg.norm(wide["features"])
    args = wide, np.float64(tokens()[0]), (H, K, V), features, 3, 4, gates, newton_schulz
    np.testing.assert_allclose(y_1TD[0], written_out(*args), atol=1e-4)


@pytest.mark.long
def test_without_muon_it_is_omega_net():
    """Where momentum and rate do not depend on the token: theta is scaled by 1 - eta in one, by the rate in both."""
    omega, atlas = make("omega_net", step=0.3), make(step=0.3, muon_steps=0)
    p = parameters(omega)
    theta, _, gamma, alpha = np.split(p["gates"]["kernel"], 4, axis=1)
    theta_bias, _, gamma_bias, alpha_bias = np.split(p["gates"]["bias"], 4)
    none = np.zeros_like(theta)
    as_omega = {
        "kernel": np.concatenate([theta, none, gamma, alpha], axis=1),
        "bias": np.concatenate([theta_bias, none[0], gamma_bias, alpha_bias]),  # eta = 1 / 2
    }
    as_atlas = {
        "kernel": np.concatenate([theta, none, none, gamma, alpha], axis=1),
        "bias": np.concatenate([theta_bias, none[0], none[0], gamma_bias, alpha_bias]),  # the rate is 0.3 / 2
    }
    want_1TD, _ = jax.jit(omega.apply)({"params": p | {"gates": as_omega}}, tokens())
    y_1TD, _ = jax.jit(atlas.apply)({"params": p | {"gates": as_atlas}}, tokens())
    np.testing.assert_allclose(y_1TD, want_1TD, atol=1e-6)


def test_begins_in_the_middle_of_its_gates_and_forgets_a_hundredth():
    want = np.array([[0.5], [0.5], [0.5], [0.5], [0.01]]) * np.ones(H)
    np.testing.assert_allclose(np.split(sigmoid(np.float64(bias(None, (5 * H,)))), 5), want, rtol=1e-6)


def test_bad_fields_are_named():
    for match, fields in {
        "width: expected a positive multiple of heads = 4": {"width": 6},
        "muon_steps: expected an integer >= 0, got -1": {"width": 8, "muon_steps": -1},
        "degree: expected an integer >= 1, got 1.5": {"width": 8, "degree": 1.5},
        "step: expected None or a finite number > 0, got 0": {"width": 8, "step": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            memzoo.make("atlas", **fields).initial_state(1)
