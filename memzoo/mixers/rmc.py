"""RMC, the relational memory core: slots of memory that attend to one another and to the token, behind an LSTM's gates.

    A = LN(R + MHA(R)), R = [M_{t-1}; e_t], e_t = W x_t + b             q, k, v = LN(W R + b) of all rows together
    C = LN(A + MLP(A)), without the row of the token                    MLP(A) = W relu(W A + b) + b, row by row
    i, f = sigmoid(W e_t + U tanh(M_{t-1}) + b)                         per unit, or one of each per slot
    M_t = f M_{t-1} + i tanh(C)                                         y_t = W_out vec(M_t)

Slot n of M_0 is the n-th unit vector, so that slots differ from the start.

Source: Santoro, Faulkner, Raposo, Rae, Chrzanowski, Weber, Wierstra, Vinyals, Pascanu, Lillicrap, "Relational recurrent
neural networks" (2018), arXiv:1806.01822, sec. 3, in the form, with the norms and the initial weights of its released
code, which has no output gate: tanh(M) is what the gates see.
Differs: every block of attention has an MLP of its own, where the code shares it. y is a projection of the memory, so
that width and memory are free. There is no form `newton`: as initialised the recurrence is expanding, and for 256
tokens (4 slots of 16 numbers) it would take 229 iterations, or 184 with the diagonal of its Jacobian.

Dims: B batch, T time, D width, N slots, L = N + 1 rows, H heads, K key, V value, E = H V numbers of a slot, G = 2 E
gates, or 2, in the order i, f, Q = H (2 K + V) for q, k, v of each head.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.checks import check_impl

GATES = ("unit", "memory")


class State(NamedTuple):
    M_BNE: jax.Array


class Weights(NamedTuple):
    """Of one block of attention; scale and bias of norms in two rows."""

    qkv_EQ: jax.Array
    bias_Q: jax.Array
    norm_2Q: jax.Array
    W_1_EE: jax.Array
    b_1_E: jax.Array
    W_2_EE: jax.Array
    b_2_E: jax.Array
    attended_2E: jax.Array
    out_2E: jax.Array


def step(M_NE, e_E, a_G, U_EG, blocks, heads):
    """One token; a = W e + b. This is the definition; every faster form is tested against it."""
    rows_LE = jnp.concatenate([M_NE, e_E[None]])
    for w in blocks:
        A_LE = norm(rows_LE + attention(rows_LE, w, heads), w.attended_2E)
        rows_LE = norm(A_LE + nn.relu(A_LE @ w.W_1_EE + w.b_1_E) @ w.W_2_EE + w.b_2_E, w.out_2E)
    i, f = jnp.split(nn.sigmoid(a_G + jnp.tanh(M_NE) @ U_EG), 2, axis=-1)
    return f * M_NE + i * jnp.tanh(rows_LE[:-1])


def attention(rows_LE, w, heads):
    V = rows_LE.shape[-1] // heads
    qkv_LHQ = norm(rows_LE @ w.qkv_EQ + w.bias_Q, w.norm_2Q).reshape(len(rows_LE), heads, -1)
    K = (qkv_LHQ.shape[-1] - V) // 2
    q_LHK, k_LHK, v_LHV = jnp.split(qkv_LHQ, [K, 2 * K], axis=-1)
    weights_HLM = nn.softmax(jnp.einsum("lhk,mhk->hlm", q_LHK * K**-0.5, k_LHK))
    return jnp.einsum("hlm,mhv->lhv", weights_HLM, v_LHV).reshape(rows_LE.shape)


def norm(x, scale_bias):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return scale_bias[0] * centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) + scale_bias[1]


class RMC(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for a width that heads do not divide, an unknown kind of gates, and for inputs, state or
    resets that do not fit.
    """

    width: int
    slots: int = 4  # N; the paper's sizes differ from task to task
    heads: int = 4
    key_dim: int | None = None  # per head; as value_dim
    value_dim: int | None = None  # per head; width / heads
    blocks: int = 1  # of attention and MLP, one after the other in each token
    gates: str = "unit"  # one per number of a slot; or "memory", one per slot
    input_bias: float = 0.0  # of the gates at the start
    forget_bias: float = 1.0
    impl: str = "auto"  # 'scan'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """(N, H, K, V)"""
        contract.positive(width=self.width, slots=self.slots, heads=self.heads, blocks=self.blocks)
        V = self.value_dim
        V = contract.divisible("width", self.width, "heads", self.heads) if V is None else V
        K = V if self.key_dim is None else self.key_dim
        contract.positive(value_dim=V, key_dim=K)
        check_impl("rmc", self.impl, ("scan",))
        if self.gates not in GATES:
            raise ValueError(f"gates: unknown kind {self.gates!r}; {contract.nearest(str(self.gates), GATES)}")
        return self.slots, self.heads, K, V

    def initial_state(self, batch: int) -> State:
        N, H, _, V = self.sizes()
        return State(jnp.broadcast_to(jnp.eye(N, H * V, dtype=contract.state_dtype(self.dtype)), (batch, N, H * V)))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (_, H, K, V), D, wide = self.sizes(), self.width, contract.state_dtype(self.dtype)
        E, Q, G = H * V, H * (2 * K + V), 2 * H * V if self.gates == "unit" else 2

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype).astype(wide)

        def block(r):
            shapes = ((E, Q), (Q,), (2, Q), (E, E), (E,), (E, E), (E,), (2, E), (2, E))
            inits = (weights, nothing, identity, weights, nothing, weights, nothing, identity, identity)
            names = ("qkv", "qkv_bias", "qkv_norm", "W_1", "b_1", "W_2", "b_2", "attended_norm", "out_norm")
            return Weights(*(param(f"{n}_{r}", i, *s) for n, i, s in zip(names, inits, shapes, strict=True)))

        dot = partial(lax.dot_general, preferred_element_type=wide)
        kinds: dict[str, Any] = {"kernel_init": weights, "dtype": self.dtype, "param_dtype": self.param_dtype}
        e_BTE = nn.Dense(E, name="in", dot_general=dot, **kinds)(x_BTD).astype(wide)
        b_G = param("gates_bias", halves(self.input_bias, self.forget_bias), G)
        a_BTG = jnp.einsum("bte,eg->btg", e_BTE, param("gates_in", weights, E, G), precision="highest") + b_G
        U_EG = param("gates_memory", weights, E, G)
        blocks = tuple(map(block, range(self.blocks)))

        M_BTNE, M_BNE = relational_memory(e_BTE, a_BTG, U_EG, blocks, H, state.M_BNE, reset_BT)
        out = nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="out", **kinds)
        return out(M_BTNE), State(M_BNE)


def relational_memory(e_BTE, a_BTG, U_EG, blocks, heads, M_BNE, reset_BT=None):
    """All T tokens. Returns (M_BTNE, M_BNE)."""
    begin_NE = jnp.eye(*M_BNE.shape[1:], dtype=M_BNE.dtype)

    def token(M_NE, e_E, a_G, fresh):
        M_NE = step(jnp.where(fresh, begin_NE, M_NE), e_E, a_G, U_EG, blocks, heads)
        return M_NE, M_NE

    fresh_BT = jnp.zeros(e_BTE.shape[:2], bool) if reset_BT is None else reset_BT
    return ops.recur(token, M_BNE, (e_BTE, a_BTG, fresh_BT), reset_BT)


nothing = nn.initializers.zeros


def weights(key, shape, dtype=float):
    """Normal with deviation 1 / sqrt(inputs), truncated at two of them."""
    return nn.initializers.truncated_normal(shape[0] ** -0.5)(key, shape, dtype)


def identity(key, shape, dtype=float):
    """Of a norm: scale 1 and bias 0."""
    return jnp.stack([jnp.ones(shape[1:], dtype), jnp.zeros(shape[1:], dtype)])


def halves(first, second):
    return lambda key, shape, dtype=float: jnp.repeat(jnp.asarray((first, second), dtype), shape[0] // 2)
