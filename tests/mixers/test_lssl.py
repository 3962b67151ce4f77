"""Facts of the LSSL paper, arXiv:2110.13985."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special

import memzoo
from memzoo.mixers import lssl
from memzoo.ops import hippo


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def signal(t):
    return np.sin(3 * t) + 0.5 * np.cos(7 * t + 1)


def run(measure, dt, time, C, impl, alpha=0.5):
    """y of one system, whose input is the signal in the middle of each step, at the ends of the steps."""
    A, B = hippo.transition(measure, C.size)
    with jax.enable_x64(True):
        A_t, B_t = hippo.bilinear(jnp.asarray(A), jnp.asarray(B), dt, alpha)
        u = jnp.asarray(signal((np.arange(round(time / dt)) + 0.5) * dt))[None, :, None]
        zero = jnp.zeros((1, 1, C.size))
        call = jax.jit(lssl.lssl, static_argnums=7)
        y, _ = call(u, A_t[None], B_t[None], jnp.asarray(C)[None], jnp.zeros(1), zero, None, impl)
        return np.asarray(y)[0, :, 0]


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_equals_a_fine_solve_of_the_ode(measure):
    """In all three views; and the error of the bilinear rule falls as dt^2."""
    N, time = 6, 2.0
    C = np.random.default_rng(0).standard_normal(N)
    A, B = hippo.transition(measure, N)
    solved = scipy.integrate.solve_ivp(
        lambda t, x: A @ x + B * signal(t), (0, time), np.zeros(N), t_eval=[0.5, 1.0, 2.0], rtol=1e-10, atol=1e-12
    )
    want = C @ solved.y
    wrong = []
    for dt in (1 / 64, 1 / 128):
        got = run(measure, dt, time, C, "scan")[[round(t / dt) - 1 for t in (0.5, 1.0, 2.0)]]
        wrong.append(np.abs(got - want).max())
    assert wrong[1] < 2e-3 * np.abs(want).max() and 3.5 < wrong[0] / wrong[1] < 4.5
    recurrence = run(measure, 1 / 64, time, C, "scan")
    for impl in ("associative", "conv"):
        np.testing.assert_allclose(run(measure, 1 / 64, time, C, impl), recurrence, atol=1e-11)


@pytest.mark.parametrize("impl", ["scan", "associative", "conv"])
@pytest.mark.parametrize(
    ("measure", "trained", "alpha"), [("legs", True, 0.5), ("legt", True, 1.0), ("lagt", False, 0.3)]
)
@pytest.mark.cases(1)
def test_is_the_layer_of_the_paper(measure, trained, alpha, impl):
    """In float64, token by token, with other parameters than the first: the solve, gelu, W."""
    D, N, T = 2, 4, 40
    rng = np.random.default_rng(0)
    x_BTD = rng.standard_normal((1, T, D)).astype(np.float32)
    fields = {"state_size": N, "measure": measure, "trained": trained, "alpha": alpha, "impl": impl}
    mixer = memzoo.make("lssl", width=D, **fields)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    params = jax.tree.map(lambda z: np.float32(z + 0.05 * rng.standard_normal(z.shape)), params)
    p = jax.tree.map(np.float64, params["params"])
    if trained:
        T_NN = np.diag(p["A_diagonal"]) + np.diag(p["A_below"], -1) + np.diag(p["A_above"], 1)
        middle = np.linalg.inv(T_NN) + np.diag(p["A_shift"])
        A, B = -np.diag(p["A_left"]) @ middle @ np.diag(p["A_right"]), p["A_left"] * p["A_b"]
    else:
        A, B = hippo.transition(measure, N)
    y = np.zeros((T, D))
    for d, dt in enumerate(np.exp(p["log_dt"])):
        state = np.zeros(N)
        for t, u in enumerate(np.float64(x_BTD[0, :, d])):
            right = (np.eye(N) + (1 - alpha) * dt * A) @ state + dt * B * u
            state = np.linalg.solve(np.eye(N) - alpha * dt * A, right)
            y[t, d] = p["C"][d] @ state + p["D"][d] * u
    gelu = y / 2 * (1 + scipy.special.erf(y / 2**0.5))
    y_BTD, _ = jax.jit(mixer.apply)(params, x_BTD)
    np.testing.assert_allclose(y_BTD[0], gelu @ p["out"]["kernel"] + p["out"]["bias"], atol=1e-5)


def test_the_state_of_legs_reconstructs_a_polynomial():
    """In x = exp(-t), of a degree less than N and for all of the past: f(-t) = sum_n c_n p_n(exp(-t))."""
    N, dt, q = 5, 1 / 200, np.polynomial.Polynomial([0.3, -2, 1, 4, -3])
    A, B = hippo.transition("legs", N)
    with jax.enable_x64(True):
        A_t, B_t = hippo.bilinear(jnp.asarray(A), jnp.asarray(B), dt)
        u = jnp.asarray(q(np.exp(-dt * (np.arange(4000)[::-1] + 0.5))))[None, :, None]
        zero = jnp.zeros((1, 1, N))
        _, c = jax.jit(lssl.lssl)(u, A_t[None], B_t[None], zero[0], jnp.zeros(1), zero, None)
    x = np.linspace(0, 1, 30)
    np.testing.assert_allclose(hippo.legendre(N, x) @ np.asarray(c)[0, 0], q(x), atol=1e-3)


@pytest.mark.parametrize(("measure", "N"), [("legs", 64), ("legs", 16), ("legt", 16), ("lagt", 64)])
@pytest.mark.cases(2)
def test_what_blows_up_is_refused(measure, N):
    """1,024 steps of dt_max are multiplied out; refused if they make a state thousands of times as long."""
    A, _ = hippo.transition(measure, N)
    for alpha in (0, 0.25, 0.4, 0.45, 0.499, 0.5, 1.0):
        step = np.linalg.solve(np.eye(N) - alpha * 0.1 * A, np.eye(N) + (1 - alpha) * 0.1 * A)
        state, largest = np.eye(N), 1.0
        for _ in range(1024):
            state = step @ state
            if (largest := max(largest, np.linalg.norm(state, 2))) > 1e9:
                break
        if largest < 300:
            memzoo.make("lssl", width=2, measure=measure, state_size=N, alpha=alpha)
        elif largest > 3000:
            with pytest.raises(
                ValueError, match=f"alpha: expected one at which .* got {alpha}; 0.5 and above never do"
            ):
                memzoo.make("lssl", width=2, measure=measure, state_size=N, alpha=alpha)
            memzoo.make("lssl", width=2, measure=measure, state_size=N, alpha=alpha, dt_max=1e-3)


@pytest.mark.long
def test_half_the_step_at_twice_the_sampling_rate_is_the_same_output():
    C = np.random.default_rng(1).standard_normal(8)
    slow, fast = run("legs", 1e-2, 3.0, C, "conv"), run("legs", 5e-3, 3.0, C, "conv")
    np.testing.assert_allclose(fast[1::2], slow, atol=2e-3 * np.abs(slow).max())
    assert np.abs(fast[: slow.size] - slow).max() > 0.1 * np.abs(slow).max(), "the test itself"


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
@pytest.mark.parametrize("N", [1, 2, 7, 64])
def test_the_trained_matrix_begins_as_that_of_hippo(measure, N):
    with jax.enable_x64(True):
        start = {name: jnp.asarray(value) for name, value in lssl.quasiseparable(measure, N).items()}
        for got, want in zip(lssl.matrices(**start), hippo.transition(measure, N), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12 * N)


@pytest.mark.long
def test_fixed_is_trained_at_the_start():
    x = jax.random.normal(jax.random.key(1), (2, 20, 3))
    trained, fixed = (memzoo.make("lssl", width=3, state_size=5, trained=t) for t in (True, False))
    params = jax.jit(trained.init)(jax.random.key(0), x)["params"]
    kept = {"params": {name: p for name, p in params.items() if not name.startswith("A_")}}
    y = jax.jit(fixed.apply)(kept, x)[0]
    np.testing.assert_allclose(y, jax.jit(trained.apply)({"params": params}, x)[0], atol=1e-5)
    assert jax.tree.structure(jax.eval_shape(fixed.init, jax.random.key(0), x)) == jax.tree.structure(kept)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(fixed.apply(p, x)[0] ** 2)))(kept)["params"]
    assert not gradient["log_dt"].any() and gradient["C"].all()


def test_initial_steps_and_outputs():
    mixer = memzoo.make("lssl", width=2000, state_size=2)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 2000)))["params"]
    assert distance_from_uniform((np.float64(p["log_dt"]) - np.log(1e-3)) / np.log(100)) < 0.03
    assert abs(np.std(p["C"]) - 1) < 0.05 and abs(np.std(p["D"]) - 1) < 0.05


@pytest.mark.long
def test_gradients_without_resets_are_those_of_the_recurrence():
    """The FFT over all tokens, with an incoming state."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (2, 75, 3))
        fields = {"width": 3, "state_size": 5, "measure": "legt", "dtype": jnp.float64, "param_dtype": jnp.float64}
        params = memzoo.make("lssl", **fields).init(jax.random.key(0), x[:, :1])
        x_BDN = jax.random.normal(jax.random.key(2), (2, 3, 5))

        def loss(params, x, x_BDN, impl):
            y, last = memzoo.make("lssl", impl=impl, **fields).apply(params, x, lssl.State(x_BDN))
            return jnp.sum(jnp.cos(jnp.arange(y.size)) * y.ravel()) + jnp.sum(last.x_BDN**2)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
        want, got = (gradient(params, x, x_BDN, impl) for impl in ("scan", "conv"))
        for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(g, w, atol=1e-10 * np.abs(w).max())


def test_bad_fields_are_named():
    for fields, message in (
        ({"measure": "fout"}, "measure: expected one of legs, legt, lagt; got 'fout'"),
        ({"state_size": 0}, "state_size: expected an integer >= 1, got 0"),
        ({"alpha": 1.5}, r"alpha: expected a number in \[0, 1\], got 1.5"),
        ({"dt_min": 0.2}, "dt_min, dt_max: expected 0 < dt_min <= dt_max, got 0.2, 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            memzoo.make("lssl", width=4, **fields)
