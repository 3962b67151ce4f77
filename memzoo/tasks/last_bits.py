"""Questions about the last N bits of a stream, for all N at once, so that a curriculum can raise N.

    parity    y_t^N = u_t + u_{t-1} + ... + u_{t-N+1} modulo 2
    match     y_t^N = 1 if u_t = u_{t-N+1}, else 0                    delayed match to sample

Both have an answer at every token from the Nth on, and both need the last N bits, in their order.

Source: Khajehabdollahi, Zeraati, Giannakakis, Schaefer, Martius, Levina, "Emergent mechanisms for long timescales
depend on training curriculum and affect performance in memory tasks" (2023), arXiv:2309.12927, sec. 2.
Differs: there the stream's last token alone is asked, here every one.

Dims: B batch, T time, M the largest N; index n stands for N = n + 1.
"""

import jax
import jax.numpy as jnp

from memzoo.contract import positive


def draw(key: jax.Array, batch: int, T: int) -> jax.Array:
    """u_BT, int32: fair bits."""
    positive(batch=batch, T=T)
    return jax.random.bernoulli(key, shape=(batch, T)).astype(jnp.int32)


def parity(u_BT: jax.Array, M: int) -> jax.Array:
    """y_BTM, int32, for N = 1 ... M."""
    sums_BT = jnp.cumsum(u_BT, axis=1)
    return jnp.stack([(sums_BT - delayed(sums_BT, N)) % 2 for N in range(1, M + 1)], axis=-1)


def match(u_BT: jax.Array, M: int) -> jax.Array:
    """y_BTM, int32, for N = 1 ... M; for N = 1 all ones."""
    return jnp.stack([(u_BT == delayed(u_BT, N - 1)).astype(jnp.int32) for N in range(1, M + 1)], axis=-1)


def has_answer(T: int, M: int) -> jax.Array:
    """Which tokens have N bits, themselves included: [T, M], bool."""
    positive(T=T, M=M)
    return jnp.arange(T)[:, None] >= jnp.arange(M)


def delayed(x_BT, N):
    return jnp.pad(x_BT, ((0, 0), (N, 0)))[:, : x_BT.shape[1]]
