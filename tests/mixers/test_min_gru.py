"""Facts of the paper of minGRU, arXiv:2410.01201."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import min_gru

FORMS = ("scan", "associative", "chunk")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def in_numpy(z, c, h, positive):
    """h_t = (1 - z) h_{t-1} + z g(c), token by token."""
    hs = []
    for t in range(z.shape[1]):
        z_t, c_t = sigmoid(z[:, t]), c[:, t]
        if positive:
            c_t = np.maximum(c_t + 0.5, 0.5) * (c_t >= 0) + sigmoid(c_t) * (c_t < 0)
        h = (1 - z_t) * h + z_t * c_t
        hs.append(h)
    return np.stack(hs, 1)


@pytest.mark.parametrize("positive", (True, False))
@pytest.mark.parametrize("impl", FORMS)
def test_is_the_equation(impl, positive):
    rng = np.random.default_rng(0)
    z, c, h = rng.normal(size=(2, 70, 3)), rng.normal(size=(2, 70, 3)), rng.uniform(size=(2, 3))
    run = jax.jit(min_gru.min_gru, static_argnums=(4, 5))
    h_BTF, h_BF = run(*(jnp.asarray(x, jnp.float32) for x in (z, c, h)), None, positive, impl)
    np.testing.assert_allclose(h_BTF, in_numpy(z, c, h, positive), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(h_BF, h_BTF[:, -1])


def test_g_is_positive_continuous_and_increasing():
    x = jnp.linspace(-20, 20, 4001)
    y = min_gru.g(x)
    assert (y > 0).all() and (jnp.diff(y) >= 0).all() and jnp.diff(y).max() < 0.0101
    np.testing.assert_allclose(min_gru.g(jnp.array([0.0, 3.0])), [0.5, 3.5])


def test_the_state_stays_positive_unless_vanilla():
    x_BTD = jax.random.normal(jax.random.key(1), (3, 40, 6))
    least = {}
    for positive in (True, False):
        mixer = memzoo.make("min_gru", width=6, positive=positive)
        params = mixer.init(jax.random.key(0), x_BTD)
        least[positive] = float(mixer.apply(params, x_BTD)[1].h_BF.min())
    assert least[True] > 0 > least[False]


def test_a_gate_of_one_forgets_and_a_gate_of_zero_keeps():
    z = jnp.array([50.0, -50.0, -50.0])[None, :, None]
    c = jnp.array([2.0, 7.0, 9.0])[None, :, None]
    h_BTF, _ = min_gru.min_gru(z, c, jnp.full((1, 1), 5.0), None)
    np.testing.assert_allclose(h_BTF[0, :, 0], 2.5)


def test_initial_gates_are_centred_on_one_half():
    """Weights and biases uniform in +-1/sqrt(D): for x of unit variance a logit has variance 1/3, so that nearly all
    gates lie between 0.15 and 0.85: no channel keeps a token for long."""
    mixer = memzoo.make("min_gru", width=64, expand=4)
    x_BTD = jax.random.normal(jax.random.key(1), (1, 50, 64))
    params = mixer.init(jax.random.key(0), x_BTD)["params"]
    for layer, inputs in (("gate", 64), ("candidate", 64), ("out", 256)):
        for weights in params[layer].values():
            bound = inputs**-0.5
            assert 0.95 * bound < np.abs(weights).max() <= bound
            np.testing.assert_allclose(np.std(weights), bound / 3**0.5, rtol=0.15)
    logit = np.asarray(x_BTD[0] @ params["gate"]["kernel"] + params["gate"]["bias"])
    assert abs(np.mean(logit)) < 0.05 and abs(np.std(logit) - (1 / 3 + 1 / 192) ** 0.5) < 0.03
    assert np.mean((sigmoid(logit) > 0.15) & (sigmoid(logit) < 0.85)) > 0.99


def test_expand_widens_the_state():
    mixer = memzoo.make("min_gru", width=6, expand=3)
    assert mixer.initial_state(2).h_BF.shape == (2, 18)
    with pytest.raises(ValueError, match="expand: expected an integer >= 1, got 0"):
        memzoo.make("min_gru", width=6, expand=0)
