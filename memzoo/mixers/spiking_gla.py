"""SpikingBrain's layer: gated linear attention, a softmax window beside it, and projections of spikes.

    c = round(x / h)        h = mean |x| / f           each projection of x takes h c, with the gradient of x
    S_t = diag(a_t) S_{t-1} + relu(k_t) v_t'           a_t = sigmoid(W2 W1 x_t + b)^(1 / tau)
    y_t = W (norm(S_t' relu(q_t) / sqrt(K)) + norm(softmax(q~_t' K~_t / sqrt(K)) V~_t))

c counts spikes: `ops.spikes` expands it over virtual time to steps of -1, 0 and 1, whose weighted sum is c exactly, so
that a projection of them needs no products. K~_t and V~_t are of the last `window` tokens, with projections of their
own and rotary places; without a window, the default, their term is left out.

Source: Pan et al., "SpikingBrain: Spiking Brain-inspired Large Models" (2025), arXiv:2509.05276, eq. 6, 10-11, 19, 21
and 22, and the released code of its 7B model (BICLab/SpikingBrain-7B): biases, initial values, tau = 16, gates of rank
16 and f = 3.
Differs: the 7B model has windows of 4,096 tokens in every other layer, in place of the memory; both in one layer, as
here, is its 76B model, whose gates are 1 - k, whose q and k are sigmoids, and which has 128 learned sink tokens. The
weights w of eq. 6 are those of the two norms. Weights and window are not quantised. The straight-through gradient is
ours: the released code spikes after training alone. Its gate is then one matrix; here it is two, of which the second
sees numbers. Spikes make steps, where bfloat16 may round to another count: at width 32 outputs differ from those of
float32 by 7% in the root mean square, without spikes by 0.6%.

Dims: B batch, T time, D width, H heads, G key heads, R = H / G queries per key head, K key and V value (both head_dim),
      W window, X any one axis of channels.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops import spikes
from memzoo.ops.checks import check_impl
from memzoo.ops.window_attention import Cache, empty_cache


class State(NamedTuple):
    S_BGKV: jax.Array
    near: Cache | None  # the window, where there is one


def step(S_KV, q_RK, k_K, v_V, log_a_K):
    """One token, one key head and its queries. This is the memory's definition; `ops.window_attention` has its own."""
    S_KV = jnp.exp(log_a_K)[:, None] * S_KV + jnp.outer(k_K, v_V)
    return S_KV, q_RK @ S_KV


class SpikingGLA(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    The spike counts of the two codings, of the input and before the last projection, are sown as intermediates.
    Raises ValueError, by name, for fields out of their range, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    key_heads: int | None = None  # as many as heads; fewer are shared
    head_dim: int | None = None  # width / heads
    window: int = 0  # tokens, or none
    gate_rank: int = 16
    gate_temperature: float = 16.0  # tau: the larger, the slower the memory forgets
    spiking: bool = True
    firing_rate: float = 3.0  # f: the larger, the more spikes
    rope_base: float = 1e6
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(G, R, K)"""
        contract.positive(heads=self.heads, gate_rank=self.gate_rank)
        G = self.heads if self.key_heads is None else self.key_heads
        R = contract.divisible("heads", self.heads, "key_heads", G)
        K = self.head_dim
        if K is None:
            K = contract.divisible("width", self.width, "heads", self.heads)
        contract.positive(head_dim=K)
        if not contract.whole_number(self.window) or self.window < 0:
            raise ValueError(f"window: expected an integer >= 0, got {self.window!r}")
        if self.window and K % 2:
            raise ValueError(f"head_dim: expected an even integer >= 2, to rotate pairs in the window, got {K}")
        for name in ("gate_temperature", "firing_rate", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        return G, R, K

    def initial_state(self, batch: int) -> State:
        (G, _, K), wide = self.sizes(), contract.state_dtype(self.dtype)
        near = empty_cache(batch, G, self.window, K, K, wide) if self.window else None
        return State(jnp.zeros((batch, G, K, K), wide), near)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        check_impl("spiking_gla", self.impl, ("scan", "chunk"))
        fresh = state is None
        state = contract.begin(self, x_BTD, state, reset_BT)
        (G, R, K), (B, T, D) = self.sizes(), x_BTD.shape
        impl = self.impl if self.impl != "auto" else "chunk" if T > 1 else "scan"
        kernel: dict[str, Any] = {"kernel_init": nn.initializers.variance_scaling(2**-5, "fan_avg", "uniform")}
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, **kernel}
        gates: dict[str, Any] = {**kinds, "dtype": contract.state_dtype(self.dtype)}

        x_BTD = self.coded(x_BTD.astype(self.dtype), "x")

        def heads(prefix=""):
            q_BTHK = nn.DenseGeneral((G * R, K), name=f"{prefix}q", **kinds)(x_BTD)
            k_BTGK, v_BTGV = (nn.DenseGeneral((G, K), name=prefix + name, **kinds)(x_BTD) for name in "kv")
            return q_BTHK.reshape(B, T, G, R, K), k_BTGK, v_BTGV

        def norm(y_BTGRV, name):
            y_BTHV = y_BTGRV.astype(self.dtype).reshape(B, T, G * R, K)
            return nn.RMSNorm(1e-6, self.dtype, self.param_dtype, name=name)(y_BTHV)

        q_BTGRK, k_BTGK, v_BTGV = heads()
        low_BTX = nn.Dense(self.gate_rank, use_bias=False, name="gate_in", **gates)(x_BTD)
        gate_BTGK = nn.DenseGeneral((G, K), name="gate_out", **gates)(low_BTX)
        log_a_BTGK = nn.log_sigmoid(gate_BTGK) / self.gate_temperature
        args = nn.relu(q_BTGRK) * K**-0.5, nn.relu(k_BTGK), v_BTGV, log_a_BTGK
        y_BTGRV, S_BGKV = gated_memory(*args, state.S_BGKV, reset_BT, impl)
        y_BTHV, near = norm(y_BTGRV, "norm"), None
        if state.near is not None:
            q_BTGRK, k_BTGK, v_BTGV = heads("near_")
            places: dict[str, Any] = {"rope_base": self.rope_base, "fresh": fresh, "impl": impl}
            near_BTGRV, near = ops.window_attention(q_BTGRK, k_BTGK, v_BTGV, state.near, reset_BT, **places)
            y_BTHV = y_BTHV + norm(near_BTGRV, "near_norm")
        y_BTX = self.coded(y_BTHV.reshape(B, T, -1), "y")
        return nn.Dense(D, use_bias=False, name="out", **kinds)(y_BTX), State(S_BGKV, near)

    def coded(self, x_BTX, name):
        """Also tells how many spikes that took, to whoever asks."""
        if not self.spiking:
            return x_BTX
        self.sow("intermediates", f"{name}_count", spikes.count(jax.lax.stop_gradient(x_BTX), self.firing_rate)[0])
        return spikes.spiked(x_BTX, self.firing_rate)


def gated_memory(q_BTGRK, k_BTGK, v_BTGV, log_a_BTGK, S_BGKV, reset_BT, impl="chunk"):
    """All T tokens. Returns (y_BTGRV, S_BGKV)."""
    if impl == "scan":
        y_BTGRV, S_BGKV = ops.recur(jax.vmap(step), S_BGKV, ops.widen((q_BTGRK, k_BTGK, v_BTGV, log_a_BTGK)), reset_BT)
        return y_BTGRV.astype(v_BTGV.dtype), S_BGKV
    B, T, G, R, K = q_BTGRK.shape
    to_heads = lambda x_BTGX: jnp.repeat(x_BTGX, R, axis=2)  # of one key head all queries read the same memory
    k_BTHK, v_BTHV, log_a_BTHK = map(to_heads, (k_BTGK, v_BTGV, log_a_BTGK))
    y_BTHV, S_BHKV = ops.linear_attention(
        q_BTGRK.reshape(B, T, G * R, K), k_BTHK, v_BTHV, log_a_BTHK, jnp.repeat(S_BGKV, R, axis=1), reset_BT, impl=impl
    )
    return y_BTHV.reshape(B, T, G, R, K), S_BHKV[:, ::R]
