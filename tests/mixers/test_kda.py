"""Facts of the Kimi Linear paper, arXiv:2510.26692."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import gated_deltanet, kda

B, T, H, K, V, D = 1, 40, 2, 3, 5, 8
kimi_delta_attention = jax.jit(kda.kimi_delta_attention, static_argnums=7)


def inputs():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, H, size)) for size in (K, K, V))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_alpha = -np.exp(rng.uniform(np.log(1e-3), np.log(3), (B, T, H, K)))
    beta, S = rng.uniform(size=(B, T, H)), rng.standard_normal((B, H, K, V))
    return tuple(x.astype("f") for x in (q, k, v, beta, log_alpha, S))


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_transition_decays_first_and_then_erases(impl):
    """Eq. 1 with its matrices written out: S_t = (I - beta k k') diag(alpha) S_{t-1} + beta k v'."""
    q, k, v, beta, log_alpha, S = inputs()
    y_BTHV, last_BHKV = kimi_delta_attention(q, k, v, beta, log_alpha, S, None, impl)
    for h in range(H):
        S_KV = S[0, h]
        for t in range(T):
            k_K, b = k[0, t, h], beta[0, t, h]
            S_KV = (np.eye(K) - b * np.outer(k_K, k_K)) @ np.diag(np.exp(log_alpha[0, t, h])) @ S_KV
            S_KV = S_KV + b * np.outer(k_K, v[0, t, h])
            np.testing.assert_allclose(y_BTHV[0, t, h], q[0, t, h] @ S_KV, atol=1e-5)
        np.testing.assert_allclose(last_BHKV[0, h], S_KV, atol=1e-5)


@pytest.mark.long
def test_a_full_write_reads_back_exactly_however_much_is_forgotten():
    _, k, v, beta, log_alpha, S = inputs()
    y_BTHV, _ = kimi_delta_attention(k, k, v, np.ones_like(beta), 9 * log_alpha, S, None, "chunk")
    np.testing.assert_allclose(y_BTHV, v, atol=1e-5)


@pytest.mark.long
def test_one_decay_for_all_keys_is_gated_deltanet():
    """The same parameters in both: the low-rank decay is Gated DeltaNet's, repeated over the keys of a head."""
    ours, theirs = (memzoo.make(name, width=D, heads=H, key_dim=K, value_dim=V) for name in ("kda", "gated_deltanet"))
    x_BTD = np.random.default_rng(1).standard_normal((2, 11, D)).astype("f")
    params = jax.tree.map(np.asarray, jax.jit(theirs.init)(jax.random.key(0), x_BTD)["params"])
    p = jax.tree.map(np.asarray, jax.jit(ours.init)(jax.random.key(1), x_BTD)["params"])
    p |= {name: params[name] for name in ("qkv", "conv", "beta", "log_rate")}
    R = p["dt_in"]["kernel"].shape[1]
    p["dt_in"] = {"kernel": np.pad(params["dt"]["kernel"], [(0, 0), (0, R - H)])}
    by_head_HHK = np.repeat(np.eye(H, dtype="f")[..., None], K, axis=-1)
    bias_HK = np.repeat(params["dt"]["bias"][:, None], K, axis=-1)
    p["dt_out"] = {"kernel": np.pad(by_head_HHK, [(0, R - H), (0, 0), (0, 0)]), "bias": bias_HK}
    _, state = jax.jit(ours.apply)({"params": p}, x_BTD)
    _, expected = jax.jit(theirs.apply)({"params": params}, x_BTD)
    np.testing.assert_allclose(state.S_BHKV, expected.S_BHKV, atol=1e-6)
    np.testing.assert_allclose(state.past_BPE, expected.past_BPE, atol=1e-6)

    q, k, v, beta, log_alpha, S = inputs()
    equal = np.broadcast_to(log_alpha[..., :1], log_alpha.shape)
    ours = kimi_delta_attention(q, k, v, beta, equal, S, None, "chunk")
    theirs = gated_deltanet.gated_delta_rule(q, k, v, beta, log_alpha[..., 0], S, None, "scan")
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_each_key_forgets_at_its_own_rate():
    """beta = 0: what is held under key i fades by alpha_i alone, which one decay per head cannot do."""
    _, k, v, beta, _, S = inputs()
    log_alpha_K = np.array([0.0, -0.1, -50.0])
    log_alpha = np.broadcast_to(log_alpha_K, (B, T, H, K))
    _, last_BHKV = kimi_delta_attention(k, k, v, np.zeros_like(beta), log_alpha, S, None, "chunk")
    np.testing.assert_allclose(last_BHKV, S * np.exp(T * log_alpha_K)[:, None], rtol=1e-5, atol=1e-7)


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def test_initial_decays():
    """Rates uniform in [1, 16], one per head; steps log-uniform in [1e-3, 0.1], one per key."""
    mixer = memzoo.make("kda", width=4)
    init = jax.jit(jax.vmap(lambda key: mixer.init(key, jnp.zeros((1, 1, 4)))))
    p = init(jax.random.split(jax.random.key(0), 300))["params"]
    assert p["log_rate"].shape == (300, 4) and p["dt_out"]["bias"].shape == (300, 4, 1)
    rate = np.exp(np.float64(p["log_rate"]).ravel())
    log_dt = np.log(np.log1p(np.exp(np.float64(p["dt_out"]["bias"]).ravel())))
    assert distance_from_uniform((rate - 1) / 15) < 0.06
    assert distance_from_uniform((log_dt - np.log(1e-3)) / np.log(100)) < 0.06


@pytest.mark.parametrize("field", ["heads", "key_dim", "value_dim", "gate_rank", "conv_width"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}: expected an integer >= 1, got 0"):
        memzoo.make("kda", width=D, **{field: 0})
