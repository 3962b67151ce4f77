"""Lightning Attention as in TransNormerLLM: linear attention whose heads forget at fixed rates, then a norm and a gate.

    S_t = lambda S_{t-1} + k_t v_t'        y_t = W_o (SRMSNorm(S_t' q_t) u_t)        SRMSNorm(x) = sqrt(d) x / |x|
    q, k = silu(W x), silu(W x)            v, u = W x, W x                each its own W; the norm is over all heads
    with LRPE, in the model's first layer: S_t = lambda diag(exp(i theta)) S_{t-1} + k_t v_t'        Re(S_t' q_t)

Source: Qin, Sun, Li, Shen, Sun, Zhong, "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning
Attention" (2024), arXiv:2405.17381, eq. 4, 9-11 and 14, after "Lightning Attention-2: A Free Lunch for Handling
Unlimited Sequence Lengths in Large Language Models" (2024), arXiv:2401.04658, and "TransNormerLLM: A Faster and Better
Large Language Model with Improved TransNormer" (2023), arXiv:2307.14995. Its tiling is the chunk form.
Differs: lambda = exp(-slope (1 - depth)) has the slopes of the released models, ALiBi's 2^(-8 h / H) for h = 1 ... H;
eq. 10 has 8 h / H, which leaves 3e-4 of a token to the next one where h = H: `slopes="paper"`. LRPE turns the memory,
where the released code turns q and k, each by its place in the text: the same function, eq. 9, without places. In
float32 a memory of n steps has been multiplied by n rounded turns: the forms differ by 1e-5 after some 256 steps, and
by 1e-4 after 4,096 where little is forgotten (`depth` near 1).

Dims: B batch, T time, D width, H heads, K key, V value, P = 2 K, real parts and imaginary ones.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo import contract, ops

SLOPES = ("released", "paper")


class State(NamedTuple):
    S_BHKV: jax.Array  # complex with LRPE


def step(S_KV, q_K, k_K, v_V, log_lambda_K):
    """One token, one head. This is the definition; every faster form is tested against it.

    log_lambda_K: log lambda, the same for all keys, and with LRPE log lambda + i theta.
    """
    S_KV = jnp.exp(log_lambda_K)[:, None] * S_KV + jnp.outer(k_K, v_V)
    return S_KV, (q_K @ S_KV).real


class Lightning(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, complex64 with LRPE, or twice as wide when `dtype` is float64.

    Raises ValueError, by name, for a width that heads do not divide, a depth outside of [0, 1], unknown slopes, and for
    inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 8
    key_dim: int | None = None  # per head; width / heads
    value_dim: int | None = None  # per head; width / heads
    depth: float = 0.0  # l / (layers - 1): 0 for the first layer, 1 for the last, which hardly forgets
    slopes: str = "released"  # or "paper"
    lrpe: bool = False  # learned rotations; TransNormerLLM's first layer has them
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
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, *self.sizes()), jnp.result_type(wide, jnp.complex64) if self.lrpe else wide))

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
        wide = contract.state_dtype(self.dtype)
        log_lambda_H = jnp.asarray(log_decays(H, self.depth, self.slopes), wide)
        theta_HK = self.param("theta", frequencies, (H, K), self.param_dtype).astype(wide) if self.lrpe else None

        xs = q_BTHK, k_BTHK, v_BTHV, log_lambda_H
        y_BTHV, S_BHKV = lightning_attention(*xs, state.S_BHKV, reset_BT, self.impl, theta_HK)

        u_BTHV = nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD)
        y_BTHV = nn.RMSNorm(use_scale=False, reduction_axes=(-2, -1), dtype=self.dtype, name="norm")(y_BTHV) * u_BTHV
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), State(S_BHKV)


def lightning_attention(q_BTHK, k_BTHK, v_BTHV, log_lambda_H, S_BHKV, reset_BT, impl="auto", theta_HK=None):
    """All T tokens. Returns (y_BTHV, S_BHKV)."""
    T = q_BTHK.shape[1]
    if impl == "scan":
        log_lambda_HK = jnp.broadcast_to(log_lambda_H[:, None], q_BTHK.shape[2:])
        if theta_HK is not None:
            log_lambda_HK = log_lambda_HK + 1j * angles(theta_HK, 1)
        xs = q_BTHK, k_BTHK, v_BTHV, jnp.broadcast_to(log_lambda_HK, q_BTHK.shape)
        y_BTHV, S_BHKV = ops.recur(jax.vmap(step), S_BHKV, ops.widen(xs), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), S_BHKV
    log_lambda_BTH = jnp.broadcast_to(log_lambda_H, q_BTHK.shape[:3])
    if theta_HK is None:
        return ops.linear_attention(q_BTHK, k_BTHK, v_BTHV, log_lambda_BTH, S_BHKV, reset_BT, impl=impl)

    # Re exp(i theta (t - s)) is a product of what t has and what s has. Both count from the call's first token, and S
    # is kept as it was there: what a memory of such keys is short of, in the end, are the T turns since.
    angle_THK = angles(theta_HK, jnp.arange(1, T + 1)[:, None, None])
    cos_THK, sin_THK = jnp.cos(angle_THK), jnp.sin(angle_THK)
    both = lambda x_BTHK: jnp.concatenate([x_BTHK * cos_THK, x_BTHK * sin_THK], axis=-1).astype(x_BTHK.dtype)
    S_BHPV = jnp.concatenate([S_BHKV.real, -S_BHKV.imag], axis=2)
    xs = both(q_BTHK), both(k_BTHK), v_BTHV, log_lambda_BTH
    y_BTHV, S_BHPV = ops.linear_attention(*xs, S_BHPV, reset_BT, impl=impl)
    real_BHKV, imag_BHKV = jnp.split(S_BHPV, 2, axis=2)
    return y_BTHV, (real_BHKV - 1j * imag_BHKV) * (cos_THK[-1] + 1j * sin_THK[-1])[..., None]


def angles(theta_HK, n):
    """n theta less whole turns, n an integer. Most of it is counted, 2^32 to the turn, so that no n is too large."""
    n = jnp.asarray(n, jnp.int32)  # n times the count wraps, at whole turns, where 64 bits would be rounded to a float
    turn_HK = lax.stop_gradient(theta_HK) / (2 * np.pi)
    part_HK = (turn_HK - jnp.round(turn_HK)) * 2**16
    high_HK = jnp.round(part_HK)
    low_HK = (part_HK - high_HK) * 2**16
    count_HK = high_HK.astype(jnp.int32) * 2**16 + jnp.round(low_HK).astype(jnp.int32)  # may wrap: the same angle
    counted = (n * count_HK).astype(theta_HK.dtype) * (2 * np.pi / 2**32)
    rest_HK = (low_HK - jnp.round(low_HK)) * (2 * np.pi / 2**32)
    return counted + n * (rest_HK + theta_HK - lax.stop_gradient(theta_HK))  # the gradient is n


def frequencies(key, shape, dtype=float):
    """From 1 to almost 10000^-2, over the channels of all heads."""
    n = math.prod(shape)
    return jnp.asarray(10_000.0 ** (-2 * np.arange(n) / n), dtype).reshape(shape)  # bfloat16 counts to 256


def log_decays(H, depth, slopes):
    """log lambda of each head: [H]. The 1e-5 is the released code's, so that the last layer forgets a little too."""
    if slopes == "paper":
        return -8.0 * np.arange(1, H + 1) / H * (1 - depth)
    # ALiBi's: where H is no power of 2, those of the power below it, then every other one of twice that power.
    power = 1 << (H.bit_length() - 1)
    below, above = np.arange(1, power + 1) / power, np.arange(1, 2 * power, 2) / (2 * power)
    return -(2.0 ** (-8 * np.concatenate([below, above])[:H])) * (1 - depth + 1e-5)
