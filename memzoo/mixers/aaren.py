"""Aaren: softmax attention with a learned query, the same for all tokens, which makes it a recurrence of constant size.

    s_t = q' k_t / sqrt(K)        m_t = max(m_{t-1}, s_t)        y_t = w_t / u_t
    u_t = exp(m_{t-1} - m_t) u_{t-1} + exp(s_t - m_t)        w_t = exp(m_{t-1} - m_t) w_{t-1} + exp(s_t - m_t) v_t

Source: Feng, Tung, Hajimirsadeghi, Ahmed, Bengio, Mori, "Attention as an RNN" (2024), arXiv:2405.13956, sec. 3: the
recurrence of sec. 3.1, the prefix scan over (m, u, w) of sec. 3.2, the learned query of sec. 3.3.
Differs: heads, as in the attention it stands for; each head's q is learned as such, not a token and its projection,
and starts as a normal one, so that scores do as those of attention; m starts at 0 with u = 0, which stands for -inf.

Dims: B batch, T time, D width, H heads, K key, V value.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.chunks import matmul


class State(NamedTuple):
    m_BH: jax.Array  # the largest score so far
    u_BH: jax.Array  # the sum of all exp(score - m), 1 at least; 0 before the first token
    w_BHV: jax.Array  # and that of all exp(score - m) value


def step(state, k_K, v_V, q_K):
    """One token, one head. This is the definition; every faster form is tested against it."""
    m, u, w_V = state
    s = q_K @ k_K * q_K.size**-0.5
    m_before = jnp.where(u > 0, m, s)
    m = jnp.maximum(m_before, s)
    u = jnp.exp(m_before - m) * u + jnp.exp(s - m)
    w_V = jnp.exp(m_before - m) * w_V + jnp.exp(s - m) * v_V
    return State(m, u, w_V), w_V / u


class Aaren(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # per head; width / heads
    value_dim: int | None = None  # per head; width / heads
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V)"""
        per_head = contract.divisible("width", self.width, "heads", self.heads)
        K = self.key_dim if self.key_dim is not None else per_head
        V = self.value_dim if self.value_dim is not None else per_head
        contract.positive(key_dim=K, value_dim=V)
        return self.heads, K, V

    def initial_state(self, batch: int) -> State:
        (H, _, V), wide = self.sizes(), contract.state_dtype(self.dtype)
        return State(*(jnp.zeros((batch, *axes), wide) for axes in ((H,), (H,), (H, V))))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V), D = self.sizes(), self.width
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        q_HK = self.param("query", nn.initializers.normal(1.0), (H, K), self.param_dtype)
        k_BTHK = nn.DenseGeneral((H, K), name="k", **kinds)(x_BTD)
        v_BTHV = nn.DenseGeneral((H, V), name="v", **kinds)(x_BTD)
        q_HK = q_HK.astype(contract.state_dtype(self.dtype))
        y_BTHV, state = attention_of_one_query(q_HK, k_BTHK, v_BTHV, state, reset_BT, self.impl)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), state


def attention_of_one_query(q_HK, k_BTHK, v_BTHV, state, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, State)."""
    if impl == "scan":
        one = lambda state, k_HK, v_HV: jax.vmap(step)(state, k_HK, v_HV, q_HK)
        y_BTHV, state = ops.recur(one, state, ops.widen((k_BTHK, v_BTHV)), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), state
    # Given every m, this is linear attention with one key channel, exp(s - m), and query 1.
    m_BH, u_BH, w_BHV = state
    s_BTH = matmul("bthk,hk->bth", k_BTHK.astype(q_HK.dtype), q_HK) * q_HK.shape[-1] ** -0.5
    m_BH = jnp.where(u_BH > 0, m_BH, -jnp.inf)
    before_BTH, m_BTH = ops.max_scan(jnp.zeros_like(s_BTH), s_BTH, m_BH, reset_BT)
    k_BTH1 = jnp.exp(s_BTH - m_BTH)[..., None].astype(v_BTHV.dtype)
    y_BTHV, u_BTH, w_BH1V, u_BH1 = ops.normalised_linear_attention(
        jnp.ones_like(k_BTH1),
        k_BTH1,
        v_BTHV,
        before_BTH - m_BTH,
        w_BHV[:, :, None],
        u_BH[..., None],
        reset_BT,
        impl=impl,
    )
    y_BTHV = (y_BTHV / u_BTH[..., None]).astype(v_BTHV.dtype)
    return y_BTHV, State(m_BTH[:, -1], u_BH1[..., 0], w_BH1V[:, :, 0])
