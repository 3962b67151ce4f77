"""Spike counts and spike trains, arXiv:2509.05276, sec. 3.3.

Dims: N numbers, P steps.
"""

from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.ops import spikes


@pytest.mark.parametrize("code", spikes.CODES)
def test_trains_sum_to_their_counts(code):
    """Exactly, for every count up to the most that the steps are for, in spikes of that code."""
    most = 37
    c_N = np.arange(0 if code == "binary" else -most, most + 1)
    steps = spikes.steps_for(most, code)
    s_PN = np.asarray(spikes.train(c_N, code, steps))
    assert s_PN.shape == (steps, c_N.size) and s_PN.dtype == np.int8
    np.testing.assert_array_equal(spikes.weights(code, steps) @ s_PN, c_N)
    assert set(np.unique(s_PN)) == ({0, 1} if code in ("binary", "twos_complement") else {-1, 0, 1})
    assert np.any(spikes.weights(code, steps - 1) @ np.asarray(spikes.train(c_N, code, steps - 1)) != c_N)


def test_trains_are_those_of_the_papers_figure():
    """5 and -5, fig. 4."""
    train = lambda c, code, steps: np.asarray(spikes.train(c, code, steps)).tolist()
    assert train(5, "binary", 6) == [1, 1, 1, 1, 1, 0]
    assert train(-5, "ternary", 5) == [-1, -1, -1, -1, -1]
    assert train(5, "bitwise", 3) == [1, 0, 1] and train(-5, "bitwise", 3) == [-1, 0, -1]
    assert train(5, "twos_complement", 4) == [0, 1, 0, 1] and train(-5, "twos_complement", 4) == [1, 0, 1, 1]


@pytest.mark.parametrize("rate", [1.0, 3.0, 10.0])
def test_a_soft_reset_neuron_fires_as_often_as_the_count(rate):
    """Eq. 20, charged at once with x and half a threshold: fire and subtract a threshold, until it is not reached."""
    x_N = np.abs(np.random.default_rng(0).normal(size=50))
    threshold = np.mean(x_N) / rate
    v_N, fired_N = x_N + threshold / 2, np.zeros(50)
    while (fires_N := v_N >= threshold).any():
        v_N, fired_N = v_N - threshold * fires_N, fired_N + fires_N
    c_N, h_1 = spikes.count(jnp.asarray(x_N, jnp.float32), rate)
    np.testing.assert_array_equal(c_N, fired_N)
    np.testing.assert_allclose(h_1, threshold, rtol=1e-6)


def test_values_are_at_most_half_a_threshold_off_and_gradients_straight_through():
    x = np.random.default_rng(0).normal(size=(4, 60)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    y, pull = jax.vjp(lambda x: spikes.spiked(x, 3.0), x)
    h = np.abs(x).mean(-1, keepdims=True) / 3
    assert np.abs(y - x).max() <= 0.5001 * h.max() and np.all(np.abs(y - x) <= 0.5001 * h)
    np.testing.assert_allclose(np.round(y / h), y / h, atol=1e-4)
    np.testing.assert_array_equal(pull(w)[0], w)
    np.testing.assert_array_equal(jax.jvp(lambda x: spikes.spiked(x, 3.0), (x,), (w,))[1], w)


def test_the_threshold_follows_the_input():
    """Counts do not change with the loudness of x, but for silence, of which no spike tells."""
    x = np.random.default_rng(0).normal(size=(1, 60)).astype(np.float32)
    c, _ = spikes.count(x, 3.0)
    np.testing.assert_array_equal(spikes.count(4096 * x, 3.0)[0], c)
    assert not np.any(spikes.count(1e-9 * x, 3.0)[0]) and not np.any(spikes.spiked(0 * x, 3.0))


def test_sparsity_of_normal_numbers():
    """The shares of counts are differences of the normal distribution at odd halves of h = E|x| / f.

    At f = 3 and 3 bits, two thirds of all steps are silent; the paper finds 69.15% in its model's longer tails.
    """
    most, f = 7, 3.0
    c_N = spikes.count(np.random.default_rng(0).normal(size=(1, 100_000)).astype(np.float32), f)[0]
    c_N = np.clip(c_N, -most, most)
    h = np.sqrt(2 / np.pi) / f
    within = lambda n: erf((n + 0.5) * h / np.sqrt(2))  # P(|x| < (n + 1/2) h)
    shares = np.array([within(0), *[within(n) - within(n - 1) for n in range(1, most)], 1 - within(most - 1)])
    ones = np.array([n.bit_count() for n in range(most + 1)])
    silent = np.mean(np.asarray(spikes.train(c_N, "bitwise", 3)) == 0)
    np.testing.assert_allclose(silent, 1 - shares @ ones / 3, atol=5e-3)
    assert 0.5 < silent < 0.7
    ternary = np.mean(np.asarray(spikes.train(c_N, "ternary", most)) == 0)
    np.testing.assert_allclose(ternary, 1 - shares @ np.arange(most + 1) / most, atol=5e-3)


def test_a_projection_of_spikes_is_the_sum_of_its_columns():
    """Eq. 22: y = h sum over steps of W s, with no product of numbers."""
    rng = np.random.default_rng(0)
    x, W = rng.normal(size=20).astype(np.float32), rng.normal(size=(20, 6))
    c, h = spikes.count(x, 3.0)
    s_PN = np.asarray(spikes.train(c, "ternary", int(np.abs(c).max())))
    sums = sum(W[s == 1].sum(0) - W[s == -1].sum(0) for s in s_PN)
    np.testing.assert_allclose(float(h[0]) * sums, np.asarray(spikes.spiked(x, 3.0), np.float64) @ W, rtol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"code: unknown code 'bits'; "):
        spikes.train(np.arange(3), "bits", 4)
    with pytest.raises(ValueError, match=r"steps: expected an integer >= 1, got 0"):
        spikes.weights("ternary", 0)
    with pytest.raises(ValueError, match=r"steps: expected at most the 32 bits of a count, got 33"):
        spikes.train(np.arange(3), "bitwise", 33)
    with pytest.raises(ValueError, match=r"most: expected an integer >= 1, got 0"):
        spikes.steps_for(0, "binary")
