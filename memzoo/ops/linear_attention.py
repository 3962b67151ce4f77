"""Linear attention with decay: a matrix memory that only adds and forgets.

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t'        y_t = S_t' q_t

Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs" (2020), arXiv:2006.16236, eq. 18-20, without the
normaliser; with a decay per head, Sun et al., "Retentive Network" (2023), arXiv:2307.08621, eq. 6; with a decay per
key, Yang et al., "Gated Linear Attention Transformers" (2023), arXiv:2312.06635, eq. 4.

Dims: B batch, T time, H heads, K key, V value.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.contract import positive
from memzoo.ops import chunks
from memzoo.ops.checks import check_impl, check_log_decay, check_shapes
from memzoo.ops.recur import recur

FORMS = ("scan", "associative", "chunk")


def step(S_KV, q_K, k_K, v_V, log_decay):
    """One token, one head; log_decay is a scalar or a vector over K. This is the definition."""
    S_KV = jnp.exp(log_decay)[..., None] * S_KV + jnp.outer(k_K, v_V)
    return S_KV, q_K @ S_KV


def linear_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay: jax.Array | None = None,
    S_BHKV: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (y_BTHV, S_BHKV), y in the dtype of v, the state in float32 or wider.

    log_decay: [B, T, H] or [B, T, H, K], natural log, <= 0; None is no decay. There is no hidden scale on q.
    S_BHKV: the incoming state, zeros by default. reset_BT: bool, where True the token begins a new sequence.
    impl: 'scan', 'associative', 'chunk' or 'auto'. All forms are differentiable in every array; twice, `scan` alone.
    The gradient of `chunk` stores no states: a forward sweep for q and a backward one for k and v recompute them.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have.
    """
    positive(chunk=chunk)
    check_impl("linear_attention", impl, FORMS)
    check_shapes(q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, S_BHKV=S_BHKV, reset_BT=reset_BT)
    q_BTHK, k_BTHK, v_BTHV = jnp.asarray(q_BTHK), jnp.asarray(k_BTHK), jnp.asarray(v_BTHV)
    log_decay = check_log_decay(q_BTHK, log_decay)
    B, T, H, K = q_BTHK.shape
    wide = jnp.promote_types(v_BTHV.dtype, jnp.float32)
    S_BHKV = jnp.zeros((B, H, K, v_BTHV.shape[-1]), wide) if S_BHKV is None else jnp.asarray(S_BHKV, wide)
    if impl == "chunk" or (impl == "auto" and T > 1):
        reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else jnp.asarray(reset_BT)
        S_BHKV = jnp.where(reset_BT[:, :1, None, None], 0, S_BHKV)
        log_BTHK = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        y_BTHV, S_BHKV = _chunked(q_BTHK, k_BTHK, v_BTHV, log_BTHK, S_BHKV, reset_BT, min(chunk, T))
    else:
        q, k, v = (x.astype(wide) for x in (q_BTHK, k_BTHK, v_BTHV))
        form = _associative if impl == "associative" else scan
        y_BTHV, S_BHKV = form(q, k, v, log_decay.astype(wide), S_BHKV, reset_BT)
    return y_BTHV.astype(v_BTHV.dtype), S_BHKV


def scan(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, reset_BT):
    y_BTHV, S_BHKV = recur(jax.vmap(step), S_BHKV, (q_BTHK, k_BTHK, v_BTHV, log_decay), reset_BT)
    return y_BTHV, S_BHKV


def _associative(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, reset_BT):
    """Every state at once, so memory grows with T K V: for short sequences and long memories of few entries."""
    a_BTHK1 = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])[..., None]
    x_BTHKV = k_BTHK[..., None] * v_BTHV[..., None, :]
    reset_BT = jnp.zeros(q_BTHK.shape[:2], bool) if reset_BT is None else jnp.asarray(reset_BT)
    x_BTHKV = x_BTHKV.at[:, 0].add(a_BTHK1[:, 0] * jnp.where(reset_BT[:, :1, None, None], 0, S_BHKV))

    def combine(left, right):
        (a, x, r), (b, y, s) = left, right
        return a * b, jnp.where(s, y, b * x + y), r | s

    xs = a_BTHK1, x_BTHKV, reset_BT[..., None, None, None]
    S_BTHKV = lax.associative_scan(combine, xs, axis=1)[1]
    return jnp.einsum("bthk,bthkv->bthv", q_BTHK, S_BTHKV), S_BTHKV[:, -1]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _chunked(q_BTHK, k_BTHK, v_BTHV, log_BTHK, S_BHKV, reset_BT, C):
    return _chunked_fwd(q_BTHK, k_BTHK, v_BTHV, log_BTHK, S_BHKV, reset_BT, C)[0]


def _chunked_fwd(q_BTHK, k_BTHK, v_BTHV, log_BTHK, S_BHKV, reset_BT, C):
    def one_chunk(S_and_before, x):
        S_BHKV, _ = S_and_before
        q, k, v, log, reset = x
        y_BHCV = _read(q, k, v, log, S_BHKV, reset)
        return (_write(k, v, log, S_BHKV, reset), S_BHKV), y_BHCV

    inputs = q_BTHK, k_BTHK, v_BTHV, log_BTHK, reset_BT
    xs = tuple(chunks.split(x, C) for x in inputs)
    (last_BHKV, before_BHKV), y_NBHCV = lax.scan(one_chunk, (S_BHKV, S_BHKV), xs)
    return (chunks.join(y_NBHCV, q_BTHK.shape[1]), last_BHKV), (*inputs, S_BHKV, before_BHKV)


def _read(q_BHCK, k_BHCK, v_BHCV, log_BHCK, S_BHKV, reset_BC):
    d = chunks.decay(log_BHCK, reset_BC)
    P_BHCC = chunks.products(q_BHCK[None], k_BHCK, d)[0].astype(v_BHCV.dtype)
    q_in = chunks.scaled(q_BHCK, d.from_start())
    y_BHCV = chunks.matmul("bhij,bhjv->bhiv", P_BHCC, v_BHCV)
    return y_BHCV + chunks.matmul("bhik,bhkv->bhiv", q_in, S_BHKV.astype(q_in.dtype))


def _written(k_BHCK, v_BHCV, log_BHCK, reset_BC):
    k_out = chunks.scaled(k_BHCK, chunks.decay(log_BHCK, reset_BC).to_end())
    return chunks.matmul("bhck,bhcv->bhkv", k_out, v_BHCV)


def _write(k_BHCK, v_BHCV, log_BHCK, S_BHKV, reset_BC):
    d = chunks.decay(log_BHCK, reset_BC)
    kept_BHKV = jnp.where(d.unbroken(), d.whole() * S_BHKV, 0)
    return kept_BHKV + _written(k_BHCK, v_BHCV, log_BHCK, reset_BC)


def _chunked_bwd(C, saved, cotangents):
    """Two sweeps over the chunks, which store no states.

    Forward in time, with S: everything that reads, dq and the part of dk, dv, dlog inside the chunk.
    Backward in time, with dS: everything that writes, the rest of dk, dv, dlog, and dS itself.
    One term needs S and dS at once, the gradient of what a chunk keeps, kept_n = <S_n, exp(..) dS_n+1> per key. It
    follows from the chunk after it: what n + 1 keeps and reads of S_n+1 is what n has kept and written. The last
    chunk's is taken from the state before it, the one state that is saved.
    """
    q, k, v, log, reset, S_BHKV, before_BHKV = saved
    dy_BTHV, dS_BHKV = cotangents
    xs = tuple(chunks.split(x, C) for x in (q, k, v, log, reset, dy_BTHV))

    def forwards(S_BHKV, x):
        q, k, v, log, reset, dy = x
        _, pull = jax.vjp(lambda q, k, v, log: _read(q, k, v, log, S_BHKV, reset), q, k, v, log)
        q_in = chunks.scaled(q, chunks.decay(log, reset).from_start())
        read_BHK = jnp.sum(S_BHKV * chunks.matmul("bhck,bhcv->bhkv", q_in, dy), -1)
        return _write(k, v, log, S_BHKV, reset), (*pull(dy), read_BHK)

    _, (dq, *within) = lax.scan(forwards, S_BHKV, xs)

    def backwards(carry, x):
        dS_BHKV, kept_and_written_BHK = carry
        (q, k, v, log, reset, dy), (dk, dv, dlog, read_BHK), is_last = x
        written_BHKV, pull = jax.vjp(lambda k, v, log: _written(k, v, log, reset), k, v, log)
        dk_out, dv_out, dlog_out = pull(dS_BHKV)
        d = chunks.decay(log, reset)
        kept_BHK = kept_and_written_BHK - jnp.where(is_last, 0, jnp.sum(written_BHKV * dS_BHKV, -1))
        kept_BHK = jnp.where(d.unbroken()[..., 0], kept_BHK, 0)
        dlog_kept = jnp.sum(kept_BHK, -1, keepdims=True) if log.shape[-1] == 1 else kept_BHK
        q_in = chunks.scaled(q, d.from_start())
        dS_BHKV = jnp.where(d.unbroken(), d.whole() * dS_BHKV, 0) + chunks.matmul("bhck,bhcv->bhkv", q_in, dy)
        return (dS_BHKV, kept_BHK + read_BHK), (dk + dk_out, dv + dv_out, dlog + dlog_out + dlog_kept[..., None, :])

    log_NBHCK, reset_NBC = xs[3:5]
    is_last = jnp.arange(len(reset_NBC)) == len(reset_NBC) - 1
    kept_BHK = jnp.sum(chunks.decay(log_NBHCK[-1], reset_NBC[-1]).whole() * before_BHKV * dS_BHKV, -1)
    (dS_BHKV, _), gradients = lax.scan(backwards, (dS_BHKV, kept_BHK), (xs, within, is_last), reverse=True)
    gradients = (chunks.join(x, dy_BTHV.shape[1]) for x in (dq, *gradients))
    return *gradients, dS_BHKV, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
