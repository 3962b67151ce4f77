"""What the forms of `memorize` share: what a token does to a memory, how gradients become weights, and the state.

Dims: B batch, T time, H heads, K key, V what the loss is told, C any tokens, P = window - 1 tokens before, O and I the
outputs and inputs of a matrix of weights, R rows: the outputs of all matrices, in the order of their names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Weights = dict[str, jax.Array]
Apply = Callable[[str, jax.Array], jax.Array]


class Gates(NamedTuple):
    """What each token does, all [B, T, H]; None is what leaves the rule simpler."""

    theta_BTH: jax.Array  # step size, of the gradient
    eta_BTH: jax.Array | None = None  # momentum kept, in [0, 1]; 0
    alpha_BTH: jax.Array | None = None  # weights forgotten, in [0, 1]; 0. Or [B, T, H, R], each row of them by itself
    rate_BTH: jax.Array | None = None  # step size, of the direction; 1
    gamma_BTH: jax.Array | None = None  # weight of the token in the window's loss; 1


class Rule(NamedTuple):
    """How gradients become weights. Functions of one matrix [..., O, I], differentiable at 0; None is the identity."""

    direction: Callable[[jax.Array], jax.Array] | None = None
    weights: Callable[[jax.Array], jax.Array] | None = None
    window: int = 1  # tokens whose loss is descended at once


class MemoryState(NamedTuple):
    """Zeros at the start of a sequence: A and the anchor as they differ from A_0. Matrices [B, H, O, I] by name."""

    A: Weights
    S: Weights  # empty without momentum
    anchor: Weights  # as A: what the chunk's gradients are taken at; empty for chunk = 1
    k_BPHK: Any  # the tokens of the window, the last one last; () for window = 1
    v_BPHV: Any
    gamma_BPH: Any  # 0 where no token has been
    place_B: jax.Array  # int32, tokens of the chunk that have been


HEADS: Any = MemoryState(*(0, 0, 0, 1, 1, 1, None))  # type: ignore[arg-type]  # the axis of heads in a row's state


def memory_state(
    batch: int,
    shapes: dict[str, tuple[int, int, int]],
    K: int,
    V: int,
    dtype: Any,
    *,
    momentum: bool,
    window: int,
    chunk: int,
) -> MemoryState:
    """The state at the start of a sequence. shapes: [H, O, I] of each matrix."""
    zeros = {name: jnp.zeros((batch, *shape), dtype) for name, shape in shapes.items()}
    H, P = next(iter(shapes.values()))[0], window - 1
    k, v, gamma = (jnp.zeros((batch, P, H, *of), dtype) if P else () for of in ((K,), (V,), ()))
    place_B = jnp.zeros((batch,), jnp.int32)
    return MemoryState(zeros, zeros if momentum else {}, zeros if chunk > 1 else {}, k, v, gamma, place_B)


def dense(W: Weights) -> Apply:
    """The network's matrices as a function: name, x_..I -> x_..O."""
    return lambda name, x: x @ W[name].T


def read(memory, W, x_K, fixed):
    return memory(dense(W), x_K[None], fixed)[0]


def seen(state, k_CK, v_CV):
    """The window's tokens and these. Where none has been there is the first of these, as 0 may have no gradient."""
    been_P1 = state.gamma_BPH[:, None] != 0
    past = jnp.where(been_P1, state.k_BPHK, k_CK[:1]), jnp.where(been_P1, state.v_BPHV, v_CV[:1])
    return jnp.concatenate([past[0], k_CK]), jnp.concatenate([past[1], v_CV])


def kept(gamma_P, k_PK, v_PV):
    """The window's tokens as the state has them: zeros where none has been."""
    been_P1 = gamma_P[..., None] != 0
    return jnp.where(been_P1, k_PK, 0), jnp.where(been_P1, v_PV, 0), gamma_P


def each(f, W):
    return W if f is None else {name: f(w) for name, w in W.items()}


def add(A0, W):
    return {name: A0[name] + W[name] for name in W}


def rows(z_R, A):
    """What all matrices' rows have along the last axis, as {name: z_O}; what is the same for all remains a z_1."""
    if z_R.shape[-1] == 1:
        return dict.fromkeys(A, z_R)
    ends, names = [], sorted(A)
    for name in names[:-1]:
        ends.append((ends[-1] if ends else 0) + A[name].shape[-2])
    return dict(zip(names, jnp.split(z_R, ends, axis=-1), strict=True))


def mlp(layers: int, apply: Apply, x_TI: jax.Array, _: Any = None) -> jax.Array:
    """A memory for `memorize`: matrices by the names "0", "1", ..., with SiLU between."""
    for layer in range(layers):
        x_TI = apply(str(layer), jax.nn.silu(x_TI) if layer else x_TI)
    return x_TI


def half_square(y_V: jax.Array, v_V: jax.Array) -> jax.Array:
    """An objective for `memorize`: |y - v|^2 / 2."""
    return jnp.sum((y_V - v_V) ** 2) / 2
