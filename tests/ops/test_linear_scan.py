"""linear_scan and short_conv against their equations in numpy, in every form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops

B, T, X = 3, 45, 4
CHUNK = 8
FORMS = {"scan": {}, "sweep": {}, "associative": {}, "chunk": {"chunk": CHUNK}}


def make(kind):
    rng = np.random.default_rng(0)
    n = lambda *shape: rng.standard_normal(shape)
    a = {"positive": rng.uniform(0, 1, (B, T, X)), "signs": rng.uniform(-1, 1, (B, T, X))}
    a["zeros"] = n(B, T, X).clip(0, 1)
    a["complex"] = rng.uniform(0.5, 1, (B, T, X)) * np.exp(1j * rng.uniform(0, 6.28, (B, T, X)))
    x, h = n(B, T, X), n(B, X)
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, [0, 7, 8]] = reset_BT[1, [20, 22, T - 1]] = True
    i = 1j if kind == "complex" else 0
    return a[kind], x + i * n(B, T, X), h + i * n(B, X), reset_BT


def in_numpy(a, x, h, reset):
    out, h = np.zeros(x.shape, x.dtype), h.copy()
    for t in range(x.shape[1]):
        h = a[:, t] * np.where(reset[:, t, None], 0, h) + x[:, t]
        out[:, t] = h
    return out, h


def run(impl):
    def loss(arrays, reset, w_BTX, w_BX):
        h_BTX, h_BX = ops.linear_scan(*arrays, reset, impl=impl, **FORMS[impl])
        return jnp.sum(jnp.real(h_BTX * w_BTX)) + jnp.sum(jnp.real(h_BX * w_BX)), (h_BTX, h_BX)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


RUN = {impl: run(impl) for impl in FORMS}


@pytest.mark.parametrize("x64", (False, True), ids=("float32", "float64"))
@pytest.mark.parametrize("kind", ("positive", "signs", "zeros", "complex"))
@pytest.mark.cases(1)
def test_forms_agree_with_the_equation(kind, x64):
    tolerance = 1e-10 if x64 else 1e-5
    with jax.enable_x64(x64):
        *arrays, reset = make(kind)
        want_BTX, want_BX = in_numpy(*arrays, reset)
        rng = np.random.default_rng(1)
        w = [jnp.asarray(rng.standard_normal(s)) for s in ((B, T, X), (B, X))]
        arrays = [jnp.asarray(a) for a in arrays]
        (_, _), want = RUN["scan"](arrays, reset, *w)
        for impl in FORMS:
            (_, (h_BTX, h_BX)), gradients = RUN[impl](arrays, reset, *w)
            np.testing.assert_allclose(h_BTX, want_BTX, rtol=tolerance, atol=tolerance * 10)
            np.testing.assert_allclose(h_BX, want_BX, rtol=tolerance, atol=tolerance * 10)
            for got, wanted in zip(gradients, want, strict=True):
                np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * 100)


@pytest.mark.parametrize("kind", ("signs", "complex"))
@pytest.mark.parametrize("impl", FORMS)
def test_gradient_is_the_difference_quotient(impl, kind):
    """In float64 and in every array, against (f(z + e) - f(z - e)) / 2e along a random direction."""
    with jax.enable_x64(True):
        *arrays, reset = make(kind)
        w = [np.cos(np.arange(B * T * X)).reshape(B, T, X), np.ones((B, X))]
        turn = 1 + 0.5j if kind == "complex" else 1
        along = [turn * np.sin(1 + np.arange(a.size)).reshape(a.shape) for a in arrays]
        f = lambda e: RUN[impl]([jnp.asarray(a + e * d) for a, d in zip(arrays, along, strict=True)], reset, *w)
        _, gradients = f(0.0)
        slope = sum(np.sum(np.real(g * d)) for g, d in zip(gradients, along, strict=True))
        np.testing.assert_allclose(slope, (f(1e-5)[0][0] - f(-1e-5)[0][0]) / 2e-5, rtol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("kind", ("zeros", "complex"))
@pytest.mark.parametrize("impl", ("sweep", "associative", "chunk"))
def test_second_derivatives_are_those_of_the_scan(impl, kind):
    *arrays, reset = make(kind)
    w = [jnp.asarray(np.cos(np.arange(B * T * X)).reshape(B, T, X), jnp.float32), jnp.ones((B, X))]
    size = lambda g: jnp.sum(jnp.real(g) ** 2 + jnp.imag(g) ** 2)
    squares = lambda impl: jax.grad(lambda arrays: sum(size(g) for g in RUN[impl](arrays, reset, *w)[1]))
    arrays = [jnp.asarray(a) for a in arrays]
    for got, want in zip(squares(impl)(arrays), squares("scan")(arrays), strict=True):
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.cases(2)
def test_nothing_crosses_a_reset(impl):
    a, x, _, _ = make("positive")
    reset = np.zeros((B, T), bool)
    reset[:, [0, 20]] = True
    w = np.ones((B, T, X), np.float32), np.ones((B, X), np.float32)
    (_, (h_BTX, h_BX)), gradients = RUN[impl]([jnp.asarray(a), jnp.asarray(x), jnp.full((B, X), jnp.nan)], reset, *w)
    for leaf in (h_BTX, h_BX, *gradients):
        assert np.isfinite(leaf).all()
    if impl != "chunk":
        x[:, 10] = np.inf
        h_BTX, _ = ops.linear_scan(a, x, None, reset, impl=impl)
        assert np.isinf(h_BTX[:, 10:20]).any() and np.isfinite(h_BTX[:, 20:]).all()


@pytest.mark.parametrize("length", (1, 2, CHUNK, CHUNK + 1))
@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.cases(11)
def test_any_length(impl, length):
    a, x, h, reset = make("signs")
    want_BTX, want_BX = in_numpy(a[:, :length], x[:, :length], h, reset[:, :length])
    h_BTX, h_BX = ops.linear_scan(a[:, :length], x[:, :length], h, reset[:, :length], impl=impl, chunk=CHUNK)
    np.testing.assert_allclose(h_BTX, want_BTX, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(h_BX, want_BX, rtol=1e-5, atol=1e-5)


def test_short_conv_is_numpy_convolve_per_sequence():
    rng = np.random.default_rng(0)
    x, f = rng.standard_normal((B, T, X)), rng.standard_normal((4, X))
    cuts = [0, 5, 6, 8, 30, T]
    reset = np.zeros((B, T), bool)
    reset[:, cuts[1:-1]] = True
    want = np.concatenate(
        [
            np.array(
                [
                    [np.convolve(x_T, f_W)[: j - i] for x_T, f_W in zip(x[b, i:j].T, f[::-1].T, strict=True)]
                    for b in range(B)
                ]
            )
            for i, j in itertools.pairwise(cuts)
        ],
        axis=2,
    ).swapaxes(1, 2)
    y, past = ops.short_conv(x, f, None, reset)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(past, x[:, -3:], rtol=1e-6)
    plain, _ = ops.short_conv(x, f)
    np.testing.assert_allclose(plain[:, :5], y[:, :5], rtol=1e-5, atol=1e-6)


def test_short_conv_streams():
    """Token by token, with its tail as state, and gradients of the tail; the trap is calls shorter than the filter."""
    rng = np.random.default_rng(0)
    x, f, past = (rng.standard_normal(s).astype("f") for s in ((B, 7, X), (4, X), (B, 3, X)))
    reset = np.zeros((B, 7), bool)
    reset[0, 5] = True

    def whole(past):
        y, tail = ops.short_conv(x, f, past, reset)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(tail)), (y, tail)

    def streamed(past):
        ys = []
        for t in range(7):
            y, past = ops.short_conv(x[:, t : t + 1], f, past, reset[:, t : t + 1])
            ys.append(y)
        y = jnp.concatenate(ys, 1)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(past)), (y, past)

    (_, (y, tail)), gradient = jax.value_and_grad(whole, has_aux=True)(past)
    (_, (y2, tail2)), gradient2 = jax.value_and_grad(streamed, has_aux=True)(past)
    for one, two in ((y, y2), (tail, tail2), (gradient, gradient2)):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    nan, tail = ops.short_conv(x, f, np.full_like(past, np.nan), np.arange(7)[None].repeat(B, 0) == 0)
    assert np.isfinite(nan).all() and np.isfinite(tail).all()


def test_bad_arguments_are_named():
    a, x, h, _ = make("positive")
    with pytest.raises(ValueError, match="a_BTX: expected X = 4 as in x_BTX"):
        ops.linear_scan(a[..., :3], x)
    with pytest.raises(ValueError, match=r"h_BX: expected B = 3 as in x_BTX, got shape \[2, 4\]"):
        ops.linear_scan(a, x, h[:2])
    with pytest.raises(ValueError, match="T >= 1"):
        ops.linear_scan(a[:, :0], x[:, :0])
    with pytest.raises(ValueError, match="past_BPX: expected P = W - 1 = 3"):
        ops.short_conv(x, np.ones((4, X)), np.ones((B, 2, X)))
    with pytest.raises(ValueError, match="f_WX: expected X = 4"):
        ops.short_conv(x, np.ones((4, 3)))


@pytest.mark.parametrize("impl", FORMS)
def test_nan_in_a_does_not_cross_a_reset(impl):
    a, x, _, _ = make("positive")
    a[:, 3] = np.nan
    reset = np.zeros((B, T), bool)
    reset[:, 5] = reset[:, 24] = True
    h_BTX, h_BX = ops.linear_scan(a, x, None, reset, impl=impl, chunk=CHUNK)
    assert np.isnan(h_BTX[:, 3]).all()
    assert np.isfinite(h_BTX[:, 24 if impl == "chunk" else 5 :]).all() and np.isfinite(h_BX).all()


def test_a_filter_of_one_tap_has_no_past():
    x = make("positive")[1]
    y, past = ops.short_conv(x, np.full((1, X), 2.0))
    again, _ = ops.short_conv(x, np.full((1, X), 2.0), past, np.ones((B, T), bool))
    np.testing.assert_allclose(y, 2 * x, rtol=1e-6)
    np.testing.assert_array_equal(again, y)
