"""The second-order Taylor series of exp as a feature map, so that linear attention is nearly softmax attention.

    phi(q)' phi(k) = 1 + x + x^2 / 2        x = q' k / sqrt(K)

Source: Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff" (2024),
arXiv:2402.18668, after Zhang et al., "The Hedgehog & the Porcupine" (2024), arXiv:2402.04347.
Differs: each product of two channels is kept once, 1 + K + K (K + 1) / 2 features in place of 1 + K + K^2.

Dims: K key.
"""

import jax
import jax.numpy as jnp
import numpy as np

FLOOR = 0.5  # 1 + x + x^2 / 2 >= 1/2: a sum of weights never falls below it but by rounding


def size(K: int) -> int:
    """How many features a key of K channels has."""
    return 1 + K + K * (K + 1) // 2


def phi(x_K: jax.Array) -> jax.Array:
    """The features of a key or a query, along the last axis."""
    K = x_K.shape[-1]
    x_K = x_K * K**-0.25
    squares = [x_K[..., i : i + 1] * x_K[..., i:] for i in range(K)]  # each pair of channels once, at first i with i
    weight = np.concatenate([[0.5**0.5] + [1.0] * (K - 1 - i) for i in range(K)])
    pairs = jnp.concatenate(squares, axis=-1) * weight.astype(x_K.dtype)
    return jnp.concatenate([jnp.ones_like(x_K[..., :1]), x_K, pairs], axis=-1)
