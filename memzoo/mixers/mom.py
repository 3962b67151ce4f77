"""MoM: many memories; each token writes to and reads from a few of them, that a router chooses, and one that all share.

    g_t = the top k of softmax(W x_t), over their sum        0 for the others, 1 for the shared memory
    S_t^m = a_t^m S_{t-1}^m + beta_t^m k_t^m (v_t^m - a_t^m S_{t-1}^m' k_t^m)'        where g_t^m > 0, else S_{t-1}^m
    y_t = (sum over m of g_t^m S_t^m)' q_t

Source: Du, Sun, Lan, Hu, Cheng, "MoM: Linear Sequence Modeling with Mixture-of-Memories" (2025), arXiv:2502.13685,
with the memory of its released models, that of Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024),
arXiv:2412.06464, eq. 10; rates and biases common to all memories, and the number of memories, from the released code.
Differs: no memory has a capacity: the first release drops a memory's oldest tokens when later ones are too many, which
is not causal. The short convolution is that of Gated DeltaNet, over the sequence; the released one runs over the tokens
of one memory. S is [K, V], the transpose of what it is in Gated DeltaNet's paper.

Dims: B batch, T time, D width, H heads, K key, V value, N memories to choose from, M = N + 1 with the shared one,
      C choices, W conv width, P = W - 1 past inputs, E = H (K + M (K + V)), the channels of q and of all k and v.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.initial import log_uniform, short_filter, small_step


class State(NamedTuple):
    S_BHMKV: jax.Array  # the shared memory, if there is one, is the last
    past_BPE: jax.Array


def step(S_MKV, q_K, k_MK, v_MV, beta_M, log_a_M, g_M):
    """One token, one head. This is the definition; every faster form is tested against it."""
    kept_MKV = jnp.exp(log_a_M)[:, None, None] * S_MKV
    error_MV = v_MV - jnp.einsum("mk,mkv->mv", k_MK, kept_MKV)
    written_MKV = kept_MKV + beta_M[:, None, None] * k_MK[:, :, None] * error_MV[:, None]
    S_MKV = jnp.where((g_M > 0)[:, None, None], written_MKV, S_MKV)
    return S_MKV, q_K @ jnp.einsum("m,mkv->kv", g_M, S_MKV)


class MoM(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Sows `load_balance` into the collection "losses": `balance_weight` times k where tokens use all memories alike, more
    where they do not. To train with it, apply with mutable=["losses"] and add what is there to the loss.
    Raises ValueError, by name, for fields out of their range, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # per head; 3/4 width / heads, as in Gated DeltaNet
    value_dim: int | None = None  # per head; twice key_dim
    memories: int = 4  # N
    top_k: int = 2
    shared: bool = True  # whether there is one more memory, for all tokens
    conv_width: int = 4
    balance_weight: float = 0.01
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int, int]:
        """(H, M, K, V, P)"""
        per_head = contract.divisible("width", self.width, "heads", self.heads)
        K = self.key_dim if self.key_dim is not None else max(1, per_head * 3 // 4)
        V = self.value_dim if self.value_dim is not None else 2 * K
        contract.positive(key_dim=K, value_dim=V, conv_width=self.conv_width, memories=self.memories, top_k=self.top_k)
        if self.top_k > self.memories:
            raise ValueError(f"top_k: expected at most memories = {self.memories}, got {self.top_k}")
        return self.heads, self.memories + bool(self.shared), K, V, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        H, M, K, V, P = self.sizes()
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, H, M, K, V), wide), jnp.zeros((batch, P, H * (K + M * (K + V))), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, M, K, V, P), (B, T, D) = self.sizes(), x_BTD.shape
        wide = contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"use_bias": False, "dtype": wide, "param_dtype": self.param_dtype}

        g_BTM, balance = route(nn.Dense(self.memories, name="router", **gates)(x_BTD), self.top_k, self.shared)
        contract.add_loss(self, "load_balance", self.balance_weight * balance)

        qkv_BTE = nn.Dense(H * (K + M * (K + V)), name="qkv", **kinds)(x_BTD)
        f_WE = self.param("conv", short_filter, (P + 1, qkv_BTE.shape[-1]), self.param_dtype)
        qkv_BTE, past_BPE = ops.short_conv(qkv_BTE, f_WE, state.past_BPE, reset_BT)
        q_BTE, kv_BTE = jnp.split(nn.silu(qkv_BTE), [H * K], axis=-1)
        k_BTHMK, v_BTHMV = jnp.split(kv_BTE.reshape(B, T, H, M, K + V), [K], axis=-1)
        q_BTHK, k_BTHMK = ops.unit(q_BTE.reshape(B, T, H, K)) * K**-0.5, ops.unit(k_BTHMK)

        beta_BTHM = nn.sigmoid(nn.DenseGeneral((H, M), name="beta", **gates)(x_BTD))
        rate_H = jnp.exp(self.param("log_rate", log_uniform(1.0, 16.0), (H,), self.param_dtype).astype(wide))
        bias_H = self.param("dt_bias", small_step, (H,), self.param_dtype).astype(wide)
        dt_BTHM = nn.softplus(nn.DenseGeneral((H, M), name="dt", **gates)(x_BTD) + bias_H[:, None])

        xs = q_BTHK, k_BTHMK, v_BTHMV, beta_BTHM, -rate_H[:, None] * dt_BTHM, g_BTM
        y_BTHV, S_BHMKV = mixture(*xs, state.S_BHMKV, reset_BT, self.impl)

        gate_BTHV = nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD)
        y_BTHV = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y_BTHV) * nn.silu(gate_BTHV)
        y_BTD = nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV)
        return y_BTD, State(S_BHMKV, past_BPE)


def route(logits_BTN, top_k, shared):
    """(g_BTM, the load-balance loss N sum over m of f_m p_m, with f the share of tokens that choose m, p its mean
    probability: Switch Transformer, arXiv:2101.03961, eq. 4-6, for k choices each)."""
    N = logits_BTN.shape[-1]
    p_BTN = nn.softmax(logits_BTN)
    top_BTC, which_BTC = lax.top_k(p_BTN, top_k)
    chosen_BTCN = jax.nn.one_hot(which_BTC, N, dtype=p_BTN.dtype)
    g_BTN = jnp.sum(chosen_BTCN * (top_BTC / jnp.sum(top_BTC, -1, keepdims=True))[..., None], axis=2)
    balance = N * jnp.sum(jnp.mean(jnp.sum(chosen_BTCN, 2), (0, 1)) * jnp.mean(p_BTN, (0, 1)))
    g_BTM = jnp.concatenate([g_BTN, jnp.ones_like(g_BTN[..., :1])], axis=-1) if shared else g_BTN
    return g_BTM, balance


def mixture(q_BTHK, k_BTHMK, v_BTHMV, beta_BTHM, log_a_BTHM, g_BTM, S_BHMKV, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, S_BHMKV)."""
    B, T, H, M, _ = k_BTHMK.shape
    xs = q_BTHK, k_BTHMK, v_BTHMV, beta_BTHM, log_a_BTHM
    if impl == "scan":
        heads = jax.vmap(step, in_axes=(0, 0, 0, 0, 0, 0, None))
        y_BTHV, S_BHMKV = ops.recur(heads, S_BHMKV, ops.widen((*xs, g_BTM)), reset_BT)
        return y_BTHV.astype(v_BTHMV.dtype), S_BHMKV
    # Each memory of each head is a head of the delta rule, which neither fades nor writes where it was not chosen.
    chosen_BT1M = (g_BTM > 0)[:, :, None]
    beta_BTHM, log_a_BTHM = (jnp.where(chosen_BT1M, x, 0) for x in (beta_BTHM, log_a_BTHM))
    q_BTHMK = jnp.broadcast_to(q_BTHK[:, :, :, None], k_BTHMK.shape)
    joined = (x.reshape(B, T, H * M, *x.shape[4:]) for x in (q_BTHMK, k_BTHMK, v_BTHMV, beta_BTHM, log_a_BTHM))
    y_BTXV, S_BXKV = ops.delta_rule(*joined, S_BHMKV.reshape(B, H * M, *S_BHMKV.shape[3:]), reset_BT, impl=impl)
    y_BTHV = jnp.einsum("bthmv,btm->bthv", y_BTXV.reshape(v_BTHMV.shape), g_BTM, precision="highest")
    return y_BTHV.astype(v_BTHMV.dtype), S_BXKV.reshape(S_BHMKV.shape)
