"""The Elman network is flax's SimpleCell, its gradient is a product of Jacobians, and the IRNN keeps what it holds.

Dims: B batch, T time, D width, F hidden.
"""

import flax.linen as nn
import jax
import numpy as np
import pytest

import memzoo
from memzoo.mixers import elman

B, T, D, F = 2, 60, 3, 4


def parameters(**fields):
    mixer = memzoo.make("elman", width=D, hidden=F, **fields)
    x_BTD = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    return mixer, jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"], x_BTD


def test_equals_the_cell_of_flax():
    mixer, params, x_BTD = parameters()
    rng = np.random.default_rng(1)
    params["in"]["bias"], h_BF = rng.normal(size=F).astype(np.float32), rng.normal(size=(B, F)).astype(np.float32)
    y_BTD, state = jax.jit(mixer.apply)({"params": params}, x_BTD, elman.State(h_BF))
    rnn = nn.RNN(nn.SimpleCell(F), return_carry=True)
    cell = {"i": params["in"], "h": {"kernel": params["recurrent"]}}
    h_BF, h_BTF = jax.jit(lambda p, x, h: rnn.apply(p, x, initial_carry=h))({"params": {"cell": cell}}, x_BTD, h_BF)
    np.testing.assert_allclose(y_BTD, np.asarray(h_BTF) @ np.asarray(params["out"]["kernel"]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.h_BF, h_BF, rtol=1e-4, atol=1e-5)


def through_time(mixer):
    """(params, x, h, dh) -> the last state, and what an error dh in it is worth in the state h at the start."""

    def run(params, x_BTD, h_BF, dh_BF):
        last = lambda h_BF: mixer.apply({"params": params}, x_BTD, elman.State(h_BF))[1].h_BF
        h_BF, pull = jax.vjp(last, h_BF)
        return h_BF, pull(dh_BF)[0]

    return jax.jit(run)


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_errors_vanish_or_explode_with_the_recurrent_kernel(impl):
    """At rest all Jacobians are U: T tokens back an error has |U|^T times its length, 1 as U begins."""
    mixer, params, x_BTD = parameters(impl=impl)
    run, rest_BF = through_time(mixer), np.zeros((B, F), np.float32)
    dh_BF = np.random.default_rng(1).normal(size=(B, F)).astype(np.float32)
    for gain in (0.8, 1, 1.2):
        scaled = params | {"recurrent": np.float32(gain) * params["recurrent"]}
        h_BF, back_BF = run(scaled, np.zeros_like(x_BTD), rest_BF, dh_BF)
        np.testing.assert_array_equal(h_BF, 0)
        ratio_B = np.linalg.norm(back_BF, axis=1) / np.linalg.norm(dh_BF, axis=1)
        np.testing.assert_allclose(ratio_B, gain**T, rtol=1e-4)


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_the_irnn_begins_as_memory(impl):
    """It keeps any state >= 0 to the bit where nothing comes in, and the error in it."""
    mixer, params, x_BTD = parameters(activation="relu", impl=impl)
    h_BF, dh_BF = np.random.default_rng(1).uniform(0.1, 1, size=(2, B, F)).astype(np.float32)
    kept_BF, back_BF = through_time(mixer)(params, np.zeros_like(x_BTD), h_BF, dh_BF)
    np.testing.assert_array_equal(kept_BF, h_BF)
    np.testing.assert_array_equal(back_BF, dh_BF)


def test_initial_recurrent_kernel_is_orthogonal():
    U_GF = np.asarray(parameters()[1]["recurrent"])
    np.testing.assert_allclose(U_GF.T @ U_GF, np.eye(F), atol=1e-6)
    assert np.abs(U_GF - np.eye(F)).max() > 0.1


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"activation: expected 'tanh' or 'relu', got 'tan'; did you mean tanh\?"):
        memzoo.make("elman", width=D, activation="tan").initial_state(B)
