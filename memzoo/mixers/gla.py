"""Gated linear attention: a matrix memory that forgets each of its keys at a rate the input chooses.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t'        y_t = S_t' q_t        alpha_t = sigmoid(W2 W1 x_t + b)^(1 / tau)

Source: Yang, Wang, Shen, Panda, Kim, "Gated Linear Attention Transformers with Hardware-Efficient Training" (2023),
arXiv:2312.06635, eq. 4; layer of sec. 4.4.
Differs: as in the authors' released code, q is scaled by K^-0.5, the norm of each head is RMSNorm, and the output gate
has no bias.

Dims: B batch, T time, D width, H heads, K key, V value, R gate rank.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops


class State(NamedTuple):
    S_BHKV: jax.Array


def step(S_KV, q_K, k_K, v_V, log_alpha_K):
    """One token, one head. This is the definition; every faster form is tested against it."""
    S_KV = jnp.exp(log_alpha_K)[:, None] * S_KV + jnp.outer(k_K, v_V)
    return S_KV, q_K @ S_KV


class GLA(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # per head; width / heads / 2
    value_dim: int | None = None  # per head; width / heads
    gate_rank: int = 16
    gate_temperature: float = 16.0  # tau: the larger, the slower the memory forgets
    impl: str = "auto"  # 'scan', 'associative', 'chunk', 'pallas'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V)"""
        per_head = contract.divisible("width", self.width, "heads", self.heads)
        K = self.key_dim if self.key_dim is not None else max(1, per_head // 2)
        V = self.value_dim if self.value_dim is not None else per_head
        contract.positive(key_dim=K, value_dim=V, gate_rank=self.gate_rank)
        if not self.gate_temperature > 0:
            raise ValueError(f"gate_temperature: expected a number > 0, got {self.gate_temperature}")
        return self.heads, K, V

    def initial_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, *self.sizes()), contract.state_dtype(self.dtype)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V), D = self.sizes(), self.width
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": contract.state_dtype(self.dtype), "param_dtype": self.param_dtype}

        q_BTHK = nn.DenseGeneral((H, K), name="q", **kinds)(x_BTD) * K**-0.5
        k_BTHK = nn.DenseGeneral((H, K), name="k", **kinds)(x_BTD)
        v_BTHV = nn.DenseGeneral((H, V), name="v", **kinds)(x_BTD)
        low_BTR = nn.Dense(self.gate_rank, use_bias=False, name="alpha_in", **gates)(x_BTD)
        alpha_BTHK = nn.DenseGeneral((H, K), name="alpha_out", **gates)(low_BTR)
        log_alpha_BTHK = nn.log_sigmoid(alpha_BTHK) / self.gate_temperature

        args = q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK
        y_BTHV, S_BHKV = gated_linear_attention(*args, state.S_BHKV, reset_BT, self.impl)

        gate_BTHV = nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD)
        norm = nn.RMSNorm(epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        y_BTHV = norm(y_BTHV) * nn.silu(gate_BTHV)
        y_BTD = nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV)
        return y_BTD, State(S_BHKV)


def gated_linear_attention(q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, S_BHKV, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, S_BHKV)."""
    xs = q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK
    if impl == "scan":
        y_BTHV, S_BHKV = ops.recur(jax.vmap(step), S_BHKV, ops.widen(xs), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), S_BHKV
    return ops.linear_attention(*xs, S_BHKV, reset_BT, impl=impl)
