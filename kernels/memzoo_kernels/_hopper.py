"""What the Hopper kernels share: tiles in shared memory, matmuls of operands in parts, decays inside chunks.

The tensor cores take bfloat16. A float32 operand is the sum of three bfloat16 parts, which hold its 24 bits; a product
of two such operands is the six products of parts that are not below float32's own rounding. All sums are in float32.

Dims: B batch, T time, H heads, K key, V value, N chunks, C chunk, X any axes.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import custom_batching, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memzoo_kernels import _compat

C = 64  # tokens in a chunk: the rows of one wgmma
BLOCK = 64  # columns of a state that one CTA holds; contractions are padded to a multiple of it too
PROCESSORS = 132  # of an H100 or H200
LARGEST = {1: 256, 3: 128}  # K and V, by parts: shared memory holds 227 KB
COARSE = 2.0**-6  # log-decays are split into multiples of this, whose sums are exact, and a remainder below it
TINY = 1e-20  # divides in place of a beta of 0, and is nothing beside one that is not
FLOOR = -2000.0  # exp of it is 0: such a decay is a reset
WG = plgpu.Layout.WGMMA
# Of bfloat16, as TMA writes and wgmma reads it.
TILE: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


def load(ref: Any, layout: Any = WG, **options: Any) -> jax.Array:
    return _compat.load(ref, layout, **options)


def kernel(name: str, body: Callable[..., None], out: Any, grid: tuple[int, int, int], scratch: Any, interpret: Any):
    """A kernel on a grid with axes b, h, j, in which a CTA is one warpgroup. Profilers see the name."""
    body.__name__ = name
    semantics = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    options: dict[str, Any] = dict(grid=grid, grid_names=("b", "h", "j"), compiler_params=semantics)
    if interpret:
        options["interpret"] = plgpu.InterpretGPUParams() if interpret is True else interpret
    return plgpu.kernel(body, out_type=out, scratch_types=scratch, **options)


def take(refs: list[Any], n: int) -> list[Any]:
    """The first n of refs, which are taken off it."""
    taken = refs[:n]
    del refs[:n]
    return taken


def rows(x_C: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(x_C, (C, C), [0])


def columns(x_C: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(x_C, (C, C), [1])


def smem(parts: int, *shape: int) -> tuple[Any, ...]:
    return tuple(plgpu.SMEM(shape, jnp.bfloat16, transforms=TILE) for _ in range(parts))


def parts_of(dtype: Any) -> int:
    return 3 if dtype == jnp.float32 else 1


def put(refs: Any, x: jax.Array) -> None:
    """Writes x into shared memory, in as many parts as there are refs. `commit_smem` before a matmul reads them."""
    for ref in refs:
        part = x.astype(jnp.bfloat16)
        ref[...] = part
        x = x - part.astype(jnp.float32)


def get(refs: Any) -> jax.Array:
    return functools.reduce(operator.add, (load(ref).astype(jnp.float32) for ref in refs))


def matmul(*pairs: tuple[Any, Any]) -> jax.Array:
    """The sum of products of operands in shared memory, each a sequence of parts from high to low."""

    def products(accumulator):
        for a, b in pairs:
            for i, high in enumerate(a):
                for low in b[: len(a) - i]:
                    plgpu.wgmma(accumulator, high, low)
        return accumulator[...]

    a, b = pairs[0]
    return pl.run_scoped(products, plgpu.ACC((a[0].shape[0], b[0].shape[1]), jnp.float32))


def transposed(refs: Any, m: int | None = None) -> list[Any]:
    """The refs [C, K] as [K, C], or of that the rows of block m."""
    if m is not None:
        refs = [ref.at[:, pl.ds(m * BLOCK, BLOCK)] for ref in refs]
    return [ref.T for ref in refs]


def block(refs: Any, m: int) -> list[Any]:
    return [ref.at[pl.ds(m * BLOCK, BLOCK)] for ref in refs]


def of_state(readers: Any, S_s: Any, S: Any) -> list[jax.Array]:
    """Each reader [C, K] times the state, which comes in registers, by blocks of 64 rows, and takes its place in S_s.

    Commits what has been written before. Where S_s has room for one block only, they take turns.
    """
    if S_s[0].shape[0] == BLOCK * len(S):
        for m, rows in enumerate(S):
            put(block(S_s, m), rows)
        plgpu.commit_smem()
        return [matmul((reader, S_s)) for reader in readers]
    results: list[Any] = [0.0] * len(readers)
    for m, rows in enumerate(S):
        put(S_s, rows)
        plgpu.commit_smem()
        keys = [[ref.at[:, pl.ds(m * BLOCK, BLOCK)] for ref in reader] for reader in readers]
        results = [result + matmul((reader, S_s)) for result, reader in zip(results, keys, strict=True)]
    return results


def room_for_state(parts: int, K: int) -> tuple[Any, ...]:
    return smem(parts, K if parts == 1 else BLOCK, BLOCK)


def split(x: jax.Array, parts: int) -> tuple[jax.Array, ...]:
    """x as a sum of bfloat16 arrays, outside of a kernel. (A plain cast back and forth is optimised away.)"""
    result = []
    for _ in range(parts):
        part = lax.reduce_precision(x, 8, 7)
        result.append(part.astype(jnp.bfloat16))
        x = x - part
    return tuple(result)


def pad_time(x_BTX: jax.Array) -> jax.Array:
    """Zeros in front, up to a multiple of C tokens, where they neither write nor forget."""
    return jnp.pad(x_BTX, [(0, 0), (-x_BTX.shape[1] % C, 0)] + [(0, 0)] * (x_BTX.ndim - 2))


def pad_features(x: jax.Array, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    for axis in axes:
        widths[axis] = (0, -x.shape[axis] % BLOCK)
    return jnp.pad(x, widths)


def with_resets(log_BTX: jax.Array, reset_BT: jax.Array) -> jax.Array:
    """Log-decays in which a reset is a decay to nothing."""
    reset = reset_BT.reshape(*reset_BT.shape, *[1] * (log_BTX.ndim - 2))
    return jnp.where(reset, FLOOR, jnp.maximum(log_BTX, FLOOR))


def decays(log_BTH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a sweep needs of the log-decays, forward in time and backward: [B, H, N, 4, C].

    The four rows: the cumulative log-decay, in multiples of COARSE and the rest of it; the decay with which a token
    reads the state that came into its chunk; the decay with which the state that goes out holds a token's write.
    """
    B, T, H = log_BTH.shape
    log = jnp.moveaxis(log_BTH, 1, 2).reshape(B, H, T // C, C)
    step = jnp.round(lax.stop_gradient(log) / COARSE) * COARSE
    coarse, fine = jnp.cumsum(step, -1), jnp.cumsum(log - step, -1)
    read = jnp.exp(coarse + fine)
    written = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
    return jnp.stack([coarse, fine, read, written], -2), jnp.stack([-coarse, -fine, written, read], -2)


def over_rows(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, of arrays batch first; `vmap` folds its axis into the batch."""
    mapped = custom_batching.custom_vmap(f)

    @mapped.def_vmap
    def fold(size, are_mapped, *args):
        spread = lambda x, is_mapped: x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        args = jax.tree.map(spread, args, tuple(are_mapped))
        result = mapped(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), args))
        result = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), result)
        return result, jax.tree.map(lambda _: True, result)

    return mapped


def sums_to_the_end(x_X: jax.Array, keep_X: jax.Array) -> jax.Array:
    """s_t = x_t + keep_t s_{t+1} along the last axis."""

    def combine(later, now):
        return later[0] * now[0], now[1] + now[0] * later[1]

    return lax.associative_scan(combine, (keep_X, x_X), reverse=True, axis=x_X.ndim - 1)[1]


def limits(q: Any, k: Any, v: Any, log_decay: Any, wide: dict[str, Any], device: Any, auto: bool) -> str | None:
    """What keeps these kernels from running, or None. `wide`: the arguments that have to be float32."""
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are of dtypes {q.dtype}, {k.dtype} and {v.dtype}, not of one"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q, k and v are {q.dtype}, neither bfloat16 nor float32"
    for name, x in {"log_decay": log_decay, **wide}.items():
        if x.dtype != jnp.float32:
            return f"{name} is {x.dtype}, not float32"
    for name, size in (("K", q.shape[-1]), ("V", v.shape[-1])):
        if size > LARGEST[parts_of(q.dtype)]:
            return f"{name} = {size} is more than {LARGEST[parts_of(q.dtype)]}, what fits of {q.dtype} on the chip"
    if device is not None and getattr(device, "compute_capability", None) != "9.0":
        return f"the device is a {device.device_kind}, not of compute capability 9.0"
    if auto and len(log_decay.shape) == 4:
        return "with a decay per key most of the work is XLA's in either form"
    programs = v.shape[0] * v.shape[2] * -(-v.shape[-1] // BLOCK)
    if auto and programs < PROCESSORS:
        return f"{programs} programs, rows by heads by {BLOCK} columns of V, do not fill {PROCESSORS} processors"
    return None
