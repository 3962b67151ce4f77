"""The chunked form of `memorize` for any rule: what all tokens of a chunk do to a memory, and read from it, at once.

    A_t = sum_z a_tz Z_z        Z: A that came, S that came, A_0, and the gradients, delta_e x_e^T
    A_t q = sum_z a_tz Z_z q    of these last (x_e . q) delta_e: no matrix is formed but at the chunk's end

A gradient with respect to a matrix is an outer product per token. So S_t and A_t are kept as coefficients a of what
they are sums of, for any network of matrices and any linear rule. Where `direction` or `weights` is not linear, the
matrices of all tokens are formed.

Source: Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States" (2024), arXiv:2407.04620,
sec. 2.5, for the dual form of one matrix and of a network.
Differs: with momentum, decay, windows, resets, and chunks that begin anywhere.

Dims: K key, V what the loss is told, C chunk, P = window - 1 tokens before, E = P + C, O and I the outputs and inputs
of a matrix, R rows of all matrices, or 1, X what is known of a matrix before a block: A, S with momentum, A_0 where
resets may be; Z what S and A are sums of.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.ops.memory import each, read, rows
from memzoo.ops.memory_anchors import at_anchors, gradients


class Sums(NamedTuple):
    """What S and A are, of what is known before a block and of its gradients."""

    S_CZ: jax.Array
    a_CZR: jax.Array
    decay: Any  # the rest of the arguments of _decayed, where a direction is not linear; else None


def sums(rule, momentum, aligned, marks, gates):
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


def chunk_by_sums(memory, objective, rule, several, A0, fixed, carry, q_CK, k_EK, v_EV, sums, marks):
    """C tokens of one head: (A, S, the last anchor), y_C.

    several: whether any row of the batch has more anchors than the first; None for never.
    """
    (A, S, anchor), (S_CZ, a_CZR, decay), E = carry, sums, len(k_EK)
    a = rows(a_CZR, A0)
    before = {n: [A[n], *([S[n]] if S else []), *([] if several is None else [A0[n]])] for n in A0}
    X = 1 + bool(S) + (several is not None)

    take = lambda anchor: gradients(memory, objective, each(rule.weights, anchor), fixed, k_EK, v_EV)

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
        known, last = take(A), A
    else:
        came = {n: jnp.where(marks.begins == len(q_CK), A[n], anchor.get(n, A[n])) for n in A}
        put = lambda n, z, own: lax.dynamic_update_slice_in_dim(z, own, n * E, 0)
        thrice = lambda z: jax.ShapeDtypeStruct((3 * len(z), *z.shape[1:]), z.dtype)
        shapes = jax.tree.map(thrice, jax.eval_shape(take, A))
        known, last = at_anchors(take, there, put, shapes, came, A0, several, marks)

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
