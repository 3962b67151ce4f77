"""The delta rule with decay, for TPU: chunks of a head in order, the state on the chip from the first to the last.

    S~ = exp(log_decay_t) S_{t-1}        S_t = S~ + beta_t k_t (v_t - S~' k_t)'        y_t = S_t' q_t

Source: the WY form of Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length" (2024), arXiv:2406.06484, sec. 3.2; with decay, Yang, Kautz, Hatamizadeh, "Gated Delta Networks"
(2024), arXiv:2412.06464, sec. 3.3. The inverse is a forward substitution in blocks of 16 rows and a merge of blocks:
Neumann doubling errs by many orders of magnitude when keys are correlated.

    one program, one chunk of one head           kept on the chip between the chunks of a head
      q, k [C, K]   v, y [C, V]   beta [1, C]       S' [V, K] (its gradient, on the way back)
      log_decay [C, K], or [1, C]

      P = (q k') decayed, A = (beta k k') decayed, below the diagonal      X = (I + A)^-1      all [C, C]
      V = X (beta v) - X (beta k decayed from the start) S                 what is written, [C, V]
      y = P V + (q decayed from the start) S
      S = S decayed + (k decayed to the end)' V

HBM:       the inputs and outputs, heads first, each read or written once per sweep; for a gradient also the state
           before each chunk. On the way back a chunk is computed again from that, and pulled back through.
VMEM:      two buffers of each tile, filled and emptied by the pipeline; S', float32; at K = V = 256 under 4 MiB.
Registers: the rest, which lives for one chunk. X is float32 until it is multiplied by values and keys.

Per token and head, of e bytes an element (2 in bfloat16), C = 64:
      forward   e (2 K + 2 V) + 4 X + 4 bytes, and 4 K V / C more for a gradient
                2 (3 C K + 2 C V + 3 K V + 2 C^2 M) flops
      backward  e (4 K + 3 V) + 8 X + 8 + 4 K V / C bytes, about three times the flops
where X is 1, or K with a decay per key, which makes the 2 C K of P and A log2 C times, and M = log2 (C / 16), the
merges of blocks.

Dims: B batch, T time, H heads, N chunks, C chunk, K key, V value, X either K (a decay per key) or 1 (per head).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from memzoo_kernels._tpu import (
    as_column,
    as_row,
    chunk_of,
    decay,
    dot,
    heads_first,
    heads_last,
    limits,
    log_decays,
    meet,
    places,
    products,
    put,
    read_log,
    scaled,
    sweep,
    write_log,
)

CHUNK = 64
ROWS = 16  # of forward substitution


def support(q, k, v, beta, log_decay, S, device: jax.Device | None, *, auto: bool = False) -> str | None:
    """None, or why the kernel can't run. Only shapes and dtypes are read. device None: the interpreter."""
    return limits(q, k, v, {"beta": beta, "log_decay": log_decay, "S": S}, device)


def delta_rule(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    beta_BTH: jax.Array,
    log_decay: jax.Array,
    S_BHKV: jax.Array,
    reset_BT: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As memzoo.ops.delta_rule, every argument given: (y_BTHV, S_BHKV). See kernels/README.md."""
    T = q_BTHK.shape[1]
    C = chunk_of(T, CHUNK)
    q, k, v, beta = (heads_first(x, C) for x in (q_BTHK, k_BTHK, v_BTHV, beta_BTH))
    log = log_decays(log_decay, reset_BT, C)
    y, S_BHVK = _kernel(q, k, v, beta, log, jnp.swapaxes(S_BHKV, 2, 3), interpret)
    return heads_last(y, T), jnp.swapaxes(S_BHVK, 2, 3)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _kernel(q, k, v, beta, log, S_BHVK, interpret):
    return _run(q, k, v, beta, log, S_BHVK, interpret)


def _run(q, k, v, beta, log, S_BHVK, interpret, *, keep_states=False):
    (B, H, N), (V, K) = q.shape[:3], S_BHVK.shape[2:]
    states = [jax.ShapeDtypeStruct((B, H, N, V, K), jnp.float32)] if keep_states else []
    outputs = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (v, S_BHVK)), *states]
    return sweep(_forward, (q, k, v, beta, log, S_BHVK), outputs, [(V, K)], flops=_flops(q, v), interpret=interpret)


def _flops(q, v):
    (C, K), V = q.shape[3:], v.shape[-1]
    return 2 * C * (3 * C * K + 2 * C * V + 3 * K * V + 2 * C * C * (C // ROWS).bit_length())


def _kernel_fwd(q, k, v, beta, log, S_BHVK, interpret):
    y, last, states = _run(q, k, v, beta, log, S_BHVK, interpret, keep_states=True)
    return (y, last), (q, k, v, beta, log, states)


def _kernel_bwd(interpret, saved, cotangents):
    *inputs, states = saved
    dy, dS_BHVK = cotangents
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs, dS_BHVK)]
    inputs, scratch = (*inputs, states, dy, dS_BHVK), [dS_BHVK.shape[2:]]
    flops = 3 * _flops(*inputs[0:3:2])
    return tuple(sweep(_backward, inputs, outputs, scratch, flops=flops, interpret=interpret, reverse=True))


_kernel.defvjp(_kernel_fwd, _kernel_bwd)


def _chunk(S_VK, q_CK, k_CK, v_CV, beta_C1, log_CX):
    """One chunk: (S_VK, y_CV), both in float32."""
    d = decay(log_CX)
    row, column = places((q_CK.shape[0],) * 2)
    beta_k_CK = scaled(k_CK, beta_C1)
    P_CC, A_CC = products([q_CK, beta_k_CK], k_CK, d)
    X_CC = unit_lower_inverse(jnp.where(row > column, A_CC, 0)).astype(v_CV.dtype)
    S = S_VK.astype(k_CK.dtype)
    W_CK = dot(X_CC, scaled(beta_k_CK, jnp.exp(d.prefix_CX))).astype(k_CK.dtype)
    V_CV = (dot(X_CC, scaled(v_CV, beta_C1)) - dot(W_CK, S, "nt")).astype(v_CV.dtype)
    y_CV = dot(scaled(q_CK, jnp.exp(d.prefix_CX)), S, "nt") + dot(P_CC.astype(v_CV.dtype), V_CV)
    return jnp.exp(d.total_1X) * S_VK + dot(V_CV, scaled(k_CK, jnp.exp(d.suffix_CX)), "tn"), y_CV


@jax.custom_vjp
def unit_lower_inverse(A_CC: jax.Array) -> jax.Array:
    """(I + A)^-1 of a strictly lower triangular A, in float32."""
    C = A_CC.shape[0]
    row, column = places((C, C))
    blocks = []
    for m in range(0, C, ROWS):
        X = jnp.where(row == column, 1.0, 0.0)[m : m + ROWS]
        for j in range(ROWS - 1):  # row j is done; what later rows have of it is taken from them
            X = X - A_CC[m : m + ROWS, m + j : m + j + 1] * X[j : j + 1]
        blocks.append(X)
    X = jnp.concatenate(blocks)
    size = ROWS
    while size < C:  # [[X, 0], [A21, Y]] inverts to [[X', 0], [-Y' A21 X', Y']]
        X = X - dot(dot(X, jnp.where(meet(C, size), A_CC, 0)), X)
        size *= 2
    return X


def _inverse_fwd(A_CC):
    X_CC = unit_lower_inverse(A_CC)
    return X_CC, X_CC


def _inverse_bwd(X_CC, dX_CC):
    return (-dot(dot(X_CC, dX_CC, "tn"), X_CC, "nt"),)  # the caller's mask keeps what is below the diagonal


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)


def _forward(q_ref, k_ref, v_ref, beta_ref, log_ref, S_ref, y_ref, last_ref, *scratch):
    *states_ref, S = scratch
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    pl.when(first)(put(S, S_ref))
    for ref in states_ref:
        ref[...] = S[...]
    arrays = q_ref[...], k_ref[...], v_ref[...], as_column(beta_ref[...]), read_log(log_ref)
    S[...], y_CV = _chunk(S[...], *arrays)
    y_ref[...] = y_CV.astype(y_ref.dtype)
    pl.when(last)(put(last_ref, S))


def _backward(*refs):
    q_ref, k_ref, v_ref, beta_ref, log_ref, S_ref, dy_ref, dS_ref = refs[:8]
    dq_ref, dk_ref, dv_ref, dbeta_ref, dlog_ref, first_dS_ref, dS = refs[8:]
    last, first = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    pl.when(last)(put(dS, dS_ref))
    arrays = q_ref[...], k_ref[...], v_ref[...], as_column(beta_ref[...]), read_log(log_ref)
    _, pull = jax.vjp(_chunk, S_ref[...], *arrays)
    dS[...], dq_ref[...], dk_ref[...], dv_ref[...], dbeta, dlog = pull((dS[...], dy_ref[...].astype(jnp.float32)))
    dbeta_ref[...] = as_row(dbeta)
    write_log(dlog_ref, dlog)
    pl.when(first)(put(first_dS_ref, dS))
