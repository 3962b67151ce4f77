"""Dot: its recurrence written out with a matrix and with two, the kernel of attention, and how it begins.

Dims: T time, D width, H heads, K key, V value.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers.dot import bias
from tests.miras import sigmoid, unit
from tests.omega import phi, written_out

T, D, H, K, V = 7, 6, 3, 3, 4


def series(degree):
    return [math.exp(-0.5) / math.sqrt(math.factorial(i)) for i in range(degree + 1)]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.cases(1)
def test_is_its_recurrence_written_out(layers):
    sizes = {"width": D, "heads": H, "key_dim": K, "value_dim": V, "memory_layers": layers, "hidden": 5, "degree": 3}
    mixer = memzoo.make("dot", window=3, chunk=4, step=0.3, **sizes)
    rng = np.random.default_rng(0)
    x_1TD = rng.normal(size=(1, T, D)).astype("float32")
    p = jax.jit(mixer.init)(jax.random.key(0), x_1TD[:, :1])["params"]
    p = jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), p)
    y_1TD, _ = jax.jit(mixer.apply)({"params": p}, x_1TD)

    def gates(x):
        theta, gamma, alpha = np.split(sigmoid(x), 3)
        return 0.3 * theta, np.zeros(H), alpha, np.ones(H), gamma

    args = jax.tree.map(np.float64, p), np.float64(x_1TD[0]), (H, K, V), series(3), 3, 4, gates
    np.testing.assert_allclose(y_1TD[0], written_out(*args), atol=1e-5)


def test_its_kernel_nears_that_of_attention():
    q_K, k_K = unit(np.random.default_rng(1).normal(size=(2, K)))
    want, errors = np.exp(q_K @ k_K - 1), []
    for degree in (2, 4, 6):
        errors.append(abs(phi(q_K, series(degree)) @ phi(k_K, series(degree)) - want))
    assert errors[2] < errors[1] < errors[0] and errors[2] < 1e-4


def test_begins_in_the_middle_of_its_gates_and_forgets_a_hundredth():
    want = np.array([[0.5], [0.5], [0.01]]) * np.ones(H)
    np.testing.assert_allclose(np.split(sigmoid(np.float64(bias(None, (3 * H,)))), 3), want, rtol=1e-6)
    mixer = memzoo.make("dot", width=16, heads=2)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 16)))["params"]
    np.testing.assert_allclose(np.std(p["memory_0"]), 45**-0.5, rtol=0.06)  # 1,440 numbers
    assert "features" not in p


def test_bad_fields_are_named():
    for match, fields in {
        "width: expected a positive multiple of heads = 4": {"width": 6},
        "window: expected an integer >= 1, got 0": {"width": 8, "window": 0},
        "degree: expected an integer >= 1, got 0": {"width": 8, "degree": 0},
        "step: expected None or a finite number > 0, got -1": {"width": 8, "step": -1},
    }.items():
        with pytest.raises(ValueError, match=match):
            memzoo.make("dot", **fields).initial_state(1)
