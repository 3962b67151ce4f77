"""The definition of every recurrence: `step` folded over time.

Dims: B batch, T time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def recur(
    step: Callable[..., tuple[Any, Any]], state: Any, xs: Any, reset_BT: jax.Array | None = None
) -> tuple[Any, Any]:
    """Folds `state, y = step(state, *x)` over time, one row of the batch at a time.

    state: arrays [B, ...]; xs: a tuple of arrays [B, T, ...], each x without B and T.
    reset_BT: where True, the row's state is replaced by zeros before the token.
    Returns (ys [B, T, ...], state). On GPU and TPU too, float32 matmuls in `step` are not rounded on the way in.
    """

    def row(state, x, reset):
        if reset is not None:  # `where`, not a product: whatever the old state holds, NaN too, must not pass
            state = jax.tree.map(lambda s: jnp.where(reset, jnp.zeros_like(s), s), state)
        return step(state, *x)

    def token(state, x_reset):
        return jax.vmap(row)(state, *x_reset)

    with jax.default_matmul_precision("highest"):
        state, ys = lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (xs, reset_BT)))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), ys), state


def widen(xs: Any) -> Any:
    """Every array of the pytree in float32 at least (complex64 at least, if complex), for the definition's sake."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), xs)
