"""Word problems of groups: what is the product of all elements so far? The smallest tasks that need a state.

    y_t = y_{t-1} u_t        y_0 the identity, u_t a random element

Parity is the word problem of Z_2, modular addition that of Z_m: there the order of tokens does not matter. Of the
permutations of three, S_3, it does; those of five, S_5, are not even a solvable group: no circuit of constant depth is
known to say their products, nor any linear recurrence whose transitions are diagonal.

Source: Barrington, "Bounded-width polynomial-size branching programs recognize exactly those languages in NC^1" (1989);
as a test of sequence models, Merrill, Petty, Sabharwal, "The Illusion of State in State-Space Models" (2024),
arXiv:2404.08819.

Dims: B batch, T time, N elements of the group.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo.contract import positive


def group(name: str) -> np.ndarray:
    """The products of all pairs of elements, [N, N], int32: row y, column u is y u. Element 0 is the identity.

    name: "Z" and a number m >= 2, integers added modulo m, or "S" and a number n from 2 to 6, permutations of n: y u is
    first y, then u. Raises ValueError, by name, for any other.
    """
    found = re.fullmatch(r"([ZS])([1-9]\d*)", name)
    kind, n = (found[1], int(found[2])) if found else ("", 0)
    if kind == "Z" and n >= 2:
        return np.add.outer(np.arange(n), np.arange(n)).astype(np.int32) % n
    if kind == "S" and 2 <= n <= 6:
        elements = list(itertools.permutations(range(n)))
        number = {element: i for i, element in enumerate(elements)}
        return np.array([[number[tuple(u[i] for i in y)] for u in elements] for y in elements], np.int32)
    raise ValueError(f"name: expected Z2, Z3, ... or S2 ... S6, got {name!r}")


def draw(
    key: jax.Array, group_NN: np.ndarray, batch: int, T: int, reset_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(u_BT, y_BT), int32: random elements, and the product of all up to each. May be jitted, for fixed sizes.

    reset_BT: bool; where True a word begins, and the product with it.
    """
    positive(batch=batch, T=T)
    u_BT = jax.random.randint(key, (batch, T), 0, len(group_NN), jnp.int32)
    begins_BT = jnp.zeros((batch, T), bool) if reset_BT is None else reset_BT

    def product(left, right):
        (y, begun), (u, begins) = left, right
        return jnp.where(begins, u, jnp.asarray(group_NN)[y, u]), begun | begins

    return u_BT, lax.associative_scan(product, (u_BT, begins_BT), axis=1)[0]
