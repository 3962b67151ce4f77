"""Facts of the paper of bilinear RNNs, arXiv:2505.21749."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import ops
from memzoo.mixers import bilinear_rnn

FORMS = ("scan", "associative", "chunk")
KINDS = {
    "full": {"hidden": 5},
    "cp": {"hidden": 5, "rank": 4},
    "block": {"hidden": 6, "block_size": 3},
    "rotation": {"hidden": 6},
    "diagonal": {"hidden": 5},
}
D = 4


def make(kind, **fields):
    return memzoo.make("bilinear_rnn", width=D, kind=kind, **(KINDS[kind] | fields))


def weights_of(params):
    return tuple(params["params"][name] for name in ("W", "U", "V") if name in params["params"])


def matrices(kind, weights, x_TD):
    """A_t as one matrix [F, F] each, from the equation."""
    W = weights[0]
    if kind == "cp":
        return [weights[1] @ np.diag(x @ W) @ weights[2].T for x in x_TD]
    if kind == "diagonal":
        return [np.diag(x @ W[:, 0]) for x in x_TD]
    out = []
    for x in x_TD:
        blocks = np.tensordot(x, W, 1)
        if kind == "rotation":
            blocks = [np.array([[a, -b], [b, a]]) / np.hypot(a, b) for a, b in blocks]
        K = len(blocks[0])
        A = np.zeros((len(blocks) * K,) * 2)
        for n, block in enumerate(blocks):
            A[n * K : (n + 1) * K, n * K : (n + 1) * K] = block
        out.append(A)
    return out


@pytest.mark.long
@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_product_of_matrices_divided_by_its_length_at_the_end(kind, impl):
    """The product itself, in float64 and never divided: what divides it on the way changes no direction."""
    mixer = make(kind, impl=impl)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 67, D))
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    reset = np.zeros((2, 67), bool)
    reset[0, [9, 10, 40]] = reset[1, 0] = True
    start = np.asarray(mixer.start(), np.float64).ravel()
    h_BF = np.random.default_rng(0).normal(size=(2, start.size))
    state = bilinear_rnn.State(jnp.asarray(h_BF.reshape(2, *mixer.start().shape), jnp.float32))
    y_BTD, last = jax.jit(mixer.apply)(params, x_BTD, state, jnp.asarray(reset))
    weights = [np.asarray(w, np.float64) for w in weights_of(params)]
    for b in range(2):
        h = h_BF[b]
        for t, A in enumerate(matrices(kind, weights, np.asarray(x_BTD[b], np.float64))):
            h = A @ (start if reset[b, t] else h)
            blocks = h.reshape(mixer.start().shape)
            unit = blocks / np.linalg.norm(blocks, axis=1, keepdims=True)
            want = np.ravel(unit * np.sqrt(unit.shape[1])) @ np.asarray(params["params"]["out"]["kernel"])
            np.testing.assert_allclose(y_BTD[b, t], want, atol=1e-4)
        np.testing.assert_allclose(last.h_BNK[b], unit, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("impl", ("associative", "chunk"))
@pytest.mark.parametrize("kind", KINDS)
def test_forms_agree_in_every_kind(kind, impl):
    """Values, state and gradients, in float64, with resets at the first token, in a row and at the last."""
    T = 67 if impl == "chunk" else 19  # more than one chunk, and for the tree of `associative` what compiles soon
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x_BTD = jnp.asarray(rng.normal(size=(2, T, D)))
        reset = np.zeros((2, T), bool)
        reset[0, [0, 7, 8]] = reset[1, [12, T - 1]] = True
        mixer = make(kind, dtype=jnp.float64, param_dtype=jnp.float64)
        params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
        w = rng.normal(size=(2, T, D)), rng.normal(size=(2, *mixer.start().shape))
        state = bilinear_rnn.State(jnp.asarray(rng.normal(size=w[1].shape)))

        def loss(params, x_BTD, state, impl):
            y_BTD, last = make(kind, dtype=jnp.float64, impl=impl).apply(params, x_BTD, state, jnp.asarray(reset))
            return jnp.sum(y_BTD * w[0]) + jnp.sum(last.h_BNK * w[1]), (y_BTD, last)

        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        got, want = (jax.tree.leaves(run(params, x_BTD, state, form)) for form in (impl, "scan"))
        for g, v in zip(got, want, strict=True):
            np.testing.assert_allclose(g, v, rtol=1e-9, atol=1e-9 * np.abs(v).max())


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("kind", ("full", "block"))
@pytest.mark.cases(2)
def test_simulates_any_finite_state_machine_exactly(kind, impl):
    """With one-hot states and tokens, A of a token is its column of the transition table: here 6 states, 4 tokens."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, 6, (D, 6))
    table[0], table[1] = rng.permutation(6), np.roll(np.arange(6), 1)  # so that not all states merge at once
    W = np.zeros((D, 1, 6, 6), np.float32)
    for token in range(D):
        W[token, 0, table[token], np.arange(6)] = 1
    tokens = rng.choice(D, 1000, p=[0.5, 0.49, 0.005, 0.005])
    state, states = 0, []
    for token in tokens:
        state = table[token][state]
        states.append(state)
    assert len(set(states[-50:])) > 2, "the test itself"
    start_NK = jnp.zeros((1, 6)).at[0, 0].set(1)
    args = jnp.eye(D)[tokens][None], kind, (W,), start_NK[None], start_NK, None, impl
    h_BTNK, _ = jax.jit(bilinear_rnn.bilinear, static_argnums=(1, 6))(*args)
    np.testing.assert_array_equal(h_BTNK[0, :, 0], np.eye(6)[states])


def last_state(kind, weights, x_TD, impl="chunk"):
    start_NK = make(kind).start()
    return bilinear_rnn.bilinear(x_TD[None], kind, weights, start_NK[None], start_NK, None, impl)[1][0]


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.cases(1)
def test_no_block_drowns_another(impl):
    """A block that grows 10 times as fast per token leaves the other as it is alone; with one length for both it would
    be e^-700 of it after 300 tokens, and 0."""
    A_BTNKK = np.random.default_rng(0).normal(size=(1, 300, 2, 3, 3)) * np.array([10.0, 1.0])[:, None, None]
    start_NK = jnp.ones((2, 3))
    both, _ = ops.direction_scan(jnp.float32(A_BTNKK), start_NK, impl=impl)
    alone, _ = ops.direction_scan(jnp.float32(A_BTNKK[:, :, 1:]), start_NK[1:], impl=impl)
    np.testing.assert_allclose(both[:, :, 1:], alone, atol=1e-4)
    np.testing.assert_allclose(jnp.sum(both**2, -1), 1, rtol=1e-5)


@pytest.mark.long
def test_rotations_commute_and_blocks_do_not():
    x_TD = jax.random.normal(jax.random.key(1), (30, D))
    for kind, commutes in (("rotation", True), ("block", False)):
        weights = weights_of(jax.jit(make(kind).init)(jax.random.key(0), x_TD[None]))
        one, two = last_state(kind, weights, x_TD), last_state(kind, weights, x_TD[::-1])
        assert np.allclose(one, two, atol=1e-5) == commutes


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.cases(2)
def test_a_rotation_adds_modulo_m(impl):
    """Token k turns by 2 pi k / m: the angle is the sum of all tokens modulo m, and the length never changes."""
    m, tokens = 7, np.random.default_rng(0).integers(0, 7, 500)
    angle = 2 * np.pi * np.arange(m) / m
    W = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], -1)[:, None], jnp.float32)
    start_NK = jnp.array([[1.0, 0.0]])
    args = jnp.eye(m)[tokens][None], "rotation", (W,), start_NK[None], start_NK, None, impl
    h = np.asarray(bilinear_rnn.bilinear(*args)[0][0, :, 0])
    found = np.round(np.arctan2(h[:, 1], h[:, 0]) * m / (2 * np.pi)).astype(int) % m
    np.testing.assert_array_equal(found, np.cumsum(tokens) % m)
    np.testing.assert_allclose(np.linalg.norm(h, axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("impl", FORMS)
def test_signs_track_parity_and_positive_numbers_cannot(impl):
    """A sign per token flips the state; with positive entries every state stays in the orthant it began in."""
    bits = np.random.default_rng(0).integers(0, 2, 500)
    x_BTD, start_NK = jnp.eye(2)[bits][None], jnp.ones((1, 1))

    def track(W):
        args = x_BTD, "diagonal", (jnp.asarray(W).reshape(2, 1, 1),), start_NK[None], start_NK, None, impl
        return np.ravel(bilinear_rnn.bilinear(*args)[0])

    np.testing.assert_array_equal(track([1.0, -1.0]), np.where(np.cumsum(bits) % 2, -1.0, 1.0))
    np.testing.assert_array_equal(track([0.7, 0.2]), 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cases(3)
def test_nothing_is_added_so_no_tokens_length_matters(kind):
    """Each token times a positive number of its own: no output changes."""
    mixer = make(kind)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 40, D))
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    factor = jnp.exp(3 * jax.random.normal(jax.random.key(2), (2, 40, 1)))
    run = jax.jit(mixer.apply)
    np.testing.assert_allclose(run(params, factor * x_BTD)[0], run(params, x_BTD)[0], atol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "impl"), [("block", "scan"), ("block", "associative")] + [(kind, "chunk") for kind in KINDS]
)
def test_long_products_neither_overflow_nor_vanish(kind, impl):
    """Unscaled, they would be e^+-2000 and more."""
    mixer = make(kind, impl=impl)
    x_BTD = jnp.array([0.01, 30.0])[:, None, None] * jax.random.normal(jax.random.key(1), (2, 4096, D))
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD[:, :1])

    def loss(x_BTD):
        y_BTD, state = mixer.apply(params, x_BTD)
        return jnp.sum(y_BTD**2) + jnp.sum(y_BTD[:, :, 0]), state

    gradient, state = jax.jit(jax.grad(loss, has_aux=True))(x_BTD)
    assert jnp.isfinite(gradient).all()
    np.testing.assert_allclose(jnp.sum(state.h_BNK**2, axis=-1), 1, rtol=1e-5)


def test_initial_transitions():
    """On average A keeps the length of a state; its eigenvalues fill the unit disk ("full", "cp" within twice of it),
    lie on the unit circle, anywhere ("rotation"), or are standard normal ("diagonal")."""
    x_BTD = jax.random.normal(jax.random.key(1), (1, 20, 64))
    A, eigenvalues = {}, {}
    for kind in ("full", "cp", "rotation", "diagonal"):
        mixer = memzoo.make("bilinear_rnn", width=64, kind=kind)
        weights = weights_of(jax.jit(mixer.init)(jax.random.key(0), x_BTD[:, :1]))
        A[kind] = np.asarray(bilinear_rnn.transitions(x_BTD[0], kind, weights))
        eigenvalues[kind] = A[kind] if kind == "diagonal" else np.linalg.eigvals(A[kind])
    h_TNK = np.random.default_rng(0).normal(size=(20, 1, 64))
    for kind in ("full", "cp"):
        gain = np.linalg.norm(np.einsum("tnij,tnj->tni", A[kind], h_TNK), axis=-1) / np.linalg.norm(h_TNK, axis=-1)
        assert abs(np.sqrt(np.mean(gain**2)) - 1) < 0.1
    assert 0.9 < np.abs(eigenvalues["full"]).max() < 1.3 and np.abs(eigenvalues["cp"]).max() < 2
    np.testing.assert_allclose(np.abs(eigenvalues["rotation"]), 1, rtol=1e-5)
    a, b = A["rotation"][..., 0, 0], A["rotation"][..., 1, 0]
    angle = np.sort(np.arctan2(b, a).ravel()) / (2 * np.pi) + 0.5
    assert np.abs(angle - np.arange(angle.size) / angle.size).max() < 0.06
    signs = eigenvalues["diagonal"].ravel()
    assert abs(np.mean(signs < 0) - 0.5) < 0.05 and abs(np.std(signs) - 1) < 0.1


@pytest.mark.parametrize(
    ("kind", "impl"), [("rotation", "scan"), ("rotation", "associative"), ("rotation", "chunk"), ("block", "chunk")]
)
@pytest.mark.cases(1)
def test_a_state_that_a_token_maps_to_zero_stays_there_until_the_next_reset(kind, impl):
    x_BTD = jax.random.normal(jax.random.key(1), (1, 9, D)).at[:, 3].set(0)
    reset = jnp.arange(9)[None] == 6
    mixer = make(kind, impl=impl)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)

    def loss(x_BTD):
        y_BTD, _ = mixer.apply(params, x_BTD, None, reset)
        return jnp.sum(y_BTD), y_BTD

    gradient, y_BTD = jax.jit(jax.grad(loss, has_aux=True))(x_BTD)
    np.testing.assert_array_equal(y_BTD[:, 3:6], 0)
    assert jnp.isfinite(y_BTD).all() and jnp.abs(y_BTD[:, 6:]).max() > 0.1
    assert jnp.isfinite(gradient).all()


def test_bad_fields_are_named():
    refused = {
        r"kind: unknown kind 'rotations'; did you mean rotation": {"kind": "rotations"},
        r"hidden: expected a positive multiple of block_size = 2, got 7": {"kind": "rotation", "hidden": 7},
        r"hidden: expected a positive multiple of block_size = 5, got 4": {"kind": "block", "block_size": 5},
        r"block_size: expected an integer >= 1, got 0": {"kind": "block", "block_size": 0},
        r"block_size: expected None for kind 'full', got 3": {"kind": "full", "block_size": 3},
        r"rank: expected None for kind 'block', got 3": {"rank": 3},
        r"rank: expected an integer >= 1, got 0": {"kind": "cp", "rank": 0},
    }
    for message, fields in refused.items():
        with pytest.raises(ValueError, match=message):
            memzoo.make("bilinear_rnn", width=D, **fields)
    assert memzoo.make("bilinear_rnn", width=12).sizes()[:2] == (3, 4)


def test_the_op_names_bad_arguments():
    A = np.ones((2, 7, 3, 4, 4), np.float32)
    with pytest.raises(ValueError, match=r"start_NK: expected K = 4 as in A_BTNKK, got shape \[3, 5\]"):
        ops.direction_scan(A, np.ones((3, 5)))
    with pytest.raises(ValueError, match=r"start_NK: expected N = 7 as in A_BTNK, got shape \[3, 4\]"):
        ops.direction_scan(np.ones((2, 9, 7, 4)), np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"A_BTNKK: expected K = 4 as in A_BTNKK"):
        ops.direction_scan(A[..., :3], np.ones((3, 4)))
    with pytest.raises(NotImplementedError, match="direction_scan has no form 'newton'"):
        ops.direction_scan(A, np.ones((3, 4)), impl="newton")


@pytest.mark.parametrize("impl", ("associative", "chunk"))
@pytest.mark.cases(1)
def test_no_form_is_further_from_float64_than_the_definition(impl):
    """Over 16,384 random transitions, where now and then one all but annihilates the state, or a product of many does:
    what is left is mostly rounding, and none of it may stay."""
    A_BTNKK = np.random.default_rng(2).standard_normal((1, 16_384, 3, 5, 5))
    start_NK = np.eye(1, 5).repeat(3, 0)
    run = jax.jit(ops.direction_scan, static_argnames="impl")
    with jax.enable_x64(True):
        want_BTNK = np.asarray(run(A_BTNKK, start_NK, impl="scan")[0])
    error = {}
    for form in ("scan", impl):
        got_BTNK = np.asarray(run(np.float32(A_BTNKK), np.float32(start_NK), impl=form)[0])
        error[form] = np.sqrt(np.mean((got_BTNK - want_BTNK) ** 2))
    assert error["scan"] < 1e-5 and error[impl] < 5 * error["scan"]
