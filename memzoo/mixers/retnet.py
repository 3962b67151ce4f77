"""RetNet's retention: a matrix memory that forgets at a fixed rate per head, under rotating queries and keys.

    S_n = gamma S_{n-1} + k_n v_n'        y_n = S_n' q_n        q_n, k_n turned by n theta        gamma = 1 - 2^(-5 - h)

Source: Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei, "Retentive Network: A Successor to Transformer for Large Language
Models" (2023), arXiv:2307.08621, eq. 5, 6 and 8; theta and the initialisation from the released code (torchscale).
Differs: theta is rounded to multiples of 2^-32 turns, so that n theta is exact at any position; the group norm is the
code's RMSNorm; the score normalisations of sec. 2.3 are left out, since the norm cancels them.

Dims: B batch, T time, D width, H heads, K key, V value, F = K / 2 frequencies.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memzoo import contract, ops
from memzoo.ops import rotary


class State(NamedTuple):
    S_BHKV: jax.Array
    n_B: jax.Array  # int32, tokens so far, which may wrap around: only differences are seen


def step(S_KV, q_K, k_K, v_V, log_gamma):
    """One token, one head. This is the definition; every faster form is tested against it."""
    S_KV = jnp.exp(log_gamma) * S_KV + jnp.outer(k_K, v_V)
    return S_KV, q_K @ S_KV


class RetNet(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is, and an int32 counter.

    Raises ValueError, by name, for a width that heads do not divide, an odd key_dim, and for inputs, state or resets
    that do not fit.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # per head, even; width / heads
    value_dim: int | None = None  # per head; twice key_dim
    impl: str = "auto"  # 'scan', 'associative', 'chunk', 'pallas'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V)"""
        per_head = contract.divisible("width", self.width, "heads", self.heads)
        K = self.key_dim if self.key_dim is not None else per_head
        V = self.value_dim if self.value_dim is not None else 2 * K
        contract.positive(value_dim=V)
        contract.divisible("key_dim", K, "pairs of channels", 2)
        return self.heads, K, V

    def initial_state(self, batch: int) -> State:
        S_BHKV = jnp.zeros((batch, *self.sizes()), contract.state_dtype(self.dtype))
        return State(S_BHKV, jnp.zeros(batch, jnp.int32))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V), D = self.sizes(), self.width
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        small: dict[str, Any] = {"kernel_init": nn.initializers.variance_scaling(2**-5, "fan_avg", "uniform"), **kinds}

        n_BT = rotary.places(state.n_B, x_BTD.shape[1], reset_BT)
        q_BTHK = turn(nn.DenseGeneral((H, K), name="q", **small)(x_BTD), n_BT)
        k_BTHK = turn(nn.DenseGeneral((H, K), name="k", **small)(x_BTD), n_BT) * K**-0.5
        v_BTHV = nn.DenseGeneral((H, V), name="v", **small)(x_BTD)
        log_gamma_H = jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(H)))), contract.state_dtype(self.dtype))

        y_BTHV, S_BHKV = retention(q_BTHK, k_BTHK, v_BTHV, log_gamma_H, state.S_BHKV, reset_BT, self.impl)

        gate_BTHV = nn.DenseGeneral((H, V), name="gate", **small)(x_BTD)
        y_BTHV = nn.RMSNorm(use_scale=False, dtype=self.dtype, name="norm")(y_BTHV) * nn.silu(gate_BTHV)
        glorot = nn.initializers.glorot_uniform()
        y_BTD = nn.DenseGeneral(D, axis=(-2, -1), kernel_init=glorot, name="out", **kinds)(y_BTHV)
        return y_BTD, State(S_BHKV, n_BT[:, -1] + 1)


def retention(q_BTHK, k_BTHK, v_BTHV, log_gamma_H, S_BHKV, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, S_BHKV)."""
    xs = q_BTHK, k_BTHK, v_BTHV, jnp.broadcast_to(log_gamma_H, q_BTHK.shape[:3])
    if impl == "scan":
        y_BTHV, S_BHKV = ops.recur(jax.vmap(step), S_BHKV, ops.widen(xs), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), S_BHKV
    return ops.linear_attention(*xs, S_BHKV, reset_BT, impl=impl)


def turn(x_BTHK, n_BT):
    """Rotates pairs of channels by n theta, theta from 1 to 1e-4, both ends included."""
    return rotary.turn_by(x_BTHK, n_BT, 10_000.0 ** -np.linspace(0, 1, x_BTHK.shape[-1] // 2))
