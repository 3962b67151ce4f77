"""Normalisation of queries and keys to unit length."""

import jax
import jax.numpy as jnp
from jax import lax


def unit(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / sqrt(|x|^2 + epsilon) along the last axis; the sum is taken in float32 at least."""
    x_wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (x_wide * lax.rsqrt(jnp.sum(x_wide * x_wide, -1, keepdims=True) + epsilon)).astype(x.dtype)
