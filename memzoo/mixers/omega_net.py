"""OmegaNet: a network that learns, by descending the loss of the last tokens at once, what key goes to what value.

    l_t = sum_i gamma_i |M(phi(k_i); W_{t'}) - v_i|^2 / 2      i the last c tokens, t' the last token before the chunk
    S_t = eta_t S_{t-1} - theta_t dl_t / dW_{t'}
    W_t = (1 - alpha_t) W_{t-1} + S_t       y_t = M(phi(q_t); W_t)
    gamma_t, eta_t, alpha_t = sigmoid(w x_t + b)     theta_t = step (1 - eta_t) sigmoid(w x_t + b), one for each head
    phi(q)' phi(k) = sum_i a_i (q' k)^i, i up to the degree; a_i learned, from 1 / i! on, and their sum 1

Source: Behrouz, Li, Kacham, Daliri, Deng, Zhong, Razaviyayn, Mirrokni, "ATLAS: Learning to Optimally Memorize the
Context at Test Time" (2025), arXiv:2505.23735, the Omega rule and polynomial features.
Differs: momentum, which makes it Titans' rule for c = 1 and ATLAS' without Muon; gamma_i does not depend on t; half the
square, a bound on theta and a sum of 1, as gradients of alike keys add up over windows and chunks; heads.

Dims: B batch, T time, D width, H heads, K key, V value, N features of a key, E = H (2 K + V), W width of the
convolution, P = W - 1 past tokens, F hidden, O and I outputs and inputs of a matrix.
"""

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.initial import lecun, within
from memzoo.ops.memory import half_square, mlp
from memzoo.ops.polynomial import polynomial, size, taylor

FORGET = math.log(0.01 / 0.99)  # 1 % with each token, to begin with


class State(NamedTuple):
    memory: ops.MemoryState
    past_BPE: jax.Array


class OmegaNet(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for inputs, state or resets that do not fit, width not divisible by heads.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # of a head; width // heads
    value_dim: int | None = None  # of a head; width // heads
    degree: int = 2  # of the features: a key of 64 channels has 2,145 of degree 2
    window: int = 4  # tokens whose loss is descended with each token
    memory_layers: int = 2  # matrices of the memory
    hidden: int | None = None  # between them, of a head; 2 key_dim
    chunk: int = 16  # tokens whose gradients are taken at the same weights
    step: float | None = None  # what theta / (1 - eta) stays below; 1 / (chunk window)
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """H, K, V, P"""
        K, V = self.key_dim, self.value_dim
        if K is None or V is None:
            share = contract.divisible("width", self.width, "heads", self.heads)
            K, V = share if K is None else K, share if V is None else V
        contract.positive(width=self.width, heads=self.heads, key_dim=K, value_dim=V, conv_width=self.conv_width)
        contract.positive(degree=self.degree, window=self.window, memory_layers=self.memory_layers, chunk=self.chunk)
        contract.positive(hidden=2 * K if self.hidden is None else self.hidden)
        if self.step is not None and not (isinstance(self.step, numbers.Real) and 0 < self.step < math.inf):
            raise ValueError(f"step: expected None or a finite number > 0, got {self.step!r}")
        return self.heads, K, V, self.conv_width - 1

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """[H, O, I] of the memory's matrices."""
        H, K, V, _ = self.sizes()
        F = 2 * K if self.hidden is None else self.hidden
        ends = [size(K, self.degree), *[F] * (self.memory_layers - 1), V]
        return {str(layer): (H, ends[layer + 1], ends[layer]) for layer in range(self.memory_layers)}

    def initial_state(self, batch: int) -> State:
        (H, K, V, P), wide = self.sizes(), contract.state_dtype(self.dtype)
        kind: dict[str, Any] = {"momentum": True, "window": self.window, "chunk": self.chunk}
        memory = ops.memory_state(batch, self.shapes(), size(K, self.degree), V, wide, **kind)
        return State(memory, jnp.zeros((batch, P, H * (2 * K + V)), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        fresh, state = state is None, contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V, P), (B, T, D), wide = self.sizes(), x_BTD.shape, contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype, "bias_init": bias}

        f_WE = self.param("conv", within((P + 1) ** -0.5), (P + 1, H * (2 * K + V)), self.param_dtype)
        qkv_BTE = nn.Dense(H * (2 * K + V), name="qkv", **kinds)(x_BTD)
        qkv_BTE, past_BPE = ops.short_conv(qkv_BTE, f_WE, state.past_BPE, reset_BT)
        qkv_BTHE = nn.silu(qkv_BTE).reshape(B, T, H, 2 * K + V)
        q_BTHK, k_BTHK, v_BTHV = jnp.split(qkv_BTHE, [K, 2 * K], axis=-1)
        s_N = self.param(
            "features", lambda _, N, dtype: jnp.asarray(taylor(N - 1), dtype), self.degree + 1, self.param_dtype
        )
        s_N = s_N.astype(wide) * lax.rsqrt(jnp.sum(s_N.astype(wide) ** 2))
        phi = lambda x_BTHK: polynomial(ops.unit(x_BTHK.astype(wide)), s_N)

        gates_BTE = nn.sigmoid(nn.Dense(4 * H, name="gates", **gates)(x_BTD))
        theta_BTH, eta_BTH, gamma_BTH, alpha_BTH = jnp.split(gates_BTE, 4, axis=-1)
        step = 1 / (self.chunk * self.window) if self.step is None else self.step
        do = ops.Gates(step * (1 - eta_BTH) * theta_BTH, eta_BTH, alpha_BTH, gamma_BTH=gamma_BTH)

        A = {n: self.param(f"memory_{n}", lecun, shape, self.param_dtype) for n, shape in self.shapes().items()}
        kind: dict[str, Any] = {"rule": ops.Rule(window=self.window), "chunk": self.chunk, "impl": self.impl}
        learn: Callable[..., Any] = partial(ops.memorize, partial(mlp, self.memory_layers), half_square, **kind)
        args = A, phi(q_BTHK), phi(k_BTHK), v_BTHV, do, None if fresh else state.memory, reset_BT
        y_BTHV, memory = learn(*args)

        gate_BTHV = nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD)
        y_BTHV = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y_BTHV) * nn.silu(gate_BTHV)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), State(memory, past_BPE)


def bias(key, shape, dtype=float):
    """theta, momentum and gamma in the middle of their ranges, and 1 % forgotten with each token."""
    theta_H, eta_H, gamma_H, alpha_H = jnp.zeros((4, shape[0] // 4), dtype)
    return jnp.concatenate([theta_H, eta_H, gamma_H, alpha_H + FORGET])
