"""The TPU kernels in Pallas' interpreter, against the definition in float64, and through its lowering for the chip."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from memzoo_kernels import _tpu

from memzoo import ops

B, T, H, K, V = 2, 39, 2, 8, 5
CHUNK = 16  # two whole chunks and a piece
STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
MODULES = {op: importlib.import_module(f"memzoo_kernels.{op}_tpu") for op in ("linear_attention", "delta_rule")}
NAMES = {"linear_attention": ("q", "k", "v", "log_decay", "S"), "delta_rule": ("q", "k", "v", "beta", "log_decay", "S")}
KEYS = ("random", "correlated", "identical")
# Each decay, each kind of keys, and what is hardest of both together: keys that are alike and hardly fade.
CASES = (("identical", "weak"), ("random", "strong"), ("correlated", "mixed"), ("identical", "infinite"))


@pytest.fixture(autouse=True)
def settings(monkeypatch, capfd):
    for module in MODULES.values():
        monkeypatch.setattr(module, "CHUNK", CHUNK)
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out  # jax 0.11.2 only prints it


def make(op, keys="correlated", decay="mixed", per_key=False, length=T, sizes=(K, V), seed=0):
    rng, (K, V) = np.random.default_rng(seed), sizes
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
        "beta": rng.uniform(0, 1, (B, length, H)).astype(np.float32),
        "log_decay": log_decay.astype(np.float32),
        "S": normal(B, H, K, V),
    }
    reset = np.zeros((B, length), bool)
    reset[0, [t for t in (0, 20, 21) if t < length]] = True  # the first token, two in a row
    reset[1, [t for t in (3, 9, length - 1) if t < length]] = True  # two in one chunk, the last token
    weights = normal(B, length, H, V), normal(B, H, K, V)
    return {name: arrays[name] for name in NAMES[op]}, reset, weights


@functools.cache
def of(op, form, bits=32):
    """Outputs, final state and the gradients of a random function of both, in every array."""

    def loss(arrays, reset, weights):
        if form == "scan":
            y, S = getattr(ops, op)(*(arrays[name] for name in NAMES[op]), reset, impl="scan")
        else:
            halves = {
                name: jnp.asarray(a, jnp.bfloat16 if bits == 16 and name in "qkv" else a.dtype)
                for name, a in arrays.items()
            }
            halves["S"] = jnp.where(reset[:, :1, None, None], 0, arrays["S"])
            y, S = getattr(MODULES[op], op)(*(halves[name] for name in NAMES[op]), reset, interpret=STRICT)
            assert y.dtype == halves["v"].dtype and S.dtype == jnp.float32
        return jnp.sum(y * weights[0]) + jnp.sum(S * weights[1]), (y, S)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sqrt(np.mean((a - b) ** 2)) / (np.sqrt(np.mean(b**2)) + 1e-30)


def check(op, arrays, reset, weights, bits=32):
    if bits == 16:  # what bfloat16 cannot hold is not the kernel's error
        arrays = {n: np.array(jnp.asarray(a, jnp.bfloat16), np.float32) if n in "qkv" else a for n, a in arrays.items()}
    (_, (y, S)), gradients = jax.tree.map(np.asarray, of(op, "kernel", bits)(arrays, reset, weights))
    with jax.enable_x64(True):
        wide = {name: a.astype(np.float64) for name, a in arrays.items()}
        want = of(op, "scan")(wide, reset, tuple(w.astype(np.float64) for w in weights))
        (_, (want_y, want_S)), want_gradients = jax.tree.map(np.asarray, want)
    assert want_y.dtype == np.float64
    outputs, slopes = (1e-5, 1e-4) if bits == 32 else (1e-2, 2e-2)
    assert relative(y, want_y) < outputs and relative(S, want_S) < outputs
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        assert relative(gradient, want_gradients[name]) < slopes, name


EACH = [(op, per_key) for op in MODULES for per_key in (False, True)]
each = pytest.mark.parametrize(("op", "per_key"), EACH, ids=[f"{op}-{'key' if p else 'head'}" for op, p in EACH])


@pytest.mark.parametrize(("op", "per_key"), (EACH[0], EACH[-1]))
@pytest.mark.cases(1)
def test_the_kernel_is_the_definition(op, per_key):
    check(op, *make(op, per_key=per_key))


@pytest.mark.long
@each
def test_whatever_the_keys_and_decays(op, per_key):
    for keys, decay in CASES:
        check(op, *make(op, keys, decay, per_key, seed=KEYS.index(keys)))


@pytest.mark.long
@each
def test_in_bfloat16(op, per_key):
    for keys, decay in CASES[:2]:
        check(op, *make(op, keys, decay, per_key, seed=KEYS.index(keys), sizes=(24, 40)), bits=16)


@pytest.mark.long
@pytest.mark.parametrize("length", (1, CHUNK, CHUNK + 1))
@each
def test_any_length(op, per_key, length):
    check(op, *make(op, per_key=per_key, length=length))


@pytest.mark.long
@each
def test_in_chunks_as_long_as_they_are(op, per_key, monkeypatch):
    monkeypatch.undo()
    assert MODULES[op].CHUNK >= 64
    of.cache_clear()
    check(op, *make(op, "identical", "weak", per_key, length=150, sizes=(32, 24)))
    of.cache_clear()


def test_the_inverse_holds_for_correlated_keys():
    """Against float64, where Neumann doubling errs by 1e2 to 1e22."""
    rng, C = np.random.default_rng(0), 64
    inverse = jax.jit(MODULES["delta_rule"].unit_lower_inverse)
    for spread, beta in ((1e3, 1), (0.3, 1), (0.02, 1), (0.02, 2)):
        k = rng.standard_normal((1, 24)) + spread * rng.standard_normal((C, 24))
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        A = np.tril(beta * (k @ k.T), -1)
        error = np.abs(inverse(A.astype(np.float32)) - np.linalg.inv(np.eye(C) + A)).max()
        assert error < (3e-4 if beta == 2 else 5e-6)


def test_no_decay_is_a_difference_of_sums():
    """After decays of 1e4, those of 1e-3 keep all their digits, and nothing crosses a decay of -inf."""
    log = np.full((64, 1), -1e-3, np.float32)
    log[20], log[40] = -1e4, -np.inf
    want = np.array(
        [[log[j + 1 : i + 1].astype(np.float64).sum() for j in range(i + 1)] + [0] * (63 - i) for i in range(64)]
    )
    between = jax.jit(_tpu.decay)(log).between_CC
    np.testing.assert_allclose(between, want, rtol=1e-6)


def shapes(op, K=128, V=256, dtype=jnp.bfloat16, per_key=False, T=300):
    of_shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    q, v = of_shape(B, T, H, K, dtype=dtype), of_shape(B, T, H, V, dtype=dtype)
    beta = [of_shape(B, T, H)] if op == "delta_rule" else []
    return [q, q, v, *beta, of_shape(B, T, H, K) if per_key else of_shape(B, T, H), of_shape(B, H, K, V)]


@each
def test_it_lowers_for_a_tpu(op, per_key, monkeypatch):
    monkeypatch.undo()
    arrays = shapes(op, per_key=per_key)

    def outputs_and_gradients(reset, *arrays):
        run = lambda *arrays: getattr(MODULES[op], op)(*arrays, reset)
        outputs, pull = jax.vjp(run, *arrays)
        return outputs, pull(outputs)

    reset = jax.ShapeDtypeStruct((B, 300), jnp.bool_)
    text = jax.jit(outputs_and_gradients).trace(reset, *arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == (3 if op == "linear_attention" else 2)


@pytest.mark.parametrize("op", MODULES)
def test_support_names_the_limit(op):
    class Chip:
        platform, device_kind = "tpu", "TPU v5 lite"

    class OldChip(Chip):
        device_kind = "TPU v3"

    support = MODULES[op].support
    assert support(*shapes(op), Chip()) is None and support(*shapes(op), None) is None
    assert support(*shapes(op, K=300), None) == "K = 300 is more than 256"
    assert support(*shapes(op, V=257), None) == "V = 257 is more than 256"
    assert support(*shapes(op, dtype=jnp.float16), None) == "q, k and v are float16, neither bfloat16 nor float32"
    q, *rest = shapes(op)
    rest[0] = shapes(op, dtype=jnp.float32)[1]
    assert "bfloat16, float32 and bfloat16" in support(q, *rest, None)
    *rest, S = shapes(op)
    assert support(*rest, jax.ShapeDtypeStruct(S.shape, jnp.float64), None) == "S is float64, not float32"
    assert "not a TPU" in support(*shapes(op), jax.devices("cpu")[0])
    assert "v4 or later" in support(*shapes(op), OldChip())
