"""JRT-RNN: Based's linear attention, whose prefix is read twice: once by keys of its own, and by all of it at once.

    S_t = S_{t-1} + phi(k_t) v_t' + [t < M] phi(k~_t) v~_t'        z_t likewise, of phi(k_t) and phi(k~_t)
    y_t = (S_t + A_t)' phi(q_t) / (z_t + a_t)' phi(q_t)            phi(q)' phi(k) = 1 + x + x^2 / 2,  x = q' k / sqrt(K)
    A_t = sum over t < j < M of phi(k~_j) v~_j'                    a_t likewise: with `look_ahead`, otherwise 0

The first M tokens of a text are its prefix. With `look_ahead` each of them reads all of it, by k~ and v~, and what
came before in it, by k and v. After them A_t is 0, and there is one state, of the size that it has in Based.

Source: Arora, Timalsina, Singhal, Spector, Eyuboglu, Zhao, Rao, Rudra, Ré, "Just read twice: closing the recall gap for
recurrent language models" (2024), arXiv:2407.05483, prefix linear attention; sizes and initial values from the released
code (HazyResearch/prefix-linear-attention).
Differs: `look_ahead` is off unless asked for, so that this is causal, and a loss on every token means what it says: the
paper's is on tokens after the prefix, and on masked ones in it. Either way the layer's state after the prefix is the
same, and so is what it makes of later tokens. A prefix token looks ahead as far as its call and its text go: the prefix
should come in one call. One shorter than M is ended by n_B = M, between calls alone; rows may differ, and a state with
n_B = M - m ends each row's after its own m tokens, within a call too. In one call without that all texts have a prefix
of M tokens: where the real one is shorter, `look_ahead` shows tokens of the answer the later ones that they are to
predict. So for training, `prefix` is that of `memzoo.tasks.prompts.masked_prefix`. Without a prefix this is Based.

Dims: B batch, T time, D width, H heads, K key, V value, E features of a key, M tokens of the prefix.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memzoo import contract, ops
from memzoo.ops import rotary, taylor
from memzoo.ops.look_ahead import backwards
from memzoo.ops.taylor import FLOOR, phi


class State(NamedTuple):
    S_BHEV: jax.Array
    z_BHE: jax.Array
    n_B: jax.Array  # int32, tokens of the prefix so far


def step(memory, q_K, *writes):
    """One token, one head: both sides of the fraction. This is the definition; every faster form is tested against it.

    writes: (k_K, v_V, whether it is written), of the token itself, then of it as one of the prefix.
    """
    S_EV, z_E = memory
    for k_K, v_V, on in writes:
        S_EV = jnp.where(on, S_EV + jnp.outer(phi(k_K), v_V), S_EV)
        z_E = jnp.where(on, z_E + phi(k_K), z_E)
    return (S_EV, z_E), (phi(q_K) @ S_EV, phi(q_K) @ z_E)


class JRT(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is, and an int32 counter.

    Raises ValueError, by name, for fields out of their range, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int | None = None  # of 64 channels, or of the largest divisor of 64 that also divides width
    feature_dim: int = 16  # K, per head
    value_dim: int | None = None  # per head; width / heads
    prefix: int = 1024  # M, half of the texts that the paper trains on
    look_ahead: bool = False  # within the prefix, as in the paper
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V)"""
        contract.positive(width=self.width, feature_dim=self.feature_dim)
        H = self.width // math.gcd(64, self.width) if self.heads is None else self.heads
        per_head = contract.divisible("width", self.width, "heads", H)
        V = self.value_dim if self.value_dim is not None else per_head
        contract.positive(value_dim=V)
        if not contract.whole_number(self.prefix) or not 0 <= self.prefix < 2**30:
            raise ValueError(f"prefix: expected an integer in 0 ... 2**30 - 1, got {self.prefix!r}")
        return H, self.feature_dim, V

    def initial_state(self, batch: int) -> State:
        (H, K, V), wide = self.sizes(), contract.state_dtype(self.dtype)
        E = taylor.size(K)
        S_BHEV, z_BHE = jnp.zeros((batch, H, E, V), wide), jnp.zeros((batch, H, E), wide)
        return State(S_BHEV, z_BHE, jnp.zeros(batch, jnp.int32))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, K, V), (_, T, D) = self.sizes(), x_BTD.shape
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        q_BTHK = nn.DenseGeneral((H, K), name="q", **kinds)(x_BTD)
        n_BT = rotary.places(jnp.minimum(state.n_B, self.prefix), T, reset_BT)
        inside_BT = n_BT < self.prefix

        def write(k, v, on_BT):
            return (
                nn.DenseGeneral((H, K), name=k, **kinds)(x_BTD),
                nn.DenseGeneral((H, V), name=v, **kinds)(x_BTD),
                on_BT,
            )

        writes = [write("k", "v", jnp.ones_like(inside_BT))]
        if self.prefix:
            writes += [write("prefix_k", "prefix_v", inside_BT)]
        y_BTHV, S_BHEV, z_BHE = prefix_attention(q_BTHK, writes, state, reset_BT, self.look_ahead, self.impl)
        n_B = jnp.minimum(n_BT[:, -1] + 1, self.prefix)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), State(S_BHEV, z_BHE, n_B)


def prefix_attention(q_BTHK, writes, state, reset_BT, look_ahead=False, impl="auto"):
    """All T tokens. Returns (y_BTHV, S_BHEV, z_BHE). writes: as in `step`, the last of them the prefix's."""
    memory = state.S_BHEV, state.z_BHE
    y_BTHV, total_BTH, memory = sweep(q_BTHK, writes, memory, reset_BT, impl)
    if look_ahead and len(writes) > 1:
        reset_BT = jnp.zeros(q_BTHK.shape[:2], bool) if reset_BT is None else reset_BT
        ends_BT = jnp.pad(reset_BT[:, 1:], [(0, 0), (0, 1)], constant_values=True)
        q_BTHK, writes, reset_BT = backwards(q_BTHK, writes[1:], ends_BT)
        later_BTHV, later_BTH, _ = sweep(q_BTHK, writes, jax.tree.map(jnp.zeros_like, memory), reset_BT, impl)
        y_BTHV, total_BTH = y_BTHV + later_BTHV[:, ::-1], total_BTH + later_BTH[:, ::-1]
    return (y_BTHV / jnp.maximum(total_BTH, FLOOR)[..., None]).astype(q_BTHK.dtype), *memory


def sweep(q_BTHK, writes, memory, reset_BT, impl):
    """What each token reads of those up to it: (y_BTHV, total_BTH, memory), y not yet over its total."""
    if impl == "scan":
        heads = jax.vmap(step, in_axes=(0, 0, *[(0, 0, None)] * len(writes)))
        xs = ops.widen(q_BTHK), *((*ops.widen((k_BTHK, v_BTHV)), on_BT) for k_BTHK, v_BTHV, on_BT in writes)
        (y_BTHV, total_BTH), memory = ops.recur(heads, memory, xs, reset_BT)
        return y_BTHV, total_BTH, memory
    q_BTHE, sums = phi(ops.widen(q_BTHK)).astype(q_BTHK.dtype), None
    for k_BTHK, v_BTHV, on_BT in writes:  # memories add up, and so does what is read of them
        on_BT11 = on_BT[..., None, None]
        k_BTHE = jnp.where(on_BT11, phi(ops.widen(k_BTHK)), 0).astype(v_BTHV.dtype)
        y_and_total_and_memory = ops.normalised_linear_attention(
            q_BTHE, k_BTHE, jnp.where(on_BT11, v_BTHV, 0), None, *memory, reset_BT, impl=impl
        )
        memory = jax.tree.map(jnp.zeros_like, memory)
        sums = jax.tree.map(jnp.add, sums, y_and_total_and_memory) if sums else y_and_total_and_memory
    y_BTHV, total_BTH, *memory = sums
    return y_BTHV, total_BTH, tuple(memory)
