"""hippo_memory against least squares, and against the discretisations of scipy.

Dims: B batch, T time, H channels, N coefficients, X points of the past.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from memzoo import ops
from memzoo.ops import hippo

B, T, H, N = 2, 37, 3, 6
CASES = [
    ("legs", "zoh", 1.0),
    ("legs", "bilinear", 1.0),
    ("legt", "zoh", 11.0),
    ("legt", "bilinear", 11.0),
    ("lagt", "zoh", 11.0),
]


def make(dtype):
    rng = np.random.default_rng(0)
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, [0, 7, 8]] = reset_BT[1, [20, T - 1]] = True
    arrays = rng.standard_normal((B, T, H)), rng.standard_normal((B, H, N))
    return *(jnp.asarray(z, dtype) for z in arrays), jnp.array([4, 9], jnp.int32), jnp.asarray(reset_BT)


def in_numpy(f_BTH, c_BHN, position_B, reset_BT, measure, rule, timescale):
    """Token by token, each with the matrices of its own step from scipy."""
    A, b = hippo.transition(measure, N)
    out, c = np.zeros((*f_BTH.shape, N)), np.array(c_BHN)
    for row in range(B):
        k = position_B[row]
        for t in range(T):
            if reset_BT[row, t]:
                k, c[row] = 0, 0
            if measure == "legs" and k == 0:
                c[row] = np.eye(N)[0] * f_BTH[row, t][:, None]
            else:
                # In log t, legs is constant; a step by the bilinear rule has the paper's length, 1 / k.
                length = 1 / timescale if measure != "legs" else np.log((k + 1) / k) if rule == "zoh" else 1 / k
                at, bt, *_ = scipy.signal.cont2discrete((A, b[:, None], np.eye(N), 0), length, rule)
                c[row] = c[row] @ at.T + f_BTH[row, t][:, None] * bt[:, 0]
            out[row, t] = c[row]
            k += 1
    return out


@pytest.mark.parametrize(("measure", "rule", "timescale"), CASES)
@pytest.mark.cases(1)
def test_forms_agree_with_the_equation(measure, rule, timescale):
    """Values, the last state, and gradients of one form against the other's, in float64."""
    with jax.enable_x64(True):
        f_BTH, c_BHN, *rest = make(float)
        want_BTHN = in_numpy(*map(np.asarray, (f_BTH, c_BHN, *rest)), measure, rule, timescale)
        w_BTHN = np.random.default_rng(1).standard_normal(want_BTHN.shape)

        def loss(f_BTH, c_BHN, impl):
            fields = {"measure": measure, "discretisation": rule, "timescale": timescale, "impl": impl}
            found = ops.hippo_memory(f_BTH, c_BHN, *rest, size=N, **fields)
            return jnp.sum(found[0] * w_BTHN), found

        run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
        gradients = []
        for impl in ("scan", "associative"):
            gradient, (c_BTHN, c_BHN_last, position_B) = run(f_BTH, c_BHN, impl)
            np.testing.assert_allclose(c_BTHN, want_BTHN, atol=1e-10 * np.abs(want_BTHN).max())
            np.testing.assert_array_equal(c_BHN_last, c_BTHN[:, -1])
            np.testing.assert_array_equal(position_B, [T - 8, 1])
            gradients.append(gradient)
        for got, want in zip(*gradients, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-10 * np.abs(want).max())


@pytest.mark.long
@pytest.mark.parametrize("impl", ("scan", "associative"))
def test_legs_in_float32_does_not_drift(impl):
    """Rounding of 4,096 steps stays that of a few."""
    f_BTH = np.random.default_rng(0).standard_normal((1, 4096, 1))
    with jax.enable_x64(True):
        want_BTHN, *_ = ops.hippo_memory(jnp.asarray(f_BTH), size=N, impl="scan")
    got_BTHN, *_ = ops.hippo_memory(jnp.float32(f_BTH), size=N, impl=impl)
    np.testing.assert_allclose(got_BTHN, want_BTHN, atol=3e-6)


def least_squares(f_T):
    """Coefficients of the polynomial on [0, t] that is nearest to the staircase f, from its values at many points."""
    t = len(f_T)
    x_Q, w_Q = np.polynomial.legendre.leggauss(N + 1)  # exact for what is integrated over each step
    at_X = ((np.arange(t)[:, None] + (x_Q + 1) / 2) / t).ravel()
    root_X = np.sqrt(np.tile(w_Q, t))
    legendre_XN = np.polynomial.legendre.legvander(2 * at_X - 1, N - 1)
    found_N = np.linalg.lstsq(root_X[:, None] * legendre_XN, root_X * np.repeat(f_T, N + 1), rcond=None)[0]
    return found_N / np.sqrt(2 * np.arange(N) + 1)


@pytest.mark.parametrize("impl", ("scan", "associative"))
@pytest.mark.cases(1)
def test_legs_is_the_least_squares_fit_of_all_the_past_at_every_step(impl):
    with jax.enable_x64(True):
        f_T = np.cumsum(np.random.default_rng(0).standard_normal(200))
        c_1T1N, *_ = jax.jit(lambda f: ops.hippo_memory(f, size=N, impl=impl))(jnp.asarray(f_T)[None, :, None])
        for t in range(200):
            np.testing.assert_allclose(c_1T1N[0, t, 0], least_squares(f_T[: t + 1]), atol=1e-9)


def test_legs_does_not_know_the_time_scale():
    """HiPPO (2020), prop. 3: a signal that is sampled twice as often leaves the same memory, at twice the step."""
    with jax.enable_x64(True):
        f_BTH = make(float)[0]
        c_BTHN, *_ = ops.hippo_memory(f_BTH, size=N)
        twice_BTHN, *_ = ops.hippo_memory(jnp.repeat(f_BTH, 2, axis=1), size=N)
        np.testing.assert_allclose(twice_BTHN[:, 1::2], c_BTHN, atol=1e-12)


def test_gradients_of_legs_fall_like_one_over_t():
    """HiPPO (2020), prop. 5: |dc_T / df_t| is of order 1 / T, for an early f_t too."""
    with jax.enable_x64(True):
        last = lambda f_T: ops.hippo_memory(f_T[None, :, None], size=N)[0][0, -1, 0]
        scaled = [L * np.linalg.norm(jax.jit(jax.jacrev(last))(jnp.zeros(L))[:, L // 4]) for L in (32, 128, 512)]
        np.testing.assert_allclose(scaled, scaled[-1], rtol=0.05)


def test_the_gradient_of_legs_keeps_no_matrix_per_step():
    """A step needs a matrix [N, N] for each row; the gradient makes it anew, and keeps c and the step's number."""
    B, T, N = 3, 128, 32
    loss = lambda f_BTH: jnp.sum(ops.hippo_memory(f_BTH, size=N, impl="scan")[1] ** 2)
    program = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((B, T, 1), jnp.float32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * (B * T * N * N) / 4


@pytest.mark.parametrize("measure", ("legs", "legt", "lagt"))
@pytest.mark.cases(1)
def test_more_coefficients_hold_more_of_the_past(measure):
    """The error of a band-limited signal falls with each doubling of N; that of legs from 0.5 to less than 0.01."""
    T, timescale = 400, {"legs": 400, "legt": 400, "lagt": 60}[measure]
    f = lambda t: sum(np.cos(2 * np.pi * k * t / 400 + k) for k in range(1, 6)) / 2
    ago_X = (np.arange(T) + 0.5) / timescale
    wrong = []
    with jax.enable_x64(True):
        for N in (4, 8, 16, 32):
            f_BTH = jnp.asarray(f(np.arange(T) + 0.5))[None, :, None]
            _, c_11N, _ = ops.hippo_memory(f_BTH, size=N, measure=measure, timescale=timescale, impl="scan")
            off_X = ops.reconstruct(c_11N, ago_X, measure)[0, 0] - f(T - ago_X * timescale)
            weight_X = np.exp(-ago_X) if measure == "lagt" else np.ones(T)
            wrong.append(np.sqrt(np.average(np.square(off_X), weights=weight_X)))
    assert all(np.diff(wrong) < 0), wrong
    if measure == "legs":
        assert wrong[0] > 0.5 and wrong[-1] < 0.01, wrong


PASTS = [("legs", 1.0, 1.0, 0.01), ("legt", 400.0, 0.9, 0.1), ("lagt", 60.0, 2.0, 0.05)]


@pytest.mark.parametrize(("measure", "timescale", "oldest", "near"), PASTS)
def test_reconstructs_the_past(measure, timescale, oldest, near):
    """A sum of slow waves, from 24 numbers: all of it by legs, the window by legt, the last two mean ages by lagt."""
    T, N = 600, 24
    f = lambda t: np.sin(2 * np.pi * t / 300) + 0.5 * np.cos(2 * np.pi * t / 170)
    ago_X = np.linspace(0.01, oldest, 50)
    with jax.enable_x64(True):
        f_T = jnp.asarray(f(np.arange(T) + 0.5))
        _, c_11N, _ = ops.hippo_memory(f_T[None, :, None], size=N, measure=measure, timescale=timescale)
        got_X = ops.reconstruct(c_11N, ago_X, measure)[0, 0]
    want_X = f(T - ago_X * (T if measure == "legs" else timescale))
    np.testing.assert_allclose(got_X, want_X, atol=near)
    assert np.ptp(want_X) > 0.5, "the test itself"


def test_bad_arguments_are_named():
    f_BTH, c_BHN, _, reset_BT = make(jnp.float32)
    refused = {
        r"measure: expected one of legs, legt, lagt; got 'legz'": {"measure": "legz"},
        r"discretisation: expected one of zoh, bilinear": {"discretisation": "euler"},
        r"timescale: expected a number > 0, got 0": {"timescale": 0, "measure": "legt"},
        r"state_size: expected an integer >= 1, got 0": {"size": 0},
        r"c_BHN: expected N = size = 5, got shape \[2, 3, 6\]": {"size": 5, "c_BHN": c_BHN},
        r"position_B: expected int32 \[2\], got float32": {"position_B": jnp.zeros(2)},
        r"reset_BT": {"reset_BT": reset_BT[:, 1:]},
    }
    for message, fields in refused.items():
        with pytest.raises(ValueError, match=message):
            ops.hippo_memory(f_BTH, **({"size": N} | fields))
    with pytest.raises(NotImplementedError, match="hippo_memory has no form 'chunk'"):
        ops.hippo_memory(f_BTH, size=N, impl="chunk")
