"""A diagonal state-space model per channel, the same at all times: S4D's recurrence.

    h_t = lambda h_{t-1} + b x_t        y_t = Re(sum_n c_n h_n,t)        per channel, with N complex states of its own

Source: Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models" (2022),
arXiv:2206.11893, for the recurrence and its kernel y_t = sum_s Re(sum_n c_n lambda_n^s b_n) x_{t-s}.
Differs: `chunk` convolves with the kernel's first C taps only and carries the state from chunk to chunk, so that it is
linear in T, takes an incoming state and keeps no state but one per chunk. It does so by a matrix that is 0 above its
diagonal, so that without resets an inf or a NaN among the inputs makes outputs NaN from the start of its chunk on.

Dims: B batch, T time, D channels, N state size, C chunk, M chunks, X = D N.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.contract import positive
from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.chunks import matmul
from memzoo.ops.linear_scan import linear_scan
from memzoo.ops.recur import recur, widen

FORMS = ("scan", "associative", "chunk")


def step(h_DN, x_D, lambda_DN, b_DN, c_DN):
    """One token. This is the definition."""
    h_DN = lambda_DN * h_DN + b_DN * x_D[:, None]
    return h_DN, jnp.sum(c_DN * h_DN, -1).real


def diagonal_ssm(
    x_BTD: jax.Array,
    lambda_DN: jax.Array,
    b_DN: jax.Array,
    c_DN: jax.Array,
    h_BDN: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (y_BTD, h_BDN), y in x's dtype and the last state in complex64 or wider.

    lambda_DN: |lambda| <= 1 keeps the state bounded. h_BDN: the incoming state, zeros by default.
    reset_BT: bool, where True the token begins a new sequence. impl: 'scan', 'associative', 'chunk' or 'auto'.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have.
    """
    positive(chunk=chunk)
    check_impl("diagonal_ssm", impl, FORMS)
    check_shapes(x_BTD=x_BTD, lambda_DN=lambda_DN, b_DN=b_DN, c_DN=c_DN, h_BDN=h_BDN, reset_BT=reset_BT)
    return _forms(x_BTD, lambda_DN, b_DN, c_DN, h_BDN, reset_BT, impl=impl, chunk=chunk)


def zero_order_hold(A: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(exp(dt A), (exp(dt A) - 1) / A): a step of dh/dt = A h + x, exact for an x that is constant meanwhile."""
    z = jnp.asarray(dt * A)
    near_0 = jnp.abs(z) < 0.03  # where the difference would cancel, in the gradient above all
    series = jnp.ones_like(z)  # (exp(z) - 1) / z
    for n in range(7, 1, -1):
        series = 1 + z / n * series
    return jnp.exp(z), dt * jnp.where(near_0, series, jnp.expm1(z) / jnp.where(near_0, 1, z))


@partial(jax.jit, static_argnames=("impl", "chunk"))
def _forms(x_BTD, lambda_DN, b_DN, c_DN, h_BDN, reset_BT, impl, chunk):
    given = [z for z in (x_BTD, lambda_DN, b_DN, c_DN, h_BDN) if z is not None]
    dtype = jnp.result_type(*given, jnp.complex64)
    (B, T, D), N = x_BTD.shape, lambda_DN.shape[1]
    lambda_DN, b_DN, c_DN = (z.astype(dtype) for z in (lambda_DN, b_DN, c_DN))
    h_BDN = jnp.zeros((B, D, N), dtype) if h_BDN is None else h_BDN.astype(dtype)
    if impl == "auto":
        impl = "scan" if T == 1 else "chunk"
    x = widen(x_BTD)
    if impl == "scan":
        y_BTD, h_BDN = recur(partial(step, lambda_DN=lambda_DN, b_DN=b_DN, c_DN=c_DN), h_BDN, (x,), reset_BT)
    elif impl == "associative":
        u_BTX = (b_DN * x[..., None]).reshape(B, T, D * N)
        a_BTX = jnp.broadcast_to(lambda_DN.reshape(D * N), u_BTX.shape)
        h_BTX, h_BX = linear_scan(a_BTX, u_BTX, h_BDN.reshape(B, D * N), reset_BT, impl=impl)
        y_BTD = jnp.sum(c_DN * h_BTX.reshape(B, T, D, N), -1).real
        h_BDN = h_BX.reshape(B, D, N)
    else:
        ys, even = [], T - T % chunk
        for start, end, C in (0, even, chunk), (even, T, T % chunk):
            if start < end:
                reset = None if reset_BT is None else reset_BT[:, start:end]
                y_BTD, h_BDN = _chunked(x[:, start:end], lambda_DN, b_DN, c_DN, h_BDN, reset, C)
                ys.append(y_BTD)
        y_BTD = jnp.concatenate(ys, axis=1)
    return y_BTD.astype(x_BTD.dtype), h_BDN


def _chunked(x_BTD, lambda_DN, b_DN, c_DN, h_BDN, reset_BT, C):
    """T a multiple of C. Chunks are convolved side by side; a scan carries the state across them."""
    (B, T, D), N, M = x_BTD.shape, lambda_DN.shape[1], x_BTD.shape[1] // C
    later_CDN = lax.associative_scan(jnp.multiply, jnp.broadcast_to(lambda_DN, (C, D, N)))  # lambda^1 ... lambda^C
    now_CDN = jnp.concatenate([jnp.ones_like(later_CDN[:1]), later_CDN[:-1]])  # lambda^0 ... lambda^(C-1)
    tap_CD = jnp.sum(c_DN * b_DN * now_CDN, -1).real
    x_BMCD = x_BTD.reshape(B, M, C, D)
    reset_BMC = jnp.zeros((B, M, C), bool) if reset_BT is None else reset_BT.reshape(B, M, C)
    segment_BMC = jnp.cumsum(reset_BMC, axis=2, dtype=jnp.int32)

    if reset_BT is None:
        y_BMCD = matmul("dij,bmjd->bmid", _toeplitz(tap_CD.T), x_BMCD)
    else:
        y_BMCD = _within_segments(tap_CD, x_BMCD, segment_BMC)

    # What each chunk adds to the state, by tokens that its last token still sees; then the state before each chunk.
    seen_BMCD = jnp.where((segment_BMC == segment_BMC[..., -1:])[..., None], x_BMCD, 0)
    u_BMDN = _complex(partial(matmul, "jdn,bmjd->bmdn"), b_DN * now_CDN[::-1], seen_BMCD)
    a_BMX = jnp.broadcast_to(later_CDN[-1].reshape(D * N), (B, M, D * N))
    cut_BM = segment_BMC[..., -1] > 0
    h_BMX, h_BX = linear_scan(a_BMX, u_BMDN.reshape(B, M, D * N), h_BDN.reshape(B, D * N), cut_BM, impl="scan")
    before_BMDN = jnp.concatenate([h_BDN[:, None], h_BMX.reshape(B, M, D, N)[:, :-1]], axis=1)
    before_BMDN = jnp.where(reset_BMC[..., :1, None], 0, before_BMDN)

    read_CDN = c_DN * later_CDN
    parts = (read_CDN.real, before_BMDN.real), (read_CDN.imag, before_BMDN.imag)
    real, imaginary = (matmul("idn,bmdn->bmid", *part) for part in parts)
    y_BMCD = y_BMCD + jnp.where((segment_BMC == 0)[..., None], real - imaginary, 0)
    return y_BMCD.reshape(B, T, D), h_BX.reshape(B, D, N)


def _toeplitz(tap_DC):
    """[D, C, C] with tap i - j at (i, j), 0 above the diagonal. Each row is the one before it, turned by one: taps in
    reverse, repeated at a period one longer than the row, and no gather, whose gradient would be slow."""
    D, C = tap_DC.shape
    turned = jnp.concatenate([tap_DC[:, :1], jnp.zeros((D, C), tap_DC.dtype), tap_DC[:, :0:-1]], axis=1)
    return jnp.tile(turned, C)[:, : C * (2 * C - 1)].reshape(D, C, 2 * C - 1)[:, :, :C]


def _within_segments(tap_CD, x_BMCD, segment_BMC):
    """The convolution of each chunk, cut at resets: lag by lag, as the matrix of taps is another one for each chunk."""
    C = tap_CD.shape[0]

    @jax.checkpoint  # or the gradient would keep C shifted copies of x
    def add(y_BMCD, tap_lag):
        tap_D, lag = tap_lag
        same_BMC = (jnp.roll(segment_BMC, lag, axis=2) == segment_BMC) & (jnp.arange(C) >= lag)
        return y_BMCD + tap_D * jnp.where(same_BMC[..., None], jnp.roll(x_BMCD, lag, axis=2), 0), None

    return lax.scan(add, jnp.zeros_like(x_BMCD), (tap_CD, jnp.arange(C)))[0]


def _complex(product, z, x):
    """product(z, x) for a complex z and a real x, as two real products."""
    return lax.complex(product(z.real, x), product(z.imag, x))
