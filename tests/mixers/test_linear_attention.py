"""Facts of the linear attention paper, arXiv:2006.16236."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.mixers import linear_attention as la

B, T, H, K, V = 1, 70, 2, 3, 5
linear_attention = jax.jit(la.linear_attention, static_argnums=5)


def inputs():
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, H, size)) for i, size in enumerate((K, K, V)))
    return q, k, v, la.State(jnp.zeros((B, H, K, V)), jnp.zeros((B, H, K)))


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_is_normalised_attention_with_phi_instead_of_exp(impl):
    """Eq. 9 under a causal mask, where every row of weights sums to 1."""
    q, k, v, fresh = inputs()
    y_BTHV, state = linear_attention(q, k, v, fresh, None, impl)
    q, k, v = (np.float64(z) for z in (q, k, v))
    q, k = (np.where(z > 0, z, np.expm1(z)) + 1 for z in (q, k))
    weights = np.tril(np.einsum("bihk,bjhk->bhij", q, k))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(y_BTHV, np.einsum("bhij,bjhv->bihv", weights, v), atol=1e-5)
    np.testing.assert_allclose(state.z_BHK, k.sum(1), rtol=1e-5)


def test_equal_values_come_back_whatever_the_keys():
    q, k, v, fresh = inputs()
    same = jnp.broadcast_to(v[:, :1], v.shape)
    for scale in (1.0, 12.0):  # at 12, elu(x) + 1 in float32 would round whole queries to 0
        y_BTHV, _ = linear_attention(scale * (q - 1), k, same, fresh, None, "chunk")
        np.testing.assert_allclose(y_BTHV, same, atol=1e-5)


def test_gradients_are_finite_where_every_feature_underflows():
    _, _, v, fresh = inputs()
    low = jnp.full((B, T, H, K), -200.0)

    def loss(q, k, v):
        return jnp.sum(linear_attention(q, k, v, fresh, None, "chunk")[0])

    for gradient in jax.grad(loss, (0, 1, 2))(low, low, v):
        assert jnp.isfinite(gradient).all()
