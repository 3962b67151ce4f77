"""Softmax over a window, with and without places and tokens that have no value. Facts of its cache: test_attention.py.

Dims: B batch, T time, G key heads, R queries per key head, K key, V value, M slots of the cache.
"""

import jax
import numpy as np
import pytest

from memzoo import ops
from memzoo.ops.window_attention import Cache, empty_cache

B, T, G, R, K, V, W = 2, 23, 2, 3, 4, 5, 6


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, G, R, K), (B, T, G, K), (B, T, G, V)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes], rng.random((B, T)) < 0.1


def run(impl, cache, reset=None, chunk=256, **fields):
    def apply(q, k, v, empty):
        return ops.window_attention(q, k, v, cache, reset, empty_U=empty, impl=impl, chunk=chunk, **fields)

    return jax.jit(apply)


def reference(q, k, v, reset, empty):
    """Token by token, no places: exp(scores) over what is seen, with the empty tokens in the denominator alone."""
    y = np.zeros((B, T, G, R, V))
    for b, t, g, r in np.ndindex(B, T, G, R):
        start = max([0, t - W + 1, *np.flatnonzero(reset[b, : t + 1])])
        weights = np.exp(k[b, start : t + 1, g] @ q[b, t, g, r] / np.sqrt(K))
        y[b, t, g, r] = weights @ v[b, start : t + 1, g] / (weights.sum() + np.exp(empty).sum())
    return y


@pytest.mark.parametrize("empty", [[], [-1.0, 0.5, 2.0]])
@pytest.mark.parametrize("impl, chunk", [("scan", 256), ("chunk", 256), ("chunk", 4)])
@pytest.mark.cases(3)
def test_tokens_without_a_value_take_weight_and_give_none(impl, chunk, empty):
    (q, k, v), reset = inputs()
    empty = np.float32(empty)
    cache = empty_cache(B, G, W, K, V, np.float32)
    y, _ = run(impl, cache, reset, chunk)(q, k, v, empty)
    np.testing.assert_allclose(y, reference(*map(np.float64, (q, k, v)), reset, empty), atol=1e-5)


@pytest.mark.long
def test_forms_agree_from_a_full_cache_in_gradients_too():
    (q, k, v), reset = inputs()
    rng = np.random.default_rng(1)
    cache = Cache(
        *(rng.normal(size=(B, G, W, n)).astype(np.float32) for n in (K, V)), np.array([W, 2 * W - 1], np.int32)
    )
    weights = rng.normal(size=(B, T, G, R, V)).astype(np.float32)
    args = q, k, v, np.float32([0.3, -0.7])

    def gradients(impl):
        forward = run(impl, cache, reset, chunk=4, rope_base=100.0)
        return jax.jit(jax.grad(lambda *args: (forward(*args)[0] * weights).sum(), (0, 1, 2, 3)))(*args)

    for one, other in zip(gradients("scan"), gradients("chunk"), strict=True):
        assert np.abs(other).max() > 1e-2
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_what_does_not_fit():
    (q, k, v), _ = inputs()
    cache = empty_cache(B, G, W, K, V, np.float32)
    with pytest.raises(ValueError, match=r"k_BTGK: expected G = 2 as in q_BTGRK, got shape \[2, 23, 1, 4\]"):
        run("chunk", cache)(q, k[:, :, :1], v, ())
    with pytest.raises(ValueError, match="window: expected an integer >= 1, got 0"):
        run("chunk", cache, sinks=W)(q, k, v, ())
    for sinks in (-1, 0.5):
        with pytest.raises(ValueError, match=f"sinks: expected an integer >= 0, got {sinks}"):
            run("chunk", cache, sinks=sinks)(q, k, v, ())
    for base in (-2, 0.0, float("inf"), "10"):
        with pytest.raises(ValueError, match=f"rope_base: expected a finite number > 0, or None, got {base!r}"):
            run("scan", cache, rope_base=base)(q, k, v, ())
    with pytest.raises(ValueError, match=r"empty_U: expected one axis of logits, got shape \[\]"):
        run("scan", cache)(q, k, v, 0.5)
    odd = q[..., :3], k[..., :3], v
    with pytest.raises(ValueError, match=r"q_BTGRK: expected an even K, .* got \[2, 23, 2, 3, 3\]"):
        run("chunk", empty_cache(B, G, W, 3, V, np.float32), rope_base=10.0)(*odd, ())
    with pytest.raises(NotImplementedError, match="window_attention has no form 'associative'"):
        run("associative", cache)(q, k, v, ())
