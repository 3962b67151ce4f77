"""Ridge regression in closed form from a stream: what the readout of a reservoir is trained by.

    kernel, bias = argmin sum_t |y_t - x_t kernel - bias|^2 + penalty |kernel|^2
    (sum (x - mean)(x - mean)' + penalty I) kernel = sum (x - mean)(y - mean)'        bias = mean y - mean x kernel

All that is kept of the past is the sums, so that a stream may be of any length and come in any pieces:

    sums = ridge.init(100, 3)
    for x_BTF, y_BTK in pieces:
        sums = ridge.update(sums, x_BTF, y_BTK)
    kernel_FK, bias_K = ridge.solve(sums, penalty=1e-6)

The features of a reservoir come from the collection "intermediates", and its readout takes what `solve` returns:

    _, seen = mixer.apply(variables, x_BTD, mutable=["intermediates"])
    features_BTN, = seen["intermediates"]["features"]
    trained = variables | {"params": {"out": {"kernel": kernel_FK, "bias": bias_K}}}

Source: Hoerl, Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems" (1970), Technometrics 12(1);
for echo state networks, Lukosevicius, "A Practical Guide to Applying Echo State Networks" (2012), on readouts.
The sums of two pieces, centred, are added as in Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances" (1979).
Differs: the guide has the bias among the features, and so penalises it too; here it is free.

Dims: F features, K targets; ... any axes, all of them samples.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memzoo.contract import positive


class Sums(NamedTuple):
    """Of all samples so far. Those named square and cross are of what differs from the means."""

    samples: jax.Array  # int32: 2^31 samples; int64 in float64
    mean_F: jax.Array
    mean_K: jax.Array
    square_FF: jax.Array  # of the features, with each other
    cross_FK: jax.Array  # of the features with the targets
    square_K: jax.Array  # of each target


def init(features: int, targets: int, dtype: Any = jnp.float32) -> Sums:
    """The sums of no samples.

    dtype: float32, or float64, which needs jax.enable_x64: sums of squares have half the digits of what is summed, so
    float64 is for small penalties. Raises ValueError for another one, and for sizes below 1.
    """
    positive(features=features, targets=targets)
    known = ("float32", "float64") if jax.dtypes.canonicalize_dtype(np.float64) == np.float64 else ("float32",)
    if jnp.dtype(dtype).name not in known:
        raise ValueError(f"dtype: expected float32, or float64 under jax.enable_x64, got {jnp.dtype(dtype).name}")
    zeros = lambda *shape: jnp.zeros(shape, dtype)
    count = jnp.zeros((), jnp.int64 if jnp.dtype(dtype) == jnp.float64 else jnp.int32)
    F, K = features, targets
    return Sums(count, zeros(F), zeros(K), zeros(F, F), zeros(F, K), zeros(K))


def update(sums: Sums, x: jax.Array, y: jax.Array, use: jax.Array | None = None) -> Sums:
    """The sums of what was before and of samples x [..., F] with targets y [..., K].

    use: bool [...], where False a sample is left out, whatever it holds: washout, padding.
    Raises ValueError for shapes that do not fit.
    """
    F, K = sums.cross_FK.shape
    shape = np.shape(x)[:-1]
    for name, array, want in (("x", x, (*shape, F)), ("y", y, (*shape, K)), ("use", use, shape)):
        if array is not None and (np.shape(array) != want or not np.ndim(x)):
            expected = f"[..., {F}]" if name == "x" else list(want)
            raise ValueError(f"{name}: expected shape {expected}, got {list(np.shape(array))}")
    if use is not None and jnp.result_type(use) != jnp.bool_:
        raise ValueError(f"use: expected dtype bool, got {jnp.result_type(use)}")
    x_SF, y_SK = (jnp.reshape(a, (-1, n)).astype(sums.mean_F.dtype) for a, n in ((x, F), (y, K)))
    use_S1 = jnp.ones((len(x_SF), 1), bool) if use is None else jnp.reshape(use, (-1, 1))

    count = jnp.sum(use_S1, dtype=sums.samples.dtype)
    mean = lambda a: jnp.sum(jnp.where(use_S1, a, 0), axis=0) / jnp.maximum(count, 1)
    mean_F, mean_K = mean(x_SF), mean(y_SK)
    dx_SF, dy_SK = jnp.where(use_S1, x_SF - mean_F, 0), jnp.where(use_S1, y_SK - mean_K, 0)
    squares = _product(dx_SF, dx_SF), _product(dx_SF, dy_SK), jnp.sum(dy_SK**2, axis=0)
    return merge(sums, Sums(count, mean_F, mean_K, *squares))


def merge(one: Sums, other: Sums) -> Sums:
    """The sums of both, as of streams that were read side by side."""
    count = one.samples + other.samples
    share = other.samples / jnp.maximum(count, 1).astype(one.mean_F.dtype)
    dx_F, dy_K = other.mean_F - one.mean_F, other.mean_K - one.mean_K
    apart = one.samples * share
    return Sums(
        count,
        one.mean_F + share * dx_F,
        one.mean_K + share * dy_K,
        one.square_FF + other.square_FF + apart * jnp.outer(dx_F, dx_F),
        one.cross_FK + other.cross_FK + apart * jnp.outer(dx_F, dy_K),
        one.square_K + other.square_K + apart * dy_K**2,
    )


def solve(sums: Sums, penalty: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """(kernel_FK, bias_K). Where the penalty is too small for the dtype to tell the features apart, NaN or no use.

    Raises ValueError for a penalty below 0; not for a value inside `jit`.
    """
    if not isinstance(penalty, jax.core.Tracer) and not (np.ndim(penalty) == 0 and 0 <= penalty < np.inf):
        raise ValueError(f"penalty: expected a finite number >= 0, got {penalty}")
    F = len(sums.mean_F)
    square_FF = sums.square_FF + penalty * jnp.eye(F, dtype=sums.square_FF.dtype)
    kernel_FK = jax.scipy.linalg.solve(square_FF, sums.cross_FK, assume_a="pos")
    return kernel_FK, sums.mean_K - _product(sums.mean_F[:, None], kernel_FK)[0]


def explained(sums: Sums, kernel_FK: jax.Array) -> jax.Array:
    """The squared correlation of each target with its prediction x kernel, [K], over the samples of `sums`.

    It is 0 where one of the two is constant. For samples other than those that the kernel was solved for, take sums of
    their own.
    """
    with_target_K = jnp.sum(kernel_FK * sums.cross_FK, axis=0)
    own_K = jnp.sum(kernel_FK * _product(sums.square_FF, kernel_FK), axis=0)
    both_K = own_K * sums.square_K
    return jnp.where(both_K > 0, with_target_K**2 / jnp.where(both_K > 0, both_K, 1), 0)


def _product(x_SF, y_SK):
    """x' y, summed over samples, in all of the dtype's bits on any device."""
    return jnp.einsum("sf,sk->fk", x_SF, y_SK, precision="highest")
