"""Facts of the gated linear attention paper, arXiv:2312.06635."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import gla, retnet

B, T, H, K, V = 1, 40, 2, 3, 5
gated_linear_attention = jax.jit(gla.gated_linear_attention, static_argnums=6)


def random(*shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_is_attention_with_cumulative_gates_between_query_and_key(impl):
    """Eq. 4 unrolled: y_i = sum_j (q_i . (b_i / b_j) k_j) v_j with b the running product of the gates."""
    q, k, v = random(B, T, H, K, seed=0), random(B, T, H, K, seed=1), random(B, T, H, V, seed=2)
    log_alpha = -jax.random.uniform(jax.random.key(3), (B, T, H, K)) * jnp.array([0.0, 0.1, 3.0])
    y_BTHV, _ = gated_linear_attention(q, k, v, log_alpha, jnp.zeros((B, H, K, V)), None, impl)
    log_b = np.cumsum(np.float64(log_alpha), 1)
    between = np.exp(np.minimum(log_b[:, :, None] - log_b[:, None], 0))
    scores = np.einsum("bihk,bijhk,bjhk->bhij", np.float64(q), between, np.float64(k))
    np.testing.assert_allclose(y_BTHV, np.einsum("bhij,bjhv->bihv", np.tril(scores), np.float64(v)), atol=2e-5)


def test_one_gate_for_all_keys_and_times_is_retention():
    q, k, v, S = (random(*shape, seed=i) for i, shape in enumerate([(B, T, H, K)] * 2 + [(B, T, H, V), (B, H, K, V)]))
    log_gamma_H = jnp.array([-0.03, -0.5])
    gates = jnp.broadcast_to(log_gamma_H[:, None], (B, T, H, K))
    ours, theirs = (
        gated_linear_attention(q, k, v, gates, S, None, "chunk"),
        retnet.retention(q, k, v, log_gamma_H, S, None, "scan"),
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_half_life_at_the_start_is_the_temperature():
    """Tokens of zeros write nothing and have alpha = (1/2)^(1/16)."""
    mixer = memzoo.make("gla", width=8, heads=2, impl="scan")
    x_BTD = random(1, 1, 8, seed=0)
    params = jax.jit(mixer.init)(jax.random.key(1), x_BTD)
    before = jax.jit(mixer.apply)(params, x_BTD)[1]
    after = jax.jit(mixer.apply)(params, jnp.zeros((1, 16, 8)), before)[1]
    np.testing.assert_allclose(after.S_BHKV, before.S_BHKV / 2, rtol=1e-5)
