"""Lattice: a few slots of length 1, each of which takes of what is told only what is orthogonal to what it holds.

    e_t = v_t - S_{t-1} k_t                                     what is not known yet; s_i are the columns of S
    s_i <- s_i + beta_t k_ti (I - s_i s_i') e_t, and to length 1
    y_t = S_t q_t                                               beta_t = sigmoid(w x_t + b), one for each head

The change is -beta_t times the gradient of |phi(S) k_t - v_t|^2 / 2 in s_i, phi(s) = s / |s|.

Source: Karami, Pascanu, Mirrokni, "Lattice: Learning to Efficiently Compress the Memory" (2025), arXiv:2504.05646, the
orthogonal state recurrence of the decoding loss, and its proposition that this is descent on spheres.
Differs: slots are brought back to length 1 with each token, as that proposition has it, so that there is nothing for a
gate that scales them to do; gradients are those of each token, and not of a chunk's first, which the paper trains with;
q and k have length 1, as elsewhere; heads. S_0 is learned; the state is how S differs from it.

Dims: B batch, T time, D width, H heads, M slots, V value, E = H (2 M + V), W width of the convolution, P = W - 1 past
tokens.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.initial import within


class State(NamedTuple):
    S_BHVM: jax.Array  # less S_0
    past_BPE: jax.Array


def slots(S_VM):
    """Columns of length 1."""
    return S_VM * lax.rsqrt(jnp.sum(S_VM**2, axis=0))


def change(S_VM, k_M, v_V):
    """What a step of 1 adds to slots of length 1: orthogonal to each of them."""
    e_V = v_V - S_VM @ k_M
    return (e_V[:, None] - S_VM * (e_V @ S_VM)) * k_M


def step(S0_VM, S_VM, q_M, k_M, v_V, beta):
    """One token, one head. This is the definition."""
    S_VM = slots(S0_VM + S_VM)
    S_VM = slots(S_VM + beta * change(S_VM, k_M, v_V))
    return S_VM - S0_VM, S_VM @ q_M


class Lattice(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for inputs, state or resets that do not fit, width not divisible by heads.
    """

    width: int
    heads: int = 4
    slots: int | None = None  # of a head, as many as keys have channels; width // heads
    value_dim: int | None = None  # of a head; width // heads
    conv_width: int = 4
    impl: str = "auto"  # 'scan'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """H, M, V, P"""
        M, V = self.slots, self.value_dim
        if M is None or V is None:
            share = contract.divisible("width", self.width, "heads", self.heads)
            M, V = share if M is None else M, share if V is None else V
        contract.positive(width=self.width, heads=self.heads, slots=M, value_dim=V, conv_width=self.conv_width)
        if V == 1:
            raise ValueError("value_dim: expected an integer >= 2, as nothing is orthogonal to a slot of 1, got 1")
        return self.heads, M, V, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        (H, M, V, P), wide = self.sizes(), contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, H, V, M), wide), jnp.zeros((batch, P, H * (2 * M + V)), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        check_impl("lattice", self.impl, ("scan",))
        (H, M, V, P), (B, T, D), wide = self.sizes(), x_BTD.shape, contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}

        f_WE = self.param("conv", within((P + 1) ** -0.5), (P + 1, H * (2 * M + V)), self.param_dtype)
        qkv_BTE = nn.Dense(H * (2 * M + V), name="qkv", **kinds)(x_BTD)
        qkv_BTE, past_BPE = ops.short_conv(qkv_BTE, f_WE, state.past_BPE, reset_BT)
        qkv_BTHE = nn.silu(qkv_BTE).reshape(B, T, H, 2 * M + V)
        q_BTHM, k_BTHM, v_BTHV = jnp.split(qkv_BTHE, [M, 2 * M], axis=-1)
        beta_BTH = nn.sigmoid(nn.Dense(H, name="beta", **gates)(x_BTD))

        S0_HVM = self.param("slots", on_spheres, (H, V, M), self.param_dtype).astype(wide)
        S0_HVM = jax.vmap(slots)(S0_HVM)
        each_head = lambda S_HVM, *token: jax.vmap(step)(S0_HVM, S_HVM, *token)
        told = ops.widen((ops.unit(q_BTHM), ops.unit(k_BTHM), v_BTHV, beta_BTH))
        y_BTHV, S_BHVM = ops.recur(each_head, state.S_BHVM, told, reset_BT)

        gate_BTHV = nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD)
        y_BTHV = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y_BTHV) * nn.silu(gate_BTHV)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), State(S_BHVM, past_BPE)


def on_spheres(key, shape, dtype=float):
    """Columns uniform on the sphere."""
    return jax.vmap(slots)(jax.random.normal(key, shape, dtype))
