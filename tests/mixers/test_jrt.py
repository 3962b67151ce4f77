"""Facts of JRT-RNN, arXiv:2407.05483: prefix linear attention.

Dims: B batch, T time, D width, H heads, K key, V value, M tokens of the prefix.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers.jrt import JRT

B, T, D, H, K, V, M = 2, 23, 6, 3, 4, 5, 7


def setup(**fields):
    """A mixer, its parameters, larger than at the start, an input and resets, one of them inside a prefix."""
    mixer = JRT(D, **{"heads": H, "feature_dim": K, "value_dim": V, "prefix": M} | fields)
    rng = np.random.default_rng(0)
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    params = jax.tree.map(lambda w: np.asarray(w + 0.3 * rng.normal(size=w.shape), np.float32), params)
    reset = np.zeros((B, T), bool)
    reset[1, [5, 6, 9]] = True
    return mixer, params, rng.normal(size=(B, T, D)).astype(np.float32), reset


def reference(params, x, reset, look_ahead, prefix=M):
    """Query by query, by weights 1 + s + s^2 / 2 and no feature map."""
    p = {name: np.float64(leaf["kernel"]) for name, leaf in params["params"].items()}
    q, k, v, prefix_k, prefix_v = (
        np.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "k", "v", "prefix_k", "prefix_v")
    )
    y = np.zeros(x.shape)
    for b in range(B):
        start = 0
        for i in range(T):
            start = i if reset[b, i] else start
            later = np.flatnonzero(reset[b, i + 1 :])
            end = i + 1 + later[0] if later.size else T
            sees = range(start, min(start + prefix, end if look_ahead and i < start + prefix else i + 1))
            seen = [(k[b, j], v[b, j]) for j in range(start, i + 1)] + [(prefix_k[b, j], prefix_v[b, j]) for j in sees]
            scores = np.stack([(q[b, i] * key).sum(-1) for key, _ in seen]) / np.sqrt(K)
            weights = 1 + scores + scores**2 / 2
            read = np.einsum("xh,xhv->hv", weights / weights.sum(0), np.stack([value for _, value in seen]))
            y[b, i] = np.einsum("hv,hvd->d", read, p["out"])
    return y


@pytest.mark.parametrize(
    ("impl", "look_ahead"), [("scan", False), ("scan", True), ("associative", True), ("chunk", False), ("chunk", True)]
)
@pytest.mark.cases(1)
def test_is_the_equation_of_the_paper(impl, look_ahead):
    mixer, params, x, reset = setup(impl=impl, look_ahead=look_ahead)
    y, _ = jax.jit(mixer.apply)(params, x, None, reset)
    np.testing.assert_allclose(y, reference(params, x, reset, look_ahead), atol=1e-5)


@pytest.mark.long
def test_gradients_of_the_forms_agree_when_looking_ahead():
    def gradient(impl):
        mixer, params, x, reset = setup(impl=impl, look_ahead=True)
        loss = lambda params, x: jnp.sum(mixer.apply(params, x, None, reset)[0] ** 2)
        return jax.jit(jax.grad(loss, (0, 1)))(params, x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient("chunk"), gradient("scan"))


@pytest.mark.long
def test_prefill_then_one_token_at_a_time():
    """The prefix in one call, the rest as it comes; and the prefix in pieces leaves the same state behind."""
    mixer, params, x, _ = setup(look_ahead=True)
    apply = jax.jit(mixer.apply)
    whole, last = apply(params, x)
    y, state = apply(params, x[:, :M])
    ys, after_prefix = [y], state
    for t in range(M, T):
        y, state = apply(params, x[:, t : t + 1], state)
        ys.append(y)
    np.testing.assert_allclose(np.concatenate(ys, axis=1), whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state, last)
    state = mixer.initial_state(B)
    for t in range(M):
        _, state = apply(params, x[:, t : t + 1], state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, after_prefix)


def test_who_sees_whom():
    """A prefix token sees all of the prefix; none sees a token that is both after it and after the prefix."""
    mixer, params, x, _ = setup(look_ahead=True)
    apply = jax.jit(lambda x: mixer.apply(params, x)[0])
    y = np.asarray(apply(x))
    sees = np.zeros((T, T), bool)
    for j in range(T):
        other = x.copy()
        other[:, j] += 1
        sees[:, j] = np.abs(np.asarray(apply(other)) - y).max(axis=(0, 2)) > 1e-6
    i, j = np.arange(T)[:, None], np.arange(T)
    np.testing.assert_array_equal(sees, (j <= i) | ((j < M) & (i < M)))


def test_the_past_is_a_set_once_the_prefix_is_read():
    """In the order of the prefix its last token, which read all before, and all later ones see no difference."""
    mixer, params, x, _ = setup(look_ahead=True)
    apply = jax.jit(lambda x: mixer.apply(params, x)[0])
    other = np.concatenate([x[:, : M - 1][:, ::-1], x[:, M - 1 :]], axis=1)
    np.testing.assert_allclose(apply(other)[:, M - 1 :], apply(x)[:, M - 1 :], atol=1e-5)


@pytest.mark.long
def test_without_a_prefix_it_is_based():
    mixer, params, x, reset = setup(prefix=0, look_ahead=True)
    based = memzoo.make("based", width=D, heads=H, feature_dim=K, value_dim=V)
    y, state = jax.jit(mixer.apply)(params, x, None, reset)
    want, based_state = jax.jit(based.apply)(params, x, None, reset)
    np.testing.assert_allclose(y, want, atol=1e-6)
    np.testing.assert_allclose(state.S_BHEV, based_state.S_BHEV, atol=1e-6)


@pytest.mark.long
def test_a_prefix_that_ends_early():
    """With n_B = M the next tokens are the answer's, as if the prefix had been no longer."""
    mixer, params, x, _ = setup()
    short = JRT(D, heads=H, feature_dim=K, value_dim=V, prefix=3)
    _, state = jax.jit(mixer.apply)(params, x[:, :3])
    y, last = jax.jit(mixer.apply)(params, x[:, 3:], state._replace(n_B=np.full(B, M, np.int32)))
    want, want_last = jax.jit(short.apply)(params, x)
    np.testing.assert_allclose(y, want[:, 3:], atol=1e-5)
    np.testing.assert_allclose(last.S_BHEV, want_last.S_BHEV, atol=1e-4)


@pytest.mark.long
def test_each_row_may_have_a_prefix_of_its_own():
    """With n_B = M - m to begin with, nothing of a row's answer is seen before its time: here of m = 3 and M."""
    mixer, params, x, _ = setup(look_ahead=True)
    y, _ = jax.jit(mixer.apply)(params, x, mixer.initial_state(B)._replace(n_B=np.array([M - 3, 0], np.int32)))
    want = [reference(params, x, np.zeros((B, T), bool), look_ahead=True, prefix=prefix) for prefix in (3, M)]
    np.testing.assert_allclose(y, [want[0][0], want[1][1]], atol=1e-5)


def test_the_state_is_that_of_based():
    ours, based = (memzoo.make(name, width=256).initial_state(1) for name in ("jrt", "based"))
    assert (ours.S_BHEV.shape, ours.z_BHE.shape) == (based.S_BHEV.shape, based.z_BHE.shape)
    assert ours.n_B.shape == (1,)


def test_initial_scores_are_of_unit_size():
    """x = q' k / sqrt(K) of normal inputs has deviation 1, with both kinds of keys, where the series is about exp."""
    mixer = memzoo.make("jrt", width=64, heads=4)
    x_TD = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    p = jax.jit(mixer.init)(jax.random.key(0), x_TD[None, :1])["params"]
    for keys in ("k", "prefix_k"):
        q, k = (np.einsum("td,dhk->thk", x_TD, p[name]["kernel"]) for name in ("q", keys))
        np.testing.assert_allclose(np.std(np.einsum("ihk,jhk->hij", q, k) / 4, axis=(1, 2)), 1, atol=0.15)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"prefix": -1}, r"prefix: expected an integer in 0 \.\.\. 2\*\*30 - 1, got -1"),
        ({"look_ahead": "no"}, "look_ahead: expected True or False, got 'no'"),
        ({"feature_dim": 0}, "feature_dim: expected an integer >= 1, got 0"),
        ({"value_dim": 0}, "value_dim: expected an integer >= 1, got 0"),
        ({"heads": 5}, "width: expected a positive multiple of heads = 5, got 12"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        memzoo.make("jrt", width=12, **fields)
