"""Facts of the paper of Fast and Forgetful Memory, arXiv:2310.04128."""

import math

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
    alpha, omega = ffm.fading(None, (M,)), ffm.turning(1, 1024)(None, (C,))
    size = np.abs(run(np.zeros((2, 5000, M)), alpha, omega, S, None, impl)[0])
    rounding = 5000 * np.finfo(np.float32).eps  # of a power of gamma, relative
    assert (size <= 1e-30 + (1 + rounding) * np.minimum.accumulate(size, axis=1)).all()
    np.testing.assert_allclose(size[:, -1, -1], np.abs(S[:, -1]) * np.exp(-5000e-6), rtol=1e-3)
    assert size[:, 100, 0].max() < 1e-30


def test_initial_rates_are_the_papers():
    """Fading evenly from e to 1e-6 per token, turning with periods evenly from 1 to 1,024 tokens, 32 by 4 of them."""
    p = memzoo.make("ffm", width=6).init(jax.random.key(0), jnp.zeros((1, 1, 6)))["params"]
    np.testing.assert_allclose(p["alpha"], np.linspace(-math.e, -1e-6, 32), rtol=1e-4)
    np.testing.assert_allclose(2 * np.pi / p["omega"], [1, 342, 683, 1024], rtol=1e-5)
    gamma = np.exp(-np.abs(p["alpha"]))
    assert gamma.min() > 0.0659 and 1 - 2e-6 < gamma.max() < 1


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
