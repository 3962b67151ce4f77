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
from memzoo.ops.checks import check_impl, check_log_decay, check_shapes, dtypes
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
    impl: 'scan', 'associative', 'chunk' or 'auto'. All forms are differentiable in every array, any number of times;
    forward mode is not for `chunk`. The gradient of `chunk` stores no states: a forward sweep for q and a backward one
    for k and v recompute them.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have.
    """
    positive(chunk=chunk)
    check_impl("linear_attention", impl, FORMS)
    check_shapes(q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, S_BHKV=S_BHKV, reset_BT=reset_BT)
    log_decay = check_log_decay(q_BTHK, log_decay)
    return _forms(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, reset_BT, impl=impl, chunk=chunk)


@partial(jax.jit, static_argnames=("impl", "chunk"))  # so that a call outside of jit does not compile its scans anew
def _forms(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, reset_BT, impl, chunk):
    common, wide = dtypes(q_BTHK, k_BTHK, v_BTHV, S_BHKV)
    B, T, H, K = q_BTHK.shape
    S_BHKV = jnp.zeros((B, H, K, v_BTHV.shape[-1]), wide) if S_BHKV is None else S_BHKV.astype(wide)
    log_decay = log_decay.astype(wide)
    if impl == "chunk" or (impl == "auto" and T > 1):
        reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
        S_BHKV = jnp.where(reset_BT[:, :1, None, None], 0, S_BHKV)
        q, k, v = (x.astype(common) for x in (q_BTHK, k_BTHK, v_BTHV))
        log_BTHK = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        y_BTHV, S_BHKV = _chunked(q, k, v, log_BTHK, S_BHKV, reset_BT, min(chunk, T))
    else:
        q, k, v = (x.astype(wide) for x in (q_BTHK, k_BTHK, v_BTHV))
        form = _associative if impl == "associative" else scan
        y_BTHV, S_BHKV = form(q, k, v, log_decay, S_BHKV, reset_BT)
    return y_BTHV.astype(v_BTHV.dtype), S_BHKV


def scan(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, reset_BT):
    return recur(jax.vmap(step), S_BHKV, (q_BTHK, k_BTHK, v_BTHV, log_decay), reset_BT)


def _associative(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, reset_BT):
    """Every state at once, so memory grows with T K V: for short sequences and long memories of few entries."""
    a_BTHK1 = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])[..., None]
    x_BTHKV = k_BTHK[..., None] * v_BTHV[..., None, :]
    reset_BT = jnp.zeros(q_BTHK.shape[:2], bool) if reset_BT is None else reset_BT
    x_BTHKV = x_BTHKV.at[:, 0].add(a_BTHK1[:, 0] * jnp.where(reset_BT[:, :1, None, None], 0, S_BHKV))

    def combine(left, right):
        (a, x, r), (b, y, s) = left, right
        return a * b, jnp.where(s, y, b * x + y), r | s

    xs = a_BTHK1, x_BTHKV, reset_BT[..., None, None, None]
    with jax.default_matmul_precision("highest"):  # as in the definition
        S_BTHKV = lax.associative_scan(combine, xs, axis=1)[1]
        return jnp.einsum("bthk,bthkv->bthv", q_BTHK, S_BTHKV), S_BTHKV[:, -1]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _chunked(q_BTHK, k_BTHK, v_BTHV, log_BTHK, S_BHKV, reset_BT, C):
    return _chunked_fwd(q_BTHK, k_BTHK, v_BTHV, log_BTHK, S_BHKV, reset_BT, C)[0]


def _chunked_fwd(q_BTHK, k_BTHK, v_BTHV, log_BTHK, S_BHKV, reset_BT, C):
    def one_chunk(S_and_before, x):
        S_BHKV, _ = S_and_before
        q, k, v, d = x
        return (_write(k, v, d, S_BHKV), S_BHKV), _read(q, k, v, d, S_BHKV)

    inputs = q_BTHK, k_BTHK, v_BTHV, log_BTHK, reset_BT
    *qkv, log, reset = (chunks.split(x, C) for x in inputs)
    (last_BHKV, before_BHKV), y_NBHCV = lax.scan(one_chunk, (S_BHKV, S_BHKV), (*qkv, chunks.decay(log, reset)))
    return (chunks.join(y_NBHCV, q_BTHK.shape[1]), last_BHKV), (*inputs, S_BHKV, before_BHKV)


def _read(q_BHCK, k_BHCK, v_BHCV, d, S_BHKV):
    P_BHCC = chunks.products(q_BHCK[None], k_BHCK, d)[0].astype(v_BHCV.dtype)
    q_in = chunks.scaled(q_BHCK, d.from_start())
    y_BHCV = chunks.matmul("bhij,bhjv->bhiv", P_BHCC, v_BHCV)
    return y_BHCV + chunks.matmul("bhik,bhkv->bhiv", q_in, S_BHKV.astype(q_in.dtype))


def _written(k_BHCK, v_BHCV, d):
    return chunks.matmul("bhck,bhcv->bhkv", chunks.scaled(k_BHCK, d.to_end()), v_BHCV)


def _write(k_BHCK, v_BHCV, d, S_BHKV):
    return jnp.where(d.unbroken(), d.whole() * S_BHKV, 0) + _written(k_BHCK, v_BHCV, d)


def _chunked_bwd(C, saved, cotangents):
    """Two sweeps over the chunks, which store no states.

    Forward in time, with S: everything that reads, dq and the part of dk, dv, dlog inside the chunk.
    Backward in time, with dS: everything that writes, the rest of dk, dv, dlog, and dS itself.
    One term needs S and dS at once, the gradient of what a chunk keeps, kept_n = <S_n, exp(..) dS_n+1> per key. It
    follows from the chunk after it: what n + 1 keeps and reads of S_n+1 is what n has kept and written. The last
    chunk's is taken from the state before it, the one state that is saved.
    """
    *inputs, S_BHKV, before_BHKV = saved
    dy_BTHV, dS_BHKV = cotangents
    q, k, v, log, reset, dy = (chunks.split(x, C) for x in (*inputs, dy_BTHV))
    d, pull_decay = jax.vjp(lambda log: chunks.decay(log, reset), log)

    def forwards(S_BHKV, x):
        q, k, v, dy, d = x
        fine = d.fine_BHCK
        _, pull = jax.vjp(lambda q, k, v, fine: _read(q, k, v, d._replace(fine_BHCK=fine), S_BHKV), q, k, v, fine)
        q_in = chunks.scaled(q, d.from_start())
        read_BHK = jnp.sum(S_BHKV * chunks.matmul("bhck,bhcv->bhkv", q_in, dy), -1)
        return _write(k, v, d, S_BHKV), (*pull(dy), read_BHK)

    _, (dq, *within) = lax.scan(forwards, S_BHKV, (q, k, v, dy, d))

    def backwards(carry, x):
        dS_BHKV, kept_and_written_BHK = carry
        (q, k, v, dy, d), (dk, dv, dfine, read_BHK), is_last = x
        fine = d.fine_BHCK
        written_BHKV, pull = jax.vjp(lambda k, v, fine: _written(k, v, d._replace(fine_BHCK=fine)), k, v, fine)
        dk_out, dv_out, dfine_out = pull(dS_BHKV)
        kept_BHK = kept_and_written_BHK - jnp.where(is_last, 0, jnp.sum(written_BHKV * dS_BHKV, -1))
        kept_BHK = jnp.where(d.unbroken()[..., 0], kept_BHK, 0)
        over_chunk = jnp.sum(kept_BHK, -1, keepdims=True) if fine.shape[-1] == 1 else kept_BHK
        dfine = (dfine + dfine_out).at[..., -1, :].add(over_chunk)  # the sum at the last token is the whole chunk's
        q_in = chunks.scaled(q, d.from_start())
        dS_BHKV = jnp.where(d.unbroken(), d.whole() * dS_BHKV, 0) + chunks.matmul("bhck,bhcv->bhkv", q_in, dy)
        return (dS_BHKV, kept_BHK + read_BHK), (dk + dk_out, dv + dv_out, dfine)

    N = len(reset)
    last = jax.tree.map(lambda x: x[-1], d)
    carry = dS_BHKV, jnp.sum(last.whole() * before_BHKV * dS_BHKV, -1)
    xs = (q, k, v, dy, d), within, jnp.arange(N) == N - 1
    (dS_BHKV, _), (dk, dv, dfine) = lax.scan(backwards, carry, xs, reverse=True)
    (dlog,) = pull_decay(chunks.gradient_of(d, dfine))
    return *(chunks.join(x, dy_BTHV.shape[1]) for x in (dq, dk, dv, dlog)), dS_BHKV, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
