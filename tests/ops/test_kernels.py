"""Which form runs where an op has a kernel, and what is said where the kernel cannot run."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import memzoo_kernels
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from memzoo import ops
from memzoo.ops import kernels

B, T, H, K, V = 1, 19, 2, 6, 5
FORMS = ("scan", "associative", "chunk")


class TPU:
    platform, device_kind = "tpu", "TPU v5 lite"


class A100:
    platform, device_kind, compute_capability = "gpu", "NVIDIA A100", "8.0"


def arrays(op, dtype=np.float32, T=T, K=K, V=V):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, H, X)).astype(dtype) for X in (K, K, V))
    decay = -rng.uniform(size=(B, T, H)).astype(np.float32)
    return (q, k / 3, v, *([decay + 1] if op == "delta_rule" else []), decay, np.ones((B, H, K, V), np.float32))


def choose(op, impl="auto", otherwise="chunk", **settings):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(op, **settings)]
    return kernels.choose(op, impl, FORMS, otherwise, *shapes)


each = pytest.mark.parametrize("op", ("linear_attention", "delta_rule"))


@each
def test_a_cpu_has_no_kernel(op):
    call = getattr(ops, op)
    sentence = rf"impl: {op} has no kernel for this call: the device is a CPU, .*; 'auto' would run 'chunk'"
    with pytest.raises(NotImplementedError, match=sentence):
        call(*arrays(op), impl="pallas")
    with pytest.raises(NotImplementedError, match="'auto' would run 'scan'"):
        call(*arrays(op, T=1), impl="pallas")
    assert choose(op) == kernels.Choice("chunk") and choose(op, otherwise="scan") == kernels.Choice("scan")


@each
@pytest.mark.cases(1)
def test_interpreted_by_name(op):
    """Within `interpreted`, and for no other name than 'pallas'."""
    call, reset = getattr(ops, op), np.arange(T)[None] == 7
    with memzoo_kernels.interpreted("tpu"):
        assert choose(op, "pallas") == kernels.Choice("pallas", "tpu", True)
        assert choose(op) == kernels.Choice("chunk")
        got = jax.jit(lambda *xs: call(*xs, impl="pallas"))(*arrays(op), reset)
        with pytest.raises(NotImplementedError, match="K = 300 is more than 256; 'auto' would run 'chunk'"):
            call(*arrays(op, K=300), impl="pallas")
        with pytest.raises(NotImplementedError, match="q, k and v are float16, neither bfloat16 nor float32"):
            call(*arrays(op, np.float16), impl="pallas")
        with jax.enable_x64(True), pytest.raises(NotImplementedError, match="q, k and v are float64"):
            call(*arrays(op, np.float64), impl="pallas")
    want = call(*arrays(op), reset, impl="scan")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="the device is a CPU"):
        call(*arrays(op), impl="pallas")
    with (
        pytest.raises(ValueError, match="backend: expected one of tpu, sm90, got 'cuda'"),
        memzoo_kernels.interpreted("cuda"),
    ):
        pass


def test_the_normaliser_is_one_more_value():
    q, k, v, decay, S = (jnp.asarray(x) for x in arrays("linear_attention"))
    args, reset = (q, abs(k), v, decay, S, S[..., 0]), np.arange(T)[None] == 0
    with memzoo_kernels.interpreted("tpu"):
        got = ops.normalised_linear_attention(*args, reset, impl="pallas")
    want = ops.normalised_linear_attention(*args, reset, impl="scan")
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@each
def test_auto_takes_the_kernel_where_it_can(op, monkeypatch):
    monkeypatch.setattr(kernels, "_device", TPU)
    assert choose(op) == choose(op, "pallas") == kernels.Choice("pallas", "tpu")
    assert choose(op, otherwise="scan") == kernels.Choice("scan"), "one token"
    assert choose(op, "scan") == kernels.Choice("scan"), "whatever is named runs"
    assert choose(op, dtype=np.float16) == choose(op, V=257) == kernels.Choice("chunk")
    with pytest.raises(NotImplementedError, match="V = 257 is more than 256"):
        choose(op, "pallas", V=257)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert choose(op) == kernels.Choice("chunk"), "XLA cannot divide a kernel over devices"
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    found = []
    within = jax.shard_map(lambda x: (found.append(choose(op)), x)[1], mesh=mesh, in_specs=P(), out_specs=P())
    jax.eval_shape(within, np.zeros(1))
    assert found == [kernels.Choice("pallas", "tpu")], "but shard_map has divided already"


@each
def test_other_gpus_stay_with_xla(op, monkeypatch):
    monkeypatch.setattr(kernels, "_device", A100)
    assert choose(op) == kernels.Choice("chunk")
    with pytest.raises(NotImplementedError, match=f"impl: {op} has no kernel for this call"):
        choose(op, "pallas")


@each
def test_the_environment_is_what_auto_is(op, monkeypatch):
    monkeypatch.setenv("MEMZOO_IMPL", "associative")
    assert choose(op) == kernels.Choice("associative") and choose(op, "chunk") == kernels.Choice("chunk")
    monkeypatch.setenv("MEMZOO_IMPL", "newton")  # which these ops do not have
    assert choose(op) == kernels.Choice("chunk")
    monkeypatch.setenv("MEMZOO_IMPL", "")
    assert choose(op) == kernels.Choice("chunk")
    monkeypatch.setenv("MEMZOO_IMPL", "pallas")
    with pytest.raises(NotImplementedError, match="the device is a CPU"):
        choose(op)
    monkeypatch.setenv("MEMZOO_IMPL", "chunks")
    with pytest.raises(
        ValueError, match=r"MEMZOO_IMPL: expected one of auto, scan, .*; got 'chunks', did you mean chunk"
    ):
        getattr(ops, op)(*arrays(op))


def test_the_elementwise_recurrence(monkeypatch):
    rng = np.random.default_rng(0)
    a, x, h = rng.uniform(size=(B, T, K)), rng.standard_normal((B, T, K)), rng.standard_normal((B, K))
    narrow = [jnp.asarray(z, dtype) for z, dtype in ((a, jnp.float16), (x, jnp.bfloat16), (h, jnp.bfloat16))]
    reset = np.arange(T)[None] == 7
    with pytest.raises(NotImplementedError, match=r"linear_scan has no kernel .*: the device is a CPU, .* run 'sweep'"):
        ops.linear_scan(a, x, impl="pallas")
    with memzoo_kernels.interpreted("tpu"):
        got = ops.linear_scan(*narrow, reset, impl="pallas")
        with pytest.raises(NotImplementedError, match="a is complex64, neither bfloat16 nor float32; 'auto' would"):
            ops.linear_scan(a, x + 1j, impl="pallas")
    for one, two in zip(got, ops.linear_scan(*narrow, reset, impl="scan"), strict=True):
        assert one.dtype == two.dtype == jnp.float32
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    taken = []
    monkeypatch.setattr(kernels, "_device", TPU)
    monkeypatch.setattr(
        kernels, "run", lambda op, choice, *arrays: taken.append([z.dtype for z in arrays]) or arrays[1:3]
    )
    ops.linear_scan(*narrow)
    ops.linear_scan(a, x, impl="chunk")
    ops.linear_scan(a, x + 1j)
    ops.linear_scan(a[:, :1], x[:, :1])
    assert taken == [[jnp.float32, jnp.bfloat16, jnp.float32, jnp.bool_]]


def test_a_cpu_never_imports_pallas():
    code = """
import sys
import flax.linen, jax
before = set(sys.modules)
import memzoo
x = jax.numpy.ones((1, 20, 8))
for name in ("gated_deltanet", "linear_attention", "min_gru"):
    mixer = memzoo.make(name, width=8)
    jax.eval_shape(mixer.init_with_output, jax.random.key(0), x)
try:
    memzoo.ops.linear_attention(x[..., None], x[..., None], x[..., None], impl="pallas")
except NotImplementedError:
    print(sorted(name for name in sys.modules if "pallas" in name and name not in before))
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert result.stdout == "[]\n", result.stderr
