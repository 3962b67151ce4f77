"""The spectrum lies in rings, and with it the time scales.

Dims: B batch, T time, D width, M rings, E units of a ring, N = M E.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.learners import ridge
from memzoo.mixers import onion_esn

M = 3


def initialised(D=2, **fields):
    mixer = memzoo.make("onion_esn", width=D, **{"rings": M, **fields})
    return mixer, jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D))))


def states(mixer, variables, x_BTD, h_BN):
    apply = jax.jit(lambda *a: mixer.apply(*a, mutable=["intermediates"])[1]["intermediates"]["features"][0])
    return np.float64(apply(variables, x_BTD, onion_esn.State(h_BN)))


@pytest.mark.parametrize("E", [300, 5])
@pytest.mark.cases(1)
def test_the_eigenvalues_of_each_reservoir_are_uniform_on_its_ring(E):
    """And the matrices are normal: their norm is their radius."""
    mixer, variables = initialised(units=M * E, spectral_radius=0.9)
    W_MEE = np.float64(variables["reservoir"]["W"])
    edges = 0.9 * np.sqrt(np.arange(M + 1) / M)
    for W_EE, inner, outer in zip(W_MEE, edges[:-1], edges[1:], strict=True):
        eigenvalues = np.linalg.eigvals(W_EE)
        modulus = np.abs(eigenvalues)
        assert inner - 1e-5 < modulus.min() and modulus.max() < outer + 1e-5
        np.testing.assert_allclose(W_EE @ W_EE.T, W_EE.T @ W_EE, atol=1e-5)
        assert (np.abs(eigenvalues.imag) < 1e-6).sum() == E % 2
        if E == 300:
            share = np.sort((modulus**2 - inner**2) / (outer**2 - inner**2))
            assert np.abs(share - (np.arange(E) + 0.5) / E).max() < 0.12  # 150 pairs, by Kolmogorov and Smirnov
            angle = np.sort(np.abs(np.angle(eigenvalues)) / np.pi)
            assert np.abs(angle - (np.arange(E) + 0.5) / E).max() < 0.12
    if E == 5:
        condition = mixer.echo_state(variables)
        largest = [np.abs(np.linalg.eigvals(W_EE)).max() for W_EE in W_MEE]
        np.testing.assert_allclose(condition.radius, largest, rtol=1e-4)
        np.testing.assert_allclose(condition.contraction, largest, rtol=1e-4)


def test_is_the_equation():
    """Reservoir by reservoir."""
    mixer, variables = initialised(units=12, leak=0.3, bias_scale=0.5)
    rng = np.random.default_rng(0)
    x_BTD, h_BN = rng.standard_normal((2, 9, 2)).astype(np.float32), np.float32(rng.standard_normal((2, 12)))
    r = variables["reservoir"]
    got_BTN = states(mixer, variables, x_BTD, h_BN)
    for i in range(M):
        own = slice(4 * i, 4 * i + 4)
        h = h_BN[:, own]
        for t in range(9):
            h = 0.7 * h + 0.3 * np.tanh(h @ r["W"][i].T + x_BTD[:, t] @ r["W_in"][:, own] + r["b"][own])
            np.testing.assert_allclose(got_BTN[:, t, own], h, atol=1e-5)


def test_each_reservoir_forgets_at_its_own_radius():
    """Without input near 0 exactly, and never slower."""
    mixer, variables = initialised(units=24)
    h_BN = np.float32(1e-3 * np.random.default_rng(1).standard_normal((1, 24)))
    size_TM = np.linalg.norm(
        states(mixer, variables, np.zeros((1, 91, 2), np.float32), h_BN).reshape(91, M, 8), axis=-1
    )
    radius_M = mixer.echo_state(variables).radius
    np.testing.assert_allclose((size_TM[90] / size_TM[20]) ** (1 / 70), radius_M, rtol=0.03)
    assert (size_TM[1:] <= size_TM[:-1] * np.asarray(radius_M) * (1 + 1e-4)).all()


@pytest.mark.long
def test_the_outer_rings_remember_longer_and_all_together_most():
    """r^2 of a linear readout of the input k tokens ago, of each reservoir's units alone and of all of them."""
    mixer, variables = initialised(D=1, units=30, input_scale=0.1)
    x_T = np.float32(np.random.default_rng(2).uniform(-0.8, 0.8, 1500))
    h_TN = states(mixer, variables, x_T[None, :, None], np.zeros((1, 30), np.float32))[0]
    delays = np.arange(1, 21)
    targets_TK = np.stack([np.roll(x_T, k) for k in delays], axis=1)[100:]

    def curve(own):
        features_TF = 100 * h_TN[100:, own]
        sums = ridge.update(ridge.init(features_TF.shape[1], len(delays), "float64"), features_TF, targets_TK)
        return np.asarray(ridge.explained(sums, ridge.solve(sums, 1e-2)[0]))

    with jax.enable_x64(True):
        parts, union = [curve(slice(10 * i, 10 * i + 10)) for i in range(M)], curve(slice(None))
    lasting = [np.average(delays, weights=part) for part in parts]
    assert lasting[0] + 0.3 < lasting[1] < lasting[2] - 0.3
    assert (union > np.max(parts, axis=0) - 1e-6).all() and union.sum() > 1.5 * max(part.sum() for part in parts)


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("units: expected a positive multiple of rings = 3, got 10", {"units": 10}),
        ("rings: expected an integer >= 1, got 0", {"rings": 0}),
        (r"leak: expected a number in \(0, 1\], got 0.0", {"units": 9, "leak": 0.0}),
        ("spectral_radius: expected a number >= 0, got -1", {"units": 9, "spectral_radius": -1.0}),
        ("input_scale: expected a finite number, got nan", {"units": 9, "input_scale": float("nan")}),
    ],
)
def test_bad_fields_are_named(match, fields):
    with pytest.raises(ValueError, match=match):
        memzoo.make("onion_esn", width=2, **{"rings": M, **fields}).initial_state(1)
