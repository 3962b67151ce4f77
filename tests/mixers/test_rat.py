"""Facts of the RAT paper, arXiv:2507.04416.

Dims: B batch, T time, D width, H heads, G groups, K key and value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import rat
from memzoo.mixers.rat import RAT

B, T, D, H, G, K = 2, 23, 6, 4, 2, 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def setup(**fields):
    """A mixer, its parameters, twice as large as at the start, and an input."""
    mixer = RAT(D, heads=H, head_dim=K, **{"groups": G, **fields})
    params = jax.tree.map(lambda w: 2 * np.asarray(w), jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D))))
    return mixer, params, np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def projections(params, x_BTD):
    """q, k, v, forget gate and output gate, each [B, T, H, K], and the last kernel."""
    p = {name: np.float64(leaf["kernel"]) for name, leaf in params["params"].items()}
    q, k, v, g, z = (np.einsum("btd,dhk->bthk", x_BTD, p[name]) for name in ("q", "k", "v", "forget", "gate"))
    q, k = (np.repeat(a, H // a.shape[2], axis=2) for a in (q, k))
    return q, k, v, sigmoid(g + np.float64(params["params"]["forget"]["bias"])), sigmoid(z), p["out"]


def reference(params, x_BTD, reset_BT, L, window):
    """Token by token: the list of what earlier chunks ended with, and the present one so far."""
    q, k, v, g, z, out = projections(params, x_BTD)
    y = np.zeros(x_BTD.shape)
    for b in range(B):
        for t in range(T):
            if t == 0 or reset_BT[b, t]:
                done, place = [], 0
            if place % L == 0:
                k_t, v_t = np.zeros((H, K)), np.zeros((H, K))
            k_t, v_t = (g[b, t] * old + (1 - g[b, t]) * new[b, t] for old, new in ((k_t, k), (v_t, v)))
            visible = [*done, (k_t, v_t)][-window:]
            turn = np.exp(1j * np.arange(len(visible)))  # K = 2: one frequency
            as_complex = lambda a_HK: a_HK[:, 0] + 1j * a_HK[:, 1]
            q_t = as_complex(q[b, t]) * turn[-1]
            scores = np.stack(
                [(np.conj(q_t) * as_complex(u) * c).real for (u, _), c in zip(visible, turn, strict=True)]
            )
            weights = np.exp(scores / np.sqrt(K))
            weights /= weights.sum(axis=0)
            read = sum(w[:, None] * value for w, (_, value) in zip(weights, visible, strict=True))
            y[b, t] = np.einsum("hk,hkd->d", z[b, t] * read, out)
            place += 1
            if place % L == 0:
                done.append((k_t, v_t))
    return y


@pytest.mark.parametrize(("L", "window"), [(3, 99), (3, 4), (1, 5), (4, 1)])
@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_is_the_equation_of_the_paper(monkeypatch, impl, L, window):
    monkeypatch.setattr(rat, "BLOCK", 8)
    mixer, params, x = setup(chunk=L, window=window, impl=impl)
    reset = np.zeros((B, T), bool)
    reset[1, [4, 5, 17]] = True
    y, _ = jax.jit(mixer.apply)(params, x, None, reset)
    np.testing.assert_allclose(y, reference(params, x, reset, L, window), atol=1e-5)


@pytest.mark.parametrize("window", [9, 64])
@pytest.mark.cases(1)
def test_chunks_of_one_token_are_softmax_attention(window):
    """With forget gates at 0 and output gates at 1/2, `attention` itself."""
    mixer, params, x = setup(chunk=1, window=window, groups=H)
    p = params["params"]
    p["forget"] = {"kernel": 0 * p["forget"]["kernel"], "bias": np.full((H, K), -50, np.float32)}
    p["gate"] = {"kernel": 0 * p["gate"]["kernel"]}
    attention = memzoo.make("attention", width=D, heads=H, head_dim=K, window=window, sinks=0)
    plain = {"params": {name: p[name] for name in ("q", "k", "v")} | {"out": {"kernel": p["out"]["kernel"] / 2}}}
    got, want = jax.jit(mixer.apply)(params, x)[0], jax.jit(attention.apply)(plain, x)[0]
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("L", [T, 10_000])
@pytest.mark.cases(1)
def test_one_chunk_is_a_gated_linear_rnn(L):
    """h_t = g_t h_{t-1} + (1 - g_t) v_t, y_t = W (z_t h_t): queries and keys do not matter."""
    mixer, params, x = setup(chunk=L, window=3)
    _, _, v, g, z, out = projections(params, x)
    h, y = np.zeros((B, H, K)), []
    for t in range(T):
        h = g[:, t] * h + (1 - g[:, t]) * v[:, t]
        y.append(np.einsum("bhk,hkd->bd", z[:, t] * h, out))
    np.testing.assert_allclose(jax.jit(mixer.apply)(params, x)[0], np.stack(y, axis=1), atol=1e-5)


def test_the_cache_is_smaller_than_that_of_attention_by_the_chunk():
    """At the defaults of both, for a text that either sees the whole of."""
    ours, attention = memzoo.make("rat", width=32), memzoo.make("attention", width=32, sinks=0)
    assert attention.initial_state(1).k_BGMK.size == ours.chunk * ours.initial_state(1).k_BHWK.size


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_how_long_the_text_is_does_not_matter(impl):
    """What counts is the ring: the same one, far into a text, and the counter does not overflow."""
    L, window = 3, 2
    mixer, params, x = setup(chunk=L, window=window, impl=impl)
    apply = jax.jit(mixer.apply)
    _, state = apply(params, x)
    assert (np.asarray(state.position_B) <= 2 * L * window).all()
    far = 2**31 - 1 - (2**31 - 1 - T) % (L * window)
    one = apply(params, x, state._replace(position_B=np.full(B, far, np.int32)))
    jax.tree.map(np.testing.assert_array_equal, one, apply(params, x, state))


def test_gates_begin_with_memories_of_all_lengths_up_to_the_chunk():
    """exp(bias) is uniform in [1, L - 1], by Kolmogorov-Smirnov; a gate at rest keeps 1 - 1 / (1 + exp(bias))."""
    L = 16
    mixer = RAT(2, heads=2, head_dim=2000, chunk=L)
    bias = np.float64(jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 2)))["params"]["forget"]["bias"]).ravel()
    x = np.sort((np.exp(bias) - 1) / (L - 2))
    assert np.abs(x - (np.arange(x.size) + 0.5) / x.size).max() < 0.03


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
        ({"groups": 3}, "heads: expected a positive multiple of groups = 3, got 4"),
        ({"head_dim": 3}, "head_dim: expected an even integer >= 2, .* got 3"),
        ({"heads": 5, "groups": 1}, "width: expected a positive multiple of heads = 5, got 12"),
        ({"heads": 6, "chunk": 2**20, "window": 2**20}, r"chunk: expected chunk \* window <= 2\*\*30"),
        ({"heads": 6, "rope_base": 0.0}, "rope_base: expected a number > 0, got 0.0"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        memzoo.make("rat", width=12, **fields)
