"""Spikes: numbers as multiples of a threshold that adapts to them, and trains of spikes that sum to the multiples.

    c = round(x / h)        h = mean |x| / f        c = sum over p of w_p s_p,   s_p in {-1, 0, 1}

Source: Pan et al., "SpikingBrain: Spiking Brain-inspired Large Models" (2025), arXiv:2509.05276, eq. 19, 21 and 22, and
its codes of sec. 3.3.2; the limits of h and the order of bits from the released code (BICLab/SpikingBrain-7B).

Dims: X any axes, P steps of virtual time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.contract import nearest, positive

CODES = ("binary", "ternary", "bitwise", "twos_complement")


def count(x_X: jax.Array, firing_rate: float) -> tuple[jax.Array, jax.Array]:
    """(c_X, h_X), h with a last axis of 1: whole numbers, as floats, and the threshold of which x is about c times.

    The mean is over the last axis. firing_rate: f; the larger, the more spikes. Both are in float32 at least.
    """
    x_X = x_X.astype(jnp.promote_types(x_X.dtype, jnp.float32))
    h_X = jnp.clip(jnp.mean(jnp.abs(x_X), axis=-1, keepdims=True) / firing_rate, 1e-5, 1e4)
    return jnp.round(x_X / h_X), h_X


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def spiked(x_X: jax.Array, firing_rate: float) -> jax.Array:
    """x as its spikes tell it, c h. The gradient is straight through: that of x."""
    c_X, h_X = count(x_X, firing_rate)
    return (c_X * h_X).astype(x_X.dtype)


@spiked.defjvp
def _straight_through(firing_rate, x, dx):
    return spiked(*x, firing_rate), dx[0]


def train(c_X: jax.Array, code: str, steps: int) -> jax.Array:
    """The spikes s_PX of counts, int8: c = sum over P of weights(code, steps)_P s_PX.

    binary: as many 1 as the count, which is not negative. ternary: as many of its sign. bitwise: its bits, the highest
    first, with its sign. twos_complement: its bits as a number of `steps` bits, which are 0 or 1 for all signs.
    Counts that need more steps, as `steps_for` tells, lose spikes.
    """
    _check(code, steps)
    c_X = jnp.asarray(c_X, jnp.int32)
    p_PX = jnp.arange(steps).reshape(-1, *[1] * c_X.ndim)
    if code in ("binary", "ternary"):
        spike_X = jnp.sign(c_X) if code == "ternary" else jnp.maximum(jnp.sign(c_X), 0)
        return jnp.where(p_PX < jnp.abs(c_X), spike_X, 0).astype(jnp.int8)
    if code == "twos_complement":
        return (c_X >> (steps - 1 - p_PX) & 1).astype(jnp.int8)
    return (jnp.sign(c_X) * (jnp.abs(c_X) >> (steps - 1 - p_PX) & 1)).astype(jnp.int8)


def weights(code: str, steps: int) -> np.ndarray:
    """What a spike of each step stands for: int64 [P]."""
    _check(code, steps)
    if code in ("binary", "ternary"):
        return np.ones(steps, np.int64)
    powers_P = 2 ** np.arange(steps)[::-1]
    return powers_P if code == "bitwise" else powers_P * np.where(np.arange(steps) == 0, -1, 1)


def steps_for(most: int, code: str) -> int:
    """The steps that counts of up to `most` need, and of down to -most where the code has signs."""
    positive(most=most)
    bits = int(most).bit_length()
    steps = {"binary": most, "ternary": most, "bitwise": bits, "twos_complement": bits + 1}.get(code, 1)
    _check(code, steps)
    return steps


def _check(code, steps):
    if code not in CODES:
        raise ValueError(f"code: unknown code {code!r}; {nearest(str(code), CODES)}")
    positive(steps=steps)
    if steps > 32 and code in ("bitwise", "twos_complement"):
        raise ValueError(f"steps: expected at most the 32 bits of a count, got {steps}")
