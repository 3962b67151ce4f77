"""Facts of the Mamba paper, arXiv:2312.00752, and of its mimetic initialisation, arXiv:2410.11135."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import mamba
from tests.initial import begins_as_in_torch

s6 = jax.jit(mamba.s6, static_argnums=8)


def softplus(x):
    return np.log1p(np.exp(np.float64(x)))


def silu(x):
    return x / (1 + np.exp(-x))


def in_numpy(p, x):
    """The whole layer for one sequence x_TD in float64, token by token, as the paper's figure 3 has it."""
    p = jax.tree.map(np.float64, p["params"])
    A, W = -np.exp(p["A_log"]), len(p["conv"])
    h, ys, past = np.zeros_like(A), [], np.zeros_like(p["conv"])
    for t in range(len(x)):
        u, z = np.split(x[t] @ p["in"]["kernel"], 2)
        past = np.concatenate([past[1:], u[None]])
        u = silu(sum(past[w] * p["conv"][w] for w in range(W)) + p["conv_bias"])
        dt = softplus(u @ p["dt_low"]["kernel"] @ p["dt"]["kernel"] + p["dt"]["bias"])
        for n in range(len(A)):
            h[n] = np.exp(dt * A[n]) * h[n] + dt * (u @ p["B"][:, n]) * u
        y = (u @ p["C"]) @ h + p["D"] * u
        ys.append(y * silu(z) @ p["out"]["kernel"])
    return np.array(ys)


@pytest.mark.parametrize("initialisation", ["default", "mimetic"])
@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
@pytest.mark.cases(1)
def test_is_the_layer_of_the_paper(impl, initialisation):
    mixer = memzoo.make("mamba", width=6, state_size=3, dt_rank=2, initialisation=initialisation, impl=impl)
    x_BTD = jax.random.normal(jax.random.key(1), (1, 70, 6))
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    y_BTD, _ = jax.jit(mixer.apply)(params, x_BTD)
    np.testing.assert_allclose(y_BTD[0], in_numpy(params, np.float64(x_BTD[0])), rtol=1e-4, atol=1e-5)


def test_with_one_state_it_is_a_gated_rnn():
    """Theorem 1. N = 1, A = -1, B = C = 1: h_t = (1 - g_t) h_{t-1} + dt_t x_t, g_t = 1 - exp(-dt_t) = sigmoid(a_t)."""
    rng = np.random.default_rng(0)
    a, x = rng.normal(size=(1, 50, 3)), rng.normal(size=(1, 50, 3))
    gate, h = 1 / (1 + np.exp(-a)), np.zeros(3)
    ones = jnp.ones((1, 50, 1))
    u = gate / softplus(a) * x  # the exact input matrix, g_t, in place of the code's dt_t
    y_BTE, _ = s6(
        *map(jnp.asarray, (u, softplus(a))), -jnp.ones((1, 3)), ones, ones, jnp.zeros(3), jnp.zeros((1, 1, 3)), None
    )
    for t in range(50):
        h = (1 - gate[0, t]) * h + gate[0, t] * x[0, t]
        np.testing.assert_allclose(y_BTE[0, t], h, atol=1e-5)


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def test_initial_steps_and_decays():
    """A = -1 .. -N in every channel, and dt near log-uniform [1e-3, 1e-1]: memories of 1 / (N dt) to 1000 tokens."""
    mixer = memzoo.make("mamba", width=1000, state_size=5, dt_rank=1)
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 1000)))["params"]
    np.testing.assert_allclose(np.exp(params["A_log"]), np.arange(1, 6)[:, None] * np.ones(2000), rtol=1e-5)
    log_dt = np.log(softplus(params["dt"]["bias"]))
    assert distance_from_uniform((log_dt - np.log(1e-3)) / np.log(100)) < 0.04
    assert np.all(params["D"] == 1)


def attention_map(params, x_BTD, T):
    """d y_t / d u_s of the scan at fixed dt, B and C, for one channel: [T, T]."""
    p = params["params"]
    E = p["D"].size
    u = silu(np.float64(x_BTD[0] @ p["in"]["kernel"][:, :E]))  # at mimetic's identity convolution
    B, C = (jnp.asarray(u @ np.float64(p[name]), jnp.float32)[None] for name in ("B", "C"))
    dt = jnp.asarray(softplus(u @ np.float64(p["dt_low"]["kernel"] @ p["dt"]["kernel"]) + np.float64(p["dt"]["bias"])))
    A, D = -jnp.exp(p["A_log"]), jnp.zeros(E)
    impulse = jnp.zeros((T, T, E)).at[jnp.arange(T), jnp.arange(T), 0].set(1)  # a row of the batch for each s
    tile = lambda z: jnp.tile(jnp.asarray(z, jnp.float32), (T, 1, 1))
    y_STE, _ = s6(impulse, tile(dt[None]), A, tile(B), tile(C), D, jnp.zeros((T, *A.shape)), None)
    return np.asarray(y_STE[:, :, 0]).T, np.asarray(C[0] @ B[0].T)


@pytest.mark.long
def test_mimetic_is_causal_linear_attention_that_looks_for_like_tokens():
    """M_ts = C_t . B_s for s <= t; and among eight random tokens it is the same one that it looks at most."""
    T, D = 64, 64
    mixer = memzoo.make("mamba", width=D, state_size=32, initialisation="mimetic")
    tokens = np.random.default_rng(0).integers(0, 8, T)
    x_BTD = jax.random.normal(jax.random.key(1), (8, D))[tokens][None]
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    got, scores = attention_map(params, x_BTD, T)
    error = np.abs(got - np.tril(scores)).max() / np.abs(scores).max()
    assert error < 0.03  # what A = -exp(-8) forgets in 64 tokens
    same = tokens[:, None] == tokens[None, :]
    assert scores[same].mean() > 3 * np.abs(scores[~same]).mean()

    default = memzoo.make("mamba", width=D, state_size=32)
    plain = jax.jit(default.init)(jax.random.key(0), x_BTD)["params"]
    correlation = lambda p: np.corrcoef(np.ravel(p["B"]), np.ravel(p["C"]))[0, 1]
    assert abs(correlation(plain)) < 0.1
    assert 0.6 < correlation(params["params"]) < 0.8  # 1 / sqrt(2), and not 1


def test_initial_weights_are_those_of_the_released_code():
    """The defaults of torch's Linear and Conv1d, and dt's own, of the standard deviation (3 fan_in)^-1/2."""
    mixer = memzoo.make("mamba", width=48)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 48)))["params"]
    W, R = len(p["conv"]), p["dt"]["kernel"].shape[0]
    assert begins_as_in_torch(p["in"]["kernel"], 48) and begins_as_in_torch(p["out"]["kernel"], 96)
    assert all(begins_as_in_torch(weight, 96) for weight in (p["dt_low"]["kernel"], p["B"], p["C"]))
    assert begins_as_in_torch(p["conv"], W) and begins_as_in_torch(p["conv_bias"], W)
    assert (W, R) == (4, 3) and begins_as_in_torch(p["dt"]["kernel"], R)
    np.testing.assert_allclose(np.std(p["in"]["kernel"]), (3 * 48) ** -0.5, rtol=0.03)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="initialisation: expected 'default' or 'mimetic', got 'mimtic'"):
        memzoo.make("mamba", width=4, initialisation="mimtic")
    with pytest.raises(ValueError, match="dt_rank: expected an integer >= 1, got 0"):
        memzoo.make("mamba", width=4, dt_rank=0)
    assert memzoo.make("mamba", width=100).sizes() == (200, 16, 7, 3)
    with pytest.raises(ValueError, match="conv_width: expected an integer >= 1, got 0"):
        memzoo.make("mamba", width=4, conv_width=0)
