"""Linear systems that do not change in time, one input and one output each, by their recurrence or their convolution.

    h_t = A h_{t-1} + B u_t        y_t = Re(C h_t)                                   A is a matrix, or its diagonal
    y_t = sum_{j<=t} K_j u_{t-j} + Re(C A^{t+1} h_{-1}),    K_j = Re(C A^j B)

`associative` doubles: a window of 2 n tokens is A^n times the window before plus the one that ends here, so that log T
powers of A serve all tokens, where a product of T matrices would need as many. `conv` is one convolution by FFT where
there are no resets. An FFT cannot stop at a reset; with them, K is applied inside chunks, as a matrix without what lies
across a reset, and the state goes from chunk to chunk by A^C.

By FFT, an inf or a NaN among the inputs makes all outputs of its sequence and channel NaN, also those before it; in the
other forms, and where there are resets, only those after it.

Source: Gu, Johnson, Goel, Saab, Dao, Rudra, Re, "Combining Recurrent, Convolutional, and Continuous-time Models with
Linear State-Space Layers" (2021), arXiv:2110.13985, sec. 3 (the two views).

Dims: B batch, T time, H channels, N state size, C chunk, L length of a kernel, M chunks, X all leading axes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.contract import positive
from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.recur import recur

FORMS = ("scan", "associative", "conv")
CHUNK = 64


def step(h_N, u, A, B_N, C_N):
    """One token, one channel; A is [N, N] or its diagonal [N]. This is the definition."""
    h_N = (A @ h_N if A.ndim == 2 else A * h_N) + B_N * u
    return h_N, jnp.real(C_N @ h_N)


def time_invariant(
    u_BTH: jax.Array,
    A: jax.Array,
    B_HN: jax.Array,
    C_HN: jax.Array,
    h_BHN: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = CHUNK,
    kernel_HL: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (y_BTH, h_BHN), in float32 or wider; y is real.

    A: [H, N, N], or [H, N] for diagonal ones; real or complex, as B, C and h may be.
    kernel_HL: K where one knows it better than as products of A, for `conv` alone: of length L >= T without resets, of
    L >= min(T, chunk) with them; see `kernel_length`.
    reset_BT: bool, where True the state before the token is 0. impl: 'scan', 'associative', 'conv' or 'auto'.
    All forms are differentiable in every array, any number of times and in both modes.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have.
    """
    positive(chunk=chunk)
    check_impl("time_invariant", impl, FORMS)
    N = jnp.shape(B_HN)[-1]
    system: dict[str, Any] = {"A_HNN" if jnp.ndim(A) == 3 else "A_HN": A}
    check_shapes(u_BTH=u_BTH, B_HN=B_HN, **system, C_HN=C_HN, h_BHN=h_BHN, reset_BT=reset_BT, kernel_HL=kernel_HL)
    B, T, H = u_BTH.shape
    if kernel_HL is not None and kernel_HL.shape[1] < (least := kernel_length(T, reset_BT, chunk)):
        raise ValueError(f"kernel_HL: expected a length L >= {least}, got shape {list(kernel_HL.shape)}")
    wide = jnp.promote_types(jnp.result_type(u_BTH, A, B_HN, C_HN), jnp.float32)
    real = jnp.finfo(wide).dtype
    kind = jnp.result_type(A, B_HN, wide) if h_BHN is None else jnp.result_type(A, B_HN, h_BHN, wide)
    h_BHN = jnp.zeros((B, H, N), kind) if h_BHN is None else h_BHN.astype(kind)
    A, B_HN, C_HN = A.astype(kind), B_HN.astype(kind), C_HN.astype(jnp.result_type(C_HN, real))
    return _forms(u_BTH.astype(real), A, B_HN, C_HN, h_BHN, reset_BT, kernel_HL, impl=impl, chunk=chunk)


def kernel_length(T: int, reset_BT: jax.Array | None, chunk: int = CHUNK) -> int:
    """How much of the kernel `conv` needs."""
    return T if reset_BT is None else min(T, chunk)


def convolve(u_BTH: jax.Array, kernel_HL: jax.Array) -> jax.Array:
    """y_t = sum_{j<=t} K_j u_{t-j} by FFT, [B, T, H]; a kernel that is shorter or longer than T is padded or cut."""
    T = u_BTH.shape[1]
    size = 1 << (2 * T - 1).bit_length()  # no less than 2 T - 1, so that nothing wraps around
    u_BFH = jnp.fft.rfft(u_BTH, size, axis=1)
    K_FH = jnp.fft.rfft(kernel_HL[:, :T].T, size, axis=0)
    return jnp.fft.irfft(u_BFH * K_FH, size, axis=1)[:, :T]


def strides(A: jax.Array, v_HN: jax.Array, stride: int, n: int) -> jax.Array:
    """v, A^stride v, A^(2 stride) v, ..., n of them, [n, H, N]; stride is a power of 2."""
    return _krylov(_squares(A, n * stride)[stride.bit_length() - 1 :], v_HN, n)


def kernel(A: jax.Array, B_HN: jax.Array, C_HN: jax.Array, L: int) -> jax.Array:
    """K_j = Re(C A^j B) for j < L, [H, L]: sqrt(L) small steps from B times sqrt(L) large ones from C."""
    small = 1 << ((L - 1).bit_length() + 1) // 2
    powers = _squares(A, L)
    right_SHN = _krylov(powers, B_HN, small)
    left_GHN = _krylov(_transposed(powers[small.bit_length() - 1 :]), C_HN, -(-L // small))
    return jnp.real(_einsum("ghn,shn->hgs", left_GHN, right_SHN)).reshape(len(B_HN), -1)[:, :L]


def doubled(x_BTHN: jax.Array, A: jax.Array, h_BHN: jax.Array, reset_BT: jax.Array | None = None) -> jax.Array:
    """Every state of h_t = A h_{t-1} + x_t by doubling. A window with a reset takes nothing from the one before it."""
    B, T = x_BTHN.shape[:2]
    cut_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT

    def unless(cut, h):  # `where`, not a product: an inf or a NaN must not pass
        return jnp.where(cut[..., None, None], 0, h)

    h_BTHN = x_BTHN.at[:, 0].add(_apply(A, unless(cut_BT[:, 0], h_BHN)))
    window = 1
    while window < T:
        ago = lambda z, first: jnp.concatenate([jnp.full_like(z[:, :window], first), z[:, :-window]], axis=1)  # noqa: B023
        h_BTHN = h_BTHN + _apply(A, unless(cut_BT, ago(h_BTHN, 0)))
        cut_BT = cut_BT | ago(cut_BT, True)
        A, window = _compose(A, A), 2 * window
    return h_BTHN


@partial(jax.jit, static_argnames=("impl", "chunk"))  # so that a call outside of jit does not compile its scans anew
def _forms(u_BTH, A, B_HN, C_HN, h_BHN, reset_BT, kernel_HL, impl, chunk):
    T = u_BTH.shape[1]
    if impl == "auto":  # measured: the convolution wins from a handful of tokens on
        impl = "scan" if T == 1 else "conv"
    if impl == "scan":

        def token(h_HN, u_H):
            return jax.vmap(step)(h_HN, u_H, A, B_HN, C_HN)

        y_BTH, h_BHN = recur(token, h_BHN, (u_BTH,), reset_BT)
        return y_BTH, h_BHN
    if impl == "associative":
        h_BTHN = doubled(u_BTH[..., None] * B_HN, A, h_BHN, reset_BT)
        return jnp.real(_einsum("hn,bthn->bth", C_HN, h_BTHN)), h_BTHN[:, -1]

    length = kernel_length(T, reset_BT, chunk)
    kernel_HL = kernel(A, B_HN, C_HN, length) if kernel_HL is None else kernel_HL[:, :length]
    kernel_HL = kernel_HL.astype(u_BTH.dtype)
    if reset_BT is None:
        free_BTH, h_BHN = _ends(u_BTH, A, B_HN, C_HN, h_BHN, chunk)
        return convolve(u_BTH, kernel_HL) + free_BTH, h_BHN
    return _chunked(u_BTH, A, B_HN, C_HN, h_BHN, reset_BT, kernel_HL, chunk)


def _ends(u_BTH, A, B_HN, C_HN, h_BHN, C):
    """What the incoming state alone does to the outputs, and the state after the last token. No resets."""
    T = u_BTH.shape[1]
    M, R = divmod(T, C)  # R tokens, then M chunks
    powers = _squares(A, min(T, C) + 1)
    read_CHN, write_CHN = _maps(powers, B_HN, C_HN, min(T, C))
    read = lambda h_XBHN, n: jnp.real(_einsum("chn,...bhn->...bch", read_CHN[:n], h_XBHN))
    write = lambda u_XBCH, n: _einsum("...bch,chn->...bhn", u_XBCH, write_CHN[len(write_CHN) - n :])

    free_BTH = read(h_BHN, R)
    free_BHN, forced_BHN = _power(powers, h_BHN, R), write(u_BTH[:, :R], R)
    if M:
        u_MBCH = jnp.moveaxis(u_BTH[:, R:].reshape(-1, M, C, u_BTH.shape[2]), 1, 0)
        jump = partial(_power, powers, n=C)
        free_BHN, before_MBHN = lax.scan(lambda h_BHN, _: (jump(h_BHN), h_BHN), free_BHN, None, M)
        forced_BHN, _ = lax.scan(lambda h_BHN, w_BHN: (jump(h_BHN) + w_BHN, None), forced_BHN, write(u_MBCH, C))
        late_BTH = jnp.moveaxis(read(before_MBHN, C), 0, 1).reshape(len(u_BTH), M * C, -1)
        free_BTH = jnp.concatenate([free_BTH, late_BTH], axis=1)
    return free_BTH, free_BHN + forced_BHN


def _chunked(u_BTH, A, B_HN, C_HN, h_BHN, reset_BT, kernel_HC, C):
    """With resets: tokens see each other, or the incoming state, inside of one segment of a chunk only."""
    B, T, H = u_BTH.shape
    powers = _squares(A, min(T, C) + 1)
    read_CHN, write_CHN = _maps(powers, B_HN, C_HN, min(T, C))
    ys = []
    for start, end, n in ((0, T % C, T % C), (T % C, T, C)):
        if start == end:
            continue
        u_MBCH, reset_MBC = (
            jnp.moveaxis(z[:, start:end].reshape(B, -1, n, *z.shape[2:]), 1, 0) for z in (u_BTH, reset_BT)
        )
        segment_MBC = jnp.cumsum(reset_MBC, axis=2, dtype=jnp.int32)
        last_MBC = segment_MBC == segment_MBC[..., -1:]
        kept_MBCH = jnp.where(last_MBC[..., None], u_MBCH, 0)
        added_MBHN = _einsum("mbch,chn->mbhn", kept_MBCH, write_CHN[len(write_CHN) - n :])

        def across(h_BHN, chunk, n=n):
            added_BHN, cut_B = chunk
            h_out_BHN = _power(powers, jnp.where(cut_B[:, None, None], 0, h_BHN), n) + added_BHN
            return h_out_BHN, h_BHN

        h_BHN, before_MBHN = lax.scan(across, h_BHN, (added_MBHN, segment_MBC[..., -1] > 0))
        before_MBHN = jnp.where(reset_MBC[..., :1, None], 0, before_MBHN)  # NaN times 0 is none in the gradient
        y_MBCH = jnp.real(_einsum("chn,mbhn->mbch", read_CHN[:n], before_MBHN))
        y_MBCH = jnp.where((segment_MBC == 0)[..., None], y_MBCH, 0)
        y_MBCH = y_MBCH + _within_segments(u_MBCH, kernel_HC[:, :n], segment_MBC)
        ys.append(jnp.moveaxis(y_MBCH, 0, 1).reshape(B, end - start, H))
    return jnp.concatenate(ys, axis=1), h_BHN


def _within_segments(u_MBCH, kernel_HC, segment_MBC):
    """Lag by lag, as which tokens see each other is another matter for each chunk."""
    at_C = jnp.arange(u_MBCH.shape[2])

    @jax.checkpoint  # or the gradient would keep C shifted copies of u
    def add(y_MBCH, lag_kernel):
        lag, kernel_H = lag_kernel
        ago = lambda z: jnp.roll(z, lag, axis=2)
        seen_MBC = (ago(segment_MBC) == segment_MBC) & (at_C >= lag)
        return y_MBCH + kernel_H * jnp.where(seen_MBC[..., None], ago(u_MBCH), 0), None

    return lax.scan(add, jnp.zeros_like(u_MBCH), (at_C, kernel_HC.T))[0]


def _maps(powers, B_HN, C_HN, n):
    """C A^{j+1}, by which token j sees the state before a chunk, and A^{n-1-j} B, which token j leaves behind it."""
    read_CHN = _krylov(_transposed(powers), _apply(_transposed(powers)[0], C_HN), n)
    return read_CHN, jnp.flip(_krylov(powers, B_HN, n), axis=0)


def _squares(A, n):
    """A, A^2, A^4, ..., as many as powers below n are made of."""
    powers = [A]
    while 1 << len(powers) < n:
        powers.append(_compose(powers[-1], powers[-1]))
    return powers


def _power(powers, h_XHN, n):
    """A^n h."""
    for i, A in enumerate(powers):
        if n >> i & 1:
            h_XHN = _apply(A, h_XHN)
    return h_XHN


def _krylov(powers, v_HN, n):
    """v, A v, ..., A^{n-1} v: [n, H, N]."""
    v_XHN = v_HN[None]
    for A in powers:
        if len(v_XHN) < n:
            v_XHN = jnp.concatenate([v_XHN, _apply(A, v_XHN)])
    return v_XHN[:n]


def _apply(A, h_XHN):
    return A * h_XHN if A.ndim == 2 else _einsum("hnm,...hm->...hn", A, h_XHN)


def _compose(A, B):
    return A * B if A.ndim == 2 else _einsum("hnm,hmk->hnk", A, B)


def _transposed(powers):
    return [A if A.ndim == 2 else jnp.swapaxes(A, 1, 2) for A in powers]


def _einsum(equation, *operands):
    return jnp.einsum(equation, *operands, precision="highest")
