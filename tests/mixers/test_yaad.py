"""Yaad: its recurrence written out, Huber's loss and its bounds, and how it begins.

Dims: T time, D width, H heads, K head.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers.yaad import huber, loss
from tests.miras import sigmoid, written_out

T, D, H, K = 7, 6, 3, 4


def make(**fields):
    return memzoo.make("yaad", width=D, heads=H, head_dim=K, expansion=2, step=0.5, gate_rank=5, **fields)


def parameters(mixer):
    """With every gate away from where it begins."""
    rng = np.random.default_rng(0)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    return jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), p)


@pytest.mark.parametrize("bound", ["learned", "infinite"])
@pytest.mark.cases(1)
def test_is_its_recurrence_written_out(bound):
    """Without a bound it descends half the square."""
    mixer = make(chunk=3)
    p = parameters(mixer)
    if bound == "infinite":
        p["params"]["delta"]["bias"] = np.full(H * K, np.inf, "float32")
    x_1TD = np.random.default_rng(1).normal(size=(1, T, D)).astype("float32")
    y_1TD, _ = jax.jit(mixer.apply)(p, x_1TD)

    def slope(e_K, gate, t, h):
        delta_K = np.log1p(np.exp(gate("delta")[t, h]))
        bounded.append(np.abs(e_K) > delta_K)
        return np.where(bounded[-1], delta_K * np.sign(e_K), e_K) if bound == "learned" else e_K

    bounded = []
    want_TD = written_out(
        jax.tree.map(np.float64, p["params"]), np.float64(x_1TD[0]), 3, 0.5 / K, slope, weights=lambda A: A
    )
    np.testing.assert_allclose(y_1TD[0], want_TD, atol=1e-5)
    assert (0.1 < np.mean(bounded) < 0.9) == (bound == "learned")


def test_huber_is_the_square_within_and_a_line_beyond():
    e = np.linspace(-3, 3, 61)
    want = np.where(np.abs(e) <= 1.5, e**2 / 2, 1.5 * (np.abs(e) - 0.75))
    np.testing.assert_allclose(huber(e, 1.5), want, atol=1e-6)
    slopes = jax.jit(jax.vmap(jax.grad(huber)))(e, np.full(e.shape, np.inf))
    np.testing.assert_allclose(slopes, e, atol=1e-6)


def test_an_outlier_moves_it_no_more_than_its_bound():
    told = lambda v: np.concatenate([np.full(K, v), np.ones(K), np.full(K, 2.0)]).astype("float32")
    slope = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(slope(np.zeros(K, "float32"), told(1e6)), np.full(K, -2.0))
    np.testing.assert_allclose(slope(np.zeros(K, "float32"), told(1.0)), np.full(K, -1.0))


def test_begins_with_a_bound_of_1_and_hardly_forgets():
    mixer = memzoo.make("yaad", width=64, heads=2)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    assert not np.any(p["eta"]["bias"])
    np.testing.assert_allclose(sigmoid(p["alpha"]["bias"]), 1e-4, rtol=1e-4)
    np.testing.assert_allclose(np.log1p(np.exp(p["delta"]["bias"])), 1, rtol=1e-5)
    for name, fan_in in (("W1", 128), ("W2", 32)):  # 2 x 4,096 numbers
        np.testing.assert_allclose(np.std(p[name]), fan_in**-0.5, rtol=0.05)


def test_bad_fields_are_named():
    for match, fields in {
        "width: expected a positive multiple of heads = 4": {"width": 6},
        "expansion: expected an integer >= 1, got 0": {"width": 8, "expansion": 0},
        "gate_rank: expected an integer >= 1, got 0": {"width": 8, "gate_rank": 0},
        "step: expected a number > 0, got -1": {"width": 8, "step": -1},
    }.items():
        with pytest.raises(ValueError, match=match):
            memzoo.make("yaad", **fields).initial_state(1)
