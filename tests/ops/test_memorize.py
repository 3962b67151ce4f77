"""A memory that learns while it reads is gradient descent, written out; all its forms are one function.

Dims: B batch, T time, H heads, K key, V value, F hidden.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops
from memzoo.ops import Gates, MemoryState, Rule, memorize
from memzoo.ops.memory import half_square

B, T, H, K, V, F = 2, 13, 3, 4, 5, 6
CHUNK, WINDOW = 5, 3


def matrix(apply, x_TK, _):
    return apply("W", x_TK)


def network(apply, x_TK, fixed):
    """Two layers, a bias, and an output gain that does not change while it reads."""
    ones_T1 = jnp.ones((len(x_TK), 1), x_TK.dtype)
    return apply("out", jnp.tanh(apply("in", x_TK) + apply("bias", ones_T1))) * fixed["gain"]


class Problem(NamedTuple):
    A: dict
    fixed: dict
    q_BTHK: np.ndarray
    k_BTHK: np.ndarray
    v_BTHV: np.ndarray
    gates: Gates


def problem(step=0.1):
    rng = np.random.default_rng(0)
    normal, uniform = lambda *shape: rng.normal(size=shape), lambda *shape: rng.uniform(size=shape)
    A = {"in": normal(H, F, K) / 2, "bias": normal(H, F, 1) / 2, "out": normal(H, V, F) / 2}
    alpha = 0.3 * uniform(B, T, H, 2 * F + V)  # each row by itself: of bias, in, out
    gates = Gates(step * uniform(B, T, H), uniform(B, T, H), alpha, *uniform(2, B, T, H))
    return Problem(A, {"gain": normal(H, V)}, normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), gates)


def resets():
    """At the first token, two in a row, and in the middle of a chunk."""
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, 0] = reset_BT[1, 3] = reset_BT[1, 4] = reset_BT[0, 7] = True
    return reset_BT


def written_out(p, reset_BT, window):
    """One token after the other in numpy, with the network's gradient by hand. Returns (y_BTHV, the last A - A_0)."""
    y_BTHV, last = np.zeros((B, T, H, V)), []
    for b, h in np.ndindex(B, H):
        A0 = {name: W[h] for name, W in p.A.items()}
        gain = p.fixed["gain"][h]
        for t in range(T):
            if t == 0 or reset_BT[b, t]:
                A, S, start = dict(A0), {name: 0 for name in A0}, t
            if (t - start) % CHUNK == 0:
                anchor = dict(A)
            theta, eta, alpha, rate, _ = (gate[b, t, h] for gate in p.gates)
            g = {name: 0 for name in A0}
            for i in range(max(start, t - window + 1), t + 1):
                k, v, gamma = p.k_BTHK[b, i, h], p.v_BTHV[b, i, h], p.gates.gamma_BTH[b, i, h]
                hidden = np.tanh(anchor["in"] @ k + anchor["bias"][:, 0])
                error = (anchor["out"] @ hidden * gain - v) * gain
                back = anchor["out"].T @ error * (1 - hidden**2)
                for name, own in (("out", np.outer(error, hidden)), ("in", np.outer(back, k)), ("bias", back[:, None])):
                    g[name] = g[name] + gamma * own
            S = {name: eta * S[name] + theta * g[name] for name in A}
            forget = dict(zip(("bias", "in", "out"), np.split(alpha, [F, 2 * F]), strict=True))
            A = {name: (1 - forget[name])[:, None] * A[name] - rate * S[name] for name in A}
            y_BTHV[b, t, h] = A["out"] @ np.tanh(A["in"] @ p.q_BTHK[b, t, h] + A["bias"][:, 0]) * gain
        last.append({name: A[name] - A0[name] for name in A})
    return y_BTHV, {name: np.stack([A[name] for A in last]).reshape(B, H, *A0[name].shape) for name in A0}


@partial(jax.jit, static_argnames=("impl", "rule", "aligned"))
def run(p, reset_BT, state, impl, rule, aligned=False):
    return memorize(
        network, half_square, *(p.A, p.q_BTHK, p.k_BTHK, p.v_BTHV, p.gates), state, reset_BT,
        rule=rule, fixed=p.fixed, chunk=CHUNK, impl=impl, aligned=aligned,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("impl", "rule"))
def everything(p, reset_BT, impl, rule):
    """Output and state, and the gradient of both with respect to all that went in."""

    def loss(p):
        y_BTHV, state = run(p, reset_BT, None, impl, rule)
        ends = sum(jnp.sum(jnp.cos(s)) for s in jax.tree.leaves(state) if jnp.issubdtype(s.dtype, jnp.inexact))
        return jnp.sum(jnp.sin(y_BTHV)) + ends, (y_BTHV, state)

    (_, ends), gradient = jax.value_and_grad(loss, has_aux=True)(p)
    return ends, gradient


def assert_close(got, want, atol=1e-10):
    for path, g in jax.tree_util.tree_leaves_with_path(got):
        w = jax.tree_util.tree_leaves_with_path(want)
        np.testing.assert_allclose(g, dict((str(p), x) for p, x in w)[str(path)], atol=atol, err_msg=str(path))


@pytest.mark.parametrize("impl", ["scan", "chunk"])
@pytest.mark.cases(1)
def test_is_gradient_descent_written_out(impl):
    with jax.enable_x64(True):
        p, at_chunks = problem(), np.zeros((B, T), bool)
        at_chunks[0, 0] = at_chunks[1, CHUNK] = True
        for reset_BT, last in ((resets(), (7, 4)), (at_chunks, (0, CHUNK))):
            y_BTHV, state = run(p, reset_BT, None, impl, Rule(window=WINDOW))
            want_BTHV, A = written_out(p, reset_BT, WINDOW)
            np.testing.assert_allclose(y_BTHV, want_BTHV, atol=1e-12)
            assert_close(state.A, A, 1e-12)
            assert state.place_B.tolist() == [(T - start) % CHUNK for start in last]


def squashed(S):
    return S / jnp.sqrt(0.1 + jnp.sum(S**2, axis=(-2, -1), keepdims=True))


@pytest.mark.long
@pytest.mark.parametrize(
    ("rule", "without"),
    [
        pytest.param(Rule(window=WINDOW), (), id="window"),
        pytest.param(Rule(direction=squashed, window=2), (), id="direction"),
        pytest.param(Rule(weights=jnp.tanh), (), id="weights"),
        pytest.param(Rule(window=WINDOW), ("eta_BTH",), id="window, no momentum"),
        pytest.param(Rule(), ("eta_BTH",), id="no momentum"),
        pytest.param(Rule(), ("eta_BTH", "alpha_BTH", "rate_BTH", "gamma_BTH"), id="step alone"),
        pytest.param(Rule(weights=jnp.tanh), ("eta_BTH",), id="weights, no momentum"),
        pytest.param(Rule(weights=jnp.tanh), ("eta_BTH", "alpha_BTH"), id="weights, no decay"),
    ],
)
def test_forms_agree_in_state_and_gradients(rule, without):
    p = problem()
    p = p._replace(gates=p.gates._replace(**dict.fromkeys(without)))
    with jax.enable_x64(True):
        want = everything(p, resets(), "scan", rule)
        assert_close(everything(p, resets(), "chunk", rule), want)
        free = everything(p, None, "chunk", rule)
        assert_close(free, everything(p, np.zeros((B, T), bool), "scan", rule))


@pytest.mark.long
@pytest.mark.parametrize("impl", ["scan", pytest.param("chunk", marks=pytest.mark.long)])
def test_pieces_are_the_whole(impl):
    """Chunks are counted from the last reset, wherever calls begin and end."""
    with jax.enable_x64(True):
        p, reset_BT, rule = problem(), resets(), Rule(window=WINDOW)
        want_BTHV, want = run(p, reset_BT, None, impl, rule)
        ys, state = [], None
        for begin, end in ((0, 6), (6, 7), (7, T)):
            piece = lambda x, begin=begin, end=end: x[:, begin:end]
            arrays = jax.tree.map(piece, (p.q_BTHK, p.k_BTHK, p.v_BTHV, p.gates))
            y_BTHV, state = run(Problem(p.A, p.fixed, *arrays), reset_BT[:, begin:end], state, impl, rule)
            ys.append(y_BTHV)
        np.testing.assert_allclose(np.concatenate(ys, 1), want_BTHV, atol=1e-12)
        assert_close(state, want, 1e-12)


@pytest.mark.long
def test_a_call_may_be_known_to_begin_with_a_chunk():
    with jax.enable_x64(True):
        p, rule = problem(), Rule(window=WINDOW)
        want_BTHV, want = run(p, None, None, "scan", rule)
        part = lambda *at: Problem(p.A, p.fixed, *jax.tree.map(lambda x: x[:, slice(*at)], p[2:]))
        _, state = run(part(2 * CHUNK), None, None, "chunk", rule, aligned=True)
        y_BTHV, last = run(part(2 * CHUNK, T), None, state, "chunk", rule, aligned=True)
        np.testing.assert_allclose(y_BTHV, want_BTHV[:, 2 * CHUNK :], atol=1e-12)
        assert_close(last, want, 1e-12)


@pytest.mark.parametrize(("impl", "at"), [("scan", 4), ("chunk", 0)])
def test_nan_in_the_state_does_not_cross_a_reset(impl, at):
    p, reset_BT = problem(), np.arange(T)[None].repeat(B, 0) == at
    gates = p.gates._replace(alpha_BTH=None, gamma_BTH=None)
    run = partial(memorize, matrix, half_square, {"W": np.zeros((H, V, K))}, chunk=CHUNK, impl=impl)
    _, state = jax.eval_shape(run, p.q_BTHK, p.k_BTHK, p.v_BTHV, gates)
    real = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
    broken = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan if real(leaf) else 0, leaf.dtype), state)
    y_BTHV, last = jax.jit(run)(p.q_BTHK, p.k_BTHK, p.v_BTHV, gates, broken, reset_BT)
    assert not np.isfinite(y_BTHV[:, :at]).any(), "the test itself"
    assert np.isfinite(y_BTHV[:, at:]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_nothing_is_asked_of_tokens_that_are_not_there(impl):
    """A distance has no gradient at 0: neither the window's empty places nor what fills a block up may be there."""
    p = problem()
    distance = lambda y_V, v_V: jnp.sqrt(jnp.sum((y_V - v_V) ** 2))
    A = {"W": np.zeros((H, V, K))}
    run = partial(memorize, matrix, distance, A, rule=Rule(window=WINDOW), chunk=CHUNK, impl=impl)
    y_BTHV, _ = jax.jit(run)(p.q_BTHK, p.k_BTHK, p.v_BTHV, p.gates._replace(alpha_BTH=None, gamma_BTH=None))
    assert np.isfinite(y_BTHV).all()


def test_a_matrix_is_linear_attention_or_the_delta_rule():
    """With the dot product as its objective the first, for any chunk; with half the square, at chunk 1, the second."""
    p = problem()
    q, k, v, theta = (jnp.asarray(x, jnp.float32) for x in (*p[2:5], p.gates.theta_BTH))
    fresh = {"W": np.zeros((H, V, K), np.float32)}
    dot_product = lambda y_V, v_V: -jnp.vdot(y_V, v_V)
    learn = lambda objective, theta, chunk: jax.jit(partial(memorize, matrix, objective, chunk=chunk))(
        fresh, q, k, v, Gates(theta)
    )
    y_BTHV, state = learn(dot_product, jnp.ones((B, T, H)), CHUNK)
    want_BTHV, S_BHKV = jax.jit(partial(ops.linear_attention, impl="scan"))(q, k, v)
    np.testing.assert_allclose(y_BTHV, want_BTHV, atol=1e-4)
    np.testing.assert_allclose(state.A["W"], np.swapaxes(S_BHKV, 2, 3), atol=1e-4)
    y_BTHV, state = learn(half_square, theta, 1)
    want_BTHV, S_BHKV = jax.jit(partial(ops.delta_rule, impl="scan"))(q, k, v, theta)
    np.testing.assert_allclose(y_BTHV, want_BTHV, atol=1e-4)
    np.testing.assert_allclose(state.A["W"], np.swapaxes(S_BHKV, 2, 3), atol=1e-4)


def test_bad_arguments_are_named():
    q, v, gates = np.zeros((B, T, H, K), "float32"), np.zeros((B, T, H, V), "float32"), Gates(np.ones((B, T, H)))
    A = {"W": np.zeros((H, V, K), "float32")}
    by_row = Gates(np.ones((B, T, H)), alpha_BTH=np.ones((B, T, H, V + 1)))
    run = lambda memory=matrix, A=A, gates=gates, **fields: memorize(memory, half_square, A, q, q, v, gates, **fields)
    for match, call in {
        "chunk: expected an integer >= 1, got 0": lambda: run(chunk=0),
        "window: expected an integer >= 1": lambda: run(rule=Rule(window=0)),
        "impl: expected": lambda: run(impl="chunks"),
        "theta_BTH: expected H = 3": lambda: run(gates=Gates(np.ones((B, T, H + 1)))),
        "alpha_BTHR: expected R = 5, the rows of A, got": lambda: run(gates=by_row),
        r"A\['W'\]_HOI: expected H = 3": lambda: run(A={"W": A["W"][:2]}),
        r"memory: expected one use of each matrix of A, \['W'\], got \['W', 'W'\]": lambda: run(
            lambda apply, x_TK, _: apply("W", x_TK) + apply("W", x_TK)
        ),
        r"memory: expected one use of each matrix of A, \['U', 'W'\], got \['W'\]": lambda: run(A=A | {"U": A["W"]}),
        r"memory: expected a matrix of A, one of \['W'\], got 'V'": lambda: run(
            lambda apply, x_TK, _: apply("V", x_TK)
        ),
        "state": lambda: run(state=MemoryState({}, {}, {}, q, v, q, q)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
