"""Facts of xLSTMTime, arXiv:2407.10240.

Dims: B batch, T time that is known, S time to come, D variables, F width.
"""

import jax
import numpy as np
import pytest

from memzoo.models.xlstm_time import XLSTMTime, decompose
from tests.initial import begins_as_in_torch
from tests.models.test_xlstm import layer_norm, matrix_block, scalar_block

B, T, S, D, F, W = 2, 20, 7, 3, 6, 5
MODEL = XLSTMTime(T, S, width=F, layers=2, ratio="1:1", window=W, heads=2, inner=12, hidden=7, qkv_block=3)
rng = np.random.default_rng(0)
x_BTD = (rng.normal(size=(B, T, D)) * [1, 20, 0.1] + [0, 5, 100]).astype(np.float32)

DEVIATION = x_BTD.std((0, 1))


@pytest.fixture(scope="module")
def model():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x_BTD)["params"]
    params = jax.tree.map(lambda p: (0.5 * rng.standard_normal(p.shape)).astype(p.dtype), shapes)
    return params, jax.jit(MODEL.apply)


def average(x):
    """The moving average of one series, value by value."""
    return np.array([np.mean([x[min(max(t + k, 0), len(x) - 1)] for k in range(-(W // 2), W // 2 + 1)])
                     for t in range(len(x))])  # fmt: skip


def test_trend_and_season_sum_to_the_series():
    trend, season = map(np.asarray, jax.jit(decompose, static_argnums=1)(x_BTD, W))
    np.testing.assert_allclose(trend + season, x_BTD, rtol=1e-6)
    for b in range(B):
        for d in range(D):
            np.testing.assert_allclose(trend[b, :, d], average(x_BTD[b, :, d]), rtol=1e-5, atol=1e-5)
    line = np.arange(T, dtype=np.float32)[None, :, None]
    np.testing.assert_allclose(np.asarray(decompose(line, W)[1])[0, 2:-2], 0, atol=1e-5)


def test_is_the_model_of_the_paper(model):
    params, run = model
    p, got = jax.tree.map(np.float64, params), run({"params": params}, x_BTD)
    for b in range(B):
        x = np.float64(x_BTD[b])
        mean, deviation = x.mean(0), np.sqrt(x.var(0) + 1e-5)
        x = p["gamma"] * (x - mean) / deviation + p["beta"]
        trend = np.stack([average(x[:, d]) for d in range(D)])
        of = lambda z, name: z @ p[name]["kernel"] + p[name]["bias"]
        z = of(of(trend, "trend") + of(x.T - trend, "season"), "in")
        z = layer_norm(scalar_block(matrix_block(z, p["layer_0"]), p["layer_1"]), p["norm"])
        want = (of(z, "out").T - p["beta"]) / p["gamma"] * deviation + mean
        np.testing.assert_allclose((got[b] - mean) / deviation, (want - mean) / deviation, rtol=1e-3, atol=1e-3)


def test_units_of_measure_do_not_matter(model):
    """Each series in other units, from another zero: so is its forecast."""
    params, run = model
    scale, zero = np.float32([3, 0.5, 40]), np.float32([-7, 2, 30])
    y_BSD, moved_BSD = (np.asarray(run({"params": params}, x)) for x in (x_BTD, scale * x_BTD + zero))
    np.testing.assert_allclose((moved_BSD - zero) / scale / DEVIATION, y_BSD / DEVIATION, atol=2e-2)


def test_variables_are_read_in_their_order(model):
    """The xLSTM's sequence: a variable's forecast knows those before it, and not those after it."""
    params, run = model
    y_BSD = np.asarray(run({"params": params}, x_BTD))
    other = x_BTD.copy()
    other[:, :, 1] += 30 * np.sin(np.arange(T))
    changed = np.abs(np.asarray(run({"params": params}, other)) - y_BSD).max((0, 1)) / DEVIATION
    assert changed[0] == 0 and changed[1] > 1e-2 and changed[2] > 1e-3


def test_initial_parameters():
    """It begins with means over time: weights 1 / T; the other layers as in PyTorch."""
    model = XLSTMTime(64, 24, width=32, layers=1)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 64, 2), np.float32))["params"]
    for name in ("trend", "season"):
        np.testing.assert_allclose(params[name]["kernel"], 1 / 64, rtol=1e-6)
        assert begins_as_in_torch(params[name]["bias"], 64)
    assert begins_as_in_torch(params["in"]["kernel"], 24) and begins_as_in_torch(params["out"]["kernel"], 32)
    assert params["layer_0"]["up"]["kernel"].shape == (32, 128)


def test_without_normalisation_there_is_nothing_to_undo():
    model = MODEL.clone(normalise=False, layers=1, ratio="1:0")
    params = jax.eval_shape(model.init, jax.random.key(0), x_BTD)["params"]
    assert "gamma" not in params and "beta" not in params


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 0}, "context: expected an integer >= 1, got 0"),
        ({"window": 4}, "window: expected an odd number, got 4"),
        ({"heads": 5}, "inner: expected a positive multiple of heads = 5, got 12"),
        ({"normalise": 1}, "normalise: expected True or False, got 1"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        XLSTMTime(**{"width": F, "inner": 12, "qkv_block": 3, "heads": 2, **fields})


def test_bad_input_is_named(model):
    params, _ = model
    with pytest.raises(ValueError, match=r"x_BTD: expected shape \[B, T = 20, D >= 1\], got \[2, 19, 3\]"):
        MODEL.apply({"params": params}, x_BTD[:, 1:])
    with pytest.raises(ValueError, match="x_BTD: expected a floating dtype, got int32"):
        MODEL.apply({"params": params}, x_BTD.astype(np.int32))
