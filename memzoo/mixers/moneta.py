"""Moneta: a network that learns by the p-norm of its error what key goes to what value, its weights kept by a q-norm.

    M(x; W) = x + LN(W1 gelu(W2 x))     l_t = sum_j eta_tj |M(k_t; W_{t'})_j - v_tj|^p / p
    A_t = (1 - alpha_t) A_{t-1} - dl_t / dW_{t'}     W_t = A_t / |A_t|_q^{q-2}     y_t = M(q_t; W_t)
    eta_t = step sigmoid(w x_t + b) / K, one for each channel; alpha_t = sigmoid(w x_t + b), one for each row of W1, W2
    t' the last token before the chunk; all w of low rank

Source: Behrouz, Razaviyayn, Zhong, Mirrokni, "It's All Connected: A Journey Through Test-Time Memorization, Attentional
Bias, Retention, and Online Optimization" (2025), arXiv:2504.13173, sec. 5.3 for Moneta, p = 3, q = 4 and the
network, 5.4 for chunks, convolutions, norms and channel-wise gates of low rank.
Differs: |x| is sqrt(x^2 + 1e-6), as in the paper, in the loss, whose gradient is taken as it is, and in the norm; the
paper has tanh for the sign in the gradient. A_t is normalised at each token, not at chunks' ends alone. eta weighs the
channels of the loss and alpha the rows of the weights: of d numbers and 4 d hidden units the paper says no more. 1 / p
and 1 / K, whose factors are eta's; heads.

Dims: B batch, T time, D width, H heads, K head, F = expansion K hidden, N rank of the gates, R = K + F rows of both
matrices, V = 2 K what the loss is told, E = 3 H K, W width of the convolution, P = W - 1 past tokens, O and I outputs
and inputs of a matrix.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.initial import lecun, within
from memzoo.ops.standard import standard

# 1e-4 with each token, to begin with: a change of 1e-5 in the input dies out over 4,096 tokens. With 0.01 it moved the
# outputs as much as any other would within 1,024, since LN undoes what forgetting takes from the length of weights.
FORGET = math.log(1e-4 / (1 - 1e-4))


class State(NamedTuple):
    memory: ops.MemoryState
    past_BPE: jax.Array


def network(apply, x_TK, norm):
    """The memory; `ops.memorize` has the step that makes it learn. norm: the scale and bias of LN."""
    return x_TK + standard(apply("W1", nn.gelu(apply("W2", x_TK)))) * norm["scale"] + norm["bias"]


def loss(p, y_K, told_V):
    """told: the value, and eta of each channel."""
    v_K, eta_K = jnp.split(told_V, 2)
    return jnp.sum(eta_K * ((y_K - v_K) ** 2 + 1e-6) ** (p / 2)) / p


def normalised(q, A_OI):
    """A / |A|_q^{q-2}"""
    return A_OI / jnp.sum((A_OI**2 + 1e-6) ** (q / 2), axis=(-2, -1), keepdims=True) ** (1 - 2 / q)


class Moneta(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for inputs, state or resets that do not fit, width not divisible by heads.
    """

    width: int
    heads: int = 4
    head_dim: int | None = None  # width // heads
    expansion: int = 4  # hidden units for each of head_dim
    p: float = 3.0  # of the loss
    q: float = 4.0  # of the weights
    chunk: int = 16  # tokens whose gradients are taken at the same weights
    step: float = 0.1
    gate_rank: int = 32
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """H, K, F, P"""
        K = self.head_dim
        if K is None:
            K = contract.divisible("width", self.width, "heads", self.heads)
        contract.positive(width=self.width, heads=self.heads, head_dim=K, expansion=self.expansion)
        contract.positive(chunk=self.chunk, gate_rank=self.gate_rank, conv_width=self.conv_width)
        contract.check_numbers(self)
        if not self.step > 0:
            raise ValueError(f"step: expected a number > 0, got {self.step!r}")
        for name, power in (("p", self.p), ("q", self.q)):
            if not power >= 1:
                raise ValueError(f"{name}: expected a number >= 1, got {power!r}")
        return self.heads, K, self.expansion * K, self.conv_width - 1

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """[H, O, I] of the memory's matrices."""
        H, K, F, _ = self.sizes()
        return {"W1": (H, K, F), "W2": (H, F, K)}

    def initial_state(self, batch: int) -> State:
        (H, K, _, P), wide = self.sizes(), contract.state_dtype(self.dtype)
        memory = ops.memory_state(batch, self.shapes(), K, 2 * K, wide, momentum=False, window=1, chunk=self.chunk)
        return State(memory, jnp.zeros((batch, P, H * 3 * K), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        fresh, state = state is None, contract.begin(self, x_BTD, state, reset_BT)
        (H, K, F, P), (B, T, D), wide = self.sizes(), x_BTD.shape, contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}

        f_WE = self.param("conv", within((P + 1) ** -0.5), (P + 1, 3 * H * K), self.param_dtype)
        qkv_BTE = nn.Dense(3 * H * K, name="qkv", **kinds)(x_BTD)
        qkv_BTE, past_BPE = ops.short_conv(qkv_BTE, f_WE, state.past_BPE, reset_BT)
        q_BTHK, k_BTHK, v_BTHK = jnp.split(nn.silu(qkv_BTE).reshape(B, T, H, 3 * K), 3, axis=-1)
        low_BTN = nn.Dense(self.gate_rank, use_bias=False, name="gates_low", **gates)(x_BTD)

        def gate(name, size, begin):
            begins = nn.initializers.constant(begin)
            return nn.Dense(H * size, bias_init=begins, name=name, **gates)(low_BTN).reshape(B, T, H, size)

        eta_BTHK = nn.sigmoid(gate("eta", K, 0.0)) * self.step / K
        alpha_BTHR = nn.sigmoid(gate("alpha", K + F, FORGET))

        A = {n: self.param(n, lecun, shape, self.param_dtype) for n, shape in self.shapes().items()}
        norm = {
            "scale": self.param("norm_scale", nn.initializers.ones, (H, K), self.param_dtype),
            "bias": self.param("norm_bias", nn.initializers.zeros, (H, K), self.param_dtype),
        }
        rule = ops.Rule(weights=partial(normalised, self.q))
        kind: dict[str, Any] = {"rule": rule, "fixed": norm, "chunk": self.chunk, "impl": self.impl}
        learn: Callable[..., Any] = partial(ops.memorize, network, partial(loss, self.p), **kind)
        told_BTHV = jnp.concatenate([v_BTHK.astype(wide), eta_BTHK], axis=-1)
        do = ops.Gates(jnp.ones((B, T, H), wide), alpha_BTH=alpha_BTHR)
        args = A, ops.unit(q_BTHK), ops.unit(k_BTHK), told_BTHV, do, None if fresh else state.memory, reset_BT
        y_BTHK, memory = learn(*args)

        gate_BTHK = nn.DenseGeneral((H, K), name="gate", **kinds)(x_BTD)
        y_BTHK = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y_BTHK) * nn.silu(gate_BTHK)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHK), State(memory, past_BPE)
