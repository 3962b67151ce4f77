"""The nearest orthogonal matrix, nearly: all singular values of a matrix brought near to 1 by products alone.

    X <- a X + (b X X' + c (X X')^2) X        from X / |X|; (a, b, c) = (3.4445, -4.7750, 2.0315)

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), the iteration and its
coefficients, which after 5 steps leave singular values between 0.7 and 1.2 if they were not much smaller than |X|;
Behrouz et al., "ATLAS" (2025), arXiv:2505.23735, as what a memory learns by.
Differs: |X| is sqrt(sum of squares + 1e-6), so that there is a gradient at 0, and a small X remains so.

Dims: O outputs, I inputs.
"""

import jax
import jax.numpy as jnp
from jax import lax

A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz(X: jax.Array, steps: int = 5) -> jax.Array:
    """Of each matrix [..., O, I]."""
    wide = X.shape[-2] > X.shape[-1]  # the smaller of the two products
    X = jnp.swapaxes(X, -1, -2) if wide else X
    X = X * lax.rsqrt(jnp.sum(X * X, axis=(-2, -1), keepdims=True) + 1e-6)

    def step(X, _):
        S = X @ jnp.swapaxes(X, -1, -2)
        return A * X + (B * S + C * (S @ S)) @ X, None

    X, _ = lax.scan(step, X, length=steps)
    return jnp.swapaxes(X, -1, -2) if wide else X
