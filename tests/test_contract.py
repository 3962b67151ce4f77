"""What every architecture of the catalogue must hold, in all its forms: the laws of the contract, one test each."""

import functools
import itertools

import jax
import jax.numpy as jnp
import memzoo_kernels
import numpy as np
import pytest

import memzoo
from memzoo import contract
from memzoo.ops.checks import IMPLS

B, T, D = 2, 72, 12  # 72 tokens are a chunk of 64 and a piece
CUTS = (0, 24, 48, T)  # where calls and sequences are cut, besides single tokens
# Sizes that all differ from each other and from B, T, D, so that no axis can be mistaken for another.
FIELDS = {
    "attention": {"heads": 3, "head_dim": 4, "window": 17, "sinks": 2},
    "lstm": {"hidden": 7},
    "slstm": {"heads": 3},
    "gru": {"hidden": 7},
    "elman": {"hidden": 7},
    "indrnn": {"hidden": 7, "horizon": 100_000},  # a shorter one lets 131,072 tokens overflow
    "leaky_rnn": {"hidden": 7},
    "wave_rnn": {"channels": 3, "places": 7, "conv_width": 5, "activation": "tanh"},  # ReLU grows without bound
    "lem": {"hidden": 7},
    "elm": {"memories": 7, "branches": 5, "synapses": 4, "learn_tau": True},
    "rmc": {"slots": 4, "heads": 3, "key_dim": 7, "value_dim": 5},
    "min_gru": {"expand": 3},
    "min_lstm": {"expand": 3},
    "bilinear_rnn": {"hidden": 15, "block_size": 5},
    "ffm": {"traces": 5, "contexts": 3},
    "lru": {"state_size": 5},
    "mamba": {"state_size": 5, "dt_rank": 6},
    "polarized_mamba": {"state_size": 5, "dt_rank": 6},
    "long_mamba": {"state_size": 5, "dt_rank": 6},
    "mem_mamba": {"state_size": 5, "dt_rank": 6, "pool_size": 9, "note_dim": 7, "tau2": 0.1},
    "mamba2": {"head_dim": 8, "state_size": 5},
    "hippo": {"hidden": 7, "state_size": 5, "signals": 3},
    "lssl": {"state_size": 5},
    "s4": {"state_size": 10},
    "s4d": {"state_size": 10},
    "s5": {"state_size": 10, "blocks": 1},
    "smr": {"state_size": 5},
    "rg_lru": {"hidden": 15, "heads": 3},
    "stable_ssm": {"state_size": 5},
    "linear_attention": {"heads": 3, "key_dim": 5, "value_dim": 7},
    "retnet": {"heads": 3, "key_dim": 6, "value_dim": 7},
    "mlstm": {"heads": 3, "key_dim": 6, "value_dim": 7, "input_bias": 0.5, "forget_bias": (0, 2)},
    "lightning": {"heads": 3, "key_dim": 5, "value_dim": 7, "depth": 0.5},
    "based": {"heads": 3, "feature_dim": 4, "value_dim": 7},
    "jrt": {"heads": 3, "feature_dim": 4, "value_dim": 7, "prefix": 100},  # ends amid the second call of 72
    "aaren": {"heads": 3, "key_dim": 5, "value_dim": 7},
    "gla": {"heads": 3, "key_dim": 5, "value_dim": 7},
    "hgrn": {"state_size": 7, "lower_bound": 0.3},
    "hgrn2": {"heads": 3, "key_dim": 5, "value_dim": 7, "lower_bound": 0.3},
    "rwkv7": {"heads": 3, "key_dim": 5, "value_dim": 7, "decay_rank": 4, "rate_rank": 6, "gate_rank": 8},
    "mom": {"heads": 3, "key_dim": 6, "value_dim": 8, "memories": 4, "top_k": 2},
    "liger": {"heads": 6, "key_heads": 3, "head_dim": 4, "window": 17},
    "lizard": {"heads": 6, "key_heads": 3, "head_dim": 4, "feature_dim": 7, "window": 17, "meta_tokens": 7},
    "causal_rn": {"hidden": 7, "window": 17},
    "block_linear": {"heads": 3, "key_dim": 6, "value_dim": 7},
    # Rounding to spikes has steps, where no quotient of differences and no bfloat16 can follow: tested on its own.
    "spiking_gla": {"heads": 6, "key_heads": 3, "head_dim": 10, "window": 17, "gate_rank": 5, "spiking": False},
    "deltanet": {"heads": 3, "key_dim": 5, "value_dim": 7},
    "gated_deltanet": {"heads": 3, "key_dim": 5, "value_dim": 7},
    "delta_product": {"heads": 3, "key_dim": 5, "value_dim": 7, "householders": 4},
    "kda": {"heads": 3, "key_dim": 5, "value_dim": 7, "gate_rank": 6},
    # LN of few channels and long steps make it so steep that float32's definition is 1e-5 off.
    "ttt_linear": {"heads": 3, "head_dim": 8, "chunk": 10, "step": 0.3},
    "ttt_mlp": {"heads": 3, "head_dim": 8, "chunk": 10, "expansion": 5, "step": 0.3},
    "titans": {"heads": 3, "key_dim": 5, "value_dim": 7, "hidden": 6, "persistent": 4, "chunk": 10},
    "moneta": {"heads": 3, "head_dim": 8, "chunk": 10, "expansion": 5, "gate_rank": 7},
    "yaad": {"heads": 3, "head_dim": 8, "chunk": 10, "expansion": 5, "step": 0.3, "gate_rank": 7},
    "memora": {"heads": 3, "head_dim": 8, "chunk": 10, "expansion": 5, "gate_rank": 7},
    "omega_net": {"heads": 3, "key_dim": 4, "value_dim": 7, "hidden": 6, "window": 5, "chunk": 10},
    # Each step of Newton-Schulz makes rounding, and curvature, 3.4 times as large where the momentum is of low rank.
    "atlas": {"heads": 3, "key_dim": 4, "value_dim": 7, "hidden": 6, "window": 5, "chunk": 10, "muon_steps": 3},
    "dot": {"heads": 3, "key_dim": 4, "value_dim": 7, "hidden": 6, "window": 5, "chunk": 10},
    "lattice": {"heads": 3, "slots": 5, "value_dim": 7, "chunk": 10},
    "rat": {"heads": 6, "groups": 3, "head_dim": 4, "chunk": 5, "window": 7},
    "hax": {"head_dim": 6, "state_size": 5, "bucket_keys": 7, "selected_keys": 9, "bits": 3},
    "gam": {"slots": 7},
    "esn": {"units": 7, "leak": 0.6, "bias_scale": 0.5},
    "res_esn": {"units": 7, "alpha": 0.7, "bias_scale": 0.5},
    "res_rmn": {"memory_units": 5, "units": 7, "alpha": 0.7, "bias_scale": 0.5},
    "quantum_reservoir": {"qubits": 3, "angles": (0.2, 0.4, 0.8)},
    "onion_esn": {"units": 15, "rings": 3, "leak": 0.6, "bias_scale": 0.5},
}
NAMES = memzoo.names()
# What takes longest to compile is left to the long tests: newton and kernels, which are interpreted, as each op tests
# them by default, and these architectures: memories that learn while they read, all upon one op, and four more.
SLOW = ("delta_product", "hax", "kda", "rwkv7", "ttt_linear", "ttt_mlp", "titans", "moneta", "yaad", "memora")
SLOW += ("omega_net", "atlas", "dot")


def marked(*values, long):
    return pytest.param(*values, marks=[pytest.mark.long] if long or values[0] in SLOW else [])


def forms(*but):
    """(name, impl, of): what a form is held to, and in which precision; see `precision`.

    Compiling gradients is most of what all of this takes. By default the definition has them, and of the others the
    values are compared; in the long tests all have them, in float64, and kernels in float32.
    """
    every = []
    for name in NAMES:
        for impl in memzoo.card(name).forms:
            long = impl in ("newton", "pallas")
            if impl not in ("scan", "associative", "pallas"):
                every.append(marked(name, impl, "values", long=long))
            every.append(marked(name, impl, "gradients", long=long or impl != "scan"))
    return [form for form in every if not {*form.values} & {*but}]


EACH = [marked(name, long=False) for name in NAMES]
FORMS, FASTER = forms(), forms("scan")


def precision(impl, of):
    """float64 proves gradients, to 1e-10; float32 is for values, for the definition's gradients, and for kernels."""
    return np.float64 if of == "gradients" and impl not in ("scan", "pallas") else np.float32


@pytest.fixture(autouse=True)
def kernels_interpreted():
    with memzoo_kernels.interpreted("tpu"):
        yield


@pytest.fixture(autouse=True)
def in_its_precision(request):
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with jax.enable_x64("impl" in given and precision(given["impl"], given["of"]) == np.float64):
        yield


def make(name, impl="auto", dtype=jnp.float32, param_dtype=None):
    return memzoo.make(name, width=D, impl=impl, dtype=dtype, param_dtype=param_dtype or dtype, **FIELDS[name])


@functools.cache
def setup(name, dtype=np.float32):
    """Parameters, input, the state that another sequence left, resets, and weights that make a loss of all outputs.

    In NumPy, as is all that is compared: each operation of JAX outside of a jitted function compiles a program. In
    float64 they are the same numbers.
    """
    if dtype == np.float64:
        with jax.enable_x64(False):
            return jax.tree.map(lambda a: a.astype(wide(a.dtype)), setup(name))
    definition = memzoo.card(name).forms[0]
    mixer = make(name, definition)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, T, D)).astype(dtype)
    params = jax.jit(mixer.init)(jax.random.key(0), x[:, :1])
    # Every parameter away from 0 and 1, or the gradient of what it multiplies could not be seen.
    away = lambda p: np.asarray(p + 0.1 * rng.standard_normal(p.shape), p.dtype)
    params = jax.tree_util.tree_map_with_path(lambda path, p: p if fixed(path) else away(p), in_numpy(params))
    reset = np.zeros((B, T), bool)
    reset[0, [0, 20, 21]] = reset[1, [3, CUTS[2], T - 1]] = True
    normal = lambda s: rng.standard_normal(s.shape) + (1j * rng.standard_normal(s.shape) if np.iscomplexobj(s) else 0)
    weights = jax.tree.map(lambda s: normal(s).astype(s.dtype), (x, fresh(name)))
    other = params, 0.7 * x[::-1, ::-1], fresh(name), np.zeros_like(reset), weights
    _, (_, state) = whole(name, definition)(*other)
    return params, x, state, reset, weights


def wide(dtype):
    return {"float32": "float64", "complex64": "complex128"}.get(dtype.name, dtype)


@functools.cache
def fresh(name, dtype=np.float32):
    return in_numpy(make(name, dtype=dtype).initial_state(B))


def in_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def real(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def fixed(path):
    """Drawn once and never trained: no gradient reaches a reservoir, and what it is made to be it has to stay."""
    return "['reservoir']" in jax.tree_util.keystr(path)


def loss_of(y, state, weights):
    pairs = zip(jax.tree.leaves((y, state)), jax.tree.leaves(weights), strict=True)
    return sum((a * w).real.sum() for a, w in pairs if real(a))


def gradients(name, impl, dtype=np.float32):
    """(params, x, state, reset, weights) -> gradients in the first three, and the outputs."""
    mixer = make(name, impl, dtype)

    def loss(params, x, state, reset, weights):
        y, last = mixer.apply(params, x, state, reset)
        return loss_of(y, last, weights), (y, last)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True))


def values(name, impl, dtype=np.float32):
    """The same without the gradients: None instead, and the outputs."""
    mixer = make(name, impl, dtype)
    return jax.jit(lambda params, x, state, reset, weights: (None, mixer.apply(params, x, state, reset)))


@functools.lru_cache(maxsize=1)  # of the architecture at hand alone: programs take memory
def programs(name):
    return {}


def whole(name, impl, dtype=np.float32, of="gradients"):
    """`gradients` or `values`, compiled for T tokens. Programs of one text are one: 'auto' is one of the others."""
    known = programs(name)

    def run(*arguments):
        if (impl, dtype, of) not in known:
            function = gradients if of == "gradients" else values
            lowered = function(name, impl, dtype).lower(*arguments)
            text = lowered.as_text()
            known[text] = known.get(text) or lowered.compile()
            known[impl, dtype, of] = known[text]
        return in_numpy(known[impl, dtype, of](*arguments))

    return run


def in_pieces(name, impl, cuts):
    """`gradients` in several calls: the state goes from one to the next, its gradient from one to the one before."""
    run = programs(name).setdefault(impl, gradients(name, impl))

    def of_pieces(params, x, state, reset, weights):
        parts = [(x[:, i:j], reset[:, i:j], weights[0][:, i:j]) for i, j in itertools.pairwise(cuts)]
        unused, states, ys = weights[1], [state], []
        for x_part, reset_part, weights_part in parts:
            _, (y, last) = in_numpy(run(params, x_part, states[-1], reset_part, (weights_part, unused)))
            ys.append(y)
            states.append(last)
        d_params, d_state, d_xs = 0.0, weights[1], []
        for (x_part, reset_part, weights_part), before in zip(parts[::-1], states[-2::-1], strict=True):
            (d, d_x, d_state), _ = in_numpy(run(params, x_part, before, reset_part, (weights_part, d_state)))
            d_params = jax.tree.map(np.add, d, d_params) if d_xs else d
            d_xs.insert(0, d_x)
            d_before = d_state
            d_state = jax.tree.map(lambda g, w: g if real(g) else w, d_before, unused)
        return (d_params, np.concatenate(d_xs, axis=1), d_before), (np.concatenate(ys, axis=1), states[-1])

    return of_pieces


def assert_close(got, want, tolerance):
    """Relative rms, leaf by leaf; integers exactly. A leaf that should be 0 is measured against the largest leaf."""
    floor = max(float(np.max(np.abs(w))) for w in jax.tree.leaves(want) if real(w))
    for (path, w), g in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        where = jax.tree_util.keystr(path)
        assert g.shape == w.shape and g.dtype == w.dtype, where
        g, w = np.asarray(g), np.asarray(w)
        if not real(w):
            np.testing.assert_array_equal(g, w, err_msg=where)
            continue
        error = np.sqrt(np.mean(np.abs(g - w) ** 2)) if w.size else 0.0
        assert error <= tolerance * (np.sqrt(np.mean(np.abs(w) ** 2)) + 1e-3 * floor if w.size else 1), (where, error)


def all_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if real(leaf))


def largest(x):
    return np.abs(x).max()


def reset_at(t):
    return np.arange(T)[None].repeat(B, 0) == t


def since(x, t, change):
    """x with `change` made to what is at t and later."""
    return np.concatenate([x[:, :t], change(x[:, t:])], axis=1)


@pytest.mark.parametrize("name", EACH)
def test_shapes_and_dtypes(name):
    params, x, state, reset, weights = setup(name)
    _, (y, last) = whole(name, "auto", of="values")(params, x, state, reset, weights)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert all_finite((y, last))
    want = make(name).initial_state(B)
    assert jax.tree.structure(last) == jax.tree.structure(want)
    for got, expected in zip(jax.tree.leaves(last), jax.tree.leaves(want), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert got.shape[0] == B, "state is batch first"
        assert got.dtype in (jnp.float32, jnp.complex64, jnp.int32)
    half = make(name, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    y_half, last_half = jax.eval_shape(half.apply, params, x.astype(jnp.bfloat16), fresh(name), reset)
    assert y_half.dtype == jnp.bfloat16
    assert jax.tree.map(lambda s: s.dtype, last_half) == jax.tree.map(lambda s: s.dtype, want)


@pytest.mark.parametrize("name", EACH)
def test_no_state_is_the_initial_state(name):
    """Without state and resets, which has paths of its own, and of fewer tokens than a chunk; then one more token."""
    params, x, _, reset, weights = setup(name)
    few = CUTS[1]
    apply = jax.jit(make(name).apply)
    y, state = in_numpy(apply(params, x[:, :few]))
    next_y, state = in_numpy(apply(params, x[:, few : few + 1], state))
    by_token = in_pieces(name, memzoo.card(name).forms[0], range(few + 2))
    _, want = by_token(params, x, fresh(name), np.zeros_like(reset), weights)
    assert_close((np.concatenate([y, next_y], axis=1), state), want, 1e-5)


@pytest.mark.parametrize(("name", "impl", "of"), FASTER)
def test_forms_agree(name, impl, of):
    dtype, definition = precision(impl, of), memzoo.card(name).forms[0]
    arguments = setup(name, dtype)
    got, want = (whole(name, form, dtype, as_of)(*arguments) for form, as_of in ((impl, of), (definition, "gradients")))
    if of == "values":
        got, want = got[1], want[1]
    assert_close(got, want, 1e-10 if dtype == np.float64 else 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_float64_is_float64(name):
    """Of parameters, outputs and state; and the definition is in float32 what it is in float64, gradients too."""
    with jax.enable_x64(True):
        mixer, (params, x, *_) = make(name, dtype=np.float64), setup(name, np.float64)
        drawn = jax.eval_shape(mixer.init, jax.random.key(0), x[:, :1])
        assert jax.tree.map(lambda p: (p.shape, p.dtype), drawn) == jax.tree.map(lambda p: (p.shape, p.dtype), params)
        definition = memzoo.card(name).forms[0]
        want = whole(name, definition, np.float64)(*setup(name, np.float64))
        assert all(leaf.dtype in (np.float64, np.complex128, np.int32) for leaf in jax.tree.leaves(want[1]))
    got = whole(name, definition)(*setup(name))
    assert_close(jax.tree.map(lambda a: a.astype(wide(a.dtype)), got), want, 1e-3)


@pytest.mark.parametrize("name", EACH)
def test_pieces_equal_the_whole(name):
    """Token by token. A form that agrees, in its last state and the gradient of its first, goes in pieces so, too."""
    definition = memzoo.card(name).forms[0]
    got = in_pieces(name, definition, range(T + 1))(*setup(name))
    assert_close(got, whole(name, definition)(*setup(name)), 1e-5)


@pytest.mark.parametrize(("name", "impl", "of"), forms("pallas"))  # which is interpreted, and agrees as it is
def test_a_reset_begins_a_new_sequence(name, impl, of):
    """Each stretch between resets comes out as it does alone, at the head of a call without state or resets."""
    dtype = precision(impl, of)
    params, x, state, reset, weights = setup(name, dtype)
    run = whole(name, impl, dtype, of)
    _, (y, _) = run(params, x, state, reset, weights)
    for row in range(B):
        starts = [t for t in range(T) if reset[row, t]]
        for start, end in zip(starts, [*starts[1:], T], strict=True):
            alone = np.roll(x, -start, axis=1)
            _, (y_alone, _) = run(params, alone, fresh(name, dtype), np.zeros_like(reset), weights)
            assert largest(y[row, start:end] - y_alone[row, : end - start]) < 1e-5 * largest(y), (row, start)


@pytest.mark.parametrize(("name", "impl", "of"), FORMS)
def test_nothing_crosses_a_reset(name, impl, of):
    """Neither outputs nor the final state nor any gradient know what was before: other tokens, another state, NaN."""
    dtype = precision(impl, of)
    params, x, state, _, weights = setup(name, dtype)
    run = whole(name, impl, dtype, of)
    broken = jax.tree.map(lambda s: np.full_like(s, np.nan if real(s) else 5), state)
    clean = run(params, x, fresh(name, dtype), reset_at(0), weights)
    dirty = run(params, x, broken, reset_at(0), weights)
    assert all_finite(dirty)
    assert_close(dirty, clean, 1e-6)

    at = 33
    late = (weights[0] * (np.arange(T) >= at)[:, None].astype(dtype), weights[1])
    one = run(params, x, state, reset_at(at), late)
    other = np.concatenate([x[:, :at] * 3 + 1, x[:, at:]], axis=1)
    two = run(params, other, jax.tree.map(np.zeros_like, state), reset_at(at), late)
    assert_close(one[1][0][:, at:], two[1][0][:, at:], 1e-6)
    assert_close(one[1][1], two[1][1], 1e-6)
    if of == "values":
        return
    assert_close(one[0][0], two[0][0], 1e-5)
    d_x, d_state = one[0][1:]
    rounding = 0 if impl in ("scan", "associative") else 1e-6  # where sums over a whole chunk cancel
    assert largest(d_x[:, :at]) <= rounding * largest(d_x), "gradient of the tokens before the reset"
    assert all(not real(g) or largest(g) <= rounding * largest(d_x) for g in jax.tree.leaves(d_state))


@pytest.mark.parametrize(("name", "impl", "of"), forms("chunk", "conv", "newton", "pallas"))
def test_inf_does_not_reach_the_next_sequence(name, impl, of):
    dtype = precision(impl, of)
    params, x, state, _, weights = setup(name, dtype)
    infinite = x.copy()
    infinite[:, 10] = np.inf
    _, (y, last) = whole(name, impl, dtype, of)(params, infinite, state, reset_at(33), weights)
    assert not np.isfinite(y[:, 10:33]).all(), "the test itself"
    assert np.isfinite(y[:, 33:]).all() and all_finite(last)


@pytest.mark.parametrize(("name", "impl", "of"), forms("pallas"))
def test_causal_and_rows_apart(name, impl, of):
    dtype = precision(impl, of)
    params, x, state, reset, weights = setup(name, dtype)
    run = whole(name, impl, dtype, of)
    _, (y, last) = run(params, x, state, reset, weights)
    for t in (1, 20, 64, T - 1):
        _, (future, _) = run(params, since(x, t, lambda x: x + 1), state, reset, weights)
        assert largest(future[:, :t] - y[:, :t]) < 1e-5 * largest(y)
        assert largest(future[:, t:] - y[:, t:]) > 1e-4 * largest(y)
    row = lambda tree, b: jax.tree.map(lambda leaf: leaf[b], tree)
    first = lambda leaf, changed: np.concatenate([changed(leaf[:1]), leaf[1:]])
    moved = jax.tree.map(lambda s: first(s, lambda s: 2 * s), state)
    _, other = run(params, first(x, lambda x: x + 1), moved, reset, weights)
    assert_close(row(other, 1), row((y, last), 1), 1e-6)


@pytest.mark.parametrize("name", EACH)
def test_every_parameter_and_every_state_matters(name):
    params, x, state, reset, weights = setup(name)
    found, _ = whole(name, memzoo.card(name).forms[0])(params, x, state, np.zeros_like(reset), weights)
    assert all_finite(found)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert not real(leaf) or np.any(leaf != 0) != fixed(path), jax.tree_util.keystr(path)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_difference_quotient(name):
    """The definition's own gradient, in float64, along a random direction of parameters, input and state."""
    definition = memzoo.card(name).forms[0]
    with jax.enable_x64(True):
        params, x, state, reset, weights = setup(name, np.float64)
        run = whole(name, definition, np.float64)
        found, _ = run(params, x, state, reset, weights)
        rng = np.random.default_rng(5)
        free = lambda path, a: rng.standard_normal(a.shape) if real(a) and not fixed(path) else 0
        along = jax.tree_util.tree_map_with_path(free, (params, x, state))

        def f(e):
            moved = jax.tree.map(lambda a, d: a + e * d if real(a) else a, (params, x, state), along)
            _, (y, last) = run(*moved, reset, weights)
            return loss_of(y, last, weights)

        products = jax.tree.map(lambda g, d: float(np.real(np.sum(g * d))) if real(g) else 0.0, found, along)
        e = 1e-6
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), (f(e) - f(-e)) / (2 * e), rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_the_batch(name):
    params, x, state, reset, weights = setup(name)
    mixer, definition = make(name), memzoo.card(name).forms[0]
    alone = lambda x, s: jax.tree.map(lambda a: a[0], mixer.apply(params, x[None], jax.tree.map(lambda a: a[None], s)))
    _, want = whole(name, definition)(params, x, state, np.zeros_like(reset), weights)
    assert_close(jax.jit(jax.vmap(alone))(x, state), want, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", EACH)
def test_bfloat16_stays_near_float32(name):
    """Of the same input: what its own rounding does is the function's affair, and not the computation's."""
    params, x, _, reset, weights = setup(name)
    x_half = x.astype(jnp.bfloat16)
    _, (y, state) = whole(name, memzoo.card(name).forms[0])(
        params, x_half.astype(x.dtype), fresh(name), np.zeros_like(reset), weights
    )
    half = make(name, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    y_half, state_half = in_numpy(jax.jit(half.apply)(params, x_half, fresh(name)))
    assert y_half.dtype == jnp.bfloat16
    assert [s.dtype for s in jax.tree.leaves(state_half)] == [s.dtype for s in jax.tree.leaves(state)]
    assert_close(y_half.astype(np.float32), y, 2e-2)
    assert_close(state_half, state, 2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name):
    call, state, reset = make(name).apply, fresh(name), np.zeros((B, T), bool)
    x = np.zeros((B, T, D), np.float32)
    shapes = jax.eval_shape(make(name).init, jax.random.key(0), x)  # nothing is computed before it is refused
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    with pytest.raises(ValueError, match=r"x_BTD: expected shape \[B, T >= 1, D = 12\], got \[2, 72, 11\]"):
        call(params, x[..., :-1])
    with pytest.raises(ValueError, match=r"x_BTD: .* got \[72, 12\]"):
        call(params, x[0])
    with pytest.raises(ValueError, match=r"x_BTD: .* got \[2, 0, 12\]"):
        call(params, x[:, :0])
    with pytest.raises(ValueError, match="x_BTD: expected a floating dtype, got int32"):
        call(params, x.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"x_BTD: expected B >= 1, got shape \[0, 72, 12\]"):
        call(params, x[:0])
    with pytest.raises(ValueError, match="x_BTD: expected an array, got "):
        call(params, x.tolist())
    with pytest.raises(ValueError, match="reset_BT: expected an array, got "):
        call(params, x, state, reset.tolist())
    with pytest.raises(ValueError, match=r"state.*: expected shape \[2, .* got \[1, "):
        call(params, x, jax.tree.map(lambda s: s[:1], state))
    with pytest.raises(ValueError, match=rf"state: expected memzoo\.mixers\.{name}\.State, got "):
        call(params, x, tuple(state))
    with pytest.raises(ValueError, match=r"reset_BT: expected shape \[B = 2, T = 72\], got \[2, 71\]"):
        call(params, x, state, reset[:, 1:])
    with pytest.raises(ValueError, match="reset_BT: expected dtype bool, got float32"):
        call(params, x, state, reset.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"impl: .*did you mean"):
        make(name, "scann").apply(params, x)
    lacking = next(impl for impl in reversed(IMPLS) if impl not in memzoo.card(name).forms)
    with pytest.raises(NotImplementedError, match=f"impl: .* has no form '{lacking}'"):
        make(name, lacking).apply(params, x)
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
