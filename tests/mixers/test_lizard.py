"""Facts of Lizard, arXiv:2507.09025, against a plain loop of its equations.

Dims: B batch, T time, D width, H heads, G key heads, K key, V value, F rows of a feature map.
"""

import jax
import numpy as np
import pytest

import memzoo
from memzoo import ops
from memzoo.mixers import lizard

B, T, D, H, G, K, F, W = 2, 21, 10, 4, 2, 6, 5, 7
SIZES = {"width": D, "heads": H, "key_heads": G, "head_dim": K}
FIELDS = SIZES | {"feature_dim": F, "window": W, "meta_tokens": 3}


def make(**fields):
    return memzoo.make("lizard", **FIELDS | fields)


def apply(**fields):
    return jax.jit(make(**fields).apply)


@pytest.fixture(scope="module")
def given():
    """Parameters that are all of them away from where they begin, and an input."""
    rng = np.random.default_rng(0)
    params = jax.jit(make().init)(jax.random.key(0), np.zeros((1, 1, D), np.float32))
    move = lambda w: (2 * np.asarray(w) + 0.3 * rng.normal(size=w.shape)).astype(np.float32)
    return jax.tree.map(move, params), rng.normal(size=(B, T, D)).astype(np.float32)


def soft(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def features(params, x_BTD):
    """Of each head in float64: queries, keys, values, and features of queries and keys."""
    p = jax.tree.map(np.float64, params["params"])
    q, k, v = (np.einsum("btd,dhk->bthk", x_BTD, p[name]["kernel"]) for name in "qkv")
    k, v = (np.repeat(a, H // G, axis=2) for a in (k, v))
    maps = (np.einsum("bthk,hkf->bthf", a, p["phi"][i].reshape(H, K, F)) for i, a in enumerate((q, k)))
    return q, k, v, *(np.concatenate([soft(a), soft(-a)], axis=-1) for a in maps)


def read_out(params, y_BTHV):
    return np.einsum("bthv,hvd->btd", y_BTHV, np.float64(params["params"]["out"]["kernel"]))


def reference(params, x_BTD):
    """The paper's sums, pair by pair."""
    q, k, v, phi_q, phi_k = features(params, x_BTD)
    p = jax.tree.map(np.float64, params["params"])
    gamma = 1 / (1 + np.exp(-x_BTD @ p["gate"]["kernel"][:, 0]))
    y = np.zeros((B, T, H, K))
    for b, h, i in np.ndindex(B, H, T):
        weights = np.array([phi_q[b, i, h] @ phi_k[b, j, h] * np.prod(gamma[b, j + 1 : i + 1]) for j in range(i + 1)])
        y[b, i, h] = weights @ v[b, : i + 1, h] / weights.sum()
        near = slice(max(0, i - W + 1), i + 1)
        weights = np.exp(k[b, near, h] @ q[b, i, h] / np.sqrt(K))
        y[b, i, h] += p["alpha"] * weights @ v[b, near, h] / (np.exp(p["meta"]).sum() + weights.sum())
    return read_out(params, y)


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_is_the_papers_sum_of_gated_memory_and_window(given, impl):
    params, x = given
    np.testing.assert_allclose(apply(impl=impl)(params, x)[0], reference(params, x), atol=2e-5)


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_with_gates_1_and_no_window_it_is_linear_attention(given, impl):
    """The average of the values by weights phi(q)' phi(k), of all tokens so far alike."""
    params, x = given
    x = x.copy()
    x[..., 0] = 1
    gate = np.zeros((D, 1), np.float32)
    gate[0] = 100  # sigmoid(100) is 1
    params = {"params": {n: p for n, p in params["params"].items() if n not in ("alpha", "meta")}}
    params["params"]["gate"] = {"kernel": gate}
    y, state = apply(impl=impl, window=None)(params, x)

    *_, v, phi_q, phi_k = features(params, x)
    weights = np.tril(np.einsum("bihe,bjhe->bhij", phi_q, phi_k))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(y, read_out(params, np.einsum("bhij,bjhv->bihv", weights, v)), atol=2e-5)
    q, k, v = (np.float32(a) for a in (phi_q, phi_k, v))
    theirs_BTHV, total_BTH, S_BHEV, z_BHE = ops.normalised_linear_attention(q, k, v)
    np.testing.assert_allclose(y, read_out(params, np.asarray(theirs_BTHV / total_BTH[..., None])), atol=2e-5)
    np.testing.assert_allclose(state.S_BGREV.reshape(S_BHEV.shape), S_BHEV, atol=1e-4)
    np.testing.assert_allclose(state.z_BGRE.reshape(z_BHE.shape), z_BHE, rtol=1e-4)
    assert state.k_BGWK.size == 0


def test_a_softmax_layers_weights_load_into_its_projections():
    """By name and shape. What is new: the feature maps, a gate, the share of the window and the meta-memory tokens."""
    x = np.zeros((1, 1, D), np.float32)
    teacher, ours = (
        jax.tree.map(np.shape, jax.eval_shape(mixer.init, jax.random.key(0), x)["params"])
        for mixer in (memzoo.make("attention", **SIZES), make())
    )
    new = {"phi": (2, G, H // G, K, F), "gate": {"kernel": (D, 1)}, "alpha": (), "meta": (3,)}
    assert ours == teacher | new


@pytest.mark.long
def test_meta_memory_tokens_take_weight_from_the_window_and_give_nothing(given):
    """At very small logits it is softmax over the window; at very large ones nothing of the window is left."""
    params, x = given
    run = apply()
    with_meta = lambda logit: run({"params": params["params"] | {"meta": np.full(3, logit, np.float32)}}, x)[0]
    without = {"params": {n: p for n, p in params["params"].items() if n != "meta"}}
    np.testing.assert_allclose(with_meta(-100), apply(meta_tokens=0)(without, x)[0], atol=1e-6)
    memory = {"params": {n: p for n, p in without["params"].items() if n != "alpha"}}
    np.testing.assert_allclose(with_meta(100), apply(window=None)(memory, x)[0], atol=1e-6)


@pytest.mark.long
def test_strong_keys_leave_no_denominator_of_0(given):
    """Features of 30 times the keys and queries are 0 or 1 in float32, and hardly meet."""
    params, x = given
    loss = lambda params, x: (make().apply(params, 30 * x)[0] ** 2).sum()
    value, gradients = jax.jit(jax.value_and_grad(loss))(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradients)))


def test_where_the_new_parameters_begin():
    """Gates around 1/2, features nearly uniform and, of one vector, those of a query equal to those of a key."""
    mixer = memzoo.make("lizard", width=64, heads=2)
    x_TD = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
    p = jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), x_TD[None, :1])["params"])
    logits = x_TD @ p["gate"]["kernel"]
    np.testing.assert_allclose(logits.std(), 3**-0.5, rtol=0.2)  # uniform weights in +-1/8
    np.testing.assert_array_equal(p["phi"][0], p["phi"][1])
    mapped = np.einsum("td,dhk,hkf->thf", x_TD, p["q"]["kernel"], p["phi"][0, :, 0])
    np.testing.assert_allclose(mapped.std(), (2 / 32) ** 0.5, rtol=0.1)  # F = K = 32
    assert p["alpha"] == 1 and (p["meta"] == 0).all() and p["meta"].shape == (4,)
    assert lizard.Lizard(64).window == 128


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
        ({"meta_tokens": -1}, "meta_tokens: expected an integer >= 0, got -1"),
        ({"feature_dim": 0}, "feature_dim: expected an integer >= 1, got 0"),
        ({"key_heads": 3}, "heads: expected a positive multiple of key_heads = 3, got 4"),
        ({"head_dim": None}, "width: expected a positive multiple of heads = 4, got 10"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        make(**fields)
