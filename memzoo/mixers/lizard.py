"""Lizard: what a softmax layer's output can be learned from: gated linear attention, and a softmax window with sinks.

    S_t = gamma_t S_{t-1} + phi_k(k_t) v_t'        z_t = gamma_t z_{t-1} + phi_k(k_t)        gamma_t = sigmoid(w' x_t)
    phi(x) = [softmax(W x), softmax(-W x)]
    y_t = S_t' phi_q(q_t) / z_t' phi_q(q_t) + alpha sum_j e_tj v_j / (sum_i exp(m_i) + sum_j e_tj)
    e_tj = exp(q_t' k_j / sqrt(K))        j of the last `window` tokens, m_i the logits of the meta-memory tokens

Meta-memory tokens take weight and give no value. Nothing is rotated: places are left to the gates. The projections q,
k, v and out have the names and shapes that they have in `attention`, whose weights load as they are. Then the rest is
trained to give that layer's outputs (mean squared error), and then q, k and v, on text.

Source: Nguyen, Zhang, Deilamsalehy, Mathur, Lai, Wang, Subramanian, Rossi, Bui, Vlassis, Dernoncourt, Nguyen, "Lizard:
An Efficient Linearization Framework for Large Language Models" (2025), arXiv:2507.09025, sec. 3.1 of its 4th version;
one gate for all heads and W of the size of the head from sec. 5 and table 13; W for each head, its initial values, the
same for queries and keys, from LoLCATs (arXiv:2410.10254), whose defaults the paper takes.
Differs: where the paper writes the memory with z and without, it is with z, with a floor of 1e-18; a logit counts as
exp(m_i), which stands as m_i in the paper; alpha is learned, from 1. Of its initial values the paper says no more: w
begins as in PyTorch, m at 0.

Dims: B batch, T time, D width, H heads, G key heads, R = H / G queries per key head, K key and V value (both head_dim),
      F rows of W, E = 2 F features, W window, U meta-memory tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.chunks import matmul
from memzoo.ops.initial import like_torch, within
from memzoo.ops.window_attention import Cache, empty_cache
from memzoo.ops.window_attention import step as window_step

FLOOR = 1e-18  # of the denominator: its square, which the gradient divides by, is still a float32


class State(NamedTuple):
    """The memory, and a ring of the window. Once full, position_B <= 2 W."""

    S_BGREV: jax.Array
    z_BGRE: jax.Array
    k_BGWK: jax.Array
    v_BGWV: jax.Array
    position_B: jax.Array


def phi(equation, x_K, W_KF):
    """Hedgehog's features, positive, by each head's own map."""
    x_F = matmul(equation, x_K, W_KF)
    return jnp.concatenate([nn.softmax(x_F), nn.softmax(-x_F)], axis=-1)


def step(state, phi_q_RE, phi_k_RE, q_RK, k_K, v_V, log_gamma, alpha=None, meta_U=()):
    """One token, one key head and its queries. This is the definition; the chunk form is tested against it."""
    S_REV, z_RE, *ring = state
    S_REV = jnp.exp(log_gamma) * S_REV + phi_k_RE[..., None] * v_V
    z_RE = jnp.exp(log_gamma) * z_RE + phi_k_RE
    total_R1 = jnp.sum(phi_q_RE * z_RE, axis=-1, keepdims=True)
    y_RV = jnp.einsum("re,rev->rv", phi_q_RE, S_REV) * inverse(total_R1)
    if alpha is not None:
        ring, near_RV = window_step(Cache(*ring), q_RK, k_K, v_V, empty_U=meta_U)
        y_RV = y_RV + alpha * near_RV
    return State(S_REV, z_RE, *ring), y_RV


class Lizard(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for fields out of their range, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_heads: int | None = None  # as many as heads; fewer are shared
    head_dim: int | None = None  # width / heads
    feature_dim: int | None = None  # F; head_dim
    window: int | None = 128  # None: the memory alone
    meta_tokens: int = 4
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int, int]:
        """(G, R, K, F, W)"""
        contract.positive(heads=self.heads)
        G = self.heads if self.key_heads is None else self.key_heads
        R = contract.divisible("heads", self.heads, "key_heads", G)
        K = self.head_dim
        if K is None:
            K = contract.divisible("width", self.width, "heads", self.heads)
        F = K if self.feature_dim is None else self.feature_dim
        contract.positive(head_dim=K, feature_dim=F)
        if self.window is not None:
            contract.positive(window=self.window)
        if not contract.whole_number(self.meta_tokens) or self.meta_tokens < 0:
            raise ValueError(f"meta_tokens: expected an integer >= 0, got {self.meta_tokens!r}")
        return G, R, K, F, self.window or 0

    def initial_state(self, batch: int) -> State:
        (G, R, K, F, W), wide = self.sizes(), contract.state_dtype(self.dtype)
        S_BGREV, z_BGRE = jnp.zeros((batch, G, R, 2 * F, K), wide), jnp.zeros((batch, G, R, 2 * F), wide)
        return State(S_BGREV, z_BGRE, *empty_cache(batch, G, W, K, K, wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        check_impl("lizard", self.impl, ("scan", "chunk"))
        fresh = state is None
        state = contract.begin(self, x_BTD, state, reset_BT)
        (G, R, K, F, _), (B, T, D), wide = self.sizes(), x_BTD.shape, contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"use_bias": False, "dtype": wide, "param_dtype": self.param_dtype}

        q_BTGRK = nn.DenseGeneral((G * R, K), name="q", **kinds)(x_BTD).reshape(B, T, G, R, K)
        k_BTGK = nn.DenseGeneral((G, K), name="k", **kinds)(x_BTD)
        v_BTGV = nn.DenseGeneral((G, K), name="v", **kinds)(x_BTD)
        log_gamma_BT = nn.log_sigmoid(nn.Dense(1, kernel_init=like_torch, name="gate", **gates)(x_BTD))[..., 0]

        q_map_GRKF, k_map_GRKF = self.param("phi", twice_the_same, (2, G, R, K, F), self.param_dtype).astype(wide)
        phi_q_BTGRE = phi("btgrk,grkf->btgrf", q_BTGRK.astype(wide), q_map_GRKF)
        phi_k_BTGRE = phi("btgk,grkf->btgrf", k_BTGK.astype(wide), k_map_GRKF)
        mix: dict[str, Any] = {}
        if self.window is not None:
            mix["alpha"] = self.param("alpha", nn.initializers.ones, (), self.param_dtype).astype(wide)
        if self.window is not None and self.meta_tokens:
            zeros = nn.initializers.zeros
            mix["meta_U"] = self.param("meta", zeros, (self.meta_tokens,), self.param_dtype).astype(wide)

        xs = phi_q_BTGRE, phi_k_BTGRE, q_BTGRK, k_BTGK, v_BTGV, log_gamma_BT
        if self.impl == "scan" or (self.impl == "auto" and T == 1):
            axes = State._make((0, 0, 0, 0, None))  # the key heads share a position, and all heads a gate
            heads = jax.vmap(partial(step, **mix), in_axes=(axes, 0, 0, 0, 0, 0, None), out_axes=(axes, 0))
            y_BTGRV, state = ops.recur(heads, state, ops.widen(xs), reset_BT)
        else:
            y_BTGRV, state = chunked(*xs, state, reset_BT, fresh, **mix)
        y_BTHV = y_BTGRV.astype(self.dtype).reshape(B, T, G * R, K)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), state


def chunked(
    phi_q_BTGRE, phi_k_BTGRE, q_BTGRK, k_BTGK, v_BTGV, log_gamma_BT, state, reset_BT, fresh, alpha=None, meta_U=()
):
    """All T tokens. Returns (y_BTGRV, State)."""
    S_BGREV, z_BGRE, *ring = state
    B, T, G, R, E = phi_q_BTGRE.shape
    q_BTHE, k_BTHE = (x.reshape(B, T, G * R, E).astype(v_BTGV.dtype) for x in (phi_q_BTGRE, phi_k_BTGRE))
    v_BTHV, log_gamma_BTH = jnp.repeat(v_BTGV, R, axis=2), jnp.broadcast_to(log_gamma_BT[..., None], (B, T, G * R))
    S_BHEV, z_BHE = S_BGREV.reshape(B, G * R, E, -1), z_BGRE.reshape(B, G * R, E)
    args = q_BTHE, k_BTHE, v_BTHV, log_gamma_BTH, S_BHEV, z_BHE, reset_BT
    y_BTHV, total_BTH, S_BHEV, z_BHE = ops.normalised_linear_attention(*args, impl="chunk")
    y_BTGRV = (y_BTHV * inverse(total_BTH)[..., None]).reshape(B, T, G, R, -1)
    if alpha is not None:
        near_BTGRV, ring = ops.window_attention(
            q_BTGRK, k_BTGK, v_BTGV, Cache(*ring), reset_BT, empty_U=meta_U, fresh=fresh, impl="chunk"
        )
        y_BTGRV = y_BTGRV + alpha * near_BTGRV
    return y_BTGRV, State(S_BHEV.reshape(S_BGREV.shape), z_BHE.reshape(z_BGRE.shape), *ring)


def inverse(total):
    """To multiply with: in the gradient of a quotient, 1 / total^2 = 1e36 may meet large numbers before small ones."""
    return 1 / jnp.maximum(total, FLOOR)


def twice_the_same(key, shape, dtype=float):
    """Of a map [K, F], uniform with the variance 2 / (K F)."""
    half = within((6 / (shape[-2] * shape[-1])) ** 0.5)(key, shape[1:], dtype)
    return jnp.stack([half, half])
