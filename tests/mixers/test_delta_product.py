"""Facts of the DeltaProduct paper, arXiv:2502.10297."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import delta_product, deltanet, gated_deltanet

B, T, H, N, K, V, D = 1, 23, 2, 3, 4, 5, 8
run = jax.jit(delta_product.delta_product, static_argnums=7)


def inputs(N=N):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((B, T, H, K), (B, T, H, N, K), (B, T, H, N, V)))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta, log_a = 2 * rng.uniform(size=(B, T, H, N)), -np.exp(rng.uniform(np.log(1e-3), np.log(3), (B, T, H)))
    return tuple(x.astype("f") for x in (q, k, v, beta, log_a, rng.standard_normal((B, H, K, V))))


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_transition_is_one_decay_and_a_product_of_householders(impl):
    """S_t = a_t M_0 S_{t-1} + sum_j M_j beta_j k_j v_j', M_j = (I - beta_N k_N k_N') .. (I - beta_j+1 k_j+1 k_j+1')."""
    q, k, v, beta, log_a, S = inputs()
    y_BTHV, last_BHKV = run(q, k, v, beta, log_a, S, None, impl)
    for h in range(H):
        S_KV = np.float64(S[0, h])
        for t in range(T):
            written_KV, M_KK = np.zeros((K, V)), np.eye(K)
            for j in reversed(range(N)):
                k_K, b = k[0, t, h, j], beta[0, t, h, j]
                written_KV += M_KK @ (b * np.outer(k_K, v[0, t, h, j]))
                M_KK = M_KK @ (np.eye(K) - b * np.outer(k_K, k_K))
            S_KV = np.exp(log_a[0, t, h]) * M_KK @ S_KV + written_KV
            np.testing.assert_allclose(y_BTHV[0, t, h], q[0, t, h] @ S_KV, atol=2e-5)
        np.testing.assert_allclose(last_BHKV[0, h], S_KV, atol=2e-5)


@pytest.mark.long
def test_one_step_is_gated_deltanet():
    """The same layer with the same parameters."""
    fields = {"width": D, "heads": H, "key_dim": K, "value_dim": V}
    ours = memzoo.make("delta_product", householders=1, allow_neg_eigval=False, **fields)
    theirs = memzoo.make("gated_deltanet", **fields)
    x_BTD = np.random.default_rng(1).standard_normal((2, 11, D)).astype("f")
    params = jax.jit(theirs.init)(jax.random.key(0), x_BTD)
    y, state = jax.jit(ours.apply)(params, x_BTD)
    expected, expected_state = jax.jit(theirs.apply)(params, x_BTD)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(state.S_BHKV, expected_state.S_BHKV, atol=1e-6)

    q, k, v, beta, log_a, S = inputs(1)
    args = q, k[..., 0, :], v[..., 0, :], beta[..., 0] / 2, log_a, S
    expected = gated_deltanet.gated_delta_rule(*args, None, "scan")
    for one, other in zip(run(q, k, v, beta / 2, log_a, S, None, "chunk"), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.long
def test_one_step_without_forgetting_is_deltanet():
    """The states of the layers, that is: DeltaNet has no output gate."""
    fields = {"width": D, "heads": H, "key_dim": K, "value_dim": V, "allow_neg_eigval": True}
    ours = memzoo.make("delta_product", householders=1, forget_gate=False, **fields)
    theirs = memzoo.make("deltanet", **fields)
    x_BTD = np.random.default_rng(1).standard_normal((2, 11, D)).astype("f")
    params = jax.jit(ours.init)(jax.random.key(0), x_BTD)
    assert "dt" not in params["params"] and "log_rate" not in params["params"]
    state, expected = (jax.jit(mixer.apply)(params, x_BTD)[1] for mixer in (ours, theirs))
    np.testing.assert_allclose(state.S_BHKV, expected.S_BHKV, atol=1e-6)

    q, k, v, beta, log_a, S = inputs(1)
    expected = deltanet.delta_rule(q, k[..., 0, :], v[..., 0, :], beta[..., 0], S, None, "scan")
    for one, other in zip(run(q, k, v, beta, 0 * log_a, S, None, "chunk"), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_as_many_steps_as_tokens():
    """N steps of one token leave the state that N tokens of DeltaNet leave."""
    q, k, v, beta, log_a, S = inputs()
    _, one = run(q, k, v, beta, 0 * log_a, S, None, "chunk")
    in_a_row = (np.moveaxis(x, 3, 2).reshape(B, T * N, H, *x.shape[4:]) for x in (k, v, beta))
    _, other = deltanet.delta_rule(np.repeat(q, N, axis=1), *in_a_row, S, None, "scan")
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("period", [3, 7])
def test_two_reflections_are_a_rotation_that_counts(period):
    """v = 0, beta = 2, two keys at half the angle: S turns by 2 pi / period, and is back after as many tokens."""
    angle = np.pi / period
    k_NK = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]], "f")
    S_KV = np.array([[1.0, -2.0, 3.0], [0.5, 0.0, 1.0]], "f")
    turn_KK = np.array([[np.cos(2 * angle), -np.sin(2 * angle)], [np.sin(2 * angle), np.cos(2 * angle)]])
    args = np.zeros((1, T, 1, 2)), np.tile(k_NK, (1, T, 1, 1, 1)), np.zeros((1, T, 1, 2, 3)), np.full((1, T, 1, 2), 2.0)
    for t in (1, 2, period):
        part = (x[:, :t].astype("f") for x in args)
        _, last = delta_product.delta_product(*part, np.zeros((1, t, 1), "f"), S_KV[None, None], None, "scan")
        np.testing.assert_allclose(last[0, 0], np.linalg.matrix_power(turn_KK, t) @ S_KV, atol=1e-5)
    np.testing.assert_allclose(last[0, 0], S_KV, atol=1e-5)


def test_four_swaps_permute_five_elements():
    """A reflection along (e_i - e_j) / sqrt 2 swaps two rows; any permutation of 5 is 4 swaps at most, so one token."""
    rng, items, length = np.random.default_rng(3), 5, 9
    k, expected = np.zeros((1, length, 1, 4, items), "f"), np.arange(items)
    for t in range(length):
        wanted, now = rng.permutation(items), np.arange(items)
        for j in range(4):  # brings the right row to place j
            i = list(now).index(wanted[j])
            if i != j:
                k[0, t, 0, j, [i, j]] = [0.5**0.5, -(0.5**0.5)]
            now[[i, j]] = now[[j, i]]
        expected = expected[wanted]
    S = np.eye(items, dtype="f")
    v, beta, log_a = np.zeros((1, length, 1, 4, items)), np.full((1, length, 1, 4), 2.0), np.zeros((1, length, 1))
    _, last = run(k[..., 0, :], k, *(x.astype("f") for x in (v, beta, log_a)), S[None, None], None, "chunk")
    np.testing.assert_allclose(last[0, 0], S[expected], atol=1e-5)


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def test_initial_decays_and_strengths():
    """Rates uniform in (0, 16], steps log-uniform in [1e-3, 0.1]; a token of zeros has beta = 1, a projection."""
    mixer = memzoo.make("delta_product", width=4)
    init = jax.jit(jax.vmap(lambda key: mixer.init(key, jnp.zeros((1, 1, 4)))))
    p = init(jax.random.split(jax.random.key(0), 300))["params"]  # of 4 heads each
    rate = np.exp(np.float64(p["log_rate"]).ravel())
    log_dt = np.log(np.log1p(np.exp(np.float64(p["dt"]["bias"]).ravel())))
    assert distance_from_uniform(rate / 16) < 0.06
    assert distance_from_uniform((log_dt - np.log(1e-3)) / np.log(100)) < 0.06
    assert p["beta"]["kernel"].shape == (300, 4, 8) and "bias" not in p["beta"]


@pytest.mark.parametrize("field", ["heads", "key_dim", "value_dim", "householders", "conv_width"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}: expected an integer >= 1, got 0"):
        memzoo.make("delta_product", width=D, **{field: 0})
