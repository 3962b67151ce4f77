"""Facts of Hydra, arXiv:2508.15099, and of product keys, arXiv:1907.05242: each part by itself, and all of them off."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.models import hydra
from memzoo.models.backbone import describe
from memzoo.models.hydra import Hydra

B, T, D, Z, L = 2, 13, 12, 11, 2
C, E, J, F, M, R, N, K, V = 5, 3, 2, 8, 6, 4, 9, 2, 7
FIELDS = {"mamba2": {"head_dim": 8, "state_size": 3, "impl": "scan"}, "attention": {"heads": 3, "head_dim": 4}}
SIZES = {"chunk": C, "experts": E, "top_k": J, "hidden": F, "slots": M, "rank": R}
PKM = {"sub_keys": N, "key_dim": K, "value_dim": V, "pkm_top_k": 3}
OFF = {"attention_every": None, "experts_every": None, "workspace": False, "pkm": False}
ALONE = {"parent": None, "dtype": jnp.float32, "param_dtype": jnp.float32}


def small(**fields):
    return Hydra(
        **{"vocab": Z, "width": D, "layers": L, "fields": FIELDS, **SIZES, **PKM, "attention_every": 2, **fields}
    )


def away_from_neutral(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: np.float32(p + 0.2 * rng.standard_normal(p.shape)), params)


@pytest.fixture(scope="module")
def params():
    return away_from_neutral(jax.jit(small().init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"])


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, Z, (B, T)).astype(np.int32)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(2).standard_normal((B, T, D)).astype(np.float32)


def norm(x, p):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def ssm_stack(p, tokens, parts=lambda l, x, u: 0, memories=lambda l, x: x):
    """x + SSM(norm(x)) in each layer, and what else there is."""
    ssm = memzoo.make("mamba2", width=D, parent=None, **FIELDS["mamba2"])
    x = p["embedding"][tokens]
    for l in range(L):
        layer = p[f"layer_{l}"]
        u = norm(x, layer["norm"])
        x = memories(l, x + ssm.apply({"params": layer["ssm"]}, u)[0] + parts(l, x, u))
    return norm(x, p["norm"]) @ p["embedding"].T


@pytest.mark.long
def test_with_all_parts_off_it_is_its_ssm_stack(params, tokens):
    plain = small(**OFF)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), tokens)["params"]
    assert set(shapes) == {"embedding", "norm", "layer_0", "layer_1"}
    assert set(shapes["layer_0"]) == set(shapes["layer_1"]) == {"norm", "ssm"}
    own = {name: params[name] for name in shapes}
    own |= {f"layer_{l}": {name: params[f"layer_{l}"][name] for name in ("norm", "ssm")} for l in range(L)}
    got, state = jax.jit(plain.apply)({"params": own}, tokens)
    want = jax.jit(ssm_stack)(own, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    ssm = memzoo.make("mamba2", width=D, **FIELDS["mamba2"])
    shape = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shape(state) == tuple((shape(ssm.initial_state(B)), (), (), ()) for _ in range(L))


@pytest.mark.long
def test_is_the_sum_of_its_parts(params, tokens):
    """Attention in the layers 1, 3, ... here, experts in 0, 2, ..., then the memories, which all layers share."""
    attention = memzoo.make("attention", width=D, window=256, parent=None, **FIELDS["attention"])
    experts = hydra.Experts(E, J, F, C, "scan", **ALONE)
    notes, facts = hydra.Workspace(M, R, C, "scan", **ALONE), hydra.ProductKeys(N, K, V, 3, **ALONE)
    fresh = small().initial_state(B)[0]

    def by_parts(p):
        def parts(l, x, u):
            own = p[f"layer_{l}"]
            if l == 1:
                return own["attention_scale"] * attention.apply({"params": own["attention"]}, u)[0]
            return own["experts_scale"] * experts.apply({"params": own["experts"]}, u, fresh.choice, None)[0]

        def memories(l, x):
            x = x + notes.apply({"params": p["notes"]}, norm(x, p["notes_norm"]), fresh.slots, None)[0]
            return x + facts.apply({"params": p["facts"]}, norm(x, p["facts_norm"]))

        return ssm_stack(p, tokens, parts, memories)

    want = jax.jit(by_parts)(params)
    got = jax.jit(small().apply)({"params": params}, tokens)[0]
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_parameters_and_state_are_those_of_the_parts_that_are_on():
    """The analytic formula, part by part."""
    size = lambda **on: describe(small(**OFF | on)).parameters
    per_layer = sum(
        p.size
        for p in jax.tree.leaves(
            jax.eval_shape(
                memzoo.make("mamba2", width=D, **FIELDS["mamba2"]).init, jax.random.key(0), jnp.zeros((1, 1, D))
            )
        )
    )
    plain = Z * D + D + L * (D + per_layer)
    attention, experts = 4 * D * D + 1, D * E + E * 3 * D * F + 1
    workspace = D + 2 * M * R + 3 * D * R + 2 * D + R * D
    pkm = D + 2 * D * K + 2 * N * K + N * N * V + V * D + D + 1
    assert size() == plain
    assert size(attention_every=2) == plain + attention and size(attention_every=1) == plain + 2 * attention
    assert size(experts_every=2) == plain + experts and size(experts_every=1) == plain + 2 * experts
    assert size(workspace=True) == plain + workspace and size(pkm=True) == plain + pkm
    assert size(tied=False) == plain + Z * D
    assert describe(small()).parameters == plain + attention + experts + workspace + pkm
    states = small(layers=4, attention_every=4).initial_state(1)
    assert [state.attention != () for state in states] == [False, False, False, True]
    assert [state.choice != () for state in states] == [True, False, True, False]


def test_product_keys_find_the_nearest_of_all_keys(x):
    """Brute force over all N^2 keys: a score is q . (key, other key), both halves in one."""
    model = hydra.ProductKeys(N, K, V, 3, **ALONE)
    p = away_from_neutral(jax.jit(model.init)(jax.random.key(0), x)["params"])
    got = jax.jit(model.apply)({"params": p}, x)
    p = jax.tree.map(np.float64, p)
    q = np.einsum("btd,dhk->bthk", x, p["query"]["kernel"]).reshape(B, T, 2 * K)
    pairs = [np.concatenate([p["keys"][0, i], p["keys"][1, j]]) for i in range(N) for j in range(N)]
    scores = q @ np.array(pairs).T
    top = np.argsort(-scores, -1)[..., :3]
    weights = softmax(np.take_along_axis(scores, top, -1))
    v = np.einsum("btj,btjv->btv", weights, p["values"][top])
    gate = sigmoid(x @ p["gate"]["kernel"] + p["gate"]["bias"])
    np.testing.assert_allclose(got, gate * (v @ p["out"]["kernel"]), atol=1e-5)


def test_nearest_is_top_k_of_all_sums():
    rng = np.random.default_rng(0)
    score, other = rng.standard_normal((2, 1, 50, 20)).astype(np.float32)
    best, which = jax.jit(hydra.nearest, static_argnums=2)(score, other, 6)
    sums = (score[..., :, None] + other[..., None, :]).reshape(1, 50, 400)
    np.testing.assert_array_equal(which, np.argsort(-sums, -1)[..., :6])
    np.testing.assert_array_equal(best, np.take_along_axis(sums, np.asarray(which), -1))


@pytest.mark.parametrize("impl", ["scan", "chunk"])
def test_a_chunks_first_token_chooses_for_all_of_it(x, impl):
    model = hydra.Experts(E, J, F, C, impl, **ALONE)
    state = small().initial_state(B)[0].choice
    p = away_from_neutral(jax.jit(model.init)(jax.random.key(0), x, state, None)["params"])
    reset = np.zeros((B, T), bool)
    reset[1, 7] = True
    got, after = jax.jit(model.apply)({"params": p}, x, state, reset)
    p = jax.tree.map(np.float64, p)
    chosen = set()
    for row, begins in enumerate(([0, 5, 10], [0, 5, 7, 12])):
        for t in range(T):
            first = max(begin for begin in begins if begin <= t)
            logits = x[row, first] @ p["router"]["kernel"]
            top = np.argsort(-logits)[:J]
            chosen.add(tuple(top))
            want = 0
            for e, weight in zip(top, softmax(logits[top]), strict=True):
                gate, up = np.split(x[row, t] @ p["gate_up"][e], 2)
                want = want + weight * (gate * sigmoid(gate) * up) @ p["out"][e]
            np.testing.assert_allclose(got[row, t], want, atol=2e-5)
    assert len(chosen) > 1, "the test itself"
    np.testing.assert_array_equal(after.count_B, [3, 1])


def test_load_balance_is_top_k_where_all_are_alike():
    even = np.array([[[0, 1], [2, 3]]])
    np.testing.assert_allclose(hydra.load_balance(jnp.zeros((1, 2, 4)), even), 2)
    one = jnp.array([[[9.0, -9, -9, -9]] * 2])
    np.testing.assert_allclose(hydra.load_balance(one, np.array([[[0], [0]]])), 4, rtol=1e-3)


def test_load_balance_is_sown(params, tokens):
    run = jax.jit(lambda p: small().apply({"params": p}, tokens, mutable=["losses"])[1])
    (value,) = jax.tree.leaves(run(params))
    assert 0 < value < 0.01 * E


@pytest.mark.parametrize(("impl", "cuts"), [("scan", (0, 23)), ("chunk", (0, 23)), ("chunk", (*range(0, 23, 3), 23))])
def test_the_workspace_is_its_equations(impl, cuts):
    """Token by token, in NumPy: written by whole chunks, read from the next one on, anew after a reset.

    In one call, and in calls of less than a chunk.
    """
    rng = np.random.default_rng(3)
    T = 23
    q, x = rng.standard_normal((1, T, R)), rng.standard_normal((1, T, 2 * R + 2))
    keys, values = rng.standard_normal((2, M, R))
    reset = np.zeros((1, T), bool)
    reset[0, [12, 14]] = True
    slots = hydra.Slots(*(0.5 * rng.standard_normal((2, 1, M, R))), rng.standard_normal((1, 2 * R + 2)), np.array([3]))
    f = jax.jit(hydra.workspace, static_argnums=(6, 7))
    single = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.int32 if a.dtype == int else np.float32), tree)
    ys, after = [], single(slots)
    for i, j in itertools.pairwise(cuts):
        y, after = f(*single((q[:, i:j], x[:, i:j], keys, values)), after, reset[:, i:j], C, impl)
        ys.append(y)
    got = np.concatenate(ys, axis=1)
    key, value = keys + slots.key_BMR[0], values + slots.value_BMR[0]
    total, count = slots.sum_BG[0], 3
    for t in range(T):
        if reset[0, t]:
            key, value, total, count = keys, values, 0 * total, 0
        if count == C:
            k, v, control = np.split(total / C, [R, 2 * R])
            g = (softmax(control)[1] * softmax(key @ k / np.sqrt(R)))[:, None]
            key, value, total, count = key + g * (k - key), value + g * (v - value), 0 * total, 0
        want = softmax(key @ q[0, t] / np.sqrt(R)) @ value
        np.testing.assert_allclose(got[0, t], want, atol=1e-5)
        total, count = total + x[0, t], count + 1
    np.testing.assert_allclose(after.key_BMR[0] + keys, key, atol=1e-5)
    np.testing.assert_allclose(after.value_BMR[0] + values, value, atol=1e-5)
    np.testing.assert_allclose(after.sum_BG[0], total, atol=1e-5)
    assert after.count_B == count


def test_making_a_model_makes_no_arrays(monkeypatch):
    """Only shapes of its state."""
    zeros, made = jnp.zeros, []
    monkeypatch.setattr(jnp, "zeros", lambda *args, **fields: made.append(zeros(*args, **fields)) or made[-1])
    small()
    assert made and all(isinstance(array, jax.core.Tracer) for array in made)


def test_without_a_state_attention_has_no_cache_to_read(tokens):
    """4 numbers of each of 2 x 200 slots, times 2, for scores and values of 13 tokens, 3 heads and 2 rows."""
    fields = {**FIELDS, "attention": {**FIELDS["attention"], "window": 200, "impl": "chunk"}}
    model = small(**OFF | {"attention_every": 2}, fields=fields)
    params, state = jax.eval_shape(lambda: (model.init(jax.random.key(0), tokens), model.initial_state(B)))
    flops = [jax.jit(model.apply).lower(params, tokens, s).cost_analysis()["flops"] for s in (None, state)]
    assert flops[1] - flops[0] > 2 * 4 * 2 * 200 * T * 3 * B


@pytest.mark.long
def test_parts_begin_as_the_prototypes_do():
    """The branches' scales, and a gate that seldom opens, 0.12; keys of deviation 0.02, values of 0.01."""
    p = jax.jit(small(sub_keys=40, key_dim=64).init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    assert p["layer_1"]["attention_scale"] == np.float32(0.15) and p["layer_0"]["experts_scale"] == 0.5
    np.testing.assert_allclose(sigmoid(p["facts"]["gate"]["bias"]), 0.119, atol=1e-3)
    np.testing.assert_allclose(np.std(p["facts"]["keys"]), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.std(p["facts"]["values"]), 0.01, rtol=0.05)
    for name, fan_in in (("gate_up", D), ("out", F)):
        np.testing.assert_allclose(np.std(p["layer_0"]["experts"][name]), fan_in**-0.5, rtol=0.15)


@pytest.mark.long
def test_remat_changes_nothing(params, tokens):
    some = {"attention_every": None, "workspace": False, "pkm": False, "layers": 1}
    own = {name: params[name] for name in ("embedding", "norm", "layer_0")}

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, tokens)[0]))))(own)

    want = gradient(small(**some))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient(small(**some, remat=True)), want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 4}, "top_k: expected at most experts = 3, got 4"),
        ({"pkm_top_k": 10}, "pkm_top_k: expected at most sub_keys = 9, got 10"),
        ({"attention_every": 0}, "attention_every: expected an integer >= 1, got 0"),
        ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
        ({"rank": 0}, "rank: expected an integer >= 1, got 0"),
        ({"layers": 0}, "layers: expected an integer >= 1, got 0"),
        ({"fields": {"mamba": {}}}, "fields: 'mamba' is no mixer of it; did you mean mamba2"),
        ({"fields": {"mamba2": {"heads": 1}}}, "heads: mamba2 has no such field"),
        ({"impl": "associative"}, "impl: hydra has no form 'associative'; it has scan, chunk"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        small(**fields)
