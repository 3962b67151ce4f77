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
from memzoo.ops import chunks, kernels
from memzoo.ops.checks import check_log_decay, check_shapes, dtypes
from memzoo.ops.recur import recur

FORMS = ("scan", "associative", "chunk")  # and 'pallas', on the chips that it is for


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
    impl: 'scan', 'associative', 'chunk', 'pallas' or 'auto'. All forms are differentiable in every array, any number of
    times, 'pallas' once; forward mode is not for 'chunk' and 'pallas'. Their gradient stores no states: a forward sweep
    for q and a backward one for k and v recompute them.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have, and
    for 'pallas' where its kernel cannot run.
    """
    y_BTHV, _, S_BHKV, _ = _check(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, None, reset_BT, impl, chunk)
    return y_BTHV, S_BHKV


def normalised_linear_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay: jax.Array | None = None,
    S_BHKV: jax.Array | None = None,
    z_BHK: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Linear attention and the sum of its weights: (y_BTHV, total_BTH, S_BHKV, z_BHK), total in float32 or wider.

        z_t = exp(log_decay_t) z_{t-1} + k_t        total_t = z_t' q_t

    which is what y would be if every value were 1; what to divide by, and where its floor is, is the caller's. A kernel
    gives it as that y, in the dtype of v. Everything else is as in linear_attention.
    """
    if z_BHK is None:
        z_BHK = jnp.zeros((q_BTHK.shape[0], *q_BTHK.shape[2:]), jnp.promote_types(q_BTHK.dtype, jnp.float32))
    return _check(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, z_BHK, reset_BT, impl, chunk)


def _check(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, z_BHK, reset_BT, impl, chunk):
    positive(chunk=chunk)
    sizes = check_shapes(q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, S_BHKV=S_BHKV, z_BHK=z_BHK, reset_BT=reset_BT)
    log_decay = check_log_decay(q_BTHK, log_decay)
    choice = _choice(sizes, log_decay, z_BHK is not None, dtypes(q_BTHK, k_BTHK, v_BTHV, S_BHKV), impl)
    return _forms(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, z_BHK, reset_BT, choice=choice, chunk=chunk)


def _choice(sizes, log_decay, summed, dtypes, impl):
    B, T, H, K, V = (sizes[axis] for axis in "BTHKV")
    (common, wide), V = dtypes, V + summed
    shapes = ((B, T, H, K), common), ((B, T, H, K), common), ((B, T, H, V), common), (log_decay.shape, wide)
    arrays = (jax.ShapeDtypeStruct(*shape) for shape in (*shapes, ((B, H, K, V), wide)))
    return kernels.choose("linear_attention", impl, FORMS, "chunk" if T > 1 else "scan", *arrays)


@partial(jax.jit, static_argnames=("choice", "chunk"))  # so that a call outside of jit does not compile its scans anew
def _forms(q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, z_BHK, reset_BT, choice, chunk):
    common, wide = dtypes(q_BTHK, k_BTHK, v_BTHV, S_BHKV)
    B, T, H, K = q_BTHK.shape
    S_BHKV = jnp.zeros((B, H, K, v_BTHV.shape[-1]), wide) if S_BHKV is None else S_BHKV.astype(wide)
    z_BHK1 = None if z_BHK is None else z_BHK.astype(wide)[..., None]
    log_decay = log_decay.astype(wide)
    if choice.impl == "chunk":
        reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
        state = jax.tree.map(lambda s: jnp.where(reset_BT[:, :1, None, None], 0, s), (S_BHKV, z_BHK1))
        q, k, v = (x.astype(common) for x in (q_BTHK, k_BTHK, v_BTHV))
        log_BTHK = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        (y_BTHV, total_BTH), (S_BHKV, z_BHK1) = _chunked(q, k, v, log_BTHK, state, reset_BT, min(chunk, T))
    else:
        q, k, v = (x.astype(common if choice.impl == "pallas" else wide) for x in (q_BTHK, k_BTHK, v_BTHV))
        form = {"scan": scan, "associative": _associative, "pallas": partial(_pallas, choice)}[choice.impl]
        if z_BHK1 is None:
            y_BTHV, S_BHKV = form(q, k, v, log_decay, S_BHKV, reset_BT)
        else:  # the sum of the weights is the memory of one more value, always 1
            v_BTHU = jnp.pad(v, [(0, 0)] * 3 + [(0, 1)], constant_values=1)
            S_BHKU = jnp.concatenate([S_BHKV, z_BHK1], axis=-1)
            y_BTHU, S_BHKU = form(q, k, v_BTHU, log_decay, S_BHKU, reset_BT)
            y_BTHV, total_BTH, S_BHKV, z_BHK1 = y_BTHU[..., :-1], y_BTHU[..., -1], S_BHKU[..., :-1], S_BHKU[..., -1:]
    if z_BHK1 is None:
        return y_BTHV.astype(v_BTHV.dtype), None, S_BHKV, None
    return y_BTHV.astype(v_BTHV.dtype), total_BTH.astype(wide), S_BHKV, z_BHK1[..., 0]


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


def _pallas(choice, q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, reset_BT):
    reset_BT = jnp.zeros(q_BTHK.shape[:2], bool) if reset_BT is None else reset_BT
    S_BHKV = jnp.where(reset_BT[:, :1, None, None], 0, S_BHKV)
    return kernels.run("linear_attention", choice, q_BTHK, k_BTHK, v_BTHV, log_decay, S_BHKV, reset_BT)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _chunked(q_BTHK, k_BTHK, v_BTHV, log_BTHK, state, reset_BT, C):
    """state: (S_BHKV, z_BHK1), or (S_BHKV, None) where nobody asks for the sum of the weights.

    Returns ((y_BTHV, total_BTH or None), state).
    """
    return _chunked_fwd(q_BTHK, k_BTHK, v_BTHV, log_BTHK, state, reset_BT, C)[0]


def _chunked_fwd(q_BTHK, k_BTHK, v_BTHV, log_BTHK, state, reset_BT, C):
    inputs = q_BTHK, k_BTHK, v_BTHV, log_BTHK, reset_BT
    B, T, H, K = q_BTHK.shape
    L, pieces = chunks.layout(B, T, H, K, v_BTHV.shape[-1], C)
    summed = state[1] is not None

    def piece(state_and_before, x):
        state, _ = state_and_before
        q, k, v, log, reset = (chunks.fold(part, C) for part in x)
        d = chunks.decay(log, reset)
        before, state = chunks.states(d, _written(k, v, d, summed), state)
        q_in = chunks.scaled(q, d.from_start())
        y, total = _within(q, k, v, d, summed)
        y = y + chunks.matmul("bhck,bhkv->bhcv", q_in, before[0].astype(q.dtype))
        total = total + jnp.einsum("bhck,bhk->bhc", q_in, before[1][..., 0], precision="highest") if summed else None
        last = jax.tree.map(lambda s: s.reshape(B, -1, *s.shape[1:])[:, -1], before)
        return (state, last), jax.tree.map(partial(chunks.unfold, B=B), (y, total))

    xs = tuple(chunks.pad(x, L * pieces) for x in inputs)
    (last, before), read = chunks.sweep(piece, (state, state), xs, pieces)
    return (jax.tree.map(lambda y: y[:, -T:], read), last), (*inputs, state, before)


def _within(q_BHCK, k_BHCK, v_BHCV, d, summed):
    """What tokens read of the ones before them in their chunk, and with which sum of weights."""
    P_BHCC = chunks.products(q_BHCK[None], k_BHCK, d)[0]
    y_BHCV = chunks.matmul("bhij,bhjv->bhiv", P_BHCC.astype(v_BHCV.dtype), v_BHCV)
    return y_BHCV, jnp.sum(P_BHCC, -1) if summed else None


def _written(k_BHCK, v_BHCV, d, summed):
    k_out = chunks.scaled(k_BHCK, d.to_end())
    z_BHK1 = jnp.sum(k_out.astype(d.fine_BHCK.dtype), -2)[..., None] if summed else None
    return chunks.matmul("bhck,bhcv->bhkv", k_out, v_BHCV), z_BHK1


def _chunked_bwd(C, saved, cotangents):
    """Two sweeps over the chunks, which store no states.

    Forward in time, with S: everything that reads, dq and the part of dk, dv, dlog inside the chunk.
    Backward in time, with dS: everything that writes, the rest of dk, dv, dlog, and dS itself.
    One term needs S and dS at once, the gradient of what a chunk keeps, kept_n = <S_n, exp(..) dS_n+1> per key. It
    follows from the chunk after it: what n + 1 keeps and reads of S_n+1 is what n has kept and written. The last
    chunk's is taken from the state before it, the one state that is saved.
    """
    q, k, v, log, reset, state, before = saved
    (dy_BTHV, dtotal_BTH), dstate = cotangents
    B, T, H, K = q.shape
    summed = state[1] is not None
    L, pieces = chunks.layout(B, T, H, K, v.shape[-1], C)
    xs = jax.tree.map(lambda x: chunks.pad(x, L * pieces), (q, k, v, log, reset, dy_BTHV, dtotal_BTH))
    fold, rows = partial(chunks.fold, C=C), partial(chunks.unfold, B=B)

    def forwards(state, x):
        q, k, v, log, reset, dy, dtotal = jax.tree.map(fold, x)
        d = chunks.decay(log, reset)
        (S, z), state = chunks.states(d, _written(k, v, d, summed), state)
        fine = lambda f: lambda *args: f(*args[:-1], d._replace(fine_BHCK=args[-1]))
        _, pull = jax.vjp(fine(lambda *args: _within(*args, summed)), q, k, v, d.fine_BHCK)
        dq, dk, dv, dfine = pull((dy, dtotal))
        q_in, pull_in = jax.vjp(fine(lambda q, d: chunks.scaled(q, d.from_start())), q, d.fine_BHCK)
        dq_in = chunks.matmul("bhcv,bhkv->bhck", dy, S.astype(dy.dtype))
        dq_in = dq_in + dtotal[..., None] * z[..., None, :, 0] if summed else dq_in
        dq_out, dfine_out = pull_in(dq_in.astype(q.dtype))
        read_BMHK = jnp.sum(q_in * dq_in, -2).reshape(B, -1, *dq.shape[1::2])
        return state, (*map(rows, (dq + dq_out, dk, dv, dfine + dfine_out)), read_BMHK)

    _, (dq, *within) = chunks.sweep(forwards, state, xs, pieces)

    def backwards(carry, x):
        dstate, kept_and_written_BHK = carry
        *x, read_BMHK, last_BM = x
        q, k, v, log, reset, dy, dtotal, dk, dv, dfine = jax.tree.map(fold, x)
        d, pull_decay = jax.vjp(lambda log: chunks.decay(log, reset), log)
        q_in = chunks.scaled(q, d.from_start())
        dz = jnp.sum(q_in * dtotal[..., None], -2)[..., None] if summed else None
        (dS, dz), dstate = chunks.states(d, (chunks.matmul("bhck,bhcv->bhkv", q_in, dy), dz), dstate, reverse=True)
        k_out, pull_out = jax.vjp(lambda k, fine: chunks.scaled(k, d._replace(fine_BHCK=fine).to_end()), k, d.fine_BHCK)
        dv_out = chunks.matmul("bhck,bhkv->bhcv", k_out, dS.astype(k.dtype)).astype(v.dtype)
        dk_out = chunks.matmul("bhcv,bhkv->bhck", v, dS.astype(v.dtype))
        dk_out = dk_out + dz[..., None, :, 0] if summed else dk_out
        written_BMHK = jnp.sum(k_out * dk_out, -2).reshape(read_BMHK.shape)
        dk_out, dfine_out = pull_out(dk_out.astype(k.dtype))

        def chunk(kept_and_written_BHK, x):
            written_BHK, read_BHK, unbroken, last_B = x
            kept_BHK = kept_and_written_BHK - jnp.where(last_B[:, None, None], 0, written_BHK)
            kept_BHK = jnp.where(unbroken, kept_BHK, 0)
            return kept_BHK + read_BHK, kept_BHK

        unbroken_BM11 = d.unbroken().reshape(B, -1, 1, 1)
        by_chunk = tuple(jnp.swapaxes(x, 0, 1) for x in (written_BMHK, read_BMHK, unbroken_BM11, last_BM))
        kept_and_written_BHK, kept_MBHK = lax.scan(chunk, kept_and_written_BHK, by_chunk, reverse=True)
        kept = jnp.swapaxes(kept_MBHK, 0, 1).reshape(-1, *kept_MBHK.shape[2:])
        over_chunk = jnp.sum(kept, -1, keepdims=True) if dfine.shape[-1] == 1 else kept
        dfine = (dfine + dfine_out).at[..., -1, :].add(over_chunk)  # the sum at the last token is the whole chunk's
        (dlog,) = pull_decay(chunks.gradient_of(d, dfine))
        return (dstate, kept_and_written_BHK), tuple(map(rows, (dk + dk_out, dv + dv_out, dlog)))

    N = L * pieces // C
    whole = chunks.decay(fold(xs[3][:, -C:]), fold(reset[:, -C:])).whole()
    kept = jax.tree.map(lambda s, ds: jnp.sum(whole * s * ds, -1), before, dstate)
    carry = dstate, sum(jax.tree.leaves(kept))
    xs = *xs, *within, jnp.broadcast_to(jnp.arange(N) == N - 1, (B, N))
    (dstate, _), (dk, dv, dlog) = chunks.sweep(backwards, carry, xs, pieces, reverse=True)
    return *(x[:, -T:] for x in (dq, dk, dv, dlog)), dstate, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
