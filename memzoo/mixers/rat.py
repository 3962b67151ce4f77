"""RAT: a gated recurrence inside chunks of L tokens, and softmax attention across what each chunk ends with.

    k~_t = g_t k~_{t-1} + (1 - g_t) k_t        v~_t = g_t v~_{t-1} + (1 - g_t) v_t        both from 0 at each chunk
    y_t = z_t softmax(q_t' [K~ ; k~_t] / sqrt(K)) [V~ ; v~_t]        g_t, z_t = sigmoid(W x_t)

K~ and V~ are the last k~ and v~ of each earlier chunk. Chunks of one token make this softmax attention with gates;
one chunk for all tokens makes it a gated linear RNN.

Source: Wei, Yadav, Pascanu, Gulcehre, "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence
Modeling" (2025), arXiv:2507.04416 (its first version: "... in Language Modeling"); chunks as places for rotary
embeddings, queries and keys shared by the heads of a group, and initial gates from the released code.
Differs: only the last `window` chunks are seen, the present one included, so that the state is of one size: all of
them, as in the paper, up to window L tokens; rotary places count from the present chunk back, and pairs (0, 1), (2, 3),
... are rotated. The norm before the layer and the sum around it are the model's.

Dims: B batch, T time, D width, H heads, G groups, K key and value (both head_dim), W window, L tokens of a chunk,
      M = W L, E = 2 K, N blocks, C queries of a block, P chunks before it, X any number of them.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.chunks import matmul
from memzoo.ops.window_attention import rotate, turns

BLOCK = 64  # queries at a time in the chunk form


class State(NamedTuple):
    """A ring of what chunks end with, the present one so far, keys before rotation. Once full, position_B <= 2 M."""

    k_BHWK: jax.Array
    v_BHWK: jax.Array
    position_B: jax.Array


def step(state, q_K, k_K, v_K, g_K, turn_WK, L):
    """One token, one head. This is the definition; the chunk form is tested against it."""
    k_WK, v_WK, p = state
    W, c = len(k_WK), p // L
    here = c % W
    old = lambda s_WK: jnp.where(p % L == 0, 0, s_WK[here])
    k_WK = k_WK.at[here].set(g_K * old(k_WK) + (1 - g_K) * k_K)
    v_WK = v_WK.at[here].set(g_K * old(v_WK) + (1 - g_K) * v_K)
    back_W = (here - jnp.arange(W)) % W  # how many chunks ago
    scores_W = rotate(k_WK, turn_WK[W - 1 - back_W]) @ rotate(q_K, turn_WK[W - 1]) * q_K.size**-0.5
    y_K = nn.softmax(jnp.where(back_W <= c, scores_W, -jnp.inf)) @ v_WK
    return State(k_WK, v_WK, bounded(p, W * L) + 1), y_K


def bounded(p, M):
    """p, or a smaller position with a full ring and the same place in it, so that no text is too long for int32."""
    return jnp.where(p < M, p, M + p % M)


class RAT(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is.

    Raises ValueError, by name, for fields out of their range, and for inputs, state or resets that do not fit.
    """

    width: int
    heads: int = 4
    groups: int = 2  # of heads that share queries and keys, before the gates
    head_dim: int | None = None  # width / heads
    chunk: int = 16  # L
    window: int = 64  # W, in chunks; with those of 16, the 1,024 tokens that `attention` has too
    rope_base: float = 10_000.0
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int, int]:
        """(H, G, K, W, L)"""
        contract.positive(heads=self.heads, chunk=self.chunk, window=self.window)
        contract.divisible("heads", self.heads, "groups", self.groups)
        K = self.head_dim
        if K is None:
            K = contract.divisible("width", self.width, "heads", self.heads)
        if not contract.whole_number(K) or K < 2 or K % 2:
            raise ValueError(f"head_dim: expected an even integer >= 2, to rotate pairs, got {K!r}")
        if self.chunk * self.window > 2**30:
            raise ValueError(f"chunk: expected chunk * window <= 2**30, got {self.chunk} * {self.window}")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base: expected a number > 0, got {self.rope_base}")
        return self.heads, self.groups, K, self.window, self.chunk

    def initial_state(self, batch: int) -> State:
        H, _, K, W, _ = self.sizes()
        shape, wide = (batch, H, W, K), contract.state_dtype(self.dtype)
        return State(jnp.zeros(shape, wide), jnp.zeros(shape, wide), jnp.zeros(batch, jnp.int32))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        check_impl("rat", self.impl, ("scan", "chunk"))
        fresh = state is None
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, G, K, W, L), (_, T, D) = self.sizes(), x_BTD.shape
        wide = contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype}

        q_BTHK, k_BTHK = (
            jnp.repeat(nn.DenseGeneral((G, K), name=name, **kinds)(x_BTD), H // G, axis=2) for name in "qk"
        )
        v_BTHK = nn.DenseGeneral((H, K), name="v", **kinds)(x_BTD)
        g_BTHK = nn.sigmoid(nn.DenseGeneral((H, K), bias_init=up_to(L), name="forget", **gates)(x_BTD))

        xs = q_BTHK, k_BTHK, v_BTHK, g_BTHK
        if self.impl == "scan" or (self.impl == "auto" and T == 1):
            axes = State._make((0, 0, None))  # the heads share a position
            one = partial(step, turn_WK=turns(W, K, self.rope_base, wide), L=L)
            heads = jax.vmap(one, in_axes=(axes, 0, 0, 0, 0), out_axes=(axes, 0))
            y_BTHK, state = ops.recur(heads, state, ops.widen(xs), reset_BT)
        else:
            y_BTHK, state = chunked(*xs, state, reset_BT, L, self.rope_base, fresh)
        y_BTHK = y_BTHK.astype(self.dtype) * nn.sigmoid(nn.DenseGeneral((H, K), name="gate", **kinds)(x_BTD))
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTHK), state


def chunked(q_BTHK, k_BTHK, v_BTHK, g_BTHK, state, reset_BT, L, base, fresh):
    """All T tokens: the recurrence, then attention, a block of queries at a time. Returns (y_BTHK, State).

    Time counts from the first token of this call: the ring lies at times < 0. A fresh one is left out.
    """
    (B, T, H, K), W, wide = q_BTHK.shape, state.k_BHWK.shape[2], state.k_BHWK.dtype
    N = -(-T // BLOCK)
    C = -(-T // N)
    P = min(W - 1, (N - 1) * C // L) if fresh else W - 1  # the chunks, at most, that end before a block and are seen

    position_B = bounded(state.position_B, W * L)
    start_BT = jnp.broadcast_to(-position_B[:, None], (B, T))  # when each token's text began
    if reset_BT is not None:
        start_BT = lax.cummax(jnp.where(reset_BT, jnp.arange(T, dtype=jnp.int32), start_BT), axis=1)
    begins_BT = (jnp.arange(T) - start_BT) % L == 0

    ring_BWHE = jnp.concatenate([state.k_BHWK, state.v_BHWK], axis=-1).swapaxes(1, 2)
    last_BHE = take(ring_BWHE, ((position_B - 1) // L % W)[:, None])[:, 0]
    g_BTHE = jnp.concatenate([g_BTHK, g_BTHK], axis=-1)
    kv_BTHE = jnp.concatenate([k_BTHK, v_BTHK], axis=-1).astype(wide)
    flat = lambda x, *axes: x.reshape(*axes, -1)
    kv_BTX, _ = ops.linear_scan(flat(g_BTHE, B, T), flat((1 - g_BTHE) * kv_BTHE, B, T), flat(last_BHE, B), begins_BT)
    kv_BTHE = kv_BTX.reshape(B, T, H, 2 * K)
    all_BXHE = kv_BTHE if fresh else jnp.concatenate([ring_BWHE, kv_BTHE], axis=1)

    def ends(start_BX, c_BX):
        """What the chunks c of the texts that began then end with, or have come to; 0 for c < 0."""
        end_BX = jnp.minimum(start_BX + c_BX * L + L - 1, T - 1)
        row_BX = jnp.where(end_BX < 0, c_BX % W, all_BXHE.shape[1] - T + end_BX)
        return jnp.where((c_BX >= 0)[..., None, None], take(all_BXHE, jnp.where(c_BX < 0, 0, row_BX)), 0)

    def blocks(x_BT, **kind):
        x_BX = jnp.pad(x_BT, [(0, 0), (0, N * C - T)] + [(0, 0)] * (x_BT.ndim - 2), **kind)
        return jnp.moveaxis(x_BX.reshape(B, N, C, *x_BX.shape[2:]), 1, 0)

    start_NBC = blocks(start_BT, mode="edge")
    t_NC = jnp.arange(N * C).reshape(N, C)
    first_BN = jnp.swapaxes(start_NBC[:, :, 0], 0, 1)
    c_BNP = ((t_NC[:, 0] - first_BN) // L)[..., None] + jnp.arange(-P, 0)
    past_BXHE = ends(jnp.repeat(first_BN, P, axis=1), c_BNP.reshape(B, N * P)).astype(q_BTHK.dtype)
    past_NBPHE = jnp.moveaxis(past_BXHE.reshape(B, N, P, H, 2 * K), 1, 0)

    one = partial(attend, turn_XK=turns(P + C, K, base, wide), W=W, L=L)
    body = jax.checkpoint(lambda xs: one(*xs), prevent_cse=False) if N > 1 else lambda xs: one(*xs)
    xs = blocks(q_BTHK), blocks(kv_BTHE.astype(q_BTHK.dtype)), past_NBPHE, start_NBC, t_NC
    y_BTHK = jnp.moveaxis(lax.map(body, xs), 0, 1).reshape(B, N * C, H, K)[:, :T]

    start_B1 = start_BT[:, -1:]
    c_B1 = (T - 1 - start_B1) // L
    ring_BWHE = ends(jnp.repeat(start_B1, W, axis=1), c_B1 - (c_B1 - jnp.arange(W)) % W)
    k_BHWK, v_BHWK = jnp.split(ring_BWHE.swapaxes(1, 2), 2, axis=-1)
    return y_BTHK, State(k_BHWK, v_BHWK, bounded(T - 1 - start_B1[:, 0], W * L) + 1)


def attend(q_BCHK, kv_BCHE, past_BPHE, start_BC, t_C, turn_XK, W, L):
    """A block of queries over the last P chunks that ended before it in the text it begins in, and over its own tokens.

    Of its own tokens, a query sees those that end a chunk of its text, and itself.
    """
    P, K = past_BPHE.shape[1], q_BCHK.shape[-1]
    c_BC = (t_C - start_BC) // L
    continues_BC, c_B1 = start_BC == start_BC[:, :1], c_BC[:, :1]
    c_BP = c_B1 + jnp.arange(-P, 0)
    past_BCP = continues_BC[..., None] & (c_BP >= 0)[:, None] & (c_BP[:, None] > c_BC[..., None] - W)
    back_BCC = c_BC[:, :, None] - c_BC[:, None]
    ended_BCC = (start_BC[:, :, None] == start_BC[:, None]) & ((t_C + 1 - start_BC) % L == 0)[:, None]
    own_BCC = ended_BCC & (back_BCC > 0) & (back_BCC < W) | jnp.eye(len(t_C), dtype=bool)
    seen_BCX = jnp.concatenate([past_BCP, own_BCC], axis=-1)

    turn_BCK = turn_XK[P + c_BC - jnp.where(continues_BC, c_B1, 0)][:, :, None]
    past_BPHK = rotate(past_BPHE[..., :K], turn_XK[:P, None])
    own_BCHK = rotate(kv_BCHE[..., :K], turn_BCK)
    k_BXHK = jnp.concatenate([past_BPHK, own_BCHK], axis=1)
    v_BXHK = jnp.concatenate([past_BPHE[..., K:], kv_BCHE[..., K:]], axis=1)
    scores_BHCX = matmul("bchk,bxhk->bhcx", rotate(q_BCHK, turn_BCK), k_BXHK) * K**-0.5
    p_BHCX = nn.softmax(jnp.where(seen_BCX[:, None], scores_BHCX, -jnp.inf))
    return matmul("bhcx,bxhk->bchk", p_BHCX.astype(v_BXHK.dtype), v_BXHK)


def take(all_BXHE, row_BX):
    return jnp.take_along_axis(all_BXHE, row_BX[:, :, None, None], axis=1)


def up_to(L):
    """A gate's bias: log of a number uniform in [1, L - 1], so that memory is as long as anything up to the chunk."""

    def init(key, shape, dtype=float):
        return jnp.log(jax.random.uniform(key, shape, dtype, 1, max(L - 1, 1))).astype(dtype)

    return init
