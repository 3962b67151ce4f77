"""All monomials of a key up to a degree, as features whose products are a polynomial in the product of keys.

    phi(q)' phi(k) = sum_i s_i^2 (q' k)^i        phi has s_i sqrt(i! / (b_1! ... b_K!)) x_1^b_1 ... x_K^b_K, i = |b|

Source: Behrouz et al., "ATLAS: Learning to Optimally Memorize the Context at Test Time" (2025), arXiv:2505.23735, the
polynomial kernels of sec. 3; with s_i^2 = 1 / i! they are the Taylor series of exp.

Dims: K key, N = degree + 1.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np


def size(K: int, degree: int) -> int:
    """How many features a key of K channels has."""
    return math.comb(K + degree, degree)


def polynomial(x_K: jax.Array, s_N: jax.Array) -> jax.Array:
    """The features, along the last axis; from the degree 0 up to N - 1."""
    monomials = [jnp.ones_like(x_K[..., :1])]
    for degree in range(1, len(s_N)):
        monomials.append(_times(x_K, monomials[-1], degree))
    weights = [_weights(x_K.shape[-1], degree).astype(x_K.dtype) for degree in range(len(s_N))]
    return jnp.concatenate([s * w * z for s, w, z in zip(s_N, weights, monomials, strict=True)], axis=-1)


def _times(x_K, monomials, degree):
    """Those of `degree`, from those of one less, in the order of their lowest index i: x_i and what has none below."""
    K, count = x_K.shape[-1], monomials.shape[-1]
    begins = [count - math.comb(K - i + degree - 2, degree - 1) for i in range(K)]
    return jnp.concatenate([x_K[..., i : i + 1] * monomials[..., begins[i] :] for i in range(K)], axis=-1)


def taylor(degree: int) -> np.ndarray:
    """s_N of exp."""
    return np.array([math.factorial(i) ** -0.5 for i in range(degree + 1)])


def _weights(K, degree):
    of = lambda b: math.factorial(degree) / math.prod(math.factorial(b.count(i)) for i in set(b))
    return np.sqrt([of(b) for b in itertools.combinations_with_replacement(range(K), degree)])
