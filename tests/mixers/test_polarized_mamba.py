"""Facts of the polarisation paper, arXiv:2501.00658."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import polarized_mamba
from tests.initial import begins_as_in_torch

polarized = jax.jit(polarized_mamba.polarized, static_argnums=9)
IMPLS = ("scan", "associative", "chunk")
T, E, N = 70, 3, 2


def layer(x_BTD, **fields):
    """A mixer and its parameters, of another scale than at the start, so that they all matter."""
    mixer = memzoo.make("polarized_mamba", width=x_BTD.shape[2], state_size=3, dt_rank=2, **fields)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"]
    params = jax.tree.map(np.array, params)
    params["dt"]["bias"] += 3
    for weights in (params["in"]["kernel"], params["B"], params["C"]):
        weights *= 4
    return mixer, params


def softplus(x):
    return np.log1p(np.exp(x))


def silu(x):
    return x / (1 + np.exp(-x))


def in_numpy(p, x, ones, zeros):
    """The whole layer for one sequence x_TD in float64, Abar written out and every state carried."""
    p = jax.tree.map(np.float64, p)
    A, W, E = -np.exp(p["A_log"]), len(p["conv"]), p["D"].size
    h, ys, past = np.zeros((ones + len(A) + zeros, E)), [], np.zeros((W, E))
    for t in range(len(x)):
        u, z = np.split(x[t] @ p["in"]["kernel"], 2)
        past = np.concatenate([past[1:], u[None]])
        u = silu(sum(past[w] * p["conv"][w] for w in range(W)) + p["conv_bias"])
        dt = softplus(u @ p["dt_low"]["kernel"] @ p["dt"]["kernel"] + p["dt"]["bias"])
        Abar = [1.0] * ones + [np.exp(dt * a) for a in A] + [0.0] * zeros
        for n in range(len(h)):
            h[n] = Abar[n] * h[n] + dt * (u @ p["B"][:, n]) * u
        y = (u @ p["C"]) @ h + p["D"] * u
        ys.append(y * silu(z) @ p["out"]["kernel"])
    return np.array(ys), h[: ones + len(A)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("ones", "zeros"), [(1, 1), (0, 2), (2, 0)])
@pytest.mark.cases(1)
def test_is_the_layer_of_the_paper(impl, ones, zeros):
    x_BTD = jax.random.normal(jax.random.key(1), (1, 70, 4))
    mixer, params = layer(x_BTD, ones=ones, zeros=zeros, impl=impl)
    y_BTD, state = jax.jit(mixer.apply)({"params": params}, x_BTD)
    want_y, want_h = in_numpy(params, np.float64(x_BTD[0]), ones, zeros)
    np.testing.assert_allclose(y_BTD[0], want_y, rtol=1e-4, atol=1e-5 * np.abs(want_y).max())
    np.testing.assert_allclose(state.h_BME[0], want_h, rtol=1e-4, atol=1e-5 * np.abs(want_h).max())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.cases(1)
def test_without_pinned_states_it_is_mamba(impl):
    x_BTD = jax.random.normal(jax.random.key(1), (1, 70, 4))
    mixer, params = layer(x_BTD, ones=0, zeros=0, impl=impl)
    mamba = memzoo.make("mamba", width=4, state_size=3, dt_rank=2, impl=impl)
    want_y, want = jax.jit(mamba.apply)({"params": params}, x_BTD)
    y_BTD, state = jax.jit(mixer.apply)({"params": params}, x_BTD)
    np.testing.assert_allclose(y_BTD, want_y, atol=1e-6 * np.abs(want_y).max())
    np.testing.assert_allclose(state.h_BME, want.h_BNE, atol=1e-6 * np.abs(want.h_BNE).max())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.cases(1)
def test_in_the_layer_one_state_keeps_exactly_and_one_forgets_exactly(impl):
    """Where nothing is written, the first state comes out bit for bit, and no other does. Read alone, the last gives an
    output that the last token alone decides, when the convolution passes the past on no more than the state."""
    x_BTD = jax.random.normal(jax.random.key(1), (1, 70, 4))
    mixer, params = layer(x_BTD, impl=impl)
    apply = jax.jit(mixer.apply)
    start = mixer.initial_state(1)
    start = start._replace(h_BME=jax.random.normal(jax.random.key(2), start.h_BME.shape))
    _, state = apply({"params": params | {"B": 0 * params["B"]}}, x_BTD, start)
    np.testing.assert_array_equal(state.h_BME[:, 0], start.h_BME[:, 0])
    assert (np.abs(state.h_BME) < 0.2 * np.abs(start.h_BME))[:, 1:].all()

    def last_output(column, x_BTD):
        C, conv = np.zeros_like(params["C"]), np.zeros_like(params["conv"])
        C[:, column], conv[-1] = params["C"][:, column], 1
        only = params | {"C": C, "conv": conv, "D": 0 * params["D"]}
        return np.asarray(apply({"params": only}, x_BTD, start)[0][0, -1])

    other = x_BTD.at[:, :-1].multiply(-30)
    of_zero, of_one = (last_output(column, x_BTD) for column in (-1, 0))
    assert np.abs(of_zero).max() > 1e-3, "it is read"
    np.testing.assert_allclose(last_output(-1, other), of_zero, rtol=1e-5, atol=1e-7)
    assert np.abs(last_output(0, other) - of_one).max() > np.abs(of_one).max()


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


def test_initial_weights_are_those_of_the_released_code():
    """The defaults of torch's Linear and Conv1d, and dt's own, of the standard deviation (3 fan_in)^-1/2."""
    mixer = memzoo.make("polarized_mamba", width=48)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 48)))["params"]
    W, R = len(p["conv"]), p["dt"]["kernel"].shape[0]
    assert begins_as_in_torch(p["in"]["kernel"], 48) and begins_as_in_torch(p["out"]["kernel"], 96)
    assert all(begins_as_in_torch(weight, 96) for weight in (p["dt_low"]["kernel"], p["B"], p["C"]))
    assert begins_as_in_torch(p["conv"], W) and begins_as_in_torch(p["conv_bias"], W)
    assert (W, R) == (4, 3) and begins_as_in_torch(p["dt"]["kernel"], R)
    np.testing.assert_allclose(np.std(p["in"]["kernel"]), (3 * 48) ** -0.5, rtol=0.03)


@pytest.mark.long
def test_each_kind_can_be_left_out():
    x = jax.random.normal(jax.random.key(0), (1, 20, 4))
    for ones, zeros in ((0, 0), (2, 0), (0, 3)):
        mixer = memzoo.make("polarized_mamba", width=4, state_size=3, ones=ones, zeros=zeros)
        y, state = jax.jit(lambda mixer=mixer: mixer.init_with_output(jax.random.key(0), x)[0])()
        assert np.isfinite(y).all() and state.h_BME.shape == (1, ones + 3, 8)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="conv_width: expected an integer >= 1, got 0"):
        memzoo.make("polarized_mamba", width=4, conv_width=0)
    with pytest.raises(ValueError, match="ones: expected an integer >= 0, got -1"):
        memzoo.make("polarized_mamba", width=4, ones=-1)
