"""Facts of S4's papers, arXiv:2111.00396 and arXiv:2206.12037."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize("measure", MEASURES)
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
