"""Lightning Attention as in TransNormerLLM: linear attention whose heads forget at fixed rates, then a norm and a gate.

    S_t = lambda S_{t-1} + k_t v_t'        y_t = W_o (SRMSNorm(S_t' q_t) u_t)        SRMSNorm(x) = sqrt(d) x / |x|
    q, k = silu(W x), silu(W x)            v, u = W x, W x                each its own W; the norm is over all heads

Source: Qin, Sun, Li, Shen, Sun, Zhong, "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning
Attention" (2024), arXiv:2405.17381, eq. 4, 9-11 and 14, after "Lightning Attention-2: A Free Lunch for Handling
Unlimited Sequence Lengths in Large Language Models" (2024), arXiv:2401.04658, and "TransNormerLLM: A Faster and Better
Large Language Model with Improved TransNormer" (2023), arXiv:2307.14995. Its tiling is the chunk form.
Differs: lambda = exp(-slope (1 - depth)) has the slopes of the released models, ALiBi's 2^(-8 h / H) for h = 1 ... H;
eq. 10 has 8 h / H, which leaves 3e-4 of a token to the next one where h = H: `slopes="paper"`. LRPE, learned rotations
of q and k, which the paper keeps in its first layer alone, is left out.

Dims: B batch, T time, D width, H heads, K key, V value.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memzoo import contract, ops

SLOPES = ("released", "paper")


class State(NamedTuple):
    S_BHKV: jax.Array


def step(S_KV, q_K, k_K, v_V, log_lambda):
    """One token, one head. This is the definition; every faster form is tested against it."""
    S_KV = jnp.exp(log_lambda) * S_KV + jnp.outer(k_K, v_V)
    return S_KV, q_K @ S_KV


class Lightning(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, a depth outside of [0, 1], unknown slopes, and for
    inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 8
    key_dim: int | None = None  # per head; width / heads
    value_dim: int | None = None  # per head; width / heads
    depth: float = 0.0  # l / (layers - 1): 0 for the first layer, 1 for the last, which hardly forgets
    slopes: str = "released"  # or "paper"
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V)"""
        per_head = contract.divisible("width", self.width, "heads", self.heads)
        K = self.key_dim if self.key_dim is not None else per_head
        V = self.value_dim if self.value_dim is not None else per_head
        contract.positive(key_dim=K, value_dim=V)
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth: expected 0 <= depth <= 1, got {self.depth}")
        if self.slopes not in SLOPES:
            raise ValueError(f"slopes: unknown slopes {self.slopes!r}; {contract.nearest(str(self.slopes), SLOPES)}")
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

        q_BTHK = nn.silu(nn.DenseGeneral((H, K), name="q", **kinds)(x_BTD))
        k_BTHK = nn.silu(nn.DenseGeneral((H, K), name="k", **kinds)(x_BTD))
        v_BTHV = nn.DenseGeneral((H, V), name="v", **kinds)(x_BTD)
        log_lambda_H = jnp.asarray(log_decays(H, self.depth, self.slopes), contract.state_dtype(self.dtype))

        y_BTHV, S_BHKV = lightning_attention(q_BTHK, k_BTHK, v_BTHV, log_lambda_H, state.S_BHKV, reset_BT, self.impl)

        u_BTHV = nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD)
        y_BTHV = nn.RMSNorm(use_scale=False, reduction_axes=(-2, -1), dtype=self.dtype, name="norm")(y_BTHV) * u_BTHV
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), State(S_BHKV)


def lightning_attention(q_BTHK, k_BTHK, v_BTHV, log_lambda_H, S_BHKV, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, S_BHKV)."""
    xs = q_BTHK, k_BTHK, v_BTHV, jnp.broadcast_to(log_lambda_H, q_BTHK.shape[:3])
    if impl == "scan":
        y_BTHV, S_BHKV = ops.recur(jax.vmap(step), S_BHKV, ops.widen(xs), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), S_BHKV
    return ops.linear_attention(*xs, S_BHKV, reset_BT, impl=impl)


def log_decays(H, depth, slopes):
    """log lambda of each head: [H]. The 1e-5 is the released code's, so that the last layer forgets a little too."""
    if slopes == "paper":
        return -8.0 * np.arange(1, H + 1) / H * (1 - depth)
    # ALiBi's: where H is no power of 2, those of the power below it, then every other one of twice that power.
    power = 1 << (H.bit_length() - 1)
    below, above = np.arange(1, power + 1) / power, np.arange(1, 2 * power, 2) / (2 * power)
    return -(2.0 ** (-8 * np.concatenate([below, above])[:H])) * (1 - depth + 1e-5)
