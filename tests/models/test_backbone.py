"""The language model: its stack against the equation, its state, and what scanning and remat must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.models.backbone import LanguageModel, describe

B, T, D, Z = 3, 9, 12, 11
# scan is the form that compiles fastest
SMALL = {"gated_deltanet": {"heads": 2, "key_dim": 3, "value_dim": 4, "impl": "scan"}}


def small(**fields):
    return LanguageModel(**{"vocab": Z, "width": D, "layers": 2, "fields": SMALL, **fields})


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def params(model):
    """Every parameter away from its initial value, so that none of them is neutral."""
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [p + 0.2 * random.normal(size=p.shape).astype(p.dtype) for p in leaves])


@pytest.fixture(scope="module")
def tokens_BT():
    return jax.random.randint(jax.random.key(2), (B, T), 0, Z)


@pytest.fixture(scope="module")
def apply(model):
    return jax.jit(model.apply)


def close(got, want, rms=1e-5):
    def check(g, w):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert g.shape == w.shape and np.sqrt(np.mean((g - w) ** 2)) <= rms * (np.sqrt(np.mean(w**2)) + 1e-3)

    jax.tree.map(check, got, want)


def test_is_the_equation(model, params, tokens_BT, apply):
    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    mix = jax.jit(lambda p, x_BTD: model.make_mixer("gated_deltanet").apply({"params": p}, x_BTD)[0])
    x_BTD = p["embedding"][tokens_BT]
    for i in range(2):
        q = p["stack"][f"layer_{i}"]
        mixed = mix(q["mixer"], norm(x_BTD, q["mixer_norm"]["scale"]))
        x_BTD = x_BTD + np.asarray(mixed, np.float64)
        gate, up = np.split(norm(x_BTD, q["mlp_norm"]["scale"]) @ q["mlp"]["gate_up"]["kernel"], 2, -1)
        x_BTD = x_BTD + (gate / (1 + np.exp(-gate)) * up) @ q["mlp"]["out"]["kernel"]
    close(apply(params, tokens_BT)[0], norm(x_BTD, p["norm"]["scale"]) @ p["head"])


def test_a_tied_head_is_the_embedding(params, tokens_BT, apply):
    inner = dict(params["params"])
    head_DZ = inner.pop("head")
    tied = jax.jit(small(tied=True).apply)
    inner["embedding"] = head_DZ.T
    close(tied({"params": inner}, tokens_BT)[0], apply({"params": {**inner, "head": head_DZ}}, tokens_BT)[0])


def test_halves_equal_the_whole_and_none_is_the_initial_state(model, params, tokens_BT, apply):
    whole, state = apply(params, tokens_BT)
    first, half = apply(params, tokens_BT[:, :4], model.initial_state(B))
    second, end = apply(params, tokens_BT[:, 4:], half)
    close(jnp.concatenate([first, second], 1), whole)
    close(end, state)


def test_resets_equal_separate_sequences_and_no_nan_crosses(model, params, tokens_BT, apply):
    reset_BT = np.zeros((B, T), bool)
    reset_BT[:, 0] = reset_BT[0, 4] = True
    broken = jax.tree.map(lambda s: s + jnp.nan, model.initial_state(B))
    got, state = apply(params, tokens_BT, broken, reset_BT)
    want, _ = apply(params, tokens_BT)
    after, end = apply(params, tokens_BT[:, 4:])
    close(got[1:], want[1:])
    close(got[0], jnp.concatenate([want[0, :4], after[0]]))
    close(jax.tree.map(lambda s: s[0], state), jax.tree.map(lambda s: s[0], end))


def test_is_causal_and_keeps_rows_apart(params, tokens_BT, apply):
    want, _ = apply(params, tokens_BT)
    got, _ = apply(params, tokens_BT.at[1, 5].add(1) % Z)
    same = (got == want).all(-1)
    assert same[jnp.array([0, 2])].all() and same[1, :5].all() and not same[1, 5:].any()


def loss(model):
    def of(params, tokens_BT, state, reset_BT):
        logits_BTZ, state = model.apply(params, tokens_BT, state, reset_BT)
        return jnp.mean(jnp.sin(logits_BTZ)), (logits_BTZ, state)

    return jax.jit(jax.value_and_grad(of, has_aux=True))


@pytest.fixture(scope="module")
def long_params():
    return jax.jit(small(layers=4).init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))


def scanned_params(params, pattern, repetitions):
    """layer_i of a plain stack is repetition i // pattern of the scanned layer_{i % pattern}."""
    inner = dict(params["params"])
    layers = inner.pop("stack")
    inner["stack"] = {
        f"layer_{p}": jax.tree.map(
            lambda *a: jnp.stack(a), *[layers[f"layer_{p + r * pattern}"] for r in range(repetitions)]
        )
        for p in range(pattern)
    }
    return {"params": inner}


@pytest.fixture(scope="module")
def plain_result(long_params, tokens_BT):
    state = jax.tree.map(lambda s: s + 0.1, small(layers=4).initial_state(B))
    reset_BT = jnp.zeros((B, T), bool).at[1, 3].set(True)
    return loss(small(layers=4))(long_params, tokens_BT, state, reset_BT), (state, reset_BT)


@pytest.mark.long
def test_remat_changes_nothing(long_params, tokens_BT, plain_result):
    want, rest = plain_result
    close(loss(small(layers=4, remat=True))(long_params, tokens_BT, *rest), want)


@pytest.mark.long
def test_scanned_layers_are_the_same_function(long_params, tokens_BT, plain_result):
    (want, want_grad), rest = plain_result
    scanned = small(layers=4, scan_layers=True, remat=True, mixers=("gated_deltanet",) * 2)
    pattern = len(scanned.mixers)
    params = scanned_params(long_params, pattern, 4 // pattern)
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), tokens_BT)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    got, grad = loss(scanned)(params, tokens_BT, *rest)
    close(got, want)
    close(grad, scanned_params(want_grad, pattern, 4 // pattern))


def test_scanned_layers_begin_differently():
    params = jax.jit(small(scan_layers=True).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    kernel = params["params"]["stack"]["layer_0"]["mlp"]["out"]["kernel"]
    assert kernel.shape[0] == 2 and not jnp.allclose(kernel[0], kernel[1])


@pytest.mark.long
def test_a_pattern_repeats_and_may_end_early(tokens_BT):
    attention = pytest.importorskip("memzoo.mixers.attention")
    fields = {**SMALL, "attention": {"window": 4, "heads": 2}}
    model = small(layers=3, mixers=("gated_deltanet", "attention"), fields=fields)
    kinds = [type(state).__module__.rsplit(".")[-1] for state in model.initial_state(B)]
    assert kinds == ["gated_deltanet", "attention", "gated_deltanet"]
    assert isinstance(model.initial_state(B)[1], attention.State)
    params = jax.jit(model.init)(jax.random.key(0), tokens_BT)
    apply = jax.jit(model.apply)
    whole, state = apply(params, tokens_BT)
    first, half = apply(params, tokens_BT[:, :5])
    second, end = apply(params, tokens_BT[:, 5:], half)
    close(jnp.concatenate([first, second], 1), whole)
    assert jax.tree.map(jnp.shape, end) == jax.tree.map(jnp.shape, state)


@pytest.mark.long
def test_a_place_of_the_pattern_may_have_fields_of_its_own(tokens_BT):
    """Over those of all its kind: the same function as where they are given to all."""
    own = tuple(("gated_deltanet", {"heads": heads}) for heads in (2, 1))
    model = small(layers=3, mixers=own)
    assert [state.S_BHKV.shape for state in model.initial_state(1)] == [(1, 2, 3, 4), (1, 1, 3, 4), (1, 2, 3, 4)]
    same, plain = small(mixers=own[:1]), small()
    params = jax.jit(plain.init)(jax.random.key(0), tokens_BT)
    np.testing.assert_array_equal(jax.jit(same.apply)(params, tokens_BT)[0], jax.jit(plain.apply)(params, tokens_BT)[0])


def test_describe_counts_what_is_there(model, params):
    size = describe(model, batch=B)
    assert size.parameters == sum(p.size for p in jax.tree.leaves(params))
    assert size.parameter_bytes == sum(p.nbytes for p in jax.tree.leaves(params))
    assert size.state_bytes == sum(s.nbytes for s in jax.tree.leaves(model.initial_state(B)))
    assert describe(small(scan_layers=True), batch=B) == size


def test_describe_allocates_nothing():
    assert describe(LanguageModel(10**9, 10**5, 2)).parameters > 10**14


def test_a_tied_head_has_no_parameters_of_its_own():
    tied, untied = describe(small(tied=True)), describe(small())
    assert untied.parameters - tied.parameters == D * Z


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.cases(1)
def test_the_first_loss_is_near_that_of_a_uniform_guess(tied):
    model = small(vocab=65, width=64, layers=1, tied=tied)
    tokens_BT = jax.random.randint(jax.random.key(1), (4, 33), 0, 65)
    logits_BTZ = jax.jit(lambda key: model.init_with_output(key, tokens_BT[:, :-1])[0][0])(jax.random.key(0))
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTZ), tokens_BT[:, 1:, None], -1).mean()
    assert abs(nats - np.log(65)) < 0.6


def test_bfloat16_compute_rounds_neither_logits_nor_state(params, tokens_BT, apply):
    logits_BTZ, state = jax.jit(small(dtype=jnp.bfloat16).apply)(params, tokens_BT)
    want_BTZ, _ = apply(params, tokens_BT)
    assert logits_BTZ.dtype == jnp.float32 and {s.dtype for s in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    assert (logits_BTZ != logits_BTZ.astype(jnp.bfloat16)).any()
    assert jnp.sqrt(jnp.mean((logits_BTZ - want_BTZ) ** 2) / jnp.mean(want_BTZ**2)) < 4e-2


@pytest.mark.parametrize("wrong", [Z, -1])
def test_under_jit_a_token_outside_the_vocabulary_gives_nan(params, tokens_BT, apply, wrong):
    logits_BTZ, _ = apply(params, tokens_BT.at[1, 3].set(wrong))
    assert jnp.isnan(logits_BTZ[1, 3:]).all() and not jnp.isnan(logits_BTZ[jnp.array([0, 2])]).any()


def test_a_model_is_hashable_whatever_its_fields_are_of():
    """As they come from JSON, say: it is a static argument of jit."""
    made = [
        LanguageModel(11, 12, 1, (("mlstm", {"forget_bias": bias}),), fields={"mlstm": {"forget_bias": bias}})
        for bias in ([3.0, 6.0], (3.0, 6.0), np.array([3.0, 6.0]))
    ]
    assert len(set(made)) == 1 and made[0].fields["mlstm"]["forget_bias"] == (3.0, 6.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": ("gated_deltanett",)}, "unknown architecture 'gated_deltanett'; did you mean gated_deltanet"),
        ({"mixers": ()}, "mixers: expected at least one name"),
        ({"mixers": (7,)}, r"mixers: expected names, or \(name, fields\), got 7"),
        ({"mixers": (("gated_deltanet", {"head": 2}),)}, "head: gated_deltanet has no such field; did you mean heads"),
        ({"layers": 0}, "layers: expected an integer >= 1, got 0"),
        ({"hidden": 0}, "hidden: expected an integer >= 1, got 0"),
        (
            {"layers": 3, "scan_layers": True, "mixers": ("gated_deltanet",) * 2},
            "layers: expected a positive multiple of",
        ),
        ({"fields": {"atention": {}}}, "fields: 'atention' is not in mixers; there are gated_deltanet"),
        ({"fields": {"gated_deltanet": {"head": 2}}}, "head: gated_deltanet has no such field; did you mean heads"),
    ],
)
def test_bad_fields_are_named_when_the_model_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, s: (t[0], s), r"tokens_BT: expected shape \[B, T >= 1\], got \[9\]"),
        (lambda t, s: (t[:, :0], s), r"tokens_BT: expected shape \[B, T >= 1\], got \[3, 0\]"),
        (lambda t, s: (t[:0], s), r"tokens_BT: expected B >= 1, got shape \[0, 9\]"),
        (lambda t, s: (t.tolist(), s), "tokens_BT: expected an array, got "),
        (lambda t, s: (t * 1.0, s), "tokens_BT: expected an integer dtype, got float32"),
        (lambda t, s: (t.at[2, 1].set(Z), s), r"tokens_BT: expected tokens in 0 ... vocab - 1 = 10, got 11"),
        (lambda t, s: (t.at[2, 1].set(-1), s), r"tokens_BT: expected tokens in 0 ... vocab - 1 = 10, got -1"),
        (lambda t, s: (t, s[:1]), "state: expected a tuple of the states of 2 layers, got 1 of them"),
        (lambda t, s: (t, s[0]), r"state\[0\]: expected memzoo.mixers.gated_deltanet.State, got"),
        (lambda t, s: (t[:2], s), r"state\[0\].S_BHKV: expected shape \[2, 2, 3, 4\], got \[3, 2, 3, 4\]"),
        (lambda t, s: (t, s, jnp.zeros((B, T - 1), bool)), r"reset_BT: expected shape \[B = 3, T = 9\], got \[3, 8\]"),
    ],
)
def test_bad_arguments_are_named(model, params, tokens_BT, change, message):
    with pytest.raises(ValueError, match=message):
        model.apply(params, *change(tokens_BT, model.initial_state(B)))
