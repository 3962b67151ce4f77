"""newton is scan: in values, final state and gradients, whatever the dynamics, and it says how long it took.

Dims: B batch, T time, X channels.
"""

import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops
from memzoo.ops import newton as newton_module
from memzoo.ops.newton import fixed_point

B, X = 2, 5
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


class Weights(NamedTuple):
    U_XX: jax.Array
    gate_X: jax.Array


def cell(w, h_X, x):
    """A leaky tanh RNN whose leak depends on the input: its Jacobian is neither diagonal nor constant."""
    leak_X = jax.nn.sigmoid(w.gate_X * x["in_X"])
    return leak_X * h_X + (1 - leak_X) * jnp.tanh(w.U_XX @ h_X + x["in_X"] + x["kind"])


def cell_numpy(w, h_BX, xs, reset_BT):
    """The same in numpy, written from the equation. Returns h_BTX."""
    h_BX, hs = np.array(h_BX), []
    for t in range(reset_BT.shape[1]):
        in_BX, kind_B1 = xs["in_X"][:, t], xs["kind"][:, t, None]
        h_BX = np.where(reset_BT[:, t, None], 0, h_BX)
        leak_BX = 1 / (1 + np.exp(-w.gate_X * in_BX))
        h_BX = leak_BX * h_BX + (1 - leak_BX) * np.tanh(h_BX @ w.U_XX.T + in_BX + kind_B1)
        hs.append(h_BX)
    return np.stack(hs, 1)


def problem(T, gain, dtype="float64"):
    rng = np.random.default_rng(T)

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    w = Weights(gain * draw(X, X) / np.sqrt(X).astype(dtype), draw(X))
    xs = {"in_X": draw(B, T, X), "kind": rng.integers(0, 2, (B, T), dtype="int32")}
    return w, draw(B, X), xs, draw(B, T, X)


def resets(T):
    """At the first token, at the last, and two in a row."""
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, [0, T - 1]] = reset_BT[1, T // 2 : T // 2 + 2] = True
    return reset_BT


@partial(jax.jit, static_argnames=("impl", "jacobian"))
def everything(w, h_BX, in_BTX, kind, reset_BT, dh_BTX, impl, jacobian="full"):
    """Values, final state, and the gradients to weights, state and inputs."""

    def loss(w, h_BX, in_BTX):
        xs = {"in_X": in_BTX, "kind": kind}
        h_BTX, last_BX = ops.nonlinear_scan(partial(cell, w), h_BX, xs, reset_BT, impl=impl, jacobian=jacobian)
        return jnp.vdot(h_BTX, dh_BTX) + jnp.sum(last_BX**2), (h_BTX, last_BX)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(w, h_BX, in_BTX)


@partial(jax.jit, static_argnames=("jacobian", "max_iterations"))
def newton(w, h_BX, xs, reset_BT=None, jacobian="full", max_iterations=None):
    return ops.newton_scan(partial(cell, w), h_BX, xs, reset_BT, jacobian=jacobian, max_iterations=max_iterations)


def assert_close(got, want, tolerance):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.sqrt(np.mean((g - w) ** 2)) <= tolerance * np.sqrt(np.mean(w**2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("T", [1, 13])
@pytest.mark.cases(1)
def test_forms_agree_in_values_and_gradients(dtype, T):
    with jax.enable_x64(dtype == "float64"):
        w, h_BX, xs, dh_BTX = problem(T, 1.5, dtype)
        for reset_BT in (resets(T), np.zeros((B, T), bool)) if T > 1 else (np.array([[True], [False]]),):
            args = w, h_BX, xs["in_X"], xs["kind"], reset_BT, dh_BTX
            want = everything(*args, "scan")
            assert_close(want[0][1][0], cell_numpy(w, h_BX, xs, reset_BT), TOLERANCE[dtype])
            for jacobian in ("full", "diagonal"):
                assert_close(everything(*args, "newton", jacobian), want, TOLERANCE[dtype])


def test_the_adjoint_is_solved_at_once(monkeypatch):
    """It is linear, so that one iteration with all of the Jacobian solves it, and the next sees that it is solved.

    With a wrong one it would be right in the end, after as many iterations as there are tokens.
    """
    T, counts, iterate = 21, [], newton_module._iterate

    def counted(*arguments):
        h_BTX, iterations, more = iterate(*arguments)
        jax.debug.callback(counts.append, iterations)
        return h_BTX, iterations, more

    monkeypatch.setattr(newton_module, "_iterate", counted)
    w, h_BX, xs, dh_BTX = problem(T, 1.5, "float32")
    run = lambda h_BX: ops.nonlinear_scan(partial(cell, w), h_BX, xs, resets(T), impl="newton", jacobian="full")[0]
    _, pull = jax.vjp(run, h_BX)
    jax.effects_barrier()
    assert counts.pop() > 2, "the test itself"
    pull(dh_BTX)
    jax.effects_barrier()
    assert counts.pop() <= 2


def test_gradient_is_the_finite_difference():
    T, eps = 13, 1e-5
    with jax.enable_x64(True):
        w, h_BX, xs, dh_BTX = problem(T, 1.5)
        reset_BT = resets(T)
        got = {j: everything(w, h_BX, *xs.values(), reset_BT, dh_BTX, "newton", j) for j in ("full", "diagonal")}
        other_w, other_h_BX, other_xs, _ = problem(T + 1, 1.0)
        direction = other_w, other_h_BX, other_xs["in_X"][:, :T]

        def loss(eps):
            def moved(x, dx):
                return x + eps * dx

            moved_xs = {"in_X": moved(xs["in_X"], direction[2]), "kind": xs["kind"]}
            h_BTX = cell_numpy(Weights(*map(moved, w, direction[0])), moved(h_BX, direction[1]), moved_xs, reset_BT)
            return np.vdot(h_BTX, dh_BTX) + np.sum(h_BTX[:, -1] ** 2)

        want = (loss(eps) - loss(-eps)) / (2 * eps)
        for _, gradient in got.values():
            along = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
            np.testing.assert_allclose(along, want, rtol=1e-7)


@pytest.mark.long
def test_expanding_dynamics_are_exact_all_the_same():
    T = 40
    with jax.enable_x64(True):
        w, h_BX, xs, dh_BTX = problem(T, 12.0)
        reset_BT = np.zeros((B, T), bool)
        args = w, h_BX, *xs.values(), reset_BT, dh_BTX
        want = everything(*args, "scan")
        moved_BTX = everything(w, h_BX + 1e-9, *args[2:], "scan")[0][1][0]
        assert np.max(np.abs(moved_BTX - want[0][1][0])) > 1e-5  # ten thousandfold
        for jacobian in ("full", "diagonal"):
            assert_close(everything(*args, "newton", jacobian), want, 1e-10)
            iterations = newton(w, h_BX, xs, reset_BT, jacobian)[2]
            assert 5 < iterations <= T


def test_overflowing_products_of_jacobians_are_survived():
    """h_t = 1e6 h_{t-1} + x_t with inputs that hold it among -1, 0, 1: seven Jacobians overflow in float32."""
    want_BTX = np.random.default_rng(0).integers(-1, 2, (B, 19, X)).astype("float32")
    x_BTX = want_BTX - np.float32(1e6) * np.pad(want_BTX, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    for jacobian in ("full", "diagonal"):
        h_BTX, _, _ = ops.newton_scan(lambda h_X, x_X: 1e6 * h_X + x_X, jnp.zeros((B, X)), x_BTX, jacobian=jacobian)
        np.testing.assert_array_equal(h_BTX, want_BTX)


def test_contractive_dynamics_take_a_handful_of_iterations():
    w, h_BX, xs, _ = problem(300, 0.5, "float32")
    assert newton(w, h_BX, xs)[2] <= 6
    assert newton(w, h_BX, xs, jacobian="diagonal")[2] <= 25


def test_a_linear_step_is_solved_at_once():
    """The first iteration solves it, the second sees that; one token needs no second look."""
    A_XX = np.random.default_rng(0).normal(size=(X, X)).astype("float32") / 3
    h_BX = np.ones((B, X), "float32")
    for T, iterations in ((1, 1), (6, 2)):
        _, last_BX, n = ops.newton_scan(lambda h_X, _: A_XX @ h_X, h_BX, np.zeros((B, T)))
        np.testing.assert_allclose(last_BX, h_BX @ np.linalg.matrix_power(A_XX.T, T), rtol=1e-5, atol=1e-6)
        assert n == iterations and n.dtype == jnp.int32


def test_too_few_iterations_give_nan_and_nothing_wrong():
    T = 13
    with jax.enable_x64(True):
        w, h_BX, xs, _ = problem(T, 6.0)
        reset_BT = resets(T)
        want_BTX = cell_numpy(w, h_BX, xs, reset_BT)
        h_BTX, last_BX, n = newton(w, h_BX, xs, reset_BT, max_iterations=3)
        assert n == 3
        lost_BT = np.isnan(h_BTX).any(-1)
        assert lost_BT.any() and np.isnan(h_BTX[lost_BT]).all()
        np.testing.assert_allclose(h_BTX[~lost_BT], want_BTX[~lost_BT], rtol=1e-12)
        # Three iterations settle three tokens of each sequence at the least, and what is lost stays lost until a reset.
        starts_BT = reset_BT | (np.arange(T) == 0)
        since_BT = np.array([[t - max(s for s in range(t + 1) if row[s]) for t in range(T)] for row in starts_BT])
        assert not lost_BT[since_BT < 3].any()
        assert (lost_BT[:, 1:] | ~lost_BT[:, :-1] | starts_BT[:, 1:]).all()
        assert not np.isnan(last_BX[0]).any() and np.isnan(last_BX[1]).all()


@pytest.mark.long
def test_a_call_that_does_not_settle_falls_back_to_scan():
    """With `fallback`, values, final state and gradients are the loop's, though three iterations are far too few."""
    T = 13
    with jax.enable_x64(True):
        w, h_BX, xs, dh_BTX = problem(T, 6.0)

        def run(scan, w, h_BX, in_BTX):
            h_BTX, last_BX = scan(partial(cell, w), h_BX, {"in_X": in_BTX, "kind": xs["kind"]}, resets(T))[:2]
            return jnp.vdot(h_BTX, dh_BTX) + jnp.sum(last_BX**2), h_BTX

        gradient = lambda scan: jax.jit(jax.value_and_grad(partial(run, scan), argnums=(0, 1, 2), has_aux=True))
        few = partial(ops.newton_scan, max_iterations=3, fallback=True)
        want = gradient(ops.nonlinear_scan)(w, h_BX, xs["in_X"])
        assert_close(gradient(few)(w, h_BX, xs["in_X"]), want, 1e-10)


@pytest.mark.long
def test_auto_is_newton_where_loops_are_slow(monkeypatch):
    """On an accelerator, long sequences of small blocks are done by Newton, and right if that does not settle."""
    T, strong = 1024, np.float32(2.5) * np.eye(X, dtype="float32")[::-1]
    x_BTX = np.random.default_rng(0).normal(size=(B, T, X)).astype("float32")
    run = lambda gain: ops.nonlinear_scan(
        lambda h_X, x_X: jnp.tanh(gain * strong @ h_X + x_X), jnp.zeros((B, X)), x_BTX
    )
    want = [run(gain)[0] for gain in (0.1, 1.0)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    counts = []
    monkeypatch.setattr(
        sys.modules["memzoo.ops.newton"], "fixed_point", lambda *args: counts.append(out := fixed_point(*args)) or out
    )
    for gain, value in zip((0.1, 1.0), want, strict=True):
        np.testing.assert_allclose(run(gain)[0], value, atol=1e-5)
    assert [int(n) for _, n in counts] == [int(counts[0][1]), 32] and counts[0][1] < 10


@pytest.mark.long
def test_blocks_that_do_not_meet_take_no_more_iterations_than_the_full_jacobian():
    """Three heads of two channels, each with a matrix of its own; and channels alone, whose diagonal is exact."""
    T, H, E = 200, 3, 2
    rng = np.random.default_rng(0)
    U_HEE, x_BTX = rng.normal(size=(H, E, E)).astype("float32"), rng.normal(size=(B, T, H * E)).astype("float32")
    heads = lambda h_X, x_X: jnp.tanh(jnp.einsum("hef,hf->he", U_HEE, h_X.reshape(H, E)).reshape(-1) + x_X)
    alone = lambda h_X, x_X: jnp.tanh(1.5 * h_X + x_X)
    for step, blocks in ((heads, H), (alone, H * E)):

        @partial(jax.jit, static_argnames=("jacobian",))
        def run(x_BTX, jacobian, step=step, blocks=blocks):
            scan = lambda x: ops.newton_scan(step, jnp.ones((B, H * E)), x, jacobian=jacobian, blocks=blocks)
            (h_BTX, _, n), pull = jax.vjp(scan, x_BTX)
            zero = np.zeros(n.shape, jax.dtypes.float0)
            return (h_BTX, pull((jnp.cos(h_BTX), jnp.zeros((B, H * E)), zero))[0]), n

        full, block = run(x_BTX, "full"), run(x_BTX, "block")
        assert_close(block[0], full[0], 1e-5)
        assert block[1] <= full[1] + 1 < run(x_BTX, "diagonal")[1] + (blocks == H * E) * 99


def test_the_states_of_a_call_before_save_iterations():
    w, h_BX, xs, _ = problem(300, 1.0, "float32")
    h_BTX, _, cold = newton(w, h_BX, xs)
    moved = Weights(w.U_XX * np.float32(1.001), w.gate_X)
    again_BTX, _, warm = jax.jit(lambda w, guess: ops.newton_scan(partial(cell, w), h_BX, xs, guess_BTX=guess))(
        moved, h_BTX
    )
    np.testing.assert_allclose(again_BTX, newton(moved, h_BX, xs)[0], rtol=1e-4, atol=1e-5)
    assert warm < cold


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_nothing_crosses_a_reset(impl):
    """Neither a NaN state before the first token, nor an infinite input of the sequence before; nor their gradients."""
    T = 13
    w, h_BX, xs, dh_BTX = problem(T, 1.5, "float32")
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, 0] = reset_BT[1, 6] = True
    clean = everything(w, h_BX, *xs.values(), reset_BT, dh_BTX, impl)
    h_BX[0], xs["in_X"][1, 4] = np.nan, np.inf
    (_, (h_BTX, last_BX)), (_, dh_BX, din_BTX) = everything(w, h_BX, *xs.values(), reset_BT, dh_BTX, impl)
    for got, want in ((h_BTX, clean[0][1][0]), (din_BTX, clean[1][2])):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[1, 6:], want[1, 6:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last_BX, clean[0][1][1], rtol=1e-5, atol=1e-6)
    assert (dh_BX[0] == 0).all()


def test_a_state_that_is_not_finite_costs_its_own_sequence_and_no_iterations():
    T = 300
    w, h_BX, xs, _ = problem(T, 0.5, "float32")
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, 20] = True
    want_BTX = cell_numpy(w, h_BX, xs, reset_BT)
    xs["in_X"][0, 7, 2] = np.nan
    h_BTX, _, iterations = newton(w, h_BX, xs, reset_BT)
    want_BTX[0, 8:20], want_BTX[0, 7, 2] = np.nan, np.nan
    np.testing.assert_allclose(h_BTX, want_BTX, rtol=1e-5, atol=1e-6)
    assert iterations <= 8


@pytest.mark.long
@pytest.mark.parametrize("jacobian", ["full", "diagonal"])
def test_what_is_infinite_is_never_followed_by_numbers(jacobian):
    """An infinite input, an infinite state, and a state that overflows: finite where `scan` is, and equal there."""
    x_BTX, huge = np.ones((2, 6, 2), "float32"), np.float32(1e20)
    x_BTX[0, 2] = np.inf
    start_BX = np.array([[0, 0], [np.inf, 0]], "float32")
    for step in (lambda h_X, x_X: 0.5 * h_X + x_X, lambda h_X, x_X: jax.nn.relu(huge * h_X + x_X)):
        want_BTX, _ = ops.nonlinear_scan(step, start_BX, x_BTX, impl="scan")
        for fallback in (False, True):
            got_BTX, *_ = ops.newton_scan(step, start_BX, x_BTX, jacobian=jacobian, fallback=fallback)
            there_BTX = np.isfinite(got_BTX)
            assert not (there_BTX & ~np.isfinite(want_BTX)).any() and there_BTX[0, :2].any()
            np.testing.assert_array_equal(np.asarray(got_BTX)[there_BTX], np.asarray(want_BTX)[there_BTX])


@pytest.mark.long
@pytest.mark.parametrize("jacobian", ["full", "diagonal"])
def test_small_channels_settle_beside_large_ones(jacobian):
    """A channel of size 1e6 beside two that turn and squash; cotangents as far apart."""
    turn = 1.2 * np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]], "float32")
    x_BTX = np.random.default_rng(0).normal(size=(1, 100, 3)).astype("float32") * np.array([1e6, 1, 1], "float32")

    def run(impl):
        step = lambda w, h_X, x_X: jnp.append(0.5 * h_X[0] + x_X[0], jnp.tanh(w * turn @ h_X[1:] + x_X[1:]))

        def loss(w):
            h_BTX, _ = ops.nonlinear_scan(
                partial(step, w), np.zeros((1, 3), "float32"), x_BTX, impl=impl, jacobian=jacobian
            )
            return jnp.sum(h_BTX * np.array([1e6, 1, 1], "float32") * np.float32(1e-3)), h_BTX

        return jax.jit(jax.grad(loss, has_aux=True))(jnp.float32(1.0))

    (got, got_BTX), (want, want_BTX) = run("newton"), run("scan")
    np.testing.assert_allclose(got_BTX[..., 1:], want_BTX[..., 1:], atol=2e-5)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.long
def test_step_may_close_over_traced_values_of_any_dtype():
    """h_t = n w h_{t-1}, so h_3 = (n w)^3 h_0, whatever the order of jit, grad and vmap."""
    w_N, n_N = jnp.array([0.5, 2.0]), jnp.array([1, 3])

    def cubes(impl, w_N, n_N):
        def cube(w, n):
            return ops.nonlinear_scan(lambda h_X, x: n * w * h_X, jnp.ones((1, 1)), np.zeros((1, 3)), impl=impl)[1][
                0, 0
            ]

        return jnp.sum(jax.vmap(cube)(w_N, n_N))

    for impl in ("scan", "newton"):
        f = partial(cubes, impl)
        for gradient in (jax.grad(f), jax.jit(jax.grad(f)), jax.grad(jax.jit(f))):
            np.testing.assert_allclose(gradient(w_N, n_N), 3 * n_N**3 * w_N**2, rtol=1e-5)


def test_only_scan_is_twice_differentiable():
    def cube(impl, w):
        return ops.nonlinear_scan(lambda h_X, x: w * h_X, jnp.ones((1, 1)), np.zeros((1, 3)), impl=impl)[1][0, 0]

    assert jax.grad(jax.grad(partial(cube, "scan")))(2.0) == 12
    assert jax.jvp(partial(cube, "scan"), (2.0,), (1.0,))[1] == 12
    with pytest.raises(ValueError, match="while_loop"):
        jax.grad(jax.grad(partial(cube, "newton")))(2.0)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(partial(cube, "newton"), (2.0,), (1.0,))


@pytest.mark.long
def test_the_diagonal_form_never_holds_a_full_jacobian():
    T, wide = 16, 128
    U_XX = np.eye(wide, dtype="float32")

    def loss(x_BTX, jacobian):
        zero_BX = jnp.zeros((1, wide))
        return jnp.sum(ops.newton_scan(lambda h_X, x: jnp.tanh(U_XX @ h_X + x), zero_BX, x_BTX, jacobian=jacobian)[0])

    def scratch(jacobian):
        compiled = jax.jit(jax.grad(partial(loss, jacobian=jacobian))).lower(jnp.zeros((1, T, wide))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full = 4 * T * wide * wide
    assert scratch("diagonal") < full / 2 < full < scratch("full")


def test_bad_arguments_are_named():
    h_BX, xs = np.zeros((B, X), "float32"), np.zeros((B, 3, X), "float32")

    def step(h_X, x_X):
        return h_X + x_X

    for match, call in {
        "impl: expected": lambda: ops.nonlinear_scan(step, h_BX, xs, impl="newtom"),
        "jacobian: expected one of auto, full, block, diagonal, got 'diag'": lambda: ops.nonlinear_scan(
            step, h_BX, xs, jacobian="diag"
        ),
        "channels of h_BX: expected a positive multiple of blocks = 2, got 5": lambda: ops.newton_scan(
            step, h_BX, xs, blocks=2
        ),
        r"guess_BTX: expected shape \[2, 3, 5\], got \[2, 5\]": lambda: ops.newton_scan(step, h_BX, xs, guess_BTX=h_BX),
        "max_iterations": lambda: ops.newton_scan(step, h_BX, xs, max_iterations=0),
        "h_BX: expected 2 axes": lambda: ops.nonlinear_scan(step, h_BX[0], xs),
        "h_BX: expected a real dtype": lambda: ops.nonlinear_scan(step, h_BX + 1j, xs),
        r"xs\['b'\]: expected shape \[B = 2": lambda: ops.nonlinear_scan(step, h_BX, {"a": xs, "b": xs[:, :2]}),
        r"xs: expected shape .* T >= 1": lambda: ops.nonlinear_scan(step, h_BX, xs[:, :0]),
        "xs: expected at least one": lambda: ops.nonlinear_scan(step, h_BX, None),
        "reset_BT: expected shape": lambda: ops.nonlinear_scan(step, h_BX, xs, np.zeros((B, 2), bool)),
        r"step: expected it to return float32\[5\]": lambda: ops.nonlinear_scan(lambda h, x: h[:2], h_BX, xs),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(NotImplementedError, match="nonlinear_scan has no form 'chunk'"):
        ops.nonlinear_scan(step, h_BX, xs, impl="chunk")
