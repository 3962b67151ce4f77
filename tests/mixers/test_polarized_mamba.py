"""Facts of the polarisation paper, arXiv:2501.00658."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import polarized_mamba

polarized = jax.jit(polarized_mamba.polarized, static_argnums=9)
IMPLS = ("scan", "associative", "chunk")
T, E, N = 70, 3, 2


def inputs(T=T, low=1e-6, high=1e3):
    """Steps over nine decades; one state with Abar = 1, then N learned ones."""
    rng = np.random.default_rng(0)
    n = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    dt = jnp.asarray(np.exp(rng.uniform(np.log(low), np.log(high), (1, T, E))), jnp.float32)
    A_ME = jnp.pad(-jnp.exp(n(N, E)), ((1, 0), (0, 0)))
    return n(1, T, E), dt, A_ME, n(1, T, 1 + N), n(1, T, 1 + N), n(1, T), n(E), n(1, 1 + N, E)


@pytest.mark.parametrize("impl", IMPLS)
def test_is_the_recurrence_with_three_kinds_of_decay(impl):
    """Abar = (1, exp(dt A), 0) multiplied out in float64, the state with Abar = 0 carried like the others."""
    x, dt, A, B, C, _, D, h0 = inputs(high=10)
    rng = np.random.default_rng(1)
    B0, C0 = rng.standard_normal((2, T))
    y, h = polarized(x, dt, A, B, C, jnp.asarray(B0 * C0, jnp.float32)[None], D, h0, None, impl)
    x, dt, A, B, C, D, h0 = (np.float64(z) for z in (x, dt, A, B, C, D, h0))
    state = np.concatenate([h0[0], np.full((1, E), 7.0)])
    for t in range(T):
        Abar = np.concatenate([np.ones((1, E)), np.exp(dt[0, t] * A[1:]), np.zeros((1, E))])
        state = Abar * state + np.outer(np.append(B[0, t], B0[t]), dt[0, t] * x[0, t])
        want = np.append(C[0, t], C0[t]) @ state + D * x[0, t]
        np.testing.assert_allclose(y[0, t], want, rtol=1e-4, atol=1e-4 * np.abs(state).max())
    np.testing.assert_allclose(h[0], state[:-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_state_keeps_exactly_and_one_forgets_exactly(impl):
    """Whatever the input. Keeps: with B = 0 it comes out bit for bit. Forgets: y_t = now dt x without any past."""
    x, dt, A, B, C, now, D, h0 = inputs()
    _, h = polarized(x, dt, A, 0 * B, C, now, D, h0, None, impl)
    np.testing.assert_array_equal(h[:, 0], h0[:, 0])
    assert np.abs(h[:, 1:]).max() < 1e-6 * np.abs(h0).max(), "the learned ones do not"
    past = jnp.arange(T)[None, :, None] < T - 1
    y, _ = polarized(jnp.where(past, 1e6 * x, x), dt, A, B, 0 * C, now, D, 1e6 * h0, None, impl)
    last = np.float64(now[0, -1]) * dt[0, -1] * x[0, -1] + D * x[0, -1]
    np.testing.assert_allclose(y[0, -1], last, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_one_is_a_cumulative_sum(impl):
    x, dt, A, B, C, _, D, h0 = inputs(high=10)
    only = jnp.zeros_like(C).at[..., 0].set(1)
    y, _ = polarized(x, dt, A, B, only, jnp.zeros((1, T)), 0 * D, h0, None, impl)
    want = np.cumsum(np.float64(dt) * np.float64(B)[..., :1] * np.float64(x), 1) + np.float64(h0)[:, :1]
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_the_influence_of_the_first_token_does_not_decay():
    """|dy_T / dx_0| through the state with Abar = 1 is |C dt B| at every T; through a learned one it vanishes."""
    influence = {}
    for T in (10, 1000):
        x, dt, A, B, C, now, D, h0 = inputs(T, 0.01, 0.1)
        C = jnp.ones_like(C)

        def last(x, states, T=T, args=(dt, A, B, C, now, D, h0)):
            dt, A, B, C, now, D, h0 = args
            y, _ = polarized(x, dt, A, B, C * states, now, D, h0, None)
            return jnp.sum(y[0, -1, 0])

        one, learned = (jax.grad(last)(x, jnp.asarray(s))[0, 0, 0] for s in ([1.0, 0, 0], [0.0, 1, 1]))
        np.testing.assert_allclose(one, dt[0, 0, 0] * B[0, 0, 0], rtol=1e-5)
        influence[T] = abs(learned / one)
    assert influence[10] > 1e-2 and influence[1000] < 1e-4


def test_initial_steps_and_decays():
    """As in Mamba: the released code changes nothing else."""
    params = jax.jit(memzoo.make("polarized_mamba", width=1000, state_size=4, dt_rank=1).init)(
        jax.random.key(0), jnp.zeros((1, 1, 1000))
    )["params"]
    np.testing.assert_allclose(np.exp(params["A_log"]), np.arange(1, 5)[:, None] * np.ones(2000), rtol=1e-5)
    log_dt = np.sort(np.log(np.log1p(np.exp(np.float64(params["dt"]["bias"])))))
    uniform = (log_dt - np.log(1e-3)) / np.log(100)
    assert np.abs(uniform - (np.arange(2000) + 0.5) / 2000).max() < 0.04
    assert params["B"].shape == params["C"].shape == (2000, 6)


def test_each_kind_can_be_left_out():
    x = jax.random.normal(jax.random.key(0), (1, 20, 4))
    for ones, zeros in ((0, 0), (2, 0), (0, 3)):
        mixer = memzoo.make("polarized_mamba", width=4, state_size=3, ones=ones, zeros=zeros)
        y, state = jax.jit(lambda mixer=mixer: mixer.init_with_output(jax.random.key(0), x)[0])()
        assert np.isfinite(y).all() and state.h_BME.shape == (1, ones + 3, 8)
    with pytest.raises(ValueError, match="ones: expected an integer >= 0, got -1"):
        memzoo.make("polarized_mamba", width=4, ones=-1)
