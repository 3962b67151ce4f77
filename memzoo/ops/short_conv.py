"""The short causal convolution in front of a recurrence, one filter per channel, with its tail as state.

    y_t = sum_w f_w x_{t - (W - 1) + w}

Source: Fu et al., "Hungry Hungry Hippos" (2022), arXiv:2212.14052, sec. 3 (the shift SSM it replaces); Gu, Dao, "Mamba"
(2023), arXiv:2312.00752, sec. 3.4 (the depthwise convolution of width 4 that everyone uses).

Dims: B batch, T time, X channels, W filter width, P = W - 1 past inputs.
"""

import jax
import jax.numpy as jnp

from memzoo.ops.checks import check_shapes


def short_conv(
    x_BTX: jax.Array, f_WX: jax.Array, past_BPX: jax.Array | None = None, reset_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """All T tokens. Returns (y_BTX, past_BPX), the last P inputs since the last reset, zeros before it.

    f_WX: the last row multiplies the present input. past_BPX: in float32 or wider; zeros by default.
    reset_BT: bool, where True neither this token nor later ones see inputs from before.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    check_shapes("P", x_BTX=x_BTX, f_WX=f_WX, past_BPX=past_BPX, reset_BT=reset_BT)
    B, _, X = x_BTX.shape
    x_BTX, f_WX = jnp.asarray(x_BTX), jnp.asarray(f_WX)
    P = f_WX.shape[0] - 1
    wide = jnp.promote_types(x_BTX.dtype, jnp.float32)
    past_BPX = jnp.zeros((B, P, X), wide) if past_BPX is None else jnp.asarray(past_BPX)
    if past_BPX.shape[1] != P:
        raise ValueError(f"past_BPX: expected P = W - 1 = {P}, got shape {list(past_BPX.shape)}")
    return _filter(x_BTX, f_WX, past_BPX, reset_BT)


@jax.checkpoint  # or the gradient would keep W shifted copies of the input
def _filter(x_BTX, f_WX, past_BPX, reset_BT):
    T, P, wide = x_BTX.shape[1], f_WX.shape[0] - 1, jnp.promote_types(x_BTX.dtype, jnp.float32)
    x_BTX = jax.lax.optimization_barrier(x_BTX)  # XLA would gather dx from its W parts in the order of another product
    seen_BLX = jnp.concatenate([past_BPX.astype(wide), x_BTX.astype(wide)], axis=1)  # L = P + T
    f_WX = f_WX.astype(wide)
    y_BTX = seen_BLX[:, P:] * f_WX[P]
    if reset_BT is None:
        for w in range(P):
            y_BTX = y_BTX + seen_BLX[:, w : w + T] * f_WX[w]
        return y_BTX.astype(x_BTX.dtype), seen_BLX[:, T:]
    # Inputs are visible to tokens of their own sequence only: the past counts as sequence 0.
    of_BT = jnp.cumsum(jnp.asarray(reset_BT), axis=1, dtype=jnp.int32)
    of_BL = jnp.pad(of_BT, ((0, 0), (P, 0)))
    for w in range(P):
        same_BT1 = (of_BL[:, w : w + T] == of_BT)[..., None]
        y_BTX = y_BTX + jnp.where(same_BT1, seen_BLX[:, w : w + T], 0) * f_WX[w]
    past_BPX = jnp.where((of_BL[:, T:] == of_BT[:, -1:])[..., None], seen_BLX[:, T:], 0)
    return y_BTX.astype(x_BTX.dtype), past_BPX
