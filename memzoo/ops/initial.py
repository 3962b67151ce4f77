"""How weights begin where several architectures agree: as in PyTorch, and so in released code that says nothing of it,
uniform in +-1/sqrt(fan in); and Mamba's steps, which the decays of many have come to share.

Source: Linear and Conv1d of torch.nn (2.x), whose weights and biases alike have this bound, variance 1 / (3 fan in);
Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), arXiv:2312.00752, sec. 3.6, for dt.

Dims: W width of a convolution.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

like_torch = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Of a matrix [..., inputs, outputs], whose fan in its shape tells."""

lecun = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2, batch_axis=0)
"""Of a matrix [heads, outputs, inputs] of variance 1 / inputs, as memories that learn while they read have theirs."""


def within(bound: float) -> Callable[..., jax.Array]:
    """Uniform in +-bound, an initialiser of any shape: for biases, and for convolutions [W, D], whose fan in is W."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, -bound, bound)


def short_filter(key, shape, dtype=float):
    """Uniform in +-1/sqrt(W), as for any depthwise convolution of width W."""
    return jax.random.uniform(key, shape, dtype, -1, 1) * shape[0] ** -0.5


def log_uniform(low, high):
    """The logarithm of what is uniform in [low, high)."""
    return lambda key, shape, dtype=float: jnp.log(jax.random.uniform(key, shape, dtype, low, high))


def small_step(key, shape, dtype=float):
    """Mamba's bias of dt: softplus(bias) is log-uniform in [1e-3, 1e-1], so memory is long at the start."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1)))
    return dt + jnp.log(-jnp.expm1(-dt))
