"""Memora: its recurrence written out, weights that stay distributions, and how it begins.

Dims: T time, D width, H heads, K head, F hidden, O and I outputs and inputs of a matrix.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers.memora import distribution
from tests.miras import sigmoid, written_out

T, D, H, K = 7, 6, 3, 4


def make(**fields):
    return memzoo.make("memora", width=D, heads=H, head_dim=K, expansion=2, gate_rank=5, **fields)


def parameters(mixer):
    """With every gate away from where it begins."""
    rng = np.random.default_rng(0)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    return jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), p)


def softmax(A_OI):
    W_OI = np.exp(A_OI - A_OI.max(-1, keepdims=True))
    return W_OI / W_OI.sum(-1, keepdims=True)


def test_is_its_recurrence_written_out():
    """In float64: rows that hardly vary leave float32's definition 1e-5 off."""
    p = jax.tree.map(np.float64, parameters(make()))
    x_1TD = np.random.default_rng(1).normal(size=(1, T, D))
    with jax.enable_x64(True):
        mixer = make(chunk=3, step=0.5, dtype=jnp.float64, param_dtype=jnp.float64)
        y_1TD, _ = jax.jit(mixer.apply)(p, x_1TD)
    weights = lambda A: A.shape[1] ** 0.5 * softmax(A)
    want_TD = written_out(p["params"], x_1TD[0], 3, 0.5, lambda e_K, *_: e_K, weights)
    np.testing.assert_allclose(y_1TD[0], want_TD, atol=1e-12)


def test_a_step_in_A_is_the_papers_step_in_log_W():
    rng = np.random.default_rng(2)
    A_OI, g_OI, alpha_O1 = rng.normal(size=(5, K)), rng.normal(size=(5, K)), rng.uniform(size=(5, 1))
    want = softmax((1 - alpha_O1) * np.log(softmax(A_OI)) - g_OI)
    np.testing.assert_allclose(distribution((1 - alpha_O1) * A_OI - g_OI) / 2, want, atol=1e-6)


@pytest.mark.long
def test_weights_stay_on_the_scaled_simplex():
    mixer = make(step=5.0)
    p = parameters(mixer)
    x_1TD = 3 * np.random.default_rng(3).normal(size=(1, 500, D)).astype("float32")
    _, state = jax.jit(mixer.apply)(p, x_1TD)
    for name, I in (("W1", 2 * K), ("W2", K)):
        A_HOI = p["params"][name] + np.asarray(state.memory.A[name][0])
        W_HOI = np.asarray(distribution(A_HOI))
        assert np.all(W_HOI >= 0) and np.abs(A_HOI - p["params"][name]).max() > 0.5, "it learned"
        np.testing.assert_allclose(W_HOI.sum(-1), I**0.5, rtol=1e-5)


def test_begins_in_the_middle_of_its_steps_and_hardly_forgets():
    mixer = memzoo.make("memora", width=64, heads=2)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    assert not np.any(p["eta"]["bias"])
    np.testing.assert_allclose(sigmoid(p["alpha"]["bias"]), 1e-4, rtol=1e-4)
    for name in ("W1", "W2"):  # 8,192 numbers each
        np.testing.assert_allclose(np.std(p[name]), 1, rtol=0.05)


def test_bad_fields_are_named():
    for match, fields in {
        "width: expected a positive multiple of heads = 4": {"width": 6},
        "expansion: expected an integer >= 1, got 0": {"width": 8, "expansion": 0},
        "chunk: expected an integer >= 1, got 0": {"width": 8, "chunk": 0},
        "step: expected a finite number, got nan": {"width": 8, "step": np.nan},
    }.items():
        with pytest.raises(ValueError, match=match):
            memzoo.make("memora", **fields).initial_state(1)
