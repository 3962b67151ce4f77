"""The chunked form of `memorize`: what all tokens of a chunk do to a memory, and read from it, at once.

    A_t = sum_z a_tz Z_z        Z: A that came, S that came, A_0, and the gradients, delta_e x_e^T
    A_t q = sum_z a_tz Z_z q    of these last (x_e . q) delta_e: no matrix is formed but at the chunk's end

A gradient with respect to a matrix is an outer product per token. So S_t and A_t are kept as coefficients a of what
they are sums of, for any network of matrices and any linear rule. Where `direction` or `weights` is not linear, the
matrices of all tokens are formed.

Source: Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States" (2024), arXiv:2407.04620,
sec. 2.5, for the dual form of one matrix and of a network.
Differs: with momentum, decay, windows, resets, and chunks that begin anywhere.

Dims: B batch, T time, H heads, K key, V what the loss is told, C chunk, N blocks of C tokens, P = window - 1 tokens
before, E = P + C, O and I the outputs and inputs of a matrix, R rows of all matrices, or 1, X what is known
of a matrix before a block: A, S with momentum, A_0 where resets may be; Z what S and A are sums of.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.ops.memory import MemoryState, each, kept, read, rows
from memzoo.ops.rotary import places


class Marks(NamedTuple):
    """Of a block's tokens.

    There are up to three anchors, of which the tokens before the next chunk, those after, and those after a reset have
    one each: the one that came, what has been reached where that chunk begins, and A_0.
    """

    reset_C: Any  # but for the first token, which finds nothing but zeros
    there_C: Any  # False for what fills the last block up
    anchor_C: Any  # 0, 1 or 2
    begins: Any  # the token that the next chunk begins with


class Sums(NamedTuple):
    """What S and A are, of what is known before a block and of its gradients."""

    S_CZ: jax.Array
    a_CZR: jax.Array
    decay: Any  # the rest of the arguments of _decayed, where a direction is not linear; else None


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
    sums = partial(_sums, rule, bool(state.S), aligned)
    at_once = rule.direction is None and gates[2].shape[-1] == 1
    if at_once:
        do = jax.vmap(jax.vmap(jax.vmap(sums, (None, 0))))(marks, do)

    def one(several, A0, fixed, carry, q_CK, k_EK, v_EV, do, marks):
        do = do if at_once else sums(marks, do)
        return _chunk(memory, objective, rule, several, A0, fixed, carry, q_CK, k_EK, v_EV, do, marks)

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


def cut(x, C, axis=2):
    """Blocks of C, first. Filled up with the last one, as 0 may have no gradient; it is not `there`."""
    N = -(-x.shape[axis] // C)
    if x.shape[axis] < N * C:
        pads = [(0, N * C - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pads, "constant" if x.dtype == bool else "edge")
    return jnp.moveaxis(x.reshape(*x.shape[:axis], N, C, *x.shape[axis + 1 :]), axis, 0)


def mark(place_B, reset_BT, C):
    """(Marks of all blocks, [N, B, ...], which of them begin with a reset, which have several anchors in any row)."""
    begins_NB = C - (places(place_B, reset_BT.shape[1], reset_BT) % C)[:, ::C].T
    reset_NBC, there_NBC = cut(reset_BT, C, 1), cut(jnp.ones_like(reset_BT), C, 1)
    first_NB, reset_NBC = reset_NBC[..., 0], reset_NBC.at[..., 0].set(False)
    anchor_NBC = jnp.where(jnp.arange(C) < begins_NB[..., None], 0, 1)
    anchor_NBC = jnp.where(jnp.cumsum(reset_NBC, axis=-1) > 0, 2, anchor_NBC)
    several_N = jnp.any((begins_NB != C) | jnp.any(reset_NBC, axis=-1), axis=-1)
    return Marks(reset_NBC, there_NBC, anchor_NBC, begins_NB), first_NB, several_N


def _sums(rule, momentum, aligned, marks, gates):
    """What S and A are after each token of one head, of A that came, S that came, A_0, and gradients at each anchor."""
    theta_C, eta_C, alpha_CR, rate_C, gamma_E = gates
    reset_C, there_C, anchor_C, _ = marks
    C, P = len(theta_C), len(gamma_E) - len(theta_C)
    X = 1 + momentum + (not aligned)
    sequence_C, c, e = jnp.cumsum(reset_C), jnp.arange(C), jnp.arange(P + C) - P
    sequence_E = jnp.concatenate([jnp.zeros(P, sequence_C.dtype), sequence_C])
    seen_CE = (e <= c[:, None]) & (e > c[:, None] - rule.window) & (sequence_E == sequence_C[:, None])
    write_CE = jnp.where(seen_CE & there_C[:, None], theta_C[:, None] * gamma_E, 0)
    write_CE = [jnp.where(anchor_C[:, None] == n, write_CE, 0) for n in range(1 if aligned else 3)]
    write_CZ = jnp.concatenate([jnp.zeros((C, X), theta_C.dtype), *write_CE], axis=1)
    came_Z, momentum_Z, fresh_Z = (jnp.eye(1, write_CZ.shape[1], k, theta_C.dtype)[0] for k in (0, 1, X - 1))

    eta_C, rate_C = jnp.where(reset_C, 0, jnp.where(there_C, eta_C, 1)), jnp.where(there_C, rate_C, 0)
    stay_CR = jnp.where(there_C[:, None], 1 - alpha_CR, 1)
    left_CCR = _products(jnp.concatenate([eta_C[:, None], jnp.where(reset_C[:, None], 0, stay_CR)], axis=1))
    S_CZ = left_CCR[..., 0] @ (write_CZ.at[0].add(eta_C[0] * momentum_Z) if momentum else write_CZ)
    decay = reset_C, rate_C, stay_CR, left_CCR[..., 1:]
    S_CZR = jnp.broadcast_to(S_CZ[..., None], (*S_CZ.shape, stay_CR.shape[1]))
    a_CZR = _decayed(came_Z[:, None], fresh_Z[:, None], S_CZR, *decay)
    return Sums(S_CZ, a_CZR, None if rule.direction is None else decay)


def _decayed(start_XR, fresh_XR, x_CXR, reset_C, rate_C, stay_CR, left_CCR):
    """A_t = stay_t A_{t-1} - rate_t x_t, from `start` and, at resets, from `fresh`."""
    before_CXR = jnp.where(reset_C[:, None, None], fresh_XR, 0).at[0].add(start_XR)
    x_CXR = stay_CR[:, None] * before_CXR - rate_C[:, None, None] * x_CXR
    return jnp.einsum("tir,ixr->txr", left_CCR, x_CXR)


def _products(x_CR):
    """What is left at token t of what was at token i, [t, i, R]: the product of all x after i. 0 for i > t."""
    t_C1, i_C = jnp.arange(len(x_CR))[:, None], jnp.arange(len(x_CR))
    x_CCR = jnp.where((t_C1 > i_C)[..., None], x_CR[:, None], 1)
    return jnp.where((t_C1 >= i_C)[..., None], lax.associative_scan(jnp.multiply, x_CCR), 0)


def _chunk(memory, objective, rule, several, A0, fixed, carry, q_CK, k_EK, v_EV, sums, marks):
    """C tokens of one head: (A, S, the last anchor), y_C.

    several: whether any row of the batch has more anchors than the first; None for never.
    """
    (A, S, anchor), (S_CZ, a_CZR, decay), E = carry, sums, len(k_EK)
    a = rows(a_CZR, A0)
    before = {n: [A[n], *([S[n]] if S else []), *([] if several is None else [A0[n]])] for n in A0}
    X = 1 + bool(S) + (several is not None)

    def gradients(anchor):
        """dloss/dW of each token is the outer product of these: {name: (delta_EO, x_EI)}."""
        W = each(rule.weights, anchor)
        taken = {}

        def loss(taps):
            def apply(name, x_EI):
                taken[name] = x_EI
                return x_EI @ W[name].T + taps[name]

            y_EV = memory(apply, k_EK, fixed)
            return jnp.sum(jax.vmap(objective)(y_EV, v_EV)), dict(taken)

        delta, x = jax.grad(loss, has_aux=True)({name: jnp.zeros((E, len(w)), w.dtype) for name, w in W.items()})
        return {name: (delta[name], x[name]) for name in W}

    def form(a_ZO, known, name):
        """The matrices that have these coefficients, [..., Z, O or 1], of what is before and the gradients known."""
        outer = jnp.einsum("...zo,zo,zi->...oi", a_ZO[..., X:, :], *known[name])
        return sum((a_ZO[..., x, :, None] * W_OI for x, W_OI in enumerate(before[name])), outer)

    def reached(known, name):
        """A_t of all tokens, [C, O, I]."""
        if rule.direction is None:
            return form(a[name], known, name)
        flip = lambda W_OI: jnp.swapaxes(W_OI, -1, -2)
        reset_C, rate_C, stay_CR, left_CCR = decay
        d_CIO = flip(rule.direction(form(S_CZ[..., None], known, name)))
        of_name = rows(stay_CR, A0)[name], rows(left_CCR, A0)[name]
        return flip(_decayed(flip(A[name]), flip(A0[name]), d_CIO, reset_C, rate_C, *of_name))

    def there(known):
        """What has been reached where the next chunk begins."""
        at = marks.begins - 1
        return {n: form(a[n][at], known, n) if rule.direction is None else reached(known, n)[at] for n in A0}

    if several is None:
        known, last = gradients(A), A
    else:
        came = {n: jnp.where(marks.begins == len(q_CK), A[n], anchor.get(n, A[n])) for n in A}

        def phase(known, n):
            def take():
                which = lambda: jax.tree.map(lambda *W: jnp.where(n == 0, *W), came, dict(A0))
                anchor = lax.cond(n == 1, lambda: there(known), which)
                put = lambda z, own: lax.dynamic_update_slice_in_dim(z, own, n * E, 0)
                return jax.tree.map(put, known, gradients(anchor)), anchor

            return lax.cond((n == 0) | several, take, lambda: (known, jax.tree.map(jnp.zeros_like, came)))

        empty = jax.tree.map(lambda z: jnp.zeros((3 * len(z), *z.shape[1:]), z.dtype), jax.eval_shape(gradients, A))
        known, anchors = lax.scan(phase, empty, jnp.arange(3))
        last = {n: anchors[n][marks.anchor_C[jnp.sum(marks.there_C) - 1]] for n in anchors}

    if rule.direction is None and rule.weights is None:

        def apply(name, x_CI):
            delta_ZO, x_ZI = known[name]
            y_CO = jnp.einsum("czo,cz,zo->co", a[name][:, X:], x_CI @ x_ZI.T, delta_ZO)
            return sum((a[name][:, x] * (x_CI @ W_OI.T) for x, W_OI in enumerate(before[name])), y_CO)

        y_CV = memory(apply, q_CK, fixed)
        A = {name: form(a[name][-1], known, name) for name in A0}
    else:
        A_C = {name: reached(known, name) for name in A0}
        y_CV = jax.vmap(lambda W, q_K: read(memory, W, q_K, fixed))(each(rule.weights, A_C), q_CK)
        A = {name: A_COI[-1] for name, A_COI in A_C.items()}
    S = {name: form(S_CZ[-1, :, None], known, name) for name in S}
    return (A, S, {n: last[n] for n in anchor}), y_CV
