"""HGRN2: HGRN whose state is a matrix per head; the forget gate decays its rows, and what it forgets is the key.

    S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t'        y_t = S_t' o_t
    f_t = bound + (1 - bound) sigmoid(W_f x_t)      i_t = W_i x_t      o_t = silu(W_o x_t)

Source: Qin, Yang, Sun, Shen, Li, Sun, Zhong, "HGRN2: Gated Linear RNNs with State Expansion" (2024), arXiv:2404.07904,
sec. 3 (the outer product in place of a product per channel); activations, norm and no biases from the released
language model (hgru2-pytorch), whose authors' kernels (flash-linear-attention) have them too.
Differs: the paper learns its bounds over all layers at once, a cumulative sum of a softmax over layers for each
channel. A mixer knows no other layer, so `lower_bound` is one fixed number; where the paper's bounds start, it is
l / layers for layer l = 0, 1, ... K and V need not be equal, nor H K the width.

Dims: B batch, T time, D width, H heads, K key, V value.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops


class State(NamedTuple):
    S_BHKV: jax.Array


def step(S_KV, o_K, log_f_K, i_V):
    """One token, one head. This is the definition; every faster form is tested against it."""
    f_K, forgotten_K = jnp.exp(log_f_K), -jnp.expm1(log_f_K)  # 1 - f, even where f rounds to 1
    S_KV = f_K[:, None] * S_KV + jnp.outer(forgotten_K, i_V)
    return S_KV, o_K @ S_KV


class HGRN2(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, a bound outside of [0, 1), and for inputs, state
    or resets that do not fit.
    """

    width: int
    heads: int | None = None  # of 128 channels, or of the largest divisor of 128 that also divides width
    key_dim: int | None = None  # per head, the expansion of the state; width / heads
    value_dim: int | None = None  # per head; width / heads
    lower_bound: float = 0.0  # of the forget gate; the paper's first layer has 0
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V)"""
        contract.positive(width=self.width)
        H = self.width // math.gcd(128, self.width) if self.heads is None else self.heads
        per_head = contract.divisible("width", self.width, "heads", H)
        K = self.key_dim if self.key_dim is not None else per_head
        V = self.value_dim if self.value_dim is not None else per_head
        contract.positive(key_dim=K, value_dim=V)
        if not 0 <= self.lower_bound < 1:
            raise ValueError(f"lower_bound: expected 0 <= lower_bound < 1, got {self.lower_bound}")
        return H, K, V

    def initial_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, *self.sizes()), contract.state_dtype(self.dtype)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V), wide = self.sizes(), contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        o_BTHK = nn.silu(nn.DenseGeneral((H, K), name="query", **kinds)(x_BTD))
        i_BTHV = nn.DenseGeneral((H, V), name="in", **kinds)(x_BTD)
        f_BTHK = nn.DenseGeneral((H, K), name="forget", **{**kinds, "dtype": wide})(x_BTD)
        log_f_BTHK = log_gate(f_BTHK, self.lower_bound)

        y_BTHV, S_BHKV = expanded_hgru(o_BTHK, log_f_BTHK, i_BTHV, state.S_BHKV, reset_BT, self.impl)

        over_heads: dict[str, Any] = {"reduction_axes": (-2, -1), "feature_axes": (-2, -1), "epsilon": 1e-5}
        y_BTHV = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm", **over_heads)(y_BTHV)
        return nn.DenseGeneral(self.width, axis=(-2, -1), name="out", **kinds)(y_BTHV), State(S_BHKV)


def expanded_hgru(o_BTHK, log_f_BTHK, i_BTHV, S_BHKV, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, S_BHKV)."""
    if impl == "scan":
        y_BTHV, S_BHKV = ops.recur(jax.vmap(step), S_BHKV, ops.widen((o_BTHK, log_f_BTHK, i_BTHV)), reset_BT)
        return y_BTHV.astype(i_BTHV.dtype), S_BHKV
    # Linear attention with keys 1 - f.
    k_BTHK = -jnp.expm1(log_f_BTHK).astype(o_BTHK.dtype)
    return ops.linear_attention(o_BTHK, k_BTHK, i_BTHV, log_f_BTHK, S_BHKV, reset_BT, impl=impl)


def log_gate(a, bound):
    """log(bound + (1 - bound) sigmoid(a)), exact to rounding at both ends."""
    if bound == 0:
        return nn.log_sigmoid(a)
    near_bound = jnp.log(bound + (1 - bound) * nn.sigmoid(jnp.where(a > 0, 0, a)))
    near_one = jnp.log1p(-(1 - bound) * nn.sigmoid(-jnp.where(a > 0, a, 0)))
    return jnp.where(a > 0, near_one, near_bound)
