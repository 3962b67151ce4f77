"""Block linear attention of SANA-Video: ReLU linear attention whose tokens read what their whole block has written.

    S_b = S_{b-1} + sum over j in block b of R_j relu(k_j) v_j'        z_b = z_{b-1} + sum of relu(k_j)
    y_i = S_b' R_i relu(q_i) / z_b' relu(q_i)                          i in block b

R_i turns pairs of channels by the place of the token, above the fraction line alone, so that z' q is a sum of positive
numbers. Queries and keys pass an RMSNorm over all heads before. Blocks of one token, the default, make this causal.

Source: Chen et al., "SANA-Video: Efficient Video Generation with Block Linear Diffusion Transformer" (2025),
arXiv:2509.24695, its linear attention with ReLU before RoPE and its constant-memory cache; norms, biases, sizes and
initial values from the released code (NVlabs/Sana and its port in diffusers).
Differs: a block there is some frames of a video, and time and place in a frame turn channels of their own; here it is
`block` tokens of a text, which have one place. A token sees later ones of its block so far as they are in the same call
and before a reset, and none beyond: calls should be cut where blocks end, and one token at a time is for block = 1. The
denominator has a floor of 1, where the code adds 1e-8 to it: the few keys of a short past may have no channel in common
with the query, and, turned, have. What else the paper caches, of a convolution, belongs to its MLP.

Dims: B batch, T time, D width, H heads, K key, V value, E = 2 K + V.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops import rotary
from memzoo.ops.look_ahead import backwards

FLOOR = 1.0  # of z' q, which for one key and 112 channels is about 112 / 2 pi at the start


class State(NamedTuple):
    S_BHKV: jax.Array
    z_BHK: jax.Array
    n_B: jax.Array  # int32, tokens so far, which may wrap around: only differences are seen
    place_B: jax.Array  # int32, of the next token in its block


def step(state, q_K, k_K, turned_q_K, turned_k_K, v_V):
    """One token, one head: both sides of the fraction. This is the definition; every faster form is tested against it.

    What a token reads of the rest of its block is the same, backwards in time.
    """
    S_KV, z_K = state
    S_KV = S_KV + jnp.outer(turned_k_K, v_V)
    z_K = z_K + k_K
    return (S_KV, z_K), (turned_q_K @ S_KV, q_K @ z_K)


class BlockLinear(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is, and two int32 counters.

    Raises ValueError, by name, for fields out of their range, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int | None = None  # of 112 channels, or of the largest divisor of 112 that also divides width
    key_dim: int | None = None  # per head, even; width / heads
    value_dim: int | None = None  # per head; width / heads
    block: int = 1  # tokens that see each other
    rope_base: float = 10_000.0
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V)"""
        contract.positive(width=self.width, block=self.block)
        H = self.width // math.gcd(112, self.width) if self.heads is None else self.heads
        per_head = contract.divisible("width", self.width, "heads", H)
        K = self.key_dim if self.key_dim is not None else per_head
        V = self.value_dim if self.value_dim is not None else per_head
        contract.positive(value_dim=V)
        if not contract.whole_number(K) or K < 2 or K % 2:
            raise ValueError(f"key_dim: expected an even integer >= 2, to turn pairs, got {K!r}")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base: expected a number > 0, got {self.rope_base}")
        return H, K, V

    def initial_state(self, batch: int) -> State:
        (H, K, V), wide = self.sizes(), contract.state_dtype(self.dtype)
        S_BHKV, z_BHK = jnp.zeros((batch, H, K, V), wide), jnp.zeros((batch, H, K), wide)
        return State(S_BHKV, z_BHK, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V), (_, T, D) = self.sizes(), x_BTD.shape
        kinds: dict[str, Any] = {
            "kernel_init": nn.initializers.glorot_uniform(),
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }

        def positive(x_BTHK, name):
            over = {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)}
            return nn.relu(nn.RMSNorm(1e-5, self.dtype, self.param_dtype, name=name, **over)(x_BTHK))

        qkv_BTX = nn.Dense(H * (2 * K + V), use_bias=False, name="qkv", **kinds)(x_BTD)
        qkv_BTHE = qkv_BTX.reshape(*x_BTD.shape[:2], H, 2 * K + V)
        q_BTHK, k_BTHK, v_BTHV = jnp.split(qkv_BTHE, [K, 2 * K], axis=-1)
        q_BTHK, k_BTHK = positive(q_BTHK, "q_norm"), positive(k_BTHK, "k_norm")
        n_BT = rotary.places(state.n_B, T, reset_BT)
        place_BT = rotary.places(state.place_B, T, reset_BT) % self.block

        args = q_BTHK, k_BTHK, v_BTHV, n_BT, place_BT, state.S_BHKV, state.z_BHK, reset_BT
        y_BTHV, S_BHKV, z_BHK = block_attention(*args, self.block, self.rope_base, self.impl)
        y_BTD = nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV)
        return y_BTD, State(S_BHKV, z_BHK, n_BT[:, -1] + 1, (place_BT[:, -1] + 1) % self.block)


def block_attention(
    q_BTHK, k_BTHK, v_BTHV, n_BT, place_BT, S_BHKV, z_BHK, reset_BT, block=1, rope_base=10_000.0, impl="auto"
):
    """All T tokens. Returns (y_BTHV, S_BHKV, z_BHK). n_BT: places in the text, place_BT: in the block."""
    queries = q_BTHK, rotary.turn(q_BTHK, n_BT, rope_base)
    written = k_BTHK, rotary.turn(k_BTHK, n_BT, rope_base), v_BTHV
    y_BTHV, total_BTH, S_BHKV, z_BHK = sweep(*queries, *written, S_BHKV, z_BHK, reset_BT, impl)
    if block > 1:
        ends_BT = jnp.pad(place_BT[:, 1:] == 0, [(0, 0), (0, 1)], constant_values=True)
        queries, written, reset_BT = backwards(queries, written, ends_BT)
        later_BTHV, later_BTH, _, _ = sweep(
            *queries, *written, jnp.zeros_like(S_BHKV), jnp.zeros_like(z_BHK), reset_BT, impl
        )
        y_BTHV, total_BTH = y_BTHV + later_BTHV[:, ::-1], total_BTH + later_BTH[:, ::-1]
    return (y_BTHV / jnp.maximum(total_BTH, FLOOR)[..., None]).astype(v_BTHV.dtype), S_BHKV, z_BHK


def sweep(q_BTHK, turned_q_BTHK, k_BTHK, turned_k_BTHK, v_BTHV, S_BHKV, z_BHK, reset_BT, impl):
    """What each token reads of those up to it: (y_BTHV, total_BTH, S_BHKV, z_BHK), y not yet over its total."""
    if impl == "scan":
        xs = ops.widen((q_BTHK, k_BTHK, turned_q_BTHK, turned_k_BTHK, v_BTHV))
        (y_BTHV, total_BTH), (S_BHKV, z_BHK) = ops.recur(jax.vmap(step), (S_BHKV, z_BHK), xs, reset_BT)
        return y_BTHV, total_BTH, S_BHKV, z_BHK
    y_BTHV, S_BHKV = ops.linear_attention(turned_q_BTHK, turned_k_BTHK, v_BTHV, None, S_BHKV, reset_BT, impl=impl)
    one_BTH1 = jnp.ones((*q_BTHK.shape[:3], 1), z_BHK.dtype)  # z is the memory of a value that is always 1
    total_BTH1, z_BHK1 = ops.linear_attention(q_BTHK, k_BTHK, one_BTH1, None, z_BHK[..., None], reset_BT, impl=impl)
    return y_BTHV, total_BTH1[..., 0], S_BHKV, z_BHK1[..., 0]
