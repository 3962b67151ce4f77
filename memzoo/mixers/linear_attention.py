"""Linear attention: a matrix memory under positive keys, and the normaliser that makes reading an average.

    S_t = S_{t-1} + phi(k_t) v_t'        z_t = z_{t-1} + phi(k_t)        y_t = S_t' phi(q_t) / z_t' phi(q_t)

Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: Fast Autoregressive Transformers with Linear
Attention" (2020), arXiv:2006.16236, eq. 16-20; phi(x) = elu(x) + 1, eq. 7.
Differs: the denominator has a floor of 1e-18, where the released code adds 1e-6 to it.

Dims: B batch, T time, D width, H heads, K key, V value, E = 2 K + V.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops

FLOOR = 1e-18  # of the denominator: its square, which the gradient divides by, is still a float32


class State(NamedTuple):
    S_BHKV: jax.Array
    z_BHK: jax.Array


@jax.custom_jvp
def phi(x):
    """elu(x) + 1, and positive where that would round to 0."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


@phi.defjvp
def phi_jvp(x, dx):
    """phi' = min(phi, 1): so the gradient needs phi alone, which is kept anyway."""
    y = phi(*x)
    return y, jnp.minimum(y, 1) * dx[0]


def step(state, q_K, k_K, v_V):
    """One token, one head. This is the definition; every faster form is tested against it."""
    S_KV, z_K = state
    S_KV = S_KV + jnp.outer(phi(k_K), v_V)
    z_K = z_K + phi(k_K)
    return State(S_KV, z_K), phi(q_K) @ S_KV / jnp.maximum(phi(q_K) @ z_K, FLOOR)


class LinearAttention(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None  # per head; width / heads
    value_dim: int | None = None  # per head; width / heads
    impl: str = "auto"  # 'scan', 'associative', 'chunk', 'pallas'
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
        H, K, V = self.sizes()
        wide = contract.state_dtype(self.dtype)
        return State(jnp.zeros((batch, H, K, V), wide), jnp.zeros((batch, H, K), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V), D = self.sizes(), self.width
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        qkv_BTHE = nn.DenseGeneral((H, 2 * K + V), name="qkv", **kinds)(x_BTD)
        q_BTHK, k_BTHK, v_BTHV = jnp.split(qkv_BTHE, [K, 2 * K], axis=-1)
        y_BTHV, state = linear_attention(q_BTHK, k_BTHK, v_BTHV, state, reset_BT, self.impl)
        y_BTD = nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV)
        return y_BTD, state


def linear_attention(q_BTHK, k_BTHK, v_BTHV, state, reset_BT, impl="auto"):
    """All T tokens. Returns (y_BTHV, State)."""
    xs = q_BTHK, k_BTHK, v_BTHV
    if impl == "scan":
        y_BTHV, state = ops.recur(jax.vmap(step), state, ops.widen(xs), reset_BT)
        return y_BTHV.astype(v_BTHV.dtype), state
    q_BTHK, k_BTHK = (phi(x).astype(v_BTHV.dtype) for x in ops.widen((q_BTHK, k_BTHK)))
    y_BTHV, total_BTH, *state = ops.normalised_linear_attention(
        q_BTHK, k_BTHK, v_BTHV, None, *state, reset_BT, impl=impl
    )
    return (y_BTHV / jnp.maximum(total_BTH, FLOOR)[..., None]).astype(v_BTHV.dtype), State(*state)
