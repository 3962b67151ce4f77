"""Facts of softmax attention over a cache: its softmax, what it sees, its places, and what it costs.

Dims: B batch, T time, D width, H heads, K key, V value, P pairs of the key, J visible tokens.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.mixers import attention
from memzoo.mixers.attention import Attention
from memzoo.ops.window_attention import rotate, turns

B, D, H, G, K = 3, 10, 4, 2, 6


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def mixer(window, sinks, impl="auto", dtype=jnp.float64, **fields):
    return Attention(
        D,
        heads=H,
        key_heads=G,
        head_dim=K,
        window=window,
        sinks=sinks,
        impl=impl,
        dtype=dtype,
        param_dtype=dtype,
        **fields,
    )


@cache
def apply(window, sinks, impl, block=256):  # block: of the chunk form; traced by the test that sets it
    return jax.jit(mixer(window, sinks, impl).apply)


@pytest.fixture(scope="module")
def params():
    with jax.enable_x64(True):
        params = mixer(4, 2).init(jax.random.key(0), jnp.zeros((1, 1, D), jnp.float64))
        return jax.tree.map(lambda w: 2 * w, params)  # sharper than at the start


def data(T, seed=0, resets=0.15):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, T, D)), rng.random((B, T)) < resets


def reference(params, x_BTD, reset_BT, window, sinks):
    """Token by token: list what is visible in order, rotate by the index in that list as complex numbers, softmax."""
    q, k, v, out = (np.asarray(params["params"][name]["kernel"]) for name in ("q", "k", "v", "out"))
    q, k, v = (np.einsum("btd,dhk->bthk", x_BTD, kernel) for kernel in (q, k, v))
    k, v = (np.repeat(a, H // G, axis=2) for a in (k, v))
    q_BTHP, k_BTHP = (a[..., ::2] + 1j * a[..., 1::2] for a in (q, k))
    theta_P = 10_000.0 ** (-2 * np.arange(K // 2) / K)
    y = np.zeros_like(x_BTD)
    for b, t in np.ndindex(reset_BT.shape):
        start = max([0, *np.flatnonzero(reset_BT[b, : t + 1])])
        visible = [i for i in range(start, t + 1) if i > t - window or i - start < sinks]
        turn_JP = np.exp(1j * np.arange(len(visible))[:, None] * theta_P)
        scores_HJ = np.einsum("hp,jhp->hj", np.conj(q_BTHP[b, t] * turn_JP[-1]), k_BTHP[b, visible] * turn_JP[:, None])
        weight_HJ = np.exp(scores_HJ.real / np.sqrt(K))
        weight_HJ /= weight_HJ.sum(axis=1, keepdims=True)
        y[b, t] = np.einsum("hj,jhv,hvd->d", weight_HJ, v[b, visible], out)
    return y


def assert_close(got, want, tolerance=1e-10):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-30)
        assert error <= tolerance, (jax.tree_util.keystr(path), error)


CASES = [  # (T, window, sinks, block)
    (13, 16, 3, 256),  # full attention
    (13, 16, 0, 5),  # in several blocks
    (14, 4, 2, 256),
    (14, 5, 1, 3),
    (9, 2, 5, 256),  # more sinks than window
    (6, 1, 0, 256),
    (1, 3, 2, 256),
]


@pytest.mark.parametrize("T, window, sinks, block", CASES)
@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(2)
def test_is_softmax_over_the_cache(params, monkeypatch, impl, T, window, sinks, block):
    monkeypatch.setattr(attention, "BLOCK", block)
    x, reset = data(T)
    got, _ = apply(window, sinks, impl, block)(params, x, None, reset)
    assert_close(got, reference(params, x, reset, window, sinks))


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_sinks_and_window_change_nothing_until_the_cache_is_full(params, impl):
    x, _ = data(7)
    none = np.zeros((B, 7), bool)
    got, _ = apply(4, 2, impl)(params, x, None, none)
    full = reference(params, x, none, 99, 0)
    assert_close(got[:, :6], full[:, :6])
    assert np.abs(got[:, 6] - full[:, 6]).max() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("window, sinks, block, cut", [(4, 2, 3, 1), (9, 3, 256, 8)])
def test_chunks_in_two_calls_are_the_scan_in_values_state_and_gradients(params, monkeypatch, window, sinks, block, cut):
    """From a cache that is not full, with a cut before or after it fills: the gradients pass through the state."""
    monkeypatch.setattr(attention, "BLOCK", block)
    T, before = 15, 4
    x, reset = data(T, seed=1)
    _, state = apply(window, sinks, "scan")(params, data(before, seed=2)[0])
    keep = np.random.default_rng(3).normal(size=(B, T, D))

    def loss(params, x, kv, impl, *cuts):
        state_, ys = state._replace(k_BGMK=kv[0], v_BGMV=kv[1]), []
        for a, b in zip((0, *cuts), (*cuts, T), strict=True):
            y, state_ = mixer(window, sinks, impl).apply(params, x[:, a:b], state_, reset[:, a:b])
            ys.append(y)
        y = jnp.concatenate(ys, axis=1)
        return (y * keep).sum() + (state_.k_BGMK * state_.v_BGMV).sum(), (y, state_)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=(3, 4))
    whole = run(params, x, state[:2], "scan")
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(whole[1]))
    assert_close(run(params, x, state[:2], "chunk", cut), whole)


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_a_reset_leaves_nothing_behind(params, impl):
    """No NaN crosses it in either direction, and the state is a fresh run's, empty slots included."""
    x, _ = data(3)
    reset = np.tile([True, False, False], (B, 1))
    kv = jnp.full((2, B, G, 6, K), jnp.nan)
    position_B = jnp.array([3, 7, 8], jnp.int32)

    def loss(params, x, kv):
        got = mixer(4, 2, impl).apply(params, x, attention.State(*kv, position_B), reset)
        return (got[0] ** 2).sum() + got[1].k_BGMK.sum(), got

    (_, got), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, x, kv)
    assert_close(got, apply(4, 2, impl)(params, x))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert (np.asarray(got[1].k_BGMK)[:, :, 3:] == 0).all() and (np.asarray(got[1].position_B) == 3).all()


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.parametrize("position", [10_000_000, 2**31 - 1])
@pytest.mark.cases(2)
def test_the_position_in_the_text_does_not_matter(params, impl, position):
    """The same cache, far into a text; and the counter does not overflow."""
    window, sinks = 4, 2
    position -= (position - sinks) % window - (11 - sinks) % window  # the slot of the token 11
    position -= window if position >= 2**31 else 0
    f = apply(window, sinks, impl)
    _, state = f(params, data(11, seed=5)[0])
    assert (np.asarray(state.position_B) <= sinks + 2 * window).all()
    x, _ = data(3, seed=6)
    far = f(params, x, state._replace(position_B=jnp.full(B, position, jnp.int32)))
    assert_close(far, f(params, x, state))


def test_rotation_is_multiplication_of_complex_numbers_and_knows_only_distances():
    q_K, k_K = np.random.default_rng(0).normal(size=(2, K))
    turn = turns(2000, K, 100.0, jnp.float64)
    theta_P = np.array([1, 100 ** (-1 / 3), 100 ** (-2 / 3)])
    turned = np.asarray(rotate(q_K, turn[7]))
    want_P = (q_K[::2] + 1j * q_K[1::2]) * np.exp(7j * theta_P)
    np.testing.assert_allclose(turned[::2] + 1j * turned[1::2], want_P, rtol=1e-12)
    scores = [rotate(q_K, turn[n + 7]) @ rotate(k_K, turn[n]) for n in (0, 1, 1990)]
    np.testing.assert_allclose(scores, turned @ k_K, rtol=1e-10)


@pytest.mark.long
def test_grouped_keys_are_repeated_heads(params):
    x, reset = data(9)
    own = jax.tree.map(lambda w: w, params)
    for name in "kv":
        own["params"][name] = {"kernel": jnp.repeat(params["params"][name]["kernel"], H // G, axis=1)}
    ungrouped = mixer(4, 2).clone(key_heads=None)
    assert_close(ungrouped.apply(own, x, None, reset)[0], apply(4, 2, "chunk")(params, x, None, reset)[0])


def test_decoding_updates_the_cache_in_place():
    m = Attention(32, heads=2, window=512)
    x = jnp.zeros((2, 1, 32), jnp.float32)
    params, state = m.init(jax.random.key(0), x), m.initial_state(2)
    cache_bytes = state.k_BGMK.nbytes + state.v_BGMV.nbytes
    decode = jax.jit(m.apply, donate_argnums=2).lower(params, x, state).compile()
    memory = decode.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes  # the rotated keys, but no second cache
    assert decode(params, x, state)[0].shape == (2, 1, 32)


def test_training_keeps_no_scores():
    T = 2048
    m = Attention(8, heads=1, window=T, sinks=0)
    x = jax.ShapeDtypeStruct((1, T, 8), jnp.float32)
    params = jax.eval_shape(m.init, jax.random.key(0), x)
    loss = jax.jit(jax.grad(lambda params, x: m.apply(params, x)[0].sum()))
    memory = loss.lower(params, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * T * T  # one [T, T] of float32


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"heads": 4, "key_heads": 3}, "heads: expected a positive multiple of key_heads = 3, got 4"),
        ({"heads": 3}, "width: expected a positive multiple of heads = 3, got 10"),
        ({"heads": 2}, "head_dim: expected an even integer >= 2, .* got 5"),
        ({"heads": 5, "window": 0}, "window: expected an integer >= 1, got 0"),
        ({"heads": 5, "sinks": -1}, "sinks: expected an integer >= 0, got -1"),
        ({"heads": 5, "rope_base": 0.0}, "rope_base: expected a number > 0, got 0.0"),
        ({"heads": 5, "impl": "chunks"}, "impl: .*'chunks', did you mean chunk"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        Attention(D, **fields).init(jax.random.key(0), jnp.zeros((1, 2, D), jnp.float32))


def test_what_does_not_fit(params):
    x = jnp.zeros((B, 2, D), jnp.float64)
    with pytest.raises(ValueError, match=r"state.k_BGMK: expected shape \[3, 2, 6, 6\], got \[3, 2, 7, 6\]"):
        mixer(4, 2).apply(params, x, mixer(5, 2).initial_state(B))
    with pytest.raises(NotImplementedError, match="attention has no form 'newton'"):
        mixer(4, 2, "newton").apply(params, x)
