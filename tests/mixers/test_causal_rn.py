"""Facts of the Causal Relation Network paper, arXiv:2406.16168.

Dims: B batch, T time, D width, F hidden.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import causal_rn
from memzoo.mixers.causal_rn import CausalRN

B, T, D, F = 2, 23, 5, 6


def setup(**fields):
    """A mixer, its parameters, 20 times as large as at the start, an input and resets."""
    mixer = CausalRN(D, hidden=F, **fields)
    rng = np.random.default_rng(0)
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    params = jax.tree.map(lambda w: np.asarray(20 * w + rng.normal(size=w.shape), np.float32), params)
    reset = np.zeros((B, T), bool)
    reset[1, [4, 5, 17]] = True
    return mixer, params, rng.normal(size=(B, T, D)).astype(np.float32), reset


def norm(z):
    return (z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True)


def reference(params, x_BTD, reset_BT, window):
    """Pair by pair."""
    p = {name: {k: np.float64(w) for k, w in leaf.items()} for name, leaf in params["params"].items()}
    a, c = x_BTD @ p["a"]["kernel"] + p["a"]["bias"], x_BTD @ p["c"]["kernel"]
    y = np.zeros(x_BTD.shape)
    for b, t in np.ndindex(B, T):
        start = max([0, t + 1 - window, *np.flatnonzero(reset_BT[b, : t + 1])])
        r = sum(np.exp(norm(a[b, t] + c[b, j])) for j in range(start, t + 1))
        y[b, t] = norm(r) @ p["out"]["kernel"] + p["out"]["bias"]
    return y


@pytest.mark.parametrize(("window", "part"), [(99, 16), (99, 5), (7, 3), (1, 2)])
@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_is_the_sum_over_pairs(monkeypatch, impl, window, part):
    monkeypatch.setattr(causal_rn, "PART", part)
    mixer, params, x, reset = setup(window=window, impl=impl)
    y, _ = jax.jit(mixer.apply)(params, x, None, reset)
    np.testing.assert_allclose(y, reference(params, x, reset, window), atol=1e-3)  # the floor of the variances


def test_the_past_is_a_set():
    """The order of earlier tokens does not matter to the last one, what they are does."""
    mixer, params, x, _ = setup()
    apply = jax.jit(lambda x: mixer.apply(params, x)[0][:, -1])
    other = np.concatenate([x[:, :-1][:, ::-1], x[:, -1:]], axis=1)
    np.testing.assert_allclose(apply(other), apply(x), atol=1e-4)
    assert np.abs(np.asarray(apply(np.concatenate([0 * x[:, :-1], x[:, -1:]], axis=1)) - apply(x))).max() > 0.1


def test_no_running_sum_can_stand_for_the_pool():
    """Two pasts of one sum of exp(c): without the norm of pairs, r_t is exp(a_t) times that sum, the same for both."""
    c_BLF = np.log([[[1.0, 9, 2], [9, 1, 6]], [[5, 5, 4], [5, 5, 4]]])
    a_F = np.array([0.5, -1.0, 2.0])
    plain_BF = np.exp(a_F + c_BLF).sum(axis=1)
    np.testing.assert_allclose(plain_BF[0], plain_BF[1])
    pool_BLF = np.pad(c_BLF, ((0, 0), (0, 1), (0, 0)))  # and the present token
    start_BC, time_L = np.zeros((2, 1)), np.arange(3)
    r_BCF = causal_rn.relate(np.tile(a_F, (2, 1, 1)), pool_BLF, start_BC, time_L[2:], time_L, W=3)
    r_BF = np.asarray(r_BCF[:, 0] / r_BCF[:, 0].sum(-1, keepdims=True))
    assert np.abs(r_BF[0] - r_BF[1]).max() > 1e-2


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_how_long_the_text_is_does_not_matter(impl):
    """What counts is the ring: the same one, far into a text, and the counter does not overflow."""
    window = 6
    mixer, params, x, _ = setup(window=window, impl=impl)
    apply = jax.jit(mixer.apply)
    _, state = apply(params, x)
    assert (np.asarray(state.position_B) <= 2 * window).all()
    far = 2**31 - 1 - (2**31 - 1 - T) % window
    one = apply(params, x, state._replace(position_B=np.full(B, far, np.int32)))
    jax.tree.map(np.testing.assert_array_equal, one, apply(params, x, state))


def test_training_keeps_no_pairs():
    """[T, W, F] of them would be 67 MB here, for each of the few things that the gradient needs of a pair."""
    mixer = CausalRN(8, hidden=64, window=256)
    x = jax.ShapeDtypeStruct((1, 1024, 8), jnp.float32)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)
    loss = jax.jit(jax.grad(lambda params, x: mixer.apply(params, x)[0].sum()))
    assert loss.lower(params, x).compile().memory_analysis().temp_size_in_bytes < 1024 * 256 * 64 * 4 / 2


def test_initial_values_are_normal_of_deviation_0_02():
    mixer = CausalRN(60, hidden=50)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 60)))["params"]
    for name in ("a", "c", "out"):
        w = np.float64(p[name]["kernel"])
        np.testing.assert_allclose([w.mean(), w.std(), (w**4).mean() / 0.02**4], [0, 0.02, 3], atol=2e-3, rtol=0.2)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
        ({"hidden": 0}, "hidden: expected an integer >= 1, got 0"),
        ({"hidden": 1}, "hidden: expected an integer >= 2, to have a variance, got 1"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        memzoo.make("causal_rn", width=12, **fields)
