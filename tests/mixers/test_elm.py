"""Facts of the ELM paper, arXiv:2306.16922: leaks and their range, branches, and how few parameters a neuron needs.

Dims: B batch, T time, D width, M branches, S synapses, N memories.
"""

import functools

import jax
import numpy as np
import pytest

import memzoo
from memzoo.mixers import elm
from tests.initial import begins_as_in_torch

B, T, D, N = 2, 20, 6, 5
rng = np.random.default_rng(0)
x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
TAUS = np.array([1.0, 1000**0.25, 1000**0.5, 1000**0.75, 1000.0])  # evenly in log, the default range


@functools.cache
def compiled(**fields):
    """Parameters, and (parameters, state) -> outputs and state after x."""
    mixer = memzoo.make("elm", width=D, memories=N, **fields)
    params = jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"])
    run = jax.jit(lambda params, state: mixer.apply({"params": params}, x_BTD, state))
    return params, lambda params, state=None: run(params, state or fresh(params))


def fresh(params, m_N=0.0):
    traces = len(params["W_1"]) - N
    return elm.State(np.zeros((B, traces), np.float32), np.broadcast_to(np.float32(m_N), (B, N)))


def relu(x):
    return np.maximum(x, 0)


def silent(params):
    """With a network that has nothing to say."""
    return params | {name: np.zeros_like(params[name]) for name in ("W_2", "b_2")}


@pytest.mark.parametrize(
    ("fields", "inputs"),
    [
        ({"impl": "scan"}, [[0], [1], [2], [3], [4], [5]]),
        ({"impl": "newton"}, [[0], [1], [2], [3], [4], [5]]),
        ({"branches": 3}, [[0, 1], [2, 3], [4, 5]]),
        ({"branches": 3, "synapses": 4}, [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 0, 1]]),
        ({"branches": 4}, [[0, 1], [1, 2], [3, 4], [4, 5]]),
    ],
)
@pytest.mark.cases(1)
def test_equals_its_equation(fields, inputs):
    """A trace for each synapse, summed along its branch."""
    params, run = compiled(**fields)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    y_BTD, state = run(params)
    p, decay = jax.tree.map(np.float64, params), np.exp(-1 / TAUS)
    s, m = np.zeros((B, *np.shape(inputs))), np.zeros((B, N))
    for t in range(T):
        s = np.exp(-1 / 5) * s + relu(p["synapses"]) * x_BTD[:, t, inputs]
        seen = np.concatenate([s.sum(-1), decay * m], axis=-1)
        n = relu(seen @ p["W_1"] + p["b_1"]) @ p["W_2"] + p["b_2"]
        m = decay * m + 5 * (1 - decay) * 1.7159 * np.tanh(2 / 3 * n)
        np.testing.assert_allclose(y_BTD[:, t], m @ p["out"]["kernel"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(state.s_BM, s.sum(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.m_BN, m, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_memories_leak_at_their_own_rates(impl):
    """Where the network is silent, m_t = exp(-t / tau) m_0, tau from 1 to 1000 tokens evenly in log."""
    params, run = compiled(impl=impl)
    start = fresh(params, rng.normal(size=N))
    m_BN = run(silent(params), start)[1].m_BN
    np.testing.assert_allclose(m_BN, np.exp(-T / TAUS) * start.m_BN, rtol=1e-5, atol=1e-12)


def test_memories_are_bounded():
    """|m| <= 1.7159 lambda (1 - exp(-t / tau)) after t tokens from 0, and there where the network is saturated."""
    params, run = compiled(impl="scan")
    m_BN = run(silent(params) | {"b_2": np.float32([50, -50, 50, -50, 50])})[1].m_BN
    want_N = 5 * 1.7159 * (1 - np.exp(-T / TAUS)) * [1, -1, 1, -1, 1]
    np.testing.assert_allclose(m_BN, want_N[None].repeat(B, 0), rtol=1e-4)


@pytest.mark.parametrize(("value", "want"), [(-40.0, 2.0), (40.0, 30.0), (0.0, 16.0), (None, np.geomspace(2, 30, N))])
def test_learned_time_constants_stay_in_their_range(value, want):
    """They begin evenly in log tau, and whatever is learned they are between tau_min and tau_max."""
    params, run = compiled(learn_tau=True, tau_min=2.0, tau_max=30.0)
    given = {} if value is None else {"tau": np.full(N, value, np.float32)}
    m_BN = run(silent(params) | given, fresh(params, 1))[1].m_BN
    np.testing.assert_allclose(-T / np.log(m_BN), np.broadcast_to(want, (B, N)), rtol=1e-4)


@pytest.mark.parametrize(("memories", "count"), [(1, 4601), (20, 8002), (100, 54002)])
def test_a_neuron_has_as_few_parameters_as_in_the_released_models(memories, count):
    """For 1,278 inputs, 45 branches of 100 synapses, and two outputs with biases, which here are the layer's."""
    mixer = memzoo.make("elm", width=1278, memories=memories, branches=45, synapses=100)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1, 1278), np.float32))["params"]
    cell = sum(p.size for name, p in shapes.items() if name != "out")
    assert cell + 2 * memories + 2 == count


def test_initial_distribution():
    mixer = memzoo.make("elm", width=30, memories=20, hidden=50)
    params = jax.jit(mixer.init)(jax.random.key(0), np.zeros((1, 1, 30), np.float32))["params"]
    assert np.all(params["synapses"] == 0.5)
    for name, fan_in in (("W_1", 50), ("b_1", 50), ("W_2", 50), ("b_2", 50)):
        assert begins_as_in_torch(params[name], fan_in)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"synapses": 7}, "synapses: expected at most width = 6, got 7"),
        ({"tau_s": 0.0}, "tau_s: expected a number > 0, got 0.0"),
        ({"tau_min": 0.0}, "tau_min, tau_max: expected 0 < tau_min <= tau_max, got 0.0, 1000.0"),
        ({"tau_min": 9.0, "tau_max": 9.0, "learn_tau": True}, "expected 0 < tau_min < tau_max, got 9.0, 9.0"),
        ({"lambda_": 0.0}, "lambda_, w_init: expected numbers > 0, got 0.0, 0.5"),
        ({"branches": 0}, "branches: expected an integer >= 1, got 0"),
    ],
)
def test_bad_fields_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        memzoo.make("elm", width=D, **fields).initial_state(B)
