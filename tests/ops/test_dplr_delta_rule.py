"""dplr_delta_rule: every form computes the definition; the delta rule and gated linear attention are cases of it."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import ops

B, T, H, K, V = 2, 39, 3, 8, 5
CHUNK = 16  # two whole chunks and a piece
FORMS = {"scan": {}, "associative": {}, "chunk": {"chunk": CHUNK}}
DECAYS = ("weak", "strong", "mixed", "infinite")
CASES = ("delta", "rwkv7", "any")


def make(case, decay, per_key=True, seed=0):
    """Transitions that do not grow the state: the delta rule's with nearly one key, RWKV-7's, and small random ones."""
    rng = np.random.default_rng(seed)
    log_decay = {
        "weak": -0.01 * rng.uniform(size=(B, T, H, K)),
        "strong": -20 * rng.uniform(0.5, 1, (B, T, H, K)),
        "mixed": -np.exp(rng.uniform(np.log(1e-3), np.log(300), (B, T, H, K))),
        "infinite": np.where(rng.uniform(size=(B, T, H, K)) < 0.1, -np.inf, -0.1),
    }[decay]
    log_decay = log_decay if per_key else log_decay[..., 0]
    q, k, a, b = rng.standard_normal((4, B, T, H, K))
    v, S = rng.standard_normal((B, T, H, V)), rng.standard_normal((B, H, K, V))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    if case == "delta":
        k, beta = unit(0.05 * k + rng.standard_normal((B, 1, H, K))), rng.uniform(size=(B, T, H, 1))
        a, b, k = np.exp(log_decay if per_key else log_decay[..., None]) * k, -beta * k, beta * k
    elif case == "rwkv7":
        a = unit(0.3 * a + rng.standard_normal((B, 1, H, K)))
        b = -rng.uniform(size=a.shape) * a
    else:
        a, b = 0.5 * unit(a), 0.5 * unit(b)
    return {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay, "S": S}


def some_resets():
    reset_BT = np.zeros((B, T), bool)
    reset_BT[0, [0, 20, 21]] = True  # the first token, two in a row
    reset_BT[1, [3, 9, CHUNK, T - 1]] = True  # two in one chunk, about where one begins, the last token
    return reset_BT


@functools.cache
def run(impl):
    """Outputs, final state and the gradients of a random function of both, in every array."""

    def loss(arrays, reset, w_y, w_S):
        y, S = call(**arrays, reset_BT=reset, impl=impl, **FORMS[impl])
        return jnp.sum(y * w_y) + jnp.sum(S * w_S), (y, S)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def call(q, k, v, a, b, log_decay, S, **settings):
    return ops.dplr_delta_rule(q, k, v, a, b, log_decay, S, **settings)


def relative(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.sqrt(np.mean((a - b) ** 2)) / (np.sqrt(np.mean(b**2)) + 1e-30)


def check(impl, arrays, reset, dtype, tolerance):
    rng = np.random.default_rng(7)
    weights = [rng.standard_normal(shape).astype(dtype) for shape in (arrays["v"].shape, (B, H, K, V))]
    arrays = {key: x.astype(dtype) for key, x in arrays.items()}
    (_, (y, S)), gradients = run(impl)(arrays, reset, *weights)
    (_, (want_y, want_S)), want = run("scan")(arrays, reset, *weights)
    assert y.dtype == S.dtype == dtype
    assert relative(y, want_y) < tolerance and relative(S, want_S) < tolerance
    for key, gradient in gradients.items():
        assert np.isfinite(gradient).all(), key
        assert relative(gradient, want[key]) < tolerance, (key, relative(gradient, want[key]))


@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
def test_the_definition_is_the_equation(per_key):
    """Matrices written out, in float64."""
    arrays, reset = make("any", "mixed", per_key), some_resets()
    with jax.enable_x64(True):
        y, last = call(**{key: jnp.asarray(x) for key, x in arrays.items()}, reset_BT=reset, impl="scan")
    q, k, v, a, b, log_decay, S = arrays.values()
    for row in range(B):
        for h in range(H):
            M = S[row, h]
            for t in range(T):
                M = np.zeros((K, V)) if reset[row, t] else M
                decay = np.diag(np.exp(np.broadcast_to(log_decay[row, t, h], K)))
                M = (decay + np.outer(b[row, t, h], a[row, t, h])) @ M + np.outer(k[row, t, h], v[row, t, h])
                np.testing.assert_allclose(y[row, t, h], M.T @ q[row, t, h], rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(last[row, h], M, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
@pytest.mark.parametrize("impl", ("associative", "chunk"))
@pytest.mark.cases(2)
def test_forms_agree(impl, per_key, decay):
    for seed, case in enumerate(CASES):
        for reset in (some_resets(), np.zeros((B, T), bool)):
            check(impl, make(case, decay, per_key, seed), reset, np.float32, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
@pytest.mark.parametrize("impl", ("associative", "chunk"))
def test_forms_agree_in_float64(impl, per_key):
    with jax.enable_x64(True):
        for seed, case in enumerate(CASES):
            for decay in DECAYS:
                check(impl, make(case, decay, per_key, seed), some_resets(), np.float64, 1e-10)


@pytest.mark.long
@pytest.mark.parametrize("impl", FORMS)
def test_the_delta_rule_is_a_case(impl):
    """a = exp(log_decay) k, b = -beta k, beta k for k: outputs, states and gradients, in what both have."""
    rng = np.random.default_rng(0)
    arrays = make("delta", "mixed")
    arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    arrays["beta"] = rng.uniform(size=(B, T, H))
    q, k, v, log_decay, S, beta = (arrays[key].astype("f") for key in ("q", "k", "v", "log_decay", "S", "beta"))
    w_y, w_S = rng.standard_normal((B, T, H, V)), rng.standard_normal((B, H, K, V))

    def ours(q, k, v, beta, log_decay, S):
        b = -beta[..., None] * k
        return ops.dplr_delta_rule(q, -b, v, jnp.exp(log_decay) * k, b, log_decay, S, some_resets(), impl=impl)

    def theirs(q, k, v, beta, log_decay, S):
        return ops.delta_rule(q, k, v, beta, log_decay, S, some_resets(), impl=impl)

    def with_gradients(f):
        loss = lambda *args: jnp.sum(f(*args)[0] * w_y) + jnp.sum(f(*args)[1] * w_S)
        return jax.jit(lambda *args: (f(*args), jax.grad(loss, argnums=range(6))(*args)))

    args = q, k, v, beta, log_decay, S
    for got, want in zip(*(jax.tree.leaves(with_gradients(f)(*args)) for f in (ours, theirs)), strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("nothing", ("a", "b"))
@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.cases(1)
def test_gated_linear_attention_is_a_case(impl, nothing):
    arrays = make("any", "mixed") | {nothing: np.zeros((B, T, H, K))}
    got = call(**arrays, reset_BT=some_resets(), impl=impl)
    q, k, v, _, _, log_decay, S = arrays.values()
    for one, other in zip(got, ops.linear_attention(q, k, v, log_decay, S, some_resets(), impl=impl), strict=True):
        assert relative(one, other) < 1e-6


def test_what_is_read_has_not_decayed():
    """A decay to 0 of all that was held, and yet it moves from e_1 to e_2."""
    e = np.eye(K, dtype="f")
    S = np.random.default_rng(0).standard_normal((1, 1, K, V)).astype("f")
    args = (x.reshape(1, 1, 1, -1) for x in (e[2], 0 * e[0], np.zeros(V, "f"), e[1], e[2], np.full(K, -np.inf, "f")))
    y, last = ops.dplr_delta_rule(*args, S, impl="chunk")
    np.testing.assert_allclose(y[0, 0, 0], S[0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(last[0, 0], np.outer(e[2], S[0, 0, 1]), rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("length", (1, 2, CHUNK - 1, CHUNK, CHUNK + 1))
def test_any_length(length):
    arrays = {key: x[:, :length] if key != "S" else x for key, x in make("rwkv7", "mixed").items()}
    want = call(**arrays, reset_BT=some_resets()[:, :length], impl="scan")
    got = call(**arrays, reset_BT=some_resets()[:, :length], impl="chunk", chunk=CHUNK)
    assert relative(got[0], want[0]) < 1e-5 and relative(got[1], want[1]) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("chunk", (1, 7, 24, 40))
def test_any_chunk(chunk):
    arrays = make("rwkv7", "mixed")
    want = call(**arrays, reset_BT=some_resets(), impl="scan")
    got = call(**arrays, reset_BT=some_resets(), impl="chunk", chunk=chunk)
    assert relative(got[0], want[0]) < 1e-5 and relative(got[1], want[1]) < 1e-5


@pytest.mark.parametrize("impl", FORMS)
def test_nan_does_not_cross_a_reset_at_the_first_token(impl):
    arrays = {key: x.astype("f") for key, x in make("any", "weak").items()}
    reset = np.arange(T)[None].repeat(B, 0) == 0
    ones = np.ones((B, T, H, V), np.float32), np.ones((B, H, K, V), np.float32)
    clean = run(impl)({**arrays, "S": np.zeros_like(arrays["S"])}, reset, *ones)
    dirty = run(impl)({**arrays, "S": np.full_like(arrays["S"], np.nan)}, reset, *ones)
    for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("impl", ("scan", "associative"))
def test_inf_does_not_reach_the_next_sequence(impl):
    arrays = make("any", "weak")
    arrays["v"][:, 10] = np.inf
    y, S = call(**arrays, reset_BT=np.arange(T)[None].repeat(B, 0) == 20, impl=impl)
    assert np.isfinite(y[:, 20:]).all() and np.isfinite(S).all() and not np.isfinite(y[:, 10:20]).all()


@pytest.mark.long
def test_bfloat16_inputs_keep_a_float32_state():
    arrays = make("rwkv7", "weak")
    want_y, want_S = call(**arrays, impl="scan")
    half = {key: jnp.asarray(x, jnp.bfloat16) if key in "qkvab" else x for key, x in arrays.items()}
    y, S = call(**half, impl="chunk", chunk=CHUNK)
    assert y.dtype == jnp.bfloat16 and S.dtype == jnp.float32
    assert relative(np.asarray(y, np.float32), want_y) < 2e-2 and relative(S, want_S) < 2e-2


@pytest.mark.long
def test_no_decay_is_a_decay_of_zero():
    arrays = make("rwkv7", "weak")
    for impl, settings in FORMS.items():
        none = call(**{**arrays, "log_decay": None}, impl=impl, **settings)
        zero = call(**{**arrays, "log_decay": np.zeros((B, T, H, K))}, impl=impl, **settings)
        assert relative(none[0], zero[0]) < 1e-5 and relative(none[1], zero[1]) < 1e-5


@pytest.mark.long
def test_chunk_is_twice_differentiable():
    """The gradient of the squared norm of the gradient is that of the definition."""
    arrays = {key: x[:, :19].astype("f") if key != "S" else x.astype("f") for key, x in make("rwkv7", "weak").items()}

    def twice(impl):
        once = lambda some: jnp.sum(call(**{**arrays, **some}, impl=impl, chunk=8)[0] ** 2)
        norm = lambda some: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(once)(some)))
        return jax.jit(jax.grad(norm))({key: arrays[key] for key in "kab"})

    want = twice("scan")
    for key, gradient in twice("chunk").items():
        assert relative(gradient, want[key]) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("per_key", (False, True), ids=("per_head", "per_key"))
def test_no_state_per_token_and_linear_growth(per_key):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    B, H, K, V = 2, 3, 32, 24

    def loss(*args):
        y, S = ops.dplr_delta_rule(*args, impl="chunk")
        return jnp.sum(y**2) + jnp.sum(S**2)

    temporary = {}
    for T in (512, 1024):
        q = k = a = b = shape(B, T, H, K)
        log_decay = q if per_key else shape(B, T, H)
        arguments = q, k, shape(B, T, H, V), a, b, log_decay, shape(B, H, K, V)
        compiled = jax.jit(jax.grad(loss, argnums=range(7))).lower(*arguments).compile()
        shapes = re.findall(r"(?:f32|f64)\[([\d,]+)\]", compiled.as_text())
        assert max(math.prod(map(int, s.split(","))) for s in shapes) < B * T * H * K * V / 4
        temporary[T] = compiled.memory_analysis().temp_size_in_bytes
        assert temporary[T] < 4 * B * T * H * K * V
    assert temporary[1024] <= 2.05 * temporary[512]


def test_bad_arguments_are_named():
    q, k, v, a, b, log_decay, S = make("any", "weak").values()
    op = ops.dplr_delta_rule
    with pytest.raises(ValueError, match=r"b_BTHK: expected K = 8 as in q_BTHK, got shape \[2, 39, 3, 7\]"):
        op(q, k, v, a, b[..., :-1])
    with pytest.raises(ValueError, match="a_BTHK: expected a floating dtype, got int"):
        op(q, k, v, a.astype(int), b)
    with pytest.raises(ValueError, match=r"log_decay_BTHK: expected K = 8"):
        op(q, k, v, a, b, log_decay[..., :2])
    with pytest.raises(ValueError, match="S_BHKV: expected V = 5"):
        op(q, k, v, a, b, log_decay, S[..., :4])
    with pytest.raises(ValueError, match="did you mean chunk"):
        op(q, k, v, a, b, impl="chunks")
    with pytest.raises(NotImplementedError, match="dplr_delta_rule has no form 'newton'"):
        op(q, k, v, a, b, impl="newton")
    with pytest.raises(ValueError, match="chunk: expected an integer >= 1, got 0"):
        op(q, k, v, a, b, impl="chunk", chunk=0)
