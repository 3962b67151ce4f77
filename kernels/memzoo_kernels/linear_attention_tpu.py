"""Linear attention with decay, for TPU: chunks of a head in order, the state on the chip from the first to the last.

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t'        y_t = S_t' q_t

Source: the chunkwise form of Yang et al., "Gated Linear Attention Transformers" (2023), arXiv:2312.06635, sec. 4; Sun
et al., "Retentive Network" (2023), arXiv:2307.08621, sec. 2.3. The gradient stores no states: a sweep forward in time
makes them again, for q, and one backward makes their gradients, for k and v.

    one program, one chunk of one head           kept on the chip between the chunks of a head
      q, k [C, K]   v, y [C, V]                     S' [V, K] (its gradient, on the way back)
      log_decay [C, K], or [1, C]

      P = (q k') decayed, below the diagonal        [C, C]
      y = P v + (q decayed from the start) S
      S = S decayed + (k decayed to the end)' v

HBM:       the inputs and outputs, heads first, each read or written once per sweep.
VMEM:      two buffers of each tile, filled and emptied by the pipeline; S', float32; at K = V = 256 under 4 MiB.
Registers: the rest, which lives for one chunk: P, the decays, and what the gradient pulls back through them.

Per token and head, of e bytes an element (2 in bfloat16), C = 128:
      forward   e (2 K + 2 V) + 4 X bytes,   2 (C K + C V + 2 K V) flops
      backward  e (6 K + 5 V) + 20 X bytes,  2 (4 C K + 3 C V + 5 K V) flops, both sweeps
where X is 1, or K with a decay per key; the products C K are then made log2 C times, once for each halving of a chunk.

The gradient of log_decay_t is a sum over pairs of tokens, the later one from t on, the earlier one before t. Pairs in
one chunk, reads of what came before the chunk and writes that outlast it are summed as they are. Pairs that span the
chunk are `kept`, <S exp(..), dS'> per key, which needs S and its gradient at once: what a chunk keeps and has written,
the next one keeps and reads.

Dims: B batch, T time, H heads, N chunks, C chunk, K key, V value, X either K (a decay per key) or 1 (per head).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from memzoo_kernels._tpu import (
    chunk_of,
    decay,
    dot,
    heads_first,
    heads_last,
    limits,
    log_decays,
    products,
    put,
    read_log,
    scaled,
    sweep,
    write_log,
)

CHUNK = 128


def support(q, k, v, log_decay, S, device: jax.Device | None, *, auto: bool = False) -> str | None:
    """None, or why the kernel can't run. Only shapes and dtypes are read. device None: the interpreter."""
    return limits(q, k, v, {"log_decay": log_decay, "S": S}, device)


def linear_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay: jax.Array,
    S_BHKV: jax.Array,
    reset_BT: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As memzoo.ops.linear_attention, every argument given: (y_BTHV, S_BHKV). See kernels/README.md."""
    T = q_BTHK.shape[1]
    C = chunk_of(T, CHUNK)
    q, k, v = (heads_first(x, C) for x in (q_BTHK, k_BTHK, v_BTHV))
    log = log_decays(log_decay, reset_BT, C)
    y, S_BHVK = _kernel(q, k, v, log, jnp.swapaxes(S_BHKV, 2, 3), interpret)
    return heads_last(y, T), jnp.swapaxes(S_BHVK, 2, 3)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _kernel(q, k, v, log, S_BHVK, interpret):
    (C, K), V = q.shape[3:], v.shape[-1]
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (v, S_BHVK)]
    flops = 2 * C * (C * K + C * V + 2 * K * V)
    return sweep(_forward, (q, k, v, log, S_BHVK), outputs, [(V, K)], flops=flops, interpret=interpret)


def _kernel_fwd(q, k, v, log, S_BHVK, interpret):
    return _kernel(q, k, v, log, S_BHVK, interpret), (q, k, v, log, S_BHVK)


def _kernel_bwd(interpret, saved, cotangents):
    q, k, v, log, S_BHVK = saved
    dy, dS_BHVK = cotangents
    (B, H, N, C, K), V = q.shape, v.shape[-1]
    like = lambda *xs: [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs]
    per_key = log.shape[-2] > 1
    read = jax.ShapeDtypeStruct((B, H, N, 1, K if per_key else 1), jnp.float32)
    kept = jax.ShapeDtypeStruct((B, H, *read.shape[3:]), jnp.float32)
    run = partial(sweep, interpret=interpret)

    inputs = q, k, v, log, dy, S_BHVK, dS_BHVK
    flops = 2 * C * (2 * C * K + C * V + 2 * K * V)
    dq, dlog, read, kept = run(_queries, inputs, [*like(q, log), read, kept], [(V, K)], flops=flops)
    inputs = q, k, v, log, dy, dlog, read, kept, dS_BHVK
    flops = 2 * C * (2 * C * K + 2 * C * V + 3 * K * V)
    outputs, scratch = like(k, v, log, S_BHVK), [(V, K), kept.shape[2:]]
    dk, dv, dlog, dS_BHVK = run(_keys, inputs, outputs, scratch, flops=flops, reverse=True)
    return dq, dk, dv, dlog, dS_BHVK


_kernel.defvjp(_kernel_fwd, _kernel_bwd)


def _reads(q_CK, d, S_VK, before_1X):
    """What the chunk reads of the state before it, if that had decayed by `before` already."""
    return dot(scaled(q_CK, jnp.exp(d.prefix_CX + before_1X)), S_VK.astype(q_CK.dtype), "nt")


def _writes(k_CK, v_CV, d, after_1X):
    """What the chunk adds to the state, when that has decayed by `after` since."""
    return dot(v_CV, scaled(k_CK, jnp.exp(d.suffix_CX + after_1X)), "tn")


def _forward(q_ref, k_ref, v_ref, log_ref, S_ref, y_ref, last_ref, S):
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    pl.when(first)(put(S, S_ref))
    q, k, v, d = q_ref[...], k_ref[...], v_ref[...], decay(read_log(log_ref))
    y_CV = dot(products([q], k, d)[0].astype(v.dtype), v) + _reads(q, d, S[...], 0)
    y_ref[...] = y_CV.astype(y_ref.dtype)
    S[...] = jnp.exp(d.total_1X) * S[...] + _writes(k, v, d, 0)
    pl.when(last)(put(last_ref, S))


def _queries(q_ref, k_ref, v_ref, log_ref, dy_ref, S_ref, dS_ref, dq_ref, dlog_ref, read_ref, kept_ref, S):
    """Forward in time, with S: what the chunk reads."""
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    pl.when(first)(put(S, S_ref))
    q, k, v, log = q_ref[...], k_ref[...], v_ref[...], read_log(log_ref)

    def outputs(q, log, before_1X):
        d = decay(log)
        return dot(products([q], k, d)[0].astype(v.dtype), v) + _reads(q, d, S[...], before_1X)

    _, pull = jax.vjp(outputs, q, log, jnp.zeros(read_ref.shape, jnp.float32))
    dq_ref[...], dlog, read_ref[...] = pull(dy_ref[...].astype(jnp.float32))
    write_log(dlog_ref, dlog)
    d = decay(log)

    @pl.when(last)
    def _():
        kept_VK = jnp.exp(d.total_1X) * S[...] * dS_ref[...]
        kept_1K = jnp.sum(kept_VK, axis=0, keepdims=True)
        kept_ref[...] = kept_1K if kept_ref.shape[1] > 1 else jnp.sum(kept_1K, axis=1, keepdims=True)

    S[...] = jnp.exp(d.total_1X) * S[...] + _writes(k, v, d, 0)


def _keys(*refs):
    """Backward in time, with the gradient of S: what the chunk writes."""
    q_ref, k_ref, v_ref, log_ref, dy_ref, dlog_ref, read_ref, kept_ref, dS_ref = refs[:9]
    dk_ref, dv_ref, all_dlog_ref, first_dS_ref, dS, kept_and_written = refs[9:]
    last, first = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    pl.when(last)(put(dS, dS_ref))
    q, k, v, log, dy = q_ref[...], k_ref[...], v_ref[...], read_log(log_ref), dy_ref[...]

    def outputs_and_writes(k, v, log, after_1X):
        d = decay(log)
        P_CC = products([q], k, jax.tree.map(lax.stop_gradient, d))[0]  # its gradient in log is the other sweep's
        return dot(P_CC.astype(v.dtype), v), _writes(k, v, d, after_1X)

    _, pull = jax.vjp(outputs_and_writes, k, v, log, jnp.zeros(read_ref.shape, jnp.float32))
    dk_ref[...], dv_ref[...], dlog, written_1X = pull((dy.astype(jnp.float32), dS[...]))
    d = decay(log)
    kept_1X = jnp.where(last, kept_ref[...], kept_and_written[...] - written_1X)
    kept_1X = jnp.where(d.total_1X == -jnp.inf, 0, kept_1X)
    kept_and_written[...] = kept_1X + read_ref[...]
    write_log(all_dlog_ref, dlog + kept_1X + read_log(dlog_ref))
    dS[...] = jnp.exp(d.total_1X) * dS[...] + dot(dy, scaled(q, jnp.exp(d.prefix_CX)), "tn")
    pl.when(first)(put(first_dS_ref, dS))
