"""Facts of the paper of minLSTM, arXiv:2410.01201."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import min_gru, min_lstm

FORMS = ("scan", "associative", "chunk")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def in_numpy(f, i, c, h, positive):
    """h_t = f / (f + i) h_{t-1} + i / (f + i) g(c), token by token."""
    hs = []
    for t in range(f.shape[1]):
        f_t, i_t, c_t = sigmoid(f[:, t]), sigmoid(i[:, t]), c[:, t]
        if positive:
            c_t = np.maximum(c_t + 0.5, 0.5) * (c_t >= 0) + sigmoid(c_t) * (c_t < 0)
        h = (f_t * h + i_t * c_t) / (f_t + i_t)
        hs.append(h)
    return np.stack(hs, 1)


@pytest.mark.parametrize("positive", (True, False))
@pytest.mark.parametrize("impl", FORMS)
def test_is_the_equation(impl, positive):
    rng = np.random.default_rng(0)
    f, i, c, h = (rng.normal(size=shape) for shape in ((2, 70, 3),) * 3 + ((2, 3),))
    run = jax.jit(min_lstm.min_lstm, static_argnums=(5, 6))
    h_BTF, h_BF = run(*(jnp.asarray(x, jnp.float32) for x in (f, i, c, h)), None, positive, impl)
    np.testing.assert_allclose(h_BTF, in_numpy(f, i, c, h, positive), rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(h_BF, h_BTF[:, -1])


def test_gates_sum_to_one_even_where_both_underflow():
    """f / (f + i) as it stands is 0 / 0 at -200 in float32; the ratio is e^-2 there."""
    f, i = jnp.array([-200.0, -200.0, 200.0, 3.0]), jnp.array([-198.0, -400.0, 200.0, -1.0])
    forget, write = min_lstm.normalised(f, i)
    np.testing.assert_allclose(forget + write, 1, rtol=1e-6)
    ratio = [1 / (1 + np.exp(2)), 1, 0.5, sigmoid(3.0) / (sigmoid(3.0) + sigmoid(-1.0))]
    np.testing.assert_allclose(forget, ratio, rtol=1e-5)
    slopes = jax.grad(lambda f: min_lstm.normalised(f, i)[0].sum())(f)
    assert jnp.isfinite(slopes).all()


def test_equal_gates_average_the_past_with_the_present():
    """With f = i the state moves halfway to each candidate, whatever the gates."""
    gate = jnp.array([-9.0, 0.0, 4.0])[None, :, None]
    c = jnp.array([1.5, 2.5, 3.5])[None, :, None]
    h_BTF, _ = min_lstm.min_lstm(gate, gate, c, jnp.zeros((1, 1)), None)
    np.testing.assert_allclose(h_BTF[0, :, 0], [1, 2, 3], rtol=1e-6)


def test_is_min_gru_where_both_gates_are_nearly_shut():
    """Where both gates are nearly shut, sigmoid(x) is e^x and i / (f + i) = sigmoid(i - f)."""
    rng = np.random.default_rng(0)
    low, z, c = (jnp.asarray(x, jnp.float32) for x in (np.full((1, 30, 4), -40.0), *rng.normal(size=(2, 1, 30, 4))))
    h_BF = jnp.ones((1, 4))
    want, _ = min_gru.min_gru(z, c, h_BF, None)
    got, _ = min_lstm.min_lstm(low, low + z, c, h_BF, None)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def initial(forget_bias):
    """The parameters, and the forget gate of all channels on white noise."""
    mixer = memzoo.make("min_lstm", width=64, expand=4, forget_bias=forget_bias)
    x_BTD = jax.random.normal(jax.random.key(1), (1, 50, 64))
    params = mixer.init(jax.random.key(0), x_BTD)["params"]
    f, i = np.split(np.asarray(x_BTD[0] @ params["gates"]["kernel"] + params["gates"]["bias"]), 2, axis=-1)
    return params, sigmoid(f) / (sigmoid(f) + sigmoid(i))


def test_initial_forget_gates():
    """Symmetric about 1/2, between 0.25 and 0.75 nearly always; a forget bias saturates f and leaves 1 / (1 + i)."""
    (_, plain), (_, biased) = initial(0.0), initial(5.0)
    assert abs(np.mean(plain) - 0.5) < 0.01 and np.mean(np.abs(plain - 0.5) < 0.25) > 0.98
    assert 0.07 < np.std(plain) < 0.11
    assert np.percentile(biased, 1) > 0.5 and abs(np.mean(biased) - 0.667) < 0.02


def test_initial_weights_are_uniform_as_released():
    """In +-1/sqrt(inputs), biases too; forget_bias moves those of f alone."""
    params, _ = initial(5.0)
    f, i = np.split(np.asarray(params["gates"]["bias"]), 2)
    assert abs(np.mean(f) - 5) < 0.02 and abs(np.mean(i)) < 0.02
    uniform = [(f - 5, 64), (i, 64), (params["gates"]["kernel"], 64), *((w, 64) for w in params["candidate"].values())]
    for weights, inputs in (*uniform, *((w, 256) for w in params["out"].values())):
        assert 0.95 * inputs**-0.5 < np.abs(weights).max() <= inputs**-0.5 + 1e-6
        np.testing.assert_allclose(np.std(weights), (3 * inputs) ** -0.5, rtol=0.15)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), "1"))
def test_bad_fields_are_refused(bad):
    with pytest.raises(ValueError, match=r"expand: expected an integer >= 1, got 1\.5"):
        memzoo.make("min_lstm", width=6, expand=1.5)
    with pytest.raises(ValueError, match=f"forget_bias: expected a finite number, got {bad!r}"):
        memzoo.make("min_lstm", width=6, forget_bias=bad)
