"""The GRU is flax's GRUCell, a shut update gate keeps the state to the bit, and newton is scan.

Dims: B batch, T time, D width, F hidden.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import gru

B, T, D, F = 2, 7, 3, 4
OFF, ON = -1e4, 1e4  # of a gate, exactly


def parameters(**fields):
    mixer = memzoo.make("gru", width=D, hidden=F, **fields)
    x_BTD = np.random.default_rng(0).normal(size=(B, T, D)).astype(fields.get("dtype", "float32"))
    return mixer, mixer.init(jax.random.key(0), x_BTD)["params"], x_BTD


def biased(params, r, z):
    """The parameters with gates that the biases alone decide, each for all units."""
    return params | {"in": params["in"] | {"bias": jnp.repeat(jnp.array([r, z, 0.0]), F)}}


def test_equals_the_cell_of_flax():
    mixer, params, x_BTD = parameters()
    params["in"]["bias"] = jax.random.normal(jax.random.key(1), (3 * F,))
    params["recurrent_bias"] = jax.random.normal(jax.random.key(2), (F,))
    h_BF = jax.random.normal(jax.random.key(3), (B, F))
    y_BTD, state = mixer.apply({"params": params}, x_BTD, gru.State(h_BF))

    of_flax = {}
    for n, gate in enumerate("rzn"):
        own = slice(n * F, (n + 1) * F)
        of_flax[f"i{gate}"] = {"kernel": params["in"]["kernel"][:, own], "bias": params["in"]["bias"][own]}
        of_flax[f"h{gate}"] = {"kernel": params["recurrent"][:, own]}
    of_flax["hn"]["bias"] = params["recurrent_bias"]
    rnn = nn.RNN(nn.GRUCell(F), return_carry=True)
    h_BF, h_BTF = rnn.apply({"params": {"cell": of_flax}}, x_BTD, initial_carry=h_BF)
    np.testing.assert_allclose(y_BTD, h_BTF @ params["out"]["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.h_BF, h_BF, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_update_gate_one_keeps_the_state(impl):
    """To the bit, and its gradient too."""
    mixer, params, x_BTD = parameters(impl=impl)
    h_BF, dh_BF = jax.random.normal(jax.random.key(1), (2, B, F))
    variables = {"params": biased(params, r=0, z=ON)}
    kept_BF, pull = jax.vjp(lambda h_BF: mixer.apply(variables, x_BTD, gru.State(h_BF))[1].h_BF, h_BF)
    np.testing.assert_array_equal(kept_BF, h_BF)
    np.testing.assert_array_equal(pull(dh_BF)[0], dh_BF)


def test_both_gates_zero_forget_the_state():
    """h_t = tanh(W x_t), of whatever came before."""
    mixer, params, x_BTD = parameters()
    state = gru.State(jnp.ones((B, F)))
    y_BTD, _ = mixer.apply({"params": biased(params, r=OFF, z=OFF)}, x_BTD, state)
    want_BTD = np.tanh(x_BTD @ params["in"]["kernel"][:, 2 * F :]) @ params["out"]["kernel"]
    np.testing.assert_allclose(y_BTD, want_BTD, rtol=1e-5, atol=1e-6)


def test_initial_recurrent_kernels_are_orthogonal():
    _, params, _ = parameters()
    kernels = np.split(params["recurrent"], 3, axis=1)
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
            mixer = memzoo.make("gru", width=D, hidden=F, impl=impl, jacobian=jacobian, **wide)

            def loss(params, x_BTD):
                y_BTD, state = mixer.apply({"params": params}, x_BTD, None, reset_BT)
                return jnp.sum(jnp.sin(y_BTD)) + sum(map(jnp.sum, state)), (y_BTD, state)

            return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x_BTD))

        for got, want in zip(form("newton"), form("scan"), strict=True):
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_hidden_must_be_positive():
    with pytest.raises(ValueError, match="hidden: expected an integer >= 1, got 0"):
        memzoo.make("gru", width=D, hidden=0).initial_state(B)
