"""Facts of the Lightning Attention papers, arXiv:2405.17381, arXiv:2401.04658 and arXiv:2307.14995."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import lightning, retnet
from tests.test_contract import assert_close

T, H, K, V = 70, 3, 4, 5
lightning_attention = jax.jit(lightning.lightning_attention, static_argnums=6)


def inputs():
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in [(1, T, H, K)] * 2 + [(1, T, H, V), (1, H, K, V)]]


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
def test_is_the_left_product(impl):
    """O = [(Q K') * M] V with M_ts = lambda^(t - s), eq. 3 with the decays of eq. 9, plus lambda^(t + 1) Q S."""
    q, k, v, S = inputs()
    log_lambda = np.array([-0.01, -0.3, -8.0])
    y_BTHV, S_BHKV = lightning_attention(q, k, v, np.float32(log_lambda), S, None, impl)
    q, k, v, S = (np.float64(z[0]) for z in (q, k, v, S))
    distance = np.arange(T)[:, None] - np.arange(T)
    M = np.where(distance >= 0, np.exp(log_lambda[:, None, None] * np.maximum(distance, 0)), 0)
    faded = np.exp(log_lambda * np.arange(1, T + 1)[:, None])
    scores = np.einsum("thk,shk->hts", q, k) * M
    want = np.einsum("hts,shv->thv", scores, v) + np.einsum("th,thk,hkv->thv", faded, q, S)
    np.testing.assert_allclose(y_BTHV[0], want, atol=5e-5)
    last = np.einsum("hs,shk,shv->hkv", M[:, -1], k, v) + faded[-1][:, None, None] * S
    np.testing.assert_allclose(S_BHKV[0], last, atol=5e-5)


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
def test_lrpe_is_a_phase_of_how_far_apart_tokens_are(impl):
    """Eq. 9: a_ts = Re sum over channels of q_t k_s lambda^(t - s) exp(i theta (t - s)), and of the state before."""
    q, k, v, S = inputs()
    S = S + 1j * S[..., ::-1]
    log_lambda, theta = np.array([-0.01, -0.3, 0.0]), np.random.default_rng(1).uniform(-7, 7, (H, K))
    xs = q, k, v, np.float32(log_lambda), np.complex64(S), None, impl, np.float32(theta)
    y_BTHV, S_BHKV = lightning_attention(*xs)
    turn = np.exp(log_lambda[:, None] + 1j * np.float32(theta).astype(float))  # of a step, [H, K]
    want, last = np.zeros((T, H, V)), S[0]
    for t in range(T):
        past = [np.einsum("hk,hk,hv->hkv", turn ** (t - s), k[0, s], v[0, s]) for s in range(t + 1)]
        last = sum(past) + (turn ** (t + 1))[..., None] * S[0]
        want[t] = np.einsum("hk,hkv->hv", q[0, t], last).real
    np.testing.assert_allclose(y_BTHV[0], want, atol=2e-4)
    np.testing.assert_allclose(S_BHKV[0], last, atol=2e-4)


@pytest.mark.parametrize("x64", [False, True])
def test_turns_are_exact_however_many(x64):
    """m turns and n turns are m + n turns; n theta in float32 would be off by n theta / 2^24, half a turn here."""
    theta = np.float32(np.random.default_rng(0).uniform(-7, 7, 50))
    with jax.enable_x64(x64):
        angles = jax.jit(lightning.angles)
        phase = lambda n: np.exp(1j * np.float64(angles(theta, np.asarray(n))))
        assert np.abs(phase(1) - np.exp(1j * np.float64(theta))).max() < 1e-6
        for m, n in ((1, 2), (1000, 1), (4000, 96), (10**8, 1), (10**8 - 1, 999)):
            assert np.abs(phase(m) * phase(n) - phase(m + n)).max() < 2e-6


@pytest.mark.long
def test_lrpe_in_forms_and_pieces_across_resets():
    """Outputs, last state and gradients: the whole by `scan`, and two pieces, one longer than a chunk, by `chunk`."""
    rng = np.random.default_rng(0)
    x_BTD = rng.standard_normal((2, T, 6)).astype(np.float32)
    reset_BT = np.zeros((2, T), bool)
    reset_BT[0, [0, 20, 21]] = reset_BT[1, [3, 68]] = True
    weights_BTD = rng.standard_normal(x_BTD.shape).astype(np.float32)

    def run(impl, cuts):
        mixer = memzoo.make("lightning", width=6, heads=2, value_dim=4, depth=0.5, lrpe=True, impl=impl)

        def loss(params, x_BTD, state):
            ys = []
            for i, j in itertools.pairwise(cuts):
                y_BTD, state = mixer.apply(params, x_BTD[:, i:j], state, reset_BT[:, i:j])
                ys.append(y_BTD)
            y_BTD = jnp.concatenate(ys, axis=1)
            return jnp.sum(y_BTD * weights_BTD) + jnp.sum(jnp.abs(state.S_BHKV) ** 2), (y_BTD, state)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    mixer = memzoo.make("lightning", width=6, heads=2, value_dim=4, lrpe=True)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD[:, :1])
    normal = rng.standard_normal((2, 2, 2, 3, 4)).astype(np.float32)
    state = lightning.State(np.complex64(normal[0] + 1j * normal[1]))
    want = run("scan", (0, T))(params, x_BTD, state)
    assert_close(run("chunk", (0, 3, T))(params, x_BTD, state), want, 1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(want))


def test_the_frequencies_that_lrpe_begins_with():
    """The released code's 10000^(-2 j / d), over the channels of all heads; and they are learned."""
    mixer = memzoo.make("lightning", width=12, heads=3, lrpe=True)
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 12)))["params"]
    want = [10_000 ** (-2 * j / 12) for j in range(12)]
    np.testing.assert_allclose(np.ravel(params["theta"]), want, rtol=1e-5)
    assert params["theta"].shape == (3, 4)
    half = np.float64(lightning.frequencies(None, (16, 64), jnp.bfloat16)).ravel()
    np.testing.assert_allclose(half, 10_000 ** (-2 * np.arange(1024) / 1024), rtol=2**-8)


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_with_retnets_decays_is_retention(impl):
    q, k, v, S = inputs()
    log_gamma_H = np.log1p(-(2.0 ** (-5 - np.arange(H)))).astype(np.float32)
    ours = lightning_attention(q, k, v, log_gamma_H, S, None, impl)
    theirs = jax.jit(retnet.retention, static_argnums=6)(q, k, v, log_gamma_H, S, None, "scan")
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_decays_of_the_released_models():
    """MiniMax's and TransNormerLLM's slopes: 2^(-8 h / H), and with 12 heads those of 8 and every other one of 16."""
    eight = 2.0 ** -np.arange(1, 9)
    np.testing.assert_allclose(lightning.log_decays(8, 0, "released"), -eight * (1 + 1e-5))
    np.testing.assert_allclose(lightning.log_decays(8, 0.25, "released"), -eight * (0.75 + 1e-5))
    np.testing.assert_allclose(lightning.log_decays(8, 1, "released"), -eight * 1e-5)
    twelve = np.concatenate([eight, 2.0 ** -np.arange(0.5, 4)])
    np.testing.assert_allclose(lightning.log_decays(12, 0, "released"), -twelve * (1 + 1e-5))


def test_decays_of_the_paper():
    """Eq. 10."""
    np.testing.assert_allclose(lightning.log_decays(8, 0, "paper"), -np.arange(1.0, 9))
    np.testing.assert_allclose(lightning.log_decays(4, 0.5, "paper"), [-1, -2, -3, -4])


@pytest.mark.parametrize("slopes", ["released", "paper"])
def test_each_head_forgets_at_its_own_rate_at_any_width(slopes):
    """A token of zeros writes nothing; the rates have no parameters."""
    mixer = memzoo.make("lightning", width=6, heads=2, depth=0.5, slopes=slopes)
    x_BTD = np.random.default_rng(0).standard_normal((1, 1, 6)).astype(np.float32)
    params, run = jax.jit(mixer.init)(jax.random.key(0), x_BTD), jax.jit(mixer.apply)
    before = run(params, x_BTD, mixer.initial_state(1))[1].S_BHKV
    after = run(params, 0 * x_BTD, lightning.State(before))[1].S_BHKV
    rates = {"released": [2**-4 * 0.50001, 2**-8 * 0.50001], "paper": [2, 4]}[slopes]
    np.testing.assert_allclose(after[0], np.exp(-np.array(rates))[:, None, None] * before[0], rtol=1e-6)


def test_the_norm_takes_all_heads_together_and_has_no_scale():
    """However large the values, y has the gate's size: |y|^2 = H V u^2 with unit gates and an orthogonal output map."""
    mixer = memzoo.make("lightning", width=6, heads=2)
    x_BTD = np.random.default_rng(0).standard_normal((1, 9, 6)).astype(np.float32)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"]
    assert set(params) == {"q", "k", "v", "gate", "out"}, "SRMSNorm has no parameters"
    x_BTD[..., 0] = 1
    ones = np.zeros((6, 2, 3), np.float32)
    ones[0] = 1
    run = jax.jit(mixer.apply)
    for scale in (1, 100):
        v = {"kernel": scale * params["v"]["kernel"]}
        changed = {**params, "v": v, "gate": {"kernel": ones}, "out": {"kernel": np.eye(6).reshape(2, 3, 6)}}
        y_BTD, _ = run({"params": jax.tree.map(jnp.float32, changed)}, x_BTD)
        np.testing.assert_allclose(np.sum(np.square(y_BTD), -1), 6, rtol=1e-3)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match=r"depth: expected 0 <= depth <= 1, got 1.5"):
        memzoo.make("lightning", width=8, depth=1.5)
    with pytest.raises(ValueError, match=r"slopes: unknown slopes 'papers'; did you mean paper"):
        memzoo.make("lightning", width=8, slopes="papers")
