"""The LSTM is flax's OptimizedLSTMCell, its cell is an error carousel, and newton is scan.

Dims: B batch, T time, D width, F hidden.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import lstm

B, T, D, F = 2, 7, 3, 4
OFF, ON = -1e4, 1e4  # of a gate, exactly


def parameters(**fields):
    mixer = memzoo.make("lstm", width=D, hidden=F, **fields)
    x_BTD = np.random.default_rng(0).normal(size=(B, T, D)).astype(fields.get("dtype", "float32"))
    return mixer, mixer.init(jax.random.key(0), x_BTD)["params"], x_BTD


def gates(i, f, g, o):
    """Preactivations [B, T, 4 F], the same for every unit and token."""
    return jnp.tile(jnp.repeat(jnp.array([i, f, g, o], jnp.float32), F), (B, T, 1))


@pytest.mark.long
def test_equals_the_cell_of_flax():
    mixer, params, x_BTD = parameters()
    params["in"]["bias"] = jax.random.normal(jax.random.key(1), (4 * F,))
    h_BF, c_BF = jax.random.normal(jax.random.key(2), (2, B, F))
    y_BTD, state = mixer.apply({"params": params}, x_BTD, lstm.State(h_BF, c_BF))

    of_flax = {}
    for n, gate in enumerate("ifgo"):
        own = slice(n * F, (n + 1) * F)
        of_flax[f"i{gate}"] = {"kernel": params["in"]["kernel"][:, own]}
        of_flax[f"h{gate}"] = {"kernel": params["recurrent"][:, own], "bias": params["in"]["bias"][own]}
    rnn = nn.RNN(nn.OptimizedLSTMCell(F), return_carry=True)
    (c_BF, h_BF), h_BTF = rnn.apply({"params": {"cell": of_flax}}, x_BTD, initial_carry=(c_BF, h_BF))
    np.testing.assert_allclose(y_BTD, h_BTF @ params["out"]["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.h_BF, h_BF, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.c_BF, c_BF, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_constant_error_carousel(impl):
    """With the input gate shut and the forget gate open the cell keeps its content to the bit, and its error too."""
    U_FE = jax.random.normal(jax.random.key(0), (F, 4 * F))
    h_BF, c_BF = jax.random.normal(jax.random.key(1), (2, B, F))

    def last(c_BF):
        return lstm.lstm(gates(OFF, ON, 0, 0), U_FE, lstm.State(h_BF, c_BF), impl=impl)[1].c_BF

    kept_BF, pull = jax.vjp(last, c_BF)
    np.testing.assert_array_equal(kept_BF, c_BF)
    np.testing.assert_array_equal(pull(h_BF)[0], h_BF)


def test_an_open_cell_counts():
    """Gates open and g = 1: c_T = T. A forget gate that shuts makes it c_T = 1, whatever came before."""
    U_FE, state = jnp.zeros((F, 4 * F)), lstm.State(jnp.ones((B, F)), jnp.zeros((B, F)))
    assert (lstm.lstm(gates(ON, ON, ON, ON), U_FE, state)[1].c_BF == T).all()
    assert (lstm.lstm(gates(ON, OFF, ON, ON), U_FE, state)[1].c_BF == 1).all()


def test_initial_parameters():
    """Forget bias 1, all others 0; each gate's recurrent kernel is orthogonal."""
    _, params, _ = parameters()
    np.testing.assert_array_equal(params["in"]["bias"], np.repeat([0, 1, 0, 0], F))
    kernels = np.split(params["recurrent"], 4, axis=1)
    for U_FF in kernels:
        np.testing.assert_allclose(U_FF.T @ U_FF, np.eye(F), atol=1e-6)
    assert not np.allclose(kernels[0], kernels[1])


@pytest.mark.long
@pytest.mark.parametrize("jacobian", ["full", "diagonal"])
def test_newton_equals_scan(jacobian):
    with jax.enable_x64(True):
        wide = {"dtype": "float64", "param_dtype": "float64"}
        _, params, x_BTD = parameters(**wide)
        reset_BT = np.zeros((B, T), bool)
        reset_BT[0, 3:5] = reset_BT[1, -1] = True

        def form(impl):
            mixer = memzoo.make("lstm", width=D, hidden=F, impl=impl, jacobian=jacobian, **wide)

            def loss(params, x_BTD):
                y_BTD, state = mixer.apply({"params": params}, x_BTD, None, reset_BT)
                return jnp.sum(jnp.sin(y_BTD)) + sum(map(jnp.sum, state)), (y_BTD, state)

            return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x_BTD))

        for got, want in zip(form("newton"), form("scan"), strict=True):
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_hidden_must_be_positive():
    with pytest.raises(ValueError, match="hidden: expected an integer >= 1, got 0"):
        memzoo.make("lstm", width=D, hidden=0).initial_state(B)
