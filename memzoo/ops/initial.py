"""How weights begin in PyTorch, and so in released code that says nothing of it: uniform in +-1/sqrt(fan in).

Source: Linear and Conv1d of torch.nn (2.x), whose weights and biases alike have this bound, variance 1 / (3 fan in).
"""

from collections.abc import Callable

import jax

like_torch = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Of a matrix [..., inputs, outputs], whose fan in its shape tells."""


def within(bound: float) -> Callable[..., jax.Array]:
    """Uniform in +-bound, an initialiser of any shape: for biases, and for convolutions [W, D], whose fan in is W."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, -bound, bound)
