"""Lattice: a few slots of length 1, each of which takes of what is told only what is orthogonal to what it holds.

    e_t = v_t - S k_t                               what is not known yet; columns s_i are slots as the chunk began
    u_i <- u_i + beta_t k_ti (I - s_i s_i') e_t     what the chunk adds to them; beta_t = sigmoid(w x_t + b)
    y_t = slots(S + U) q_t                          columns brought to length 1
    S <- slots(S + U), U <- 0                       with the chunk's last token

The change is -beta_t times the gradient of |slots(S) k_t - v_t|^2 / 2 in s_i. With chunk = 1 it is that of each token.

Source: Karami, Pascanu, Mirrokni, "Lattice: Learning to Efficiently Compress the Memory" (2025), arXiv:2504.05646, the
orthogonal state recurrence of the decoding loss, its proposition that this is descent on spheres, and that training
takes all gradients of a chunk at its beginning.
Differs: slots are brought back to length 1, as that proposition has it, so that there is nothing for a gate that scales
them to do; q and k have length 1, as elsewhere; heads, of which each has its beta. S_0 is learned; the state is how S
differs from it.

Dims: B batch, T time, D width, H heads, M slots, V value, E = H (2 M + V), W width of the convolution, P = W - 1 past
tokens, C chunk, N blocks of C tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.initial import within
from memzoo.ops.memory_anchors import cut, mark
from memzoo.ops.rotary import places


class Memory(NamedTuple):
    """Zeros at the start of a sequence."""

    S_BHVM: jax.Array  # as the chunk began, less S_0
    U_BHVM: jax.Array  # what the chunk has added
    place_B: jax.Array  # int32, tokens of the chunk that have been


class State(NamedTuple):
    memory: Memory
    past_BPE: jax.Array


def slots(S_VM):
    """Columns of length 1."""
    return S_VM * lax.rsqrt(jnp.sum(S_VM**2, axis=0))


def change(S_VM, k_M, v_V):
    """What a step of 1 adds to slots of length 1: orthogonal to each of them."""
    e_V = v_V - S_VM @ k_M
    return (e_V[:, None] - S_VM * (e_V @ S_VM)) * k_M


def step(S0_VM, S_VM, U_VM, ends, q_M, k_M, v_V, beta):
    """One token, one head; `ends`: it is its chunk's last. This is the definition."""
    U_VM = U_VM + beta * change(S0_VM + S_VM, k_M, v_V)
    now_VM = slots(S0_VM + S_VM + U_VM)
    return (jnp.where(ends, now_VM - S0_VM, S_VM), jnp.where(ends, 0, U_VM)), now_VM @ q_M


def token(chunk, S0_HVM, memory, *told):
    """One token of a row: (Memory, y_HV)."""
    place = (memory.place_B + 1) % chunk
    heads = jax.vmap(step, in_axes=(0, 0, 0, None, 0, 0, 0, 0))
    (S_HVM, U_HVM), y_HV = heads(S0_HVM, memory.S_BHVM, memory.U_BHVM, place == 0, *told)
    return Memory(S_HVM, U_HVM, place), y_HV


def tell(S_VM, U_VM, mine_C, sequence_C, q_CM, k_CM, v_CV, beta_C):
    """All tokens of one head's block that are `mine`, of which S is where their chunk began: (U after them, y_CV).

    No slot is formed but at the end. What token t adds to slot i is b_ti (e_t - s_i r_ti), so that lengths come of
    products of errors, and what is read of what was added, of products of keys and queries. Where a chunk adds what is
    a hundred times as long as slots, and takes it back, these cancel, and float32 reads it to 1e-3.
    """
    t_C, N_VM = jnp.arange(len(q_CM)), S_VM + U_VM
    sees_CC = (t_C[:, None] >= t_C) & mine_C[:, None] & mine_C & (sequence_C[:, None] == sequence_C)
    sees_CC = sees_CC.astype(S_VM.dtype)
    before_CC = jnp.tril(sees_CC, -1)
    e_CV, b_CM = v_CV - k_CM @ S_VM.T, beta_C[:, None] * k_CM
    r_CM = e_CV @ S_VM
    less_M = 2 - jnp.sum(S_VM**2, axis=0)  # 1, where slots have length 1: states may come from anywhere
    NS_M = jnp.sum(N_VM * S_VM, axis=0)
    along_CM = e_CV @ N_VM - NS_M * r_CM  # what is new, along what has been reached
    along_CM += (before_CC * (e_CV @ e_CV.T)) @ b_CM - less_M * r_CM * (before_CC @ (b_CM * r_CM))
    new_CM = jnp.sum(e_CV**2, axis=1)[:, None] - less_M * r_CM**2
    square_CM = jnp.sum(N_VM**2, axis=0) + sees_CC @ (2 * b_CM * along_CM + b_CM**2 * new_CM)
    least_M = NS_M**2 / jnp.sum(S_VM**2, axis=0)  # what is along S stays, but for rounding
    square_CM = jnp.maximum(square_CM, least_M / 2)

    q_CM = q_CM * lax.rsqrt(square_CM)
    y_CV = q_CM @ N_VM.T - (q_CM * (sees_CC @ (b_CM * r_CM))) @ S_VM.T + (sees_CC * (q_CM @ b_CM.T)) @ e_CV
    last = jnp.max(jnp.where(mine_C, sequence_C, 0))
    b_CM = jnp.where((mine_C & (sequence_C == last))[:, None], b_CM, 0)
    return U_VM + e_CV.T @ b_CM - S_VM * jnp.sum(b_CM * r_CM, axis=0), y_CV


def by_chunks(S0_HVM, memory, told, reset_BT, C, aligned):
    """All tokens: (Memory, y_BTHV). aligned: there are neither resets nor a state, so that blocks are chunks."""
    B, T, H, _ = told[0].shape
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
    marks, first_NB, several_N = mark(memory.place_B, reset_BT, C)
    place_BT = (places(memory.place_B, T, reset_BT) + 1) % C
    ends_NB = place_BT[:, jnp.minimum(jnp.arange(C - 1, T + C - 1, C), T - 1)].T == 0
    S0_BHVM = jnp.broadcast_to(S0_HVM, (B, *S0_HVM.shape))
    brought = jax.vmap(jax.vmap(slots))
    every = jax.vmap(jax.vmap(tell, in_axes=(0, 0, None, None, 0, 0, 0, 0)))
    of_row = lambda which_B, new, old: jnp.where(which_B[:, None, None, None], new, old)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(carry, x):
        told, marks, first_B, several, ends_B = x
        sequence_BC = jnp.cumsum(marks.reset_C, axis=1)
        mine = lambda n: marks.there_C & (marks.anchor_C == n)
        S, U = carry
        if not aligned:  # what came in must not pass a reset, NaN neither, nor its gradient
            S, U = of_row(first_B, S0_BHVM, S), of_row(first_B, 0, U)
        U, y_BHCV = every(S, U, mine(0), sequence_BC, *told)

        def others():
            """The tokens of the chunk that begins within the block, and those after a reset."""
            S_n, U_n, y_n = S, U, y_BHCV
            last_B = jnp.max(jnp.where(marks.there_C, marks.anchor_C, 0), axis=1)
            for n, begin in ((1, brought(S + U)), (2, S0_BHVM)):
                U_new, y_new = every(begin, jnp.zeros_like(U), mine(n), sequence_BC, *told)
                S_n, U_n = of_row(last_B == n, begin, S_n), of_row(last_B == n, U_new, U_n)
                y_n = jnp.where((marks.anchor_C == n)[:, None, :, None], y_new, y_n)
            return S_n, U_n, y_n

        if not aligned:
            S, U, y_BHCV = lax.cond(several, others, lambda: (S, U, y_BHCV))
        return (of_row(ends_B, brought(S + U), S), of_row(ends_B, 0, U)), y_BHCV

    heads_first = lambda x: cut(jnp.moveaxis(x, 2, 1), C)
    xs = tuple(map(heads_first, told)), marks, first_NB, several_N, ends_NB
    (S, U), y_NBHCV = lax.scan(block, (S0_HVM + memory.S_BHVM, memory.U_BHVM), xs)
    y_BTHV = jnp.moveaxis(y_NBHCV, (0, 3), (1, 2)).reshape(B, -1, H, y_NBHCV.shape[-1])[:, :T]
    return Memory(S - S0_HVM, U, place_BT[:, -1]), y_BTHV


class Lattice(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for inputs, state or resets that do not fit, width not divisible by heads.
    """

    width: int
    heads: int = 4
    slots: int | None = None  # of a head, as many as keys have channels; width // heads
    value_dim: int | None = None  # of a head; width // heads
    chunk: int = 16  # tokens whose gradients are taken at the same slots
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """H, M, V, P"""
        M, V = self.slots, self.value_dim
        if M is None or V is None:
            share = contract.divisible("width", self.width, "heads", self.heads)
            M, V = share if M is None else M, share if V is None else V
        contract.positive(width=self.width, heads=self.heads, slots=M, value_dim=V, conv_width=self.conv_width)
        contract.positive(chunk=self.chunk)
        if V == 1:
            raise ValueError("value_dim: expected an integer >= 2, as nothing is orthogonal to a slot of 1, got 1")
        return self.heads, M, V, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        (H, M, V, P), wide = self.sizes(), contract.state_dtype(self.dtype)
        S_BHVM, place_B = jnp.zeros((batch, H, V, M), wide), jnp.zeros((batch,), jnp.int32)
        return State(Memory(S_BHVM, S_BHVM, place_B), jnp.zeros((batch, P, H * (2 * M + V)), wide))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        aligned, state = state is None and reset_BT is None, contract.begin(self, x_BTD, state, reset_BT)
        check_impl("lattice", self.impl, ("scan", "chunk"))
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
        told = ops.widen((ops.unit(q_BTHM), ops.unit(k_BTHM), v_BTHV, beta_BTH))
        if self.impl == "scan" or (self.impl == "auto" and (T == 1 or self.chunk == 1)):
            y_BTHV, memory = ops.recur(partial(token, self.chunk, S0_HVM), state.memory, told, reset_BT)
        else:
            with jax.default_matmul_precision("highest"):
                memory, y_BTHV = by_chunks(S0_HVM, state.memory, told, reset_BT, self.chunk, aligned)

        gate_BTHV = nn.DenseGeneral((H, V), name="gate", **kinds)(x_BTD)
        y_BTHV = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y_BTHV) * nn.silu(gate_BTHV)
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHV), State(memory, past_BPE)


def on_spheres(key, shape, dtype=float):
    """Columns uniform on the sphere."""
    return jax.vmap(slots)(jax.random.normal(key, shape, dtype))
