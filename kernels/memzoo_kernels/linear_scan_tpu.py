"""The elementwise recurrence, for TPU: tiles of a row in order of time, the state on the chip from first to last.

    h_t = a_t h_{t-1} + x_t

Source: the equation itself, token by token. Its gradient is the same loop backward in time, Martin, Cundy,
"Parallelizing Linear Recurrent Neural Nets Over Sequence Length" (2017), arXiv:1709.04057:

    dx_t = dh_t + g_{t+1}        da_t = dx_t h_{t-1}        g_t = a_t dx_t, of which g_1 is the incoming state's

    one program, C tokens of L channels                          kept on the chip between the tiles of a row
      forward    a, x, h [C, L]                                    h of the tile's last token [1, L]
      backward   a, h, dh, da, dx [C, L], h before the tile        g of the tile's first token [1, L]

HBM:       every array as it lies, [B, T, X], read or written once: none is copied to be padded or turned around.
VMEM:      two buffers of each tile, filled and emptied by the pipeline, in float32 3 MiB forward and 5 MiB backward;
           copies in float32 of what is in bfloat16; the state.
Registers: one row at a time. 1024 channels of a token are one register, so that a token costs a multiplication, an
           addition and the comparison and choice that let a decay of 0 forget inf and NaN: a reset is such a decay.

Per token and channel, of e bytes an element of a and of x (4 in float32, 2 in bfloat16):
      forward   2 e + 4 bytes, 2 flops
      backward  3 e + 8 bytes, 3 flops
so that memory is the limit: in float32 12 bytes forward and 20 backward, where XLA's chunk form for a TPU v5e moves 37
forward and 159 with its gradient, by XLA's own count, and holds 16 and 24 bytes besides. No product of two decays is
formed: the results are those of the loop to the last bit.

Dims: B batch, T time, X channels, N tiles, C tokens of a tile, L channels of a tile.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memzoo_kernels._tpu import put, wrong_chip

CHUNK, CHANNELS = 128, 1024  # tokens and channels of a tile
ROWS, PACKED = 8, 16  # tokens that lie together in memory, in float32 and in bfloat16


def support(a: Any, x: Any, h: Any, device: jax.Device | None, *, auto: bool = False) -> str | None:
    """None, or why the kernel can't run. Only shapes and dtypes are read. device None: the interpreter."""
    for name, array in (("a", a), ("x", x)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {array.dtype}, neither bfloat16 nor float32"
    if h.dtype != jnp.float32:
        return f"h is {h.dtype}, not float32"
    return wrong_chip(device)


def linear_scan(
    a_BTX: jax.Array, x_BTX: jax.Array, h_BX: jax.Array, reset_BT: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """As memzoo.ops.linear_scan, every argument given: (h_BTX, h_BX), float32. See kernels/README.md."""
    a_BTX = jnp.where(reset_BT[..., None], 0, a_BTX)
    h_BTX, h_B1X = _kernel(a_BTX, x_BTX, h_BX[:, None], interpret)
    return h_BTX, h_B1X[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _kernel(a, x, h_B1X, interpret):
    return _sweep(_forward, (a, x), (h_B1X,), (jnp.float32,), interpret=interpret)


def _kernel_fwd(a, x, h_B1X, interpret):
    h_BTX, last_B1X = _kernel(a, x, h_B1X, interpret)
    return (h_BTX, last_B1X), (a, jnp.zeros((), x.dtype), h_B1X, h_BTX)


def _kernel_bwd(interpret, saved, cotangents):
    a, of_x, h_B1X, h_BTX = saved
    dh_BTX, dlast_B1X = cotangents
    tiles, states, dtypes = (a, h_BTX, dh_BTX), (h_B1X, dlast_B1X), (a.dtype, of_x.dtype)
    return _sweep(_backward, tiles, states, dtypes, before=h_BTX, interpret=interpret)


_kernel.defvjp(_kernel_fwd, _kernel_bwd)


def _sweep(kernel, tiles, states, dtypes, *, before=None, interpret):
    """Runs the kernel on each tile: rows and channels side by side, time in order.

    tiles [B, T, X], and outputs like them of `dtypes`; states [B, 1, X], and one output like them. With `before`
    time goes backward, and the first input that the kernel sees is ROWS tokens of it, those before its tile.
    """
    B, T, X = tiles[0].shape
    C, L = min(CHUNK, T + -T % PACKED), pl.cdiv(X, pl.cdiv(X, CHANNELS))
    L, N = L + -L % 128, pl.cdiv(T, C)
    at = lambda n: n if before is None else N - 1 - n
    tile = pl.BlockSpec((None, C, L), lambda b, l, n: (b, at(n), l))
    state = pl.BlockSpec((None, 1, L), lambda b, l, n: (b, 0, l))
    inputs, specs = (*tiles, *states), [tile] * len(tiles) + [state] * len(states)
    if before is not None:
        rows = pl.BlockSpec((None, ROWS, L), lambda b, l, n: (b, jnp.maximum(at(n) * (C // ROWS) - 1, 0), l))
        inputs, specs = (before, *inputs), [rows, *specs]
    outputs = [jax.ShapeDtypeStruct((B, T, X), dtype) for dtype in dtypes]
    outputs.append(jax.ShapeDtypeStruct((B, 1, X), jnp.float32))
    narrow = [i for i, x in enumerate((*inputs, *outputs)) if x.dtype != jnp.float32]

    def widened(*refs):
        """A row of bfloat16 is half of a register's rows, so that tiles of it are seen through copies in float32."""
        refs, copies = list(refs), dict(zip(narrow, refs[len(refs) - len(narrow) :], strict=True))
        for i in narrow:
            if i < len(inputs):
                copies[i][...] = refs[i][...].astype(jnp.float32)
        kernel(*(copies.get(i, ref) for i, ref in enumerate(refs[: len(refs) - len(narrow)])), end=(T - 1) % C)
        for i in narrow:
            if i >= len(inputs):
                refs[i][...] = copies[i][...].astype(refs[i].dtype)

    memory = sum(x.size * x.dtype.itemsize for x in (*tiles, *states, *outputs))
    run = pl.pallas_call(
        widened,
        grid=(B, pl.cdiv(X, L), N),
        in_specs=specs,
        out_specs=[tile] * len(dtypes) + [state],
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM((rows, L), jnp.float32) for rows in (1, *(C for _ in narrow))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=(2 if before is None else 3) * B * T * X, bytes_accessed=memory, transcendentals=0
        ),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name="linear_scan_tpu" + kernel.__name__,
    )
    return tuple(run(*inputs))


def _carry(a, h):
    """a h, and 0 where a = 0 whatever h holds."""
    return jnp.where(a == 0, 0, a * h)


def _forward(a_ref, x_ref, h_ref, all_ref, last_ref, h, *, end):
    n = pl.program_id(2)
    pl.when(n == 0)(put(h, h_ref))
    h_1L = h[...]
    for t in range(a_ref.shape[0]):
        h_1L = _carry(a_ref[t : t + 1], h_1L) + x_ref[t : t + 1]
        all_ref[t : t + 1] = h_1L
    h[...] = h_1L
    pl.when(n == pl.num_programs(2) - 1)(put(last_ref, all_ref.at[end : end + 1]))


def _backward(before_ref, a_ref, all_ref, dh_ref, h_ref, dlast_ref, da_ref, dx_ref, first_ref, g, *, end):
    last, first = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    g_1L = g[...]
    for t in reversed(range(a_ref.shape[0])):
        if t == end:  # what is behind the end of the last tile is nothing
            g_1L = jnp.where(last, dlast_ref[...], g_1L)
        before_1L = all_ref[t - 1 : t] if t else jnp.where(first, h_ref[...], before_ref[ROWS - 1 :])
        dx_1L = dh_ref[t : t + 1] + g_1L
        da_ref[t : t + 1] = dx_1L * before_1L
        dx_ref[t : t + 1] = dx_1L
        g_1L = _carry(a_ref[t : t + 1], dx_1L)
    g[...] = g_1L
    pl.when(first)(put(first_ref, g))
