"""TTT-MLP: its first step is down the slope of its loss, it learns what is repeated, and how it begins.

Dims: T time, D width, H heads, K head.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import ttt_mlp

D, H, K = 6, 3, 4


def parameters(mixer, spread=0.3):
    rng = np.random.default_rng(0)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    return jax.tree.map(lambda p: np.float32(p + spread * rng.normal(size=p.shape)), p)


def reconstruction(p, W, h, k_K, v_K):
    """The loss of one token of one head, in numpy."""
    hidden = W["W1"][h] @ k_K + W["b1"][h, :, 0]
    hidden = hidden * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    z_K = W["W2"][h] @ hidden + W["b2"][h, :, 0]
    z_K = (z_K - z_K.mean()) / np.sqrt(z_K.var() + 1e-6)
    return np.sum((k_K + z_K * p["norm_scale"][h] + p["norm_bias"][h] - v_K) ** 2) / 2


@pytest.mark.long
def test_the_first_step_is_down_the_slope_of_its_loss():
    """Against the difference quotient along a direction, in float64; the first place is not rotated."""
    with jax.enable_x64(True):
        mixer = memzoo.make("ttt_mlp", width=D, heads=H, head_dim=K, expansion=2, dtype=jnp.float64)
        p = jax.tree.map(np.float64, parameters(memzoo.make("ttt_mlp", width=D, heads=H, head_dim=K, expansion=2)))
        x_11D = np.random.default_rng(1).normal(size=(1, 1, D))
        _, state = jax.jit(mixer.apply)(p, x_11D)
    p = p["params"]
    rng = np.random.default_rng(2)
    W = {name: p[name] for name in ("W1", "b1", "W2", "b2")}
    along = {name: rng.normal(size=w.shape) for name, w in W.items()}
    theta_H = 0.1 / K / (1 + np.exp(-(x_11D[0, 0] @ p["theta"]["kernel"] + p["theta"]["bias"])))
    for h in range(H):
        _, k_K, v_K = np.split(x_11D[0, 0] @ p["qkv"]["kernel"][:, h], 3)
        moved = lambda eps, h=h: {name: W[name] + eps * along[name] for name in W}
        slope = (reconstruction(p, moved(1e-5), h, k_K, v_K) - reconstruction(p, moved(-1e-5), h, k_K, v_K)) / 2e-5
        step = sum(np.vdot(state.memory.A[name][0, h], along[name][h]) for name in W)
        np.testing.assert_allclose(step, -theta_H[h] * slope, rtol=1e-6)


@pytest.mark.long
def test_learns_what_is_repeated():
    """With mini-batches of one token, the same token 40 times is reconstructed ever better."""
    mixer = memzoo.make("ttt_mlp", width=D, heads=H, head_dim=K, chunk=1, step=0.2)
    p = parameters(mixer)
    x_1TD = np.repeat(np.random.default_rng(1).normal(size=(1, 1, D)), 40, axis=1).astype("float32")
    apply = jax.jit(lambda x_1TD: mixer.apply(p, x_1TD)[1].memory.A)
    losses, params = [], p["params"]
    for length in (1, 10, 40):
        A = apply(x_1TD[:, :length])
        W = {name: params[name] + np.asarray(A[name][0]) for name in A}
        views = [np.split(x_1TD[0, 0] @ params["qkv"]["kernel"][:, h], 3) for h in range(H)]
        losses.append(sum(reconstruction(params, W, h, k_K, v_K) for h, (_, k_K, v_K) in enumerate(views)))
    assert losses[0] > losses[1] > losses[2]


def test_begins_near_the_identity():
    mixer = memzoo.make("ttt_mlp", width=32, heads=2)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 32)))["params"]
    np.testing.assert_allclose([np.std(p["W1"]), np.std(p["W2"])], 0.02, rtol=0.06)  # 2,048 numbers each
    assert p["W1"].shape == (2, 64, 16) and not np.any(p["b1"]) and not np.any(p["b2"])
    z_TK = np.random.default_rng(0).normal(3, 5, (7, 8))
    want_TK = (z_TK - z_TK.mean(1, keepdims=True)) / np.sqrt(z_TK.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(ttt_mlp.standard(z_TK), want_TK, atol=1e-5)


def test_bad_fields_are_named():
    for match, fields in {
        "expansion: expected an integer >= 1, got 0": {"width": 8, "expansion": 0},
        "head_dim: expected a positive multiple of .*2, got 3": {"width": 12, "head_dim": 3},
        "step: expected a number > 0, got -1": {"width": 8, "step": -1},
    }.items():
        with pytest.raises(ValueError, match=match):
            memzoo.make("ttt_mlp", **fields)
