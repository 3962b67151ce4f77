"""Facts of "Emergent mechanisms for long timescales", arXiv:2309.12927: what a unit's time constant is.

Dims: B batch, T time, D width, F hidden.
"""

import functools

import jax
import numpy as np
import pytest

import memzoo
from memzoo.mixers import leaky_rnn
from tests.initial import begins_as_in_torch

B, T, D, F = 2, 30, 3, 4
x_BTD = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
h_BF = np.random.default_rng(1).normal(size=(B, F)).astype(np.float32)


@functools.cache
def compiled(**fields):
    mixer = memzoo.make("leaky_rnn", width=D, hidden=F, **fields)
    params = jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"])
    return params, jax.jit(lambda params, x_BTD, h_BF: mixer.apply({"params": params}, x_BTD, leaky_rnn.State(h_BF)))


def leaky_relu(x):
    return np.where(x > 0, x, 0.01 * x)


@pytest.mark.parametrize("around", ["all", "drive"])
@pytest.mark.parametrize("tau", [[1, 1, 1, 1], [1.5, 1, 20, 300], [-3, 1, 0, 0.9]])
def test_equals_its_equation(around, tau):
    """With tau = 1 that is an Elman network; below 1, where the equation would overshoot, it stays at 1."""
    params, run = compiled(around=around)
    params = params | {"tau": np.float32(tau)}
    y_BTD, state = run(params, x_BTD, h_BF)
    tau, h = np.maximum(tau, 1), np.float64(h_BF)
    for t in range(T):
        drive = x_BTD[:, t] @ params["in"]["kernel"] + params["in"]["bias"]
        drive += h @ (params["recurrent"] * (1 - np.eye(F)))
        h = leaky_relu(h + (drive - h) / tau) if around == "all" else h + (leaky_relu(drive) - h) / tau
        np.testing.assert_allclose(y_BTD[:, t], h @ params["out"]["kernel"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.h_BF, h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("around", ["all", "drive"])
@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_a_unit_alone_decays_with_its_time_constant(around, impl):
    """Without input and neighbours, h_t = (1 - 1/tau)^t h_0, whatever is on the recurrent kernel's diagonal."""
    params, run = compiled(around=around, impl=impl)
    tau = np.float32([1.5, 7, 40, 1000])
    params = params | {"tau": tau, "recurrent": 5 * np.eye(F, dtype=np.float32)}
    params["in"] = params["in"] | {"bias": np.zeros(F, np.float32)}
    _, state = run(params, np.zeros_like(x_BTD), np.abs(h_BF))
    np.testing.assert_allclose(state.h_BF, (1 - 1 / np.float64(tau)) ** T * np.abs(h_BF), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("fields", "low", "high"), [({}, 1, 2), ({"tau_min": 3.0, "tau_max": 50.0}, 3, 50)])
def test_initial_distribution(fields, low, high):
    """Time constants are uniform, from 1 to 2 unless told; weights as in PyTorch."""
    mixer = memzoo.make("leaky_rnn", width=20, hidden=1000, **fields)
    params = jax.jit(mixer.init)(jax.random.key(0), np.zeros((1, 1, 20), np.float32))["params"]
    u = (np.sort(np.float64(params["tau"])) - low) / (high - low)
    assert np.abs(u - (np.arange(u.size) + 0.5) / u.size).max() < 2 * u.size**-0.5
    assert begins_as_in_torch(params["in"]["kernel"], 20)
    assert begins_as_in_torch(params["in"]["bias"], 1000)
    assert begins_as_in_torch(params["recurrent"], 1000)
    assert begins_as_in_torch(params["out"]["kernel"], 1000)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"around": "al"}, r"around: expected 'all' or 'drive', got 'al'; did you mean all\?"),
        ({"tau_min": 0.5}, "tau_min, tau_max: expected 1 <= tau_min <= tau_max, got 0.5, 2.0"),
        ({"tau_min": 3.0}, "tau_min, tau_max: expected 1 <= tau_min <= tau_max, got 3.0, 2.0"),
        ({"tau_max": float("inf")}, "tau_max: expected a finite number, got inf"),
    ],
)
def test_bad_fields_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        memzoo.make("leaky_rnn", width=D, **fields).initial_state(B)
