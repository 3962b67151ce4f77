"""TTT-Linear: mini-batch gradient descent written out, and how it begins.

Dims: B batch, T time, D width, H heads, K head, C mini-batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import ttt_linear

B, T, D, H, K, C = 2, 9, 6, 3, 4, 4


def standard(z):
    return (z - z.mean()) / np.sqrt(z.var() + 1e-6)


def pull(z, dy):
    """The gradient of `standard`, by hand."""
    y = standard(z)
    return (dy - dy.mean() - y * (dy * y).mean()) / np.sqrt(z.var() + 1e-6)


def rotate(x_K, place):
    angle = place * 10_000.0 ** (-np.arange(K // 2) / (K // 2))
    even, odd = x_K[0::2], x_K[1::2]
    turned = np.stack([even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], 1)
    return turned.reshape(K)


def written_out(p, x_BTD):
    y_BTE = np.zeros((B, T, H * K))
    for b, h in np.ndindex(B, H):
        W, bias, scale, shift = p["W"][h], p["b"][h, :, 0], p["norm_scale"][h], p["norm_bias"][h]
        for t in range(T):
            if t % C == 0:
                W_start, bias_start = W, bias
            q, k, v = np.split(x_BTD[b, t] @ p["qkv"]["kernel"][:, h], 3)
            q, k = rotate(q, t % C), rotate(k, t % C)
            theta = 0.7 / K / (1 + np.exp(-(x_BTD[b, t] @ p["theta"]["kernel"] + p["theta"]["bias"])[h]))
            z = W_start @ k + bias_start
            dz = pull(z, (k + standard(z) * scale + shift - v) * scale)
            W, bias = W - theta * np.outer(dz, k), bias - theta * dz
            y_BTE[b, t, h * K : (h + 1) * K] = q + standard(W @ q + bias) * scale + shift
    y_BTE = (y_BTE - y_BTE.mean(-1, keepdims=True)) / np.sqrt(y_BTE.var(-1, keepdims=True) + 1e-6)
    return (y_BTE * p["norm"]["scale"] + p["norm"]["bias"]) @ p["out"]["kernel"]


def test_is_mini_batch_gradient_descent_written_out():
    mixer = memzoo.make("ttt_linear", width=D, heads=H, head_dim=K, chunk=C, step=0.7)
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(B, T, D)).astype("float32")
    p = jax.jit(mixer.init)(jax.random.key(0), x_BTD[:, :1])
    p = jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), p)
    y_BTD, state = jax.jit(mixer.apply)(p, x_BTD)
    np.testing.assert_allclose(y_BTD, written_out(jax.tree.map(np.float64, p["params"]), x_BTD), atol=2e-5)
    assert state.memory.place_B.tolist() == [T % C] * B


def test_begins_near_the_identity():
    """Weights of standard deviation 0.02, no biases, and LN that changes nothing."""
    mixer = memzoo.make("ttt_linear", width=64, heads=2)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    np.testing.assert_allclose(np.std(p["W"]), 0.02, rtol=0.05)  # 2,048 numbers
    np.testing.assert_allclose(np.std(p["theta"]["kernel"]), 0.02, rtol=0.3)
    assert not np.any(p["b"]) and not np.any(p["norm_bias"]) and np.all(p["norm_scale"] == 1)
    z_TK = np.random.default_rng(0).normal(3, 5, (7, 8))
    np.testing.assert_allclose(ttt_linear.standard(z_TK), [standard(z_K) for z_K in z_TK], atol=1e-5)


def test_bad_fields_are_named():
    for match, fields in {
        "width: expected a positive multiple of heads = 4": {"width": 6},
        "head_dim: expected a positive multiple of .*2, got 3": {"width": 12, "head_dim": 3},
        "chunk: expected an integer >= 1, got 0": {"width": 8, "chunk": 0},
        "step: expected a number > 0, got 0": {"width": 8, "step": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            memzoo.make("ttt_linear", **fields)
