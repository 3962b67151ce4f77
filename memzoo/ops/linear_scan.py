"""The elementwise linear recurrence, real or complex.

    h_t = a_t h_{t-1} + x_t

Source: Blelloch, "Prefix Sums and Their Applications" (1990), sec. 1.4, for the associative form; Martin, Cundy,
"Parallelizing Linear Recurrent Neural Nets Over Sequence Length" (2017), arXiv:1709.04057, for its adjoint.

Dims: B batch, T time, X any one axis of channels, C chunk, N chunks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.contract import positive
from memzoo.ops import kernels
from memzoo.ops.checks import check_shapes
from memzoo.ops.recur import recur

FORMS = ("scan", "sweep", "associative", "chunk")  # and 'pallas', on the chips that it is for


def step(h_X, a_X, x_X):
    """One token. This is the definition."""
    h_X = a_X * h_X + x_X
    return h_X, h_X


def linear_scan(
    a_BTX: jax.Array,
    x_BTX: jax.Array,
    h_BX: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (h_BTX, h_BX), every state and the last one, in float32 or wider.

    a_BTX, x_BTX: real or complex. h_BX: the incoming state, zeros by default. The forms agree for |a| <= 1: above
    it, products of a, which `scan` alone does not form, may overflow where no state does, and inf times 0 is NaN.
    reset_BT: bool, where True the token begins a new sequence. impl: 'scan', 'sweep' (the same loop, four tokens a
    turn, and its adjoint as another such loop: this op's alone, no mixer has it by name), 'associative', 'chunk',
    'pallas' (the loop as a kernel, of real arrays) or 'auto', which on a CPU is 'sweep'.
    All forms are differentiable in a, x and h, any number of times, 'pallas' once; forward mode is `scan`'s alone.
    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a form this op does not have, and
    for 'pallas' where its kernel cannot run.
    """
    positive(chunk=chunk)
    sizes = check_shapes(x_BTX=x_BTX, a_BTX=a_BTX, h_BX=h_BX, reset_BT=reset_BT)
    dtype = jnp.result_type(a_BTX, x_BTX, jnp.float32, *([] if h_BX is None else [h_BX]))
    choice = _choice(sizes, _kept(a_BTX, dtype), _kept(x_BTX, dtype), dtype, impl)
    return _forms(a_BTX, x_BTX, h_BX, reset_BT, dtype=dtype, choice=choice, chunk=chunk)


def _kept(array, dtype):
    """The dtype in which a kernel reads an array: bfloat16 as it is, others in the dtype of the state."""
    return array.dtype if dtype == jnp.float32 and jnp.result_type(array) == jnp.bfloat16 else dtype


def _choice(sizes, of_a, of_x, dtype, impl):
    B, T, X = (sizes[axis] for axis in "BTX")
    # On a CPU memory is the limit, and a loop over tokens reads it once.
    otherwise = "scan" if T == 1 else "sweep" if jax.default_backend() == "cpu" else "chunk"
    arrays = (jax.ShapeDtypeStruct(*array) for array in (((B, T, X), of_a), ((B, T, X), of_x), ((B, X), dtype)))
    return kernels.choose("linear_scan", impl, FORMS, otherwise, *arrays)


# Jitted so that a call outside of jit does not compile its scans anew.
@partial(jax.jit, static_argnames=("dtype", "choice", "chunk"))
def _forms(a_BTX, x_BTX, h_BX, reset_BT, dtype, choice, chunk):
    B, T, X = x_BTX.shape
    h_BX = jnp.zeros((B, X), dtype) if h_BX is None else h_BX.astype(dtype)
    if choice.impl == "pallas":
        a_BTX, x_BTX = a_BTX.astype(_kept(a_BTX, dtype)), x_BTX.astype(_kept(x_BTX, dtype))
        reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
        h_BX = jnp.where(reset_BT[:, :1], 0, h_BX)
        return kernels.run("linear_scan", choice, a_BTX, x_BTX, h_BX, reset_BT)
    a_BTX, x_BTX = a_BTX.astype(dtype), x_BTX.astype(dtype)
    if choice.impl == "scan":
        return recur(step, h_BX, (a_BTX, x_BTX), reset_BT)
    if reset_BT is not None:
        a_BTX = jnp.where(reset_BT[..., None], 0, a_BTX)
        h_BX = jnp.where(reset_BT[:, :1], 0, h_BX)
    h_BTX = _all_states(a_BTX, x_BTX, h_BX, choice.impl, chunk)
    return h_BTX, h_BTX[:, -1]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _all_states(a_BTX, x_BTX, h_BX, impl, chunk):
    x_BTX = x_BTX.at[:, 0].add(_carry(a_BTX[:, 0], h_BX))
    if impl == "chunk":
        return _chunked(a_BTX, x_BTX, chunk)
    return (_associative if impl == "associative" else _sweep)(a_BTX, x_BTX)


def _all_states_fwd(a_BTX, x_BTX, h_BX, impl, chunk):
    h_BTX = _all_states(a_BTX, x_BTX, h_BX, impl, chunk)
    return h_BTX, (a_BTX, h_BX, h_BTX)


def _all_states_bwd(impl, chunk, saved, dh_BTX):
    """The adjoint is the same recurrence backwards in time: dx_t = dh_t + a_{t+1} dx_{t+1}."""
    a_BTX, h_BX, h_BTX = saved
    next_BTX = jnp.concatenate([a_BTX[:, 1:], jnp.zeros_like(a_BTX[:, :1])], axis=1)
    flip = partial(jnp.flip, axis=1)
    dx_BTX = flip(_all_states(flip(next_BTX), flip(dh_BTX), jnp.zeros_like(h_BX), impl, chunk))
    before_BTX = jnp.concatenate([h_BX[:, None], h_BTX[:, :-1]], axis=1)
    return dx_BTX * before_BTX, dx_BTX, dx_BTX[:, 0] * a_BTX[:, 0]


_all_states.defvjp(_all_states_fwd, _all_states_bwd)


def _carry(a, h):
    """a h, and 0 where a = 0 whatever h holds: a reset is a = 0, and inf must not leak past it."""
    return jnp.where(a == 0, 0, a * h)


def _sweep(a_BTX, x_BTX):
    def token(h_BX, ax):
        h_BX = _carry(ax[0], h_BX) + ax[1]
        return h_BX, h_BX

    time_first = partial(jnp.moveaxis, source=1, destination=0)
    _, h_TBX = lax.scan(token, jnp.zeros_like(x_BTX[:, 0]), (time_first(a_BTX), time_first(x_BTX)), unroll=4)
    return jnp.moveaxis(h_TBX, 0, 1)


def _associative(a_BTX, x_BTX):
    def combine(left, right):
        (a, x), (b, y) = left, right
        return _carry(b, a), _carry(b, x) + y

    return lax.associative_scan(combine, (a_BTX, x_BTX), axis=1)[1]


def _chunked(a_BTX, x_BTX, C):
    """All chunks side by side from a zero state, token by token; then the chunks' carries; then both together."""
    B, T, X = x_BTX.shape
    N = -(-T // C)
    split = lambda x: jnp.moveaxis(jnp.pad(x, ((0, 0), (0, N * C - T), (0, 0))).reshape(B, N, C, X), 2, 0)

    def within(carry, ax):
        h_BNX, p_BNX = carry
        a_BNX, x_BNX = ax
        h_BNX, p_BNX = _carry(a_BNX, h_BNX) + x_BNX, _carry(a_BNX, p_BNX)
        return (h_BNX, p_BNX), (h_BNX, p_BNX)

    zero_BNX = jnp.zeros((B, N, X), x_BTX.dtype)
    (h_BNX, p_BNX), (h_CBNX, p_CBNX) = lax.scan(within, (zero_BNX, zero_BNX + 1), (split(a_BTX), split(x_BTX)))

    def across(h_BX, hp):
        return _carry(hp[1], h_BX) + hp[0], h_BX

    chunks = jnp.moveaxis(h_BNX, 1, 0), jnp.moveaxis(p_BNX, 1, 0)
    _, before_NBX = lax.scan(across, jnp.zeros((B, X), x_BTX.dtype), chunks)
    h_CBNX = h_CBNX + _carry(p_CBNX, jnp.moveaxis(before_NBX, 0, 1))
    return jnp.moveaxis(h_CBNX, 0, 2).reshape(B, N * C, X)[:, :T]
