"""Blocks of tokens among chunks that begin where they like, and the weights at which gradients are taken.

Dims: B batch, T time, C tokens of a block, as many as of a chunk, N blocks, E tokens of which gradients are taken, K
key, V what the loss is told, O and I the outputs and inputs of a matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.ops.rotary import places


class Marks(NamedTuple):
    """Of a block's tokens.

    There are up to three anchors, of which the tokens before the next chunk, those after, and those after a reset have
    one each: the one that came, what has been reached where that chunk begins, and A_0.
    """

    reset_C: Any  # but for the first token, which finds nothing but zeros
    there_C: Any  # False for what fills the last block up
    anchor_C: Any  # 0, 1 or 2
    begins: Any  # the token that the next chunk begins with


def cut(x, C, axis=2):
    """Blocks of C, first. Filled up with the last one, as 0 may have no gradient; it is not `there`."""
    N = -(-x.shape[axis] // C)
    if x.shape[axis] < N * C:
        pads = [(0, N * C - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pads, "constant" if x.dtype == bool else "edge")
    return jnp.moveaxis(x.reshape(*x.shape[:axis], N, C, *x.shape[axis + 1 :]), axis, 0)


def mark(place_B, reset_BT, C):
    """(Marks of all blocks, [N, B, ...], which of them begin with a reset, which have several anchors in any row)."""
    begins_NB = C - (places(place_B, reset_BT.shape[1], reset_BT) % C)[:, ::C].T
    reset_NBC, there_NBC = cut(reset_BT, C, 1), cut(jnp.ones_like(reset_BT), C, 1)
    first_NB, reset_NBC = reset_NBC[..., 0], reset_NBC.at[..., 0].set(False)
    anchor_NBC = jnp.where(jnp.arange(C) < begins_NB[..., None], 0, 1)
    anchor_NBC = jnp.where(jnp.cumsum(reset_NBC, axis=-1) > 0, 2, anchor_NBC)
    several_N = jnp.any((begins_NB != C) | jnp.any(reset_NBC, axis=-1), axis=-1)
    return Marks(reset_NBC, there_NBC, anchor_NBC, begins_NB), first_NB, several_N


def gradients(memory, objective, W, fixed, k_EK, v_EV):
    """dloss/dW of each token is the outer product of these: {name: (delta_EO, x_EI)}."""
    taken = {}

    def loss(taps):
        def apply(name, x_EI):
            taken[name] = x_EI
            return x_EI @ W[name].T + taps[name]

        y_EV = memory(apply, k_EK, fixed)
        return jnp.sum(jax.vmap(objective)(y_EV, v_EV)), dict(taken)

    taps = {name: jnp.zeros((len(k_EK), len(w)), w.dtype) for name, w in W.items()}
    delta, x = jax.grad(loss, has_aux=True)(taps)
    return {name: (delta[name], x[name]) for name in W}


def at_anchors(take, there, put, shapes, came, A0, several, marks):
    """(what is known of all tokens, the last one's anchor).

    take: anchor -> gradients. there: known -> what has been reached where the next chunk begins. put: (n, known, own)
    -> known with what is taken at the n-th anchor. shapes: of known. came: the anchor that came.
    """

    def phase(known, n):
        def taken():
            which = lambda: jax.tree.map(lambda *W: jnp.where(n == 0, *W), came, dict(A0))
            anchor = lax.cond(n == 1, lambda: there(known), which)
            return jax.tree.map(lambda z, own: put(n, z, own), known, take(anchor)), anchor

        return lax.cond((n == 0) | several, taken, lambda: (known, jax.tree.map(jnp.zeros_like, came)))

    empty = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
    known, anchors = lax.scan(phase, empty, jnp.arange(3))
    return known, {n: anchors[n][marks.anchor_C[jnp.sum(marks.there_C) - 1]] for n in anchors}
