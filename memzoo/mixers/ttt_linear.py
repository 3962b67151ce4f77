"""TTT-Linear: the state is a linear model, trained while it reads to reconstruct one view of a token from another.

    f(x; W, b) = x + LN(W x + b)                  l_t = |f(k_t; W_{t'}, b_{t'}) - v_t|^2 / 2
    W_t = W_{t-1} - theta_t dl_t / dW_{t'}        b_t alike; t' the last token before the mini-batch
    y_t = f(q_t; W_t, b_t)                        theta_t = step sigmoid(w x_t + c) / K, a number for each head

Source: Sun, Li, Dalal et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States" (2024),
arXiv:2407.04620, sec. 2.1 to 2.3 for views and the loss, 2.4 for mini-batches, 2.7 for f, theta and the learned start.
Differs: as in the released code's Transformer backbone, rotary places inside a mini-batch and a LayerNorm before the
last projection; but that code divides what a mini-batch has added up, as each token reads it, by the token's place in
it, with learned corrections, and the paper and this do not.

Dims: B batch, T time, D width, H heads, K head, O and I outputs and inputs of a matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops import rotary
from memzoo.ops.standard import standard

small = nn.initializers.normal(0.02)


class State(NamedTuple):
    memory: ops.MemoryState


def model(apply, x_TK, norm):
    """f; `ops.memorize` has the step that makes it learn. norm: the scale and bias of LN."""
    z_TK = apply("W", x_TK) + apply("b", jnp.ones_like(x_TK[:, :1]))
    return x_TK + standard(z_TK) * norm["scale"] + norm["bias"]


def loss(y_K, v_K):
    return jnp.sum((y_K - v_K) ** 2) / 2


class TTTLinear(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for inputs, state or resets that do not fit, width not divisible by heads.
    """

    width: int
    heads: int = 4
    head_dim: int | None = None  # width // heads
    chunk: int = 16  # tokens of a mini-batch
    step: float = 1.0
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int]:
        """H, K"""
        K = self.head_dim
        if K is None:
            K = contract.divisible("width", self.width, "heads", self.heads)
        contract.positive(width=self.width, heads=self.heads, head_dim=K, chunk=self.chunk)
        contract.divisible("head_dim", K, "the two of a rotated pair", 2)
        if not self.step > 0:
            raise ValueError(f"step: expected a number > 0, got {self.step!r}")
        return self.heads, K

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """[H, O, I] of the model's matrices."""
        H, K = self.sizes()
        return {"W": (H, K, K), "b": (H, K, 1)}

    def initial_state(self, batch: int) -> State:
        (_, K), wide = self.sizes(), contract.state_dtype(self.dtype)
        memory = ops.memory_state(batch, self.shapes(), K, K, wide, momentum=False, window=1, chunk=self.chunk)
        return State(memory)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        fresh, state = state is None, contract.begin(self, x_BTD, state, reset_BT)
        (H, K), (B, T, D), wide = self.sizes(), x_BTD.shape, contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}

        qkv_BTHE = nn.DenseGeneral((H, 3 * K), name="qkv", **kinds)(x_BTD)
        q_BTHK, k_BTHK, v_BTHK = jnp.split(qkv_BTHE, 3, axis=-1)
        n_BT = rotary.places(state.memory.place_B, T, reset_BT) % self.chunk
        q_BTHK, k_BTHK = rotary.turn(q_BTHK, n_BT), rotary.turn(k_BTHK, n_BT)
        theta_BTH = nn.sigmoid(nn.Dense(H, kernel_init=small, name="theta", **gates)(x_BTD)) * self.step / K

        A = {
            name: self.param(name, nn.initializers.zeros if shape[-1] == 1 else small, shape, self.param_dtype)
            for name, shape in self.shapes().items()
        }
        norm = {
            "scale": self.param("norm_scale", nn.initializers.ones, (H, K), self.param_dtype),
            "bias": self.param("norm_bias", nn.initializers.zeros, (H, K), self.param_dtype),
        }
        learn: Callable[..., Any] = partial(ops.memorize, model, loss, fixed=norm, chunk=self.chunk, impl=self.impl)
        args = A, q_BTHK, k_BTHK, v_BTHK, ops.Gates(theta_BTH), None if fresh else state.memory, reset_BT
        y_BTHK, memory = learn(*args)
        y_BTE = nn.LayerNorm(1e-6, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(
            y_BTHK.reshape(B, T, -1)
        )
        return nn.Dense(D, name="out", **kinds)(y_BTE), State(memory)
