"""Facts of S4's papers, arXiv:2111.00396 and arXiv:2206.12037."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import memzoo
from memzoo.mixers import s4
from memzoo.ops import hippo

MEASURES = ("legs", "legt", "fout")


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def initialised(width, **fields):
    mixer = memzoo.make("s4", width=width, **fields)
    return jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, width)))["params"]


def system(p):
    """(dt, Lambda, P, B, C, D), per feature, in float64."""
    p = jax.tree.map(np.float64, p)
    pairs = {name: p[name][0] + 1j * p[name][1] for name in "PBC"}
    Lambda = -np.exp(p["log_decay"]) + 1j * p["frequency"]
    return np.exp(p["log_dt"]), Lambda, pairs["P"], pairs["B"], pairs["C"], p["D"]


@pytest.mark.parametrize("impl", ["scan", "associative", "conv", "auto"])
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.cases(1)
def test_is_the_layer_of_the_paper(measure, impl):
    """In float64, token by token, with all of the state: A dense, the bilinear rule as a solve, gelu, GLU."""
    D, N, T = 2, 3, 40
    x_BTD = np.random.default_rng(0).standard_normal((1, T, D)).astype(np.float32)
    mixer = memzoo.make("s4", width=D, state_size=2 * N, measure=measure, impl=impl)
    params = initialised(D, state_size=2 * N, measure=measure)
    params["log_dt"] = jnp.log(jnp.asarray([0.02, 0.3]))
    params["out"]["bias"] = jnp.asarray([0.3, -0.2, 0.1, 0.5])
    both = lambda x: np.concatenate([x.conj()[..., ::-1], x], -1)
    wanted = np.zeros((T, D))
    for d in range(D):
        dt, Lambda, P, B, C, skip = (both(z[d]) if np.iscomplexobj(z) else z[d] for z in system(params))
        A, eye, state = np.diag(Lambda) - P.T @ P.conj(), np.eye(2 * N), np.zeros(2 * N)
        for t, u in enumerate(np.float64(x_BTD[0, :, d])):
            state = np.linalg.solve(eye - dt / 2 * A, (eye + dt / 2 * A) @ state + dt * B * u)
            y = (C @ state).real + skip * u
            wanted[t, d] = y / 2 * (1 + scipy.special.erf(y / 2**0.5))
    a, b = np.split(wanted @ np.float64(params["out"]["kernel"]) + np.float64(params["out"]["bias"]), 2, axis=-1)
    y_BTD, _ = jax.jit(mixer.apply)({"params": params}, x_BTD)
    np.testing.assert_allclose(y_BTD[0], a / (1 + np.exp(-b)), atol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize("measure", MEASURES)
def test_the_convolution_is_the_recurrence_of_a_long_sequence(measure):
    """dt from 1e-3 to 1e-1, before gelu, relative to the largest output of a feature. By the kernel in one piece legt
    would err by 9e-5; fout with dt = 0.1 is what float32 cannot do better, its recurrence errs by 1e-5 itself."""
    D, T = 4, 8192
    x_BTD = jax.random.normal(jax.random.key(1), (1, T, D))
    arrays = np.geomspace(1e-3, 1e-1, D), *system(initialised(D, measure=measure))[1:]
    arrays = [jnp.asarray(z, jnp.complex64 if np.iscomplexobj(z) else jnp.float32) for z in arrays]
    run = jax.jit(s4.s4, static_argnums=4)
    start = jnp.zeros((1, D, 32), jnp.complex64)
    want, auto, conv = (
        np.asarray(run(x_BTD, tuple(arrays), start, None, impl)[0][0]) for impl in ("scan", "auto", "conv")
    )
    for got in (auto, conv):
        error_D = np.abs(got - want).max(0) / np.abs(want).max(0)
        assert error_D.max() < {"legs": 1e-5, "legt": 2e-5, "fout": 4e-5}[measure], error_D


@pytest.mark.long
def test_more_states_hold_more_of_the_past():
    """Of a band-limited signal: it is projected on p_n(exp(-ago)), by the weight exp(-ago), ago in 1 / dt tokens."""
    dt, T = 1 / 200, 3000
    f = lambda t: sum(np.cos(k * t + k) for k in range(1, 6)) / 2
    u = np.float32(f((np.arange(T)[::-1] + 0.5) * dt))[None, :, None]
    ago = np.linspace(0.0025, 8, 1000)
    wrong = []
    for N in (4, 8, 16, 32):
        params = initialised(1, state_size=N)
        params["log_dt"] = jnp.full(1, np.log(dt))
        _, state = jax.jit(memzoo.make("s4", width=1, state_size=N, impl="scan").apply)({"params": params}, u)
        V = hippo.normal("legs", N).V_NN[:, N // 2 :]
        found = hippo.legendre(N, np.exp(-ago)) @ (2 * (V @ np.complex128(state.x_BDN[0, 0])).real)
        wrong.append(np.sqrt(np.average((found - f(ago)) ** 2, weights=np.exp(-ago))))
    assert all(np.diff(wrong) < 0) and wrong[-1] < 0.6 * wrong[0], wrong


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.cases(1)
def test_the_convolution_is_the_recurrence(measure):
    """With 64 states, no resets, an incoming state: the FFT over all tokens, of both kernels."""
    x = jax.random.normal(jax.random.key(1), (2, 200, 3))
    params = {"params": initialised(3, measure=measure)}
    _, state = memzoo.make("s4", width=3, measure=measure, impl="scan").apply(params, x[::-1, :50])
    apply = functools.cache(lambda impl: jax.jit(memzoo.make("s4", width=3, measure=measure, impl=impl).apply))
    want_y, want = apply("scan")(params, x, state)
    for impl in ("auto", "conv"):
        y, last = apply(impl)(params, x, state)
        np.testing.assert_allclose(y, want_y, atol=1e-5 * np.abs(want_y).max())
        np.testing.assert_allclose(last.x_BDN, want.x_BDN, atol=2e-5 * np.abs(want.x_BDN).max())


@pytest.mark.long
@pytest.mark.parametrize("measure", ["legt", "fout"])
def test_gradients_of_the_convolution_are_those_of_the_recurrence(measure):
    """Without resets, with rank 2, and with poles on the unit circle; the incoming state's too."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (2, 75, 3))
        fields = {"width": 3, "state_size": 6, "measure": measure, "dtype": jnp.float64, "param_dtype": jnp.float64}
        params = memzoo.make("s4", **fields).init(jax.random.key(0), x[:, :1])
        x_BDN = jax.random.normal(jax.random.key(2), (2, 3, 3)) + 0.5j

        def loss(params, x, x_BDN, impl):
            y, last = memzoo.make("s4", impl=impl, **fields).apply(params, x, s4.State(x_BDN))
            return jnp.sum(jnp.cos(jnp.arange(y.size)) * y.ravel()) + jnp.sum(jnp.abs(last.x_BDN) ** 2)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
        want = gradient(params, x, x_BDN, "scan")
        for impl in ("auto", "conv"):
            for g, w in zip(*map(jax.tree.leaves, (gradient(params, x, x_BDN, impl), want)), strict=True):
                np.testing.assert_allclose(g, w, atol=1e-10 * np.abs(w).max())


@pytest.mark.long
def test_the_kernels_of_legs_have_their_closed_form():
    """A feature that reads coefficient n has the kernel dt exp(-t) sqrt(2n+1) P_n(2 exp(-t) - 1) at (j + 1/2) dt."""
    N, dt, L = 12, 1e-3, 3000
    V = hippo.normal("legs", N).V_NN[:, N // 2 :]  # row n reads coefficient n
    with jax.enable_x64(True):
        form = hippo.normal("legs", N)
        Lambda, P, B = form.Lambda_N[N // 2 :], form.P_RN[:, N // 2 :], form.B_N[N // 2 :]
        each = lambda a: jnp.broadcast_to(a, (N, *a.shape))
        parts = jnp.full(N, dt), each(Lambda), each(P), each(B), jnp.asarray(V), jnp.zeros(N)
        A, _, C = jax.vmap(s4.real)(*parts)
        kernel = jax.jit(s4.kernel, static_argnums=3)(parts, A, C, L)
        t = (np.arange(L) + 0.5) * dt
        np.testing.assert_allclose(kernel.T / dt, hippo.kernel("legs", N, t), atol=6e-3)


def test_initial_steps_and_spectrum():
    """log dt is uniform; the normal part has Re = -1/2, and A, whose eigenvalues are those of HiPPO, -1 to -N."""
    dt, Lambda, P, B, C, _ = system(initialised(2000, state_size=8))
    assert distance_from_uniform((np.log(dt) - np.log(1e-3)) / np.log(100)) < 0.03
    np.testing.assert_allclose(Lambda.real, -0.5, rtol=1e-6)
    np.testing.assert_allclose(np.mean(np.abs(C) ** 2), 1, rtol=0.05)
    both = lambda x: np.concatenate([x.conj()[..., ::-1], x], -1)
    A = np.diag(both(Lambda[0])) - both(P[0]).T @ both(P[0]).conj()
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(A).real), -np.arange(8, 0, -1), rtol=1e-3)
    np.testing.assert_allclose(np.sum(np.abs(both(B[0])) ** 2), np.sum(2 * np.arange(8) + 1), rtol=1e-5)


@pytest.mark.long
def test_stable_whatever_the_parameters():
    """-P P* can only take energy away: the step never lengthens x, for P of any size."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape), jnp.complex64)
    A, _, _ = s4.real(jnp.float32(0.3), -0.1 + 5j * draw(4).real, 3 * draw(2, 4), draw(4), draw(4), jnp.float32(0))
    assert np.linalg.norm(A, 2) < 1


def test_bad_fields_are_named():
    for fields, message in (
        (
            {"measure": "fout", "state_size": 7},
            "state_size: expected an even number for 'fout', a sine for each cosine",
        ),
        ({"state_size": 7}, "state_size: expected a positive multiple of .* = 2, got 7"),
        ({"measure": "lagt"}, "measure: expected one of legs, legt, fout; got 'lagt'"),
        ({"dt_min": 0.2}, "dt_min, dt_max: expected 0 < dt_min <= dt_max, got 0.2, 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            memzoo.make("s4", width=4, **fields)
