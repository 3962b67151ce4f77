"""Facts of the IndRNN paper, arXiv:1803.04831: units do not meet, and errors neither explode nor vanish.

Dims: B batch, T time, D width, F hidden.
"""

import jax
import numpy as np
import pytest

import memzoo
from memzoo.mixers import indrnn

B, T, D, F = 2, 40, 3, 4


def parameters(**fields):
    mixer = memzoo.make("indrnn", width=D, hidden=F, **fields)
    x_BTD = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    return mixer, jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"]), x_BTD


def distance_from_uniform(x, low, high):
    """Kolmogorov-Smirnov."""
    return np.abs((np.sort(x) - low) / (high - low) - (np.arange(x.size) + 0.5) / x.size).max()


def test_equals_its_equation():
    mixer, params, x_BTD = parameters()
    rng = np.random.default_rng(1)
    h_BF = rng.normal(size=(B, F)).astype(np.float32)
    params["in"] = {"kernel": rng.normal(size=(D, F)), "bias": rng.normal(size=F)}
    params["recurrent"] = np.array([0.9, -0.7, 0.2, 1.0])
    params = jax.tree.map(np.float32, params)
    y_BTD, state = jax.jit(mixer.apply)({"params": params}, x_BTD, indrnn.State(h_BF))
    for t in range(T):
        h_BF = np.maximum(x_BTD[:, t] @ params["in"]["kernel"] + params["recurrent"] * h_BF + params["in"]["bias"], 0)
        np.testing.assert_allclose(y_BTD[:, t], h_BF @ params["out"]["kernel"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.h_BF, h_BF, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_an_error_is_a_power_of_the_units_own_weight(impl):
    """Where units are at work, dh_T / dh_0 is diag(u)^T; over the horizon it is at most `growth`, whatever u says."""
    mixer, params, x_BTD = parameters(impl=impl, horizon=T, growth=3.0)
    params |= {"recurrent": np.float32([0.5, 0.97, 1.02, 7.0])}  # the last one acts as the bound
    params["in"] = params["in"] | {"bias": np.full(F, 5, np.float32)}  # which x cannot outweigh
    last = lambda h_BF: mixer.apply({"params": params}, x_BTD, indrnn.State(h_BF))[1].h_BF
    pull = lambda h_BF, dh_BF: jax.vjp(last, h_BF)[1](dh_BF)[0]
    rows_FBF = np.eye(F, dtype=np.float32)[:, None].repeat(B, 1)
    J_FBF = jax.jit(jax.vmap(pull, (None, 0)))(np.ones((B, F), np.float32), rows_FBF)
    want_FF = np.diag([0.5**T, 0.97**T, 1.02**T, 3.0])
    np.testing.assert_allclose(J_FBF, want_FF[:, None].repeat(B, 1), rtol=1e-4)


@pytest.mark.parametrize("u_min", [0.0, 0.99])
def test_initial_weights(u_min):
    """u is uniform from u_min to 2^(1/T); W is, with the variance 2 / (65 D) that He's rule has for slope 8."""
    mixer = memzoo.make("indrnn", width=20, hidden=3000, horizon=100, u_min=u_min)
    params = jax.jit(mixer.init)(jax.random.key(0), np.zeros((1, 1, 20), np.float32))["params"]
    u_F, w = np.float64(params["recurrent"]), np.float64(params["in"]["kernel"]).ravel()
    assert distance_from_uniform(u_F, u_min, 2**0.01) < 2 * u_F.size**-0.5
    edge = (6 / 65 / 20) ** 0.5
    assert distance_from_uniform(w, -edge, edge) < 2 * w.size**-0.5
    assert not np.any(params["in"]["bias"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"growth": 0.5}, "growth: expected a number >= 1, got 0.5"),
        ({"u_min": 1.01}, r"u_min: expected a number in \[0, growth\^\(1/horizon\) = 1.00088\), got 1.01"),
        ({"u_min": -0.5}, "u_min: expected a number in .*, got -0.5"),
        ({"horizon": 0}, "horizon: expected an integer >= 1, got 0"),
        ({"growth": float("nan")}, "growth: expected a finite number, got nan"),
    ],
)
def test_bad_fields_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        memzoo.make("indrnn", width=D, **fields).initial_state(B)
