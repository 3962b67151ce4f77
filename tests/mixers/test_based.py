"""Facts of Based's linear attention, arXiv:2402.18668."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import based

T, H, K, V = 70, 2, 4, 5
E = 1 + K + K * (K + 1) // 2
taylor_attention = jax.jit(based.taylor_attention, static_argnums=5)
FRESH = based.State(np.zeros((1, H, E, V), np.float32), np.zeros((1, H, E), np.float32))


def inputs(scale=1.0):
    rng = np.random.default_rng(0)
    return [scale * rng.normal(size=(1, T, H, n)) for n in (K, K)] + [rng.normal(size=(1, T, H, V))]


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
def test_is_quadratic_attention_with_the_taylor_weights(impl, scale):
    """No feature map: weights 1 + x + x^2 / 2 with x = q' k / sqrt(K), each row divided by its sum."""
    q, k, v = inputs(scale)
    x = np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(K)
    weights = np.tril(1 + x + x**2 / 2)
    weights /= weights.sum(-1, keepdims=True)
    y_BTHV, state = taylor_attention(*(np.float32(z) for z in (q, k, v)), FRESH, None, impl)
    np.testing.assert_allclose(y_BTHV, np.einsum("bhij,bjhv->bihv", weights, v), atol=1e-5 * scale)
    np.testing.assert_allclose(state.z_BHE[..., 0], T)  # the first feature is 1


def test_near_zero_is_softmax_attention():
    """The weights differ from exp(x) by |x|^3 / 6 and more, so for |x| < 0.1 hardly."""
    q, k, v = inputs(0.3)
    x = np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(K)
    weights = np.tril(np.exp(x))
    weights /= weights.sum(-1, keepdims=True)
    bound = 2 * np.abs(x).max() ** 3 / 6 * np.exp(np.abs(x).max()) * np.abs(v).max()
    y_BTHV, _ = taylor_attention(*(np.float32(z) for z in (q, k, v)), FRESH, None, "chunk")
    error = np.abs(y_BTHV - np.einsum("bhij,bjhv->bihv", weights, v)).max()
    assert 1e-7 < error < bound < 0.6


def test_the_state_is_about_half_of_all_products():
    """1 + 16 + 136 features of a key of 16, where every product twice would make 273."""
    mixer = memzoo.make("based", width=1024)
    assert mixer.sizes() == (16, 16, 64)
    shapes = jax.eval_shape(lambda: mixer.initial_state(1))
    assert shapes.S_BHEV.shape == (1, 16, 153, 64) and shapes.z_BHE.shape == (1, 16, 153)


def test_the_denominator_never_vanishes():
    """At x = -1 a weight is 1/2, the least there is: y is then the value itself, and gradients are finite."""
    k = np.zeros((1, 1, H, K), np.float32)
    k[..., 0] = K**0.25
    v = np.ones((1, 1, H, V), np.float32)
    y_BTHV, _ = based.taylor_attention(-k, k, v, FRESH, None, "scan")
    np.testing.assert_allclose(y_BTHV, v, rtol=1e-6)
    rng = np.random.default_rng(0)
    q, k, v = (np.float32(1000 * rng.normal(size=(1, T, H, n))) for n in (K, K, V))
    loss = lambda q, k, v: jnp.sum(based.taylor_attention(q, k, v, FRESH, None, "chunk")[0])
    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
        assert np.isfinite(gradient).all()


def test_initial_scores_are_of_unit_size():
    """x = q' k / sqrt(K) of normal inputs has deviation 1, where 1 + x + x^2 / 2 and exp(x) are alike."""
    mixer = memzoo.make("based", width=64, heads=4)
    x_TD = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    p = jax.jit(mixer.init)(jax.random.key(0), x_TD[None, :1])["params"]
    q, k = (np.einsum("td,dhk->thk", x_TD, p[name]["kernel"]) for name in ("q", "k"))
    scores = np.einsum("ihk,jhk->hij", q, k) / 4
    np.testing.assert_allclose(np.std(scores, axis=(1, 2)), 1, atol=0.15)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match=r"feature_dim: expected an integer >= 1, got 0"):
        memzoo.make("based", width=8, feature_dim=0)
    with pytest.raises(ValueError, match=r"width: expected a positive multiple of heads = 3, got 8"):
        memzoo.make("based", width=8, heads=3)
