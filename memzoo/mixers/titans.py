"""Titans' neural memory: a network whose weights learn, by gradient descent with momentum, what key goes to what value.

    l_t = |M(W_{t'}; k_t) - v_t|^2 / 2                    t' the last token before the chunk
    S_t = eta_t S_{t-1} - theta_t dl_t / dW_{t'}          what surprises, and what has surprised
    W_t = (1 - alpha_t) W_{t-1} + S_t       y_t = M(W_t; q_t)
    eta_t, alpha_t = sigmoid(w x_t + b)     theta_t = step (1 - eta_t) sigmoid(w x_t + b), each a number for each head

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time" (2025), arXiv:2501.00663, sec. 3.1 for the
equations, 3.2 for chunks, 3.3 for persistent memory, 4.4 for convolutions, norms and the output gate.
Differs: half the square, whose factor is theta's; theta has a bound, since the gradients of a chunk, and what momentum
keeps of them, add up where keys are alike, and overshoot without end if theta / (1 - eta) is much above 1 / chunk;
heads; the memory reads the persistent tokens before all else, and what is left of that is the weights that it begins
with: their momentum and their convolution end there.

The bound is that of one matrix, whose curvature is 1. That of more grows with their values, so that training may lead
to a memory that overshoots on texts longer than those it has seen, up to what is not finite: a smaller `step` helps.

Dims: B batch, T time, D width, H heads, K key, V value, F hidden, N persistent tokens, E = H (2 K + V), W width of the
convolution, P = W - 1 past tokens, O and I outputs and inputs of a matrix.
"""

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.initial import lecun, within
from memzoo.ops.memory import half_square, mlp


class State(NamedTuple):
    memory: ops.MemoryState
    past_BPE: jax.Array


class Titans(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for inputs, state or resets that do not fit, width not divisible by heads.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # of a head; width // heads
    value_dim: int | None = None  # of a head; width // heads
    depth: int = 2  # matrices of the memory
    hidden: int | None = None  # between them, of a head; 2 key_dim
    persistent: int = 4  # tokens
    chunk: int = 16  # tokens whose gradients are taken at the same weights
    step: float | None = None  # what theta / (1 - eta) stays below; 1 / chunk
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int, int]:
        """H, K, V, F, P"""
        K, V = self.key_dim, self.value_dim
        if K is None or V is None:
            share = contract.divisible("width", self.width, "heads", self.heads)
            K, V = share if K is None else K, share if V is None else V
        F = 2 * K if self.hidden is None else self.hidden
        contract.positive(width=self.width, heads=self.heads, key_dim=K, value_dim=V, hidden=F)
        contract.positive(depth=self.depth, chunk=self.chunk, conv_width=self.conv_width)
        if not contract.whole_number(self.persistent) or self.persistent < 0:
            raise ValueError(f"persistent: expected an integer >= 0, got {self.persistent!r}")
        if self.step is not None and not (isinstance(self.step, numbers.Real) and 0 < self.step < math.inf):
            raise ValueError(f"step: expected None or a finite number > 0, got {self.step!r}")
        return self.heads, K, V, F, self.conv_width - 1

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """[H, O, I] of the memory's matrices."""
        H, K, V, F, _ = self.sizes()
        ends = [K, *[F] * (self.depth - 1), V]
        return {str(layer): (H, ends[layer + 1], ends[layer]) for layer in range(self.depth)}

    def initial_state(self, batch: int) -> State:
        (H, K, V, _, P), wide = self.sizes(), contract.state_dtype(self.dtype)
        memory = ops.memory_state(batch, self.shapes(), K, V, wide, momentum=True, window=1, chunk=self.chunk)
        return State(memory, jnp.zeros((batch, P, H * (2 * K + V)), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        fresh, state = state is None, contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V, _, P), D, wide = self.sizes(), x_BTD.shape[-1], contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype, "bias_init": bias}

        qkv, gate = nn.Dense(H * (2 * K + V), name="qkv", **kinds), nn.Dense(3 * H, name="gates", **gates)
        f_WE = self.param("conv", within((P + 1) ** -0.5), (P + 1, H * (2 * K + V)), self.param_dtype)
        A = {n: self.param(f"memory_{n}", lecun, shape, self.param_dtype) for n, shape in self.shapes().items()}
        step = 1 / self.chunk if self.step is None else self.step
        learn: Callable[..., Any] = partial(
            ops.memorize, partial(mlp, self.depth), half_square, chunk=self.chunk, impl=self.impl
        )

        def tokens(x_BTD, past_BPE, reset_BT):
            """What the memory is told and asked, and how it learns."""
            qkv_BTE, past_BPE = ops.short_conv(qkv(x_BTD), f_WE, past_BPE, reset_BT)
            qkv_BTHE = nn.silu(qkv_BTE).reshape(*x_BTD.shape[:2], H, 2 * K + V)
            q_BTHK, k_BTHK, v_BTHV = jnp.split(qkv_BTHE, [K, 2 * K], axis=-1)
            theta_BTH, eta_BTH, alpha_BTH = jnp.split(nn.sigmoid(gate(x_BTD)), 3, axis=-1)
            gates = ops.Gates(step * (1 - eta_BTH) * theta_BTH, eta_BTH, alpha_BTH)
            return (ops.unit(q_BTHK), ops.unit(k_BTHK), v_BTHV, gates), past_BPE

        if self.persistent:
            p_ND = self.param("persistent", nn.initializers.normal(1.0), (self.persistent, D), self.param_dtype)
            told, _ = tokens(p_ND[None].astype(jnp.result_type(x_BTD)), None, None)
            _, read = learn({n: W.astype(wide) for n, W in A.items()}, *told)
            A = {n: W.astype(wide) + read.A[n][0] for n, W in A.items()}
        told, past_BPE = tokens(x_BTD, state.past_BPE, reset_BT)
        y_BTHV, memory = learn(A, *told, None if fresh else state.memory, reset_BT)

        gate_BTHV = nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD)
        y_BTHV = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y_BTHV) * nn.silu(gate_BTHV)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), State(memory, past_BPE)


def bias(key, shape, dtype=float):
    """theta in the middle of its range, momentum 1/2, and 1 % forgotten with each token."""
    theta_H, eta_H, alpha_H = jnp.zeros((3, shape[0] // 3), dtype)
    return jnp.concatenate([theta_H, eta_H, alpha_H + jnp.log(0.01 / 0.99)])
