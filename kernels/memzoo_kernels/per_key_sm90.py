"""Both ops with a decay per key on Hopper GPUs: XLA does what is inside chunks, the kernel what passes between them.

Inside a chunk a decay per key is no factor of a product of two tokens: P_ij = sum_K q_iK k_jK exp(decay from j to i).
Pairs of tokens meet by halves, where their block of 2, 4 .. 64 tokens is cut in two, and both decay to the cut, so that
every exponent is a sum of log-decays, <= 0. That needs no order in time and is left to XLA, as is its gradient: it
prepares q and k decayed from the start of the chunk, k to its end, P, and for the delta rule X = (I + A)^-1 beta. Then
one CTA of 128 threads takes one row, one head and 64 columns of the state, and walks over chunks of C = 64 tokens:

             +----------------+          plain     y = P v + q S                     S = whole S + k' v
             |  v  [C, 64]    |          before    u = X (v - e S), y = P u + q S    S = whole S + k' u
    +-----+  +----------------+          after     E = X (P v + q S)                 S = whole S + k' v - e' E
    |q,k,e|  |  S  [K, 64]    |
    | C,K |  |                |          `before` is the delta rule, `after` is it backward in time; all the rest,
    +-----+  +----------------+          linear attention and the gradients in q and k, is plain

In registers: S, float32, and what a chunk computes. In shared memory, by TMA: q, k, e, v, P, X, in two stages where
they fit; S, u and E for wgmma. HBM, per token and head in bfloat16, forward: 4 K + 4 V + 2 C bytes and the 4 K of the
decays, besides what XLA prepares: 6 pairs of arrays of the size of q. Flops: 2 C V + 4 K V, and in XLA 12 C K.

Source: Yang et al., "Gated Linear Attention Transformers" (2023), arXiv:2312.06635, sec. 4; Kimi Team, "Kimi Linear"
(2025), arXiv:2510.26692, for the delta rule; the halves are memzoo's.

Dims: B batch, T time, H heads, K key, V value, N chunks, C chunk, J blocks of columns.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memzoo_kernels import _hopper as hp
from memzoo_kernels._hopper import BLOCK, WG, C


def heads_first(x_BTHX: jax.Array) -> jax.Array:
    """[B, T, H, X] to [B, H, N, C, X]."""
    x = jnp.swapaxes(x_BTHX, 1, 2)
    return x.reshape(*x.shape[:2], -1, C, x.shape[-1])


def heads_last(x_BHNCX: jax.Array) -> jax.Array:
    B, H = x_BHNCX.shape[:2]
    return jnp.swapaxes(x_BHNCX.reshape(B, H, -1, x_BHNCX.shape[-1]), 1, 2)


def by_halves(log: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]:
    """Sums of log-decays [.., C, K] in a chunk: to token i from the start, from token j to the end, over the chunk, and
    for blocks of 2, 4 .. 64 tokens, from a token of the first half to the cut, to one of the second half from it."""
    blocks = (*log.shape[:-2], -1, 2)
    prefix, suffix, total = log[..., None, :], jnp.zeros_like(log)[..., None, :], log  # of blocks of one token
    to_cut = []
    while total.shape[-2] > 1:
        cut = lambda x: jnp.moveaxis(x.reshape(*blocks, *x.shape[len(blocks) - 1 :]), len(blocks) - 1, 0)
        (prefix0, prefix1), (suffix0, suffix1), (total0, total1) = cut(prefix), cut(suffix), cut(total)
        join = lambda a, b: jnp.concatenate([a, b], -2)
        to_cut.append(join(suffix0, prefix1).reshape(log.shape))
        prefix, suffix = join(prefix0, prefix1 + total0[..., None, :]), join(suffix0 + total1[..., None, :], suffix1)
        total = total0 + total1
    return prefix.reshape(log.shape), suffix.reshape(log.shape), total[..., 0, :], to_cut


def products(q: jax.Array, k: jax.Array, to_cut: list[jax.Array]) -> jax.Array:
    """P_ij for j <= i, else 0: [.., C, C], float32."""
    exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    row, column = jnp.arange(C)[:, None], jnp.arange(C)
    P = jnp.where(row == column, jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), -1)[..., None], 0)
    for level, log in enumerate(to_cut):
        half = 1 << level
        meet = (row & half != 0) & (row & -half == (column & -half) + half)
        late, early = scaled(q, log), scaled(k, log)
        pairs = jnp.einsum("...ik,...jk->...ij", late, early, precision=exact, preferred_element_type=jnp.float32)
        P = P + jnp.where(meet, pairs, 0)
    return P


def scaled(x: jax.Array, log: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * jnp.exp(log)).astype(x.dtype)


def transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def sweep(q, k, v, total, S, *, P=None, X=None, e=None, mode="plain", by_column=False, reverse=False, interpret=False):
    """The kernel: arrays [B, H, N, C, ..], total [B, H, N, K], or V by column. Returns (y, u or E .., last S)."""
    parts = hp.parts_of(v.dtype)
    flat = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
    tokens = [hp.split(flat(x), parts) for x in (q, k, e, v, P, X) if x is not None]
    given = tuple(x is not None for x in (e, P, X))
    options = dict(given=given, dtype=v.dtype, mode=mode, by_column=by_column, reverse=reverse, interpret=interpret)
    *outputs, S = hp.over_rows(partial(_sweep, **options))(tokens, jnp.exp(total), S)
    return *(x.reshape(v.shape) for x in outputs), S


def _sweep(tokens, whole, S_BHKV, *, given, dtype, mode, by_column, reverse, interpret):
    (B, H, T, K), V, parts = tokens[0][0].shape, S_BHKV.shape[-1], len(tokens[0])
    has_e, has_P, has_X = given
    N, J, blocks = T // C, V // BLOCK, range(K // BLOCK)
    at = lambda i: N - 1 - i if reverse else i
    outputs = 2 if mode == "before" else 1

    def body(*refs):
        take = partial(hp.take, list(refs))
        *tokens_g, whole_g, S_g = take(parts * len(tokens) + 2)
        *y_g, last_g = take(outputs + 1)
        p_s, S_s = take(parts), take(parts)
        b, h, j = (lax.axis_index(name) for name in "bhj")
        here = lambda ref, m: ref.at[b, h, pl.ds(m * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK)]

        def chunk(index, *refs):
            take = partial(hp.take, list(refs))
            q_s, k_s, e_s, v_s = take(parts), take(parts), take(parts * has_e), take(parts)
            P_s, X_s, (whole_s, S) = take(parts * has_P), take(parts * has_X), take(2)
            first, out_s = hp.block(S_s, 0), p_s
            out = lambda ref: ref.at[b, h, pl.ds(at(index[0]) * C, C), pl.ds(j * BLOCK, BLOCK)]

            def give(ref, place, x):
                """Writes x to HBM: bfloat16 from its place in shared memory, where the next matmuls may read it too."""
                hp.put(place, x)
                plgpu.commit_smem()
                if parts == 1:
                    plgpu.copy_smem_to_gmem(place[0], out(ref))
                else:
                    out(ref)[...] = x

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            y, *erased = hp.of_state([q_s, e_s] if mode == "before" else [q_s], S_s, S)
            S = list(S)
            for m in blocks:
                along = whole_s if by_column else whole_s.at[pl.ds(m * BLOCK, BLOCK)]
                factor = hp.load(along, WG.reduce(0 if by_column else 1))
                S[m] = S[m] * lax.broadcast_in_dim(factor, (BLOCK, BLOCK), [1 if by_column else 0])
            written = [(k_s, v_s)]
            if mode == "before":
                hp.put(first, hp.get(v_s) - erased[0])
                plgpu.commit_smem()
                give(y_g[1], out_s, hp.matmul((X_s, first)))
                written = [(k_s, out_s)]
            if has_P:
                y = y + hp.matmul((P_s, out_s if mode == "before" else v_s))
            if mode == "after":
                hp.put(first, y)
                plgpu.commit_smem()
                y = hp.matmul((X_s, first))
                written.append((e_s, out_s))
            give(y_g[0], first if mode == "before" else out_s, y)
            for m in blocks:
                S[m] = S[m] + hp.matmul(*((hp.transposed(a, m), value) for a, value in written))
            return tuple(S)

        spec = lambda columns, j: plgpu.BlockSpec((C, columns), lambda i: (at(i), j), transforms=hp.TILE)
        of_keys, of_pairs = [spec(K, 0)] * (parts * (2 + has_e)), [spec(C, 0)] * (parts * (has_P + has_X))
        factors = plgpu.BlockSpec((None, BLOCK if by_column else K), lambda i: (at(i), j if by_column else 0))
        fits = parts == 1 and K * (2 + has_e) <= 512
        walk = plgpu.emit_pipeline(
            chunk,
            grid=(N,),
            max_concurrent_steps=2 if fits else 1,
            in_specs=[*of_keys, *([spec(BLOCK, j)] * parts), *of_pairs, factors],
            init_carry=tuple(hp.load(here(S_g, m), optimized=False) for m in blocks),
        )
        S = walk(*(ref.at[b, h] for ref in tokens_g), whole_g.at[b, h])
        for m in blocks:
            here(last_g, m)[...] = S[m]
        plgpu.wait_smem_to_gmem(0)

    out = [jax.ShapeDtypeStruct((B, H, T, V), dtype)] * outputs + [jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)]
    scratch = [*hp.smem(parts, C, BLOCK), *hp.room_for_state(parts, K)]
    name = f"per_key_{mode}_" + ("backwards" if reverse else "forwards")
    return hp.kernel(name, body, out, (B, H, J), scratch, interpret)(*jax.tree.leaves(tokens), whole, S_BHKV)


def kept(total, read_BHNK, written_BHNK, last_BHK):
    """<S_n whole, dS_n+1> per key: what chunk n keeps and reads of S_n is what n - 1 has kept and written of it."""
    keep, read, written = (jnp.moveaxis(x, 2, 3) for x in (jnp.where(total > -16.6, 1.0, 0.0), read_BHNK, written_BHNK))
    of_state = hp.sums_to_the_end((read - keep * written).at[..., -1].add(keep[..., -1] * last_BHK), keep)
    result = keep * (jnp.concatenate([of_state[..., 1:], last_BHK[..., None]], -1) - written)
    return jnp.moveaxis(result, 3, 2)


def summed(a, b):
    """Of the products of two arrays [B, H, N, C, K], the sums over each chunk."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), -2)


# Linear attention


def _prepare(q, k, log):
    prefix, suffix, total, to_cut = by_halves(log)
    return products(q, k, to_cut), scaled(q, prefix), scaled(k, suffix), total


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q, k, v, log, S_BHKV, interpret):
    """Linear attention of arrays [B, H, N, C, ..]: (y, last S)."""
    P, q_in, k_out, total = _prepare(q, k, log)
    return sweep(q_in, k_out, v, total, S_BHKV, P=P, interpret=interpret)


def _attend_fwd(q, k, v, log, S_BHKV, interpret):
    y, last = attend(q, k, v, log, S_BHKV, interpret)
    return (y, last), (q, k, v, log, S_BHKV, last)


def _attend_bwd(interpret, saved, cotangents):
    q, k, v, log, S, last = saved
    dy, dS = cotangents
    (P, q_in, k_out, total), pull = jax.vjp(_prepare, q, k, log)
    run = partial(sweep, total=total, interpret=interpret)
    dv, dS0 = run(k_out, q_in, dy, S=dS, P=transposed(P), reverse=True)
    dq_in, _ = run(dy, v, k_out, S=transposed(S), by_column=True)
    dk_out, _ = run(v, dy, q_in, S=transposed(dS), by_column=True, reverse=True)
    dP = _pairs(dy, v)
    dtotal = kept(total, summed(q_in, dq_in), summed(k_out, dk_out), jnp.sum(last * dS, -1))
    dq, dk, dlog = pull((dP, dq_in, dk_out, dtotal))
    return dq, dk, dv, dlog, dS0


def _pairs(a, b):
    """a_i b_j for j <= i."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    pairs = jnp.einsum("...iv,...jv->...ij", a, b, precision=exact, preferred_element_type=jnp.float32)
    return jnp.tril(pairs)


attend.defvjp(_attend_fwd, _attend_bwd)


# The delta rule


def _prepare_delta(q, k, log):
    prefix, suffix, total, to_cut = by_halves(log)
    A = jnp.tril(products(k, k, to_cut), -1)
    return products(q, k, to_cut), A, scaled(q, prefix), scaled(k, prefix), scaled(k, suffix), total


def _inverse(A, beta):
    """(I + beta A)^-1, beta [B, H, N, C, 1]."""
    eye = jnp.broadcast_to(jnp.eye(C), A.shape)
    return lax.linalg.triangular_solve(beta * A + eye, eye, left_side=True, lower=True, unit_diagonal=True)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def correct(q, k, v, beta, log, S_BHKV, interpret):
    """The delta rule of arrays [B, H, N, C, ..]: (y, last S)."""
    return _correct_fwd(q, k, v, beta, log, S_BHKV, interpret)[0]


def _correct_fwd(q, k, v, beta, log, S_BHKV, interpret):
    P, A, q_in, k_in, k_out, total = _prepare_delta(q, k, log)
    X = _inverse(A, beta) * transposed(beta)
    y, u, last = sweep(q_in, k_out, v, total, S_BHKV, P=P, X=X, e=k_in, mode="before", interpret=interpret)
    return (y, last), (q, k, v, beta, log, S_BHKV, u, last)


def _correct_bwd(interpret, saved, cotangents):
    q, k, v, beta, log, S, u, last = saved
    dy, dS = cotangents
    (P, A, q_in, k_in, k_out, total), pull = jax.vjp(_prepare_delta, q, k, log)
    beta = jnp.where(jnp.abs(beta) < hp.TINY, hp.TINY, beta)
    X = beta * transposed(_inverse(A, beta))
    run = partial(sweep, total=total, interpret=interpret)
    E, dS0 = run(k_out, q_in, dy, S=dS, P=transposed(P), X=X, e=-k_in, mode="after", reverse=True)
    reading = partial(run, S=transposed(S), by_column=True)
    writing = partial(run, by_column=True, reverse=True)
    dq_in, dk_in = reading(dy, u, k_out)[0], -reading(E, u, k_out)[0]
    dk_out = writing(u, dy, q_in, S=transposed(dS))[0] - writing(u, E, k_in, S=jnp.zeros_like(transposed(S)))[0]
    dP, dA = _pairs(dy, u), -jnp.tril(_pairs(E, u), -1)
    read = summed(q_in, dq_in) + summed(k_in, dk_in)
    dtotal = kept(total, read, summed(k_out, dk_out), jnp.sum(last * dS, -1))
    dq, dk, dlog = pull((dP, dA, dq_in, dk_in, dk_out, dtotal))
    wide = lambda x: x.astype(jnp.float32)
    dbeta = jnp.sum(wide(E) * wide(v), -1) + jnp.sum(wide(k_in) * wide(dk_in), -1) + jnp.sum(A * dA, -1)
    return dq, dk, E, dbeta[..., None] / beta, dlog, dS0


correct.defvjp(_correct_fwd, _correct_bwd)
