"""Hydra: a stack of SSMs with sparse attention in some layers, experts for whole chunks in others, and two memories.

    u = norm(x)        x = x + SSM(u) + a attention(u) + b experts(u)        every layer; every 4th; every 2nd
    x = x + workspace(norm(x))                                               slots that chunks write and tokens read
    x = x + sigmoid(w x + c) W values of the nearest keys of N^2             the product-key memory (PKM)

Workspace, of tokens u, in keys and values of slots, with r, w = softmax(W_c u):

    read     r_t W_o V' softmax(K q_t / sqrt(R))                    what whole chunks before that of t have written
    write    K_m <- K_m + g_m (k - K_m)        V_m <- V_m + g_m (v - V_m)        g = w softmax(K k / sqrt(R))
             for each slot m, once per chunk, with the means of its tokens' k, v and W_c u

Source: Chaudhary, Browning, "Hydra: A 1.6B-Parameter State-Space Language Model with Sparse Attention,
Mixture-of-Experts, and Memory" (2025), arXiv:2508.15099, and its released prototype (sidcraftscode/Hydra), which has
the sizes and places that are the defaults here. PKM: Lample, Sablayrolles, Ranzato, Denoyer, Jegou, "Large Memory
Layers with Product Keys" (2019), arXiv:1907.05242.
Differs: the paper is a blueprint, and its prototype not causal: experts are chosen, and the workspace written and read,
by means over tokens to come. Here the first token of a chunk, whose hidden state knows the past, chooses the chunk's
experts, and what a chunk writes is read from the next chunk on. Slots are written by attention, not those of smallest
norm by a tenth, and begin anew with each text. The workspace has one set of weights, but slots for each layer: if all
layers wrote the same, a token would wait for the top layer of the one before it. A slot has a key and a value of its
own, at first N(0, 1) and 0.01 N(0, 1); the prototype's is one vector of width D, at first 0.01 N(0, 1), whose key and
value are projections at each read. Both memories are on, where the prototype's are off by default. The SSM is Mamba-2,
not a convolution; attention has rotary places, and sinks as its global tokens. PKM takes k of the k^2 candidates, as
its paper does, not all. Layers are pre-norm, without dropout.

Dims: B batch, T time, D width, Z vocabulary, C chunk, E experts, J those that a token gets, of experts or of keys,
      F hidden, M slots, R rank of the workspace, N sub-keys of each half, K sub-key, V value, A = J B T rows of tokens,
      L tokens of a block, G = 2 R + 2 numbers to average.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import lax
from jax.typing import DTypeLike

from memzoo import contract, ops, zoo
from memzoo.models.backbone import begin, embed, logits
from memzoo.ops.checks import check_impl
from memzoo.ops.chunks import matmul
from memzoo.ops.rotary import places

FORMS = ("scan", "chunk")


class Choice(NamedTuple):
    """What the first token of the present chunk said, and how many tokens of the chunk there were."""

    logits_BE: jax.Array
    count_B: jax.Array


class Slots(NamedTuple):
    """The workspace less the learned slots that it begins with, and the sums over a chunk that is not yet written."""

    key_BMR: jax.Array
    value_BMR: jax.Array
    sum_BG: jax.Array
    count_B: jax.Array


class LayerState(NamedTuple):
    """Of each part of a layer; () where it has none."""

    ssm: Any
    attention: Any
    choice: Any
    slots: Any


class Experts(nn.Module):
    """x_BTD, Choice -> the sum of its chunk's experts' SwiGLUs, Choice.

    Sows `load_balance` into the collection "losses": `balance_weight` times top_k where tokens use all experts alike,
    more where they do not. To train with it, apply with mutable=["losses"] and add what is there to the loss.
    """

    experts: int
    top_k: int
    hidden: int
    chunk: int
    impl: str
    dtype: DTypeLike
    param_dtype: DTypeLike
    balance_weight: float = 0.01

    @nn.compact
    def __call__(self, x_BTD: jax.Array, state: Choice, reset_BT: jax.Array | None) -> tuple[jax.Array, Choice]:
        E, F, D, wide = self.experts, self.hidden, x_BTD.shape[-1], contract.state_dtype(self.dtype)
        router = nn.Dense(E, use_bias=False, dtype=wide, param_dtype=self.param_dtype, name="router")
        logits_BTE, state = of_first(router(x_BTD), state, reset_BT, self.chunk)
        top_BTJ, which_BTJ = lax.top_k(logits_BTE, self.top_k)
        weight_BTJ = nn.softmax(top_BTJ)
        contract.add_loss(self, "load_balance", self.balance_weight * load_balance(logits_BTE, which_BTJ))

        begin_as = nn.initializers.lecun_normal(batch_axis=0)
        gate_up_EDF = self.param("gate_up", begin_as, (E, D, 2 * F), self.param_dtype).astype(self.dtype)
        out_EFD = self.param("out", begin_as, (E, F, D), self.param_dtype).astype(self.dtype)
        all_of_them = self.impl == "scan" or (self.impl == "auto" and jax.default_backend() == "cpu")
        mix = every_expert if all_of_them else chosen_experts
        return mix(x_BTD, which_BTJ, weight_BTJ, gate_up_EDF, out_EFD).astype(self.dtype), state


def of_first(x_BTE, state, reset_BT, C):
    """For each token, x of the first token of its chunk of C. Chunks begin with the text. Returns (x_BTE, Choice)."""
    T = x_BTE.shape[1]
    count_BT = places(state.count_B, T, reset_BT) % C
    first_BT = jnp.arange(T) - count_BT
    here_BTE = jnp.take_along_axis(x_BTE, jnp.maximum(first_BT, 0)[..., None], axis=1)
    x_BTE = jnp.where((first_BT >= 0)[..., None], here_BTE, state.logits_BE[:, None])
    return x_BTE, Choice(x_BTE[:, -1], (count_BT[:, -1] + 1) % C)


def load_balance(logits_BTE, which_BTJ):
    """E sum over e of the share of tokens that choose e times its mean probability: Switch Transformer,
    arXiv:2101.03961, eq. 4-6, for J choices each."""
    E = logits_BTE.shape[-1]
    share_E = jnp.mean(jnp.sum(jax.nn.one_hot(which_BTJ, E), axis=2), axis=(0, 1))
    return E * jnp.sum(share_E * jnp.mean(nn.softmax(logits_BTE), axis=(0, 1)))


def every_expert(x_BTD, which_BTJ, weight_BTJ, gate_up_EDF, out_EFD):
    """The definition: all experts, most of them times 0."""
    wide = weight_BTJ.dtype
    weight_BTE = jnp.einsum("btj,btje->bte", weight_BTJ, jax.nn.one_hot(which_BTJ, len(out_EFD), dtype=wide))
    h_BTEF = jnp.einsum("btd,edf->btef", x_BTD, gate_up_EDF, preferred_element_type=wide)
    gate_BTEF, up_BTEF = jnp.split(h_BTEF, 2, axis=-1)
    y_BTEF = (nn.silu(gate_BTEF) * up_BTEF * weight_BTE[..., None]).astype(x_BTD.dtype)
    return jnp.einsum("btef,efd->btd", y_BTEF, out_EFD, preferred_element_type=wide)


def chosen_experts(x_BTD, which_BTJ, weight_BTJ, gate_up_EDF, out_EFD):
    """The same of the chosen ones alone: tokens in the order of their experts."""
    (B, T, D), J, wide = x_BTD.shape, which_BTJ.shape[-1], weight_BTJ.dtype
    order_A = jnp.argsort(which_BTJ.reshape(-1), stable=True)
    tokens_E = jnp.bincount(which_BTJ.reshape(-1), length=len(out_EFD)).astype(jnp.int32)
    dot = partial(lax.ragged_dot, group_sizes=tokens_E, preferred_element_type=wide)
    gate_AF, up_AF = jnp.split(dot(x_BTD.reshape(B * T, D)[order_A // J], gate_up_EDF), 2, axis=-1)
    y_AF = (nn.silu(gate_AF) * up_AF * weight_BTJ.reshape(-1, 1)[order_A]).astype(x_BTD.dtype)
    return jnp.zeros((B * T, D), wide).at[order_A // J].add(dot(y_AF, out_EFD)).reshape(B, T, D)


class ProductKeys(nn.Module):
    """x_BTD -> a gate times what the nearest of N^2 keys hold, where each key is a pair of sub-keys."""

    sub_keys: int
    key_dim: int
    value_dim: int
    top_k: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        N, K, wide, normal = self.sub_keys, self.key_dim, contract.state_dtype(self.dtype), nn.initializers.normal
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        q_BT2K = nn.DenseGeneral((2, K), use_bias=False, name="query", **kinds)(x_BTD)
        keys_2NK = self.param("keys", normal(0.02), (2, N, K), self.param_dtype).astype(self.dtype)
        values_XV = self.param("values", normal(0.01), (N * N, self.value_dim), self.param_dtype)

        score_BTN, other_BTN = jnp.moveaxis(matmul("bthk,hnk->bthn", q_BT2K, keys_2NK), 2, 0)
        score_BTJ, which_BTJ = nearest(score_BTN, other_BTN, self.top_k)
        v_BTJV = values_XV[which_BTJ].astype(self.dtype)
        y_BTV = matmul("btj,btjv->btv", nn.softmax(score_BTJ).astype(self.dtype), v_BTJV).astype(self.dtype)

        seldom = nn.initializers.constant(-2.0)
        gate_BT1 = nn.Dense(1, bias_init=seldom, dtype=wide, param_dtype=self.param_dtype, name="gate")(x_BTD)
        y_BTD = nn.Dense(x_BTD.shape[-1], use_bias=False, name="out", **kinds)(y_BTV)
        return (nn.sigmoid(gate_BT1) * y_BTD).astype(self.dtype)


def nearest(score_BTN, other_BTN, J):
    """The J largest of all N^2 sums of two scores, and which they are, from J^2 candidates.

    A sum among the J largest has either score among the J largest of its half.
    """
    s_BTJ, i_BTJ = lax.top_k(score_BTN, J)
    t_BTJ, j_BTJ = lax.top_k(other_BTN, J)
    sums_BTJJ = s_BTJ[..., :, None] + t_BTJ[..., None, :]
    best_BTJ, at_BTJ = lax.top_k(sums_BTJJ.reshape(*sums_BTJJ.shape[:2], J * J), J)
    take = partial(jnp.take_along_axis, axis=-1)
    return best_BTJ, take(i_BTJ, at_BTJ // J) * score_BTN.shape[-1] + take(j_BTJ, at_BTJ % J)


class Workspace(nn.Module):
    """x_BTD, Slots -> what tokens read of the slots that whole chunks before have written, Slots."""

    slots: int
    rank: int
    chunk: int
    impl: str
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array, state: Slots, reset_BT: jax.Array | None) -> tuple[jax.Array, Slots]:
        M, R, wide, normal = self.slots, self.rank, contract.state_dtype(self.dtype), nn.initializers.normal
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        key_MR = self.param("keys", normal(1.0), (M, R), self.param_dtype).astype(wide)  # apart, so that they differ
        value_MR = self.param("values", normal(0.01), (M, R), self.param_dtype).astype(wide)
        q_BTR, k_BTR, v_BTR = (nn.Dense(R, name=name, **kinds)(x_BTD) for name in ("query", "key", "value"))
        control_BT2 = nn.Dense(2, name="control", **{**kinds, "dtype": wide})(x_BTD)

        q_BTR, x_BTG = ops.widen((q_BTR, jnp.concatenate([k_BTR, v_BTR, control_BT2], axis=-1)))
        y_BTR, state = workspace(q_BTR, x_BTG, key_MR, value_MR, state, reset_BT, self.chunk, self.impl)
        y_BTD = nn.Dense(x_BTD.shape[-1], name="out", **kinds)(y_BTR.astype(self.dtype))
        return (nn.softmax(control_BT2)[..., :1] * y_BTD).astype(self.dtype), state


def step(slots, q_R, x_G, key_MR, value_MR, C):
    """One token: the chunk before is written, if it is whole; then the token reads. This is the definition."""
    whole = slots.count_B == C
    slots = jax.tree.map(partial(jnp.where, whole), written(slots, key_MR, value_MR, C), slots)
    y_R = read(slots, q_R, key_MR, value_MR)
    return slots._replace(sum_BG=slots.sum_BG + x_G, count_B=slots.count_B + 1), y_R


def read(slots, q_XR, key_MR, value_MR):
    key_MR, value_MR = key_MR + slots.key_BMR, value_MR + slots.value_BMR
    return nn.softmax(q_XR @ key_MR.T / math.sqrt(q_XR.shape[-1])) @ value_MR


def written(slots, key_MR, value_MR, C):
    """The slots once the means of a whole chunk are in them, and the next chunk's sums."""
    R = key_MR.shape[1]
    k_R, v_R, control_2 = jnp.split(slots.sum_BG / C, [R, 2 * R])
    key_MR, value_MR = key_MR + slots.key_BMR, value_MR + slots.value_BMR
    g_M1 = (nn.softmax(control_2)[1] * nn.softmax(key_MR @ k_R / math.sqrt(R)))[:, None]
    key_MR, value_MR = slots.key_BMR + g_M1 * (k_R - key_MR), slots.value_BMR + g_M1 * (v_R - value_MR)
    return Slots(key_MR, value_MR, jnp.zeros_like(slots.sum_BG), jnp.zeros_like(slots.count_B))


def workspace(q_BTR, x_BTG, key_MR, value_MR, slots, reset_BT, C, impl="auto"):
    """All T tokens. Returns (y_BTR, Slots)."""
    B, T, _ = q_BTR.shape
    if impl == "scan" or T == 1:
        one = partial(step, key_MR=key_MR, value_MR=value_MR, C=C)
        y_BTR, slots = ops.recur(one, slots, (q_BTR, x_BTG), reset_BT)
        return y_BTR, slots
    L = min(C, T)
    there_BT = jnp.ones((B, T), bool)
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, -T % L)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, L, *x.shape[2:]), 1, 0)

    with jax.default_matmul_precision("highest"):  # as in the definition
        row = jax.checkpoint(jax.vmap(partial(_block, key_MR=key_MR, value_MR=value_MR, C=C)))
        xs = tuple(map(split, (q_BTR, x_BTG, reset_BT, there_BT)))
        slots, y_NBLR = lax.scan(lambda slots, xs: row(slots, *xs), slots, xs)
    return jnp.moveaxis(y_NBLR, 0, 1).reshape(B, -1, y_NBLR.shape[-1])[:, :T], slots


def _block(slots, q_LR, x_LG, reset_L, there_L, key_MR, value_MR, C):
    """L <= C tokens of one row. They meet at most three memories: as it came, with one chunk more, and a fresh one.

    That chunk becomes whole `until` tokens from the start of the block, unless a text ends before. No text that begins
    in the block fills a chunk of its own in it, or, at its first token, not before its end.
    """
    fresh = jax.tree.map(jnp.zeros_like, slots)
    slots = jax.tree.map(partial(jnp.where, reset_L[0]), fresh, slots)
    L, t_L = len(q_LR), jnp.arange(len(q_LR))
    later_L = reset_L & (t_L > 0)
    ends = jnp.min(jnp.where(later_L, t_L, L))
    until = C - slots.count_B
    old_L, writes = t_L < until, until < jnp.minimum(ends, jnp.sum(there_L))

    def total(x_LG, of_L):
        return jnp.sum(jnp.where(of_L[:, None], x_LG, 0), axis=0)

    chunk_G = slots.sum_BG + total(x_LG, old_L & (t_L < ends))
    after = written(slots._replace(sum_BG=chunk_G), key_MR, value_MR, C)
    y_LR = [read(memory, q_LR, key_MR, value_MR) for memory in (slots, after, fresh)]
    y_LR = jnp.where((t_L < ends)[:, None], jnp.where(old_L[:, None], y_LR[0], y_LR[1]), y_LR[2])

    last = jax.tree.map(partial(jnp.where, writes), after, slots)
    last = jax.tree.map(partial(jnp.where, jnp.any(later_L)), fresh, last)
    since = jnp.max(jnp.where(later_L, t_L, jnp.where(writes, until, 0)))
    of_chunk_L = there_L & (t_L >= since)
    sum_G, count = last.sum_BG + total(x_LG, of_chunk_L), last.count_B + jnp.sum(of_chunk_L, dtype=jnp.int32)
    return last._replace(sum_BG=sum_G, count_B=count), y_LR


class Layer(nn.Module):
    """x_BTD, LayerState, reset_BT -> x_BTD, LayerState: all but the memories, whose weights all layers share."""

    ssm_fields: FrozenDict
    attention_fields: FrozenDict | None
    experts_fields: FrozenDict | None
    dtype: DTypeLike
    param_dtype: DTypeLike

    def setup(self):
        def gain(name, at_first):
            return self.param(name, nn.initializers.constant(at_first), (), self.param_dtype).astype(self.dtype)

        self.norm = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype)
        self.ssm = zoo.make("mamba2", **self.ssm_fields)
        if self.attention_fields is not None:
            self.attention = zoo.make("attention", **self.attention_fields)
            self.attention_gain = gain("attention_scale", 0.15)
        if self.experts_fields is not None:
            self.experts = Experts(**self.experts_fields)
            self.experts_gain = gain("experts_scale", 0.5)

    def __call__(self, x_BTD, state, reset_BT):
        u_BTD = self.norm(x_BTD)
        y_BTD, ssm = self.ssm(u_BTD, state.ssm, reset_BT)
        attention, choice = state.attention, state.choice
        if self.attention_fields is not None:
            z_BTD, attention = self.attention(u_BTD, attention, reset_BT)
            y_BTD = y_BTD + self.attention_gain * z_BTD
        if self.experts_fields is not None:
            z_BTD, choice = self.experts(u_BTD, choice, reset_BT)
            y_BTD = y_BTD + self.experts_gain * z_BTD
        return x_BTD + y_BTD, state._replace(ssm=ssm, attention=attention, choice=choice)


class Hydra(nn.Module):
    """tokens_BT -> (logits_BTZ, state). Logits are float32, or float64 when `dtype` is. The state is a tuple of the
    layers' states, batch first.

    `attention_every`, `experts_every`, `workspace` and `pkm` switch the parts on; without them it is a stack of SSMs.
    Raises ValueError, by name, when made: for fields out of their range; when called: as LanguageModel does.
    """

    vocab: int
    width: int
    layers: int
    attention_every: int | None = 4  # layers 3, 7, ... attend; None: no layer does
    experts_every: int | None = 2  # layers 0, 2, ... have experts; None: no layer has
    workspace: bool = True
    pkm: bool = True
    fields: Mapping[str, Mapping[str, Any]] = FrozenDict()  # of the mixers, as {"mamba2": {"state_size": 64}}
    chunk: int = 32  # tokens that have experts in common, and that are written to the workspace at once
    experts: int = 4
    top_k: int = 2  # experts of a token
    balance_weight: float = 0.01  # of what keeps the use of experts even, among the losses that training adds
    hidden: int | None = None  # of an expert; width
    slots: int = 64
    rank: int | None = None  # of keys and values of the workspace; half the width
    sub_keys: int = 64  # of each half: their square is the number of values
    key_dim: int = 64  # of a sub-key
    value_dim: int | None = None  # of the PKM; half the width
    pkm_top_k: int = 4
    tied: bool = True  # the head is the embedding
    remat: bool = False  # keep only each layer's input for the backward pass
    impl: str = "auto"  # 'scan', 'chunk': of all parts, unless `fields` has another
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        object.__setattr__(self, "fields", contract.frozen(self.fields))
        contract.positive(vocab=self.vocab, width=self.width, layers=self.layers, chunk=self.chunk)
        contract.positive(experts=self.experts, top_k=self.top_k, slots=self.slots, pkm_top_k=self.pkm_top_k)
        contract.positive(sub_keys=self.sub_keys, key_dim=self.key_dim)
        for name in ("attention_every", "experts_every", "hidden", "rank", "value_dim"):
            if getattr(self, name) is not None:
                contract.positive(**{name: getattr(self, name)})
        for name, most_name in (("top_k", "experts"), ("pkm_top_k", "sub_keys")):
            if getattr(self, name) > getattr(self, most_name):
                most = getattr(self, most_name)
                raise ValueError(f"{name}: expected at most {most_name} = {most}, got {getattr(self, name)}")
        for kind in self.fields:
            if kind not in ("mamba2", "attention"):
                raise ValueError(
                    f"fields: {kind!r} is no mixer of it; {contract.nearest(kind, ('mamba2', 'attention'))}"
                )
        check_impl("hydra", self.impl, FORMS)
        for kind in ("mamba2", *(["attention"] if any(map(self.attends, range(self.layers))) else [])):
            self.make_mixer(kind)
        super().__post_init__()

    def mixer_fields(self, kind: str) -> FrozenDict:
        shared = {"width": self.width, "impl": self.impl, "dtype": self.dtype, "param_dtype": self.param_dtype}
        window = {"window": 256} if kind == "attention" else {}
        return FrozenDict({**shared, **window, **self.fields.get(kind, {})})

    def make_mixer(self, kind: str) -> Any:
        return zoo.make(kind, parent=None, **self.mixer_fields(kind))

    def experts_fields(self) -> FrozenDict:
        hidden = self.width if self.hidden is None else self.hidden
        own = {"experts": self.experts, "top_k": self.top_k, "hidden": hidden, "chunk": self.chunk, "impl": self.impl}
        own["balance_weight"] = self.balance_weight
        return FrozenDict({**own, "dtype": self.dtype, "param_dtype": self.param_dtype})

    def attends(self, layer: int) -> bool:
        return self.attention_every is not None and (layer + 1) % self.attention_every == 0

    def has_experts(self, layer: int) -> bool:
        return self.experts_every is not None and layer % self.experts_every == 0

    def half(self, size: int | None) -> int:
        return max(1, self.width // 2) if size is None else size

    def initial_state(self, batch: int) -> tuple[LayerState, ...]:
        return self.states(batch, lambda kind: self.make_mixer(kind).initial_state(batch))

    def states(self, batch: int, of_mixer: Callable[[str], Any]) -> tuple[LayerState, ...]:
        zeros, none = partial(jnp.zeros, dtype=contract.state_dtype(self.dtype)), jnp.zeros(batch, jnp.int32)
        M, R = self.slots, self.half(self.rank)
        choice = Choice(zeros((batch, self.experts)), none)
        slots = Slots(zeros((batch, M, R)), zeros((batch, M, R)), zeros((batch, 2 * R + 2)), none)

        return tuple(
            LayerState(
                of_mixer("mamba2"),
                of_mixer("attention") if self.attends(layer) else (),
                choice if self.has_experts(layer) else (),
                slots if self.workspace else (),
            )
            for layer in range(self.layers)
        )

    def setup(self):
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        scale = self.width**-0.5 if self.tied else 1.0  # as in LanguageModel
        normal = nn.initializers.normal
        self.embedding_ZD = self.param("embedding", normal(scale), (self.vocab, self.width), self.param_dtype)
        if not self.tied:
            self.head_DZ = self.param("head", normal(0.02), (self.width, self.vocab), self.param_dtype)
        layer = nn.remat(Layer) if self.remat else Layer
        self.layer = [
            layer(
                self.mixer_fields("mamba2"),
                self.mixer_fields("attention") if self.attends(l) else None,
                self.experts_fields() if self.has_experts(l) else None,
                **kinds,
            )
            for l in range(self.layers)
        ]
        self.norm = nn.RMSNorm(**kinds)
        if self.workspace:
            self.notes_norm = nn.RMSNorm(**kinds)
            self.notes = Workspace(self.slots, self.half(self.rank), self.chunk, self.impl, **kinds)
        if self.pkm:
            self.facts_norm = nn.RMSNorm(**kinds)
            value_dim = self.half(self.value_dim)
            self.facts = ProductKeys(self.sub_keys, self.key_dim, value_dim, self.pkm_top_k, **kinds)

    def __call__(
        self, tokens_BT: jax.Array, state: tuple[LayerState, ...] | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[LayerState, ...]]:
        states = begin(self, tokens_BT, state, reset_BT)
        x_BTD = embed(self.embedding_ZD, tokens_BT).astype(self.dtype)
        if state is None:
            states = self.states(len(x_BTD), lambda kind: None)  # which a mixer takes to mean that there is no past
        after = []
        for layer, before in zip(self.layer, states, strict=True):
            x_BTD, last = layer(x_BTD, before, reset_BT)
            if self.workspace:
                y_BTD, slots = self.notes(self.notes_norm(x_BTD), last.slots, reset_BT)
                x_BTD, last = x_BTD + y_BTD, last._replace(slots=slots)
            if self.pkm:
                x_BTD = x_BTD + self.facts(self.facts_norm(x_BTD))
            after.append(last)
        return logits(self.norm(x_BTD), self.embedding_ZD.T if self.tied else self.head_DZ), tuple(after)
