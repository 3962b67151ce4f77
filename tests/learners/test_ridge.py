"""Ridge regression against NumPy's least squares, and a stream in pieces against one call.

Dims: B batch, T time, F features, K targets.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.learners import ridge

B, T, F, K = 2, 40, 5, 3


def samples(offset=0.0, dtype=np.float64):
    rng = np.random.default_rng(0)
    x_BTF = rng.standard_normal((B, T, F)) @ (np.eye(F) + 0.2 * rng.standard_normal((F, F))) + offset
    y_BTK = x_BTF @ rng.standard_normal((F, K)) + 0.5 * rng.standard_normal((B, T, K)) - 3
    return x_BTF.astype(dtype), y_BTK.astype(dtype)


def least_squares(x, y, penalty):
    """By a QR of the samples themselves, centred, and below them one row of sqrt(penalty) for each feature."""
    x, y = (np.float64(a).reshape(-1, a.shape[-1]) for a in (x, y))
    mean_x, mean_y = x.mean(0), y.mean(0)
    rows = np.concatenate([x - mean_x, np.sqrt(penalty) * np.eye(x.shape[-1])])
    kernel = np.linalg.lstsq(rows, np.concatenate([y - mean_y, np.zeros((x.shape[-1], y.shape[-1]))]))[0]
    return kernel, mean_y - mean_x @ kernel


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-11)])
@pytest.mark.parametrize("penalty", [0.0, 7.0])
def test_equals_least_squares(dtype, tolerance, penalty):
    with jax.enable_x64(dtype == "float64"):
        x, y = samples(dtype=dtype)
        sums = jax.jit(ridge.update)(ridge.init(F, K, dtype), x, y)
        kernel, bias = jax.jit(ridge.solve)(sums, penalty)
        want_kernel, want_bias = least_squares(x, y, penalty)
        assert kernel.dtype == bias.dtype == dtype and int(sums.samples) == B * T
        np.testing.assert_allclose(kernel, want_kernel, atol=tolerance)
        np.testing.assert_allclose(bias, want_bias, atol=tolerance)
        predicted = (x @ want_kernel).reshape(-1, K)
        want = [np.corrcoef(predicted[:, k], y.reshape(-1, K)[:, k])[0, 1] ** 2 for k in range(K)]
        np.testing.assert_allclose(ridge.explained(sums, kernel), want, atol=tolerance)


def test_a_stream_in_pieces_is_one_call():
    """Single tokens under a scan, uneven pieces, and two streams that are merged."""
    x, y = samples(offset=10.0, dtype=np.float32)
    start = ridge.init(F, K)
    whole = ridge.update(start, x, y)

    @jax.jit
    def by_token(x, y):
        xs = jnp.moveaxis(x, 1, 0), jnp.moveaxis(y, 1, 0)
        return jax.lax.scan(lambda sums, token: (ridge.update(sums, *token), None), start, xs)[0]

    update = jax.jit(ridge.update)
    uneven = start
    for begin, end in ((0, 1), (1, 30), (30, T)):
        uneven = update(uneven, x[:, begin:end], y[:, begin:end])
    merged = ridge.merge(update(start, x[0], y[0]), update(start, x[1], y[1]))
    for got in (by_token(x, y), uneven, merged):
        assert int(got.samples) == B * T
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-4), got, whole)


def test_what_is_far_from_zero_loses_no_digits():
    """float32 sums of squares around 1e3 would leave nothing of features that vary by 1."""
    x, y = samples(offset=1e3, dtype=np.float32)
    start, update = ridge.init(F, K), jax.jit(ridge.update)
    sums = update(update(start, x[:, :17], y[:, :17]), x[:, 17:], y[:, 17:])
    kernel, _ = ridge.solve(sums, 1.0)
    np.testing.assert_allclose(kernel, least_squares(x, y, 1.0)[0], atol=2e-3)


def test_what_is_not_used_does_not_count():
    """Not even NaN; and nothing at all leaves the sums as they were."""
    x, y = samples(dtype=np.float32)
    use = np.random.default_rng(1).random((B, T)) < 0.6
    want = ridge.update(ridge.init(F, K), x[use], y[use])
    x[~use] = y[~use] = np.nan
    update = jax.jit(ridge.update)
    got = update(ridge.init(F, K), x, y, use)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4), got, want)
    jax.tree.map(np.testing.assert_array_equal, update(got, x, y, np.zeros_like(use)), got)


def test_the_bias_is_free():
    """However large the penalty, the prediction has the targets' mean."""
    x, y = samples(offset=2.0, dtype=np.float32)
    kernel, bias = ridge.solve(ridge.update(ridge.init(F, K), x, y), 1e8)
    assert np.abs(kernel).max() < 1e-4
    np.testing.assert_allclose((x @ np.asarray(kernel) + bias).mean((0, 1)), y.mean((0, 1)), atol=1e-3)


def test_features_that_say_the_same_share_the_weight():
    """With a penalty, that is: without one nothing tells them apart."""
    x, y = samples(dtype=np.float32)
    x[..., 1] = x[..., 0]
    sums = ridge.update(ridge.init(F, K), x, y)
    np.testing.assert_allclose(*ridge.solve(sums, 1.0)[0][:2], atol=1e-4)


def test_bad_input_is_named():
    x, y = samples(dtype=np.float32)
    sums = ridge.init(F, K)
    for match, call in (
        ("features: expected an integer >= 1, got 0", lambda: ridge.init(0, K)),
        ("dtype: expected float32, or float64 under jax.enable_x64, got float64", lambda: ridge.init(F, K, np.float64)),
        ("dtype: .* got bfloat16", lambda: ridge.init(F, K, jnp.bfloat16)),
        (r"x: expected shape \[..., 5\], got \[2, 40, 3\]", lambda: ridge.update(sums, y, y)),
        (r"y: expected shape \[2, 40, 3\], got \[2, 40, 5\]", lambda: ridge.update(sums, x, x)),
        (r"use: expected shape \[2, 40\], got \[2\]", lambda: ridge.update(sums, x, y, np.ones(2, bool))),
        ("use: expected dtype bool, got float32", lambda: ridge.update(sums, x, y, x[..., 0])),
        ("penalty: expected a finite number >= 0, got -1", lambda: ridge.solve(sums, -1)),
        ("penalty: .* got nan", lambda: ridge.solve(sums, float("nan"))),
    ):
        with pytest.raises(ValueError, match=match):
            call()
