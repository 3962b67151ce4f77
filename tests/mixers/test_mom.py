"""Facts of the Mixture-of-Memories paper, arXiv:2502.13685.

Dims: as in memzoo/mixers/mom.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import mom

B, T, D, H, K, V = 2, 20, 6, 2, 3, 5
mixture = jax.jit(mom.mixture, static_argnums=8)
route = jax.jit(mom.route, static_argnums=(1, 2))


def inputs(N=3, top_k=2):
    rng = np.random.default_rng(0)
    M = N + 1
    q, k, v = (rng.normal(size=(B, T, H, *axes)).astype(np.float32) for axes in ((K,), (M, K), (M, V)))
    beta, log_a = (rng.random((B, T, H, M)).astype(np.float32) * sign for sign in (1, -1))
    S = rng.normal(size=(B, H, M, K, V)).astype(np.float32)
    g, _ = route(rng.normal(size=(B, T, N)).astype(np.float32), top_k, True)
    return q, k / np.linalg.norm(k, axis=-1, keepdims=True), v, beta, log_a, np.array(g), S


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
@pytest.mark.cases(2)
def test_is_the_equation_of_the_paper(impl):
    """Memory by memory, only those that were chosen: they fade, are corrected, and are read."""
    q, k, v, beta, log_a, g, S = inputs()
    got, last = mixture(q, k, v, beta, log_a, g, S, None, impl)
    S, y = np.float64(S), np.zeros((B, T, H, V))
    for b, t, h in np.ndindex(B, T, H):
        for m in np.flatnonzero(g[b, t]):
            old = np.exp(log_a[b, t, h, m]) * S[b, h, m]
            k_K = k[b, t, h, m]
            S[b, h, m] = (np.eye(K) - beta[b, t, h, m] * np.outer(k_K, k_K)) @ old
            S[b, h, m] += beta[b, t, h, m] * np.outer(k_K, v[b, t, h, m])
            y[b, t, h] += g[b, t, m] * q[b, t, h] @ S[b, h, m]
    np.testing.assert_allclose(got, y, atol=1e-5)
    np.testing.assert_allclose(last, S, atol=1e-5)


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
def test_a_memory_that_was_not_chosen_stays_as_it_is(impl):
    """To the last bit, over 20 tokens."""
    q, k, v, beta, log_a, g, S = inputs()
    g[:, :, 1] = 0
    _, last = mixture(q, k, v, beta, log_a, g, S, None, impl)
    np.testing.assert_array_equal(last[:, :, 1], S[:, :, 1])
    assert (np.abs(np.asarray(last) - S).max((0, 1, 3, 4))[[0, 2, 3]] > 1e-2).all()


def test_the_router_takes_the_largest_and_their_weights_sum_to_one():
    logits = np.random.default_rng(1).normal(size=(B, T, 5)).astype(np.float32)
    g = np.asarray(route(logits, 3, True)[0])
    order = np.argsort(-logits, axis=-1)
    top, rest = (np.take_along_axis(g, which, -1) for which in (order[..., :3], order[..., 3:]))
    exp = np.exp(np.take_along_axis(logits, order[..., :3], -1))
    np.testing.assert_allclose(top, exp / exp.sum(-1, keepdims=True), atol=1e-6)
    assert (rest == 0).all() and (g[..., 5] == 1).all()


@pytest.mark.long
def test_the_load_balance_loss_is_least_where_all_memories_are_used_alike():
    """k there; N where one of N always wins; and the layer gives it to those who ask."""
    N = 4
    alike = np.tile(1e-3 * np.eye(N, dtype=np.float32), (1, 2, 1))
    one = np.zeros((1, 8, N), np.float32) + 50 * np.eye(N, dtype=np.float32)[2]
    np.testing.assert_allclose(route(alike, 1, False)[1], 1, atol=1e-5)
    np.testing.assert_allclose(route(one, 1, False)[1], N, atol=1e-5)
    mixer = memzoo.make("mom", width=D, heads=H)
    x = np.random.default_rng(2).normal(size=(1, 16, D)).astype(np.float32)
    params = jax.jit(mixer.init)(jax.random.key(0), x)
    assert set(params) == {"params"}
    _, sown = jax.jit(lambda p, x: mixer.apply(p, x, mutable=["losses"]))(params, x)
    p = np.exp(x @ np.float64(params["params"]["router"]["kernel"]))
    p /= p.sum(-1, keepdims=True)
    chosen = p >= np.sort(p, axis=-1)[..., -2:-1]
    expected = N * (chosen.mean((0, 1)) * p.mean((0, 1))).sum()
    np.testing.assert_allclose(sown["losses"]["load_balance"][0], 0.01 * expected, rtol=1e-5)


@pytest.mark.long
def test_one_memory_is_gated_deltanet():
    sizes = {"width": D, "heads": H, "key_dim": K, "value_dim": V}
    mixer = memzoo.make("mom", memories=1, top_k=1, shared=False, **sizes)
    base = memzoo.make("gated_deltanet", **sizes)
    x = np.random.default_rng(3).normal(size=(B, T, D)).astype(np.float32)
    p = jax.tree.map(np.asarray, jax.jit(base.init)(jax.random.key(0), x))["params"]

    def q_first(x_XE):  # [head, (q, k, v)] -> q of all heads, then [head, (k, v)]
        x_XHE = x_XE.reshape(len(x_XE), H, 2 * K + V)
        return np.concatenate([part.reshape(len(x_XE), -1) for part in np.split(x_XHE, [K], axis=-1)], axis=-1)

    ours = {name: p[name] for name in ("log_rate", "gate", "norm", "out")}
    ours |= {"qkv": {"kernel": q_first(p["qkv"]["kernel"])}, "conv": q_first(p["conv"]), "dt_bias": p["dt"]["bias"]}
    ours |= {name: {"kernel": p[name]["kernel"][..., None]} for name in ("beta", "dt")}
    ours["router"] = {"kernel": np.ones((D, 1), np.float32)}
    got, want = jax.jit(mixer.apply)({"params": ours}, x), jax.jit(base.apply)({"params": p}, x)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1].S_BHMKV[:, :, 0], want[1].S_BHKV, atol=1e-5)


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def test_initial_decays_are_those_of_gated_deltanet():
    mixer = memzoo.make("mom", width=4)
    init = jax.jit(jax.vmap(lambda key: mixer.init(key, jnp.zeros((1, 1, 4)))))
    p = init(jax.random.split(jax.random.key(0), 300))["params"]  # of 4 heads each
    rate, dt = np.exp(np.float64(p["log_rate"]).ravel()), np.log1p(np.exp(np.float64(p["dt_bias"]).ravel()))
    assert distance_from_uniform((rate - 1) / 15) < 0.06
    assert distance_from_uniform((np.log(dt) - np.log(1e-3)) / np.log(100)) < 0.06


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"top_k": 5}, "top_k: expected at most memories = 4, got 5"),
        ({"top_k": 0}, "top_k: expected an integer >= 1, got 0"),
        ({"memories": 0}, "memories: expected an integer >= 1, got 0"),
        ({"heads": 5}, "width: expected a positive multiple of heads = 5, got 12"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        memzoo.make("mom", width=12, **fields)
