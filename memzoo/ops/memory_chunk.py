"""The chunked form of `memorize`: blocks of as many tokens as a chunk has, one after the other.

memory_sums.py has a block for any rule, memory_rows.py a faster one for rules without momentum and window whose weights
are not linear, or whose rows forget each by itself.

Dims: B batch, T time, H heads, K key, V what the loss is told, C chunk, N blocks of C tokens, P = window - 1 tokens
before, E = P + C.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.ops.memory import MemoryState, kept
from memzoo.ops.memory_anchors import cut, mark
from memzoo.ops.memory_rows import chunk_by_rows
from memzoo.ops.memory_sums import chunk_by_sums, sums
from memzoo.ops.rotary import places


def chunks(memory, objective, rule, A0, fixed, state, xs, reset_BT, C, aligned):
    """Blocks of C tokens, one after the other. aligned: all begin with a chunk and have no reset, and so one anchor."""
    (B, T), P = xs[0].shape[:2], rule.window - 1
    N, blocks = -(-T // C), partial(cut, C=C)
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
    heads_first = lambda x: jnp.moveaxis(x, 2, 1)
    q_BHTK, k_BHTK, v_BHTV, *gates, gamma_BHT = map(heads_first, xs)

    # The window's tokens before each block. Where none has been there is the block's first, as 0 may have no gradient.
    p_NP = jnp.arange(N)[:, None] * C + jnp.arange(P)
    since = lambda past, x_BHT: jnp.concatenate([heads_first(past), x_BHT], axis=2)
    came = state.gamma_BPH, state.k_BPHK, state.v_BPHV
    gamma_BHS, k_BHSK, v_BHSV = map(since, came, (gamma_BHT, k_BHTK, v_BHTV))
    sequence_BS = jnp.pad(jnp.cumsum(reset_BT, axis=1), ((0, 0), (P, 0)))
    same_BNP = sequence_BS[:, p_NP] == sequence_BS[:, P::C, None]
    gamma_NBHP = jnp.moveaxis(jnp.where(same_BNP[:, None], gamma_BHS[:, :, p_NP], 0), 2, 0)

    def windows(x_BHT, x_BHS):
        if P == 0:
            return blocks(x_BHT)
        x_NBHC, x_NBHP = blocks(x_BHT), jnp.moveaxis(x_BHS[:, :, p_NP], 2, 0)
        return jnp.concatenate([jnp.where(gamma_NBHP[..., None] != 0, x_NBHP, x_NBHC[:, :, :, :1]), x_NBHC], axis=3)

    # Of each block its tokens and, where that is little, what comes of their gates.
    marks, first_NB, several_N = mark(state.place_B, reset_BT, C)
    do = *map(blocks, gates), jnp.concatenate([gamma_NBHP, blocks(gamma_BHT)], axis=-1)
    simple = rule.direction is None and gates[2].shape[-1] == 1
    by_rows = rule.direction is None and P == 0 and not state.S and not (simple and rule.weights is None)
    by_sums = partial(sums, rule, bool(state.S), aligned)
    if simple and not by_rows:
        do = jax.vmap(jax.vmap(jax.vmap(by_sums, (None, 0))))(marks, do)

    def one(several, A0, fixed, carry, q_CK, k_EK, v_EV, do, marks):
        if by_rows:
            return chunk_by_rows(memory, objective, rule, several, A0, fixed, carry, q_CK, k_EK, v_EV, do, marks)
        do = do if simple else by_sums(marks, do)
        return chunk_by_sums(memory, objective, rule, several, A0, fixed, carry, q_CK, k_EK, v_EV, do, marks)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(carry, x):
        *x, first_B, several = x
        if not aligned:  # what came in must not pass a reset at the first token, NaN neither, nor its gradient
            first = lambda old, new: jnp.where(first_B.reshape(-1, *[1] * (old.ndim - 1)), new, old)
            carry = jax.tree.map(first, carry, fresh)
        head = jax.vmap(partial(one, None if aligned else several), (*[0] * 7, None))
        return jax.vmap(partial(head, A0, fixed))(carry, *x)

    total = lambda W: {n: A0[n] + W[n] for n in W}
    fresh = dict(A0), {n: jnp.zeros_like(A0[n]) for n in state.S}, dict(A0) if state.anchor else {}
    xs = blocks(q_BHTK), windows(k_BHTK, k_BHSK), windows(v_BHTV, v_BHSV), do, marks, first_NB, several_N
    (A, S, anchor), y_NBHCV = lax.scan(block, (total(state.A), state.S, total(state.anchor)), xs)

    less = lambda W: {n: W[n] - A0[n] for n in W}
    of_last = lambda x_BHS: heads_first(x_BHS[:, :, T:])
    same_BP = sequence_BS[:, T:] == sequence_BS[:, -1:]
    past = kept(jnp.where(same_BP[..., None], of_last(gamma_BHS), 0), of_last(k_BHSK), of_last(v_BHSV))
    place_B = (places(state.place_B, T, reset_BT)[:, -1] + 1) % C
    state = MemoryState(less(A), S, less(anchor), *past, place_B)
    y_BNCHV = jnp.moveaxis(y_NBHCV, (0, 3), (1, 2))
    return y_BNCHV.reshape(B, N * C, *y_BNCHV.shape[3:])[:, :T], state
