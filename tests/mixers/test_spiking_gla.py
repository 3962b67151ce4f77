"""Facts of SpikingBrain's layer, arXiv:2509.05276.

Dims: B batch, T time, D width, H heads, G key heads, K key, W window.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers.spiking_gla import SpikingGLA
from memzoo.ops import spikes

B, T, D, H, G, K, W = 2, 21, 12, 4, 2, 6, 5


def setup(**fields):
    """A mixer, its parameters away from the start, an input and resets."""
    mixer = SpikingGLA(D, **{"heads": H, "key_heads": G, "head_dim": K, "window": W, "gate_rank": 3} | fields)
    rng = np.random.default_rng(0)
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    params = jax.tree.map(lambda w: np.asarray(w + 0.4 * rng.normal(size=w.shape), np.float32), params)
    reset = np.zeros((B, T), bool)
    reset[1, [4, 5, 15]] = True
    return mixer, params, rng.normal(size=(B, T, D)).astype(np.float32), reset


def coded(x):
    h = np.abs(x).mean(-1, keepdims=True) / 3
    return np.round(x / h) * h


def normed(y, scale):
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * scale


def reference(params, x, reset):
    """Token by token in float64, a list for the window, rotation as complex numbers by places in the text."""
    p = jax.tree.map(np.float64, params["params"])
    x = coded(np.float64(x))
    project = lambda name: np.einsum("btd,dhk->bthk", x, p[name]["kernel"]) + p[name]["bias"]
    repeat = lambda a: np.repeat(a, H // G, axis=2)
    q, k = np.maximum(project("q"), 0), np.maximum(repeat(project("k")), 0)
    v, near = repeat(project("v")), "near_q" in p
    gate = repeat(
        np.einsum("btr,rhk->bthk", x @ p["gate_in"]["kernel"], p["gate_out"]["kernel"]) + p["gate_out"]["bias"]
    )
    a = (1 / (1 + np.exp(-gate))) ** (1 / 16)
    theta = 1e6 ** (-np.arange(0, K, 2) / K)
    y = np.zeros((B, T, H, K))
    for b, h in np.ndindex(B, H):
        for t in range(T):
            if t == 0 or reset[b, t]:
                S, start = np.zeros((K, K)), t
            S = a[b, t, h][:, None] * S + np.outer(k[b, t, h], v[b, t, h])
            y[b, t, h] = normed(q[b, t, h] @ S / np.sqrt(K), p["norm"]["scale"])
            if near:
                seen = np.arange(max(start, t - W + 1), t + 1)
                q_near, k_near, v_near = (project(f"near_{name}") for name in "qkv")
                k_near, v_near = repeat(k_near)[b, seen, h], repeat(v_near)[b, seen, h]
                turn = np.exp(1j * (t - seen)[:, None] * theta)
                pairs = lambda a: a[..., ::2] + 1j * a[..., 1::2]
                scores = (pairs(q_near[b, t, h]) * np.conj(pairs(k_near)) * turn).real.sum(-1) / np.sqrt(K)
                weights = np.exp(scores) / np.exp(scores).sum()
                y[b, t, h] += normed(weights @ v_near, p["near_norm"]["scale"])
    return coded(y.reshape(B, T, H * K)) @ p["out"]["kernel"]


@pytest.mark.parametrize("window", [0, W])
@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_is_the_equation_of_the_paper(impl, window):
    mixer, params, x, reset = setup(window=window, impl=impl)
    y, state = jax.jit(mixer.apply)(params, x, None, reset)
    np.testing.assert_allclose(y, reference(params, x, reset), atol=2e-4)
    assert (state.near is None) == (window == 0)


@pytest.mark.long
def test_pieces_equal_the_whole_with_spikes():
    mixer, params, x, reset = setup()
    apply = jax.jit(mixer.apply)
    whole, last = apply(params, x, None, reset)
    state, ys = mixer.initial_state(B), []
    for start, end in itertools.pairwise([0, 7, 14, T]):
        y, state = apply(params, x[:, start:end], state, reset[:, start:end])
        ys.append(y)
    np.testing.assert_allclose(np.concatenate(ys, axis=1), whole, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state, last)


def test_bfloat16_is_off_by_whole_spikes_and_no_more():
    """Where x / h is near a half, bfloat16 rounds to another count: a step of h, in few of the channels."""
    mixer, params, x, _ = setup(window=0, impl="scan")
    mixers = mixer, mixer.clone(dtype=jnp.bfloat16)
    y, y_16 = map(np.float32, jax.jit(lambda params, x: [mixer.apply(params, x)[0] for mixer in mixers])(params, x))
    assert 1e-2 < np.std(y_16 - y) / np.std(y) < 0.2


@pytest.mark.long
def test_without_spikes_and_window_it_is_gla():
    """Where q and k are positive anyway, and GLA's output gate is open: of silu(1.2784645...) = 1."""
    mixer, params, x, reset = setup(spiking=False, window=0, key_heads=H, gate_rank=3)
    x = np.abs(x)
    x[..., 0] = 1
    p = params["params"]
    for name in "qkv":  # a bias is a weight of the channel that is always 1
        p[name] = {"kernel": np.abs(p[name]["kernel"]), "bias": 0 * p[name]["bias"]}
    gate_out, gate = p["gate_out"], np.zeros((D, H, K), np.float32)
    gate[0] = 1.2784645427610738
    ours = {"params": p}
    theirs = {name: {"kernel": p[name]["kernel"]} for name in "qkv"} | {
        "alpha_in": p["gate_in"],
        "alpha_out": gate_out,
        "gate": {"kernel": gate},
        "norm": p["norm"],
        "out": {"kernel": p["out"]["kernel"].reshape(H, K, D)},
    }
    gla = memzoo.make("gla", width=D, heads=H, key_dim=K, value_dim=K, gate_rank=3)
    y, state = jax.jit(mixer.apply)(ours, x, None, reset)
    y_gla, state_gla = jax.jit(gla.apply)({"params": theirs}, x, None, reset)
    np.testing.assert_allclose(y, y_gla, atol=2e-5)
    np.testing.assert_allclose(state.S_BGKV, state_gla.S_BHKV, atol=1e-5)


@pytest.mark.long
def test_counts_are_sown_and_trains_stand_for_them():
    """What the input projections see is h times the weighted sum of few, sparse spikes."""
    mixer, params, x, _ = setup()
    _, sown = jax.jit(lambda x: mixer.apply(params, x, mutable="intermediates"))(x)
    counts = {name: np.asarray(leaf[0]) for name, leaf in sown["intermediates"].items()}
    assert counts["x_count"].shape == (B, T, D) and counts["y_count"].shape == (B, T, H * K)
    for c in counts.values():
        np.testing.assert_array_equal(c, np.round(c))
        assert 0 < c.max() < 31
        s = np.asarray(spikes.train(c, "bitwise", 5))
        np.testing.assert_array_equal(np.tensordot(spikes.weights("bitwise", 5), s, 1), c)
        assert np.mean(s == 0) > 0.5
    np.testing.assert_array_equal(counts["x_count"], np.round(x / (np.abs(x).mean(-1, keepdims=True) / 3)))


@pytest.mark.long
def test_gradients_are_straight_through():
    """With ever more spikes they are those of the layer without; with few, none is lost."""

    def gradient(**fields):
        mixer, params, x, _ = setup(window=0, impl="scan", **fields)
        return jax.jit(jax.grad(lambda params, x: jnp.sum(mixer.apply(params, x)[0] ** 2), (0, 1)))(params, x)

    fine, plain = gradient(firing_rate=1e4), gradient(spiking=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(b).max()), fine, plain)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(gradient()))


def test_initial_values():
    """Glorot's for weights, by 2^-2.5; no biases; so all channels begin to forget at about 2^(-1 / 16) per token."""
    mixer = SpikingGLA(64, window=4)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    for name in ("q", "k", "v", "near_q", "near_k", "near_v", "out"):
        u = np.sort(np.ravel(np.float64(p[name]["kernel"])) / np.sqrt(6 / 128) * 2**2.5)
        assert np.abs((u + 1) / 2 - (np.arange(u.size) + 0.5) / u.size).max() < 2 * u.size**-0.5
    assert not any(np.any(leaf["bias"]) for leaf in p.values() if "bias" in leaf)
    x = np.random.default_rng(0).normal(size=(500, 64))
    gate = x @ p["gate_in"]["kernel"] @ np.reshape(p["gate_out"]["kernel"], (16, 64))
    log2_a = -np.log2(1 + np.exp(-gate)) / 16
    assert abs(log2_a.mean() + 1 / 16) < 1e-3 and log2_a.std() < 0.01


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"window": -1}, "window: expected an integer >= 0, got -1"),
        ({"key_heads": 3}, "heads: expected a positive multiple of key_heads = 3, got 4"),
        ({"head_dim": 3, "window": 2}, "head_dim: expected an even integer >= 2, .* got 3"),
        ({"spiking": "no"}, "spiking: expected True or False, got 'no'"),
        ({"gate_rank": 0}, "gate_rank: expected an integer >= 1, got 0"),
        ({"firing_rate": 0.0}, "firing_rate: expected a number > 0, got 0.0"),
        ({"gate_temperature": -1.0}, "gate_temperature: expected a number > 0, got -1.0"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        memzoo.make("spiking_gla", width=12, **fields)
