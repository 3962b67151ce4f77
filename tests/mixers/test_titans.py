"""Titans' neural memory: its recurrence written out, what persistent tokens are, and how it begins.

Dims: B batch, T time, D width, H heads, K key, V value, N persistent tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers.titans import bias

B, T, D, H, K, V = 2, 9, 6, 3, 4, 5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make(**fields):
    return memzoo.make("titans", width=D, heads=H, key_dim=K, value_dim=V, **fields)


def variables(mixer, seed=0):
    """Parameters with every gate away from where it begins."""
    draw = jax.jit(mixer.init)(jax.random.key(seed), jnp.zeros((1, 1, D)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: np.asarray(p + 0.3 * rng.normal(size=p.shape), "float32"), draw)


def written_out(p, x_BTD, step):
    """A matrix that learns token by token, with momentum and decay; the convolution is one wide."""
    qkv_BTHE = (x_BTD @ p["qkv"]["kernel"] * p["conv"][0]).reshape(*x_BTD.shape[:2], H, 2 * K + V)
    qkv_BTHE = qkv_BTHE * sigmoid(qkv_BTHE)
    q, k, v = np.split(qkv_BTHE, [K, 2 * K], axis=-1)
    q, k = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (q, k))
    theta, eta, alpha = np.split(sigmoid(x_BTD @ p["gates"]["kernel"] + p["gates"]["bias"]), 3, axis=-1)
    y_BTHV = np.zeros_like(v)
    for b, h in np.ndindex(B, H):
        W_VK, S_VK = np.float64(p["memory_0"][h]), np.zeros((V, K))
        for t in range(T):
            error_V = W_VK @ k[b, t, h] - v[b, t, h]
            S_VK = eta[b, t, h] * S_VK - step * (1 - eta[b, t, h]) * theta[b, t, h] * np.outer(error_V, k[b, t, h])
            W_VK = (1 - alpha[b, t, h]) * W_VK + S_VK
            y_BTHV[b, t, h] = W_VK @ q[b, t, h]
    gate_BTHV = np.einsum("btd,dhv->bthv", x_BTD, p["gate"]["kernel"])
    y_BTHV = y_BTHV / np.sqrt(np.mean(y_BTHV**2, axis=-1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    return np.einsum("bthv,hvd->btd", y_BTHV * gate_BTHV * sigmoid(gate_BTHV), p["out"]["kernel"])


def test_a_matrix_at_chunk_1_is_the_recurrence_written_out():
    mixer = make(depth=1, chunk=1, persistent=0, conv_width=1, step=0.7)
    p = variables(mixer)
    x_BTD = np.random.default_rng(1).normal(size=(B, T, D)).astype("float32")
    y_BTD, _ = jax.jit(mixer.apply)(p, x_BTD)
    np.testing.assert_allclose(y_BTD, written_out(p["params"], np.float64(x_BTD), 0.7), atol=3e-4)


@pytest.mark.long
def test_persistent_tokens_are_read_before_all_else():
    """The memory begins with the weights that it has after them."""
    mixer, without = make(persistent=3, chunk=2), make(persistent=0, chunk=2)
    p = variables(mixer)["params"]
    tokens_ND = p.pop("persistent")
    _, read = jax.jit(without.apply)({"params": p}, tokens_ND[None])
    p_after = p | {f"memory_{n}": p[f"memory_{n}"] + np.asarray(A[0]) for n, A in read.memory.A.items()}
    x_BTD = np.random.default_rng(2).normal(size=(B, T, D)).astype("float32")
    y_BTD, _ = jax.jit(mixer.apply)({"params": p | {"persistent": tokens_ND}}, x_BTD)
    want_BTD, _ = jax.jit(without.apply)({"params": p_after}, x_BTD)
    np.testing.assert_allclose(y_BTD, want_BTD, atol=1e-5)
    assert np.abs(y_BTD - jax.jit(without.apply)({"params": p}, x_BTD)[0]).max() > 1e-3


@pytest.mark.long
def test_one_token_again_and_again_does_not_blow_up():
    """Whatever the momentum: gradients that are a chunk old all point the same way, and add up."""
    mixer = make(chunk=8)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    x_1TD = np.repeat(np.random.default_rng(3).normal(size=(1, 1, D)), 2048, axis=1).astype("float32")
    run = jax.jit(lambda eta: mixer.apply(with_momentum(p, eta), x_1TD)[1].memory.A)
    for eta in (0.5, 0.9, 0.99):
        assert all(np.abs(A).max() < 10 for A in run(eta).values())


def with_momentum(p, eta):
    gates = p["params"]["gates"]
    bias = gates["bias"].at[:H].set(9.0).at[H : 2 * H].set(jnp.log(eta / (1 - eta)))  # theta as large as it gets
    return {"params": p["params"] | {"gates": gates | {"bias": bias}}}


def test_begins_with_half_its_momentum_and_forgets_a_hundredth():
    theta_H, eta_H, alpha_H = np.split(sigmoid(np.float64(bias(None, (3 * H,)))), 3)
    np.testing.assert_allclose([theta_H, eta_H, alpha_H], np.array([[0.5], [0.5], [0.01]]) * np.ones(H), rtol=1e-6)
    mixer = memzoo.make("titans", width=64, heads=2)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    for n, fan_in in (("memory_0", 32), ("memory_1", 64)):  # 2 x 2,048 numbers
        np.testing.assert_allclose(np.std(p[n]), fan_in**-0.5, rtol=0.1)


def test_bad_fields_are_named():
    for match, fields in {
        "width: expected a positive multiple of heads = 4": {"width": 6},
        "depth: expected an integer >= 1, got 0": {"width": 8, "depth": 0},
        "chunk: expected an integer >= 1, got 0": {"width": 8, "chunk": 0},
        "persistent: expected an integer >= 0, got -1": {"width": 8, "persistent": -1},
        "step: expected None or a finite number > 0, got 0": {"width": 8, "step": 0},
        "step: expected None or a finite number > 0, got inf": {"width": 8, "step": np.inf},
        "step: expected None or a finite number > 0, got 'a'": {"width": 8, "step": "a"},
    }.items():
        with pytest.raises(ValueError, match=match):
            memzoo.make("titans", **fields).initial_state(1)
