"""What the TPU kernels share: matmuls of tiles and decays inside a chunk, layouts, the sweep over chunks.

A decay between two tokens is the exp of a sum of log-decays that is never a difference of two longer sums, so that a
weak decay after a strong one keeps all its digits, -inf is a number like others, and a reset is a decay of -inf: what
lies before it is multiplied by an exact 0, and so is its gradient.

Dims: B batch, T time, H heads, N chunks, C chunk (a power of 2), K key, V value, X either K (a decay per key) or 1
      (per head).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LARGEST = 256  # K and V
CONTRACTED = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}  # n as it is, t transposed


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(a: jax.Array, b: jax.Array, kind: str = "nn") -> jax.Array:
    """a b, a b' or a' b, summed in float32. No float32 operand is rounded; cotangents are, to the operands' dtype."""
    left, right = CONTRACTED[kind]
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((left,), (right,)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _dot_bwd(kind, ab, dy):
    a, b = ab
    dy = dy.astype(a.dtype)
    if kind == "nn":
        da, db = dot(dy, b, "nt"), dot(a, dy, "tn")
    elif kind == "nt":
        da, db = dot(dy, b, "nn"), dot(dy, a, "tn")
    else:
        da, db = dot(b, dy, "nt"), dot(a, dy, "nn")
    return da.astype(a.dtype), db.astype(b.dtype)


dot.defvjp(lambda a, b, kind: (dot(a, b, kind), (a, b)), _dot_bwd)


def scaled(x: jax.Array, by: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * by).astype(x.dtype)


def places(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The row and the column of each entry."""
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def meet(C: int, half: int) -> jax.Array:
    """Where a row lies in the second half of a block of 2 half tokens, and a column in the first half of the same."""
    row, column = places((C, C))
    return (row & half != 0) & (row & -half == (column & -half) + half)


def as_column(x_1C: jax.Array) -> jax.Array:
    row, column = places((x_1C.shape[1],) * 2)
    return jnp.sum(jnp.where(row == column, x_1C, 0), axis=1, keepdims=True)


def as_row(x_C1: jax.Array) -> jax.Array:
    row, column = places((x_C1.shape[0],) * 2)
    return jnp.sum(jnp.where(row == column, x_C1, 0), axis=0, keepdims=True)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def running_sum(x: jax.Array, reverse: bool = False) -> jax.Array:
    """Down the rows, by doubling."""
    C, (row, _) = x.shape[0], places(x.shape)
    step = 1
    while step < C:
        there = row < C - step if reverse else row >= step
        x = x + jnp.where(there, pltpu.roll(x, C - step if reverse else step, 0), 0)
        step *= 2
    return x


running_sum.defvjp(lambda x, reverse: (running_sum(x, reverse), None), lambda r, _, dx: (running_sum(dx, not r),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def swapped(x: jax.Array, half: int) -> jax.Array:
    """Row i gets row i xor half."""
    C, (row, _) = x.shape[0], places(x.shape)
    return jnp.where(row & half != 0, pltpu.roll(x, half, 0), pltpu.roll(x, C - half, 0))


swapped.defvjp(lambda x, half: (swapped(x, half), None), lambda half, _, dx: (swapped(dx, half),))


class Decay(NamedTuple):
    """Sums of log-decays inside one chunk."""

    prefix_CX: jax.Array  # from the start of the chunk to token i, which is included
    suffix_CX: jax.Array  # from token j, which is not, to the end
    total_1X: jax.Array
    between_CC: jax.Array | None  # one decay per head: from token j to token i
    halves_CK: tuple[jax.Array, ...]  # one per key: [h] from, or to, the middle of the token's block of 2^(h + 1)


def decay(log_CX: jax.Array) -> Decay:
    C = log_CX.shape[0]
    row, column = places((C, C))
    if log_CX.shape[1] == 1:
        between_CC = running_sum(jnp.where(row > column, log_CX, 0))
        prefix_C1 = between_CC[:, :1] + log_CX[:1]
        return Decay(prefix_C1, as_column(between_CC[C - 1 :]), prefix_C1[C - 1 :], between_CC, ())
    prefix, suffix, total = log_CX, jnp.zeros_like(log_CX), log_CX  # of blocks of one token, then of 2, 4 ...
    row, _ = places(log_CX.shape)
    halves, half = [], 1
    while half < C:
        late = row & half != 0
        halves.append(jnp.where(late, prefix, suffix))
        other = swapped(total, half)
        prefix, suffix = jnp.where(late, prefix + other, prefix), jnp.where(late, suffix, suffix + other)
        total, half = total + other, 2 * half
    return Decay(prefix, suffix, total[:1], None, tuple(halves))


def products(qs_CK: Sequence[jax.Array], k_CK: jax.Array, d: Decay) -> list[jax.Array]:
    """For each q: P_ij = sum_K q_iK k_jK exp(decay from j to i) for j <= i, else 0: [C, C], float32.

    With a decay per key, by halves: a pair of tokens meets where their block is cut in two, and both decay to the cut.
    """
    row, column = places((k_CK.shape[0],) * 2)
    if d.between_CC is not None:
        return [jnp.where(row >= column, dot(q, k_CK, "nt") * jnp.exp(d.between_CC), 0) for q in qs_CK]
    own = [jnp.sum(q.astype(jnp.float32) * k_CK.astype(jnp.float32), axis=1, keepdims=True) for q in qs_CK]
    P_CC = [jnp.where(row == column, x_C1, 0) for x_C1 in own]
    for h, log_CK in enumerate(d.halves_CK):
        to_cut_CK = jnp.exp(log_CK)
        k_cut_CK = scaled(k_CK, to_cut_CK)
        for i, q_CK in enumerate(qs_CK):
            P_CC[i] = jnp.where(meet(k_CK.shape[0], 1 << h), dot(scaled(q_CK, to_cut_CK), k_cut_CK, "nt"), P_CC[i])
    return P_CC


def limits(q: Any, k: Any, v: Any, wide: dict[str, Any], device: jax.Device | None) -> str | None:
    """What keeps these kernels from running, or None. `wide`: the arguments that have to be float32."""
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are of dtypes {q.dtype}, {k.dtype} and {v.dtype}, not of one"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q, k and v are {q.dtype}, neither bfloat16 nor float32"
    for name, x in wide.items():
        if x.dtype != jnp.float32:
            return f"{name} is {x.dtype}, not float32"
    for name, size in (("K", q.shape[-1]), ("V", v.shape[-1])):
        if size > LARGEST:
            return f"{name} = {size} is more than {LARGEST}"
    return wrong_chip(device)


def wrong_chip(device: jax.Device | None) -> str | None:
    """What keeps a kernel from running on this device, or None."""
    if device is not None and device.platform != "tpu":
        return f"the device is a {device.device_kind}, not a TPU"
    if device is not None and device.device_kind in ("TPU v2", "TPU v3"):
        return f"the device is a {device.device_kind}, and kernels need v4 or later"
    return None


def chunk_of(T: int, largest: int) -> int:
    """Tokens in a chunk, at least 16, the rows of a tile of bfloat16."""
    return max(16, min(largest, 1 << (T - 1).bit_length()))


def heads_first(x_BTHX: jax.Array, C: int) -> jax.Array:
    """[B, T, H, X] to [B, H, N, C, X], and [B, T, H] to [B, H, N, 1, C]. Zeros behind neither write nor forget."""
    B, T, H = x_BTHX.shape[:3]
    x = jnp.pad(x_BTHX, [(0, 0), (0, -T % C)] + [(0, 0)] * (x_BTHX.ndim - 2))
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(B, H, -1, C, *x.shape[3:]) if x.ndim > 3 else x.reshape(B, H, -1, 1, C)


def heads_last(x_BHNCX: jax.Array, T: int) -> jax.Array:
    B, H = x_BHNCX.shape[:2]
    return jnp.swapaxes(x_BHNCX.reshape(B, H, -1, x_BHNCX.shape[-1]), 1, 2)[:, :T]


def log_decays(log_decay: jax.Array, reset_BT: jax.Array, C: int) -> jax.Array:
    """Heads first, a reset as the decay that it is."""
    reset = reset_BT.reshape(*reset_BT.shape, *[1] * (log_decay.ndim - 2))
    return heads_first(jnp.where(reset, -jnp.inf, log_decay), C)


def put(target: Any, source: Any) -> Callable[[], None]:
    """Copies a tile, when called: for pl.when."""

    def copy():
        target[...] = source[...]

    return copy


def read_log(log_ref: Any) -> jax.Array:
    """A chunk's log-decays, [C, X]. One per head lies along a row in memory, where a column would fill whole tiles."""
    return as_column(log_ref[...]) if log_ref.shape[0] == 1 else log_ref[...]


def write_log(log_ref: Any, x_CX: jax.Array) -> None:
    log_ref[...] = as_row(x_CX) if log_ref.shape[0] == 1 else x_CX


def sweep(kernel, inputs, outputs, scratch, *, flops, interpret, reverse=False):
    """Runs the kernel once for each chunk, heads side by side, and chunks of one head in order, or from the last one.

    inputs and outputs: [B, H, N, ...], of which the kernel sees its chunk's tile, or [B, H, ...], one tile per head.
    scratch: shapes, in float32, that stay on the chip from chunk to chunk. flops: of one chunk.
    """
    B, H, N = inputs[0].shape[:3]

    def spec(x):
        nothing = (None,) * (x.ndim - 2)
        at = lambda b, h, n: (b, h, *((N - 1 - n if reverse else n,) if x.ndim == 5 else ()), 0, 0)
        return pl.BlockSpec((*nothing, *x.shape[-2:]), at)

    exps = sum(x.size for x in inputs if x.dtype == jnp.float32)
    memory = sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs))
    return pl.pallas_call(
        kernel,
        grid=(B, H, N),
        in_specs=[spec(x) for x in inputs],
        out_specs=[spec(x) for x in outputs],
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=B * H * N * flops, bytes_accessed=memory, transcendentals=exps),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name=kernel.__module__.rsplit(".", 1)[-1] + kernel.__name__,
    )(*inputs)
