"""The running maximum against a loop, with decays, resets and an incoming one, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops

B, T, X = 2, 37, 3


def inputs():
    rng = np.random.default_rng(0)
    a, b, m = -rng.exponential(size=(B, T, X)), 3 * rng.normal(size=(B, T, X)), rng.normal(size=(B, X))
    m[0, 1] = -np.inf
    reset = np.zeros((B, T), bool)
    reset[0, [0, 9, 10]] = reset[1, [20, T - 1]] = True
    return a, b, m, reset


def loop(a, b, m, reset):
    before, after = np.zeros((B, T, X)), np.zeros((B, T, X))
    for t in range(T):
        m = np.where(reset[:, t, None], -np.inf, m)
        before[:, t] = np.where(np.isneginf(m), b[:, t], m)
        m = after[:, t] = np.maximum(m + a[:, t], b[:, t])
    return before, after


def test_is_the_loop():
    a, b, m, reset = inputs()
    with jax.enable_x64(True):
        run = jax.jit(ops.max_scan)
        for resets in (reset, np.zeros_like(reset)):
            for got, want in zip(run(a, b, m, resets), loop(a, b, m, resets), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-12)


def test_nothing_crosses_a_reset():
    """Neither NaN nor a gradient, which goes to the one element since then that is the maximum."""
    a, b, m, _ = (np.float32(x) for x in inputs())
    b[:, 5], m[:] = np.nan, np.nan
    run = jax.jit(jax.grad(lambda b, m, reset: jnp.sum(ops.max_scan(a, b, m, reset)[1][:, -1]), (0, 1)))
    m_BTX = jax.jit(ops.max_scan)(a, b, m, np.arange(T)[None].repeat(B, 0) == 20)[1]
    assert np.isnan(m_BTX[:, :20]).all() and np.isfinite(m_BTX[:, 20:]).all()
    b[:, 5] = 100
    for at in (0, 20):
        d_b, d_m = run(b, m, np.arange(T)[None].repeat(B, 0) == at)
        np.testing.assert_array_equal(np.sum(d_b, 1), np.ones((B, X)))
        assert set(np.unique(d_b)) == {0, 1} and not np.any(d_b[:, :at]) and not np.any(d_m)


def test_shapes_are_checked():
    a, b, m, _ = (np.float32(x) for x in inputs())
    with pytest.raises(ValueError, match=r"b_BTX: expected T = 37 as in a_BTX, got shape \[2, 36, 3\]"):
        ops.max_scan(a, b[:, 1:], m)
