"""What comes after a token, for recurrences that know what came before: the same one, backwards in time.

    sum over j <= i  +  sum over j > i in the segment of i,   the second by the op of the first on `backwards(...)`

Dims: B batch, T time, X anything after time.
"""

from typing import Any

import jax
import jax.numpy as jnp


def backwards(reads: Any, writes: Any, ends_BT: jax.Array) -> tuple[Any, Any, jax.Array]:
    """(reads, writes, reset_BT) for a second, backward run from an empty state, whose outputs are to be turned again.

    reads: a pytree of arrays [B, T, ...] that belong to the token that reads; they come turned. writes: of the token
    that is read; they come turned and in place of the token before, zeros where its segment ends: those must write
    nothing. ends_BT: True for the last token of each segment, the one of the call among them.
    """
    turned = lambda x_BTX: x_BTX[:, ::-1]

    def following(x_BTX):
        next_BTX = jnp.pad(x_BTX[:, 1:], [(0, 0), (0, 1)] + [(0, 0)] * (x_BTX.ndim - 2))
        return turned(jnp.where(ends_BT.reshape(*ends_BT.shape, *[1] * (x_BTX.ndim - 2)), 0, next_BTX))

    return jax.tree.map(turned, reads), jax.tree.map(following, writes), turned(ends_BT)
