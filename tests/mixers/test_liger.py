"""Facts of Liger, arXiv:2503.01496, against a plain loop of its equations.

Dims: B batch, T time, D width, H heads, G key heads, K key, V value.
"""

import jax
import numpy as np
import pytest

import memzoo

B, T, D, H, G, K, W = 2, 21, 10, 4, 2, 6, 5
SIZES = {"width": D, "heads": H, "key_heads": G, "head_dim": K, "window": W}


def apply(name="liger", **fields):
    return jax.jit(memzoo.make(name, **SIZES | fields).apply)


@pytest.fixture(scope="module")
def teacher():
    """A softmax layer's parameters, and an input."""
    rng = np.random.default_rng(0)
    params = jax.jit(memzoo.make("attention", **SIZES).init)(jax.random.key(0), np.zeros((1, 1, D), np.float32))
    return jax.tree.map(lambda w: 2 * np.asarray(w), params), rng.normal(size=(B, T, D)).astype(np.float32)


def reference(params, x_BTD, beta=0.5, tau=16):
    """Token by token in float64, heads repeated, rotation as complex numbers by places in the text."""
    q, k, v, out = (np.asarray(params["params"][name]["kernel"], np.float64) for name in ("q", "k", "v", "out"))
    q, k, v = (np.einsum("btd,dhk->bthk", x_BTD, kernel) for kernel in (q, k, v))
    k, v = (np.repeat(a, H // G, axis=2) for a in (k, v))
    soft = lambda a: np.exp(a) / np.exp(a).sum(-1, keepdims=True)
    theta = 10_000.0 ** (-np.arange(0, K, 2) / K)
    turn_TK = np.exp(1j * np.arange(T)[:, None] * theta)
    q_turned, k_turned = ((a[..., ::2] + 1j * a[..., 1::2]) * turn_TK[:, None] for a in (q, k))
    y = np.zeros(x_BTD.shape)
    for b, h in np.ndindex(B, H):
        S = np.zeros((K, K))
        for t in range(T):
            S = (1 / (1 + np.exp(-k[b, t, h]))) ** (1 / tau) * S.T
            S = S.T + np.outer(soft(k[b, t, h]), v[b, t, h])
            near = slice(max(0, t - W + 1), t + 1)
            weights = soft((k_turned[b, near, h] @ np.conj(q_turned[b, t, h])).real / np.sqrt(K))
            y[b, t] += ((1 - beta) * soft(q[b, t, h]) @ S + beta * weights @ v[b, near, h]) @ out[h]
    return y


@pytest.mark.parametrize("beta", [0.5, 0.0])
@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_is_the_papers_sum_of_gated_memory_and_window(teacher, impl, beta):
    params, x = teacher
    y, _ = apply(impl=impl, window_share=beta)(params, x)
    np.testing.assert_allclose(y, reference(params, x, beta), atol=2e-5)


@pytest.mark.long
def test_a_softmax_layers_weights_are_its_weights(teacher):
    """Name by name and shape by shape, nothing more and nothing less; with the window alone it is that layer."""
    params, x = teacher
    ours = jax.eval_shape(memzoo.make("liger", **SIZES).init, jax.random.key(0), x)
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, params)
    np.testing.assert_allclose(
        apply(window_share=1.0)(params, x)[0], apply("attention", sinks=0)(params, x)[0], atol=1e-6
    )


@pytest.mark.long
def test_keys_are_gates(teacher):
    """A channel whose keys are 100 never forgets; at -100 it keeps exp(-100 / 16) per token, at 0 (1/2)^(1/16)."""
    params, _ = teacher
    identity = np.zeros((D, G, K), np.float32)
    identity[:K] = np.eye(K)[:, None]
    silent = {"k": {"kernel": identity}, "v": jax.tree.map(np.zeros_like, params["params"]["v"])}
    before = memzoo.make("liger", **SIZES).initial_state(1)
    S = np.random.default_rng(1).normal(size=before.S_BGKV.shape).astype(np.float32)
    x = np.zeros((1, T, D), np.float32)
    x[..., :K] = [100, 100, -100, -100, 0, 0]
    after = apply()({"params": params["params"] | silent}, x, before._replace(S_BGKV=S))[1].S_BGKV
    kept = np.exp(-T / 16 * np.array([0, 0, 100, 100, np.log(2), np.log(2)]))
    np.testing.assert_allclose(after, kept[:, None] * S, rtol=1e-5, atol=1e-30)


def test_time_constants_at_the_start():
    """Keys are normal, so half of the gates keep more than 2^(-1/16): 23 tokens; a sixth less than 12 tokens."""
    mixer = memzoo.make("liger", width=64, heads=4)
    x_TD = np.random.default_rng(0).standard_normal((500, 64))
    kernel = jax.jit(mixer.init)(jax.random.key(0), x_TD[None, :1].astype(np.float32))["params"]["k"]["kernel"]
    keys = np.einsum("td,dhk->thk", x_TD, np.asarray(kernel))
    tokens = mixer.gate_temperature / np.log1p(np.exp(-keys))
    np.testing.assert_allclose(np.median(tokens), 16 / np.log(2), rtol=0.05)
    np.testing.assert_allclose(np.quantile(tokens, 0.1587), 16 / np.log1p(np.e), rtol=0.1)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
        ({"window_share": 1.5}, r"window_share: expected a number in 0 \.\.\. 1, got 1.5"),
        ({"gate_temperature": 0.0}, "gate_temperature: expected a number > 0, got 0.0"),
        ({"rope_base": -1.0}, "rope_base: expected a number > 0, got -1.0"),
        ({"heads": 4, "key_heads": 3}, "heads: expected a positive multiple of key_heads = 3, got 4"),
        ({"head_dim": 5}, "head_dim: expected an even integer >= 2, to rotate pairs, got 5"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(ValueError, match=says):
        memzoo.make("liger", **SIZES | fields)
