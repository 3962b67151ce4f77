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
@pytest.mark.cases(1)
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


@pytest.mark.long
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
    """The released code's: the gate has the variance 1 / (D + M N) from x and c, the update Glorot's from each of them.
    Gates half open; the signal of the size of h."""
    mixer = memzoo.make("hippo", width=160, hidden=90, state_size=40, signals=2)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 160)))["params"]
    (of_x, of_c), F = (np.asarray(p["in"]["kernel"]), np.asarray(p["recurrent"])), 90
    assert of_x.shape == (160, 180) and of_c.shape == (80, 180) and p["signal"].shape == (90, 2)
    for weights in (of_x, of_c):
        np.testing.assert_allclose(np.std(weights[:, :F]), (160 + 80) ** -0.5, rtol=0.04)
        np.testing.assert_allclose(np.std(weights[:, F:]), (2 / (len(weights) + 90)) ** 0.5, rtol=0.04)
        for half in (weights[:, :F], weights[:, F:]):
            assert np.abs(half).max() > 3 * np.std(half), "normal, not uniform nor truncated"
    assert np.abs(np.corrcoef(of_x[:, :F].ravel(), of_x[:, F:].ravel())[0, 1]) < 0.05
    assert 0.9 * (3 / 90) ** 0.5 < np.abs(p["signal"]).max() <= (3 / 90) ** 0.5
    assert not p["in"]["bias"].any() and not p["signal_bias"].any()
    mixer = memzoo.make("hippo", width=64)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    assert shapes["recurrent"].shape == (64, 128) and shapes["signal"].shape == (64, 1), "N = F = D, one signal"


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
