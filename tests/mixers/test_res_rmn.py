"""Facts of the residual reservoir memory network, arXiv:2508.09925.

Dims: B batch, T time, D width, M units of the ring, N units.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import res_rmn

D, M, N = 2, 16, 20


def initialised(**fields):
    mixer = memzoo.make("res_rmn", width=D, **{"memory_units": M, "units": N, **fields})
    return mixer, jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D))))


def states(mixer, variables, x_BTD, state):
    apply = jax.jit(lambda *a: mixer.apply(*a, mutable=["intermediates"]))
    (_, last), seen = apply(variables, x_BTD, state)
    return np.float64(seen["intermediates"]["features"][0]), last


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_is_the_equation(impl):
    """Around the ring and on."""
    mixer, variables = initialised(residual="cyclic", alpha=0.8, beta=0.3, bias_scale=0.5, impl=impl)
    rng = np.random.default_rng(0)
    x_BTD = rng.standard_normal((2, M + 5, D)).astype(np.float32)
    r = variables["reservoir"]
    m_BM, h_BN = (rng.standard_normal((2, size)).astype(np.float32) for size in (M, N))
    got_BTN, last = states(mixer, variables, x_BTD, res_rmn.State(m_BM, h_BN))
    C = np.eye(M, k=-1) + np.eye(M, k=M - 1)
    for t in range(M + 5):
        m_BM = m_BM @ C.T + x_BTD[:, t] @ r["V"]
        h_BN = 0.8 * np.roll(h_BN, 1, axis=1) + 0.3 * np.tanh(
            h_BN @ r["W"].T + m_BM @ r["W_m"].T + x_BTD[:, t] @ r["W_in"] + r["b"]
        )
        np.testing.assert_allclose(got_BTN[:, t], h_BN, atol=1e-5)
    np.testing.assert_allclose(last.m_BM, m_BM, atol=1e-5)


def test_the_ring_holds_as_many_numbers_as_it_has_units():
    """Of one input per token: half the ring's length has half its rank, and all can be read back; twice it no more."""
    rank = {}
    for T in (M // 2, M, 2 * M):
        v_TM = np.zeros((T, T, M), np.float32)  # row by row, an impulse at each of T tokens
        v_TM[np.arange(T), np.arange(T)] = np.random.default_rng(0).uniform(-1, 1, M)
        impulses_TM = np.asarray(res_rmn.ring(jnp.asarray(v_TM), jnp.zeros((T, M)), None))[:, -1]
        rank[T] = np.linalg.matrix_rank(impulses_TM, tol=1e-4)
        if T == M:
            x_T = np.random.default_rng(1).standard_normal(T)
            np.testing.assert_allclose(np.linalg.solve(impulses_TM.T, x_T @ impulses_TM), x_T, atol=1e-3)
    assert rank == {M // 2: M // 2, M: M, 2 * M: M}


def test_the_ring_forgets_nothing():
    """|C m| = |m|: no echo state, after any number of tokens."""
    mixer, variables = initialised()
    start = res_rmn.State(np.float32(np.random.default_rng(0).standard_normal((1, M))), np.zeros((1, N), np.float32))
    _, last = states(mixer, variables, np.zeros((1, 1000, D), np.float32), start)
    np.testing.assert_allclose(last.m_BM, np.roll(start.m_BM, 1000, axis=1), atol=1e-5)


def test_without_memory_it_is_the_residual_network():
    mixer, variables = initialised(residual="identity", memory_scale=0.0)
    x_BTD = np.random.default_rng(0).standard_normal((2, 9, D)).astype(np.float32)
    alone = memzoo.make("res_esn", width=D, units=N, residual="identity")
    want, _ = jax.jit(alone.apply)(variables, x_BTD)
    np.testing.assert_allclose(jax.jit(mixer.apply)(variables, x_BTD)[0], want, atol=1e-5)


@pytest.mark.long
def test_its_nonlinear_part_forgets_its_start_as_the_condition_says():
    """At least so fast, under any input and whatever the ring holds, as long as it holds the same."""
    mixer, variables = initialised(alpha=0.8, beta=0.1)
    r = variables["reservoir"]
    condition = mixer.echo_state(variables)
    np.testing.assert_allclose(condition.contraction, 0.8 + 0.1 * np.linalg.svd(r["W"])[1][0], rtol=1e-4)
    linear = 0.8 * r["O"] + 0.1 * r["W"]
    np.testing.assert_allclose(condition.radius, np.abs(np.linalg.eigvals(np.float64(linear))).max(), rtol=1e-4)
    rng = np.random.default_rng(1)
    x_BTD = rng.standard_normal((1, 300, D)).repeat(2, 0).astype(np.float32)
    m_BM = rng.standard_normal((1, M)).repeat(2, 0).astype(np.float32)
    h_BTN, _ = states(mixer, variables, x_BTD, res_rmn.State(m_BM, rng.standard_normal((2, N)).astype(np.float32)))
    apart_T = np.linalg.norm(h_BTN[0] - h_BTN[1], axis=-1)
    assert condition.contraction < 1
    assert (apart_T[1:] <= float(condition.contraction) * apart_T[:-1] + 1e-6).all() and apart_T[-1] < 1e-5


def test_the_reservoir_is_drawn_as_it_says():
    _, variables = initialised(memory_units=150, units=30, memory_scale=0.5, memory_input_scale=2.0, bias_scale=0.2)
    r = variables["reservoir"]
    np.testing.assert_allclose(np.abs(np.linalg.eigvals(np.float64(r["W"]))).max(), 0.9, rtol=1e-4)
    np.testing.assert_allclose(r["O"].T @ r["O"], np.eye(30), atol=1e-5)
    for name, bound in (("W_m", 0.5 / 150**0.5), ("V", 2 / D**0.5), ("W_in", 1 / D**0.5), ("b", 0.2)):
        u = np.sort(r[name].ravel() / bound + 1) / 2
        assert u[0] >= 0 and u[-1] <= 1 and np.abs(u - (np.arange(u.size) + 0.5) / u.size).max() < 2 * u.size**-0.5


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("memory_units: expected an integer >= 1, got 0", {"memory_units": 0}),
        ("residual: expected one of random, cyclic, identity, got 'cycle'; did you mean cyclic", {"residual": "cycle"}),
        (r"alpha: expected a number in \[0, 1\], got -0.1", {"alpha": -0.1}),
        ("beta: expected a number > 0, got 0.0", {"beta": 0.0}),
        ("memory_scale: expected a number >= 0, got -1", {"memory_scale": -1.0}),
        ("memory_input_scale: expected a finite number, got nan", {"memory_input_scale": float("nan")}),
    ],
)
def test_bad_fields_are_named(match, fields):
    with pytest.raises(ValueError, match=match):
        memzoo.make("res_rmn", width=D, **fields).initial_state(1)
