"""The delta rule on Hopper GPUs: chunked, the state in registers from the first token to the last.

    S~ = exp(log_decay_t) S_{t-1}        S_t = S~ + k_t u_t'        u_t = beta_t (v_t - S~' k_t)        y_t = S_t' q_t

Given u, this is linear attention with the values u. What the tokens of a chunk correct of each other is a triangular
system, whose inverse X is computed for all chunks side by side before the kernel, [C, C] a chunk. Then one CTA of 128
threads takes one row, one head and 64 columns of the state, and walks over chunks of C = 64 tokens:

              64 columns of V                     per chunk, L_ij = exp(decay from token j to i), j <= i
             +----------------+
             |  v  [C, 64]    |                   P  = (q k') . L                                  [C, C]   wgmma
             +----------------+                   u  = X beta (v - (k S) . read)                   [C, 64]  2 wgmma
    +-----+  +----------------+                   y  = P u + (q S) . read                          [C, 64]  2 wgmma
    | q,k |  |  S  [K, 64]    |                   S  = whole S + k' (u . written)                  [K, 64]  wgmma
    | C,K |  |                |
    +-----+  +----------------+                   in registers: S float32 (K / 2 a thread), P, u, y
                                                  in shared memory: two stages of q, k, v, X and decays by TMA; P, S, u
                                                  in bfloat16 for wgmma, whose places the later ones of a chunk take
HBM, per token and head in bfloat16: q, k, v, X in, y out and u, where a gradient is wanted: 4 K + 6 V + 2 C bytes, and
20 bytes of decays and beta; 2 C K + 4 C V + 6 K V flops forward, after 2 C K + C^2 for X. 130 KB of shared memory at
K = 128.

The gradient stores no states, only u and X. One sweep backward in time, with the cotangent dS of the state, yields that
of the values, E; with the tokens as readers (q, dy) and (k, -E), all else is linear attention's, its `sweep`:

    E  = beta X' (P' dy + (k dS) . written)          dS = whole dS + (q . read)' dy - (k . read)' E        dv = E
    dq = what (dy, u, k) read                        z = what (E, u, k) read, but not of their own writes
    dk = what (u, dy, q) read backward in time, less what (u, E, k) read of others' writes, less z
    dbeta = (E . v - k . z) / beta

A decay per key takes the kernel of per_key_sm90.

Source: Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"
(2024), arXiv:2406.06484, sec. 3.2, with decays as in Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024),
arXiv:2412.06464, sec. 3.3.

Dims: B batch, T time, H heads, K key, V value, N chunks, C chunk, J blocks of columns.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memzoo_kernels import _hopper as hp
from memzoo_kernels import per_key_sm90 as per_key
from memzoo_kernels._hopper import BLOCK, WG, C
from memzoo_kernels.linear_attention_sm90 import decay_gradient, sweep


def support(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay, S_BHKV, device, *, auto=False) -> str | None:
    """None, or the limit exceeded, in a sentence."""
    if log_decay.ndim == 4 and q_BTHK.dtype == jnp.float32 and q_BTHK.shape[-1] > BLOCK:
        return f"K = {q_BTHK.shape[-1]} is more than {BLOCK}, what fits of float32 with a decay per key"
    return hp.limits(q_BTHK, k_BTHK, v_BTHV, log_decay, {"beta": beta_BTH, "S": S_BHKV}, device, auto)


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
    """(y_BTHV in the dtype of q, k and v, S_BHKV in float32), as kernels/README.md has it."""
    T, K, V = q_BTHK.shape[1], q_BTHK.shape[-1], v_BTHV.shape[-1]
    q, k, v = (hp.pad_features(hp.pad_time(x)) for x in (q_BTHK, k_BTHK, v_BTHV))
    log, beta_BTH = hp.pad_time(hp.with_resets(log_decay, reset_BT)), hp.pad_time(beta_BTH)
    S_BHKV = hp.pad_features(S_BHKV, (-1, -2))
    if log_decay.ndim == 4:
        heads_first = (per_key.heads_first(x) for x in (q, k, v, beta_BTH[..., None], hp.pad_features(log)))
        y, S = per_key.correct(*heads_first, S_BHKV, interpret)
        y = per_key.heads_last(y)
    else:
        y, S = _correct(q, k, v, beta_BTH, log, S_BHKV, interpret)
    return y[:, -T:, :, :V], S[..., :K, :V]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _correct(q, k, v, beta_BTH, log_BTH, S_BHKV, interpret):
    X_BHTC = inverse(k, beta_BTH, hp.decays(log_BTH)[0])
    y, last = _sweep(q, k, v, X_BHTC, _with_beta(hp.decays(log_BTH)[0], beta_BTH), S_BHKV, "y", interpret)
    return y, last


def _correct_fwd(q, k, v, beta_BTH, log_BTH, S_BHKV, interpret):
    decay = hp.decays(log_BTH)[0]
    X_BHTC = inverse(k, beta_BTH, decay)
    y, last, *u = _sweep(q, k, v, X_BHTC, _with_beta(decay, beta_BTH), S_BHKV, "yu", interpret)
    return (y, last), (q, k, v, beta_BTH, log_BTH, S_BHKV, X_BHTC, tuple(u), last)


def _correct_bwd(interpret, saved, cotangents):
    q, k, v, beta_BTH, log_BTH, S_BHKV, X_BHTC, u, last_BHKV = saved
    dy, dS_BHKV = cotangents
    forwards, backwards = hp.decays(log_BTH)
    across = partial(jnp.swapaxes, axis1=-1, axis2=-2)
    reading = partial(sweep, decay_BHN4C=forwards, S_BHKV=across(S_BHKV), interpret=interpret)
    writing = partial(sweep, decay_BHN4C=backwards, reverse=True, interpret=interpret)
    beta_BTH = jnp.where(jnp.abs(beta_BTH) < hp.TINY, hp.TINY, beta_BTH)
    dS0_BHKV, *E = _sweep(q, k, dy, X_BHTC, _with_beta(backwards, beta_BTH), dS_BHKV, "E", interpret)
    E_BTHV = sum(part.astype(jnp.float32) for part in E)
    dq, _, read = reading(dy, u, k, x=q)
    z, _, erased = reading(tuple(E), u, k, x=k, own=False)
    dk, _, written = writing(u, dy, q, S_BHKV=across(dS_BHKV), x=k)
    less, _, corrected = writing(u, tuple(E), k, S_BHKV=jnp.zeros_like(across(S_BHKV)), x=k, own=False)
    wide = lambda x: x.astype(jnp.float32)
    dk = (wide(dk) - wide(less) - wide(z)).astype(k.dtype)
    last_BH = jnp.sum(last_BHKV * dS_BHKV, (-1, -2))
    dlog = decay_gradient(log_BTH, forwards, read - erased, written - corrected, last_BH)
    erased_BTH = jnp.moveaxis(erased.sum(-2).reshape(*erased.shape[:2], -1), 2, 1)
    dbeta = (jnp.sum(E_BTHV * wide(v), -1) - erased_BTH) / beta_BTH
    return dq, dk, E_BTHV.astype(v.dtype), dbeta, dlog, dS0_BHKV


_correct.defvjp(_correct_fwd, _correct_bwd)


def _with_beta(decay_BHN4C, beta_BTH):
    B, H, N = decay_BHN4C.shape[:3]
    return jnp.concatenate([decay_BHN4C, jnp.moveaxis(beta_BTH, 1, 2).reshape(B, H, N, 1, C)], -2)


def inverse(k_BTHK, beta_BTH, decay_BHN4C):
    """X [B, H, T, C]: of each chunk (I + A)^-1, where A_ij = beta_i (k_i k_j) exp(decay from j to i), j < i."""
    B, H, N = decay_BHN4C.shape[:3]
    k = jnp.moveaxis(k_BTHK, 1, 2).reshape(B, H, N, C, -1)
    exact = lax.Precision.HIGHEST if k.dtype == jnp.float32 else lax.Precision.DEFAULT
    products = jnp.einsum("bhnik,bhnjk->bhnij", k, k, precision=exact, preferred_element_type=jnp.float32)
    coarse, fine = (decay_BHN4C[..., m, :, None] - decay_BHN4C[..., m, None, :] for m in (0, 1))
    before = jnp.tril(jnp.ones((C, C), bool), -1)
    L = jnp.exp(jnp.where(before, coarse + fine, -jnp.inf))
    A = jnp.moveaxis(beta_BTH, 1, 2).reshape(B, H, N, C, 1) * products * L
    eye = jnp.broadcast_to(jnp.eye(C), A.shape)
    X = lax.linalg.triangular_solve(A + eye, eye, left_side=True, lower=True, unit_diagonal=True)
    return X.reshape(B, H, N * C, C)


def _sweep(q, k, v, X_BHTC, decay_BHN5C, S_BHKV, what, interpret):
    """'y': (y, last S). 'yu': (y, last S, parts of u). 'E', with v = dy and S = dS: (first dS, parts of E)."""
    parts = hp.parts_of(v.dtype)
    tokens = [hp.split(a, parts) for a in (q, k, v, X_BHTC)]
    run = partial(_kernel, dtype=v.dtype, what=what, interpret=interpret)
    return hp.over_rows(run)(tokens, decay_BHN5C, S_BHKV)


def _kernel(tokens, decay_BHN5C, S_BHKV, *, dtype, what, interpret):
    (B, T, H, K), V, parts = tokens[0][0].shape, tokens[2][0].shape[-1], len(tokens[0])
    N, J, blocks = T // C, V // BLOCK, range(K // BLOCK)
    reverse = what == "E"
    reads, keeps = not reverse, what != "y"
    at = lambda i: N - 1 - i if reverse else i

    def body(*refs):
        take = partial(hp.take, list(refs))
        *tokens_g, decay_g, S_g = take(4 * parts + 2)
        (*y_g,), (last_g,), w_g = take(reads), take(1), take(parts * keeps)
        p_s, S_s, w_s = take(parts), take(parts), take(parts)
        b, h, j = (lax.axis_index(name) for name in "bhj")
        here = lambda ref, m: ref.at[b, h, pl.ds(m * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK)]
        out = lambda ref, n: ref.at[b, pl.ds(n * C, C), h, pl.ds(j * BLOCK, BLOCK)]

        def chunk(index, *refs):
            take = partial(hp.take, list(refs))
            q_s, k_s, v_s, X_s, (decay_s, S) = take(parts), take(parts), take(parts), take(parts), take(2)
            n, first = at(index[0]), hp.block(S_s, 0)
            vector = lambda m, axis=1: hp.load(decay_s.at[m], WG.reduce(axis))
            row, column = (plgpu.broadcasted_iota(jnp.int32, (C, C), axis, layout=WG) for axis in (0, 1))
            coarse, fine = (hp.rows(vector(m)) - hp.columns(vector(m, 0)) for m in (0, 1))
            reader_s, writer_s = (k_s, q_s) if reverse else (q_s, k_s)
            products = hp.matmul((reader_s, hp.transposed(writer_s)))
            seen = row <= column if reverse else row >= column
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            hp.put(p_s, products * jnp.exp(jnp.where(seen, coarse + fine, -jnp.inf)))
            held, *read = (x * hp.rows(vector(2)) for x in hp.of_state([k_s] if reverse else [k_s, q_s], S_s, S))
            whole = decay_s[3 if reverse else 2, C - 1]
            if reverse:
                hp.put(first, hp.matmul((p_s, v_s)) + held)
                plgpu.commit_smem()
                E = hp.matmul((hp.transposed(X_s), first)) * hp.rows(vector(4))
                hp.put(w_s, E)
                hp.put(p_s, -E * hp.rows(vector(3)))
                hp.put(first, hp.get(v_s) * hp.rows(vector(3)))
                plgpu.commit_smem()
                write = lambda m: hp.matmul((hp.transposed(q_s, m), first), (hp.transposed(k_s, m), p_s))
            else:
                hp.put(first, (hp.get(v_s) - held) * hp.rows(vector(4)))
                plgpu.commit_smem()
                u = hp.matmul((X_s, first))
                hp.put(w_s, u)
                hp.put(first, u * hp.rows(vector(3)))
                plgpu.commit_smem()
                y = read[0] + hp.matmul((p_s, w_s))
                if parts == 1:
                    hp.put(p_s, y)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(p_s[0], out(y_g[0], n))
                else:
                    out(y_g[0], n)[...] = y
                write = lambda m: hp.matmul((hp.transposed(k_s, m), first))
            if keeps:
                for part_s, part_g in zip(w_s, w_g, strict=True):
                    plgpu.copy_smem_to_gmem(part_s, out(part_g, n))
            return tuple(S[m] * whole + write(m) for m in blocks)

        spec = lambda columns, j: plgpu.BlockSpec((C, columns), lambda i: (at(i), j), transforms=hp.TILE)
        specs = [spec(K, 0)] * (2 * parts) + [spec(BLOCK, j)] * parts + [spec(C, 0)] * parts
        specs.append(plgpu.BlockSpec((None, 5, C), lambda i: (at(i), 0, 0)))
        walk = plgpu.emit_pipeline(
            chunk,
            grid=(N,),
            max_concurrent_steps=2 if parts == 1 else 1,
            in_specs=specs,
            init_carry=tuple(hp.load(here(S_g, m), optimized=False) for m in blocks),
        )
        by_head = [ref.at[b, :, h] for ref in tokens_g[: 3 * parts]] + [ref.at[b, h] for ref in tokens_g[3 * parts :]]
        S = walk(*by_head, decay_g.at[b, h])
        for m in blocks:
            here(last_g, m)[...] = S[m]
        plgpu.wait_smem_to_gmem(0)

    values = lambda dtype: jax.ShapeDtypeStruct((B, T, H, V), dtype)
    out = [values(dtype)] * reads + [jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)]
    out += [values(jnp.bfloat16)] * (parts * keeps)
    scratch = [*hp.smem(parts, C, C), *hp.room_for_state(parts, K), *hp.smem(parts, C, BLOCK)]
    run = hp.kernel(f"delta_rule_{what}", body, out, (B, H, J), scratch, interpret)
    return run(*jax.tree.leaves(tokens), decay_BHN5C, S_BHKV)
