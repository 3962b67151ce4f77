"""Facts of the S4D paper, arXiv:2206.11893."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import s4d
from memzoo.ops import hippo


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def initialised(width, **fields):
    mixer = memzoo.make("s4d", width=width, **fields)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, width)))["params"]
    return jax.tree.map(np.float64, p)


def test_initial_spectra():
    """Re A = -1/2; Im A = pi n, N / pi (N / (2n+1) - 1), or of HiPPO-N's eigenvalues, which inv is made after."""
    N, n = 64, np.arange(32)
    A, B = hippo.transition("legs", N)
    legs = np.sort(np.linalg.eigvals(A + 0.5 * np.outer(B, B)).imag)[32:]
    wanted = {"lin": np.pi * n, "inv": N / np.pi * (N / (2 * n + 1) - 1), "legs": legs}
    for init, want in wanted.items():
        p = initialised(3, init_A=init)
        np.testing.assert_allclose(-np.exp(p["log_decay"]), -0.5, rtol=1e-6)
        np.testing.assert_allclose(p["frequency"], np.broadcast_to(want, (3, 32)), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.sort(wanted["inv"])[-5:], legs[-5:], rtol=0.15)


@pytest.mark.long
def test_initial_steps():
    p = initialised(2000, state_size=2)
    assert distance_from_uniform((p["log_dt"] - np.log(1e-3)) / np.log(100)) < 0.03
    np.testing.assert_allclose(np.mean(np.sum(p["C"] ** 2, 0)), 1, rtol=0.1)
    np.testing.assert_array_equal(initialised(2, init_A="lin")["B"], np.stack([np.ones((2, 32)), np.zeros((2, 32))]))


@pytest.mark.parametrize("impl", ["scan", "chunk", "conv"])
@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.cases(1)
def test_an_impulse_shows_the_kernel(impl, discretisation):
    """2 Re(C A_t^j B_t), Vandermonde's product, through gelu and GLU; D at j = 0."""
    D, T = 2, 70
    mixer = memzoo.make("s4d", width=D, state_size=6, discretisation=discretisation, impl=impl)
    x = jnp.zeros((D, T, D)).at[jnp.arange(D), 0, jnp.arange(D)].set(1)  # one row for each feature
    params = jax.jit(mixer.init)(jax.random.key(0), x)
    p = jax.tree.map(np.float64, params["params"])
    A, dt = -np.exp(p["log_decay"]) + 1j * p["frequency"], np.exp(p["log_dt"])[:, None]
    B, C = p["B"][0] + 1j * p["B"][1], p["C"][0] + 1j * p["C"][1]
    if discretisation == "zoh":
        A_t, B_t = np.exp(dt * A), (np.exp(dt * A) - 1) / A * B
    else:
        A_t, B_t = (1 + dt / 2 * A) / (1 - dt / 2 * A), dt / (1 - dt / 2 * A) * B
    kernel = 2 * np.einsum("dn,tdn,dn->dt", C, A_t ** np.arange(T)[:, None, None], B_t).real
    kernel[:, 0] += p["D"]
    y = np.einsum("dt,de->dte", kernel, np.eye(D))
    gelu = np.float64(jax.nn.gelu(jnp.asarray(y, jnp.float32), approximate=False))
    a, b = np.split(gelu @ p["out"]["kernel"] + p["out"]["bias"], 2, axis=-1)
    np.testing.assert_allclose(jax.jit(mixer.apply)(params, x)[0], a / (1 + np.exp(-b)), atol=1e-5)


@pytest.mark.long
def test_gradients_without_resets_are_those_of_the_recurrence():
    """The FFT over all tokens, with an incoming state; and bilinear steps."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (2, 75, 3))
        fields = {"width": 3, "state_size": 6, "discretisation": "bilinear"}
        fields |= {"dtype": jnp.float64, "param_dtype": jnp.float64}
        params = memzoo.make("s4d", **fields).init(jax.random.key(0), x[:, :1])
        x_BDN = jax.random.normal(jax.random.key(2), (2, 3, 3)) + 0.5j

        def loss(params, x, x_BDN, impl):
            y, last = memzoo.make("s4d", impl=impl, **fields).apply(params, x, s4d.State(x_BDN))
            return jnp.sum(jnp.cos(jnp.arange(y.size)) * y.ravel()) + jnp.sum(jnp.abs(last.x_BDN) ** 2)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
        want, got = (gradient(params, x, x_BDN, impl) for impl in ("scan", "conv"))
        for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(g, w, atol=1e-10 * np.abs(w).max())


def test_legs_without_its_low_rank_comes_near_legs():
    """Theorem 3: with B halved, HiPPO-LegS is the limit of many states: here at 1/2 in Laplace's transform."""
    wrong = []
    for N in (16, 64, 256):
        frequency, b = s4d.spectrum("legs", N // 2)
        V = hippo.legs_normal(N).V_NN[:3]
        A, B = hippo.transition("legs", N)
        want = np.linalg.solve(np.eye(N) / 2 - A, B)[:3]
        b = np.concatenate([b[::-1], b])
        Lambda = -0.5 + 1j * np.concatenate([-frequency[::-1], frequency])
        wrong.append(np.abs(V @ (b / (0.5 - Lambda)) - want).max())
    assert wrong[2] < 0.03 and wrong[2] < wrong[1] / 3 < wrong[0] / 9


def test_bad_fields_are_named():
    for fields, message in (
        ({"state_size": 7}, "state_size: expected a positive multiple of .* = 2, got 7"),
        ({"init_A": "lim"}, "init_A: .*did you mean lin"),
        ({"discretisation": "bilin"}, "discretisation: .*did you mean bilinear"),
        ({"dt_min": 0.2}, "dt_min, dt_max: expected 0 < dt_min <= dt_max, got 0.2, 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            memzoo.make("s4d", width=4, **fields)
