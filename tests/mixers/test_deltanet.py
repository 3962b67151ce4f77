"""Facts of the DeltaNet paper, arXiv:2406.06484, and of negative eigenvalues, arXiv:2411.12537."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import deltanet

B, T, H, K, V = 1, 40, 2, 3, 5
delta_rule = jax.jit(deltanet.delta_rule, static_argnums=6)


def inputs():
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, H, size)) for i, size in enumerate((K, K, V)))
    return q, k / jnp.linalg.norm(k, axis=-1, keepdims=True), v, jnp.zeros((B, H, K, V))


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_a_full_write_reads_back_exactly(impl):
    """beta = 1 under unit keys, K != V: right after its write a value is all that its key holds."""
    _, k, v, S = inputs()
    y_BTHV, _ = delta_rule(k, k, v, jnp.ones((B, T, H)), S, None, impl)
    np.testing.assert_allclose(y_BTHV, v, atol=1e-5)


def test_is_gradient_descent_on_the_error_of_recall():
    """S_t = S_{t-1} - beta grad 1/2 |S' k - v|^2, sec. 2.2, with the gradient from autodiff."""
    q, k, v, S = inputs()
    beta = jax.random.uniform(jax.random.key(3), (B, T, H))
    descend = jax.jit(jax.vmap(jax.grad(lambda S, k, v: jnp.sum((k @ S - v) ** 2) / 2)))
    y_BTHV, last_BHKV = delta_rule(q, k, v, beta, S, None, "chunk")
    q_THK, k_THK, v_THV, beta_THKV = (np.asarray(z[0]) for z in (q, k, v, beta[..., None, None]))
    S_HKV = np.asarray(S[0])
    for t in range(T):
        S_HKV = S_HKV - beta_THKV[t] * descend(S_HKV, k_THK[t], v_THV[t])
        np.testing.assert_allclose(y_BTHV[0, t], np.einsum("hk,hkv->hv", q_THK[t], S_HKV), atol=1e-5)
    np.testing.assert_allclose(last_BHKV[0], S_HKV, atol=1e-5)


def test_orthogonal_keys_do_not_disturb_one_another():
    eye = jnp.broadcast_to(jnp.eye(K)[None, :, None], (B, K, H, K))
    v = jax.random.normal(jax.random.key(0), (B, K, H, V))
    _, S_BHKV = delta_rule(eye, eye, v, jnp.ones((B, K, H)), jnp.zeros((B, H, K, V)), None, "chunk")
    np.testing.assert_allclose(S_BHKV, jnp.moveaxis(v, 1, 2), atol=1e-6)


def test_beta_of_two_reflects_and_so_counts_parity():
    """v = 0 and one key: the memory under it changes sign at every token."""
    k = jnp.ones((B, 7, H, 1))
    S = jnp.ones((B, H, 1, V))
    y_BTHV, _ = delta_rule(k, k, jnp.zeros((B, 7, H, V)), jnp.full((B, 7, H), 2.0), S, None, "chunk")
    np.testing.assert_allclose(y_BTHV[0, :, 0, 0], [-1, 1, -1, 1, -1, 1, -1], atol=1e-6)


def test_allow_neg_eigval_doubles_beta():
    """With k = q and nothing held before, y_0 = beta |k|^2 K^-1/2 v, which the norm hides: look at the state."""
    x_BTD = jax.random.normal(jax.random.key(0), (1, 1, 8))
    one, two = (memzoo.make("deltanet", width=8, heads=2, allow_neg_eigval=flag) for flag in (False, True))
    params = jax.jit(one.init)(jax.random.key(1), x_BTD)
    np.testing.assert_allclose(two.apply(params, x_BTD)[1].S_BHKV, 2 * one.apply(params, x_BTD)[1].S_BHKV, rtol=1e-5)
