"""Facts of the paper of Fast and Forgetful Memory, arXiv:2310.04128."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import ffm

FORMS = ("scan", "associative", "chunk")
M, C = 5, 3


def problem(T):
    rng = np.random.default_rng(0)
    x, S = rng.normal(size=(2, T, M)), rng.normal(size=(2, M, C)) + 1j * rng.normal(size=(2, M, C))
    return x, -rng.uniform(0, 0.5, M), rng.uniform(0, 3, C), S


def run(x, alpha, omega, S, reset, impl):
    arrays = jnp.float32(x), jnp.float32(alpha), jnp.float32(omega), jnp.complex64(S)
    return jax.jit(ffm.aggregate, static_argnums=5)(*arrays, reset, impl)


@pytest.mark.parametrize("impl", FORMS)
def test_an_episode_may_end_anywhere(impl):
    """Against a loop: the published scan is wrong where an episode ends inside of it, by how it combines `done`."""
    x, alpha, omega, S = problem(70)
    reset = np.zeros((2, 70), bool)
    reset[0, [0, 13, 14, 40]] = reset[1, [31, 69]] = True
    gamma, want, now = np.exp(-np.abs(alpha)[:, None] + 1j * omega), [], S
    for t in range(70):
        now = gamma * np.where(reset[:, t, None, None], 0, now) + x[:, t, :, None]
        want.append(now)
    S_BTMC, S_BMC = run(x, alpha, omega, S, reset, impl)
    np.testing.assert_allclose(S_BTMC, np.stack(want, 1), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(S_BMC, now, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("impl", FORMS)
def test_an_impulse_fades_and_turns(impl):
    """S_t = exp(t (-|alpha| + i omega)), in closed form, for either sign of alpha."""
    x = np.zeros((1, 70, M))
    x[:, 0] = 1
    _, alpha, omega, _ = problem(1)
    t = np.arange(70)[:, None, None]
    want = np.exp(t * (-np.abs(alpha)[:, None] + 1j * omega))
    for sign in (1, -1):
        S_BTMC, _ = run(x, sign * alpha, omega, np.zeros((1, M, C)), None, impl)
        np.testing.assert_allclose(S_BTMC[0], want, atol=1e-4)


@pytest.mark.parametrize("impl", FORMS)
def test_without_input_no_trace_grows(impl):
    _, _, _, S = problem(1)
    alpha, omega = ffm.fading(1024)(None, (M,)), ffm.turning(1, 1024)(None, (C,))
    size = np.abs(run(np.zeros((2, 5000, M)), alpha, omega, S, None, impl)[0])
    rounding = 5000 * np.finfo(np.float32).eps  # of a power of gamma, relative
    assert (size <= 1e-30 + (1 + rounding) * np.minimum.accumulate(size, axis=1)).all()
    np.testing.assert_allclose(size[:, 1023, -1], 0.01 * np.abs(S[:, -1]), rtol=1e-3)
    assert size[:, 200, 0].max() < 1e-30


def test_initial_rates_are_those_of_the_papers_experiments():
    """Fading evenly from 0.673 per token to what leaves 1% after 1,024; turning with periods evenly from 1 to 1,024
    tokens; 32 by 4 of them."""
    p = memzoo.make("ffm", width=6).init(jax.random.key(0), jnp.zeros((1, 1, 6)))["params"]
    np.testing.assert_allclose(p["alpha"], np.linspace(-0.673147, -0.00449723, 32), rtol=1e-4)
    np.testing.assert_allclose(2 * np.pi / p["omega"], [1, 342, 683, 1024], rtol=1e-5)
    gamma = np.exp(-np.abs(p["alpha"]))
    np.testing.assert_allclose([gamma.min() ** 6.84, gamma.max() ** 1024], 0.01, rtol=1e-2)


def test_the_slowest_trace_fades_within_the_longest_period():
    """To 1%, and never faster than the fastest: then all fade alike."""
    np.testing.assert_allclose(np.exp(ffm.fading(100)(None, (3,)))[-1] ** 100, 0.01, rtol=1e-4)
    alpha = ffm.fading(2)(None, (3,))
    np.testing.assert_allclose(alpha, -0.673147, rtol=1e-5)


def test_initial_weights_are_uniform_as_released():
    """In +-1/sqrt(inputs), biases too."""
    p = memzoo.make("ffm", width=50).init(jax.random.key(0), jnp.zeros((1, 1, 50)))["params"]
    for layer, inputs in (("in", 50), ("in_gate", 50), ("mix", 256), ("out_gate", 50), ("skip", 50)):
        for weights in p[layer].values():
            assert 0.85 * inputs**-0.5 < np.abs(weights).max() <= inputs**-0.5
            np.testing.assert_allclose(np.std(weights), (3 * inputs) ** -0.5, rtol=0.25)


def test_the_output_gate_chooses_between_memory_and_token():
    """Shut, y is the skip connection alone; open, the normalised memory alone."""
    x_BTD = jax.random.normal(jax.random.key(1), (2, 9, 6))
    mixer = memzoo.make("ffm", width=6)
    p = mixer.init(jax.random.key(0), x_BTD)["params"]
    gate = lambda bias: {"kernel": jnp.zeros_like(p["out_gate"]["kernel"]), "bias": jnp.full(6, bias)}
    shut, _ = mixer.apply({"params": p | {"out_gate": gate(-100.0)}}, x_BTD)
    np.testing.assert_allclose(shut, x_BTD @ p["skip"]["kernel"] + p["skip"]["bias"], atol=1e-5)
    opened, _ = mixer.apply({"params": p | {"out_gate": gate(100.0)}}, x_BTD)
    np.testing.assert_allclose(np.mean(opened, -1), 0, atol=1e-5)
    np.testing.assert_allclose(np.var(opened, -1), 1, rtol=1e-2)


def test_sizes_and_periods_out_of_range_are_refused():
    with pytest.raises(ValueError, match="traces: expected an integer >= 1, got 0"):
        memzoo.make("ffm", width=6, traces=0)
    with pytest.raises(ValueError, match=r"min_period, max_period: .* got 9, 3"):
        memzoo.make("ffm", width=6, min_period=9, max_period=3)
    for bad in (float("inf"), float("nan"), "9"):
        with pytest.raises(ValueError, match=f"max_period: expected a finite number, got {bad!r}"):
            memzoo.make("ffm", width=6, max_period=bad)
