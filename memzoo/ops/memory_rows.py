"""The chunked form of `memorize` for rules without momentum and window, where every row may forget by itself.

    A_t = since_t A + fresh_t A_0 - sum_z decay(z, t) w_z g_z       z <= t, g_z = delta_z x_z^T the gradient of token z

A decay is a number for each row: the product of what is kept, 1 - alpha, of the tokens after z up to t; 0 where a reset
is among them. Those over long spans are products of those over short ones, and never quotients, so that rows may forget
all there is. For two tokens of different halves of a span it is that to the cut times that from the cut, which leaves
matmuls; pairs of neighbours have theirs. (memzoo/ops/chunks.py does the same to decays per key, which it has as
logarithms, and these cannot be -inf there.) Where `weights` is not linear, the matrices of all tokens are formed.

Dims: C chunk, I and O inputs and outputs of a matrix, R rows of all matrices, or 1, N spans of X tokens: a power of 2,
of which each level has half as many, twice as long.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memzoo.ops.memory import each, read, rows
from memzoo.ops.memory_anchors import at_anchors, gradients

NEIGHBOURS = 4


class Decays(NamedTuple):
    pairs_NXXR: jax.Array  # of neighbours, to t from z; 0 for z > t
    halves: list[tuple[jax.Array, jax.Array]]  # to token t of each second half, from token z of each first, [N, X, R]
    since_CR: jax.Array  # to t, of what came
    until_CR: jax.Array  # to the end, from z


def decays(stay_CR: jax.Array) -> Decays:
    C, X = len(stay_CR), min(NEIGHBOURS, len(stay_CR))
    stay_NXR = spans(stay_CR, X, 1)
    to_t = [[jnp.ones_like(stay_NXR[:, 0])]]
    for t in range(1, X):
        to_t.append([stay_NXR[:, t] * before for before in to_t[-1]] + to_t[0])
    pairs_NXXR = jnp.stack([jnp.stack(row + [jnp.zeros_like(row[0])] * (X - len(row)), axis=1) for row in to_t], axis=1)
    since, until, halves = stay_NXR[:, :1] * pairs_NXXR[:, :, 0], pairs_NXXR[:, -1], []
    while len(since) > 1:
        (since, late), (early, until) = (since[0::2], since[1::2]), (until[0::2], until[1::2])
        halves.append((late, early))
        since = jnp.concatenate([since, late * since[:, -1:]], axis=1)
        until = jnp.concatenate([early * late[:, -1:], until], axis=1)
    return Decays(pairs_NXXR, halves, since[0, :C], until[0, :C])


def spans(x_CI, X, fill=0):
    """[N, X, I], N a power of 2."""
    C = len(x_CI)
    N = 1 << (-(-C // X) - 1).bit_length()
    return jnp.pad(x_CI, ((0, N * X - C), (0, 0)), constant_values=fill).reshape(N, X, -1)


def reads(x_CI: jax.Array, z_CI: jax.Array, w_CO: jax.Array, d: Decays) -> jax.Array:
    """y_t = sum_z (x_t . z_z) decay(z, t) w_z, [C, O]."""
    C, X = len(x_CI), d.pairs_NXXR.shape[1]
    x, z, w = (spans(a, X) for a in (x_CI, z_CI, w_CO))
    P_NXX = jnp.einsum("nti,nzi->ntz", x, z)
    y = jnp.sum(P_NXX[..., None] * d.pairs_NXXR * w[:, None], axis=2)
    for late, early in d.halves:
        P_NXX = jnp.einsum("nti,nzi->ntz", x[1::2], z[0::2])
        far = late * jnp.einsum("ntz,nzo->nto", P_NXX, early * w[0::2])
        y = jnp.concatenate([y[0::2], y[1::2] + far], axis=1)
        x, z, w = (a.reshape(len(y), y.shape[1], -1) for a in (x, z, w))
    return y[0, :C]


def chunk_by_rows(memory, objective, rule, several, A0, fixed, carry, q_CK, k_CK, v_CV, gates, marks):
    """C tokens of one head: (A, S, the last anchor), y_C. S is empty.

    several: whether any row of the batch has more anchors than the first; None for never.
    """
    (A, S, anchor), C = carry, len(q_CK)
    theta_C, _, alpha_CR, rate_C, gamma_C = gates
    one_C1 = jnp.ones((C, 1), alpha_CR.dtype)

    def taken(here_C):
        """What the tokens that are `here` do: what each one keeps and begins with, decays, and what it writes."""
        reset_C1 = (marks.reset_C & here_C)[:, None]
        stay_CR = jnp.where(here_C[:, None], 1 - alpha_CR, 1)
        keep_CR, begin_CR = jnp.where(reset_C1, 0, stay_CR), jnp.where(reset_C1, stay_CR, 0)
        return keep_CR, begin_CR, decays(keep_CR), jnp.where(here_C, theta_C * rate_C * gamma_C, 0)

    def last(known, keep_CR, begin_CR, d, w_C):
        """The matrices that all tokens leave."""
        since, until = rows(d.since_CR[-1], A), rows(d.until_CR, A)
        fresh = None if several is None else rows(jnp.sum(begin_CR * d.until_CR, axis=0), A)
        left = {}
        for n, (delta_CO, x_CI) in known.items():
            left[n] = since[n][:, None] * A[n] - (w_C[:, None] * until[n] * delta_CO).T @ x_CI
            left[n] += 0 if fresh is None else fresh[n][:, None] * A0[n]
        return left

    take = lambda anchor: gradients(memory, objective, each(rule.weights, anchor), fixed, k_CK, v_CV)
    do = taken(marks.there_C)
    if several is None:
        known, anchor_now = take(A), A
    else:
        here_C = marks.there_C & (jnp.arange(C) < marks.begins)
        there = lambda known: last(known, *taken(here_C))
        came = {n: jnp.where(marks.begins == C, A[n], anchor.get(n, A[n])) for n in A}
        put = lambda n, z, own: jnp.where((marks.anchor_C == n)[:, None], own, z)
        known, anchor_now = at_anchors(take, there, put, jax.eval_shape(take, A), came, A0, several, marks)

    if rule.weights is None:
        _, begin_CR, d, w_C = do
        fresh = None if several is None else rows(reads(one_C1, one_C1, begin_CR, d), A)

        def apply(name, x_CI):
            (delta_CO, z_CI), own = known[name], jax.tree.map(lambda x: rows(x, A)[name], d)
            y_CO = own.since_CR * (x_CI @ A[name].T) - reads(x_CI, z_CI, w_C[:, None] * delta_CO, own)
            return y_CO if fresh is None else y_CO + fresh[name] * (x_CI @ A0[name].T)

        y_CV = memory(apply, q_CK, fixed)
        A = last(known, *do)
    else:
        one_by_one = jax.default_backend() == "cpu"  # whose caches have no room for more
        A, y_CV = formed(memory, rule, fixed, A, A0, known, q_CK, do, one_by_one)
    return (A, S, {n: anchor_now[n] for n in anchor}), y_CV


def formed(memory, rule, fixed, A, A0, known, q_CK, do, one_by_one):
    """(A after the last token, y_C), by the matrices of all tokens, which are in memory together or one by one."""
    keep_CR, begin_CR, _, w_C = do
    told = q_CK, keep_CR, begin_CR, {n: (w_C[:, None] * delta_CO, x_CI) for n, (delta_CO, x_CI) in known.items()}

    def then(first, second):
        both = jax.tree.map(jnp.multiply, first[0], second[0])
        return both, jax.tree.map(lambda keep, before, new: keep * before + new, second[0], first[1], second[1])

    def some(A, x):
        q_XK, keep_XR, begin_XR, written = x
        keep, begin = ({n: z[..., None] for n, z in rows(z_XR, A).items()} for z_XR in (keep_XR, begin_XR))
        new = {n: begin[n] * A0[n] - w_XO[..., None] * x_XI[:, None] for n, (w_XO, x_XI) in written.items()}
        kept, new = lax.associative_scan(then, (keep, new))
        A_XOI = {n: kept[n] * A[n] + new[n] for n in A}
        y_XV = jax.vmap(lambda W, q_K: read(memory, W, q_K, fixed))(each(rule.weights, A_XOI), q_XK)
        return {n: W[-1] for n, W in A_XOI.items()}, y_XV

    if not one_by_one:
        return some(A, told)
    A, y_C1V = lax.scan(jax.checkpoint(some, prevent_cse=False), A, jax.tree.map(lambda x: x[:, None], told))
    return A, y_C1V[:, 0]
