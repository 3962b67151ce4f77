"""Facts of the HGRN2 paper, arXiv:2404.07904."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import gla, hgrn2

B, T, H, K, V = 1, 70, 2, 3, 5
expanded_hgru = jax.jit(hgrn2.expanded_hgru, static_argnums=5)


def inputs():
    rng = np.random.default_rng(0)
    o, i, S = rng.normal(size=(B, T, H, K)), rng.normal(size=(B, T, H, V)), rng.normal(size=(B, H, K, V))
    f = rng.uniform(size=(B, T, H, K)) ** np.array([0.01, 0.3, 2])  # long, middling and short memory
    return o, f, i, S


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
def test_each_value_channel_is_an_hgru_of_the_forget_gates(impl):
    """Sec. 3: column v of S is h_t = f_t h_{t-1} + (1 - f_t) i_tv, one HGRN per value channel, read out by o_t."""
    o, f, i, S = inputs()
    want, last = np.zeros((B, T, H, V)), S.copy()
    for t in range(T):
        for v in range(V):
            last[..., v] = f[:, t] * last[..., v] + (1 - f[:, t]) * i[:, t, :, v, None]
            want[:, t, :, v] = np.sum(o[:, t] * last[..., v], -1)
    o, log_f, i, S = (np.float32(z) for z in (o, np.log(f), i, S))
    y_BTHV, S_BHKV = expanded_hgru(o, log_f, i, S, None, impl)
    np.testing.assert_allclose(y_BTHV, want, atol=2e-5)
    np.testing.assert_allclose(S_BHKV, last, atol=2e-5)


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_is_gated_linear_attention_with_key_one_minus_f(impl):
    o, f, i, S = (np.float32(z) for z in inputs())
    log_f = np.log(f)
    ours = expanded_hgru(o, log_f, i, S, None, impl)
    theirs = jax.jit(gla.gated_linear_attention, static_argnums=6)(o, 1 - np.exp(log_f), i, log_f, S, None, impl)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_state_is_a_mean_of_the_inputs():
    """Gates are tied, so no entry leaves the range of what was written in its column, however long the sequence."""
    o, f, i, _ = (np.float32(z) for z in inputs())
    _, S_BHKV = expanded_hgru(o, np.log(f), i, np.zeros((B, H, K, V), np.float32), None, "chunk")
    low, high = np.minimum(i.min(1), 0)[:, :, None], np.maximum(i.max(1), 0)[:, :, None]
    assert np.all(low <= S_BHKV) and np.all(high >= S_BHKV)
    _, S_BHKV = expanded_hgru(o, np.log(f), 0 * i + 2, np.full((B, H, K, V), 2, np.float32), None, "chunk")
    np.testing.assert_allclose(S_BHKV, 2, rtol=1e-5)


@pytest.mark.parametrize("bound", (0.0, 1e-10, 0.3, 0.9))
def test_the_bounded_gate_is_exact_at_both_ends(bound):
    """Where f rounds to 1 in float32, log f still says by how much it is below 1; where it underflows, log f is a."""
    a = np.array([-200.0, -50, -20, -5, 0, 3, 10, 17, 30])
    sigmoid, rest = 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(a))
    want = np.where(a > 0, np.log1p(-(1 - bound) * np.minimum(rest, 0.5)), np.log(bound + (1 - bound) * sigmoid))
    found, slope = jax.jit(lambda a: jax.jvp(lambda a: hgrn2.log_gate(a, bound), (a,), (jnp.ones_like(a),)))(
        np.float32(a)
    )
    np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(slope, (1 - bound) * sigmoid * rest / np.exp(want), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lower_bound", (0.0, 0.75))
def test_initial_forget_gates(lower_bound):
    """Spread evenly about the middle of [lower_bound, 1], where a sigmoid of a standard normal lies."""
    mixer = memzoo.make("hgrn2", width=64, lower_bound=lower_bound)
    x_BTD = np.random.default_rng(1).standard_normal((1, 300, 64)).astype(np.float32)
    kernel = np.asarray(jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"]["forget"]["kernel"])
    f = np.exp(hgrn2.log_gate(x_BTD[0] @ kernel.reshape(64, 64), lower_bound))
    place = (f - lower_bound) / (1 - lower_bound)
    assert f.min() > lower_bound and abs(np.mean(place) - 0.5) < 0.02
    np.testing.assert_allclose(np.percentile(place, [5, 25, 75, 95]), [0.162, 0.338, 0.662, 0.838], atol=0.02)


@pytest.mark.parametrize("lower_bound", (0.0, 0.75))
@pytest.mark.cases(1)
def test_no_input_forgets_faster_than_the_bound(lower_bound):
    mixer = memzoo.make("hgrn2", width=6, heads=2, lower_bound=lower_bound)
    x_BTD = 20 * np.random.default_rng(0).standard_normal((4, 9, 6)).astype(np.float32)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    run, ones = jax.jit(mixer.apply), hgrn2.State(np.ones((4, 2, 3, 3), np.float32))
    left = run(params, x_BTD, ones)[1].S_BHKV - run(params, x_BTD, mixer.initial_state(4))[1].S_BHKV
    assert np.all(left <= 1 + 1e-5) and np.all(left >= lower_bound**9 * (1 - 1e-3) - 1e-5)
    assert np.min(left) < 0.01 or lower_bound > 0


def test_sizes_and_bounds():
    sizes = {width: memzoo.make("hgrn2", width=width).sizes() for width in (256, 96, 5)}
    assert sizes == {256: (2, 128, 128), 96: (3, 32, 32), 5: (5, 1, 1)}
    with pytest.raises(ValueError, match=r"key_dim: expected an integer >= 1, got 0"):
        memzoo.make("hgrn2", width=8, key_dim=0)
    for bound in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"lower_bound: expected 0 <= lower_bound < 1, got {bound}"):
            memzoo.make("hgrn2", width=6, lower_bound=bound)
