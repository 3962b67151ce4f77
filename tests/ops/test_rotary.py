"""Rotary places against complex exponentials, and far into a text."""

import jax
import numpy as np
import pytest

from memzoo.ops import rotary

turn = jax.jit(rotary.turn, static_argnums=2)


@pytest.mark.parametrize("base", [10_000.0, 1e6, 0.01])
def test_pairs_are_turned_by_the_frequencies_of_the_paper(base):
    B, T, H, K = 2, 9, 3, 8
    x = np.random.default_rng(0).normal(size=(B, T, H, K)).astype(np.float32)
    n = np.arange(T) * 100 + np.array([[3], [7]])
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    want = pairs * np.exp(1j * n[..., None, None] * base ** (-2 * np.arange(K // 2) / K))
    got = np.asarray(turn(x, np.int32(n), base))
    np.testing.assert_allclose(got[..., 0::2] + 1j * got[..., 1::2], want, atol=1e-5)


def test_products_depend_on_the_distance_alone():
    """At any place, and across the counter's overflow."""
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 64)).astype(np.float32)
    places = np.array([0, 1_000_003, 2**31 - 4])
    at = lambda n: np.array([[n]]).astype(np.uint32).astype(np.int32)
    products = [np.sum(turn(q, at(n + 9), 10_000.0) * turn(k, at(n), 10_000.0)) for n in places]
    np.testing.assert_allclose(products, products[0], atol=2e-5)


def test_places_begin_again_at_a_reset():
    reset_BT = np.array([[0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
    n_BT = jax.jit(rotary.places, static_argnums=1)(np.array([5, 9], np.int32), 6, reset_BT)
    assert n_BT.tolist() == [[5, 6, 0, 1, 2, 0], [9, 10, 11, 12, 13, 14]]


@pytest.mark.parametrize("base", [0, -2.0, float("inf"), float("nan"), "10"])
def test_a_base_that_is_none_is_refused(base):
    with pytest.raises(ValueError, match="base: expected a finite number > 0, got "):
        rotary.turn(np.ones((1, 1, 1, 4), np.float32), np.zeros((1, 1), np.int32), base)


def test_an_odd_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"x_BTHK: expected an even K, to turn pairs, got shape \[1, 1, 1, 3\]"):
        rotary.turn(np.ones((1, 1, 1, 3), np.float32), np.zeros((1, 1), np.int32))
