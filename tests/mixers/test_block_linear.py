"""Facts of SANA-Video's block linear attention, arXiv:2509.24695.

Dims: B batch, T time, D width, H heads, K key, V value.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import block_linear
from memzoo.mixers.block_linear import BlockLinear

B, T, D, H, K, V = 2, 23, 6, 3, 4, 5


def setup(**fields):
    """A mixer, its parameters away from the start, an input and resets."""
    mixer = BlockLinear(D, heads=H, key_dim=K, value_dim=V, **fields)
    rng = np.random.default_rng(0)
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    params = jax.tree.map(lambda w: np.asarray(w + 0.3 * rng.normal(size=w.shape), np.float32), params)
    reset = np.zeros((B, T), bool)
    reset[1, [4, 5, 17]] = True
    return mixer, params, rng.normal(size=(B, T, D)).astype(np.float32), reset


def qkv(params, x):
    """Queries and keys of no negative channel, and values: [B, T, H, ...]."""
    p = params["params"]
    q, k, v = np.split((x @ p["qkv"]["kernel"]).reshape(*x.shape[:2], H, -1), [K, 2 * K], axis=-1)

    def positive(a, scale):
        return np.maximum(a / np.sqrt(np.mean(a**2, axis=(-2, -1), keepdims=True) + 1e-5) * scale, 0)

    return positive(q, p["q_norm"]["scale"]), positive(k, p["k_norm"]["scale"]), v


def reference(params, x, reset, block):
    """Query by query over the list of what it sees."""
    q, k, v = qkv(params, np.float64(x))
    theta = 10_000.0 ** (-2 * np.arange(K // 2) / K)
    pairs = lambda a_XHK: a_XHK[..., 0::2] + 1j * a_XHK[..., 1::2]
    y = np.zeros((B, T, H, V))
    for b in range(B):
        starts = sorted({0, T, *np.flatnonzero(reset[b])})
        for start, end in itertools.pairwise(starts):
            for i in range(start, end):
                seen = slice(start, min(end, start + ((i - start) // block + 1) * block))
                distance = (i - np.arange(T)[seen])[:, None, None]
                turned = pairs(q[b, i]) * np.conj(pairs(k[b, seen])) * np.exp(1j * distance * theta)
                above = np.einsum("xhf,xhv->hv", turned.real, v[b, seen])
                y[b, i] = above / np.maximum(np.einsum("hk,xhk->h", q[b, i], k[b, seen]), 1)[:, None]
    return np.einsum("bthv,hvd->btd", y, params["params"]["out"]["kernel"]) + params["params"]["out"]["bias"]


@pytest.mark.parametrize(
    ("impl", "block"), [("scan", 1), ("scan", 4), ("associative", 4), ("chunk", 1), ("chunk", 4), ("chunk", 99)]
)
@pytest.mark.cases(1)
def test_is_the_equation_of_the_paper(impl, block):
    mixer, params, x, reset = setup(block=block, impl=impl)
    y, _ = jax.jit(mixer.apply)(params, x, None, reset)
    np.testing.assert_allclose(y, reference(params, x, reset, block), atol=1e-5)


@pytest.mark.long
def test_gradients_of_the_forms_agree_with_blocks():
    def gradient(impl):
        mixer, params, x, reset = setup(block=4, impl=impl)
        loss = lambda params, x: jnp.sum(mixer.apply(params, x, None, reset)[0] ** 2)
        return jax.jit(jax.grad(loss, (0, 1)))(params, x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient("chunk"), gradient("scan"))


@pytest.mark.long
def test_a_block_at_a_time_equals_one_call():
    """As the paper generates, with a state that does not grow."""
    mixer, params, x, _ = setup(block=4)
    apply = jax.jit(mixer.apply)
    whole, last = apply(params, x)
    state, ys = mixer.initial_state(B), []
    for start in range(0, T, 4):
        y, state = apply(params, x[:, start : start + 4], state)
        ys.append(y)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, mixer.initial_state(B))
    np.testing.assert_allclose(np.concatenate(ys, axis=1), whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)


@pytest.mark.long
def test_a_token_sees_its_block_and_none_later():
    """The last token of the second block of 4 is seen by all of that block, and by none of the first."""
    mixer, params, x, _ = setup(block=4)
    apply = jax.jit(lambda x: mixer.apply(params, x)[0])
    other = x.copy()
    other[:, 7] += 1
    change = np.abs(np.asarray(apply(other) - apply(x))).max(axis=(0, 2))
    assert change[:4].max() < 1e-6 and change[4:].min() > 1e-4


@pytest.mark.long
def test_where_the_text_stands_does_not_matter():
    """Only distances do: far on, and where the counter overflows, all is the same."""
    mixer, params, x, _ = setup()
    apply = jax.jit(mixer.apply)
    _, state = apply(params, x)
    far = state._replace(n_B=np.full(B, 2**31 - 5, np.int32))
    turned, here = mixer.initial_state(B)._replace(n_B=far.n_B), mixer.initial_state(B)
    np.testing.assert_allclose(apply(params, x, turned)[0], apply(params, x, here)[0], atol=1e-5)


def test_a_token_alone_reads_its_own_value():
    """Its query and its key are turned alike, so the fraction cancels wherever z' q is above the floor."""
    mixer, params, x, _ = setup()
    q, k, v = (np.float32(a[:, :1]) for a in qkv(params, x))
    (S, z, *_), far, first = mixer.initial_state(B), np.full((B, 1), 1000), np.zeros((B, 1), int)
    y, _, z = block_linear.block_attention(q, k, v, far, first, S, z, None, impl="scan")
    above = (q * k).sum(-1)[..., None] > 1
    assert 0 < above.mean() < 1
    np.testing.assert_allclose(np.where(above, y, 0), np.where(above, v, 0), rtol=1e-5)
    np.testing.assert_array_equal(z, k[:, 0])


def test_initial_values():
    """Glorot's for weights, of q, k and v as one matrix; and with heads of 112 channels the floor is never met."""
    mixer = BlockLinear(224)
    assert mixer.sizes() == (2, 112, 112)
    x = np.random.default_rng(0).normal(size=(1, 300, 224)).astype(np.float32)
    p = jax.jit(mixer.init)(jax.random.key(0), x[:, :1])["params"]
    for name, inputs, outputs in (("qkv", 224, 3 * 224), ("out", 224, 224)):
        u = np.sort(np.ravel(np.float64(p[name]["kernel"])) * ((inputs + outputs) / 6) ** 0.5)
        assert np.abs((u + 1) / 2 - (np.arange(u.size) + 0.5) / u.size).max() < 2 * u.size**-0.5
    assert not np.any(p["out"]["bias"])
    q, k, _ = np.split(np.reshape(x @ p["qkv"]["kernel"], (1, 300, 2, 336)), 3, axis=-1)
    q, k = (np.maximum(a / np.sqrt(np.mean(a**2, axis=(-2, -1), keepdims=True)), 0) for a in (q, k))
    totals = (q * k).sum(-1)
    assert totals.min() > 5 and abs(totals.mean() - 112 / (2 * np.pi)) < 1


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"block": 0}, "block: expected an integer >= 1, got 0"),
        ({"heads": 5}, "width: expected a positive multiple of heads = 5, got 12"),
        ({"key_dim": 3}, "key_dim: expected an even integer >= 2, to turn pairs, got 3"),
        ({"value_dim": 0}, "value_dim: expected an integer >= 1, got 0"),
        ({"rope_base": -1.0}, "rope_base: expected a number > 0, got -1.0"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        memzoo.make("block_linear", width=12, **fields)
