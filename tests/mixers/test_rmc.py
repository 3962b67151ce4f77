"""Facts of the relational memory core, arXiv:1806.01822.

Dims: B batch, T time, D width, N slots, H heads, K key, V value, E = H V.
"""

import jax
import numpy as np
import pytest

import memzoo
from memzoo.mixers import rmc

B, T, D, N, H, K, V = 2, 6, 7, 4, 3, 5, 2
E = H * V
SIZES = {"width": D, "slots": N, "heads": H, "key_dim": K, "value_dim": V}
rng = np.random.default_rng(0)
x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)


@pytest.fixture(scope="module")
def layer():
    mixer = memzoo.make("rmc", **SIZES, blocks=2)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"]
    params = jax.tree.map(lambda p: np.float32(p + 0.2 * rng.normal(size=p.shape)), params)
    return params, jax.jit(mixer.apply)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, p):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p[0] + p[1]


def attended(rows, p, r):
    """One row at a time, one head at a time, one pair at a time."""
    parts = [norm(row @ p[f"qkv_{r}"] + p[f"qkv_bias_{r}"], p[f"qkv_norm_{r}"]) for row in rows]
    qkv = [[part[h * (2 * K + V) :][: 2 * K + V] for h in range(H)] for part in parts]
    new = []
    for row, of_row in zip(rows, qkv, strict=True):
        read = []
        for h in range(H):
            like = np.array([of_row[h][:K] @ other[h][K : 2 * K] / np.sqrt(K) for other in qkv])
            share = np.exp(like) / np.exp(like).sum()
            read.append(sum(s * other[h][2 * K :] for s, other in zip(share, qkv, strict=True)))
        row = norm(row + np.concatenate(read), p[f"attended_norm_{r}"])
        hidden = np.maximum(row @ p[f"W_1_{r}"] + p[f"b_1_{r}"], 0)
        new.append(norm(row + hidden @ p[f"W_2_{r}"] + p[f"b_2_{r}"], p[f"out_norm_{r}"]))
    return new


def by_the_equation(params, M, x, gates):
    p = jax.tree.map(np.float64, params)
    y = []
    for token in x:
        e = token @ p["in"]["kernel"] + p["in"]["bias"]
        rows = attended(attended([*M, e], p, 0), p, 1)
        g = sigmoid(e @ p["gates_in"] + np.tanh(M) @ p["gates_memory"] + p["gates_bias"])
        i, f = g[:, :gates], g[:, gates:]
        M = f * M + i * np.tanh(rows[:N])
        y.append(np.einsum("ne,ned->d", M, p["out"]["kernel"]))
    return np.stack(y), M


def test_is_the_equation_from_unit_vectors_on(layer):
    params, run = layer
    y_BTD, state = run({"params": params}, x_BTD)
    for b in range(B):
        y, M = by_the_equation(params, np.eye(N, E), np.float64(x_BTD[b]), E)
        np.testing.assert_allclose(y_BTD[b], y, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(state.M_BNE[b], M, rtol=1e-3, atol=1e-4)


def test_slots_are_alike(layer):
    """Slots that change places do so for good, and outputs of a readout that sums them do not see it."""
    params, run = layer
    params = params | {"out": {"kernel": np.broadcast_to(params["out"]["kernel"][:1], (N, E, D))}}
    M_BNE = rng.normal(size=(B, N, E)).astype(np.float32)
    order = [2, 0, 3, 1]
    y_BTD, state = run({"params": params}, x_BTD, rmc.State(M_BNE))
    other_BTD, other = run({"params": params}, x_BTD, rmc.State(M_BNE[:, order]))
    np.testing.assert_allclose(other.M_BNE, state.M_BNE[:, order], atol=1e-5)
    np.testing.assert_allclose(other_BTD, y_BTD, atol=1e-4)
    assert np.abs(state.M_BNE[:, order] - state.M_BNE).max() > 0.1


def test_memory_is_kept_where_nothing_is_let_in(layer):
    """Forget gates 1, input gates 0: to the bit; and the other way round the memory is bounded by 1."""
    params, run = layer
    M_BNE = (3 * rng.normal(size=(B, N, E))).astype(np.float32)
    kept = params | {"gates_bias": np.repeat(np.float32([-200, 200]), E)}
    np.testing.assert_array_equal(run({"params": kept}, x_BTD, rmc.State(M_BNE))[1].M_BNE, M_BNE)
    new = params | {"gates_bias": np.repeat(np.float32([200, -200]), E)}
    _, once = run({"params": new}, x_BTD, rmc.State(M_BNE))
    assert np.abs(once.M_BNE).max() <= 1 < np.abs(M_BNE).max()


@pytest.mark.long
def test_gates_per_slot():
    """One of each for a slot: what is kept of it and what is let in have one size throughout."""
    mixer = memzoo.make("rmc", **SIZES, blocks=2, gates="memory")
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"]
    params = jax.tree.map(lambda p: np.float32(p + 0.2 * rng.normal(size=p.shape)), params)
    assert params["gates_memory"].shape == (E, 2)
    y_BTD, _ = jax.jit(mixer.apply)({"params": params}, x_BTD)
    y, _ = by_the_equation(params, np.eye(N, E), np.float64(x_BTD[1]), 1)
    np.testing.assert_allclose(y_BTD[1], y, rtol=1e-3, atol=1e-4)


def test_initial_state_and_parameters():
    """Unit vectors; gates that keep sigmoid(1) and let in 1/2; weights of deviation 0.88 / sqrt(inputs), cut at 2."""
    np.testing.assert_array_equal(memzoo.make("rmc", **SIZES).initial_state(B).M_BNE, np.eye(N, E)[None].repeat(B, 0))
    assert memzoo.make("rmc", width=D, slots=3, heads=1, value_dim=2).initial_state(1).M_BNE.shape == (1, 3, 2)
    mixer = memzoo.make("rmc", width=40, slots=2, heads=4)
    params = jax.tree.map(
        np.asarray, jax.jit(mixer.init)(jax.random.key(0), np.zeros((1, 1, 40), np.float32))["params"]
    )
    np.testing.assert_array_equal(params["gates_bias"], np.repeat([0, 1], 40))
    np.testing.assert_array_equal(params["qkv_norm_0"], np.repeat([[1], [0]], 120, axis=1))
    for name in ("qkv_0", "W_1_0", "W_2_0", "gates_in", "gates_memory"):
        w = params[name] * 40**0.5
        assert np.abs(w).max() <= 2.001 and abs(w.std() - 0.88) < 0.04, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3, "value_dim": None}, "width: expected a positive multiple of heads = 3, got 7"),
        ({"slots": 0}, "slots: expected an integer >= 1, got 0"),
        ({"key_dim": 0}, "key_dim: expected an integer >= 1, got 0"),
        ({"gates": "units"}, "gates: unknown kind 'units'; did you mean unit"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        memzoo.make("rmc", **SIZES | fields).initial_state(B)
