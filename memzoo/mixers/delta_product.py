"""DeltaProduct: several steps of the delta rule per token, so that a token can turn the memory and not only reflect it.

    S_0 = a_t S_{t-1}        S_j = S_{j-1} + beta_tj k_tj (v_tj - S_{j-1}' k_tj)', j = 1 .. N
    S_t = S_N                y_t = S_t' q_t

Source: Siems, Carstensen, Zela, Hutter, Pontil, Grazzi, "DeltaProduct: Improving State-Tracking in Linear RNNs via
Householder Products" (2025), arXiv:2502.10297. With `forget_gate` it is the paper's Gated DeltaProduct: the
decay a_t = exp(-rate softplus(dt_t)) is Mamba-2's, once per token. The layer, its sizes, its defaults and the
initialisation are those of the authors' released code (flash-linear-attention).
Differs: S is [K, V], the paper's transpose; one convolution over q and all k and v together.

Dims: B batch, T time, D width, H heads, N Householder steps per token, K key, V value, W conv width,
      P = W - 1 past inputs, E = H (K + N (K + V)), the channels of q, k and v, L = T N.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.initial import short_filter, small_step


class State(NamedTuple):
    S_BHKV: jax.Array
    past_BPE: jax.Array


def step(S_KV, q_K, k_NK, v_NV, beta_N, log_a):
    """One token, one head. This is the definition; every faster form is tested against it."""
    S_KV = jnp.exp(log_a) * S_KV
    for k_K, v_V, beta in zip(k_NK, v_NV, beta_N, strict=True):
        S_KV = S_KV + beta * jnp.outer(k_K, v_V - k_K @ S_KV)
    return S_KV, q_K @ S_KV


class DeltaProduct(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # per head; 3/4 width / heads
    value_dim: int | None = None  # per head; twice key_dim, the code's expand_v = 2
    householders: int = 2  # N, steps per token
    allow_neg_eigval: bool = True  # beta in (0, 2), so that each step can reflect, and two of them turn
    forget_gate: bool = True  # without it nothing fades, a_t = 1
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int, int]:
        """(H, N, K, V, P)"""
        per_head = contract.divisible("width", self.width, "heads", self.heads)
        K = self.key_dim if self.key_dim is not None else max(1, per_head * 3 // 4)
        V = self.value_dim if self.value_dim is not None else 2 * K
        contract.positive(key_dim=K, value_dim=V, householders=self.householders, conv_width=self.conv_width)
        return self.heads, self.householders, K, V, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        H, N, K, V, P = self.sizes()
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, H, K, V), wide), jnp.zeros((batch, P, H * (K + N * (K + V))), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, N, K, V, P), (B, T, D) = self.sizes(), x_BTD.shape
        wide = contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}

        qkv_BTE = nn.Dense(H * (K + N * (K + V)), name="qkv", **kinds)(x_BTD)
        f_WE = self.param("conv", short_filter, (P + 1, qkv_BTE.shape[-1]), self.param_dtype)
        qkv_BTE, past_BPE = ops.short_conv(qkv_BTE, f_WE, state.past_BPE, reset_BT)
        qkv_BTHE = nn.silu(qkv_BTE).reshape(B, T, H, K + N * (K + V))
        q_BTHK, k_BTHE, v_BTHE = jnp.split(qkv_BTHE, [K, K + N * K], axis=-1)
        k_BTHNK, v_BTHNV = k_BTHE.reshape(B, T, H, N, K), v_BTHE.reshape(B, T, H, N, V)
        q_BTHK, k_BTHNK = ops.unit(q_BTHK) * K**-0.5, ops.unit(k_BTHNK)

        beta = nn.Dense(H * N, use_bias=False, name="beta", **gates)(x_BTD)
        beta_BTHN = nn.sigmoid(beta).reshape(B, T, H, N) * (2 if self.allow_neg_eigval else 1)
        log_a_BTH = jnp.zeros((B, T, H), wide)
        if self.forget_gate:
            rate_H = jnp.exp(self.param("log_rate", log_uniform_to(16.0), (H,), self.param_dtype).astype(wide))
            log_a_BTH = -rate_H * nn.softplus(nn.Dense(H, bias_init=small_step, name="dt", **gates)(x_BTD))

        args = q_BTHK, k_BTHNK, v_BTHNV, beta_BTHN, log_a_BTH
        y_BTHV, S_BHKV = delta_product(*args, state.S_BHKV, reset_BT, self.impl)

        gate_BTHV = nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD)
        y_BTHV = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y_BTHV) * nn.silu(gate_BTHV)
        y_BTD = nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV)
        return y_BTD, State(S_BHKV, past_BPE)


def delta_product(q_BTHK, k_BTHNK, v_BTHNV, beta_BTHN, log_a_BTH, S_BHKV, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, S_BHKV)."""
    xs = q_BTHK, k_BTHNK, v_BTHNV, beta_BTHN, log_a_BTH
    if impl == "scan":
        y_BTHV, S_BHKV = ops.recur(jax.vmap(step), S_BHKV, ops.widen(xs), reset_BT)
        return y_BTHV.astype(v_BTHNV.dtype), S_BHKV
    # Each token is N tokens of the delta rule: the first decays and resets, the last is read.
    B, T, H, N = beta_BTHN.shape
    k_BLHK, v_BLHV, beta_BLH = (jnp.moveaxis(x, 3, 2).reshape(B, T * N, H, *x.shape[4:]) for x in xs[1:4])
    first_L = jnp.arange(T * N) % N == 0
    log_a_BLH = jnp.where(first_L[:, None], jnp.repeat(log_a_BTH, N, axis=1), 0)
    reset_BL = None if reset_BT is None else jnp.repeat(reset_BT, N, axis=1) & first_L
    q_BLHK = jnp.repeat(q_BTHK, N, axis=1)
    y_BLHV, S_BHKV = ops.delta_rule(q_BLHK, k_BLHK, v_BLHV, beta_BLH, log_a_BLH, S_BHKV, reset_BL, impl=impl)
    return y_BLHV[:, N - 1 :: N], S_BHKV


def log_uniform_to(high):
    """The logarithm of what is uniform in (0, high]."""
    return lambda key, shape, dtype=float: jnp.log(high * (1 - jax.random.uniform(key, shape, dtype)))
