"""Facts of the Griffin paper, arXiv:2402.19427."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import rg_lru


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_the_block_token_by_token():
    """Fig. 2c and sec. 2.4, in a plain loop; two blocks of 3 in the gates."""
    T, D, F, H, K = 20, 4, 6, 2, 3
    mixer = memzoo.make("rg_lru", width=D, hidden=F, heads=H, impl="scan")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((T, D))
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    params = jax.tree.map(lambda p: p + jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), params)
    p = jax.tree.map(np.float64, params["params"])

    u = x @ p["in"]["kernel"] + p["in"]["bias"]
    expected, h = np.zeros((T, D)), np.zeros(F)
    for t in range(T):
        c = p["conv_bias"] + sum(p["conv"][3 - lag] * u[t - lag] for lag in range(4) if t >= lag)
        r, i = (
            sigmoid(np.concatenate([c[K * b : K * b + K] @ p[name][b] for b in range(H)]) + p[name + "_bias"])
            for name in ("recurrence_gate", "input_gate")
        )
        a = sigmoid(p["Lambda"]) ** (8 * r)
        h = a * h + np.sqrt(1 - a**2) * (i * c)
        merged = h * gelu(x[t] @ p["gate"]["kernel"] + p["gate"]["bias"])
        expected[t] = merged @ p["out"]["kernel"] + p["out"]["bias"]
    y, state = jax.jit(mixer.apply)(params, jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(y[0], expected, atol=1e-5)
    np.testing.assert_allclose(state.h_BF[0], h, atol=1e-5)


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def test_decays_begin_uniform():
    mixer = memzoo.make("rg_lru", width=1, hidden=4000, heads=4000)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 1)))["params"]
    slowest = sigmoid(np.float64(p["Lambda"])) ** 8  # a^c, the decay of an open recurrence gate
    assert distance_from_uniform((slowest - 0.9) / 0.099) < 0.03


@pytest.mark.parametrize("heads", [1, 4])
def test_gates_begin_with_unit_variance(heads):
    """LeCun's, by block."""
    mixer = memzoo.make("rg_lru", width=1, hidden=128, heads=heads)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 1)))["params"]
    np.testing.assert_allclose(np.var(p["input_gate"]), heads / 128, rtol=0.05)


def test_white_noise_comes_out_as_loud_as_it_went_in():
    """a_t^2 + sqrt(1 - a_t^2)^2 = 1, whatever the recurrence gate does: E h^2 = E u^2 once the start is forgotten."""
    T, F = 4000, 5
    r_key, u_key = jax.random.split(jax.random.key(0))
    r, u = jax.random.uniform(r_key, (1, T, F)), jax.random.normal(u_key, (1, T, F))
    log_a = jnp.log(jnp.asarray([0.5, 0.8, 0.9, 0.95, 0.97]))
    h, _ = jax.jit(rg_lru.rg_lru)(u, r, jnp.ones_like(r), log_a, jnp.zeros((1, F)), None)
    np.testing.assert_allclose(np.mean(np.square(h[0, 100:]), 0), np.ones(F), rtol=0.2)


def test_a_closed_recurrence_gate_keeps_the_state():
    h = jnp.asarray([[1.0, -2.0]])
    nothing, u = jnp.zeros((1, 9, 2)), jnp.ones((1, 9, 2))
    out, last = rg_lru.rg_lru(u, nothing, u, jnp.asarray([-0.1, -0.5]), h, None)
    np.testing.assert_array_equal(last, h)
    np.testing.assert_array_equal(out, np.broadcast_to(h[:, None], (1, 9, 2)))


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
def test_gradients_where_the_decay_rounds_to_1(impl):
    """Near a = 1 the square root is steep, yet what Lambda and the gate see of it vanishes with it."""

    def loss(Lambda, before_gate):
        r = jax.nn.sigmoid(before_gate) * jnp.ones((1, 5, 1))
        u = jnp.ones((1, 5, 1))
        return jnp.sum(rg_lru.rg_lru(u, r, u, jax.nn.log_sigmoid(Lambda), jnp.zeros((1, 1)), None, impl)[1])

    def gradient(Lambda, before_gate):
        return [float(jnp.sum(g)) for g in both(jnp.asarray([Lambda]), jnp.float32(before_gate))]

    both = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for Lambda, before_gate in [(200.0, 0.0), (2.0, -200.0), (2.0, 200.0)]:
        assert np.isfinite(gradient(Lambda, before_gate)).all()
    # Where a is nearly 1, 1 - a^2 is 16 r / e^Lambda, and the 5 tokens add up undecayed.
    total = 5 * math.sqrt(16 * 0.5) * math.exp(-60 / 2)
    np.testing.assert_allclose(gradient(60.0, 0.0), [-total / 2, total / 4], rtol=1e-4)


def test_default_heads_divide_and_others_are_refused():
    assert [memzoo.make("rg_lru", width=width).sizes()[1] for width in (256, 12, 5)] == [16, 4, 1]
    with pytest.raises(ValueError, match="width: expected a positive multiple of heads = 5, got 12"):
        memzoo.make("rg_lru", width=12, heads=5)
    with pytest.raises(ValueError, match="conv_width"):
        memzoo.make("rg_lru", width=12, conv_width=0)
