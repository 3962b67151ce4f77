"""Facts of the xLSTM papers, arXiv:2405.04517 and arXiv:2503.13427, that concern mLSTM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import mlstm

T, H, K, V = 70, 2, 3, 5
matrix_lstm = jax.jit(mlstm.matrix_lstm, static_argnums=7)


def inputs(size=3.0):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, T, H, n)) for n in (K, K, V))
    i, f = rng.normal(scale=size, size=(2, 1, T, H))
    state = mlstm.State(rng.normal(size=(1, H, K, V)), rng.normal(size=(1, H, K)), np.array([[0.3, 4.0]]))
    return (q, k, v, i, -np.log1p(np.exp(-f))), state


def in_float32(tree):
    return jax.tree.map(np.float32, tree)


def unstabilised(q, k, v, i, log_f, C, n):
    """The paper's equations with gates f and exp(i) as they stand, token by token, in float64."""
    y = np.zeros(v.shape)
    for t in range(T):
        f, write = np.exp(log_f[:, t]), np.exp(i[:, t])
        C = f[..., None, None] * C + write[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        n = f[..., None] * n + write[..., None] * k[:, t]
        floor = np.maximum(np.abs(np.sum(n * q[:, t], -1)), 1)
        y[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], C) / floor[..., None]
    return y, C, n


@pytest.mark.parametrize("impl", ["scan", "associative", "chunk"])
@pytest.mark.cases(1)
def test_is_the_unstabilised_recurrence(impl):
    xs, (C, n, m) = inputs()
    with_m = np.exp(m)
    want, C_last, n_last = unstabilised(*xs, C * with_m[..., None, None], n * with_m[..., None])
    y_BTHV, last = matrix_lstm(*in_float32(xs), in_float32(mlstm.State(C, n, m)), None, impl)
    np.testing.assert_allclose(y_BTHV, want, rtol=1e-4, atol=1e-4)
    scale = np.exp(np.float64(last.m_BH))
    np.testing.assert_allclose(
        last.C_BHKV * scale[..., None, None], C_last, rtol=1e-4, atol=1e-5 * np.abs(C_last).max()
    )
    np.testing.assert_allclose(last.n_BHK * scale[..., None], n_last, rtol=1e-4, atol=1e-5 * np.abs(n_last).max())


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_the_stabiliser_changes_nothing(impl):
    """The same memory, written with another m: exp(-c) C, exp(-c) n and m + c."""
    xs, (C, n, m) = inputs()
    y_BTHV, _ = matrix_lstm(*in_float32(xs), in_float32(mlstm.State(C, n, m)), None, impl)
    for c in (-0.3, 7.0):
        other = mlstm.State(np.exp(-c) * C, np.exp(-c) * n, m + c)
        np.testing.assert_allclose(matrix_lstm(*in_float32(xs), in_float32(other), None, impl)[0], y_BTHV, atol=2e-5)


def test_m_is_the_largest_exponent_of_what_the_memory_holds():
    """Over all writes s, i_s and the log of the forget gates since; 0 at least."""
    (q, k, v, i, log_f), _ = inputs()
    fresh = mlstm.State(np.zeros((1, H, K, V)), np.zeros((1, H, K)), np.zeros((1, H)))
    since = np.cumsum(log_f, 1)
    want = np.maximum(np.max(i + since[:, -1:] - since, 1), 0)
    for impl in ("scan", "chunk"):
        _, last = matrix_lstm(*in_float32((q, k, v, i, log_f)), in_float32(fresh), None, impl)
        np.testing.assert_allclose(last.m_BH, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_wild_gates_stay_finite(impl):
    """Inputs of exp(+-300) in one sequence, where neither gate fits into float32; gradients too."""
    (q, k, v, i, log_f), state = in_float32(inputs(size=100.0))
    assert np.max(i) > 200 and np.min(i) < -200 and np.min(log_f) < -200

    def loss(xs, state):
        y_BTHV, last = mlstm.matrix_lstm(*xs, state, None, impl)
        return jnp.mean(jnp.tanh(y_BTHV)) + jnp.mean(last.m_BH), (y_BTHV, last)

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    for gates in (i, i + 1000, i - 1000):
        found = run((q, k, v, gates, log_f), state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.long
def test_forms_agree_where_the_stabiliser_works_hardest():
    """Values, last states and gradients, in float64, with gates of exp(+-20), forget gates above 1, a reset."""
    with jax.enable_x64(True):
        (q, k, v, i, log_f), state = inputs(size=20.0)
        xs = q, k, v, i, np.where(np.arange(T)[:, None] % 3, log_f, -0.1 * log_f)
        reset = np.arange(T)[None] == 33

        def loss(xs, state, impl):
            y_BTHV, last = mlstm.matrix_lstm(*xs, state, reset, impl)
            return jnp.sum(jnp.sin(y_BTHV)) + sum(jnp.sum(jnp.sin(leaf)) for leaf in last), (y_BTHV, last)

        run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
        got, want = run(xs, state, "chunk"), run(xs, state, "scan")
        assert np.max(want[1][1].m_BH) > 20
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9)


def test_initial_gates():
    """Whatever the token: forget biases 3 to 6, which remember for 20 to 400 tokens, and inputs of exp(-10)."""
    mixer = memzoo.make("mlstm", width=16, heads=4)
    x_BTD = np.random.default_rng(0).standard_normal((1, 1, 16)).astype(np.float32)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    p, run = params["params"], jax.jit(mixer.apply)
    np.testing.assert_allclose(p["forget"]["bias"], [3, 4, 5, 6])
    np.testing.assert_array_equal(p["input"]["bias"], [-10] * 4)
    assert not np.any(p["forget"]["kernel"]) and not np.any(p["input"]["kernel"])
    first = run(params, x_BTD, mixer.initial_state(1))[1]
    second = run(params, x_BTD, first)[1]
    soft = lambda x: 15 * np.tanh(x / 15)
    f = 1 / (1 + np.exp(-soft(np.arange(3.0, 7))))
    assert np.all(np.diff(1 / (1 - f)) > 0) and 20 < 1 / (1 - f[0]) < 21 and 250 < 1 / (1 - f[3]) < 400
    np.testing.assert_allclose(second.C_BHKV[0], (1 + f)[:, None, None] * first.C_BHKV[0], rtol=1e-5)
    k_HK = np.einsum("d,dhk->hk", x_BTD[0, 0], p["k"]["kernel"]) * 2**-0.5
    np.testing.assert_allclose(first.n_BHK[0], np.exp(soft(-10.0)) * k_HK, rtol=1e-5)


@pytest.mark.long
def test_exponential_forget_gates_begin_where_sigmoid_ones_do():
    x_BTD = np.random.default_rng(0).standard_normal((1, 20, 16)).astype(np.float32)
    ys = []
    for kind in ("sigmoid", "exp"):
        mixer = memzoo.make("mlstm", width=16, forget_gate=kind, gate_cap=1e6, input_bias=0.0)
        ys.append(jax.jit(mixer.apply)(jax.jit(mixer.init)(jax.random.key(0), x_BTD), x_BTD)[0])
    np.testing.assert_allclose(ys[0], ys[1], atol=1e-5)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match=r"forget_gate: unknown gate 'sigmoidal'; did you mean sigmoid"):
        memzoo.make("mlstm", width=8, forget_gate="sigmoidal")
    with pytest.raises(ValueError, match=r"gate_cap: expected a number > 0, got 0"):
        memzoo.make("mlstm", width=8, gate_cap=0)
    with pytest.raises(ValueError, match=r"forget_bias: expected two finite numbers, got \(3.0,\)"):
        memzoo.make("mlstm", width=8, forget_bias=(3.0,))
    with pytest.raises(ValueError, match=r"key_dim: expected an integer >= 1, got 0"):
        memzoo.make("mlstm", width=8, key_dim=0)
