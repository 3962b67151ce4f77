"""Facts of the HiPPO-RNN, arXiv:2008.07669. What its memory holds is tested with ops.hippo_memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import ops

D = 3
FIELDS = {"hidden": 5, "state_size": 4, "signals": 2}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(("measure", "discretisation"), [("legs", "zoh"), ("legs", "bilinear"), ("legt", "zoh")])
def test_is_the_cell_of_the_paper_around_the_memory(measure, discretisation):
    """The gated cell in numpy, which reads the memory of the signals that it wrote so far, each time from the first."""
    fields = FIELDS | {"measure": measure, "discretisation": discretisation, "timescale": 6.0}
    with jax.enable_x64(True):
        mixer = memzoo.make("hippo", width=D, dtype=jnp.float64, param_dtype=jnp.float64, **fields)
        x_BTD = jax.random.normal(jax.random.key(0), (1, 12, D))
        params = jax.jit(mixer.init)(jax.random.key(1), x_BTD)
        params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params)
        y_BTD, state = jax.jit(mixer.apply)(params, x_BTD)
        p = jax.tree.map(np.asarray, params["params"])
        memory = lambda f_TM: ops.hippo_memory(
            jnp.asarray(f_TM)[None], size=4, measure=measure, discretisation=discretisation, timescale=6.0
        )[1][0]
        h, c, f, y = np.zeros(5), np.zeros((2, 4)), [], []
        for x in np.asarray(x_BTD[0]):
            g, n = np.split(x @ p["in"]["kernel"] + p["in"]["bias"] + c.ravel() @ p["recurrent"], 2)
            h = (1 - sigmoid(g)) * h + sigmoid(g) * np.tanh(n)
            f.append(h @ p["signal"] + p["signal_bias"])
            c = np.asarray(memory(np.stack(f)))
            y.append(h @ p["out"]["kernel"])
        np.testing.assert_allclose(y_BTD[0], y, atol=1e-10)
        np.testing.assert_allclose(state.c_BMN[0], c, atol=1e-10)
        assert state.position_B == 12


def test_remembers_a_first_token_at_any_distance():
    """By legs the last output's gradient in the first token falls like 1 / T, by legt it is gone past the window."""
    found = {}
    for measure in ("legs", "legt"):
        mixer = memzoo.make("hippo", width=D, measure=measure, timescale=20.0, hidden=16)
        params = jax.jit(mixer.init)(jax.random.key(1), jnp.zeros((1, 1, D)))
        last = lambda x_BTD, mixer=mixer, params=params: jnp.sum(mixer.apply(params, x_BTD)[0][:, -1])
        found[measure] = [
            float(jnp.linalg.norm(jax.jit(jax.grad(last))(jax.random.normal(jax.random.key(0), (1, T, D)))[0, 0]))
            for T in (40, 160, 640)
        ]
    legs, legt = found["legs"], found["legt"]
    assert legs[2] > legs[0] / 100, "16 times as far, and not much faster than 1 / T"
    assert legt[2] < 1e-6 * legt[0]


def test_initial_distribution():
    """Gates half open; recurrent weights as Glorot and Bengio's; the signal of the size of h."""
    params = memzoo.make("hippo", width=64).init(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    assert params["recurrent"].shape == (64, 128) and params["signal"].shape == (64, 1), "N = F = D, one signal"
    assert abs(float(jnp.std(params["recurrent"])) - (2 / 192) ** 0.5) < 0.005
    assert float(jnp.abs(params["signal"]).max()) <= (3 / 64) ** 0.5
    assert not params["in"]["bias"].any() and not params["signal_bias"].any()


def test_bad_fields_are_named():
    refused = {
        r"measure: expected one of legs, legt, lagt; got 'fout'": {"measure": "fout"},
        r"discretisation: expected one of zoh, bilinear": {"discretisation": "tustin"},
        r"timescale: expected a number > 0, got -1": {"timescale": -1, "measure": "lagt"},
        r"state_size: expected an integer >= 1, got 0": {"state_size": 0},
        r"signals: expected an integer >= 1, got 0": {"signals": 0},
    }
    for message, fields in refused.items():
        with pytest.raises(ValueError, match=message):
            memzoo.make("hippo", width=D, **fields)
