"""The Hopper kernels in Pallas' interpreter, against the definition in float64, and lowered for the chip."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from memzoo_kernels import _hopper

from memzoo import ops

B, T, H, K, V = 2, 80, 1, 72, 24  # two chunks, of which one is padded; two blocks of keys, and of columns backwards
STRICT = plgpu.InterpretGPUParams(detect_races=True)
MODULES = {op: importlib.import_module(f"memzoo_kernels.{op}_sm90") for op in ("linear_attention", "delta_rule")}
NAMES = {"linear_attention": ("q", "k", "v", "log_decay", "S"), "delta_rule": ("q", "k", "v", "beta", "log_decay", "S")}
KEYS = ("random", "correlated", "identical")
# Each decay, each kind of keys, and what is hardest of both together: keys that are alike and hardly fade.
CASES = (("identical", "weak"), ("random", "strong"), ("correlated", "mixed"), ("identical", "infinite"))


@pytest.fixture(autouse=True)
def no_races(capfd):
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out  # jax 0.11.2 only prints it


def make(op, keys="correlated", decay="mixed", per_key=False, length=T, sizes=(H, K, V), seed=0):
    rng, (H, K, V) = np.random.default_rng(seed), sizes
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    k = normal(B, length, H, K) * {"random": 1, "correlated": 0.3, "identical": 0.01}[keys]
    k += 0 if keys == "random" else normal(B, 1, H, K)
    shape = (B, length, H, K) if per_key else (B, length, H)
    log_decay = {
        "weak": -0.01 * rng.uniform(size=shape),
        "strong": -20 * rng.uniform(0.5, 1, shape),
        "mixed": -np.exp(rng.uniform(np.log(1e-3), np.log(300), shape)),
        "infinite": np.where(rng.uniform(size=shape) < 0.1, -np.inf, -0.1),
    }[decay]
    arrays = {
        "q": normal(B, length, H, K),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(B, length, H, V),
        "beta": np.maximum(rng.uniform(-0.1, 1, (B, length, H)), 0).astype(np.float32),
        "log_decay": log_decay.astype(np.float32),
        "S": normal(B, H, K, V),
    }
    reset = np.zeros((B, length), bool)
    reset[0, [t for t in (0, 70, 71) if t < length]] = True  # the first token, two in a row
    reset[1, [t for t in (3, 9, length - 1) if t < length]] = True  # two in one chunk, the last token
    weights = normal(B, length, H, V), normal(B, H, K, V)
    return {name: arrays[name] for name in NAMES[op]}, reset, weights


@functools.cache
def of(op, form, dtype=jnp.bfloat16):
    """Outputs, final state and the gradients of a random function of both, in every array."""

    def loss(arrays, reset, weights):
        if form == "scan":
            y, S = getattr(ops, op)(*(arrays[name] for name in NAMES[op]), reset, impl="scan")
        else:
            arrays = {name: jnp.asarray(a, dtype if name in "qkv" else a.dtype) for name, a in arrays.items()}
            arrays["S"] = jnp.where(reset[:, :1, None, None], 0, arrays["S"])
            run = jax.jit(functools.partial(getattr(MODULES[op], op), interpret=STRICT))  # as ops do
            y, S = run(*(arrays[name] for name in NAMES[op]), reset)
            assert y.dtype == dtype and S.dtype == jnp.float32
        return jnp.sum(y * weights[0]) + jnp.sum(S * weights[1]), (y, S)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sqrt(np.mean((a - b) ** 2)) / (np.sqrt(np.mean(b**2)) + 1e-30)


def check(op, arrays, reset, weights, dtype=jnp.bfloat16):
    # What bfloat16 cannot hold is not the kernel's error.
    held = {n: np.array(jnp.asarray(a, dtype), np.float32) if n in "qkv" else a for n, a in arrays.items()}
    weights = np.array(jnp.asarray(weights[0], dtype), np.float32), weights[1]
    (_, (y, S)), gradients = jax.tree.map(np.asarray, of(op, "kernel", dtype)(held, reset, weights))
    with jax.enable_x64(True):
        wide = {name: a.astype(np.float64) for name, a in held.items()}
        want = of(op, "scan")(wide, reset, tuple(w.astype(np.float64) for w in weights))
        (_, (want_y, want_S)), want_gradients = jax.tree.map(np.asarray, want)
    assert want_y.dtype == np.float64
    outputs, slopes = (1e-5, 1e-4) if dtype == jnp.float32 else (1e-2, 2e-2)
    assert relative(y, want_y) < outputs and relative(S, want_S) < outputs
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        assert relative(gradient, want_gradients[name]) < slopes, name


EACH = [(op, per_key) for op in MODULES for per_key in (False, True)]
both_decays = pytest.mark.parametrize(("op", "per_key"), EACH, ids=[f"{op}-{'key' if p else 'head'}" for op, p in EACH])
each = pytest.mark.parametrize("op", MODULES)
both = pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32), ids=("bfloat16", "float32"))


@each
@pytest.mark.cases(1)
def test_the_kernel_is_the_definition(op):
    check(op, *make(op))


@pytest.mark.long
@each
def test_with_a_decay_per_key(op):
    check(op, *make(op, per_key=True))


@pytest.mark.long
@both_decays
@both
def test_whatever_the_keys_and_decays(op, per_key, dtype):
    sizes = (H, 24 if per_key and dtype == jnp.float32 else K, V)  # what fits
    for keys, decay in CASES if dtype == jnp.float32 else CASES[:2]:
        check(op, *make(op, keys, decay, per_key, sizes=sizes, seed=KEYS.index(keys)), dtype)


@pytest.mark.long
@pytest.mark.parametrize("length", (1, 64, 65, 200))
@each
def test_any_length(op, length):
    check(op, *make(op, length=length), jnp.float32)


@pytest.mark.long
@each
@both
def test_sizes_of_many_blocks(op, dtype):
    largest = _hopper.LARGEST[_hopper.parts_of(dtype)]
    check(op, *make(op, length=65, sizes=(2, largest, 130 if largest == 256 else 20)), dtype)


@pytest.mark.long
@each
def test_over_many_chunks(op):
    arrays, _, weights = make(op, "random", "weak", length=20 * 64, sizes=(1, 24, 16))
    check(op, arrays, np.zeros((B, 20 * 64), bool), weights)


@pytest.mark.long
@each
def test_mapped_is_row_by_row(op):
    arrays, reset, _ = make(op)
    rows = [np.stack([a, a[::-1]]) for a in (*arrays.values(), reset)]
    run = functools.partial(getattr(MODULES[op], op), interpret=True)
    y, S = jax.jit(jax.vmap(run))(*rows)
    once = jax.jit(run)
    for n in range(2):
        want_y, want_S = once(*(row[n] for row in rows))
        np.testing.assert_allclose(y[n], want_y, rtol=1e-6)
        np.testing.assert_allclose(S[n], want_S, rtol=1e-6)


def test_three_parts_hold_a_float32():
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1e3
    parts = jax.jit(lambda x: _hopper.split(x, 3))(x)
    assert [part.dtype for part in parts] == [jnp.bfloat16] * 3
    np.testing.assert_array_equal(sum(np.asarray(part, np.float64) for part in parts), x)


def test_decays_are_differences_of_sums():
    """After decays of 1e3, those of 1e-3 keep all their digits, and nothing crosses a reset."""
    log = np.full((1, 64, 1), -1e-3, np.float32)
    log[0, 20], log[0, 40] = -1e3, -np.inf
    reset = np.zeros((1, 64), bool)
    reset[0, 50] = True
    forwards, backwards = (np.asarray(d)[0, 0, 0] for d in jax.jit(_hopper.decays)(_hopper.with_resets(log, reset)))
    coarse, fine, read, written = forwards
    between = lambda i, j: coarse[i] - coarse[j] + (fine[i] - fine[j])
    np.testing.assert_allclose([between(19, 0), between(39, 20), between(63, 50)], [-0.019, -0.019, -0.013], rtol=1e-5)
    np.testing.assert_allclose(read[:20], np.exp(-1e-3 * np.arange(1, 21)), rtol=1e-6)
    np.testing.assert_allclose(written[50:], np.exp(-1e-3 * np.arange(13, -1, -1)), rtol=1e-6)
    assert np.exp(between(50, 49)) == np.exp(between(40, 39)) == 0 and not read[20:].any() and not written[:50].any()
    np.testing.assert_array_equal(backwards, [-coarse, -fine, written, read])


def shapes(op, K=128, V=256, dtype=jnp.bfloat16, heads=2, T=300):
    of_shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    q, v = of_shape(B, T, heads, K, dtype=dtype), of_shape(B, T, heads, V, dtype=dtype)
    log_decay = of_shape(B, T, heads)
    beta = [log_decay] if op == "delta_rule" else []
    return [q, q, v, *beta, log_decay, of_shape(B, heads, K, V)]


@pytest.mark.parametrize(
    ("K", "V", "dtype"),
    (
        (128, 128, jnp.bfloat16),
        pytest.param(256, 256, jnp.bfloat16, marks=pytest.mark.long),
        pytest.param(128, 128, jnp.float32, marks=pytest.mark.long),
    ),
)
@each
@pytest.mark.cases(1)
def test_it_lowers_for_hopper(op, K, V, dtype):
    def outputs_and_gradients(reset, *arrays):
        outputs, pull = jax.vjp(lambda *arrays: getattr(MODULES[op], op)(*arrays, reset), *arrays)
        return outputs, pull(outputs)

    reset = jax.ShapeDtypeStruct((B, 300), jnp.bool_)
    traced = jax.jit(outputs_and_gradients).trace(reset, *shapes(op, K, V, dtype))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == (4 if op == "linear_attention" else 6)


@each
def test_support_names_the_limit(op):
    class Chip:
        platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"

    class OtherChip(Chip):
        device_kind, compute_capability = "NVIDIA A100", "8.0"

    support = MODULES[op].support
    assert support(*shapes(op), Chip()) is None and support(*shapes(op), None) is None
    assert support(*shapes(op, K=300), None) == "K = 300 is more than 256, what fits of bfloat16 on the chip"
    assert support(*shapes(op, V=129, dtype=jnp.float32), None).startswith("V = 129 is more than 128")
    assert support(*shapes(op, dtype=jnp.float16), None) == "q, k and v are float16, neither bfloat16 nor float32"
    q, *rest = shapes(op)
    assert "float32, bfloat16 and bfloat16" in support(jax.ShapeDtypeStruct(q.shape, jnp.float32), *rest, None)
    *rest, S = shapes(op)
    assert support(*rest, jax.ShapeDtypeStruct(S.shape, jnp.float64), None) == "S is float64, not float32"
    *rest, S = shapes(op)
    per_key = [*rest[:-1], jax.ShapeDtypeStruct(q.shape, jnp.float32), S]
    assert support(*per_key, Chip()) is None and "per key" in support(*per_key, Chip(), auto=True)
    if op == "delta_rule":
        *rest, S = shapes(op, V=128, dtype=jnp.float32)
        log_decay = jax.ShapeDtypeStruct(q.shape, jnp.float32)
        assert "K = 128 is more than 64" in support(*rest[:-1], log_decay, S, None)
    assert support(*shapes(op), OtherChip()) == "the device is a NVIDIA A100, not of compute capability 9.0"
    assert "compute capability" in support(*shapes(op), jax.devices("cpu")[0])
    assert support(*shapes(op, heads=17), Chip(), auto=True) is None
    assert support(*shapes(op, heads=16), Chip(), auto=True).startswith("128 programs")
