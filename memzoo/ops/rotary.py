"""Rotary places: queries and keys turned by where they stand, so that their product knows how far apart they are.

    turn(x, n) = pairs of channels (2 f, 2 f + 1) of x turned by n theta_f        theta_f = base^(-2 f / K)

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), arXiv:2104.09864, eq. 34.
Differs: theta is rounded to multiples of 2^-32 turns, so that n theta is exact at any place, where floats lose it.

Dims: B batch, T time, H heads, K channels, F = K / 2 frequencies.
"""

import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo.ops.checks import check_shapes


def places(n_B: jax.Array, T: int, reset_BT: jax.Array | None = None) -> jax.Array:
    """How many tokens came before each one in its text, int32 [B, T], where n_B came before this call."""
    t_T = jnp.arange(T, dtype=jnp.int32)
    if reset_BT is None:
        return n_B[:, None] + t_T
    start_BT = lax.cummax(jnp.where(reset_BT, t_T, -1), axis=1)
    return jnp.where(start_BT >= 0, t_T - start_BT, n_B[:, None] + t_T)


def turn(x_BTHK: jax.Array, n_BT: jax.Array, base: float = 10_000.0) -> jax.Array:
    """x_BTHK turned as its places n_BT say, in float32 at least, returned in the dtype of x.

    Raises ValueError, by name, for an odd K and for a base that is not a finite number > 0.
    """
    check_shapes("T", x_BTHK=x_BTHK)
    if x_BTHK.shape[-1] % 2:
        raise ValueError(f"x_BTHK: expected an even K, to turn pairs, got shape {list(x_BTHK.shape)}")
    if not (isinstance(base, numbers.Real) and 0 < base < np.inf):
        raise ValueError(f"base: expected a finite number > 0, got {base!r}")
    F = x_BTHK.shape[-1] // 2
    return turn_by(x_BTHK, n_BT, float(base) ** (-np.arange(F) / F))


def turn_by(x_BTHK: jax.Array, n_BT: jax.Array, theta_F: np.ndarray) -> jax.Array:
    """The same with any frequencies, in radians for each place.

    Turns are counted in integers, 2^32 to the circle: whole ones vanish, and so does an overflow of n.
    """
    wide = jnp.promote_types(x_BTHK.dtype, jnp.float32)
    turns_F = theta_F / (2 * np.pi) % 1  # a base < 1 makes whole ones
    turns_F = (np.round(turns_F * 2**32) % 2**32).astype(np.uint32)
    turns_BTF = lax.bitcast_convert_type(n_BT.astype(jnp.uint32)[..., None] * turns_F, jnp.int32)
    angle_BT1F = turns_BTF.astype(wide)[:, :, None] * (2 * np.pi / 2**32)
    cos, sin = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
    a, b = x_BTHK[..., 0::2].astype(wide), x_BTHK[..., 1::2].astype(wide)
    x_BTHF2 = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return x_BTHF2.reshape(x_BTHK.shape).astype(x_BTHK.dtype)
