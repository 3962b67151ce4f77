"""Facts of the xLSTM paper, arXiv:2405.04517, that concern sLSTM.

Dims: B batch, T time, D width, H heads, K units of a head, E = 4 K gates in the order i, f, z, o.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import ops
from memzoo.mixers import slstm

B, T, D, H, K = 2, 30, 6, 2, 3
FORMS = ("scan", "newton")
scalar_lstm = jax.jit(slstm.scalar_lstm, static_argnums=(4, 5))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unstabilised(a, R, h, c, n, log_forget):
    """The paper's equations with gates f and exp(i) as they stand, token by token, in float64."""
    hs = []
    for t in range(a.shape[1]):
        i, f, z, o = np.split(a[:, t] + np.einsum("bhk,hke->bhe", h, R), 4, axis=-1)
        f, write = np.exp(log_forget(f)), np.exp(i)
        c, n = f * c + write * np.tanh(z), f * n + write
        h = sigmoid(o) * c / n
        hs.append(h)
    return np.stack(hs, 1), c, n


def inputs(size=2.0):
    rng = np.random.default_rng(0)
    a, R = rng.normal(scale=size, size=(B, T, H, 4 * K)), rng.normal(size=(H, K, 4 * K))
    h, c, m = rng.normal(size=(3, B, H, K))
    return a, R, (h, c, rng.uniform(1, 5, (B, H, K)), m)


def in_float32(tree):
    return jax.tree.map(np.float32, tree)


@pytest.mark.parametrize(("impl", "forget_gate"), [("scan", "sigmoid"), ("scan", "exp"), ("newton", "sigmoid")])
@pytest.mark.cases(1)
def test_is_the_unstabilised_recurrence(impl, forget_gate):
    log_forget = {"sigmoid": lambda f: np.log(sigmoid(f)), "exp": lambda f: f}[forget_gate]
    a, R, (h, c, n, m) = inputs()
    want, c_last, n_last = unstabilised(a, R, h, c * np.exp(m), n * np.exp(m), log_forget)
    h_BTHK, last = scalar_lstm(*in_float32((a, R, (h, c, n, m))), None, forget_gate, impl)
    np.testing.assert_allclose(h_BTHK, want, rtol=1e-4, atol=1e-5)
    scale = np.exp(np.float64(last[3]))
    np.testing.assert_allclose(last[1] * scale, c_last, rtol=1e-4, atol=1e-5 * np.abs(c_last).max())
    np.testing.assert_allclose(last[2] * scale, n_last, rtol=1e-4)


def test_the_stabiliser_changes_nothing():
    """The same cell, written with another m: exp(-s) c, exp(-s) n and m + s."""
    a, R, (h, c, n, m) = in_float32(inputs())
    want, _ = scalar_lstm(a, R, (h, c, n, m), None, "sigmoid", "scan")
    for s in np.float32([-5, 7]):
        got, _ = scalar_lstm(a, R, (h, np.exp(-s) * c, np.exp(-s) * n, m + s), None, "sigmoid", "scan")
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_first_token_is_all_that_a_fresh_unit_holds():
    """However little its input gate lets in, h_1 = sigmoid(o) tanh(z), c_1 = tanh(z), n_1 = 1, m_1 = i."""
    a, R, _ = in_float32(inputs())
    a[:, 0, :, :K] -= 1e4
    fresh = np.zeros((4, B, H, K), np.float32)
    for impl in FORMS:
        h_BTHK, (_, c, n, m) = scalar_lstm(a[:, :1], R, tuple(fresh), None, "sigmoid", impl)
        i, _, z, o = np.split(a[:, 0], 4, axis=-1)
        np.testing.assert_allclose(h_BTHK[:, 0], sigmoid(o) * np.tanh(z), rtol=1e-5)
        np.testing.assert_allclose((c, n, m), (np.tanh(z), np.ones_like(z), i), rtol=1e-5)


def test_wild_gates_stay_finite_and_the_normaliser_at_work():
    """Gates of exp(+-300), which do not fit into float32: n >= 1 and |c| <= n, so |h| <= 1; gradients finite."""
    a, R, _ = in_float32(inputs(size=100.0))
    fresh = tuple(np.zeros((4, B, H, K), np.float32))

    def loss(a, R, fresh):
        h_BTHK, cell = slstm.scalar_lstm(a, R, fresh, None, "sigmoid", "scan")
        return jnp.sum(jnp.sin(h_BTHK)) + jnp.sum(cell[3]), (h_BTHK, cell)

    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    for shift in (0, 1000, -1000):
        moved = a + np.float32(shift) * (np.arange(4 * K) < K)
        found, (h_BTHK, (_, c, n, _)) = run(moved, R, fresh)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, h_BTHK)))
        assert np.all(n >= 1) and np.all(np.abs(c) <= n) and np.all(np.abs(h_BTHK) <= 1)


def test_one_unit_that_sees_itself_counts_parity():
    """What mixing memories is for: a one turns h round, a zero leaves it; no gate that sees the token alone can."""
    bits = np.random.default_rng(1).integers(0, 2, 500)
    strong, R = 30.0, np.float32([[[0, 0, -20, 0]]])
    first = np.arange(500) == 0  # sets the sign, which the others turn
    i = np.where(bits | first, strong, -strong)
    z = np.where(first, np.where(bits, -5, 5), 0)
    a = np.stack([i, -i, z, np.full(500, strong)], -1)[None, :, None].astype(np.float32)
    h_BTHK, _ = scalar_lstm(a, R, tuple(np.zeros((4, 1, 1, 1), np.float32)), None, "sigmoid", "scan")
    want = (-1.0) ** np.cumsum(bits)
    np.testing.assert_allclose(h_BTHK[0, :, 0, 0], want, atol=1e-3)


@pytest.mark.long
def test_newton_needs_few_iterations():
    """Where units see one another strongly and still forget: tens for 1,024 tokens."""
    rng = np.random.default_rng(3)
    a_TE, R_KE = rng.normal(size=(1024, 4 * K)), rng.normal(size=(K, 4 * K))
    a_TE[:, K : 2 * K] += [5, 2, -4]

    def token(s_X, a_E):
        return jnp.concatenate(slstm.smooth_step(*jnp.split(s_X, 3), a_E, R_KE.astype(np.float32)))

    run = jax.jit(lambda s_BX, a_BTE: ops.newton_scan(token, s_BX, a_BTE)[::2])
    s_BTX, iterations = run(np.zeros((1, 3 * K), np.float32), a_TE[None].astype(np.float32))
    assert np.isfinite(s_BTX).all() and iterations < 60


@pytest.fixture(scope="module")
def layer():
    mixer = memzoo.make("slstm", width=D, heads=H)
    rng = np.random.default_rng(2)
    x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD[:, :1])
    params = jax.tree.map(lambda p: np.float32(p + 0.5 * rng.normal(size=p.shape)), params)
    return params, x_BTD, jax.jit(mixer.apply)


def test_is_the_layer_of_the_paper(layer):
    params, x_BTD, run = layer
    p, x = jax.tree.map(np.float64, params["params"]), np.float64(x_BTD)
    conv = p["conv_bias"] + sum(p["conv"][3 - s] * np.pad(x, ((0, 0), (s, 0), (0, 0)))[:, :T] for s in range(4))
    seen = conv * sigmoid(conv)
    heads = [np.stack(np.split(u, H, axis=-1), 2) for u in (seen, seen, x, x)]
    a = np.concatenate([np.einsum("bthj,hjk->bthk", u, W) for u, W in zip(heads, p["in"], strict=True)], -1)
    a = a + p["bias"].swapaxes(0, 1).reshape(H, 4 * K)
    h, _, _ = unstabilised(a, p["recurrent"], *np.zeros((3, B, H, K)), lambda f: np.log(sigmoid(f)))
    y = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
    np.testing.assert_allclose(run(params, x_BTD)[0], y.reshape(B, T, D), rtol=1e-3, atol=1e-4)


def test_heads_do_not_meet(layer):
    params, x_BTD, run = layer
    other = x_BTD + np.float32(np.arange(D) < K)
    (y, _), (y_other, _) = run(params, x_BTD), run(params, other)
    np.testing.assert_array_equal(y[..., K:], y_other[..., K:])
    assert np.all(np.abs(y - y_other)[:, -1, :K] > 1e-3)


def test_initial_parameters():
    """R = 0; forget biases 5 - 12 (k / (K - 1))^p, p from 0.3 in the first layer to 1.6 in the last; W normal."""
    for depth, power in ((0.0, 0.3), (1.0, 1.6)):
        mixer = memzoo.make("slstm", width=120, heads=3, depth=depth)
        params = jax.jit(mixer.init)(jax.random.key(0), np.zeros((1, 1, 120), np.float32))["params"]
        params = jax.tree.map(np.float64, params)
        want = 5 - 12 * np.linspace(0, 1, 40) ** power
        np.testing.assert_allclose(params["bias"][1], np.tile(want, (3, 1)), rtol=1e-5, atol=1e-5)
        remembering = np.mean(sigmoid(params["bias"][1]) > 0.5)  # of the units
        assert remembering == {0.0: 3 / 40, 1.0: 23 / 40}[depth]
    assert not np.any(params["bias"][[0, 2, 3]]) and not np.any(params["recurrent"])
    w = params["in"] / np.sqrt(2 / (5 * 120))
    assert abs(w.std() - 1) < 0.02 and abs(np.mean(np.abs(w) < 0.6745) - 0.5) < 0.02
    assert np.all(np.abs(params["conv"]) <= 0.5) and abs(np.std(params["conv"]) - 12**-0.5) < 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 5}, "width: expected a positive multiple of heads = 5, got 6"),
        ({"conv_width": -1}, "conv_width: expected an integer >= 0, got -1"),
        ({"forget_gate": "sigmod"}, "forget_gate: unknown gate 'sigmod'; did you mean sigmoid"),
        ({"depth": 1.5}, "depth: expected a number from 0 to 1, got 1.5"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        memzoo.make("slstm", **{"width": D, "heads": H} | fields).initial_state(B)
