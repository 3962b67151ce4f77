"""linear_attention and delta_rule: every form computes the definition, whatever the keys, decays, resets and chunk."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops
from memzoo.ops import chunks

B, T, H, K, V = 2, 39, 3, 8, 5
CHUNK = 16  # two whole chunks and a piece
KEYS = ("random", "correlated", "identical")
DECAYS = ("weak", "strong", "mixed", "infinite")


def make(keys, decay, per_key, seed=0):
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((B, T, H, K)) * {"random": 1, "correlated": 0.3, "identical": 0.01}[keys]
    k += 0 if keys == "random" else rng.standard_normal((B, 1, H, K))
    shape = (B, T, H, K) if per_key else (B, T, H)
    log_decay = {
        "weak": -0.01 * rng.uniform(size=shape),
        "strong": -20 * rng.uniform(0.5, 1, shape),
        "mixed": -np.exp(rng.uniform(np.log(1e-3), np.log(300), shape)),
        "infinite": np.where(rng.uniform(size=shape) < 0.1, -np.inf, -0.1),
    }[decay]
    return {
        "q": rng.standard_normal((B, T, H, K)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((B, T, H, V)),
        "beta": rng.uniform(0, 1, (B, T, H)),
        "log_decay": log_decay,
        "S": rng.standard_normal((B, H, K, V)),
    }


def some_resets():
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, [0, 20, 21]] = True  # the first token, two in a row
    reset_BT[1, [3, 9, T - 1]] = True  # two in one chunk, the last token
    return reset_BT


def numpy_delta(q, k, v, log_decay, S, reset, beta):
    """Both recurrences written out in float64, as loops over rows, heads and tokens."""
    y, S = np.zeros((B, T, H, V)), np.array(S, np.float64)
    for b in range(B):
        for h in range(H):
            M = S[b, h].copy()
            for t in range(T):
                M = np.zeros((K, V)) if reset[b, t] else M
                M = np.diag(np.exp(np.broadcast_to(log_decay[b, t, h], K))) @ M
                write = v[b, t, h] if beta is None else beta[b, t, h] * (v[b, t, h] - M.T @ k[b, t, h])
                M = M + np.outer(k[b, t, h], write)
                y[b, t, h] = M.T @ q[b, t, h]
            S[b, h] = M
    return y, S


def run(op, impl, **settings):
    """Outputs, final state and the gradients of a random function of both, in every array."""

    def loss(arrays, reset, w_y, w_S):
        y, S = op(**arrays, reset_BT=reset, impl=impl, **settings)
        return jnp.sum(y * w_y) + jnp.sum(S * w_S), (y, S)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def linear(q, k, v, beta, log_decay, S, **settings):
    return ops.linear_attention(q, k, v, log_decay, S, **settings)


def delta(q, k, v, beta, log_decay, S, **settings):
    return ops.delta_rule(q, k, v, beta, log_decay, S, **settings)


OPS = {"linear_attention": linear, "delta_rule": delta}
FORMS = {"scan": {}, "associative": {}, "chunk": {"chunk": CHUNK}}
RUN = {(name, impl): run(op, impl, **settings) for name, op in OPS.items() for impl, settings in FORMS.items()}


def relative(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.sqrt(np.mean((a - b) ** 2)) / (np.sqrt(np.mean(b**2)) + 1e-30)


def check(name, impl, arrays, reset, dtype, tolerance):
    rng = np.random.default_rng(7)
    weights = [rng.standard_normal(shape).astype(dtype) for shape in ((B, T, H, V), (B, H, K, V))]
    arrays = {key: jnp.asarray(a, dtype) for key, a in arrays.items() if a is not None}
    arrays.setdefault("log_decay", None)
    (_, (y, S)), gradients = RUN[name, impl](arrays, reset, *weights)
    (_, (want_y, want_S)), want = RUN[name, "scan"](arrays, reset, *weights)
    assert y.dtype == S.dtype == dtype
    assert relative(y, want_y) < tolerance and relative(S, want_S) < tolerance
    for key, gradient in gradients.items():
        if (name == "linear_attention" and key == "beta") or gradient is None:
            continue
        assert np.isfinite(gradient).all(), key
        assert relative(gradient, want[key]) < tolerance, key


@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
@pytest.mark.parametrize("name", OPS)
def test_the_definition_is_the_equation(name, per_key):
    reset = some_resets()
    a = make("correlated", "mixed", per_key)
    with jax.enable_x64(True):
        y, S = OPS[name](**{key: jnp.asarray(x) for key, x in a.items()}, reset_BT=jnp.asarray(reset), impl="scan")
    a["beta"] = a["beta"] if name == "delta_rule" else None
    want_y, want_S = numpy_delta(**a, reset=reset)
    np.testing.assert_allclose(y, want_y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(S, want_S, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
@pytest.mark.parametrize("impl", (pytest.param("associative", marks=pytest.mark.long), "chunk"))
@pytest.mark.parametrize("name", OPS)
def test_forms_agree(name, impl, per_key, decay):
    for seed, keys in enumerate(KEYS):
        for reset in (some_resets(), np.zeros((B, T), bool)):
            check(name, impl, make(keys, decay, per_key, seed), reset, np.float32, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
@pytest.mark.parametrize("impl", ("associative", "chunk"))
@pytest.mark.parametrize("name", OPS)
def test_forms_agree_in_float64(name, impl, per_key):
    with jax.enable_x64(True):
        for seed, keys in enumerate(KEYS):
            for decay in DECAYS:
                check(name, impl, make(keys, decay, per_key, seed), some_resets(), np.float64, 1e-10)


@pytest.mark.long
@pytest.mark.parametrize("name", OPS)
def test_no_decay_is_a_decay_of_zero(name):
    a = make("random", "weak", False)
    for impl, settings in FORMS.items():
        none = OPS[name](**{**a, "log_decay": None}, impl=impl, **settings)
        zero = OPS[name](**{**a, "log_decay": np.zeros((B, T, H, K))}, impl=impl, **settings)
        for x, y in zip(none, zero, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("length", (1, 2, CHUNK - 1, CHUNK, CHUNK + 1))
@pytest.mark.parametrize("name", OPS)
def test_any_length(name, length):
    a = make("correlated", "mixed", True)
    a = {key: x[:, :length] if key != "S" else x for key, x in a.items()}
    reset = some_resets()[:, :length]
    want_y, want_S = OPS[name](**a, reset_BT=reset, impl="scan")
    y, S = OPS[name](**a, reset_BT=reset, impl="chunk", chunk=CHUNK)
    assert relative(y, want_y) < 1e-5 and relative(S, want_S) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("chunk", (1, 7, 24, 40))
def test_any_chunk(chunk):
    a = make("correlated", "mixed", True)
    want_y, want_S = delta(**a, reset_BT=some_resets(), impl="scan")
    y, S = delta(**a, reset_BT=some_resets(), impl="chunk", chunk=chunk)
    assert relative(y, want_y) < 1e-5 and relative(S, want_S) < 1e-5


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("name", OPS)
def test_nan_does_not_cross_a_reset_at_the_first_token(name, impl):
    a = {key: jnp.asarray(x, jnp.float32) for key, x in make("random", "weak", False).items()}
    reset = np.zeros((B, T), bool)
    reset[:, 0] = True
    ones = np.ones((B, T, H, V), np.float32), np.ones((B, H, K, V), np.float32)
    clean = RUN[name, impl]({**a, "S": jnp.zeros_like(a["S"])}, reset, *ones)
    dirty = RUN[name, impl]({**a, "S": jnp.full_like(a["S"], np.nan)}, reset, *ones)
    for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("impl", ("scan", "associative"))
@pytest.mark.parametrize("name", OPS)
def test_inf_does_not_reach_the_next_sequence(name, impl):
    a = make("random", "weak", False)
    a["v"][:, 10] = np.inf
    reset = np.zeros((B, T), bool)
    reset[:, 20] = True
    y, S = OPS[name](**a, reset_BT=reset, impl=impl)
    assert np.isfinite(y[:, 20:]).all() and np.isfinite(S).all() and not np.isfinite(y[:, 10:20]).all()


def test_last_write_reads_back_exactly():
    a = make("random", "weak", False)
    y, _ = delta(**{**a, "q": a["k"], "beta": np.ones((B, T, H))}, impl="chunk", chunk=CHUNK)
    np.testing.assert_allclose(y, a["v"], atol=3e-6)


def test_keys_are_the_first_axis_of_the_state():
    """With orthonormal keys the state is the table of the last value written under each."""
    a = make("random", "weak", False)
    T, k = K, np.eye(K)[None, :, None, :].repeat(B, 0).repeat(H, 2)
    v = a["v"][:, :T]
    _, S = ops.delta_rule(k, k, v, np.ones((B, T, H)), impl="chunk", chunk=4)
    np.testing.assert_allclose(S, np.moveaxis(v, 1, 2), atol=1e-6)


@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
@pytest.mark.parametrize("name", OPS)
@pytest.mark.cases(1)
def test_bfloat16_inputs_keep_a_float32_state(name, per_key):
    a = make("correlated", "weak", per_key)
    want_y, want_S = OPS[name](**a, impl="scan")
    half = {key: jnp.asarray(x, jnp.bfloat16) if key in "qkv" else x for key, x in a.items()}
    y, S = OPS[name](**half, impl="chunk", chunk=CHUNK)
    assert y.dtype == jnp.bfloat16 and S.dtype == jnp.float32
    assert relative(np.asarray(y, np.float32), want_y) < 2e-2 and relative(S, want_S) < 2e-2


def test_products_of_bfloat16_are_summed_in_float32():
    """257 ones: bfloat16 has 256 and 258."""
    ones = jnp.ones((3, 257), jnp.bfloat16)
    total = chunks.matmul("ik,jk->ij", ones, ones)
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, 257)


def test_inverse_holds_for_correlated_keys():
    """Against float64, where Neumann doubling errs by 1e2 to 1e22."""
    rng = np.random.default_rng(0)
    C = 64
    for spread, beta in ((1e9, 1), (0.3, 1), (0.02, 1), (0.02, 2)):
        k = rng.standard_normal((4, 1, 24)) + min(spread, 1e3) * rng.standard_normal((4, C, 24))
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        A = np.tril(beta * (k @ k.transpose(0, 2, 1)), -1)
        error = np.abs(chunks.unit_lower_inverse(jnp.asarray(A, jnp.float32)) - np.linalg.inv(np.eye(C) + A)).max()
        assert error < (3e-4 if beta == 2 else 5e-6)


@pytest.mark.parametrize("op", (ops.linear_attention, ops.delta_rule), ids=OPS)
def test_bad_arguments_are_named(op):
    a = make("random", "weak", False)
    q, k, v, ld, S = (a[x] for x in ("q", "k", "v", "log_decay", "S"))
    call = (lambda *x, **y: op(*x[:3], a["beta"], *x[3:], **y)) if op is ops.delta_rule else op
    with pytest.raises(ValueError, match=r"k_BTHK: expected K = 8 as in q_BTHK, got shape \[2, 39, 3, 7\]"):
        call(q, k[..., :-1], v)
    with pytest.raises(ValueError, match=r"v_BTHV: expected 4 axes \[B, T, H, V\]"):
        call(q, k, v[0])
    with pytest.raises(ValueError, match="q_BTHK: expected a floating dtype, got int"):
        call(q.astype(int), k, v)
    with pytest.raises(ValueError, match="T >= 1"):
        call(*(x[:, :0] for x in (q, k, v)))
    with pytest.raises(ValueError, match="log_decay_BTH: expected H = 3"):
        call(q, k, v, ld[..., :2])
    with pytest.raises(ValueError, match="S_BHKV: expected V = 5"):
        call(q, k, v, ld, S[..., :4])
    with pytest.raises(ValueError, match="reset_BT: expected dtype bool"):
        call(q, k, v, ld, S, np.zeros((B, T)))
    with pytest.raises(ValueError, match="did you mean chunk"):
        call(q, k, v, impl="chunks")
    with pytest.raises(NotImplementedError, match="no form 'newton'"):
        call(q, k, v, impl="newton")
    with pytest.raises(NotImplementedError, match="no form 'sweep'"):  # which linear_scan has
        call(q, k, v, impl="sweep")
    with pytest.raises(ValueError, match="chunk: expected an integer >= 1, got 0"):
        call(q, k, v, impl="chunk", chunk=0)


@pytest.mark.long
@pytest.mark.parametrize("name", OPS)
def test_chunk_is_twice_differentiable(name):
    """The gradient of the squared norm of the gradient, in q, k and v, is that of the definition."""
    a = {key: jnp.asarray(x, jnp.float32) for key, x in make("correlated", "weak", False).items()}
    a = {key: x[:, :19] if key != "S" else x for key, x in a.items()}

    def twice(impl):
        once = lambda qkv: jnp.sum(OPS[name](**{**a, **qkv}, impl=impl, chunk=8)[0] ** 2)
        norm = lambda qkv: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(once)(qkv)))
        return jax.jit(jax.grad(norm))({key: a[key] for key in "qkv"})

    want = twice("scan")
    for key, gradient in twice("chunk").items():
        assert relative(gradient, want[key]) < 1e-5


def test_long_chunks_stay_exact_under_very_strong_decay():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 512, 1, 4)).astype("f") for _ in range(3))
    log_decay = np.where(rng.uniform(size=(1, 512, 1)) < 0.7, -1e4, -0.01).astype("f")
    y, S = ops.linear_attention(q, k, v, log_decay, impl="chunk", chunk=512)
    want_y, want_S = ops.linear_attention(q, k, v, log_decay, impl="scan")
    assert relative(y, want_y) < 1e-5 and relative(S, want_S) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("name", OPS)
def test_mixed_dtypes_take_the_widest(name, impl):
    a = make("random", "weak", True)
    with jax.enable_x64(True):
        narrow = {key: jnp.asarray(x, jnp.float32 if key in "vS" else jnp.float64) for key, x in a.items()}
        y, S = OPS[name](**narrow, impl=impl)
        assert y.dtype == jnp.float32 and S.dtype == jnp.float64
        narrow = {key: jnp.asarray(x, jnp.float64 if key == "S" else jnp.float32) for key, x in a.items()}
        y, S = OPS[name](**narrow, impl=impl)
        assert y.dtype == jnp.float32 and S.dtype == jnp.float64


@pytest.mark.parametrize("name", OPS)
@pytest.mark.cases(1)
def test_a_call_outside_of_jit_compiles_once(name):
    forms = sys.modules[f"memzoo.ops.{name}"]._forms
    arrays = make("random", "weak", False)
    OPS[name](**arrays, chunk=CHUNK)
    compiled = forms._cache_size()
    OPS[name](**arrays, chunk=CHUNK)
    assert compiled == forms._cache_size() > 0


@pytest.mark.long
@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
@pytest.mark.parametrize("impl", FORMS)
def test_the_sum_of_the_weights_is_the_memory_of_ones(impl, per_key):
    """Outputs, states and every gradient of normalised_linear_attention are those of one more value, always 1."""
    arrays = {key: jnp.asarray(a, jnp.float32) for key, a in make("correlated", "mixed", per_key).items()}
    q, k, v, log_decay, S = (arrays[key] for key in ("q", "k", "v", "log_decay", "S"))
    rng = np.random.default_rng(8)
    z = jnp.asarray(rng.standard_normal((B, H, K)), jnp.float32)
    w_y, w_S = (rng.standard_normal(shape) for shape in ((B, T, H, V + 1), (B, H, K, V + 1)))
    reset = some_resets()

    def beside(q, k, v, log_decay, S, z):
        y, total, S, z = ops.normalised_linear_attention(q, k, v, log_decay, S, z, reset, impl=impl, **FORMS[impl])
        return jnp.concatenate([y, total[..., None]], -1), jnp.concatenate([S, z[..., None]], -1)

    def as_a_value(q, k, v, log_decay, S, z):
        v, S = jnp.pad(v, [(0, 0)] * 3 + [(0, 1)], constant_values=1), jnp.concatenate([S, z[..., None]], -1)
        return ops.linear_attention(q, k, v, log_decay, S, reset, impl="scan")

    def with_gradients(f):
        loss = lambda *args: jnp.sum(f(*args)[0] * w_y) + jnp.sum(f(*args)[1] * w_S)
        return jax.jit(lambda *args: (f(*args), jax.grad(loss, argnums=range(6))(*args)))

    args = q, k, v, log_decay, S, z
    for got, want in zip(*(jax.tree.leaves(with_gradients(f)(*args)) for f in (beside, as_a_value)), strict=True):
        assert relative(got, want) < 1e-5
