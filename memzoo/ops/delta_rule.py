"""The delta rule with decay: a matrix memory that corrects what it holds under a key.

    S~ = exp(log_decay_t) S_{t-1}        S_t = S~ + beta_t k_t (v_t - S~' k_t)'        y_t = S_t' q_t

Source: Schlag, Irie, Schmidhuber, "Linear Transformers Are Secretly Fast Weight Programmers" (2021), arXiv:2102.11174,
eq. 25; with a decay per head, Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024), arXiv:2412.06464, eq. 10; with a
decay per key, Kimi Team, "Kimi Linear" (2025), arXiv:2510.26692, eq. 1. The chunked form is the WY representation of
Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024),
arXiv:2406.06484, sec. 3.2.
Differs: S is [K, V], the papers' transpose.

Dims: B batch, T time, H heads, K key, V value, N chunks, C chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.contract import positive
from memzoo.ops import chunks, kernels
from memzoo.ops.affine_scan import matrix_states
from memzoo.ops.checks import check_log_decay, check_shapes, dtypes
from memzoo.ops.recur import recur

FORMS = ("scan", "associative", "chunk")  # and 'pallas', on the chips that it is for


def step(S_KV, q_K, k_K, v_V, beta, log_decay):
    """One token, one head; log_decay is a scalar or a vector over K. This is the definition."""
    S_KV = jnp.exp(log_decay)[..., None] * S_KV
    S_KV = S_KV + beta * jnp.outer(k_K, v_V - k_K @ S_KV)
    return S_KV, q_K @ S_KV


def delta_rule(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    beta_BTH: jax.Array,
    log_decay: jax.Array | None = None,
    S_BHKV: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (y_BTHV, S_BHKV), y in the dtype of v, the state in float32 or wider.

    beta_BTH: the write strength, in [0, 1], or to 2 for negative eigenvalues; beta |k|^2 > 2 diverges, so keys are
    usually of unit length. log_decay: [B, T, H] or [B, T, H, K], natural log, <= 0; None is no decay.
    S_BHKV: the incoming state, zeros by default. reset_BT: bool, where True the token begins a new sequence.
    impl: 'scan', 'associative', 'chunk', 'pallas' or 'auto'. All forms are differentiable in every array, any number of
    times, 'pallas' once; forward mode is not for 'chunk' and 'pallas'. For its gradient 'chunk' keeps one state and one
    inverse [C, C] per chunk.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have, and
    for 'pallas' where its kernel cannot run.
    """
    positive(chunk=chunk)
    sizes = check_shapes(
        q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, beta_BTH=beta_BTH, S_BHKV=S_BHKV, reset_BT=reset_BT
    )
    log_decay = check_log_decay(q_BTHK, log_decay)
    choice = _choice(sizes, log_decay, dtypes(q_BTHK, k_BTHK, v_BTHV, S_BHKV), impl)
    return _forms(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay, S_BHKV, reset_BT, choice=choice, chunk=chunk)


def _choice(sizes, log_decay, dtypes, impl):
    B, T, H, K, V = (sizes[axis] for axis in "BTHKV")
    common, wide = dtypes
    shapes = ((B, T, H, K), common), ((B, T, H, K), common), ((B, T, H, V), common), ((B, T, H), wide)
    arrays = (jax.ShapeDtypeStruct(*shape) for shape in (*shapes, (log_decay.shape, wide), ((B, H, K, V), wide)))
    return kernels.choose("delta_rule", impl, FORMS, "chunk" if T > 1 else "scan", *arrays)


@partial(jax.jit, static_argnames=("choice", "chunk"))  # so that a call outside of jit does not compile its scans anew
def _forms(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay, S_BHKV, reset_BT, choice, chunk):
    common, wide = dtypes(q_BTHK, k_BTHK, v_BTHV, S_BHKV)
    B, T, H, K = q_BTHK.shape
    S_BHKV = jnp.zeros((B, H, K, v_BTHV.shape[-1]), wide) if S_BHKV is None else S_BHKV.astype(wide)
    log_decay = log_decay.astype(wide)
    beta_BTH = beta_BTH.astype(wide)
    if choice.impl in ("chunk", "pallas"):
        reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
        S_BHKV = jnp.where(reset_BT[:, :1, None, None], 0, S_BHKV)
        q, k, v = (x.astype(common) for x in (q_BTHK, k_BTHK, v_BTHV))
    if choice.impl == "pallas":
        y_BTHV, S_BHKV = kernels.run("delta_rule", choice, q, k, v, beta_BTH, log_decay, S_BHKV, reset_BT)
    elif choice.impl == "chunk":
        log_BTHK = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        y_BTHV, S_BHKV = _chunked(q, k, v, beta_BTH, log_BTHK, S_BHKV, reset_BT, min(chunk, T))
    else:
        q, k, v = (x.astype(wide) for x in (q_BTHK, k_BTHK, v_BTHV))
        form = _associative if choice.impl == "associative" else scan
        y_BTHV, S_BHKV = form(q, k, v, beta_BTH, log_decay, S_BHKV, reset_BT)
    return y_BTHV.astype(v_BTHV.dtype), S_BHKV


def scan(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay, S_BHKV, reset_BT):
    return recur(jax.vmap(step), S_BHKV, (q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay), reset_BT)


def _associative(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay, S_BHKV, reset_BT):
    """S_t = M_t S_{t-1} + X_t, M_t = (I - beta_t k_t k_t') diag(exp(log_decay_t)): products of K x K matrices."""
    a_BTHK = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
    k_beta = k_BTHK * beta_BTH[..., None]
    erase_BTHKK = k_beta[..., None] * k_BTHK[..., None, :]
    M_BTHKK = (jnp.eye(k_BTHK.shape[-1], dtype=k_BTHK.dtype) - erase_BTHKK) * a_BTHK[..., None, :]
    X_BTHKV = k_beta[..., None] * v_BTHV[..., None, :]
    S_BTHKV = matrix_states(M_BTHKK, X_BTHKV, S_BHKV, reset_BT)
    return jnp.einsum("bthk,bthkv->bthv", q_BTHK, S_BTHKV, precision="highest"), S_BTHKV[:, -1]


def _products(q_BHCK, k_BHCK, beta_BHC, d):
    """What tokens of a chunk read of each other, P, and what they correct of each other, A: [2, B, H, C, C]."""
    return chunks.products(jnp.stack([q_BHCK, chunks.scaled(k_BHCK, beta_BHC[..., None])]), k_BHCK, d)


def _sweep(S_BHKV, P_BHCC, X_BHCC, q_BHCK, k_BHCK, v_BHCV, beta_BHC, d):
    """One chunk, given its P and X = (I + A)^-1: returns (S_BHKV, y_BHCV). Its writes are U - W S, whatever S is."""
    P_BHCC, X_BHCC = P_BHCC.astype(v_BHCV.dtype), X_BHCC.astype(v_BHCV.dtype)
    k_in = chunks.scaled(chunks.scaled(k_BHCK, beta_BHC[..., None]), d.from_start())
    U_BHCV = chunks.matmul("bhij,bhjv->bhiv", X_BHCC, chunks.scaled(v_BHCV, beta_BHC[..., None]))
    W_BHCK = chunks.matmul("bhij,bhjk->bhik", X_BHCC, k_in).astype(k_BHCK.dtype)
    S = S_BHKV.astype(k_BHCK.dtype)
    V_BHCV = (U_BHCV - chunks.matmul("bhck,bhkv->bhcv", W_BHCK, S)).astype(v_BHCV.dtype)
    q_in, k_out = chunks.scaled(q_BHCK, d.from_start()), chunks.scaled(k_BHCK, d.to_end())
    y_BHCV = chunks.matmul("bhck,bhkv->bhcv", q_in, S) + chunks.matmul("bhij,bhjv->bhiv", P_BHCC, V_BHCV)
    kept_BHKV = jnp.where(d.unbroken(), d.whole() * S_BHKV, 0)
    return kept_BHKV + chunks.matmul("bhck,bhcv->bhkv", k_out, V_BHCV), y_BHCV


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _chunked(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_BTHK, S_BHKV, reset_BT, C):
    return _chunked_fwd(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_BTHK, S_BHKV, reset_BT, C)[0]


def _chunked_fwd(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_BTHK, S_BHKV, reset_BT, C):
    """Products chunk by chunk, the inverse of all chunks side by side, then the sweep."""
    inputs = q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_BTHK, reset_BT
    q, k, v, beta, log, reset = (chunks.split(x, C) for x in inputs)
    d = chunks.decay(log, reset)
    PA_NRBHCC = lax.map(lambda x: _products(*x), (q, k, beta, d))
    X_NBHCC = chunks.unit_lower_inverse(jnp.tril(PA_NRBHCC[:, 1], -1))

    def one_chunk(S_BHKV, x):
        S_next, y_BHCV = _sweep(S_BHKV, *x)
        return S_next, (y_BHCV, S_BHKV)

    S_BHKV, (y_NBHCV, S_NBHKV) = lax.scan(one_chunk, S_BHKV, (PA_NRBHCC[:, 0], X_NBHCC, q, k, v, beta, d))
    return (chunks.join(y_NBHCV, q_BTHK.shape[1]), S_BHKV), (*inputs, S_NBHKV, X_NBHCC)


def _chunked_bwd(C, saved, cotangents):
    """The sweep backwards, from the state and the inverse kept for each chunk; the rest of it is computed again."""
    *inputs, S_NBHKV, X_NBHCC = saved
    dy_BTHV, dS_BHKV = cotangents
    q, k, v, beta, log, reset, dy = (chunks.split(x, C) for x in (*inputs, dy_BTHV))
    d, pull_decay = jax.vjp(lambda log: chunks.decay(log, reset), log)

    def backwards(dS_BHKV, x):
        q, k, v, beta, d, S_BHKV, X_BHCC, dy_BHCV = x

        def chunk(S_BHKV, q, k, v, beta, fine):
            here = d._replace(fine_BHCK=fine)
            P_BHCC, A_BHCC = _products(q, k, beta, here)
            return _sweep(S_BHKV, P_BHCC, chunks.known_inverse(A_BHCC, X_BHCC), q, k, v, beta, here)

        _, pull = jax.vjp(chunk, S_BHKV, q, k, v, beta, d.fine_BHCK)
        dS_BHKV, *gradients = pull((dS_BHKV, dy_BHCV))
        return dS_BHKV, gradients

    xs = q, k, v, beta, d, S_NBHKV, X_NBHCC, dy
    dS_BHKV, (*gradients, dfine) = lax.scan(backwards, dS_BHKV, xs, reverse=True)
    gradients += pull_decay(chunks.gradient_of(d, dfine))
    return *(chunks.join(x, dy_BTHV.shape[1]) for x in gradients), dS_BHKV, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
