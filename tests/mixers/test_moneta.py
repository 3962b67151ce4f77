"""Moneta: its recurrence written out, what p = q = 2 is, and how it begins.

Dims: T time, D width, H heads, K head.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import moneta
from tests.miras import sigmoid, written_out

T, D, H, K = 7, 6, 3, 4


def parameters(mixer):
    """With every gate away from where it begins."""
    rng = np.random.default_rng(0)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    return jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), p)


def test_is_its_recurrence_written_out():
    mixer = memzoo.make(
        "moneta", width=D, heads=H, head_dim=K, expansion=2, chunk=3, step=0.5, gate_rank=5, p=2.5, q=3.5
    )
    p = parameters(mixer)
    x_1TD = np.random.default_rng(1).normal(size=(1, T, D)).astype("float32")
    y_1TD, _ = jax.jit(mixer.apply)(p, x_1TD)
    slope = lambda e_K, *_: np.sign(e_K) * np.sqrt(e_K**2 + 1e-6) ** 1.5 * np.abs(e_K) / np.sqrt(e_K**2 + 1e-6)
    weights = lambda A: A / np.sum(np.sqrt(A**2 + 1e-6) ** 3.5) ** (1.5 / 3.5)
    want_TD = written_out(jax.tree.map(np.float64, p["params"]), np.float64(x_1TD[0]), 3, 0.5 / K, slope, weights)
    np.testing.assert_allclose(y_1TD[0], want_TD, atol=1e-5)


def test_p_and_q_of_2_are_half_the_square_and_the_weights_as_they_are():
    rng = np.random.default_rng(2)
    y_K, v_K, eta_K, A_OI = rng.normal(size=K), rng.normal(size=K), rng.uniform(size=K), rng.normal(size=(5, K))
    half_square = np.sum(eta_K * (y_K - v_K) ** 2) / 2
    np.testing.assert_allclose(moneta.loss(2, y_K, np.append(v_K, eta_K)), half_square, rtol=1e-5)
    np.testing.assert_allclose(moneta.normalised(2, A_OI), A_OI, rtol=1e-6)


def test_the_norm_of_the_weights_is_that_of_what_they_add_up():
    """|W|_q = |A|_q^{3-q}: with q = 4 the more A has grown, the smaller W is."""
    A_OI = np.random.default_rng(3).normal(size=(5, K))
    norm = lambda W: np.sum(np.abs(W) ** 4.0) ** 0.25
    for scale in (1.0, 10.0):
        np.testing.assert_allclose(norm(moneta.normalised(4.0, scale * A_OI)), 1 / norm(scale * A_OI), rtol=1e-5)
    assert not np.any(moneta.normalised(4.0, 0 * A_OI))


def test_begins_in_the_middle_of_its_steps_and_hardly_forgets():
    mixer = memzoo.make("moneta", width=64, heads=2)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    assert not np.any(p["eta"]["bias"])
    np.testing.assert_allclose(sigmoid(p["alpha"]["bias"]), 1e-4, rtol=1e-4)
    for name, fan_in in (("W1", 128), ("W2", 32)):  # 2 x 4,096 numbers
        np.testing.assert_allclose(np.std(p[name]), fan_in**-0.5, rtol=0.05)


def test_bad_fields_are_named():
    for match, fields in {
        "width: expected a positive multiple of heads = 4": {"width": 6},
        "expansion: expected an integer >= 1, got 0": {"width": 8, "expansion": 0},
        "gate_rank: expected an integer >= 1, got 0": {"width": 8, "gate_rank": 0},
        "step: expected a number > 0, got 0": {"width": 8, "step": 0},
        "p: expected a number >= 1, got 0.5": {"width": 8, "p": 0.5},
        "q: expected a finite number, got inf": {"width": 8, "q": np.inf},
    }.items():
        with pytest.raises(ValueError, match=match):
            memzoo.make("moneta", **fields).initial_state(1)
