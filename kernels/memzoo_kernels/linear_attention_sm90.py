"""Linear attention on Hopper GPUs: chunked, the state in registers from the first token to the last.

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t'        y_t = S_t' q_t

One CTA of 128 threads takes one row, one head and 64 columns of the state, and walks over chunks of C = 64 tokens:

              64 columns of V                        per chunk, L_ij = exp(decay from token j to i), j <= i
             +----------------+
             |  v  [C, 64]    |                      P  = (q k') . L               [C, C]    wgmma
             +----------------+                      y  = P v + (q S) . read       [C, 64]   2 wgmma
    +-----+  +----------------+                      S  = whole S + k' (v . written)  [K, 64]   wgmma
    | q,k |  |  S  [K, 64]    |
    | C,K |  |                |                      in registers: S float32 (K / 2 a thread), P, y
    +-----+  +----------------+                      in shared memory: two stages of q, k, v and decays by TMA; P, S
                                                     for wgmma; then v . written in the place of S, y in that of P

HBM, per token and head in bfloat16: q, k, v read once (q, k again by each further CTA of V, mostly from L2) and y
written, 4 K + 4 V bytes, and 16 bytes of decays; 2 C K + 2 C V + 4 K V flops forward. 106 KB of shared memory at
K = 128, so that two CTAs share a processor.

The gradients are the same sweep with the roles exchanged, and no state is stored:

    dq  forward in time, of (dy, v, k), the state S'          dk, dv  backward in time, of (v, dy, q) and (k, q, dy)

The gradient of a log-decay is the sum over all pairs of tokens that it stands between, of what one wrote and the other
reads: pairs inside the chunk and pairs with one token in it come out of the sweeps as r = q . dq and k . dk, without
each token's own write, which no decay touches; pairs around the chunk follow from the chunk after it.

A decay per key takes the kernel of per_key_sm90.

Source: Sun et al., "Retentive Network" (2023), arXiv:2307.08621, and Yang et al., "Gated Linear Attention Transformers"
(2023), arXiv:2312.06635, for the chunked form; the exchange of roles is Katharopoulos et al., "Transformers are RNNs"
(2020), arXiv:2006.16236, eq. 13-15.

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


def support(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, device, *, auto=False) -> str | None:
    """None, or the limit exceeded, in a sentence."""
    return hp.limits(q_BTHK, k_BTHK, v_BTHV, log_decay, {"S": S_BHKV}, device, auto)


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
    """(y_BTHV in the dtype of q, k and v, S_BHKV in float32), as kernels/README.md has it."""
    T, K, V = q_BTHK.shape[1], q_BTHK.shape[-1], v_BTHV.shape[-1]
    log = hp.pad_time(hp.with_resets(log_decay, reset_BT))
    q, k, v = (hp.pad_features(hp.pad_time(x)) for x in (q_BTHK, k_BTHK, v_BTHV))
    S_BHKV = hp.pad_features(S_BHKV, (-1, -2))
    if log_decay.ndim == 4:
        heads_first = (per_key.heads_first(x) for x in (q, k, v, hp.pad_features(log)))
        y, S = per_key.attend(*heads_first, S_BHKV, interpret)
        y = per_key.heads_last(y)
    else:
        y, S = _attend(q, k, v, log, S_BHKV, interpret)
    return y[:, -T:, :, :V], S[..., :K, :V]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, log_BTH, S_BHKV, interpret):
    return _attend_fwd(q, k, v, log_BTH, S_BHKV, interpret)[0]


def _attend_fwd(q, k, v, log_BTH, S_BHKV, interpret):
    y, last_BHKV = sweep(q, k, v, hp.decays(log_BTH)[0], S_BHKV, interpret=interpret)
    return (y, last_BHKV), (q, k, v, log_BTH, S_BHKV, last_BHKV)


def _attend_bwd(interpret, saved, cotangents):
    q, k, v, log_BTH, S_BHKV, last_BHKV = saved
    dy, dS_BHKV = cotangents
    forwards, backwards = hp.decays(log_BTH)
    across = partial(jnp.swapaxes, axis1=-1, axis2=-2)
    dq, _, read = sweep(dy, v, k, forwards, across(S_BHKV), x=q, interpret=interpret)
    dk, dS0_BHVK, written = sweep(v, dy, q, backwards, across(dS_BHKV), x=k, reverse=True, interpret=interpret)
    dv, _ = sweep(k, q, dy, backwards, dS_BHKV, reverse=True, interpret=interpret)
    dlog = decay_gradient(log_BTH, forwards, read, written, jnp.sum(last_BHKV * dS_BHKV, (-1, -2)))
    return dq, dk, dv, dlog, across(dS0_BHVK)


_attend.defvjp(_attend_fwd, _attend_bwd)


def decay_gradient(log_BTH, decay_BHN4C, read_BHN2C, written_BHN2C, last_BH):
    """From q . dq and k . dk of each token, in its chunk and across; last: what the last state has of the loss."""
    within = read_BHN2C[..., 0, :] - written_BHN2C[..., 0, :]
    read, written = read_BHN2C[..., 1, :], written_BHN2C[..., 1, :]
    B, T, H = log_BTH.shape
    log = jnp.moveaxis(log_BTH, 1, 2).reshape(within.shape)
    same = jnp.pad(log[..., 1:] > hp.FLOOR, [(0, 0)] * 3 + [(0, 1)]).astype(jnp.float32)
    before = jnp.pad(written[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    crossing = hp.sums_to_the_end(within, same) + lax.cumsum(read, 3, reverse=True) + lax.cumsum(before, 3)
    # <S_n, dS_n> is what chunk n reads and keeps of S_n, and also what chunk n - 1 has kept and written of it.
    keep = jnp.where(decay_BHN4C[..., 2, -1] > 2.0**-24, 1.0, 0.0)
    read, written = read.sum(-1), written.sum(-1)
    of_state = hp.sums_to_the_end((read - keep * written).at[..., -1].add(keep[..., -1] * last_BH), keep)
    kept = keep * (jnp.concatenate([of_state[..., 1:], last_BH[..., None]], -1) - written)
    crossing = crossing + kept[..., None]
    return jnp.moveaxis(crossing.reshape(B, H, T), 2, 1)


def sweep(q, k, v, decay_BHN4C, S_BHKV, x=None, *, own=True, reverse=False, interpret=False):
    """y_i = S_i' q_i for all i, with decays from `hp.decays`: (y, last S), and r if x is given.

    q and k may be given in parts. own: whether a token reads its own write. reverse: from the last token to the first.
    x [B, T, H, V] asks for r_i = x_i . y_i, without the own write: r [B, H, N, 2, C], of what is read in the chunk and
    of the state that came into it.
    """
    parts = hp.parts_of(v.dtype)
    tokens = [a if isinstance(a, tuple) else hp.split(a, parts) for a in (q, k, v, x) if a is not None]
    run = partial(_sweep, dtype=v.dtype, own=own, reverse=reverse, interpret=interpret)
    y, S_BHKV, *r = hp.over_rows(run)(tokens, decay_BHN4C, S_BHKV)
    return y, S_BHKV, *(jnp.sum(r, 1) for r in r)


def _sweep(tokens, decay_BHN4C, S_BHKV, *, dtype, own, reverse, interpret):
    (B, T, H, K), V, parts = tokens[0][0].shape, tokens[2][0].shape[-1], len(tokens[0])
    N, J, blocks = T // C, V // BLOCK, range(K // BLOCK)
    dotted = len(tokens) == 4
    at = lambda i: N - 1 - i if reverse else i

    def body(*refs):
        take = partial(hp.take, list(refs))
        *tokens_g, decay_g, S_g, y_g, last_g = take(parts * len(tokens) + 4)
        (*r_g,) = take(dotted)
        p_s, S_s, (*r_s,) = take(parts), take(parts), take(dotted)
        b, h, j = (lax.axis_index(name) for name in "bhj")
        here = lambda ref, m: ref.at[b, h, pl.ds(m * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK)]

        def chunk(index, *refs):
            take = partial(hp.take, list(refs))
            q_s, k_s, v_s, x_s = take(parts), take(parts), take(parts), take(parts * dotted)
            decay_s, S = take(2)
            n = at(index[0])
            vector = lambda m, axis=1: hp.load(decay_s.at[m], WG.reduce(axis))
            row, column = (plgpu.broadcasted_iota(jnp.int32, (C, C), axis, layout=WG) for axis in (0, 1))
            seen = row < column if reverse else row > column
            seen = seen | (row == column) if own and not dotted else seen
            coarse, fine = (hp.rows(vector(m)) - hp.columns(vector(m, 0)) for m in (0, 1))
            qk = hp.matmul((q_s, hp.transposed(k_s)))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            hp.put(p_s, qk * jnp.exp(jnp.where(seen, coarse + fine, -jnp.inf)))
            (read,) = hp.of_state([q_s], S_s, S)
            read = read * hp.rows(vector(2))
            within = hp.matmul((p_s, v_s))
            v = hp.get(v_s)
            y = within + read
            if dotted:
                x = hp.get(x_s)
                r_s[0][0] = jnp.sum(x * within, 1)
                r_s[0][1] = jnp.sum(x * read, 1)
                y = y + hp.rows(jnp.sum(jnp.where(row == column, qk, 0), 1)) * v if own else y
            y_here = y_g.at[b, pl.ds(n * C, C), h, pl.ds(j * BLOCK, BLOCK)]
            if parts == 1:
                hp.put(p_s, y)
            else:
                y_here[...] = y
            hp.put(hp.block(S_s, 0), v * hp.rows(vector(3)))
            whole = decay_s[3 if reverse else 2, C - 1]  # before the barrier after which the next decays may come
            plgpu.commit_smem()
            if parts == 1:
                plgpu.copy_smem_to_gmem(p_s[0], y_here)
            if dotted:
                plgpu.copy_smem_to_gmem(r_s[0], r_g[0].at[b, j, h, n])
            return tuple(S[m] * whole + hp.matmul((hp.transposed(k_s, m), hp.block(S_s, 0))) for m in blocks)

        spec = lambda columns, j: plgpu.BlockSpec((C, columns), lambda i: (at(i), j), transforms=hp.TILE)
        specs = [spec(K, 0)] * (2 * parts) + [spec(BLOCK, j)] * (len(tokens_g) - 2 * parts)
        specs.append(plgpu.BlockSpec((None, 4, C), lambda i: (at(i), 0, 0)))
        walk = plgpu.emit_pipeline(
            chunk,
            grid=(N,),
            max_concurrent_steps=2 if parts == 1 else 1,
            in_specs=specs,
            init_carry=tuple(hp.load(here(S_g, m), optimized=False) for m in blocks),
        )
        S = walk(*(ref.at[b, :, h] for ref in tokens_g), decay_g.at[b, h])
        for m in blocks:
            here(last_g, m)[...] = S[m]
        plgpu.wait_smem_to_gmem(0)

    out = [jax.ShapeDtypeStruct((B, T, H, V), dtype), jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)]
    scratch = [*hp.smem(parts, C, C), *hp.room_for_state(parts, K)]
    if dotted:
        out.append(jax.ShapeDtypeStruct((B, J, H, N, 2, C), jnp.float32))
        scratch.append(plgpu.SMEM((2, C), jnp.float32))
    name = "linear_attention_" + ("backwards" if reverse else "forwards") + "_dotted" * dotted
    run = hp.kernel(name, body, out, (B, H, J), scratch, interpret)
    return run(*jax.tree.leaves(tokens), decay_BHN4C, S_BHKV)
