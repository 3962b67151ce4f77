"""Facts of "Attention as an RNN", arXiv:2405.13956."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import aaren

T, H, K, V = 70, 2, 3, 5
attention = jax.jit(aaren.attention_of_one_query, static_argnums=5)
FRESH = aaren.State(*(np.zeros(shape, np.float32) for shape in ((1, H), (1, H), (1, H, V))))


def inputs(scale=1.0):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(H, K)), scale * rng.normal(size=(1, T, H, K)), rng.normal(size=(1, T, H, V))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def softmax_attention(q, k, v):
    """Of the same query with the keys and values up to each token."""
    y = np.zeros(v.shape)
    for t in range(T):
        s = np.einsum("hk,bshk->bhs", np.float64(q), np.float64(k[:, : t + 1])) / np.sqrt(K)
        weights = np.exp(s - s.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y[:, t] = np.einsum("bhs,bshv->bhv", weights, v[:, : t + 1])
    return y


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (30, 0), (1e4, 0), (1, -300)])
@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
@pytest.mark.cases(9)
def test_is_softmax_attention_of_one_query(impl, scale, offset):
    """Scores up to 1e4, and all of them far below 0, where exp without the running maximum would underflow."""
    q, k, v = inputs(scale)
    k = (k + offset * q / np.sum(q**2, -1, keepdims=True)).astype(np.float32)
    y_BTHV, _ = attention(q, k, v, FRESH, None, impl)
    np.testing.assert_allclose(y_BTHV, softmax_attention(q, k, v), atol=2e-5 + 3e-7 * max(scale, -offset))


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_states_of_two_halves_merge_into_that_of_the_whole(impl):
    """The paper's operator on (m, u, w), sec. 3.2, in numpy, and u, w against their definitions."""
    q, k, v = inputs(3.0)
    parts = slice(35), slice(35, T), slice(T)
    one, two, whole = (attention(q, k[:, part], v[:, part], FRESH, None, impl)[1] for part in parts)
    m = np.maximum(one.m_BH, two.m_BH)
    left, right = np.exp(one.m_BH - m), np.exp(two.m_BH - m)
    np.testing.assert_allclose(whole.m_BH, m, rtol=1e-6)
    np.testing.assert_allclose(whole.u_BH, left * one.u_BH + right * two.u_BH, rtol=1e-5)
    np.testing.assert_allclose(whole.w_BHV, left[..., None] * one.w_BHV + right[..., None] * two.w_BHV, atol=1e-5)
    s = np.einsum("hk,bthk->bth", q, k) / np.sqrt(K)
    np.testing.assert_allclose(whole.u_BH, np.sum(np.exp(s - s.max(1, keepdims=True)), 1), rtol=1e-5)


def test_the_order_of_the_past_does_not_matter():
    q, k, v = inputs()
    order = np.random.default_rng(1).permutation(T)
    last = [attention(q, k[:, i], v[:, i], FRESH, None, "chunk")[0][:, -1] for i in (np.arange(T), order)]
    np.testing.assert_allclose(*last, atol=1e-5)


@pytest.mark.long
def test_the_first_token_reads_itself_and_no_gradient_is_lost_where_scores_are_extreme():
    q, k, v = inputs(1e4)
    for impl in ("scan", "chunk"):
        run = lambda q, k, v, impl=impl: aaren.attention_of_one_query(q, k, v, FRESH, None, impl)[0]
        y, pull = jax.vjp(jax.jit(run), q, k, v)
        np.testing.assert_allclose(y[:, 0], v[:, 0], rtol=1e-6)
        d_q, d_k, d_v = pull(jnp.ones_like(y))
        assert all(np.isfinite(d).all() for d in (d_q, d_k, d_v))
        np.testing.assert_allclose(np.sum(d_v, (0, 1)), T * np.ones((H, V)), rtol=1e-5)  # weights sum to 1


def test_initial_scores_are_of_unit_size():
    """As those of attention: the largest of 100 weights is nowhere near 1, nor are they all alike."""
    mixer = memzoo.make("aaren", width=64, heads=4)
    x_TD = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    init = jax.jit(jax.vmap(lambda key: mixer.init(key, x_TD[None, :1])))
    p = init(jax.random.split(jax.random.key(0), 40))["params"]
    scores = np.einsum("nhk,ndhk,td->nht", p["query"], p["k"]["kernel"], x_TD) / 4
    np.testing.assert_allclose(np.sqrt(np.mean(scores**2)), 1, atol=0.1)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match=r"value_dim: expected an integer >= 1, got 0"):
        memzoo.make("aaren", width=8, value_dim=0)
