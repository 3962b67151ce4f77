"""The elementwise recurrence as a kernel: in Pallas' interpreters, against the loop in float64, and lowered for chips.

Rows and channels that fill no tile; the first token of row 0 resets a state of NaN, and an inf ends at a reset.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from memzoo_kernels import linear_scan_sm90, linear_scan_tpu

B, T, X = 2, 39, 130
MODULES = {"tpu": linear_scan_tpu, "sm90": linear_scan_sm90}
STRICT = {
    "tpu": pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2),
    "sm90": plgpu.InterpretGPUParams(detect_races=True),
}
DECAYS = ("near 0", "near 1", "signs", "zeros")


each = pytest.mark.parametrize("chip", MODULES)


@pytest.fixture(autouse=True)
def settings(monkeypatch, capfd):
    monkeypatch.setattr(linear_scan_tpu, "CHUNK", 16)  # two whole tiles and a piece
    monkeypatch.setattr(linear_scan_tpu, "CHANNELS", 128)
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out  # jax 0.11.2 only prints it


def make(decay, length=T):
    rng = np.random.default_rng(0)
    uniform, normal = rng.uniform(size=(B, length, X)), lambda *shape: rng.standard_normal(shape)
    a = {"near 0": 1e-4 * uniform, "near 1": 1 - 1e-4 * uniform, "signs": 2 * uniform - 1}
    a["zeros"] = np.where(uniform < 0.3, 0, uniform)
    reset = np.zeros((B, length), bool)
    reset[0, [t for t in (0, 16, 17) if t < length]] = True  # the first token of a tile, two in a row
    reset[1, [t for t in (3, 15, length - 1) if t < length]] = True  # the last token of a tile, and of all
    return [a[decay], normal(B, length, X), normal(B, X)], reset, [normal(B, length, X), normal(B, X)]


def in_numpy(a, x, h, reset, dh, dlast):
    """(every state, the last one, and of <states, dh> + <last, dlast> the gradients in a, x and h), in float64."""
    all_h, before, da, dx = (np.zeros(x.shape) for _ in range(4))
    for t in range(x.shape[1]):
        before[:, t] = np.where(reset[:, t, None], 0, h)
        h = all_h[:, t] = a[:, t] * before[:, t] + x[:, t]
    g = dlast
    for t in reversed(range(x.shape[1])):
        dx[:, t] = dh[:, t] + g
        da[:, t] = dx[:, t] * before[:, t]
        g = np.where(reset[:, t, None], 0, a[:, t] * dx[:, t])
    return all_h, h, da, dx, g


@functools.partial(jax.jit, static_argnums=0)
def in_pallas(chip, a, x, h, reset, dh, dlast):
    run = jax.jit(functools.partial(MODULES[chip].linear_scan, interpret=STRICT[chip]))  # as ops do
    outputs, pull = jax.vjp(lambda *arrays: run(*arrays, reset), a, x, h)
    return *outputs, *pull((dh, dlast))


def relative(a, b):
    a = np.asarray(a, np.float64)
    return np.sqrt(np.mean((a - b) ** 2)) / (np.sqrt(np.mean(b**2)) + 1e-30)


def check(chip, decay, dtypes=("float32", "float32"), length=T):
    (a, x, h), reset, cotangents = make(decay, length)
    a, x = (np.asarray(jnp.asarray(z, dtype)) for z, dtype in zip((a, x), dtypes, strict=True))
    h, *cotangents = (z.astype(np.float32) for z in (h, *cotangents))
    h[0, 0] = np.nan
    got = in_pallas(chip, a, x, h, reset, *cotangents)
    want = in_numpy(*(z.astype(np.float64) for z in (a, x, h)), reset, *cotangents)
    for name, z, right in zip(("all", "last", "da", "dx", "dh"), got, want, strict=True):
        dtype = {"da": a.dtype, "dx": x.dtype}.get(name, np.float32)
        assert z.dtype == dtype and relative(z, right) < (1e-6 if dtype == np.float32 else 4e-3), name


@each
@pytest.mark.cases(1)
def test_the_kernel_is_the_loop(chip):
    for decay in ("near 1", "zeros"):
        check(chip, decay)


@each
@pytest.mark.cases(1)
def test_in_bfloat16(chip):
    check(chip, "signs", ("bfloat16", "bfloat16"))


@pytest.mark.long
@pytest.mark.parametrize("dtypes", (("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")))
@each
def test_whatever_the_decays_and_dtypes(chip, dtypes):
    for decay in DECAYS:
        check(chip, decay, dtypes)


@pytest.mark.long
@pytest.mark.parametrize("length", (1, 7, 16, 17, 32, 65))
@each
def test_any_length(chip, length):
    check(chip, "signs", length=length)


@each
@pytest.mark.cases(1)
def test_nothing_crosses_a_reset(chip):
    (a, x, h), reset, cotangents = make("zeros")
    x[:, 5], a[1, 8] = np.inf, np.nan
    reset[:, 15] = True
    all_h = np.asarray(in_pallas(chip, *(z.astype(np.float32) for z in (a, x, h)), reset, *cotangents)[0])
    assert np.isinf(all_h[:, 5]).all() and np.isnan(all_h[1, 8]).all() and np.isfinite(all_h[:, 15:]).all()


@pytest.mark.long
def test_mapped_is_row_by_row():
    """On Hopper; the interpreter for TPUs maps no kernel."""
    (a, x, h), reset, _ = make("signs")
    a, x, h = (z.astype(np.float32) for z in (a, x, h))
    run = functools.partial(linear_scan_sm90.linear_scan, interpret=True)
    got = jax.jit(jax.vmap(run))(*(np.stack([z, z[::-1]]) for z in (a, x, h, reset)))
    want = in_numpy(a, x, h, reset, x, h)[:2]
    for z, right in zip(got, want, strict=True):
        assert relative(z[0], right) < 1e-6 and relative(z[1, ::-1], right) < 1e-6


def shapes(dtypes=(jnp.float32,) * 3, rows=B):
    sizes = (rows, 300, X), (rows, 300, X), (rows, X)
    return [jax.ShapeDtypeStruct(*array) for array in zip(sizes, dtypes, strict=True)]


@pytest.mark.parametrize(
    ("chip", "platform", "call"), (("tpu", "tpu", "tpu_custom_call"), ("sm90", "cuda", "custom_call @mosaic_gpu"))
)
def test_it_lowers_for_the_chip(chip, platform, call, monkeypatch):
    """Mapped too."""
    monkeypatch.undo()

    def outputs_and_gradients(reset, *arrays):
        outputs, pull = jax.vjp(lambda *arrays: jax.vmap(MODULES[chip].linear_scan)(*arrays, reset), *arrays)
        return outputs, pull(outputs)

    arrays = jax.ShapeDtypeStruct((B, 300), jnp.bool_), *shapes()
    mapped = [jax.ShapeDtypeStruct((3, *array.shape), array.dtype) for array in arrays]
    text = jax.jit(outputs_and_gradients).trace(*mapped).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) == 2


@each
def test_support_names_the_limit(chip):
    support = MODULES[chip].support
    assert support(*shapes(), None) is None
    assert support(*shapes((jnp.bfloat16, jnp.bfloat16, jnp.float32)), None) is None
    assert support(*shapes((jnp.complex64,) * 3), None) == "a is complex64, neither bfloat16 nor float32"
    assert support(*shapes((jnp.float32, jnp.float16, jnp.float32)), None).startswith("x is float16")
    assert support(*shapes((jnp.float32, jnp.float32, jnp.float64)), None) == "h is float64, not float32"
    assert support(*shapes(), jax.devices("cpu")[0]).startswith("the device is a cpu, not ")


class Chip:
    def __init__(self, device_kind, platform="tpu", compute_capability=None):
        self.device_kind, self.platform, self.compute_capability = device_kind, platform, compute_capability


def test_support_knows_the_chip():
    tpu, hopper = linear_scan_tpu.support, functools.partial(linear_scan_sm90.support, *shapes())
    assert tpu(*shapes(), Chip("TPU v5 lite"), auto=True) is None
    assert "v4 or later" in tpu(*shapes(), Chip("TPU v3"))
    assert hopper(Chip("NVIDIA H200", "gpu", "9.0")) is None
    assert hopper(Chip("NVIDIA A100", "gpu", "8.0")) == "the device is a NVIDIA A100, not of compute capability 9.0"
    assert hopper(Chip("NVIDIA H200", "gpu", "9.0"), auto=True).startswith("4 programs, rows by 128 channels, do not")
    assert linear_scan_sm90.support(*shapes(rows=66), Chip("NVIDIA H200", "gpu", "9.0"), auto=True) is None
