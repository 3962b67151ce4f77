"""HAX: Mamba-2, and beside it softmax attention to the keys in the query's hash bucket and to those that score best.

    [k_t ; q_t] = U x_t, k_t over sqrt(N)        x: what Mamba-2's convolution gives, the values too
    bucket(z_t) = the signs of H (z_t - mean of z_1 ... z_t)        z: q or k; H: fixed, random
    A_t = the last R keys s <= t with bucket(k_s) = bucket(q_t)
    B_t = the best M keys s <= t by score_s = MLP [k_s ; unit(q_1 + ... + q_s)]
    y_t = SSM(x)_t + e o sum over s in A_t or B_t of softmax(q_t' k_s) x_s        then Mamba-2's gate and norm

Which keys a query sees is no function of the weights that has a gradient: the scores learn from a loss of their own,
that ranks sampled keys by the attention they get, sum over t >= s of sigmoid(q_t' k_s).

Source: Zhan, Zhao, Zhu, Tang, "Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse
Attention" (2025), arXiv:2507.00449, on Dao, Gu, "Transformers are SSMs" (2024), arXiv:2405.21060; sizes, MLP and
ranking loss from the released code.
Differs: means are those of the tokens so far and H is drawn once, from `seed`: the released code takes means over the
whole sequence, later tokens included, and draws H at each call. The sum of queries is scaled to unit length at each
token, where the released code scales each channel over time. Of equal scores the later one is better. Layers of the
same `seed` have the same H, where the released ones have each their own: give each layer its `seed`. The ranking loss
samples the same tokens in all rows and, without the random key "ranking", in every layer and at every step. It knows of
no padding, which the released code masks: a reset at each token of padding makes texts of them that nothing compares.
The state is that of Mamba-2 and all that A and B can ever need: of every bucket its last R keys with their values, the
M selected ones, and the two means. So it is of one size, 2^bits R + M keys and values, and none is dropped for its age.

Dims: B batch, T time, D width, H heads, P channels of a head, N state size, and that of queries and keys, G groups,
      W conv width, L = W - 1 past inputs, E = H P + 2 G N, I = H P / G, V = H P, F = 2 N, S = 2^bits buckets,
      R keys of a bucket, M selected keys, Z = N + V, a key and its value; X any number of keys;
      C queries of a block, Q = M + C: what was selected before it, and its own tokens; O events, in order of buckets.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo import contract, ops
from memzoo.ops.checks import check_impl
from memzoo.ops.chunks import matmul
from memzoo.ops.initial import log_uniform, small_step, within
from memzoo.ops.ssd import ssd

FORMS = ("scan", "chunk")
BLOCK = 64  # queries of a block
FLOATS = 2**25  # of keys and values side by side, in the chunk form
MOST = 2**24  # tokens that a mean knows of: float32 tells 1 - 1 / MOST from 1


class Keys(NamedTuple):
    """What a query may see. A bucket is a ring; of the selected, the last `size` rows, in order of time."""

    kv_BSRZ: jax.Array
    count_BS: jax.Array  # keys that a bucket was given; from R on, R and what is beyond a multiple of R
    selected_BMZ: jax.Array
    score_BM: jax.Array
    place_BM: jax.Array  # 1 + where in the buckets the key is too, or 0
    size_B: jax.Array


class State(NamedTuple):
    h_BHNP: jax.Array
    past_BLE: jax.Array
    mean_BF: jax.Array  # of keys and queries so far
    seen_B: jax.Array  # tokens so far
    keys: Keys


def step(keys, q_N, kv_Z, score, asks, joins):
    """One token, whose query is of bucket `asks` and its key of bucket `joins`. This is the definition of A and B."""
    kv_SRZ, count_S, selected_MZ, score_M, place_M, size = keys
    (_, R, _), M, N = kv_SRZ.shape, len(score_M), q_N.size
    at = joins * R + count_S[joins] % R
    kv_SRZ = kv_SRZ.at[joins, count_S[joins] % R].set(kv_Z)
    count_S = count_S.at[joins].set(wrapped(count_S[joins] + 1, R))
    place_M = jnp.where(place_M == 1 + at, 0, place_M)  # that key was overwritten

    there_Q = jnp.arange(M + 1) >= M - size
    score_Q = jnp.append(score_M, score)
    worst = jnp.argmin(jnp.where(there_Q, score_Q, -jnp.inf))
    stays_M = jnp.arange(M) + (jnp.arange(M) >= worst)
    selected_MZ = jnp.concatenate([selected_MZ, kv_Z[None]])[stays_M]
    score_M, place_M = score_Q[stays_M], jnp.append(place_M, 1 + at)[stays_M]
    size = jnp.minimum(size + 1, M)

    in_bucket_R = jnp.arange(R) < count_S[asks]
    elsewhere_M = (place_M == 0) | ((place_M - 1) // R != asks)  # or it would count twice
    seen_X = jnp.concatenate([in_bucket_R, (jnp.arange(M) >= M - size) & elsewhere_M])
    k_XN, v_XV = jnp.split(jnp.concatenate([kv_SRZ[asks], selected_MZ]), [N], axis=-1)
    y_V = nn.softmax(jnp.where(seen_X, k_XN @ q_N, -jnp.inf)) @ v_XV
    return Keys(kv_SRZ, count_S, selected_MZ, score_M, place_M, size), y_V


def wrapped(count, R):
    """The same number of the ring's keys, and the same next place, from a count that does not grow."""
    return jnp.where(count < R, count, R + count % R)


class HAX(nn.Module):
    """x_BTD -> (y_BTD, State). The state is float32, or float64 when `dtype` is, and int32 counters.

    Sows `ranking`, the loss that trains the scores, times `ranking_weight`, into the collection "losses": apply with
    mutable=["losses"] and add what is there to the loss. It samples tokens by the random key "ranking", if `rngs` has
    one, and otherwise the same ones each time.
    Raises ValueError, by name, for fields out of their range, and for inputs, state or resets that do not fit.
    """

    width: int
    expand: int = 2
    head_dim: int | None = None  # P; 64, or the largest divisor of 64 that also divides expand width
    state_size: int = 128  # N
    groups: int = 1
    conv_width: int = 4
    bucket_keys: int = 32  # R, the half of the released 64 keys per query
    selected_keys: int = 32  # M, the other half, and the number of tokens that the ranking loss samples
    bits: int = 8
    ranking_weight: float = 0.1
    seed: int = 0  # of H
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, int, int, int, int]:
        """(H, P, N, G, L)"""
        contract.positive(width=self.width, expand=self.expand, state_size=self.state_size, conv_width=self.conv_width)
        contract.positive(bucket_keys=self.bucket_keys, selected_keys=self.selected_keys, bits=self.bits)
        if self.bits > 16:
            raise ValueError(f"bits: expected at most 16, for 2^bits buckets, got {self.bits}")
        if not contract.whole_number(self.seed) or self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {self.seed!r}")
        inner = self.expand * self.width
        P = math.gcd(64, inner) if self.head_dim is None else self.head_dim
        H = contract.divisible("expand * width", inner, "head_dim", P)
        contract.divisible("heads = expand * width / head_dim", H, "groups", self.groups)
        return H, P, self.state_size, self.groups, self.conv_width - 1

    def initial_state(self, batch: int) -> State:
        (H, P, N, G, L), S, R, M = self.sizes(), 2**self.bits, self.bucket_keys, self.selected_keys
        zeros = partial(jnp.zeros, dtype=contract.state_dtype(self.dtype))
        none = partial(jnp.zeros, dtype=jnp.int32)
        rings, selected = (batch, S, R, N + H * P), (batch, M, N + H * P)
        keys = Keys(
            zeros(rings), none((batch, S)), zeros(selected), zeros((batch, M)), none((batch, M)), none((batch,))
        )
        past_BLE = zeros((batch, L, H * P + 2 * G * N))
        return State(zeros((batch, H, N, P)), past_BLE, zeros((batch, 2 * N)), none((batch,)), keys)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: State | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        check_impl("hax", self.impl, FORMS)
        fresh = state is None
        state = contract.begin(self, x_BTD, state, reset_BT)
        (H, P, N, G, L), (B, T, D) = self.sizes(), x_BTD.shape
        V, wide = H * P, contract.state_dtype(self.dtype)
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gates: dict[str, Any] = {"dtype": wide, "param_dtype": self.param_dtype, "precision": lax.Precision.HIGHEST}

        # What decides on keys is not rounded, by the accelerator's products either: it would be in other buckets.
        xBC_BTE = nn.Dense(V + 2 * G * N, use_bias=False, name="xBC", **gates)(x_BTD)
        f_WE = self.param("conv", within((L + 1) ** -0.5), (L + 1, xBC_BTE.shape[-1]), self.param_dtype)
        bias_E = self.param("conv_bias", within((L + 1) ** -0.5), xBC_BTE.shape[-1:], self.param_dtype)
        xBC_BTE, past_BLE = ops.short_conv(xBC_BTE, f_WE, state.past_BLE, reset_BT)
        v_BTV, B_BTE, C_BTE = jnp.split(nn.silu(xBC_BTE + bias_E.astype(wide)), [V, V + G * N], axis=-1)

        kq_BTF = nn.Dense(2 * N, use_bias=False, name="kq", **gates)(v_BTV)
        k_BTN, q_BTN = jnp.split(kq_BTF, 2, axis=-1)
        k_BTN = k_BTN * N**-0.5
        seen_BT = counts(state.seen_B, reset_BT, T)
        mean_BTF, mean_BF = means(kq_BTF, seen_BT, state.mean_BF, reset_BT, self.impl)
        joins_BT, asks_BT = (self.bucket(z_BTN) for z_BTN in jnp.split(kq_BTF - mean_BTF, 2, axis=-1))

        layers = [nn.Dense(size, name=f"score_{i}", **gates) for i, size in enumerate((2 * N, 2 * N, 1))]
        mlp = lambda x: layers[2](nn.relu(layers[1](nn.relu(layers[0](x)))))[..., 0]
        features_BTF = jnp.concatenate([k_BTN, ops.unit(mean_BTF[..., N:])], axis=-1)
        score_BT = mlp(features_BTF)
        key = self.make_rng("ranking") if self.has_rng("ranking") else jax.random.key(self.seed)
        chosen = jax.random.permutation(key, T)[: self.selected_keys]
        fixed_BTF, fixed = lax.stop_gradient(features_BTF), lax.stop_gradient((q_BTN, k_BTN))
        order = ranking(mlp(fixed_BTF[:, chosen]), *fixed, chosen, reset_BT)
        contract.add_loss(self, "ranking", self.ranking_weight * order)

        xs = q_BTN, jnp.concatenate([k_BTN, v_BTV], axis=-1), score_BT, asks_BT, joins_BT
        found_BTV, keys = attend(*xs, state.keys, reset_BT, self.dtype, self.impl, fresh)

        dt = nn.Dense(H, bias_init=small_step, name="dt", **gates)
        A_H = -jnp.exp(self.param("A_log", log_uniform(1.0, 16.0), (H,), self.param_dtype).astype(wide))
        D_H = self.param("D", nn.initializers.ones, (H,), self.param_dtype).astype(wide)
        C_BTGN, B_BTGN = (z.astype(self.dtype).reshape(B, T, G, N) for z in (C_BTE, B_BTE))
        rates = nn.softplus(dt(x_BTD)), A_H, D_H
        x_BTHP = v_BTV.astype(self.dtype).reshape(B, T, H, P)
        y_BTHP, h_BHNP = ssd(C_BTGN, B_BTGN, x_BTHP, *rates, state.h_BHNP, reset_BT, self.impl)

        scale_V = self.param("scale", nn.initializers.ones, (V,), self.param_dtype).astype(self.dtype)
        y_BTHP = y_BTHP + (scale_V * found_BTV).reshape(y_BTHP.shape)
        z_BTHP = nn.DenseGeneral((H, P), name="gate", **kinds)(x_BTD)
        y_BTGI = (y_BTHP * nn.silu(z_BTHP)).reshape(B, T, G, V // G)
        norm: dict[str, Any] = {"epsilon": 1e-5, "feature_axes": (-2, -1), "param_dtype": self.param_dtype}
        y_BTGI = nn.RMSNorm(name="norm", dtype=self.dtype, **norm)(y_BTGI)
        y_BTD = nn.DenseGeneral(D, axis=(-2, -1), name="out", **kinds)(y_BTGI)
        return y_BTD, State(h_BHNP, past_BLE, mean_BF, seen_BT[:, -1], keys)

    def bucket(self, z_BTN):
        """The number that the signs of H z make."""
        N, bits = self.state_size, self.bits
        H_NX = jnp.asarray(np.random.default_rng(self.seed).normal(size=(N, bits)), z_BTN.dtype)
        return jnp.sum((matmul("btn,nx->btx", z_BTN, H_NX) > 0) << jnp.arange(bits), axis=-1, dtype=jnp.int32)


def counts(seen_B, reset_BT, T):
    """Which token of its sequence each one is, from 1."""
    t_T = jnp.arange(T, dtype=jnp.int32)
    start_BT = jnp.broadcast_to(-seen_B[:, None], (len(seen_B), T))
    if reset_BT is not None:
        start_BT = lax.cummax(jnp.where(reset_BT, t_T, start_BT), axis=1)
    return jnp.minimum(t_T - start_BT + 1, MOST)


def means(x_BTF, seen_BT, mean_BF, reset_BT, impl):
    """The means of all x so far. Returns (mean_BTF, mean_BF)."""
    share_BT1 = 1 / seen_BT[..., None].astype(x_BTF.dtype)
    keep_BTF = jnp.broadcast_to(1 - share_BT1, x_BTF.shape)
    return ops.linear_scan(keep_BTF, share_BT1 * x_BTF, mean_BF, reset_BT, impl="scan" if impl == "scan" else "auto")


def ranking(score_BX, q_BTN, k_BTN, chosen_X, reset_BT):
    """Cross-entropy of which of two gets more attention, by the scores: of all pairs of chosen tokens of a sequence."""
    B, T, _ = q_BTN.shape
    of_BT = jnp.zeros((B, T), jnp.int32) if reset_BT is None else jnp.cumsum(reset_BT, axis=1)
    attention_BTX = nn.sigmoid(matmul("btn,bxn->btx", q_BTN, k_BTN[:, chosen_X]))
    sees_BTX = (jnp.arange(T)[:, None] >= chosen_X) & (of_BT[..., None] == of_BT[:, None, chosen_X])
    mass_BX = jnp.sum(jnp.where(sees_BTX, attention_BTX, 0), axis=1)
    pairs = lambda x_BX: (x_BX[:, :, None], x_BX[:, None])
    (one, other), (of_one, of_other) = pairs(mass_BX), pairs(of_BT[:, chosen_X])
    more_BXX = jnp.where(one == other, 0.5, one > other)
    logit_BXX = jnp.subtract(*pairs(score_BX))
    return jnp.mean(nn.softplus(logit_BXX) - more_BXX * logit_BXX, where=of_one == of_other)


def attend(q_BTN, kv_BTZ, score_BT, asks_BT, joins_BT, keys, reset_BT, dtype, impl="auto", fresh=False):
    """All T tokens; fresh: no keys are there to begin with. Returns (y_BTV, Keys)."""
    (B, T, _), (R, Z) = q_BTN.shape, keys.kv_BSRZ.shape[2:]
    xs = q_BTN, kv_BTZ, score_BT, asks_BT, joins_BT
    if impl == "scan" or (impl == "auto" and T == 1):
        y_BTV, keys = ops.recur(step, keys, xs, reset_BT)
        return y_BTV.astype(dtype), keys
    if reset_BT is None:
        reset_BT = jnp.zeros((B, T), bool)
    together = max(1, FLOATS // (B * min(BLOCK, T) * R * Z))
    row = partial(attend_row, dtype=dtype, together=together, fresh=fresh)
    y_BTV, keys = jax.vmap(row)(keys, *xs, reset_BT)
    return y_BTV.astype(dtype), keys


def attend_row(keys, q_TN, kv_TZ, score_T, asks_T, joins_T, reset_T, dtype, together, fresh):
    """All T tokens of one row: the keys in order of buckets, so that those of a query lie side by side, and blocks.

    Times before this call are -1. Selected keys are numbered: those of the state, then the tokens.
    """
    (S, R, Z), (T, N), M = keys.kv_BSRZ.shape, q_TN.shape, len(keys.score_BM)
    t_T = jnp.arange(T)
    start_T = lax.cummax(jnp.where(reset_T, t_T, -1))
    goes_on = start_T[-1] < 0

    # Events: the keys of the buckets, the oldest first, then the key and the query of each token.
    old = 0 if fresh else S * R
    slot_SR = (keys.count_BS[:, None] + jnp.arange(R)) % R
    there_SR = jnp.arange(R) >= R - keys.count_BS[:, None]
    bucket_X = jnp.where(there_SR, jnp.arange(S)[:, None], S).ravel()[:old]
    kv_XZ = jnp.take_along_axis(keys.kv_BSRZ, slot_SR[..., None], axis=1).reshape(-1, Z)[:old]
    bucket_X, kv_XZ = jnp.concatenate([bucket_X, joins_T]), jnp.concatenate([kv_XZ, kv_TZ])
    time_X = jnp.concatenate([jnp.full(old, -1), t_T])

    bucket_O = jnp.concatenate([bucket_X[:old], jnp.stack([joins_T, asks_T], axis=1).ravel()])
    is_key_O = jnp.concatenate([jnp.ones(old, bool), jnp.arange(2 * T) % 2 == 0])
    order_O = jnp.argsort(bucket_O, stable=True)
    before_O = jnp.zeros_like(order_O).at[order_O].set(jnp.cumsum(is_key_O[order_O]))
    end_T = before_O[old + 1 :: 2]  # a query's keys end before this one
    rank_X = jnp.concatenate([before_O[:old], before_O[old::2]]) - 1
    sorted_X = jnp.zeros_like(rank_X).at[rank_X].set(jnp.arange(rank_X.size))
    # R rows in front, of time -2, so that there are R before every end.
    front = lambda x_XY, **kind: jnp.pad(x_XY[sorted_X], [(R, 0)] + [(0, 0)] * (x_XY.ndim - 1), **kind)
    ordered = front(kv_XZ.astype(dtype)), front(bucket_X), front(time_X, constant_values=-2)

    kv_QZ = jnp.concatenate([keys.selected_BMZ, kv_TZ])
    score_Q = jnp.concatenate([keys.score_BM, score_T])
    place_M = keys.place_BM - 1
    from_M = jnp.where(place_M < 0, 0, place_M // R * R + (place_M - keys.count_BS[place_M // R]) % R)
    known_M = (place_M >= 0) & (not fresh)
    bucket_Q = jnp.concatenate([jnp.where(known_M, place_M // R, -1), joins_T])
    rank_Q = jnp.concatenate([jnp.where(known_M, rank_X[from_M], -1), rank_X[old:]])

    selection, (number_NM, chosen_NCQ) = select(score_Q, keys.size_B, start_T, min(BLOCK, T))
    C = chosen_NCQ.shape[1]
    # Tokens behind the last are copies of it, or their softmax could be of nothing.
    padded = lambda x_TX: jnp.pad(x_TX, [(0, -T % C)] + [(0, 0)] * (x_TX.ndim - 1), mode="edge")
    blocks = lambda x_TX: padded(x_TX).reshape(-1, C, *x_TX.shape[1:])

    def block(xs):
        q_CN, end_C, asks_C, start_C, number_M, own_C, chosen_CQ = xs
        window = lambda x_XY: jax.vmap(lambda end: lax.dynamic_slice_in_dim(x_XY, end, R))(end_C)
        kv_CRZ, bucket_CR, time_CR = (window(x_XY) for x_XY in ordered)
        seen_CR = (bucket_CR == asks_C[:, None]) & (time_CR >= start_C[:, None])
        number_Q = jnp.concatenate([number_M, own_C])
        twice_CQ = (bucket_Q[number_Q] == asks_C[:, None]) & (rank_Q[number_Q] >= end_C[:, None] - R)
        seen_CQ = chosen_CQ & ~twice_CQ
        near_QZ = jnp.where(jnp.any(seen_CQ, axis=0)[:, None], kv_QZ[number_Q].astype(dtype), 0)
        kv_CRZ = jnp.where(seen_CR[..., None], kv_CRZ, 0)
        q_CN = q_CN.astype(dtype)
        logit_CR = matmul("cn,crn->cr", q_CN, kv_CRZ[..., :N])
        logit_CQ = matmul("cn,qn->cq", q_CN, near_QZ[:, :N])
        logits = jnp.concatenate([logit_CR, logit_CQ], axis=1)
        p_CX = nn.softmax(jnp.where(jnp.concatenate([seen_CR, seen_CQ], axis=1), logits, -jnp.inf)).astype(dtype)
        return matmul("cr,crv->cv", p_CX[:, :R], kv_CRZ[..., N:]) + matmul("cq,qv->cv", p_CX[:, R:], near_QZ[:, N:])

    own_T = jnp.arange(M, M + T)
    xs = *(blocks(x_TX) for x_TX in (q_TN, end_T, asks_T, start_T)), number_NM, blocks(own_T), chosen_NCQ
    if together * C >= T:
        y_NCV = jax.vmap(lambda *xs: block(xs))(*xs)
    else:
        y_NCV = lax.map(jax.checkpoint(block), xs, batch_size=together)
    y_TV = y_NCV.reshape(-1, Z - N)[:T]

    # The buckets at the end: the last keys of the last sequence.
    new_S = jnp.zeros(S, jnp.int32).at[joins_T].add((t_T >= start_T[-1]).astype(jnp.int32))
    count_S = jnp.where(goes_on, keys.count_BS, 0) + new_S
    last_S = jnp.cumsum(jnp.zeros(S + 1, jnp.int32).at[bucket_X].add(1))[:S]
    back_SR = (count_S[:, None] - 1 - jnp.arange(R)) % R
    kept_SR = back_SR < count_S[:, None]
    row_SR = sorted_X[jnp.where(kept_SR, last_S[:, None] - 1 - back_SR, 0)]
    kv_SRZ = jnp.where(kept_SR[..., None], kv_XZ[row_SR], 0)

    number_M, there_M = selection
    back_M = last_S[bucket_Q[number_M]] - rank_Q[number_M]
    count_M = count_S[bucket_Q[number_M]]
    in_bucket_M = there_M & (rank_Q[number_M] >= 0) & (back_M <= jnp.minimum(count_M, R))
    place_M = (1 + bucket_Q[number_M] * R + (count_M - back_M) % R).astype(jnp.int32)
    return y_TV, Keys(
        kv_SRZ,
        wrapped(count_S, R),
        jnp.where(there_M[:, None], kv_QZ[number_M], 0),
        jnp.where(there_M, score_Q[number_M], 0),
        jnp.where(in_bucket_M, place_M, 0),
        jnp.sum(there_M, dtype=jnp.int32),
    )


def select(score_X, size, start_T, C):
    """The best M of the keys so far, for each token. score_X: of the M selected before, the last `size` of them, and T.

    Returns (number_M, there_M) after the last token and, for each block of C tokens, (number_NM, chosen_NCQ): those
    selected before it, by number, and which of them and of its own tokens are selected at each of its tokens.
    """
    T = len(start_T)
    M, N = len(score_X) - T, -(-T // C)
    score_X = lax.stop_gradient(score_X)
    behind = lambda x_T, **kind: jnp.pad(x_T, (0, N * C - T), **kind).reshape(N, C)

    def block(carry, xs):
        number_M, there_M, began = carry
        score_C, start_C, t_C = xs
        number_Q = jnp.concatenate([number_M, M + t_C])
        score_Q = jnp.concatenate([score_X[number_M], score_C])
        own_CC = (t_C <= t_C[:, None]) & (start_C == start_C[:, None]) & (t_C < T)
        there_CQ = jnp.concatenate([there_M & (start_C == began)[:, None], own_CC], axis=1)
        later_QQ = jnp.arange(M + C)[:, None] > jnp.arange(M + C)
        better_QQ = (score_Q[:, None] > score_Q) | ((score_Q[:, None] == score_Q) & later_QQ)
        # Sums of 0 and 1 below 2^24 are exact in float32.
        ahead_CQ = there_CQ.astype(jnp.float32) @ better_QQ.astype(jnp.float32)
        chosen_CQ = there_CQ & (ahead_CQ < M)
        stays_M = jnp.argsort(chosen_CQ[-1], stable=True)[-M:]
        return (number_Q[stays_M], chosen_CQ[-1][stays_M], start_C[-1]), (number_M, chosen_CQ)

    first = jnp.arange(M), jnp.arange(M) >= M - size, jnp.full((), -1, start_T.dtype)
    xs = behind(score_X[M:]), behind(start_T, mode="edge"), jnp.arange(N * C).reshape(N, C)
    (number_M, there_M, _), blocks = lax.scan(block, first, xs)
    return (number_M, there_M), blocks
