"""The running maximum that keeps the exponents of a recurrence in range.

    m_t = max(m_{t-1} + a_t, b_t)

Source: Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018), arXiv:1805.02867, for a = 0; with a
decay, the stabiliser of Beck et al., "xLSTM: Extended Long Short-Term Memory" (2024), arXiv:2405.04517. The monoid is
that of the maps m -> max(m + a, b).

Dims: B batch, T time, X any one axis of channels.
"""

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.ops.checks import check_shapes


def max_scan(
    a_BTX: jax.Array, b_BTX: jax.Array, m_BX: jax.Array, reset_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """All T tokens at once. Returns (before_BTX, m_BTX), m before and after each, in float32 or wider.

    m_BX: the incoming one; -inf where there is none. reset_BT: bool, where True the token begins a new sequence.
    Where nothing was before, m_t = b_t, and `before` is that too, so that exp(before + a - m) is a decay there as well.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    check_shapes(a_BTX=a_BTX, b_BTX=b_BTX, m_BX=m_BX, reset_BT=reset_BT)
    wide = jnp.result_type(a_BTX, b_BTX, m_BX, jnp.float32)
    a_BTX, b_BTX, m_BX = (jnp.asarray(x, wide) for x in (a_BTX, b_BTX, m_BX))
    cut_BTX = jnp.zeros(b_BTX.shape, bool) if reset_BT is None else jnp.broadcast_to(reset_BT[..., None], b_BTX.shape)
    cut_BTX = cut_BTX.at[:, 0].set(cut_BTX[:, 0] | jnp.isneginf(m_BX))
    m_BX = jnp.where(cut_BTX[:, 0], b_BTX[:, 0], m_BX)
    first_BX = jnp.where(cut_BTX[:, 0], b_BTX[:, 0], jnp.maximum(m_BX + a_BTX[:, 0], b_BTX[:, 0]))

    def combine(left, right):
        (a, b, cut), (a_next, b_next, cut_next) = left, right
        return a + a_next, jnp.where(cut_next, b_next, jnp.maximum(b + a_next, b_next)), cut | cut_next

    m_BTX = lax.associative_scan(combine, (a_BTX, b_BTX.at[:, 0].set(first_BX), cut_BTX), axis=1)[1]
    before_BTX = jnp.concatenate([m_BX[:, None], m_BTX[:, :-1]], axis=1)
    return jnp.where(cut_BTX, b_BTX, before_BTX), m_BTX
