"""HiPPO as a memory of given signals: at each step, the coefficients of the past, and the past from them.

    c_t = A_t c_{t-1} + B_t f_t        legs: A_t, B_t depend on how many steps the past has; legt, lagt: they do not

f is constant during a step. By `zoh` legs' c_t is the projection of that staircase, its least-squares fit by
polynomials on all of [0, t], at every t and exactly. `bilinear` is the rule of the paper's experiments with legs.

`associative` for legs by zoh multiplies no matrices: two pasts join by stretching the first to the length of both.

Source: Gu, Dao, Ermon, Rudra, Re, "HiPPO: Recurrent Memory with Optimal Polynomial Projections" (2020),
arXiv:2008.07669, sec. 2.3, 3 and appendix (discretisations).
Differs: legs' bilinear rule has dt = 1 / t in both of its halves, and c_1 = f_1 in its first coefficient, as in the
released code.

Dims: B batch, T time, H channels, N coefficients, X points of the past.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo.contract import nearest
from memzoo.ops import hippo
from memzoo.ops.affine_scan import affine_scan
from memzoo.ops.checks import check_impl, check_shapes
from memzoo.ops.recur import recur
from memzoo.ops.time_invariant import doubled

FORMS = ("scan", "associative")
MEASURES = ("legs", "legt", "lagt")
DISCRETISATIONS = ("zoh", "bilinear")


def hippo_memory(
    f_BTH: jax.Array,
    c_BHN: jax.Array | None = None,
    position_B: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    *,
    size: int,
    measure: str = "legs",
    discretisation: str = "zoh",
    timescale: float = 100.0,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All T steps. Returns (c_BTHN, c_BHN, position_B): every memory, the last one, and how many steps it has seen.

    c_BHN, position_B: the incoming memory, int32 for the position; an empty one by default.
    reset_BT: bool, where True the past begins with this step.
    size: N. timescale: in steps, legt's window or lagt's mean age; legs has none.
    impl: 'scan', 'associative' or 'auto', which is 'scan'.
    Raises ValueError for arguments that do not fit, NotImplementedError for a form this op does not have.
    """
    check_impl("hippo_memory", impl, FORMS)
    step(measure, size, discretisation, timescale)  # refuses what cannot be
    check_shapes(f_BTH=f_BTH, c_BHN=c_BHN, reset_BT=reset_BT)
    (B, _, H), wide = f_BTH.shape, jnp.promote_types(f_BTH.dtype, jnp.float32)
    c_BHN = jnp.zeros((B, H, size), wide) if c_BHN is None else c_BHN.astype(wide)
    if c_BHN.shape[2] != size:
        raise ValueError(f"c_BHN: expected N = size = {size}, got shape {list(c_BHN.shape)}")
    position_B = jnp.zeros(B, jnp.int32) if position_B is None else position_B
    if position_B.shape != (B,) or position_B.dtype != jnp.int32:
        raise ValueError(f"position_B: expected int32 [{B}], got {position_B.dtype} {list(position_B.shape)}")
    return _forms(f_BTH.astype(wide), c_BHN, position_B, reset_BT, (measure, size, discretisation, timescale), impl)


@partial(jax.jit, static_argnames=("kind", "impl"))  # so that a call outside of jit does not compile its scans anew
def _forms(f_BTH, c_BHN, position_B, reset_BT, kind, impl):
    measure, size, discretisation, _ = kind
    B, T, H = f_BTH.shape
    one, k_BT = step(*kind), positions(position_B, T, reset_BT)
    last_B = k_BT[:, -1] + 1
    if impl != "associative":

        def token(c_HN, f_H, k):
            c_HN = jax.vmap(one, (0, 0, None))(c_HN, f_H, k)
            return c_HN, c_HN

        c_BTHN, c_BHN = recur(token, c_BHN, (f_BTH, k_BT), reset_BT)
        return c_BTHN, c_BHN, last_B

    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
    write = lambda f_H, k: jax.vmap(one, (None, 0, None))(jnp.zeros(size, f_BTH.dtype), f_H, k)
    written_BTHN = jax.vmap(jax.vmap(write))(f_BTH, k_BT)
    if measure != "legs":
        A_NN, _ = constant(*kind)
        A_HNN = jnp.broadcast_to(jnp.asarray(A_NN, f_BTH.dtype), (H, size, size))
        c_BTHN = doubled(written_BTHN, A_HNN, c_BHN, reset_BT)
    elif discretisation == "bilinear":
        unit_NN = jnp.eye(size, dtype=f_BTH.dtype)
        A_BTNN = jax.vmap(jax.vmap(lambda k: jax.vmap(lambda e_N: one(e_N, 0.0, k), out_axes=1)(unit_NN)))(k_BT)
        scan = partial(affine_scan, impl="associative")
        c_BTHN, _ = jax.vmap(scan, (None, 2, 1, None), (2, 1))(A_BTNN, written_BTHN, c_BHN, reset_BT)
    else:
        c_BTHN = _joined(written_BTHN, c_BHN, k_BT, reset_BT)
    return c_BTHN, c_BTHN[:, -1], last_B


def step(measure: str, N: int, discretisation: str, timescale: float) -> Callable[..., jax.Array]:
    """(c_N, f, k) -> c_N, one step of one channel, of which k came before. This is the definition.

    Raises ValueError for a measure, a size, a discretisation or a timescale that cannot be.
    """
    hippo.check(measure, N, MEASURES)
    if discretisation not in DISCRETISATIONS:
        expected, near = ", ".join(DISCRETISATIONS), nearest(str(discretisation), DISCRETISATIONS)
        raise ValueError(f"discretisation: expected one of {expected}; {near}")
    if not timescale > 0:
        raise ValueError(f"timescale: expected a number > 0, got {timescale}")
    if measure == "legs":
        return hippo.legs_zoh if discretisation == "zoh" else hippo.legs_bilinear
    A_NN, B_N = constant(measure, N, discretisation, timescale)

    def remember(c_N, f, k):
        return jnp.asarray(A_NN, c_N.dtype) @ c_N + jnp.asarray(B_N, c_N.dtype) * f

    return remember


def constant(measure: str, N: int, discretisation: str, timescale: float) -> tuple[np.ndarray, np.ndarray]:
    """(A_NN, B_N) of a step of legt or lagt."""
    A_NN, B_N = hippo.transition(measure, N)
    if discretisation == "zoh":
        return hippo.zoh(A_NN, B_N, 1 / timescale)
    half_NN = A_NN / (2 * timescale)
    right = np.column_stack([np.eye(N) + half_NN, B_N / timescale])
    both = np.linalg.solve(np.eye(N) - half_NN, right)
    return both[:, :N], both[:, N]


def positions(position_B: jax.Array, T: int, reset_BT: jax.Array | None) -> jax.Array:
    """How many steps of its sequence came before each one, [B, T], int32."""
    t_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (len(position_B), T))
    k_BT = position_B[:, None] + t_BT
    if reset_BT is None:
        return k_BT
    last_BT = lax.cummax(jnp.where(reset_BT, t_BT, -1), axis=1)
    return jnp.where(last_BT < 0, k_BT, t_BT - last_BT)


def reconstruct(c_XN: jax.Array, ago_X: np.ndarray, measure: str = "legs") -> jax.Array:
    """f at times `ago` before now, [..., X], from memories [..., N].

    ago_X: a constant, in fractions of the whole past for legs, in timescales for legt and lagt; 0 is now.
    """
    basis_XN = hippo.basis(measure, c_XN.shape[-1], ago_X)
    return jnp.einsum("...n,xn->...x", c_XN, jnp.asarray(basis_XN, c_XN.dtype), precision="highest")


def _joined(written_BTHN, c_BHN, k_BT, reset_BT):
    """legs by zoh: a stretch of steps is what they leave by its end, and when that is. A reset cuts off the left."""

    def stretch(c_BTHN, short_BT, long_BT):
        one = jax.vmap(hippo.legs_stretch, (0, None, None))
        return jax.vmap(jax.vmap(one))(c_BTHN, jnp.minimum(short_BT, long_BT), long_BT)

    def combine(left, right):
        (c, end, cut), (d, later_end, later_cut) = left, right
        c = jnp.where(later_cut[..., None, None], 0, c)  # before it is stretched: an inf or a NaN must not pass
        return stretch(c, end, later_end) + d, later_end, cut | later_cut

    first_BHN = jnp.where(reset_BT[:, 0, None, None], 0, c_BHN)[:, None]
    first_BHN = stretch(first_BHN, k_BT[:, :1], k_BT[:, :1] + 1)[:, 0]
    written_BTHN = written_BTHN.at[:, 0].add(first_BHN)
    return lax.associative_scan(combine, (written_BTHN, k_BT + 1, reset_BT), axis=1)[0]
