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
before, E = P + C, O and I the outputs and inputs of a matrix, R rows of all matrices, or 1, Z what S and A are sums of.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.ops.memory import HEADS, MemoryState, add, each, kept, read, rows, seen


def chunks(memory, objective, rule, A0, fixed, state, xs, reset_BT, C, aligned):
    """Blocks of C tokens, one after the other. One that begins with a chunk and has no reset has a single anchor."""
    B, T = xs[0].shape[:2]
    N = -(-T // C)
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT

    def blocks(x):  # filled up with the last token, as 0 may have no gradient; it is not `there`
        x = jnp.pad(x, ((0, 0), (0, N * C - T), *[(0, 0)] * (x.ndim - 2)), "constant" if x.dtype == bool else "edge")
        return jnp.moveaxis(x.reshape(B, N, C, *x.shape[2:]), 1, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(state, x):
        several = None
        if not aligned:
            # What came in must not pass a reset at the first token, NaN neither, nor its gradient.
            reset_BC = x[-2]
            first = lambda s: reset_BC[:, 0].reshape(-1, *[1] * (s.ndim - 1))
            state = jax.tree.map(lambda s: jnp.where(first(s), jnp.zeros_like(s), s), state)
            reset_BC = reset_BC.at[:, 0].set(False)  # done: these tokens are after what came in, which is zeros
            several = jnp.any(state.place_B != 0) | jnp.any(reset_BC)
            x = (*x[:-2], reset_BC, x[-1])
        one = partial(_chunk, memory, objective, rule, several)
        head = jax.vmap(one, in_axes=(0, 0, HEADS, *[1] * 8, None, None), out_axes=(HEADS, 1))
        return jax.vmap(partial(head, A0, fixed))(state, *x)

    state, y_NBCHV = lax.scan(block, state, tuple(map(blocks, (*xs, reset_BT, jnp.ones((B, T), bool)))))
    return jnp.moveaxis(y_NBCHV, 0, 1).reshape(B, N * C, *y_NBCHV.shape[3:])[:, :T], state


def _chunk(memory, objective, rule, several, A0, fixed, state, q_CK, k_CK, v_CV, *rest):
    """C tokens of one head: (MemoryState, y_C). `there_C` is False for what fills the last block up.

    There is one anchor, or up to three, of which the tokens before the next chunk, those after, and those after a reset
    have one each: the one that came, what has been reached where that chunk begins, and A_0. several: whether any row
    of the batch has more than the first of them; None for never.
    """
    *gates, reset_C, there_C = rest
    theta_C, eta_C, alpha_CR, rate_C, gamma_C = gates
    C, P = len(theta_C), len(state.gamma_BPH)
    c, count = jnp.arange(C), jnp.sum(there_C)
    k_EK, v_EV = seen(state, k_CK, v_CV)
    gamma_E = jnp.concatenate([state.gamma_BPH, gamma_C])
    begins = C - state.place_B  # the token that the next chunk begins with
    sequence_C = jnp.cumsum(reset_C)
    phase_C = jnp.where(sequence_C > 0, 2, jnp.where(c < begins, 0, 1)) if several is not None else jnp.zeros_like(c)
    sequence_E = jnp.concatenate([jnp.zeros(P, sequence_C.dtype), sequence_C])

    # S and A as coefficients of A that came, S that came, A_0, and the gradients at each anchor.
    e = jnp.arange(P + C) - P
    seen_CE = (e <= c[:, None]) & (e > c[:, None] - rule.window) & (sequence_E == sequence_C[:, None])
    write_CE = jnp.where(seen_CE & there_C[:, None], theta_C[:, None] * gamma_E, 0)
    write_CE = [jnp.where(phase_C[:, None] == p, write_CE, 0) for p in range(1 if several is None else 3)]
    write_CZ = jnp.concatenate([jnp.zeros((C, 3), theta_C.dtype), *write_CE], axis=1)
    came_Z, momentum_Z, fresh_Z = jnp.eye(3, write_CZ.shape[1], dtype=theta_C.dtype)
    eta_C, rate_C = jnp.where(reset_C, 0, jnp.where(there_C, eta_C, 1)), jnp.where(there_C, rate_C, 0)
    stay_CR = jnp.where(there_C[:, None], 1 - alpha_CR, 1)
    left_CCR = _products(jnp.concatenate([eta_C[:, None], jnp.where(reset_C[:, None], 0, stay_CR)], axis=1))
    S_CZ = left_CCR[..., 0] @ write_CZ.at[0].add(eta_C[0] * momentum_Z)

    def decayed(start_XR, fresh_XR, x_CXR, stay_CR, left_CCR):
        """A_t = stay_t A_{t-1} - rate_t x_t, from `start` and, at resets, from `fresh`."""
        before_CXR = jnp.where(reset_C[:, None, None], fresh_XR, 0).at[0].add(jnp.where(reset_C[0], 0, start_XR))
        x_CXR = stay_CR[:, None] * before_CXR - rate_C[:, None, None] * x_CXR
        return jnp.einsum("tir,ixr->txr", left_CCR, x_CXR)

    left_CCR, came_Z1 = left_CCR[..., 1:], (came_Z + fresh_Z)[:, None]
    S_CZR = jnp.broadcast_to(S_CZ[..., None], (*S_CZ.shape, stay_CR.shape[1]))
    a = rows(decayed(came_Z1, fresh_Z[:, None], S_CZR, stay_CR, left_CCR), A0)
    stay, left = rows(stay_CR, A0), rows(left_CCR, A0)
    before = {name: jnp.stack([W, state.S.get(name, jnp.zeros_like(W)), A0[name]]) for name, W in state.A.items()}

    def gradients(anchor):
        """dloss/dW of each token is the outer product of these: {name: (delta_EO, x_EI)}."""
        W = each(rule.weights, add(A0, anchor))
        taken = {}

        def loss(taps):
            def apply(name, x_EI):
                taken[name] = x_EI
                return x_EI @ W[name].T + taps[name]

            y_EV = memory(apply, k_EK, fixed)
            return jnp.sum(jax.vmap(objective)(y_EV, v_EV)), dict(taken)

        delta, x = jax.grad(loss, has_aux=True)({name: jnp.zeros((P + C, len(w)), w.dtype) for name, w in W.items()})
        return {name: (delta[name], x[name]) for name in W}

    def form(a_ZO, known, name):
        """The matrices that have these coefficients, [..., Z, O or 1], of what is before and the gradients known."""
        outer = jnp.einsum("...zo,zo,zi->...oi", a_ZO[..., 3:, :], *known[name])
        return jnp.einsum("...bo,boi->...oi", a_ZO[..., :3, :], before[name]) + outer

    def reached(known, name):
        """A_t of all tokens, [C, O, I]."""
        if rule.direction is None:
            return form(a[name], known, name)
        flip = lambda W_OI: jnp.swapaxes(W_OI, -1, -2)
        d_CIO = flip(rule.direction(form(S_CZ[..., None], known, name)))
        start_IO = flip(before[name][0] + A0[name])
        return flip(decayed(start_IO, flip(A0[name]), d_CIO, stay[name], left[name]))

    def there(known):
        """What has been reached where the next chunk begins, as it differs from A_0."""
        at = begins - 1
        W = {n: form(a[n][at], known, n) if rule.direction is None else reached(known, n)[at] for n in A0}
        return {n: W[n] - A0[n] for n in A0}

    if several is None:
        came = state.A  # alone, so that no block's anchor is kept for the backward pass
        known, anchors = gradients(came), jax.tree.map(lambda W: W[None], came)
    else:
        came = jax.tree.map(lambda now, before: jnp.where(begins == C, now, before), state.A, state.anchor or state.A)
        none = jax.tree.map(jnp.zeros_like, came)

        def phase(known, p):
            def take():
                first = {n: jnp.where(p == 0, came[n], 0) for n in came}
                anchor = lax.cond(p == 1, lambda: there(known), lambda: first)
                put = lambda z, own: lax.dynamic_update_slice_in_dim(z, own, p * (P + C), 0)
                return jax.tree.map(put, known, gradients(anchor)), anchor

            return lax.cond((p == 0) | several, take, lambda: (known, none))

        empty = jax.tree.map(lambda z: jnp.zeros((3 * len(z), *z.shape[1:]), z.dtype), jax.eval_shape(gradients, came))
        known, anchors = lax.scan(phase, empty, jnp.arange(3))

    if rule.direction is None and rule.weights is None:

        def apply(name, x_CI):
            delta_ZO, x_ZI = known[name]
            own_CBO = jnp.einsum("boi,ci->cbo", before[name], x_CI)
            y_CO = jnp.einsum("czo,cz,zo->co", a[name][:, 3:], x_CI @ x_ZI.T, delta_ZO)
            return jnp.sum(a[name][:, :3] * own_CBO, axis=1) + y_CO

        y_CV = memory(apply, q_CK, fixed)
        A = {name: form(a[name][-1], known, name) for name in A0}
    else:
        A_C = {name: reached(known, name) for name in A0}
        y_CV = jax.vmap(lambda W, q_K: read(memory, W, q_K, fixed))(each(rule.weights, A_C), q_CK)
        A = {name: A_COI[-1] for name, A_COI in A_C.items()}
    A = {name: A[name] - A0[name] for name in A0}
    S = {name: form(S_CZ[-1, :, None], known, name) for name in state.S}
    anchor = {name: anchors[name][phase_C[count - 1]] for name in state.anchor}

    tail = lambda z_E: lax.dynamic_slice_in_dim(z_E, count, P)
    same_P = tail(sequence_E) == sequence_C[-1]
    past = kept(jnp.where(same_P, tail(gamma_E), 0), tail(k_EK), tail(v_EV))
    since = jnp.where(sequence_C[-1] > 0, -jnp.max(jnp.where(reset_C, c, 0)), state.place_B)
    return MemoryState(A, S, anchor, *past, (since + count).astype(jnp.int32) % C), y_CV


def _products(x_CR):
    """What is left at token t of what was at token i, [t, i, R]: the product of all x after i. 0 for i > t."""
    t_C1, i_C = jnp.arange(len(x_CR))[:, None], jnp.arange(len(x_CR))
    x_CCR = jnp.where((t_C1 > i_C)[..., None], x_CR[:, None], 1)
    return jnp.where((t_C1 >= i_C)[..., None], lax.associative_scan(jnp.multiply, x_CCR), 0)
