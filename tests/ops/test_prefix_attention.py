"""Attention with a prefix, in all forms, is the softmax written out; with none it is window attention.

Dims: B batch, T time, H heads, K key, V value, U tokens of the prefix, W window.
"""

import itertools
from functools import partial

import jax
import numpy as np
import pytest

from memzoo.ops.prefix_attention import empty_prefix_cache, prefix_attention
from tests.window import attended

B, T, H, K, V, U, W = 2, 19, 3, 4, 5, 2, 6
STARTS = ((0, 4, 5), (0, 17))  # of texts, in each row


def draw(size=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, K), (B, T, H, K), (B, T, H, V), (U, H, K), (U, H, V)
    q, k, v, prefix_k, prefix_v = (rng.standard_normal(shape).astype("float32") for shape in shapes)
    return size * q, k, v, prefix_k, prefix_v


def resets():
    reset_BT = np.zeros((B, T), bool)
    for row, starts in enumerate(STARTS):
        reset_BT[row, list(starts)] = True
    return reset_BT


def written_out(q, k, v, prefix_k, prefix_v):
    y_BTHV = np.zeros((B, T, H, V))
    for row, starts in enumerate(STARTS):
        for start, end in itertools.pairwise([*starts, T]):
            text = (np.float64(x[row, start:end]) for x in (q, k, v))
            y_BTHV[row, start:end] = attended(*text, prefix_k, prefix_v, W)
    return y_BTHV


@pytest.fixture(scope="module")
def run():
    """By form; arrays, cache, reset -> y, cache."""
    return {impl: jax.jit(partial(prefix_attention, impl=impl, chunk=4)) for impl in ("scan", "chunk")}


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.parametrize("size", [1.0, 60.0])
@pytest.mark.cases(2)
def test_is_the_softmax_over_the_prefix_and_the_window(run, impl, size):
    """Also with logits of 100, where either takes all. In pieces; what was there before the first reset is nonsense."""
    arrays, reset_BT = draw(size), resets()
    cache = jax.tree.map(lambda s: np.full_like(s, np.nan if s.dtype == np.float32 else 3), empty())
    ys = []
    for i in range(0, T, 10):
        part = [x[:, i : i + 10] for x in arrays[:3]]
        y_BTHV, cache = run[impl](*part, *arrays[3:], cache, reset_BT[:, i : i + 10])
        ys.append(y_BTHV)
    np.testing.assert_allclose(np.concatenate(ys, axis=1), written_out(*arrays), atol=2e-5 * size**0.5)
    np.testing.assert_array_equal(cache.place_B, [T - starts[-1] for starts in STARTS])


def empty():
    return jax.tree.map(np.asarray, empty_prefix_cache(B, H, W, K, V, "float32"))


def test_no_prefix_is_the_window_alone(run):
    q, k, v, prefix_k, prefix_v = draw()
    alone, _ = run["chunk"](q, k, v, prefix_k[:0], prefix_v[:0], empty(), resets())
    np.testing.assert_allclose(alone, written_out(q, k, v, prefix_k[:0], prefix_v[:0]), atol=1e-5)


def test_bad_arguments_are_named():
    q, k, v, prefix_k, prefix_v = draw()
    for match, args, fields in (
        ("prefix_v_UHV: expected H = 3 as in q_BTHK", (q, k, v, prefix_k, prefix_v[:, :2]), {}),
        ("prefix_v_UHV: expected U = 2 as in prefix_k_UHK", (q, k, v, prefix_k, prefix_v[:1]), {}),
        ("base: expected a finite number > 0, got 0", (q, k, v, prefix_k, prefix_v), {"rope_base": 0}),
        ("chunk: expected an integer >= 1, got 0", (q, k, v, prefix_k, prefix_v), {"chunk": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            prefix_attention(*args, empty(), **fields)
    with pytest.raises(NotImplementedError, match="prefix_attention has no form 'newton'"):
        prefix_attention(q, k, v, prefix_k, prefix_v, empty(), impl="newton")
