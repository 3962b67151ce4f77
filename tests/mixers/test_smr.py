"""Facts of State Memory Replay, arXiv:2405.17534, and of the SSM behind it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo

D, N, W = 3, 4, 4


def initial(width=D, state_size=N, **fields):
    mixer = memzoo.make("smr", width=width, state_size=state_size, conv_width=W, **fields)
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, width)))
    return mixer, params, {name: np.float64(p) for name, p in params["params"].items() if name != "out"}


def ssm(p, v):
    """S4D by its kernel, K_l = 2 Re(sum_n C (exp(dt A) - 1) / A exp(dt A l)), in a plain sum over the past: [T, D]."""
    A = -np.exp(p["log_rate"]) + 1j * p["omega"]
    C = p["C"][:, : A.shape[1]] + 1j * p["C"][:, A.shape[1] :]
    dtA = np.exp(p["log_dt"])[:, None] * A
    y = p["D"] * v
    for t in range(len(v)):
        for s in range(t + 1):
            y[t] += 2 * np.sum(C * (np.exp(dtA) - 1) / A * np.exp(dtA * (t - s)), -1).real * v[s]
    return y


def head(params, y):
    out = params["params"]["out"]
    gelu = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    z = gelu @ np.float64(out["kernel"]) + np.float64(out["bias"])
    return z[:, :D] / (1 + np.exp(-z[:, D:]))


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
@pytest.mark.cases(1)
def test_without_memories_it_is_the_ssm(impl):
    """Which is how it starts: exactly, as the factor is 1."""
    mixer, params, p = initial(impl=impl)
    assert not p["memories"].any() and not p["memories_bias"].any()
    x = np.random.default_rng(0).standard_normal((40, D))
    y, _ = jax.jit(mixer.apply)(params, jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(y[0], head(params, ssm(p, x)), atol=2e-5)


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
@pytest.mark.cases(1)
def test_memories_rescale_the_input(impl):
    mixer, params, p = initial(impl=impl)
    rng = np.random.default_rng(1)
    x, m, b = rng.standard_normal((40, D)), rng.standard_normal((W, D)), rng.standard_normal(D)
    v = np.zeros_like(x)
    for t in range(len(x)):
        replay = b + sum(m[W - 1 - w] * x[t - w] for w in range(W) if t >= w)
        v[t] = 2 / (1 + np.exp(-replay)) * x[t]
    params["params"].update(memories=jnp.asarray(m, jnp.float32), memories_bias=jnp.asarray(b, jnp.float32))
    y, state = jax.jit(mixer.apply)(params, jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(y[0], head(params, ssm(p, v)), atol=2e-5)
    np.testing.assert_allclose(state.past_BPD[0], x[-(W - 1) :], rtol=1e-6)


@pytest.mark.long
def test_memories_learn_from_the_start():
    """At 0 they leave the SSM alone, but their gradient is not 0."""
    mixer, params, _ = initial()
    x = jax.random.normal(jax.random.key(1), (2, 20, D))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(mixer.apply(p, x)[0] ** 2)))(params)["params"]["memories"]
    assert jnp.all(gradient != 0)


@pytest.mark.long
def test_no_memories_can_more_than_double_the_state():
    """|h| <= 2 max|x| |b| / (1 - |a|), whatever was learned: the state stays stable."""
    mixer, params, p = initial()
    A = -np.exp(p["log_rate"]) + 1j * p["omega"]
    dtA = np.exp(p["log_dt"])[:, None] * A
    bound = np.abs((np.exp(dtA) - 1) / A) / (1 - np.abs(np.exp(dtA)))
    params["params"]["memories"] = jnp.full((W, D), 1e3)
    apply = jax.jit(mixer.apply)
    _, state = apply(params, jnp.ones((1, 20_000, D)))
    assert np.all(np.abs(state.h_BDN[0]) <= 2 * bound * 1.001)
    np.testing.assert_allclose(np.abs(state.h_BDN[0, :, 0]), 2 * bound[:, 0], rtol=1e-3)  # reached where omega is 0


@pytest.mark.long
def test_initial_memory_of_the_ssm():
    """Every mode fades at the rate 1/2 and turns at pi n; the steps are log-uniform in [1e-3, 1e-1]."""
    _, _, p = initial(width=4000, state_size=2)
    np.testing.assert_allclose(np.exp(p["log_rate"]), np.full((4000, 2), 0.5), rtol=1e-6)
    np.testing.assert_allclose(p["omega"], np.tile([0, np.pi], (4000, 1)), rtol=1e-6)
    place = (np.sort(p["log_dt"]) - np.log(1e-3)) / np.log(100)
    assert np.abs(place - (np.arange(4000) + 0.5) / 4000).max() < 0.03


def test_fields_that_do_not_fit_are_refused():
    for fields, message in (
        ({"conv_width": 0}, "conv_width: expected an integer >= 1, got 0"),
        ({"state_size": 0}, "state_size: expected an integer >= 1, got 0"),
        ({"dt_min": -1.0}, "dt_min, dt_max: expected 0 < dt_min <= dt_max"),
    ):
        with pytest.raises(ValueError, match=message):
            memzoo.make("smr", width=2, **fields)
