"""MemMamba: Mamba that takes notes of important tokens, and reads them once its state has forgotten them.

    note    if i_t = I_token(x_t) > tau1:  S_t = the last M of S_{t-1} and (i_t - tau1) N(x_t);  else S_t = S_{t-1}
    recall  c_t = softmax(S_{t-1} q_t / sqrt(K))' S_{t-1}        f_t = I_state = 1 - what h_{t-1} still holds of them
    fuse    u_t <- u_t + max(f_t - tau2, 0) F c_t
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = C_t h_t + D u_t        Mamba, with u_t in the place of its x_t

Source: Wang, Chen, Yan, Lu, Sun, "MemMamba: Rethinking Memory Patterns in State Space Model" (2025), arXiv:2510.03279,
eq. 5, 6, 8-10, 12, and appendix A.4.1; sizes of sec. 5. The rest is Mamba, arXiv:2312.00752, and its released code.
Differs: no cross-layer attention (eq. 7, 11), since a mixer is one layer; the pool is in the state for a model to read.
The paper leaves the scores open. Here I_token = sigmoid(w x_t + b), and I_state is 1 - the mean over the notes of
exp(sum of the mean of dt A since), the part of a token that Mamba's decay has left in its state. A step at a threshold
has no gradient and makes outputs jump, so notes and what is fused are weighted by how far the score is above it. The
pool is first in, first out; N and F are linear, the latter the paper's weighted fusion. dt, B and C come from Mamba's
own u_t, before notes are added: then nothing that decides on notes depends on them, and chunks can be computed at once.
Weights that Mamba does not have begin as LeCun's.

Dims: B batch, T time, D width, E = expand D channels, N state size, R rank of dt, W conv width, P = W - 1 past inputs,
      M notes, K size of a note, C chunk, L = M + C notes and tokens.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.initial import like_torch, small_step, within

FORMS = ("scan", "chunk")


class Pool(NamedTuple):
    """First in, first out: the last `count` rows are the notes, the newest last, and the rows before them are 0."""

    note_BMK: jax.Array
    log_kept_BM: jax.Array  # log of the part of its token that the SSM still holds
    count_B: jax.Array


class State(NamedTuple):
    h_BNE: jax.Array
    past_BPE: jax.Array
    pool: Pool


def note_step(pool, q_K, note_K, excess, log_decay, tau2):
    """One token reads the notes before it, and becomes one if excess = I_token - tau1 > 0. This is the definition."""
    note_MK, log_kept_M, count = pool
    there_M = jnp.arange(len(note_MK)) >= len(note_MK) - count
    c_K = recall(q_K, note_MK, log_kept_M, there_M, tau2)

    pool = Pool(note_MK, jnp.where(there_M, log_kept_M + log_decay, 0), count)
    note_MK = jnp.concatenate([note_MK[1:], excess * note_K[None]])
    log_kept_M = jnp.append(pool.log_kept_BM[1:], 0)
    longer = Pool(note_MK, log_kept_M, jnp.minimum(count + 1, len(note_MK)))
    return jax.tree.map(partial(jnp.where, excess > 0), longer, pool), c_K


def recall(q_K, note_MK, log_kept_M, there_M, tau2):
    """Attention to the notes that are there, weighted by how far what the SSM has forgotten of them is above tau2."""
    kept = jnp.sum(jnp.where(there_M, jnp.exp(log_kept_M), 0)) / jnp.maximum(jnp.sum(there_M), 1)
    logit_M = jnp.where(there_M, note_MK @ q_K / math.sqrt(q_K.size), -1e30)
    weight_M = jnp.where(there_M, jnp.exp(logit_M - lax.stop_gradient(jnp.max(logit_M))), 0)
    c_K = weight_M @ note_MK / jnp.maximum(jnp.sum(weight_M), 1)  # the largest weight is 1
    return jnp.maximum(1 - kept - tau2, 0) * c_K


def step(h_NE, u_E, dt_E, A_NE, B_N, C_N, D_E):
    """One token of Mamba."""
    h_NE = jnp.exp(dt_E * A_NE) * h_NE + jnp.outer(B_N, dt_E * u_E)
    return h_NE, C_N @ h_NE + D_E * u_E


class MemMamba(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is, and an int32 counter.

    Raises ValueError, by name, for thresholds that are no numbers, and for sizes, inputs, state or resets that do not
    fit.
    """

    width: int
    expand: int = 2
    state_size: int = 16  # N, per channel
    pool_size: int = 50  # M
    note_dim: int = 64  # K
    tau1: float = 0.5  # a token becomes a note if its importance, in (0, 1), is above it; 1 leaves Mamba
    tau2: float = 0.5  # notes are read if the part of them that is forgotten, in [0, 1], is above it
    dt_rank: int | None = None  # R; width / 16, rounded up
    conv_width: int = 4
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int]:
        """(E, N, R, P)"""
        R = -(-self.width // 16) if self.dt_rank is None else self.dt_rank
        contract.positive(width=self.width, expand=self.expand, dt_rank=R, pool_size=self.pool_size)
        contract.positive(state_size=self.state_size, conv_width=self.conv_width, note_dim=self.note_dim)
        for name, tau in (("tau1", self.tau1), ("tau2", self.tau2)):
            if tau < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {tau}")
        return self.expand * self.width, self.state_size, R, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        (E, N, _, P), M, K = self.sizes(), self.pool_size, self.note_dim
        zeros = partial(jnp.zeros, dtype=contract.state_dtype(self.dtype))
        pool = Pool(zeros((batch, M, K)), zeros((batch, M)), jnp.zeros(batch, jnp.int32))
        return State(zeros((batch, N, E)), zeros((batch, P, E)), pool)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        state = contract.begin(self, x_BTD, state, reset_BT)
        (E, N, R, P), D, K = self.sizes(), self.width, self.note_dim
        wide, conv = contract.state_dtype(self.dtype), within((P + 1) ** -0.5)
        check_impl("mem_mamba", self.impl, FORMS)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}
        of_mamba: dict[str, Any] = {"kernel_init": like_torch}

        def param(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype)

        u_BTE, z_BTE = jnp.split(nn.Dense(2 * E, name="in", **of_mamba, **kinds)(x_BTD), 2, axis=-1)
        f_WE, bias_E = param("conv", conv, P + 1, E), param("conv_bias", conv, E)
        u_BTE, past_BPE = ops.short_conv(u_BTE, f_WE, state.past_BPE, reset_BT)
        u_BTE = nn.silu(u_BTE + bias_E.astype(self.dtype))

        dt_BTR = nn.Dense(R, use_bias=False, name="dt_low", **of_mamba, **gates)(u_BTE)
        dt = nn.Dense(E, name="dt", kernel_init=within(R**-0.5), bias_init=small_step, **gates)
        dt_BTE = nn.softplus(dt(dt_BTR))
        A_NE = -jnp.exp(param("A_log", log_integers, N, E).astype(wide))
        B_EN, C_EN = (param(name, like_torch, E, N) for name in ("B", "C"))
        dot = partial(jnp.einsum, "bte,en->btn", preferred_element_type=wide)
        B_BTN, C_BTN = dot(u_BTE, B_EN.astype(self.dtype)), dot(u_BTE, C_EN.astype(self.dtype))
        D_E = param("D", nn.initializers.ones, E).astype(wide)

        q_BTK, note_BTK = (nn.Dense(K, name=name, **kinds)(x_BTD) for name in ("query", "note"))
        excess_BT = jnp.maximum(nn.sigmoid(nn.Dense(1, name="importance", **gates)(x_BTD))[..., 0] - self.tau1, 0)
        log_decay_BT = jnp.mean(dt_BTE * jnp.mean(A_NE, axis=0), axis=-1)
        xs = q_BTK, note_BTK, excess_BT, log_decay_BT
        c_BTK, pool = notes(*xs, state.pool, reset_BT, self.tau2, self.impl)
        u_BTE = u_BTE + nn.Dense(E, name="fuse", **kinds)(c_BTK)

        y_BTE, h_BNE = s6(u_BTE, dt_BTE, A_NE, B_BTN, C_BTN, D_E, state.h_BNE, reset_BT, self.impl)
        y_BTD = nn.Dense(D, name="out", **of_mamba, **kinds)(y_BTE * nn.silu(z_BTE))
        return y_BTD, State(h_BNE, past_BPE, pool)


def s6(u_BTE, dt_BTE, A_NE, B_BTN, C_BTN, D_E, h_BNE, reset_BT, impl="auto"):
    """Mamba, all T tokens. Returns (y_BTE, h_BNE)."""
    if impl == "scan":

        def token(h_NE, u_E, dt_E, B_N, C_N):
            return step(h_NE, u_E, dt_E, A_NE, B_N, C_N, D_E)

        y_BTE, h_BNE = ops.recur(token, h_BNE, ops.widen((u_BTE, dt_BTE, B_BTN, C_BTN)), reset_BT)
        return y_BTE.astype(u_BTE.dtype), h_BNE
    y_BTE, h_BNE = ops.selective_scan(u_BTE, dt_BTE, A_NE, B_BTN, C_BTN, h_BNE, reset_BT, impl=impl)
    return (y_BTE + D_E * u_BTE).astype(u_BTE.dtype), h_BNE


def notes(q_BTK, note_BTK, excess_BT, log_decay_BT, pool, reset_BT, tau2, impl="auto", chunk=64):
    """Notes taken and recalled, all T tokens. Returns (c_BTK, Pool)."""
    xs = ops.widen((q_BTK, note_BTK, excess_BT, log_decay_BT))
    B, T, _ = q_BTK.shape
    if impl == "scan" or T == 1:
        c_BTK, pool = ops.recur(partial(note_step, tau2=tau2), pool, xs, reset_BT)
        return c_BTK.astype(q_BTK.dtype), pool
    C = min(chunk, T)
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT

    def split(x):  # zeros behind: they are no notes, and do not forget
        x = jnp.pad(x, [(0, 0), (0, -T % C)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, C, *x.shape[2:]), 1, 0)

    with jax.default_matmul_precision("highest"):  # as in the definition
        row = jax.checkpoint(jax.vmap(partial(_notes_of_chunk, tau2=tau2)))
        pool, c = lax.scan(lambda pool, xs: row(pool, *xs), pool, tuple(split(x) for x in (*xs, reset_BT)))
    c_BTK = jnp.moveaxis(c, 0, 1).reshape(B, -1, c.shape[-1])[:, :T]
    return c_BTK.astype(q_BTK.dtype), pool


def _notes_of_chunk(pool, q_CK, note_CK, excess_C, log_decay_C, reset_C, tau2):
    """C tokens of one row. A token sees, of the pool and of the chunk's notes before it, the M that were taken last."""
    pool = jax.tree.map(lambda x: jnp.where(reset_C[0], jnp.zeros_like(x), x), pool)
    (M, _), C, taken_C = pool.note_BMK.shape, len(reset_C), excess_C > 0
    of_C = jnp.cumsum(reset_C.at[0].set(False))  # the sequence; the pool is of the first one
    before_C = jnp.cumsum(taken_C) - taken_C
    slot_M = jnp.arange(M)
    with_pool = lambda of_pool_M, x_C: jnp.concatenate([of_pool_M, x_C])
    note_LK = with_pool(pool.note_BMK, excess_C[:, None] * note_CK)
    order_L, of_L = with_pool(slot_M - M, before_C), with_pool(0 * slot_M, of_C)
    is_note_L = with_pool(slot_M >= M - pool.count_B, taken_C)

    def seen_L(before, of):
        return is_note_L & (of_L == of) & (order_L >= before - M) & (order_L < before)

    # Summed from each note on, not as a difference of sums from the start: those would be large and cancel.
    after_LC = jnp.arange(C) > with_pool(0 * slot_M - 1, jnp.arange(C))[:, None]
    since_LC = jnp.cumsum(jnp.where(after_LC, log_decay_C, 0), axis=1)
    at_note_L = with_pool(pool.log_kept_BM, jnp.zeros_like(excess_C))
    log_kept_LC = at_note_L[:, None] + jnp.pad(since_LC, ((0, 0), (1, 0)))[:, :C]  # as the token before left it
    there_CL = jax.vmap(seen_L)(before_C, of_C)
    c_CK = jax.vmap(recall, (0, None, 1, 0, None))(q_CK, note_LK, log_kept_LC, there_CL, tau2)

    end = before_C[-1] + taken_C[-1]
    is_slot_ML = seen_L(end, of_C[-1]) & (order_L == (end - M + slot_M)[:, None])
    filled_M, from_M = jnp.any(is_slot_ML, axis=1), jnp.argmax(is_slot_ML, axis=1)
    note_MK = jnp.where(filled_M[:, None], note_LK[from_M], 0)
    log_kept_M = jnp.where(filled_M, (at_note_L + since_LC[:, -1])[from_M], 0)
    return Pool(note_MK, log_kept_M, jnp.sum(filled_M, dtype=jnp.int32)), c_CK


def log_integers(key, shape, dtype=float):
    """log A = log(1 .. N) in each channel: the real part of S4D's eigenvalues."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[0] + 1, dtype=dtype))[:, None], shape)
