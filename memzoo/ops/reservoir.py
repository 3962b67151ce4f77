"""What reservoirs share: matrices of a given spectral radius, orthogonal ones, and when a reservoir forgets its start.

    h_t = alpha O h_{t-1} + beta tanh(W h_{t-1} + u_t)        O orthogonal; O = I, alpha = 1 - beta: leaky

Two states under the same input come closer by the factor `contraction` per token at least, and forget how they began if
it is below 1, whatever the input. Near h = 0, where nothing comes in, they come closer by `radius` per token in the
long run: if it is above 1, at least this input lets the start decide for ever.

Source: Jaeger, "The 'echo state' approach to analysing and training recurrent neural networks" (2001), prop. 3, on
both conditions; with O, Ceni, Gallicchio,
"Residual Echo State Networks: Residual recurrent neural networks with stable
dynamics and fast learning" (2024), Neurocomputing.

Dims: N units.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memzoo.contract import nearest

RESIDUALS = ("random", "cyclic", "identity")


class EchoState(NamedTuple):
    """The echo-state condition of a reservoir: radius < 1 is necessary, contraction < 1 sufficient."""

    radius: jax.Array  # of alpha O + beta W, its largest |eigenvalue|
    contraction: jax.Array  # alpha + beta |W|_2


def turn(residual: str, O_NN: jax.Array | None = None) -> Callable[[jax.Array], jax.Array]:
    """h_N -> O h: one place along the ring if 'cyclic', h itself if 'identity', and O_NN @ h_N where it is given."""
    if O_NN is not None:
        return lambda h_N: O_NN @ h_N
    return (lambda h_N: jnp.roll(h_N, 1)) if residual == "cyclic" else lambda h_N: h_N


def echo_state(
    W_NN: jax.Array, alpha: float, beta: float, O: Callable[[jax.Array], jax.Array] = lambda h_N: h_N
) -> EchoState:
    """The condition. O: h_N -> O h, as `turn` gives it."""
    W_NN = jnp.asarray(W_NN, jnp.promote_types(W_NN.dtype, jnp.float32))
    O_NN = jax.vmap(O, in_axes=1, out_axes=1)(jnp.eye(len(W_NN), dtype=W_NN.dtype))
    return EchoState(spectral_radius(alpha * O_NN + beta * W_NN), alpha + beta * jnp.linalg.norm(W_NN, 2))


def spectral_radius(W_NN: jax.Array) -> jax.Array:
    """The largest |eigenvalue|, to about 1e-5, by Gelfand's formula: |W^n|^(1/n) for n = 2^24.

    By squaring, so that it needs no eigenvalues, which few devices can compute.
    """
    W_NN = jnp.asarray(W_NN, jnp.promote_types(W_NN.dtype, jnp.float32))
    tiny = jnp.finfo(W_NN.dtype).tiny

    def normalised(P_NN):
        norm = jnp.linalg.norm(P_NN)
        return P_NN / jnp.maximum(norm, tiny), jnp.log(norm)

    def square(k, carry):
        P_NN, log = carry  # W^(2^k) but for its norm, and the logarithm of the norm over 2^k
        P_NN, more = normalised(jnp.matmul(P_NN, P_NN, precision="highest"))
        return P_NN, log + more / 2.0 ** (k + 1)

    return jnp.exp(jax.lax.fori_loop(0, 24, square, normalised(W_NN))[1])


def of_radius(radius: float) -> Callable[..., jax.Array]:
    """An initialiser of matrices [N, N]: uniform entries, all scaled such that the radius is exact."""

    def init(key, shape, dtype=float):
        W_NN = jax.random.uniform(key, shape, jnp.promote_types(dtype, jnp.float32), -1, 1)
        return (radius / spectral_radius(W_NN) * W_NN).astype(dtype)

    return init


def orthogonal(key: jax.Array, shape: tuple[int, int], dtype: Any = float) -> jax.Array:
    """An initialiser: uniform on the orthogonal group, drawn in float32 at least."""
    return jax.nn.initializers.orthogonal()(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)


def check_residual(residual: str) -> None:
    """Raises ValueError for a name that is none of RESIDUALS, with the nearest one."""
    if residual not in RESIDUALS:
        raise ValueError(
            f"residual: expected one of {', '.join(RESIDUALS)}, got {residual!r}; {nearest(str(residual), RESIDUALS)}"
        )
