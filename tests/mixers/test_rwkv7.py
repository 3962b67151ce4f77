"""Facts of the RWKV-7 paper, arXiv:2503.14456."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import ops
from memzoo.mixers import rwkv7

B, T, H, K, V, D = 2, 21, 2, 3, 5, 8
FIELDS = {"width": D, "heads": H, "key_dim": K, "value_dim": V, "decay_rank": 4, "rate_rank": 6, "gate_rank": 7}
wkv = jax.jit(rwkv7.wkv, static_argnums=8)


def inputs():
    rng = np.random.default_rng(0)
    r, k, kappa = rng.standard_normal((3, B, T, H, K))
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    a, log_w = rng.uniform(size=(B, T, H, K)), -np.exp(-0.5) * rng.uniform(size=(B, T, H, K))
    S = rng.standard_normal((B, H, K, V))
    return tuple(x.astype("f") for x in (r, k, rng.standard_normal((B, T, H, V)), kappa, a, log_w, S))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(p, x_BTD):
    """The layer as the paper writes it, in row vectors and with its state [V, K], in float64."""
    p = jax.tree.map(np.float64, p)
    y_BTD = np.zeros(x_BTD.shape)
    for row in range(B):
        wkv_HVK, last_D = np.zeros((H, V, K)), np.zeros(D)
        for t in range(T):
            x = x_BTD[row, t]
            x_r, x_d, x_k, x_v, x_a, x_g = (x + (last_D - x) * mu for mu in p["mix"])
            last_D = x
            r, k, v = x_r @ p["r"]["kernel"], x_k @ p["k"]["kernel"], (x_v @ p["v"]["kernel"]).reshape(H, V)
            d = np.tanh(x_d @ p["decay_in"]["kernel"]) @ p["decay_out"]["kernel"] + p["decay_out"]["bias"]
            a = sigmoid(x_a @ p["rate_in"]["kernel"] @ p["rate_out"]["kernel"] + p["rate_out"]["bias"])
            g = (sigmoid(x_g @ p["gate_in"]["kernel"]) @ p["gate_out"]["kernel"]).reshape(H, V)
            r, k, a, w = (z.reshape(H, K) for z in (r, k, a, np.exp(-np.exp(-0.5) * sigmoid(d))))
            kappa, k = k * p["xi"], k * (1 + p["alpha"] * (a - 1))
            o_HV = np.zeros((H, V))
            for h in range(H):
                kappa_hat = kappa[h] / np.linalg.norm(kappa[h])
                transition_KK = np.diag(w[h]) - np.outer(kappa_hat, a[h] * kappa_hat)
                wkv_HVK[h] = wkv_HVK[h] @ transition_KK + np.outer(v[h], k[h])
                y = wkv_HVK[h] @ r[h]
                y = (y - y.mean()) / np.sqrt(y.var() + 1e-5 * V) * p["norm"]["scale"][h] + p["norm"]["bias"][h]
                o_HV[h] = g[h] * (y + (r[h] * p["rho"][h] * k[h]).sum() * v[h])
            y_BTD[row, t] = o_HV.ravel() @ p["out"]["kernel"]
    return y_BTD, np.swapaxes(wkv_HVK, 1, 2)


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_layer_is_the_papers(impl):
    rng = np.random.default_rng(1)
    x_BTD = rng.standard_normal((B, T, D)).astype("f")
    mixer = memzoo.make("rwkv7", impl=impl, **FIELDS)
    p = jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"]
    p = jax.tree.map(lambda leaf: np.asarray(leaf + 0.3 * rng.standard_normal(leaf.shape), "f"), p)
    y_BTD, state = jax.jit(mixer.apply)({"params": p}, x_BTD)
    want_BTD, last_HKV = by_hand(p, x_BTD)
    np.testing.assert_allclose(y_BTD, want_BTD, atol=2e-5 * np.abs(want_BTD).max())
    np.testing.assert_allclose(state.S_BHKV[-1], last_HKV, atol=1e-4)
    np.testing.assert_array_equal(state.past_BPD[:, 0], x_BTD[:, -1])


def test_transition_is_a_contraction_with_real_eigenvalues():
    """In (-1, 1), as it is similar to diag(w) - c c' with c = sqrt(a) kappa; unlike DeltaNet's it is not symmetric."""
    *_, kappa, a, log_w, _ = (np.float64(x) for x in inputs())
    b = np.swapaxes((a * kappa)[..., None, :], -1, -2)
    transition = np.eye(K) * np.exp(log_w)[..., None, :] - b * kappa[..., None, :]
    values = np.linalg.eigvals(transition)
    assert np.abs(values.imag).max() < 1e-6 and np.abs(values.real).max() < 1 and values.real.min() < 0
    r, k, v, *_ = inputs()
    eye_BTHKK = np.broadcast_to(np.eye(K, dtype="f"), (B, 1, H, K, K))
    for column in range(K):  # what the step does to each unit vector
        part = (x[:, :1].astype("f") for x in (r, 0 * k, 0 * v, kappa, a, log_w))
        _, moved = wkv(*part, eye_BTHKK[:, 0, ..., column : column + 1].repeat(V, -1), None, "scan")
        np.testing.assert_allclose(moved[..., 0], transition[:, 0, ..., column], atol=1e-6)


@pytest.mark.long
def test_without_erasing_is_gated_linear_attention():
    r, k, v, kappa, a, log_w, S = inputs()
    ours = wkv(r, k, v, kappa, 0 * a, log_w, S, None, "chunk")
    for one, other in zip(ours, ops.linear_attention(r, k, v, log_w, S, impl="scan"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.long
def test_without_decay_and_with_one_rate_is_deltanet():
    """w = 1, a the same in all channels, and beta kappa written."""
    r, _, v, kappa, a, log_w, S = inputs()
    beta = a[..., :1]
    ours = wkv(r, beta * kappa, v, kappa, np.broadcast_to(beta, a.shape), 0 * log_w, S, None, "chunk")
    theirs = ops.delta_rule(r, kappa, v, beta[..., 0], None, S, impl="scan")
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_full_rate_without_decay_replaces_what_the_erased_key_held():
    _, _, v, kappa, a, log_w, S = inputs()
    y_BTHV, _ = wkv(kappa, kappa, v, kappa, np.ones_like(a), 0 * log_w, S, None, "chunk")
    np.testing.assert_allclose(y_BTHV, v, atol=1e-5)


@pytest.mark.long
def test_a_state_fades_by_two_fifths_per_token_at_most():
    """w is in (exp(-e^-1/2), 1), however extreme the token: 0.545 at least."""
    mixer = memzoo.make("rwkv7", **FIELDS)
    rng = np.random.default_rng(2)
    x_BTD = rng.standard_normal((B, 2, D)).astype("f")
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    S = mixer.initial_state(B)._replace(S_BHKV=np.ones((B, H, K, V), "f"))
    p = jax.tree.map(np.asarray, params["params"])
    p["rate_out"]["bias"] = np.full_like(p["rate_out"]["bias"], -1e4)  # no erasing
    p["v"]["kernel"] = 0 * p["v"]["kernel"]  # nor writing
    for d, least, most in ((1e4, 0.5452, 0.5453), (-1e4, 1, 1)):
        p["decay_out"]["bias"] = np.full_like(p["decay_out"]["bias"], d)
        _, state = jax.jit(mixer.apply)({"params": p}, x_BTD[:, :1], S)
        assert least <= np.min(state.S_BHKV) <= np.max(state.S_BHKV) <= most


def test_initial_time_constants():
    """Whatever the token: slowest in the first channel, fastest in the last, longer in deeper layers."""
    time_constants = {}
    for layer in (0, 3):
        mixer = memzoo.make("rwkv7", width=128, layer=layer, layers=4)
        shapes = jax.eval_shape(lambda m=mixer: m.init(jax.random.key(0), jnp.zeros((1, 1, 128))))["params"]
        assert shapes["decay_out"]["bias"].shape == (128,) and mixer.sizes() == (2, 64, 64)
        d_E = rwkv7.decay_bias(64, layer / 3)(None, (128,))
        time_constants[layer] = np.exp(0.5) / sigmoid(np.float64(d_E))
    first, last = time_constants.values()
    np.testing.assert_allclose(first[[0, -1]], [4917, 1.731], rtol=1e-3)
    assert np.all(last >= first * (1 - 1e-6)) and np.median(last) > 2 * np.median(first)
    # By head: at either end of one z |z| = 1 away from its middle, -6 + 6 n / 127 + 0.5 -+ 2.5.
    d_at = {0: -8.0, 63: -3 + 6 * 63 / 127, 64: -8 + 6 * 64 / 127, 127: 3.0}
    for n, d in d_at.items():
        np.testing.assert_allclose(first[n], np.exp(0.5) * (1 + np.exp(-d)), rtol=1e-5)


def test_initial_layer():
    """Decay, rate and output gate do not see the token yet, `out` is 0, mixes run from all of the past to little."""
    mixer = memzoo.make("rwkv7", width=16, heads=2, layer=1, layers=4)
    p = jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 16)))["params"])
    assert not any(p[name]["kernel"].any() for name in ("decay_in", "rate_in", "gate_in", "out"))
    assert p["decay_in"]["kernel"].shape == p["rate_in"]["kernel"].shape == (16, 32)
    for name, scale in (("r", 1), ("k", 0.1), ("v", 1)):
        np.testing.assert_allclose(p[name]["kernel"].T @ p[name]["kernel"], scale**2 * np.eye(16), atol=1e-5)
    np.testing.assert_allclose(p["decay_out"]["kernel"].T @ p["decay_out"]["kernel"], 0.02 * np.eye(16), atol=1e-5)
    a = sigmoid(p["rate_out"]["bias"])
    assert 0.3 < a.min() < a.max() < 0.65 and np.allclose(p["xi"].ravel()[[0, -1]], [0.76, 0.66])
    np.testing.assert_allclose(p["norm"]["scale"], (2 / 4) ** 0.7, rtol=1e-6)
    np.testing.assert_allclose(p["mix"][:, 0], 1)
    np.testing.assert_allclose(p["mix"][0], 1 - (np.arange(16) / 16) ** (0.2 * 0.75), atol=1e-6)
    np.testing.assert_allclose(p["mix"][1], 1 - (np.arange(16) / 16) ** (0.9 * 0.75), atol=1e-6)


def test_ranks_are_those_that_the_released_code_suggests():
    """2.5, 2.5 and 5 sqrt(width), to the nearest 32, for the widths of the released models."""
    got = [memzoo.make("rwkv7", width=width).ranks() for width in (768, 1024, 2048, 2560)]
    assert got == [(64, 64, 128), (64, 64, 160), (128, 128, 224), (128, 128, 256)]


def test_bad_fields_are_named():
    make = lambda **fields: memzoo.make("rwkv7", **{"width": D, **fields})
    for field in ("key_dim", "value_dim", "decay_rank", "rate_rank", "gate_rank", "layers"):
        with pytest.raises(ValueError, match=f"{field}: expected an integer >= 1, got 0"):
            make(**{field: 0})
    with pytest.raises(ValueError, match="width: expected a positive multiple of heads = 3, got 8"):
        make(heads=3)
    with pytest.raises(ValueError, match=r"layer: expected an integer in \[0, layers = 2\), got 2"):
        make(layer=2, layers=2)
