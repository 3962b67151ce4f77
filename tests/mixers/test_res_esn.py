"""Facts of the residual echo state network, arXiv:2508.21172.

Dims: B batch, T time, D width, N units.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import res_esn

D, N = 3, 20
RESIDUALS = ("random", "cyclic", "identity")


def initialised(**fields):
    mixer = memzoo.make("res_esn", width=D, **{"units": N, **fields})
    return mixer, jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D))))


def states(mixer, variables, x_BTD, h_BN):
    apply = jax.jit(lambda *a: mixer.apply(*a, mutable=["intermediates"])[1]["intermediates"]["features"][0])
    return np.float64(apply(variables, x_BTD, res_esn.State(h_BN)))


def matrix(residual, variables):
    if residual == "random":
        return np.float64(variables["reservoir"]["O"])
    return np.eye(N) if residual == "identity" else np.eye(N, k=-1) + np.eye(N, k=N - 1)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.cases(1)
def test_is_the_equation_and_states_its_condition(residual):
    mixer, variables = initialised(residual=residual, alpha=0.8, beta=0.3, bias_scale=0.5)
    rng = np.random.default_rng(0)
    x_BTD = rng.standard_normal((2, 9, D)).astype(np.float32)
    r, O = variables["reservoir"], matrix(residual, variables)
    np.testing.assert_allclose(O.T @ O, np.eye(N), atol=1e-6)
    h_BN = rng.standard_normal((2, N)).astype(np.float32)
    got_BTN = states(mixer, variables, x_BTD, h_BN)
    for t in range(9):
        h_BN = 0.8 * h_BN @ O.T + 0.3 * np.tanh(h_BN @ r["W"].T + x_BTD[:, t] @ r["W_in"] + r["b"])
        np.testing.assert_allclose(got_BTN[:, t], h_BN, atol=1e-5)

    condition = mixer.echo_state(variables)
    np.testing.assert_allclose(np.abs(np.linalg.eigvals(np.float64(r["W"]))).max(), 0.9, rtol=1e-4)
    linear = 0.8 * O + 0.3 * r["W"]
    np.testing.assert_allclose(condition.radius, np.abs(np.linalg.eigvals(linear)).max(), rtol=1e-4)
    np.testing.assert_allclose(condition.contraction, 0.8 + 0.3 * np.linalg.svd(r["W"])[1][0], rtol=1e-4)


def test_with_the_identity_it_is_a_leaky_echo_state_network():
    mixer, variables = initialised(residual="identity", alpha=0.7, beta=0.3)
    x_BTD = np.random.default_rng(0).standard_normal((2, 9, D)).astype(np.float32)
    leaky = memzoo.make("esn", width=D, units=N, leak=0.3)
    np.testing.assert_allclose(
        jax.jit(mixer.apply)(variables, x_BTD)[0], jax.jit(leaky.apply)(variables, x_BTD)[0], atol=1e-5
    )


def test_the_cyclic_one_hands_on_what_it_has_seen():
    """Where W and beta leave it alone, an impulse goes around the ring and comes back after N tokens."""
    mixer, variables = initialised(residual="cyclic", alpha=1.0, beta=1e-3, spectral_radius=0.0)
    x_BTD = np.zeros((1, N + 1, D), np.float32)
    x_BTD[0, 0] = 1
    h_TN = states(mixer, variables, x_BTD, np.zeros((1, N), np.float32))[0]
    for t in range(N + 1):
        np.testing.assert_allclose(h_TN[t], np.roll(h_TN[0], t), rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("residual", RESIDUALS)
def test_two_starts_come_together_as_the_condition_says(residual):
    """Sufficient: at least so fast under any input. Necessary: exactly so fast without input near 0, or not at all."""
    mixer, variables = initialised(residual=residual, alpha=0.8, beta=0.1)
    bound = float(mixer.echo_state(variables).contraction)
    assert bound < 1
    rng = np.random.default_rng(1)
    x_BTD = rng.standard_normal((1, 300, D)).repeat(2, 0).astype(np.float32)
    h_BTN = states(mixer, variables, x_BTD, rng.standard_normal((2, N)).astype(np.float32))
    apart_T = np.linalg.norm(h_BTN[0] - h_BTN[1], axis=-1)
    assert (apart_T[1:] <= bound * apart_T[:-1] + 1e-6).all() and apart_T[-1] < 1e-5

    start = 1e-10 * rng.standard_normal((1, N)).astype(np.float32)
    for alpha, beta, forgets in ((0.8, 0.1, True), (0.99, 0.2, False)):
        mixer, variables = initialised(residual=residual, alpha=alpha, beta=beta)
        radius = float(mixer.echo_state(variables).radius)
        size_T = np.linalg.norm(states(mixer, variables, np.zeros((1, 300, D), np.float32), start)[0], axis=-1)
        assert forgets == (radius < 1)
        np.testing.assert_allclose((size_T[130] / size_T[50]) ** (1 / 80), radius, rtol=2e-2)


@pytest.mark.parametrize("residual", ["random", "cyclic"])
def test_the_defaults_have_the_necessary_condition(residual):
    """The spectrum of alpha O + beta W, drawn apart and large, is within sqrt(alpha^2 + (beta rho)^2) = 0.918."""
    mixer = memzoo.make("res_esn", width=D, residual=residual)
    init = jax.jit(lambda key: mixer.echo_state(mixer.init(key, jnp.zeros((1, 1, D)))).radius)
    radius = np.array([init(jax.random.key(seed)) for seed in range(5)])
    assert (radius < 0.97).all() and np.abs(np.median(radius) - 0.918) < 0.02


def test_with_the_identity_alpha_must_be_smaller():
    """Its eigenvalues add: the radius is alpha + beta times the largest real part in W's, which is up to 0.9."""
    for alpha, holds in ((0.9, False), (0.8, True)):
        mixer = memzoo.make("res_esn", width=D, residual="identity", alpha=alpha)
        init = jax.jit(lambda key, mixer=mixer: mixer.echo_state(mixer.init(key, jnp.zeros((1, 1, D)))))
        for seed in range(3):
            radius, contraction = init(jax.random.key(seed))
            assert (radius < 1) == holds and contraction > 1
            assert alpha + 0.1 < radius < alpha + 0.1801


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("units: expected an integer >= 1, got 0", {"units": 0}),
        ("residual: expected one of random, cyclic, identity, got 'cycle'; did you mean cyclic", {"residual": "cycle"}),
        (r"alpha: expected a number in \[0, 1\], got 1.1", {"alpha": 1.1}),
        ("beta: expected a number > 0, got 0.0", {"beta": 0.0}),
        ("beta: expected a finite number, got inf", {"beta": float("inf")}),
        ("spectral_radius: expected a number >= 0, got -1", {"spectral_radius": -1.0}),
        ("jacobian: .*did you mean full", {"jacobian": "fulll"}),
    ],
)
def test_bad_fields_are_named(match, fields):
    with pytest.raises(ValueError, match=match):
        memzoo.make("res_esn", width=D, **fields).initial_state(1)
