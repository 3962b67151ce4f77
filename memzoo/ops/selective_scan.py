"""The selective scan: a diagonal state-space model whose step size, input and output change with the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t        per channel, with a state of N of its own

Source: Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), arXiv:2312.00752, sec. 3.2
(algorithm 2, S6) and sec. 3.3 (that the states are never written to memory, and are recomputed for the gradient).
Differs: h and A are [N, D], the paper's transpose. dt B is the paper's code's simplification of the exact input matrix.

Dims: B batch, T time, D channels, N state size, C chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.contract import positive
from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.linear_scan import linear_scan
from memzoo.ops.recur import recur

FORMS = ("scan", "associative", "chunk")


def step(h_ND, x_D, dt_D, A_ND, B_N, C_N):
    """One token. This is the definition."""
    h_ND = jnp.exp(dt_D * A_ND) * h_ND + jnp.outer(B_N, dt_D * x_D)
    return h_ND, C_N @ h_ND


def selective_scan(
    x_BTD: jax.Array,
    dt_BTD: jax.Array,
    A_ND: jax.Array,
    B_BTN: jax.Array,
    C_BTN: jax.Array,
    h_BND: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (y_BTD, h_BND), y in the dtype of x, the state in float32 or wider.

    dt_BTD: >= 0; where it is 0 the channel's state stays as it is, bit for bit. A_ND: finite and <= 0; where it is 0
    nothing is ever forgotten. h_BND: the incoming state, zeros by default. reset_BT: bool, where True the token begins
    a new sequence. impl: 'scan', 'associative', 'chunk' or 'auto', which is 'chunk'.
    The states [B, T, N, D] exist in memory in 'associative', in the gradient of 'scan', and never in 'chunk', which
    keeps one state per chunk for the gradient and recomputes the others, a chunk at a time.
    All forms are differentiable in every array, any number of times; forward mode is `scan`'s alone.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have.
    """
    positive(chunk=chunk)
    check_impl("selective_scan", impl, FORMS)
    check_shapes(x_BTD=x_BTD, dt_BTD=dt_BTD, A_ND=A_ND, B_BTN=B_BTN, C_BTN=C_BTN, h_BND=h_BND, reset_BT=reset_BT)
    return _forms(x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, h_BND, reset_BT, impl=impl, chunk=chunk)


@partial(jax.jit, static_argnames=("impl", "chunk"))  # so that a call outside of jit does not compile its scans anew
def _forms(x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, h_BND, reset_BT, impl, chunk):
    arrays = x_BTD, dt_BTD, A_ND, B_BTN, C_BTN
    wide = jnp.result_type(*arrays, jnp.float32, *([] if h_BND is None else [h_BND]))
    B, T, D = x_BTD.shape
    h_BND = jnp.zeros((B, len(A_ND), D), wide) if h_BND is None else h_BND.astype(wide)
    if impl == "chunk" or (impl == "auto" and T > 1):
        reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
        A_ND = A_ND.astype(wide)
        y_BTD, h_BND = _chunked(x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, h_BND, reset_BT, min(chunk, T))
    else:
        form = _associative if impl == "associative" else _scan
        y_BTD, h_BND = form(*(z.astype(wide) for z in arrays), h_BND, reset_BT)
    return y_BTD.astype(x_BTD.dtype), h_BND


def _scan(x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, h_BND, reset_BT):
    def token(h_ND, x_D, dt_D, B_N, C_N):
        return step(h_ND, x_D, dt_D, A_ND, B_N, C_N)

    return recur(token, h_BND, (x_BTD, dt_BTD, B_BTN, C_BTN), reset_BT)


def _associative(x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, h_BND, reset_BT):
    """Every state at once: N D recurrences side by side."""
    flat = lambda z: z.reshape(*z.shape[:-2], -1)
    a_BTND = jnp.exp(dt_BTD[:, :, None] * A_ND)
    u_BTND = B_BTN[..., None] * (dt_BTD * x_BTD)[:, :, None]
    h_BTX, _ = linear_scan(flat(a_BTND), flat(u_BTND), flat(h_BND), reset_BT, impl="associative")
    h_BTND = h_BTX.reshape(a_BTND.shape)
    return jnp.einsum("btn,btnd->btd", C_BTN, h_BTND, precision="highest"), h_BTND[:, -1]


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _chunked(x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, h_BND, reset_BT, C):
    return _chunked_fwd(x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, h_BND, reset_BT, C)[0]


def _chunked_fwd(x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, h_BND, reset_BT, C):
    """Token by token inside a chunk, whose state then stays in a CPU's cache: measured there, twice as fast as an
    associative scan of each chunk forward and four times backward. On a GPU it is bound by a kernel launch per token.
    """

    def token(h_BND, xs):
        *xs, C_BN = xs
        h_BND = _write(h_BND, A_ND, *xs)
        return h_BND, jnp.sum(C_BN[..., None].astype(h_BND.dtype) * h_BND, 1).astype(x_BTD.dtype)

    def one_chunk(h_BND, xs):
        last_BND, y_CBD = lax.scan(token, h_BND, xs)
        return last_BND, (y_CBD, h_BND)

    xs = _split((x_BTD, dt_BTD, reset_BT, B_BTN, C_BTN), C)
    last_BND, (y, first) = lax.scan(one_chunk, h_BND, xs)
    return (_join(y, x_BTD), last_BND), (x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, reset_BT, first)


def _chunked_bwd(C, saved, cotangents):
    """The adjoint g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}, chunk by chunk from the end.

    A chunk's states are recomputed from its first one.
    """
    x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, reset_BT, first = saved
    dy_BTD, dh_BND = cotangents

    def token(carry, xs):
        g_BND, dA_BND = carry
        before_BND, x_BD, dt_BD, reset_B, B_BN, C_BN, dy_BD = xs
        wide = lambda z: z.astype(g_BND.dtype)
        x_B1D, dt_B1D, dy_B1D = (wide(z)[:, None] for z in (x_BD, dt_BD, dy_BD))
        B_BN1, C_BN1 = wide(B_BN)[..., None], wide(C_BN)[..., None]
        a_BND, cut_B11 = jnp.exp(dt_B1D * A_ND), reset_B[:, None, None]
        old_BND, new_BND = jnp.where(cut_B11, 0, a_BND * before_BND), B_BN1 * (dt_B1D * x_B1D)

        g_BND = g_BND + C_BN1 * dy_B1D
        dC_BN = jnp.sum((old_BND + new_BND) * dy_B1D, -1)
        dB_BN = jnp.sum(g_BND * (dt_B1D * x_B1D), -1)
        du_B1D = jnp.sum(g_BND * B_BN1, 1, keepdims=True)  # the gradient of dt x
        dlog_BND = g_BND * old_BND  # and that of dt A
        ddt_B1D = du_B1D * x_B1D + jnp.sum(dlog_BND * A_ND, 1, keepdims=True)
        out = (du_B1D * dt_B1D)[:, 0], ddt_B1D[:, 0], dB_BN, dC_BN
        out = jax.tree.map(lambda d, z: d.astype(z.dtype), out, (x_BD, dt_BD, B_BN, C_BN))
        return (jnp.where(cut_B11, 0, a_BND * g_BND), dA_BND + dlog_BND * dt_B1D), out

    def one_chunk(carry, xs):
        h_BND, (*write, C_CBN, dy_CBD) = xs
        _, before_CBND = lax.scan(lambda h_BND, xs: (_write(h_BND, A_ND, *xs), h_BND), h_BND, tuple(write))
        return lax.scan(token, carry, (before_CBND, *write, C_CBN, dy_CBD), reverse=True)

    xs = _split((x_BTD, dt_BTD, reset_BT, B_BTN, C_BTN, dy_BTD), C)
    (dh_BND, dA_BND), out = lax.scan(one_chunk, (dh_BND, jnp.zeros_like(dh_BND)), (first, xs), reverse=True)
    dx_BTD, ddt_BTD, dB_BTN, dC_BTN = (_join(z, x_BTD) for z in out)
    return dx_BTD, ddt_BTD, jnp.sum(dA_BND, 0), dB_BTN, dC_BTN, dh_BND, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _write(h_BND, A_ND, x_BD, dt_BD, reset_B, B_BN):
    x_BD, dt_BD, B_BN = (z.astype(h_BND.dtype) for z in (x_BD, dt_BD, B_BN))
    h_BND = jnp.where(reset_B[:, None, None], 0, jnp.exp(dt_BD[:, None] * A_ND) * h_BND)
    return h_BND + B_BN[..., None] * (dt_BD * x_BD)[:, None]


def _split(xs, C):
    """Each [B, T, ...] as [chunks, C, B, ...]. Zeros behind write nothing and, as dt = 0, forget nothing."""

    def one(x):
        x = jnp.moveaxis(x, 1, 0)
        x = jnp.pad(x, [(0, -len(x) % C)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, C, *x.shape[1:])

    return tuple(one(x) for x in xs)


def _join(x, like_BTD):
    x = x.reshape(-1, *x.shape[2:])[: like_BTD.shape[1]]
    return jnp.moveaxis(x, 0, 1)
