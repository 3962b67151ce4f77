"""The state-space model of Mamba-2: one input-dependent decay per head, which is linear attention in other words.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t'        y_t = h_t' C_t + D x_t

Source: Dao, Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality" (2024), arXiv:2405.21060, sec. 7.1-7.2.

Dims: B batch, T time, H heads, P channels of a head, N state size, G groups of heads that share B and C.
"""

import jax
import jax.numpy as jnp

from memzoo.ops.linear_attention import linear_attention
from memzoo.ops.recur import recur, widen


def step(h_NP, C_N, B_N, x_P, dt, A, D):
    """One token, one head. This is the definition; every faster form is tested against it."""
    h_NP = jnp.exp(dt * A) * h_NP + dt * jnp.outer(B_N, x_P)
    return h_NP, C_N @ h_NP + D * x_P


def ssd(C_BTGN, B_BTGN, x_BTHP, dt_BTH, A_H, D_H, h_BHNP, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHP, h_BHNP)."""
    C_BTHN, B_BTHN = (jnp.repeat(z, x_BTHP.shape[2] // z.shape[2], axis=2) for z in (C_BTGN, B_BTGN))
    if impl == "scan":
        shape_BTH = dt_BTH.shape
        xs = C_BTHN, B_BTHN, x_BTHP, dt_BTH, jnp.broadcast_to(A_H, shape_BTH), jnp.broadcast_to(D_H, shape_BTH)
        y_BTHP, h_BHNP = recur(jax.vmap(step), h_BHNP, widen(xs), reset_BT)
        return y_BTHP.astype(x_BTHP.dtype), h_BHNP
    # Linear attention with queries C, keys B, values dt x.
    v_BTHP = (dt_BTH[..., None] * x_BTHP).astype(x_BTHP.dtype)
    y_BTHP, h_BHNP = linear_attention(C_BTHN, B_BTHN, v_BTHP, dt_BTH * A_H, h_BHNP, reset_BT, impl=impl)
    return (y_BTHP + D_H[:, None] * x_BTHP).astype(x_BTHP.dtype), h_BHNP
