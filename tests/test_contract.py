"""What every architecture of the catalogue must hold, in all its forms: the laws of the contract, one test each."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo import contract

B, T, D = 2, 70, 12  # 70 tokens are a chunk of 64 and a piece
CUTS = (0, 1, 2, 37, T)
# Sizes that all differ from each other and from B, T, D, so that no axis can be mistaken for another.
FIELDS = {
    "attention": {"heads": 3, "head_dim": 4, "window": 17, "sinks": 2},
    "lstm": {"hidden": 7},
    "gru": {"hidden": 7},
    "min_gru": {"expand": 3},
    "min_lstm": {"expand": 3},
    "bilinear_rnn": {"kind": "full", "hidden": 9},
    "ffm": {"traces": 5, "contexts": 3},
    "lru": {"state_size": 5},
    "mamba": {"state_size": 5, "dt_rank": 6},
    "polarized_mamba": {"state_size": 5, "dt_rank": 6},
    "long_mamba": {"state_size": 5, "dt_rank": 6},
    "mem_mamba": {"state_size": 5, "dt_rank": 6, "pool_size": 9, "note_dim": 7, "tau2": 0.1},
    "mamba2": {"head_dim": 8, "state_size": 5},
    "lssl": {"state_size": 5},
    "s4": {"state_size": 10},
    "s4d": {"state_size": 10},
    "s5": {"state_size": 10, "blocks": 1},
    "smr": {"state_size": 5},
    "rg_lru": {"hidden": 15, "heads": 3},
    "stable_ssm": {"state_size": 5},
    "linear_attention": {"heads": 3, "key_dim": 5, "value_dim": 7},
    "retnet": {"heads": 3, "key_dim": 6, "value_dim": 7},
    "gla": {"heads": 3, "key_dim": 5, "value_dim": 7},
    "hgrn": {"state_size": 7, "lower_bound": 0.3},
    "deltanet": {"heads": 3, "key_dim": 5, "value_dim": 7},
    "gated_deltanet": {"heads": 3, "key_dim": 5, "value_dim": 7},
}
NAMES = memzoo.names()
FORMS = [(name, impl) for name in NAMES for impl in memzoo.card(name).forms]
FAST = [(name, impl) for name, impl in FORMS if impl != memzoo.card(name).forms[0]]


def make(name, impl="auto", dtype=jnp.float32, param_dtype=None):
    return memzoo.make(name, width=D, impl=impl, dtype=dtype, param_dtype=param_dtype or dtype, **FIELDS[name])


@functools.cache
def setup(name, dtype=np.float32):
    """Parameters, input, the state that another sequence left, resets, and weights that make a loss of all outputs."""
    mixer = make(name, memzoo.card(name).forms[0], dtype)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, T, D)), dtype)
    params = jax.jit(mixer.init)(jax.random.key(0), x[:, :1])
    # Every parameter away from 0 and 1, or the gradient of what it multiplies could not be seen.
    params = jax.tree.map(lambda p: p + jnp.asarray(0.1 * rng.standard_normal(p.shape), p.dtype), params)
    _, state = jax.jit(mixer.apply)(params, 0.7 * x[::-1, ::-1])
    reset = np.zeros((B, T), bool)
    reset[0, [0, 20, 21]] = reset[1, [3, 50, T - 1]] = True
    weights = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), dtype), (x, state))
    return params, x, state, jnp.asarray(reset), weights


def loss_of(y, state, weights):
    pairs = zip(jax.tree.leaves((y, state)), jax.tree.leaves(weights), strict=True)
    return sum(jnp.sum(jnp.real(a * w)) for a, w in pairs if jnp.issubdtype(a.dtype, jnp.inexact))


@functools.cache
def whole(name, impl, dtype=np.float32):
    """All tokens in one call: (params, x, state, reset, weights) -> gradients in the first three, and the outputs."""
    mixer = make(name, impl, dtype)

    def loss(params, x, state, reset, weights):
        y, last = mixer.apply(params, x, state, reset)
        return loss_of(y, last, weights), (y, last)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True))


@functools.cache
def in_pieces(name, impl):
    """The same in several calls, the state carried from one to the next."""
    mixer = make(name, impl)

    def loss(params, x, state, reset, weights):
        ys = []
        for i, j in itertools.pairwise(CUTS):
            y, state = mixer.apply(params, x[:, i:j], state, reset[:, i:j])
            ys.append(y)
        y = jnp.concatenate(ys, axis=1)
        return loss_of(y, state, weights), (y, state)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True))


def assert_close(got, want, tolerance, scale_of=None):
    """Relative rms, leaf by leaf; integers exactly. A leaf that should be 0 is measured against the largest leaf."""
    floor = max(float(jnp.max(jnp.abs(w))) for w in jax.tree.leaves(want) if jnp.issubdtype(w.dtype, jnp.inexact))
    for (path, w), g in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        where = jax.tree_util.keystr(path)
        assert g.shape == w.shape and g.dtype == w.dtype, where
        if jnp.issubdtype(w.dtype, jnp.integer) or w.dtype == jax.dtypes.float0:
            np.testing.assert_array_equal(g, w, err_msg=where)
            continue
        g, w = np.asarray(g), np.asarray(w)
        error = np.sqrt(np.mean(np.abs(g - w) ** 2)) if w.size else 0.0
        assert error <= tolerance * (np.sqrt(np.mean(np.abs(w) ** 2)) + 1e-3 * floor if w.size else 1), (where, error)


def all_finite(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes(name):
    params, x, state, reset, weights = setup(name)
    gradients, (y, last) = whole(name, "auto")(params, x, state, reset, weights)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert all_finite((gradients, y, last))
    want = make(name).initial_state(B)
    assert jax.tree.structure(last) == jax.tree.structure(want)
    for got, expected in zip(jax.tree.leaves(last), jax.tree.leaves(want), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert got.shape[0] == B, "state is batch first"
        assert got.dtype in (jnp.float32, jnp.complex64, jnp.int32)


@pytest.mark.parametrize("name", NAMES)
def test_no_state_is_the_initial_state(name):
    params, x, _, reset, weights = setup(name)
    mixer = make(name)
    y, last = jax.jit(mixer.apply)(params, x)
    no_reset = jnp.zeros_like(reset)
    assert_close((y, last), whole(name, "auto")(params, x, mixer.initial_state(B), no_reset, weights)[1], 1e-6)


@pytest.mark.parametrize(("name", "impl"), FAST)
def test_forms_agree(name, impl):
    arguments = setup(name)
    definition = memzoo.card(name).forms[0]
    assert_close(whole(name, impl)(*arguments), whole(name, definition)(*arguments), 1e-5)


@pytest.mark.parametrize(("name", "impl"), FAST)
def test_forms_agree_in_float64(name, impl):
    with jax.enable_x64(True):
        arguments = setup(name, np.float64)
        definition = memzoo.card(name).forms[0]
        got, want = (whole(name, form, np.float64)(*arguments) for form in (impl, definition))
        assert got[1][0].dtype == np.float64
        assert all(leaf.dtype in (np.float64, np.complex128, np.int32) for leaf in jax.tree.leaves(got[1][1]))
        assert_close(got, want, 1e-10)


@pytest.mark.parametrize(("name", "impl"), FORMS)
def test_pieces_equal_the_whole(name, impl):
    arguments = setup(name)
    assert_close(in_pieces(name, impl)(*arguments), whole(name, impl)(*arguments), 1e-5)


@pytest.mark.parametrize(("name", "impl"), FORMS)
def test_a_reset_begins_a_new_sequence(name, impl):
    """Each stretch between resets comes out as it does alone, at the head of a call without state or resets."""
    params, x, state, reset, weights = setup(name)
    run = whole(name, impl)
    _, (y, _) = run(params, x, state, reset, weights)
    fresh = make(name).initial_state(B)
    for row in range(B):
        starts = [t for t in range(T) if reset[row, t]]
        for start, end in zip(starts, [*starts[1:], T], strict=True):
            alone = jnp.roll(x, -start, axis=1)
            _, (y_alone, _) = run(params, alone, fresh, jnp.zeros_like(reset), weights)
            error = jnp.abs(y[row, start:end] - y_alone[row, : end - start]).max()
            assert error < 1e-5 * jnp.abs(y).max(), (row, start)


@pytest.mark.parametrize(("name", "impl"), FORMS)
def test_nothing_crosses_a_reset(name, impl):
    """Neither outputs nor the final state nor any gradient know what was before: other tokens, another state, NaN."""
    params, x, state, _, weights = setup(name)
    run = whole(name, impl)
    first = jnp.arange(T)[None, :].repeat(B, 0) == 0
    broken = jax.tree.map(lambda s: jnp.full_like(s, jnp.nan if jnp.issubdtype(s.dtype, jnp.inexact) else 5), state)
    clean = run(params, x, make(name).initial_state(B), first, weights)
    dirty = run(params, x, broken, first, weights)
    assert all_finite(dirty)
    assert_close(dirty, clean, 1e-6)

    at = 33
    middle = jnp.arange(T)[None, :].repeat(B, 0) == at
    late = jax.tree.map(jnp.copy, weights)
    late = (late[0].at[:, :at].set(0), late[1])
    one = run(params, x, state, middle, late)
    two = run(params, x.at[:, :at].set(x[:, :at] * 3 + 1), jax.tree.map(lambda s: s * 0, state), middle, late)
    assert_close(one[1][0][:, at:], two[1][0][:, at:], 1e-6)
    assert_close(one[1][1], two[1][1], 1e-6)
    d_x = jnp.abs(one[0][1])
    rounding = 0 if impl in ("scan", "associative") else 1e-6  # where sums over a whole chunk cancel
    assert d_x[:, :at].max() <= rounding * d_x.max(), "gradient of the tokens before the reset"


@pytest.mark.parametrize(("name", "impl"), [(n, i) for n, i in FORMS if i in ("scan", "associative")])
def test_inf_does_not_reach_the_next_sequence(name, impl):
    params, x, state, _, weights = setup(name)
    reset = jnp.arange(T)[None, :].repeat(B, 0) == 33
    _, (y, last) = whole(name, impl)(params, x.at[:, 10].set(jnp.inf), state, reset, weights)
    assert not jnp.isfinite(y[:, 10:33]).all(), "the test itself"
    assert jnp.isfinite(y[:, 33:]).all() and all_finite(last)


@pytest.mark.parametrize(("name", "impl"), FORMS)
def test_causal_and_rows_apart(name, impl):
    params, x, state, reset, weights = setup(name)
    run = whole(name, impl)
    _, (y, last) = run(params, x, state, reset, weights)
    for t in (1, 20, 64, T - 1):
        _, (future, _) = run(params, x.at[:, t:].add(1.0), state, reset, weights)
        assert jnp.abs(future[:, :t] - y[:, :t]).max() < 1e-5 * jnp.abs(y).max()
        assert jnp.abs(future[:, t:] - y[:, t:]).max() > 1e-4 * jnp.abs(y).max()
    row = lambda tree, b: jax.tree.map(lambda leaf: leaf[b], tree)
    _, other = run(params, x.at[0].add(1.0), jax.tree.map(lambda s: s.at[0].mul(2), state), reset, weights)
    assert_close(row(other, 1), row((y, last), 1), 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_and_every_state_matters(name):
    params, x, state, reset, weights = setup(name)
    (d_params, d_x, d_state), _ = whole(name, "auto")(params, x, state, jnp.zeros_like(reset), weights)
    for path, leaf in jax.tree_util.tree_leaves_with_path((d_params, d_x, d_state)):
        if leaf.dtype != jax.dtypes.float0:
            assert jnp.any(leaf != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_difference_quotient(name):
    """The definition's own gradient, in float64, along a random direction of parameters, input and state."""
    definition = memzoo.card(name).forms[0]
    with jax.enable_x64(True):
        params, x, state, reset, weights = setup(name, np.float64)
        gradients, _ = whole(name, definition, np.float64)(params, x, state, reset, weights)
        real = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
        rng = np.random.default_rng(5)
        along = jax.tree.map(lambda a: rng.standard_normal(a.shape) if real(a) else 0, (params, x, state))

        def f(e):
            moved = jax.tree.map(lambda a, d: a + e * d if real(a) else a, (params, x, state), along)
            _, (y, last) = whole(name, definition, np.float64)(*moved, reset, weights)
            return float(loss_of(y, last, weights))

        products = jax.tree.map(lambda g, d: float(jnp.real(jnp.sum(g * d))) if real(g) else 0.0, gradients, along)
        e = 1e-6
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), (f(e) - f(-e)) / (2 * e), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_the_batch(name):
    params, x, state, _, _ = setup(name)
    mixer = make(name)
    alone = lambda x, s: jax.tree.map(lambda a: a[0], mixer.apply(params, x[None], jax.tree.map(lambda a: a[None], s)))
    got = jax.jit(jax.vmap(alone))(x[:, :5], state)
    assert_close(got, jax.jit(mixer.apply)(params, x[:, :5], state), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_float32(name):
    params, x, _, _, _ = setup(name)
    y, state = jax.jit(make(name).apply)(params, x)
    half = make(name, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    y_half, state_half = jax.jit(half.apply)(params, x.astype(jnp.bfloat16))
    assert y_half.dtype == jnp.bfloat16
    assert [s.dtype for s in jax.tree.leaves(state_half)] == [s.dtype for s in jax.tree.leaves(state)]
    assert_close(y_half.astype(jnp.float32), y, 2e-2)
    assert_close(state_half, state, 2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_long_noise_stays_finite(name):
    params, _, _, _, _ = setup(name)
    x = jax.random.normal(jax.random.key(1), (1, 32_768, D))
    y, state = jax.jit(make(name).apply)(params, x)
    assert all_finite((y, state))
    if memzoo.card(name).state == "constant":
        small = jax.tree.map(jnp.shape, make(name).initial_state(1))
        assert jax.tree.map(jnp.shape, state) == small


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name):
    params, x, state, reset, _ = setup(name)
    call = make(name).apply
    with pytest.raises(ValueError, match=r"x_BTD: expected shape \[B, T >= 1, D = 12\], got \[2, 70, 11\]"):
        call(params, x[..., :-1])
    with pytest.raises(ValueError, match=r"x_BTD: .* got \[70, 12\]"):
        call(params, x[0])
    with pytest.raises(ValueError, match=r"x_BTD: .* got \[2, 0, 12\]"):
        call(params, x[:, :0])
    with pytest.raises(ValueError, match="x_BTD: expected a floating dtype, got int32"):
        call(params, x.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"state.*: expected shape \[2, .* got \[1, "):
        call(params, x, jax.tree.map(lambda s: s[:1], state))
    with pytest.raises(ValueError, match=rf"state: expected memzoo.mixers.{name}.State, got tuple|PyTreeDef"):
        call(params, x, tuple(state))
    with pytest.raises(ValueError, match=r"reset_BT: expected shape \[B = 2, T = 70\], got \[2, 69\]"):
        call(params, x, state, reset[:, 1:])
    with pytest.raises(ValueError, match="reset_BT: expected dtype bool, got float32"):
        call(params, x, state, reset.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"impl: .*did you mean"):
        make(name, "scann").apply(params, x)
    with pytest.raises(NotImplementedError, match=f"impl: {name} has no form 'pallas'|impl: .* has no form 'pallas'"):
        make(name, "pallas").apply(params, x)
    with pytest.raises(ValueError, match=f"widht: {name} has no such field; did you mean width"):
        memzoo.make(name, width=D, widht=3)


def test_states_of_different_mixers_do_not_pass():
    params, x, _, _, _ = setup("gla")
    _, _, state, _, _ = setup("deltanet")
    with pytest.raises(ValueError, match=r"expected memzoo\.mixers\.gla\.State, got memzoo\.mixers\.deltanet\.State"):
        make("gla").apply(params, x, state)


def test_the_checks_know_a_state_from_its_shape():
    expected = jax.eval_shape(lambda: make("gla").initial_state(B))
    contract.check_state(make("gla").initial_state(B), expected)
    with pytest.raises(ValueError, match="dtype float32, got float16"):
        contract.check_state(jax.tree.map(lambda s: s.astype(jnp.float16), make("gla").initial_state(B)), expected)
