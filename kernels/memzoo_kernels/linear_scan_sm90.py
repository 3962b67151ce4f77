"""The elementwise recurrence on Hopper GPUs: a thread a channel, the state in a register from the first token on.

    h_t = a_t h_{t-1} + x_t

Source: the equation itself, token by token. Its gradient is the same loop backward in time, Martin, Cundy,
"Parallelizing Linear Recurrent Neural Nets Over Sequence Length" (2017), arXiv:1709.04057:

    dx_t = dh_t + g_{t+1}        da_t = dx_t h_{t-1}        g_t = a_t dx_t, of which g_1 is the incoming state's

One CTA of L = 128 threads takes one row and 128 channels, and walks over tiles of C = 32 tokens:

      forward    a, x [C, L] -> h [C, L]                    h in a register of each thread
      backward   a, h, dh [C, L] -> da, dx [C, L]           g in a register, and h of the token before the tile

HBM:           every array read or written once, by TMA. T and X that fill no tile are padded, and so copied, before.
Shared memory: two stages of what is read, one tile of each that is written: 80 KB forward, 128 KB backward.

Per token and channel, of e bytes an element of a and of x (4 in float32, 2 in bfloat16):
      forward   2 e + 4 bytes, 2 flops
      backward  3 e + 8 bytes, 3 flops
so that memory is the limit. A decay of 0 forgets whatever the state holds, inf and NaN too: a reset is such a decay.

Dims: B batch, T time, X channels, N tiles, C tokens of a tile, L channels of a tile, J tiles side by side.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memzoo_kernels import _hopper as hp

C, L = 32, 128
GROUP = 8  # tokens of which all is read before any is computed, so that they wait for shared memory once
ROW = plgpu.Layout.WG_STRIDED((L,), 1)


def support(a: Any, x: Any, h: Any, device: Any, *, auto: bool = False) -> str | None:
    """None, or why the kernel can't run. Only shapes and dtypes are read. device None: the interpreter."""
    for name, array in (("a", a), ("x", x)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {array.dtype}, neither bfloat16 nor float32"
    if h.dtype != jnp.float32:
        return f"h is {h.dtype}, not float32"
    if device is not None and getattr(device, "compute_capability", None) != "9.0":
        return f"the device is a {device.device_kind}, not of compute capability 9.0"
    programs = x.shape[0] * -(-x.shape[-1] // L)
    if auto and programs < hp.PROCESSORS:
        return f"{programs} programs, rows by {L} channels, do not fill {hp.PROCESSORS} processors"
    return None


def linear_scan(
    a_BTX: jax.Array, x_BTX: jax.Array, h_BX: jax.Array, reset_BT: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """As memzoo.ops.linear_scan, every argument given: (h_BTX, h_BX), float32. See kernels/README.md."""
    T, X = x_BTX.shape[1:]
    a_BTX = jnp.where(reset_BT[..., None], 0, a_BTX)
    a = jnp.pad(a_BTX, ((0, 0), (-T % C, 0), (0, -X % L)), constant_values=1)  # in front, they forget nothing
    x = jnp.pad(x_BTX, ((0, 0), (-T % C, 0), (0, -X % L)))
    h_BTX, last_BX = _kernel(a, x, jnp.pad(h_BX, ((0, 0), (0, -X % L))), interpret)
    return h_BTX[:, -T:, :X], last_BX[:, :X]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _kernel(a, x, h_BX, interpret):
    return tuple(hp.over_rows(partial(_forward, interpret=interpret))(a, x, h_BX))


def _kernel_fwd(a, x, h_BX, interpret):
    h_BTX, last_BX = _kernel(a, x, h_BX, interpret)
    return (h_BTX, last_BX), (a, jnp.zeros((), x.dtype), h_BX, h_BTX)


def _kernel_bwd(interpret, saved, cotangents):
    a, of_x, h_BX, h_BTX = saved
    run = partial(_backward, dtypes=(a.dtype, of_x.dtype), interpret=interpret)
    return tuple(hp.over_rows(run)(a, h_BTX, cotangents[0], h_BX, cotangents[1]))


_kernel.defvjp(_kernel_fwd, _kernel_bwd)


def _carry(a, h):
    """a h, and 0 where a = 0 whatever h holds."""
    return jnp.where(a == 0, 0.0, a * h)


def _rows(ref, begin):
    return [hp.load(ref.at[begin + t], ROW).astype(jnp.float32) for t in range(GROUP)]


def _call(name, body, tiles, states, dtypes, interpret):
    """Tiles [B, T, X] and states [B, X] are read; tiles of these dtypes and a state are written."""
    B, T, X = tiles[0].shape
    out = [jax.ShapeDtypeStruct((B, T, X), dtype) for dtype in dtypes] + [jax.ShapeDtypeStruct((B, X), jnp.float32)]
    scratch = [plgpu.SMEM((C, L), dtype) for dtype in dtypes]
    return hp.kernel(name, body, out, (B, 1, X // L), scratch, interpret)(*tiles, *states)


def _walk(tile, tiles_g, N, carry, reverse=False):
    at = lambda i: N - 1 - i if reverse else i
    j = lax.axis_index("j")
    spec = plgpu.BlockSpec((C, L), lambda i: (at(i), j))
    run = plgpu.emit_pipeline(tile, grid=(N,), max_concurrent_steps=2, in_specs=[spec] * len(tiles_g), init_carry=carry)
    return run(*(ref.at[lax.axis_index("b")] for ref in tiles_g))


def _forward(a, x, h_BX, *, interpret):
    def body(a_g, x_g, h_g, all_g, last_g, all_s):
        b, channels = lax.axis_index("b"), pl.ds(lax.axis_index("j") * L, L)

        def tile(index, a_s, x_s, h_L):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def group(i, h_L):
                a, x = (_rows(ref, i * GROUP) for ref in (a_s, x_s))
                for t in range(GROUP):
                    h_L = _carry(a[t], h_L) + x[t]
                    all_s[i * GROUP + t] = h_L
                return h_L

            h_L = lax.fori_loop(0, C // GROUP, group, h_L)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(all_s, all_g.at[b, pl.ds(index[0] * C, C), channels])
            return h_L

        h_L = _walk(tile, (a_g, x_g), a.shape[1] // C, hp.load(h_g.at[b, channels], ROW, optimized=False))
        last_g[b, channels] = h_L
        plgpu.wait_smem_to_gmem(0)

    return _call("linear_scan_forwards", body, (a, x), (h_BX,), (jnp.float32,), interpret)


def _backward(a, h_BTX, dh_BTX, h_BX, dlast_BX, *, dtypes, interpret):
    N = a.shape[1] // C

    def body(a_g, all_g, dh_g, h_g, dlast_g, da_g, dx_g, first_g, da_s, dx_s):
        b, channels = lax.axis_index("b"), pl.ds(lax.axis_index("j") * L, L)

        def tile(index, a_s, all_s, dh_s, g_L):
            n = N - 1 - index[0]
            of_tile = hp.load(all_g.at[b, jnp.maximum(n * C - 1, 0), channels], ROW, optimized=False)
            first_L = jnp.where(n == 0, hp.load(h_g.at[b, channels], ROW, optimized=False), of_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def group(i, g_L):
                begin = C - GROUP - i * GROUP
                a, h, dh = (_rows(ref, begin) for ref in (a_s, all_s, dh_s))
                earlier = hp.load(all_s.at[jnp.maximum(begin - 1, 0)], ROW)
                before = [jnp.where(begin == 0, first_L, earlier), *h]
                for t in reversed(range(GROUP)):
                    dx_L = dh[t] + g_L
                    da_s[begin + t] = (dx_L * before[t]).astype(da_s.dtype)
                    dx_s[begin + t] = dx_L.astype(dx_s.dtype)
                    g_L = _carry(a[t], dx_L)
                return g_L

            g_L = lax.fori_loop(0, C // GROUP, group, g_L)
            plgpu.commit_smem()
            for ref_s, ref_g in ((da_s, da_g), (dx_s, dx_g)):
                plgpu.copy_smem_to_gmem(ref_s, ref_g.at[b, pl.ds(n * C, C), channels])
            return g_L

        carry = hp.load(dlast_g.at[b, channels], ROW, optimized=False)
        first_g[b, channels] = _walk(tile, (a_g, all_g, dh_g), N, carry, reverse=True)
        plgpu.wait_smem_to_gmem(0)

    return _call("linear_scan_backwards", body, (a, h_BTX, dh_BTX), (h_BX, dlast_BX), dtypes, interpret)
