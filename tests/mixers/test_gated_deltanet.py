"""Facts of the Gated DeltaNet paper, arXiv:2412.06464."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import deltanet, gated_deltanet

B, T, H, K, V = 1, 40, 2, 3, 5
gated_delta_rule = jax.jit(gated_deltanet.gated_delta_rule, static_argnums=7)


def inputs():
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, H, size)) for i, size in enumerate((K, K, V)))
    beta = jax.random.uniform(jax.random.key(3), (B, T, H))
    S_BHKV = jax.random.normal(jax.random.key(4), (B, H, K, V))
    return q, k / jnp.linalg.norm(k, axis=-1, keepdims=True), v, beta, S_BHKV


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_a_full_write_reads_back_exactly_however_much_is_forgotten(impl):
    _, k, v, beta, S = inputs()
    y_BTHV, _ = gated_delta_rule(k, k, v, jnp.ones_like(beta), -9 * beta, S, None, impl)
    np.testing.assert_allclose(y_BTHV, v, atol=1e-5)


def test_without_forgetting_is_deltanet():
    q, k, v, beta, S = inputs()
    ours = gated_delta_rule(q, k, v, beta, jnp.zeros_like(beta), S, None, "chunk")
    for one, other in zip(ours, deltanet.delta_rule(q, k, v, beta, S, None, "scan"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_without_writing_only_forgets():
    """beta = 0: S_t = exp(sum of log a) S_0."""
    q, k, v, beta, S = inputs()
    log_a = -0.1 * beta
    y_BTHV, _ = gated_delta_rule(q, k, v, jnp.zeros_like(beta), log_a, S, None, "chunk")
    left_BTH = np.exp(np.cumsum(np.float64(log_a), 1))
    expected = np.einsum("bth,bthk,bhkv->bthv", left_BTH, np.float64(q), np.float64(S))
    np.testing.assert_allclose(y_BTHV, expected, atol=1e-5)


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def test_initial_decays_are_mambas():
    mixer = memzoo.make("gated_deltanet", width=4)
    init = jax.jit(jax.vmap(lambda key: mixer.init(key, jnp.zeros((1, 1, 4)))))
    p = init(jax.random.split(jax.random.key(0), 300))["params"]  # of 4 heads each
    rate, log_dt = (
        np.exp(np.float64(p["log_rate"]).ravel()),
        np.log(np.log1p(np.exp(np.float64(p["dt"]["bias"]).ravel()))),
    )
    assert distance_from_uniform((rate - 1) / 15) < 0.06
    assert distance_from_uniform((log_dt - np.log(1e-3)) / np.log(100)) < 0.06
