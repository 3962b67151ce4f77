"""The reservoir is drawn as it says and stays, and forgets its start as its spectral condition predicts.

Dims: B batch, T time, D width, N units.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.learners import ridge
from memzoo.mixers import esn
from memzoo.models.backbone import LanguageModel

D = 3


def initialised(**fields):
    mixer = memzoo.make("esn", width=D, **fields)
    return mixer, jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D))))


def states(mixer, variables, x_BTD, h_BN):
    apply = jax.jit(lambda *a: mixer.apply(*a, mutable=["intermediates"])[1]["intermediates"]["features"][0])
    return np.asarray(apply(variables, x_BTD, esn.State(h_BN)))


def test_is_the_equation():
    mixer, variables = initialised(units=5, leak=0.3, bias_scale=0.5)
    x_BTD = np.random.default_rng(0).standard_normal((2, 9, D)).astype(np.float32)
    r, out = variables["reservoir"], variables["params"]["out"]
    h_BN, want = np.full((2, 5), 0.2), []
    y_BTD, state = jax.jit(mixer.apply)(variables, x_BTD, esn.State(np.float32(h_BN)))
    for t in range(9):
        h_BN = 0.7 * h_BN + 0.3 * np.tanh(h_BN @ r["W"].T + x_BTD[:, t] @ r["W_in"] + r["b"])
        want.append(h_BN @ out["kernel"] + out["bias"])
    np.testing.assert_allclose(y_BTD, np.stack(want, 1), atol=1e-5)
    np.testing.assert_allclose(state.h_BN, h_BN, atol=1e-6)


def test_the_reservoir_is_drawn_as_it_says():
    mixer, variables = initialised(units=200, spectral_radius=1.25, input_scale=0.5, bias_scale=0.2, leak=0.6)
    r = jax.tree.map(np.float64, variables["reservoir"])
    modulus = np.abs(np.linalg.eigvals(r["W"]))
    np.testing.assert_allclose(modulus.max(), 1.25, rtol=1e-4)
    assert 0.45 < np.mean(modulus < 1.25 * 0.5**0.5) < 0.55, "uniform on the disk"
    for weight, bound in ((r["W_in"], 0.5 / D**0.5), (r["b"], 0.2), (r["W"], np.abs(r["W"]).max())):
        u = np.sort(weight.ravel() / bound + 1) / 2
        assert u[0] >= 0 and u[-1] <= 1 and np.abs(u - (np.arange(u.size) + 0.5) / u.size).max() < 2 * u.size**-0.5
    assert (initialised()[1]["reservoir"]["b"] == 0).all()

    condition = mixer.echo_state(variables)
    linear = 0.4 * np.eye(200) + 0.6 * r["W"]
    np.testing.assert_allclose(condition.radius, np.abs(np.linalg.eigvals(linear)).max(), rtol=1e-4)
    np.testing.assert_allclose(condition.contraction, 0.4 + 0.6 * np.linalg.svd(r["W"])[1][0], rtol=1e-4)


def test_a_contraction_forgets_at_least_as_fast_as_it_says_under_any_input():
    mixer, variables = initialised(units=20, spectral_radius=0.45, leak=0.5, bias_scale=0.3)
    bound = float(mixer.echo_state(variables).contraction)
    assert bound < 0.98
    x_BTD = np.random.default_rng(1).standard_normal((1, 200, D)).repeat(2, 0).astype(np.float32)
    h_BTN = states(mixer, variables, x_BTD, np.random.default_rng(2).uniform(-1, 1, (2, 20)).astype(np.float32))
    apart_T = np.linalg.norm(h_BTN[0] - h_BTN[1], axis=-1)
    assert (apart_T[1:] <= bound * apart_T[:-1] + 1e-6).all() and apart_T[-1] < 1e-6


@pytest.mark.parametrize(
    ("spectral_radius", "leak", "forgets"),
    [(0.9, 1.0, True), (1.03, 1.0, False), (1.15, 0.4, True), (2.0, 0.4, False)],
)
@pytest.mark.cases(2)
def test_the_start_fades_at_the_radius_if_that_is_below_one(spectral_radius, leak, forgets):
    """Without input, near h = 0. With a leak the radius is not W's: one of 1.15 still forgets."""
    mixer, variables = initialised(units=20, spectral_radius=spectral_radius, leak=leak)
    radius = float(mixer.echo_state(variables).radius)
    h_BN = 1e-12 * np.random.default_rng(2).standard_normal((1, 20)).astype(np.float32)
    h_TN = np.float64(states(mixer, variables, np.zeros((1, 3000, D), np.float32), h_BN)[0])
    size_T = np.linalg.norm(h_TN, axis=-1)
    assert forgets == (radius < 1)
    end = 50 + int(min(200, 10 / abs(np.log(radius))))  # while it is small and is not 0
    np.testing.assert_allclose((size_T[end] / size_T[50]) ** (1 / (end - 50)), radius, rtol=2e-2)
    assert size_T[-1] < 1e-30 if forgets else size_T[-1] > 0.1


@pytest.mark.long
def test_a_ridge_readout_recalls_what_came_before():
    """What the mixer then returns is the delayed input."""
    mixer, variables = initialised(units=40, input_scale=0.2)
    x_BTD = np.random.default_rng(3).uniform(-1, 1, (2, 900, D)).astype(np.float32)
    target_BTD = np.roll(x_BTD, 2, axis=1)
    h_BTN = states(mixer, variables, x_BTD, np.zeros((2, 40), np.float32))
    sums = ridge.update(ridge.init(40, D), h_BTN[:1, 50:], target_BTD[:1, 50:])
    kernel, bias = ridge.solve(sums, 1e-5)
    variables["params"]["out"] = {"kernel": kernel, "bias": bias}
    y_BTD, _ = jax.jit(mixer.apply)(variables, x_BTD)
    for d in range(D):
        assert np.corrcoef(y_BTD[1, 50:, d], target_BTD[1, 50:, d])[0, 1] ** 2 > 0.99


@pytest.mark.long
def test_training_leaves_the_reservoir_as_it_was():
    """To the bit, weight decay included; and each of two scanned layers has its own."""
    optax = pytest.importorskip("optax")
    from memzoo import train

    model = LanguageModel(7, 8, 2, ("esn",), {"esn": {"units": 5}}, scan_layers=True)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6) % 7
    start = jax.jit(model.init)(jax.random.key(0), tokens)
    W_RNN = start["reservoir"]["stack"]["layer_0"]["mixer"]["W"]
    assert W_RNN.shape == (2, 5, 5) and not np.allclose(W_RNN[0], W_RNN[1])
    optimizer = train.adamw(0.1, 4, weight_decay=0.5)
    loss = lambda params, batch, key: jnp.mean(train.cross_entropy(model.apply(params, batch)[0], batch))
    state = train.create(start, optimizer, jax.random.key(1))
    step = jax.jit(train.make_step(loss, optimizer))
    for _ in range(3):
        state, _ = step(state, tokens)
    jax.tree.map(np.testing.assert_array_equal, state.params["reservoir"], start["reservoir"])
    moved = optax.tree.norm(jax.tree.map(np.subtract, state.params["params"], start["params"]))
    assert moved > 0.1


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("units: expected an integer >= 1, got 0", {"units": 0}),
        (r"leak: expected a number in \(0, 1\], got 0.0", {"leak": 0.0}),
        (r"leak: .* got 1.5", {"leak": 1.5}),
        ("spectral_radius: expected a number >= 0, got -1", {"spectral_radius": -1.0}),
        ("input_scale: expected a finite number, got nan", {"input_scale": float("nan")}),
        ("bias_scale: .* got -0.1", {"bias_scale": -0.1}),
        ("jacobian: .*did you mean full", {"jacobian": "fulll"}),
    ],
)
def test_bad_fields_are_named(match, fields):
    with pytest.raises(ValueError, match=match):
        memzoo.make("esn", width=D, **fields).initial_state(1)
