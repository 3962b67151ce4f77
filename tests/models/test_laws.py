"""What every model must hold, in all its forms: the laws of the contract, one level up."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo.models.hybrid import hybrid
from memzoo.models.hydra import Hydra
from memzoo.models.titans_mac import TitansMAC
from memzoo.models.titans_mag import TitansMAG
from memzoo.models.titans_mal import TitansMAL
from memzoo.models.transnormer import TransNormer
from memzoo.models.xlstm import XLSTM
from memzoo.sample import generate
from tests.test_contract import all_finite, assert_close, in_numpy, largest, real, since

B, T, D, Z = 2, 22, 12, 11
CUTS = (0, 11, T)  # pieces of one length are one program; those of the definition are single tokens


def small_hybrid(impl, **fields):
    delta = {"heads": 2, "key_dim": 3, "value_dim": 4, "impl": "scan" if impl == "scan" else "chunk"}
    full = {"heads": 3, "head_dim": 4, "window": 7, "sinks": 2, "impl": impl}
    return hybrid(Z, D, 3, "2:1", fields={"gated_deltanet": delta, "attention": full}, **fields)


def small_hydra(impl, **fields):
    """A layer with experts, and one with attention; chunks end inside of pieces, and texts inside of chunks."""
    mixers = {"mamba2": {"head_dim": 8, "state_size": 3}, "attention": {"heads": 3, "head_dim": 4, "window": 7}}
    sizes = {"chunk": 5, "experts": 3, "top_k": 2, "hidden": 8, "slots": 6, "rank": 4, "sub_keys": 9, "key_dim": 2}
    every = {"attention_every": 2, "experts_every": 2, "pkm_top_k": 3, "value_dim": 7}
    return Hydra(Z, D, 2, fields=mixers, impl=impl, **every, **sizes, **fields)


TITANS = {"heads": 2, "persistent": 2, "hidden": 7, "memory": {"chunk": 4, "hidden": 5}}
# each takes impl, dtype and param_dtype
MODELS = {
    "hybrid": small_hybrid,
    "hydra": small_hydra,
    "titans_mac": partial(TitansMAC, Z, D, 1, segment=8, **TITANS),
    "titans_mag": partial(TitansMAG, Z, D, 2, window=7, **TITANS),
    "titans_mal": partial(TitansMAL, Z, D, 2, window=7, **TITANS),
    "transnormer": partial(TransNormer, Z, D, 2, heads=2, hidden=7),
    "xlstm": partial(XLSTM, Z, D, 2, "1:1", heads=2, inner=16, hidden=7),
}
LONG = ("hydra", "titans_mac", "titans_mag", "titans_mal")  # which compile slowest: their own tests are quick
IMPLS = ("scan", "chunk")


def cases(*more):
    marks = {name: pytest.mark.long if name in LONG else () for name in MODELS}
    return [pytest.param(name, *rest, marks=marks[name]) for name in MODELS for rest in itertools.product(*more)]


NAMES, FORMS = cases(), cases(IMPLS)


def make(name, impl="auto", dtype=jnp.float32, param_dtype=None):
    return MODELS[name](impl=impl, dtype=dtype, param_dtype=param_dtype or dtype)


@functools.cache
def setup(name, dtype=np.float32):
    """Parameters, tokens, the state that another sequence left, resets, and weights that make a loss of all outputs."""
    model = make(name, "scan", dtype)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, Z, (B, T)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :1])
    params = jax.tree.map(lambda p: np.asarray(p + 0.1 * rng.standard_normal(p.shape), p.dtype), in_numpy(params))
    logits, state = in_numpy(jax.jit(model.apply)(params, tokens[::-1, ::-1]))
    reset = np.zeros((B, T), bool)
    reset[0, [0, 9, 10]] = reset[1, [3, CUTS[1], T - 1]] = True
    normal = lambda s: rng.standard_normal(s.shape) + (1j * rng.standard_normal(s.shape) if np.iscomplexobj(s) else 0)
    weights = jax.tree.map(lambda s: normal(s).astype(s.dtype), (logits, state))
    return params, tokens, state, reset, weights


@functools.cache
def fresh(name):
    return in_numpy(make(name).initial_state(B))


@functools.lru_cache(maxsize=2)  # both forms of the model at hand
def program(name, impl, dtype=np.float32):
    """(params, tokens, state, reset, weights) -> gradients in params and state, and the outputs."""
    model = make(name, impl, dtype)

    def loss(params, state, tokens, reset, weights):
        outputs = model.apply(params, tokens, state, reset)
        pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(weights), strict=True)
        return sum((a * w).real.sum() for a, w in pairs if real(a)), outputs

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))
    return lambda params, tokens, state, reset, weights: in_numpy(run(params, state, tokens, reset, weights))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cases(1)
def test_shapes_and_dtypes(name):
    found, (logits, last) = program(name, "chunk")(*setup(name))
    assert logits.shape == (B, T, Z) and logits.dtype == np.float32
    assert all_finite((found, logits, last))
    want = fresh(name)
    assert jax.tree.structure(last) == jax.tree.structure(want)
    for got, expected in zip(jax.tree.leaves(last), jax.tree.leaves(want), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert got.shape[0] == B and got.dtype in (np.float32, np.complex64, np.int32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cases(1)
def test_every_parameter_and_every_state_matters(name):
    params, tokens, state, reset, weights = setup(name)
    (of_params, of_state), _ = program(name, "chunk")(params, tokens, state, np.zeros_like(reset), weights)
    for path, leaf in jax.tree_util.tree_leaves_with_path((of_params, of_state)):
        assert not real(leaf) or np.any(leaf != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cases(1)
def test_forms_agree(name):
    arguments = setup(name)
    assert_close(program(name, "chunk")(*arguments), program(name, "scan")(*arguments), 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_forms_agree_in_float64(name):
    with jax.enable_x64(True):
        arguments = setup(name, np.float64)
        got, want = (program(name, impl, np.float64)(*arguments) for impl in ("chunk", "scan"))
        assert all(leaf.dtype in (np.float64, np.complex128, np.int32) for leaf in jax.tree.leaves(got[1]))
        assert_close(got, want, 1e-10)


@pytest.mark.parametrize(("name", "impl"), FORMS)
@pytest.mark.cases(1)
def test_pieces_equal_the_whole(name, impl):
    """Outputs, last state, and the gradients through the states that pass from piece to piece."""
    params, tokens, state, reset, (of_logits, of_state) = setup(name)
    run = program(name, impl)
    cuts = range(T + 1) if impl == "scan" else CUTS
    pieces = [(tokens[:, i:j], reset[:, i:j], of_logits[:, i:j]) for i, j in itertools.pairwise(cuts)]
    states, ys = [state], []
    for part, reset_part, of_part in pieces:
        _, (y, last) = run(params, part, states[-1], reset_part, (of_part, of_state))
        states.append(last)
        ys.append(y)
    d_params, d_state = None, of_state
    for (part, reset_part, of_part), before in zip(pieces[::-1], states[-2::-1], strict=True):
        (d, d_before), _ = run(params, part, before, reset_part, (of_part, d_state))
        d_params = d if d_params is None else jax.tree.map(np.add, d_params, d)
        d_state = jax.tree.map(lambda g, w: g if real(g) else w, d_before, of_state)
    got = (d_params, d_before), (np.concatenate(ys, axis=1), states[-1])
    assert_close(got, run(params, tokens, state, reset, (of_logits, of_state)), 2e-5)


@pytest.mark.parametrize(("name", "impl"), FORMS)
def test_a_reset_begins_a_new_sequence(name, impl):
    params, tokens, state, reset, weights = setup(name)
    run = program(name, impl)
    _, (y, _) = run(params, tokens, state, reset, weights)
    for row in range(B):
        starts = [t for t in range(T) if reset[row, t]]
        for start, end in zip(starts, [*starts[1:], T], strict=True):
            alone = np.roll(tokens, -start, axis=1)
            _, (y_alone, _) = run(params, alone, fresh(name), np.zeros_like(reset), weights)
            assert largest(y[row, start:end] - y_alone[row, : end - start]) < 1e-5 * largest(y), (row, start)
    broken = jax.tree.map(lambda s: np.full_like(s, np.nan if real(s) else 5), state)
    at_first = np.arange(T)[None].repeat(B, 0) == 0
    clean = run(params, tokens, fresh(name), at_first, weights)
    assert_close(run(params, tokens, broken, at_first, weights), clean, 1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cases(1)
def test_no_state_is_the_initial_state(name):
    params, tokens, _, reset, weights = setup(name)
    got = in_numpy(jax.jit(make(name, "chunk").apply)(params, tokens))
    assert_close(got, program(name, "chunk")(params, tokens, fresh(name), np.zeros_like(reset), weights)[1], 1e-5)


@pytest.mark.parametrize(("name", "impl"), FORMS)
def test_causal_and_rows_apart(name, impl):
    params, tokens, state, reset, weights = setup(name)
    run, other = program(name, impl), lambda z: (z + 1) % Z
    _, (y, last) = run(params, tokens, state, reset, weights)
    for t in range(1, T):
        _, (future, _) = run(params, since(tokens, t, other), state, reset, weights)
        assert largest(future[:, :t] - y[:, :t]) < 1e-5 * largest(y)
        assert largest(future[:, t:] - y[:, t:]) > 1e-4 * largest(y)
    first = lambda leaf, changed: np.concatenate([changed(leaf[:1]), leaf[1:]])
    moved = jax.tree.map(lambda s: first(s, lambda s: 2 * s) if real(s) else s, state)
    _, got = run(params, first(tokens, other), moved, reset, weights)
    row = lambda tree, b: jax.tree.map(lambda leaf: leaf[b], tree)
    assert_close(row(got, 1), row((y, last), 1), 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_float32(name):
    params, tokens, _, reset, weights = setup(name)
    _, (y, state) = program(name, "chunk")(params, tokens, fresh(name), np.zeros_like(reset), weights)
    half = make(name, "chunk", jnp.bfloat16, jnp.float32)
    y_half, state_half = in_numpy(jax.jit(half.apply)(params, tokens, fresh(name)))
    assert y_half.dtype == np.float32
    assert [s.dtype for s in jax.tree.leaves(state_half)] == [s.dtype for s in jax.tree.leaves(state)]
    rms = lambda x, axis: np.sqrt(np.mean(x**2, axis))
    errors = rms(y_half - y, -1) / rms(y, None)  # a few tokens are large, where a norm makes much of little
    assert np.median(errors) < 2e-2 and rms(errors, None) < 1e-1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.cases(1)
def test_generate_says_what_the_logits_of_the_whole_say(name):
    """Decoding is T = 1, greedily: each token is the likeliest after all before it."""
    params, tokens, _, reset, weights = setup(name)
    prompt, steps = tokens[:, :4], T - 4
    said = generate(make(name), params, prompt, steps, jax.random.key(0), temperature=0.0)
    whole = np.concatenate([prompt, said.tokens_BS], axis=1)
    _, (y, _) = program(name, "scan")(params, whole, fresh(name), np.zeros_like(reset), weights)
    assert (np.argmax(y[:, 3:-1], -1) == said.tokens_BS).all()


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments_are_named(name):
    params, tokens, state, reset, _ = setup(name)
    call = make(name).apply
    with pytest.raises(ValueError, match=r"tokens_BT: expected shape \[B, T >= 1\], got \[22\]"):
        call(params, tokens[0])
    with pytest.raises(ValueError, match=r"tokens_BT: expected tokens in 0 ... vocab - 1 = 10, got 11"):
        call(params, since(tokens, T - 1, lambda z: 0 * z + Z))
    with pytest.raises(ValueError, match=r"state: expected a tuple of the states of \d layers"):
        call(params, tokens, list(state))
    with pytest.raises(ValueError, match=r"state\[0\].*: expected shape \[2, .* got \[1, "):
        call(params, tokens, jax.tree.map(lambda s: s[:1], state))
    with pytest.raises(ValueError, match=r"reset_BT: expected shape \[B = 2, T = 22\], got \[2, 21\]"):
        call(params, tokens, state, reset[:, 1:])
