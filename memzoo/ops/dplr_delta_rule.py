"""The generalised delta rule: a matrix memory whose transition is a diagonal matrix plus one of rank one.

    S_t = (diag(exp(log_decay_t)) + b_t a_t') S_{t-1} + k_t v_t'        y_t = S_t' q_t

What is held under a is read, before anything decays, and written under b. It contains
  - gated linear attention: a = 0 or b = 0;
  - the delta rule with decay: a = exp(log_decay) k, b = -beta k, and beta k for k.

Source: Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution" (2025), arXiv:2503.14456, whose state
evolves so; called diagonal plus low rank (DPLR) in Kimi Team, "Kimi Linear" (2025), arXiv:2510.26692. The chunked form
is the WY representation of Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length" (2024), arXiv:2406.06484, sec. 3.2, with a and b in the place of one key.
Differs: S is [K, V], RWKV-7's transpose.

In a chunk let u_t = S_{t-1}' a_t be what is read under a. Then (I + A) U = a_in S + M V, with A and M the products of a
with the b and k of the tokens before, decayed to just before a's own; one triangular inverse per chunk gives all u.

Dims: B batch, T time, H heads, K key, V value, N chunks, C chunk, R sets of rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.contract import positive
from memzoo.ops import chunks
from memzoo.ops.affine_scan import matrix_states
from memzoo.ops.checks import check_impl, check_log_decay, check_shapes, dtypes
from memzoo.ops.recur import recur

FORMS = ("scan", "associative", "chunk")


def step(S_KV, q_K, k_K, v_V, a_K, b_K, log_decay):
    """One token, one head; log_decay is a scalar or a vector over K. This is the definition."""
    S_KV = jnp.exp(log_decay)[..., None] * S_KV + jnp.outer(b_K, a_K @ S_KV) + jnp.outer(k_K, v_V)
    return S_KV, q_K @ S_KV


def dplr_delta_rule(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    a_BTHK: jax.Array,
    b_BTHK: jax.Array,
    log_decay: jax.Array | None = None,
    S_BHKV: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (y_BTHV, S_BHKV), y in the dtype of v, the state in float32 or wider.

    a_BTHK, b_BTHK: what is read, and where it is written; diag(exp(log_decay)) + b a' should not grow what it acts on,
    or the state diverges. log_decay: [B, T, H] or [B, T, H, K], natural log, <= 0; None is no decay.
    S_BHKV: the incoming state, zeros by default. reset_BT: bool, where True the token begins a new sequence.
    impl: 'scan', 'associative', 'chunk' or 'auto'. All forms are differentiable in every array, any number of times;
    forward mode is not for `chunk`. `chunk` keeps one state and one inverse [C, C] per chunk for its gradient.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have.
    """
    positive(chunk=chunk)
    check_impl("dplr_delta_rule", impl, FORMS)
    check_shapes(q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, a_BTHK=a_BTHK, b_BTHK=b_BTHK)
    check_shapes(q_BTHK=q_BTHK, v_BTHV=v_BTHV, S_BHKV=S_BHKV, reset_BT=reset_BT)
    log_decay = check_log_decay(q_BTHK, log_decay)
    return _forms(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay, S_BHKV, reset_BT, impl=impl, chunk=chunk)


@partial(jax.jit, static_argnames=("impl", "chunk"))  # so that a call outside of jit does not compile its scans anew
def _forms(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay, S_BHKV, reset_BT, impl, chunk):
    common, wide = dtypes(q_BTHK, jnp.result_type(k_BTHK, a_BTHK, b_BTHK), v_BTHV, S_BHKV)
    B, T, H, K = q_BTHK.shape
    S_BHKV = jnp.zeros((B, H, K, v_BTHV.shape[-1]), wide) if S_BHKV is None else S_BHKV.astype(wide)
    log_decay = log_decay.astype(wide)
    xs = q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK
    if impl == "chunk" or (impl == "auto" and T > 1):
        reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
        S_BHKV = jnp.where(reset_BT[:, :1, None, None], 0, S_BHKV)
        q, k, v, a, b = (x.astype(common) for x in xs)
        a = jnp.where(reset_BT[..., None, None], 0, a)  # there is nothing to read
        log_BTHK = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        y_BTHV, S_BHKV = _chunked(q, k, v, a, b, log_BTHK, S_BHKV, reset_BT, min(chunk, T))
    else:
        form = _associative if impl == "associative" else scan
        y_BTHV, S_BHKV = form(*(x.astype(wide) for x in xs), log_decay, S_BHKV, reset_BT)
    return y_BTHV.astype(v_BTHV.dtype), S_BHKV


def scan(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay, S_BHKV, reset_BT):
    return recur(jax.vmap(step), S_BHKV, (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay), reset_BT)


def _associative(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay, S_BHKV, reset_BT):
    """S_t = M_t S_{t-1} + X_t: products of K x K matrices."""
    diagonal_BTHK = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
    M_BTHKK = jnp.eye(k_BTHK.shape[-1], dtype=k_BTHK.dtype) * diagonal_BTHK[..., None, :]
    M_BTHKK = M_BTHKK + b_BTHK[..., None] * a_BTHK[..., None, :]
    X_BTHKV = k_BTHK[..., None] * v_BTHV[..., None, :]
    S_BTHKV = matrix_states(M_BTHKK, X_BTHKV, S_BHKV, reset_BT)
    return jnp.einsum("bthk,bthkv->bthv", q_BTHK, S_BTHKV, precision="highest"), S_BTHKV[:, -1]


def _later(x_BHCK):
    """Each token's successor in its place, and nothing in the place of the last: what reads the state it leaves."""
    return jnp.concatenate([x_BHCK[..., 1:, :], jnp.zeros_like(x_BHCK[..., :1, :])], axis=-2)


def _earlier(x_BHCK, first=0):
    """The inverse: each token's predecessor in its place."""
    return jnp.concatenate([jnp.full_like(x_BHCK[..., :1, :], first), x_BHCK[..., :-1, :]], axis=-2)


def _products(q_BHCK, k_BHCK, v_BHCV, a_BHCK, b_BHCK, d):
    """What does not need the state: A [B, H, C, C]; of q, its products with b, [B, H, C, C]; M V and what q reads of k.

    a reads the state that the token before it leaves: it takes that token's place, and then comes back to its own.
    """
    rows_RBHCK = jnp.stack([q_BHCK, _later(a_BHCK)])
    with_k, with_b = jax.vmap(chunks.products, (None, 0, None))(rows_RBHCK, jnp.stack([k_BHCK, b_BHCK]), d)
    MV_BHCV = chunks.matmul("bhij,bhjv->bhiv", _earlier(with_k[1]).astype(v_BHCV.dtype), v_BHCV)
    y_BHCV = chunks.matmul("bhij,bhjv->bhiv", with_k[0].astype(v_BHCV.dtype), v_BHCV)
    return -_earlier(with_b[1]), with_b[0], MV_BHCV, y_BHCV


def _sweep(S_BHKV, X_BHCC, P_BHCC, MV_BHCV, y_BHCV, q_BHCK, k_BHCK, v_BHCV, a_BHCK, b_BHCK, d):
    """One chunk, given X = (I + A)^-1 and the rest of `_products`: returns (S_BHKV, y_BHCV)."""
    P_BHCC, X_BHCC = P_BHCC.astype(v_BHCV.dtype), X_BHCC.astype(v_BHCV.dtype)
    from_start, to_end, S = d.from_start(), d.to_end(), S_BHKV.astype(k_BHCK.dtype)
    a_in, q_in = chunks.scaled(a_BHCK, _earlier(from_start, 1)), chunks.scaled(q_BHCK, from_start)
    read_BHCV = (chunks.matmul("bhck,bhkv->bhcv", a_in, S) + MV_BHCV).astype(v_BHCV.dtype)
    U_BHCV = chunks.matmul("bhij,bhjv->bhiv", X_BHCC, read_BHCV).astype(v_BHCV.dtype)
    y_BHCV = y_BHCV + chunks.matmul("bhck,bhkv->bhcv", q_in, S) + chunks.matmul("bhij,bhjv->bhiv", P_BHCC, U_BHCV)
    S_BHKV = jnp.where(d.unbroken(), d.whole() * S_BHKV, 0)
    S_BHKV = S_BHKV + chunks.matmul("bhck,bhcv->bhkv", chunks.scaled(k_BHCK, to_end), v_BHCV)
    return S_BHKV + chunks.matmul("bhck,bhcv->bhkv", chunks.scaled(b_BHCK, to_end), U_BHCV), y_BHCV


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _chunked(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_BTHK, S_BHKV, reset_BT, C):
    return _chunked_fwd(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_BTHK, S_BHKV, reset_BT, C)[0]


def _chunked_fwd(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_BTHK, S_BHKV, reset_BT, C):
    """Products chunk by chunk, the inverse of all chunks side by side, then the sweep."""
    inputs = q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_BTHK, reset_BT
    *xs, log, reset = (chunks.split(x, C) for x in inputs)
    d = chunks.decay(log, reset)
    A_NBHCC, *rest = lax.map(lambda x: _products(*x), (*xs, d))
    X_NBHCC = chunks.unit_lower_inverse(A_NBHCC)

    def one_chunk(S_BHKV, x):
        S_next, y_BHCV = _sweep(S_BHKV, *x)
        return S_next, (y_BHCV, S_BHKV)

    S_BHKV, (y_NBHCV, S_NBHKV) = lax.scan(one_chunk, S_BHKV, (X_NBHCC, *rest, *xs, d))
    return (chunks.join(y_NBHCV, q_BTHK.shape[1]), S_BHKV), (*inputs, S_NBHKV, X_NBHCC)


def _chunked_bwd(C, saved, cotangents):
    """The sweep backwards, from the state and the inverse kept for each chunk; the rest of it is computed again."""
    *inputs, S_NBHKV, X_NBHCC = saved
    dy_BTHV, dS_BHKV = cotangents
    *xs, log, reset, dy = (chunks.split(x, C) for x in (*inputs, dy_BTHV))
    d, pull_decay = jax.vjp(lambda log: chunks.decay(log, reset), log)

    def backwards(dS_BHKV, x):
        xs, d, S_BHKV, X_BHCC, dy_BHCV = x

        def chunk(S_BHKV, fine, *xs):
            here = d._replace(fine_BHCK=fine)
            A_BHCC, *rest = _products(*xs, here)
            return _sweep(S_BHKV, chunks.known_inverse(A_BHCC, X_BHCC), *rest, *xs, here)

        _, pull = jax.vjp(chunk, S_BHKV, d.fine_BHCK, *xs)
        dS_BHKV, *gradients = pull((dS_BHKV, dy_BHCV))
        return dS_BHKV, gradients

    dS_BHKV, (dfine, *gradients) = lax.scan(backwards, dS_BHKV, (xs, d, S_NBHKV, X_NBHCC, dy), reverse=True)
    gradients += pull_decay(chunks.gradient_of(d, dfine))
    return *(chunks.join(x, dy_BTHV.shape[1]) for x in gradients), dS_BHKV, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
