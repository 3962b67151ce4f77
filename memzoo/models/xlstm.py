"""xLSTM language models: stacks xLSTM[a:b] of mLSTM and sLSTM blocks, and the xLSTM of 7B parameters.

    mLSTM block     u, z = W LN(x)      c = SiLU(conv(u))      q, k = W c, v = W u, in small blocks of channels
                    i, f = W [q; k; v] + b, per head           h = GroupNorm(mLSTM(q, k, v, i, f)), a group per head
                    x = x + W_out ((h + s c) SiLU(z))
    sLSTM block     x = x + sLSTM(LN(x))                       x = x + W_out (GELU(W LN(x)) W LN(x))
    7B block        x = x + mLSTM(RMSNorm(x))                  x = x + SwiGLU(RMSNorm(x))

The first projects up, to F, before it mixes tokens, the second, to G, after. Logits of the stacks are W LN(x), of the
7B model c tanh(W RMSNorm(x) / c). The recurrences are those of memzoo.mixers.mlstm and memzoo.mixers.slstm.

Source: Beck, Pöppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter, Hochreiter, "xLSTM: Extended Long
Short-Term Memory" (2024), arXiv:2405.04517, sec. 2.4; Beck, Pöppel, Lippe, Kurle, Blies, Klambauer, Böck, Hochreiter,
"xLSTM 7B: A Recurrent LLM for Fast and Efficient Inference" (2025), arXiv:2503.13427. Sizes of the blocks and initial
values are the released code's.
Differs: no dropout. sLSTM blocks are spread evenly and end each stretch, unless `slstm_at` says where they are: the
paper's are 3, 5, 7, 40, 42 and 44 of 48. The 7B model begins as memzoo.models.backbone's does.

Dims: B batch, T time, D width, F and G hidden, H heads, K key and value, J channels of a block of q, k or v, M such
blocks, W window, P = W - 1 past inputs, Z vocabulary.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from memzoo import contract, ops, zoo
from memzoo.mixers import mlstm
from memzoo.models.backbone import LanguageModel, Place, begin, embed, logits
from memzoo.models.hybrid import full_layers
from memzoo.ops.checks import check_impl
from memzoo.ops.initial import within
from memzoo.ops.rotary import turn

FORMS = ("scan", "associative", "chunk")


class MatrixState(NamedTuple):
    past_BPF: jax.Array
    memory: mlstm.State


def layer_norm(block: Any, name: str | None = None) -> nn.LayerNorm:
    kinds: dict[str, Any] = {"dtype": block.dtype, "param_dtype": block.param_dtype}
    return nn.LayerNorm(1e-5, use_bias=False, use_fast_variance=False, name=name, **kinds)


class MatrixBlock(nn.Module):
    """The mLSTM block: x_BTD, state, reset_BT -> x_BTD, state; q and k turn by the places of tokens, if given."""

    width: int
    layers: int
    heads: int
    inner: int  # F
    qkv_block: int  # J
    conv_width: int
    impl: str
    dtype: DTypeLike
    param_dtype: DTypeLike
    rotary_base: float = 10_000.0

    def initial_state(self, batch: int) -> MatrixState:
        (H, F), wide = (self.heads, self.inner), contract.state_dtype(self.dtype)
        K = F // H
        memory = (jnp.zeros((batch, *axes), wide) for axes in ((H, K, K), (H, K), (H,)))
        return MatrixState(jnp.zeros((batch, self.conv_width - 1, F), wide), mlstm.State(*memory))

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, place_BT=None):
        (B, T, D), (H, F, J), W = x_BTD.shape, (self.heads, self.inner, self.qkv_block), self.conv_width
        past_BPF, memory = self.initial_state(B) if state is None else state
        K = F // H
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        up = nn.Dense(2 * F, kernel_init=small(D), name="up", **kinds)
        u_BTF, z_BTF = jnp.split(up(layer_norm(self, "norm")(x_BTD)), 2, axis=-1)
        f_WF = self.param("conv", within(W**-0.5), (W, F), self.param_dtype)
        bias_F = self.param("conv_bias", within(W**-0.5), (F,), self.param_dtype)
        c_BTF, past_BPF = ops.short_conv(u_BTF, f_WF, past_BPF, reset_BT)
        c_BTF = nn.silu(c_BTF + bias_F.astype(self.dtype))

        W_3MJJ = self.param("qkv", small(D), (3, F // J, J, J), self.param_dtype).astype(self.dtype)
        seen = jnp.stack([c_BTF, c_BTF, u_BTF]).reshape(3, B, T, F // J, J)
        qkv = jnp.einsum("nbtmi,nmij->nbtmj", seen, W_3MJJ)
        if place_BT is not None:
            turned = (turn(z.reshape(B, T, 1, F), place_BT, self.rotary_base).reshape(z.shape) for z in qkv[:2])
            qkv = jnp.stack([*turned, qkv[2]])
        q_BTHK, k_BTHK, v_BTHK = qkv.reshape(3, B, T, H, K)
        all_BTX = jnp.moveaxis(qkv, 0, 2).reshape(B, T, 3 * F)
        i_BTH, f_BTH = (self.gate(name, init)(all_BTX) for name, init in (("input", normal), ("forget", rising)))

        k_BTHK = k_BTHK * K**-0.5
        log_f_BTH = nn.log_sigmoid(f_BTH)
        h_BTHK, memory = mlstm.matrix_lstm(q_BTHK, k_BTHK, v_BTHK, i_BTH, log_f_BTH, memory, reset_BT, self.impl)
        per_head: dict[str, Any] = {"feature_axes": (-2, -1), "use_fast_variance": False, **kinds}
        h_BTF = nn.LayerNorm(1e-5, name="head_norm", **per_head)(h_BTHK).reshape(B, T, F)
        skip_F = self.param("skip", nn.initializers.ones, (F,), self.param_dtype).astype(self.dtype)
        out = nn.Dense(D, kernel_init=shrunk(D, self.layers), name="out", **kinds)
        return x_BTD + out((h_BTF + skip_F * c_BTF) * nn.silu(z_BTF)), MatrixState(past_BPF, memory)

    def gate(self, name, bias_init):
        """The log of a gate, or what makes it, for each head; at the start the same for all tokens."""
        inits = {"kernel_init": nn.initializers.zeros, "bias_init": bias_init}
        wide = contract.state_dtype(self.dtype)
        return nn.Dense(self.heads, dtype=wide, param_dtype=self.param_dtype, name=name, **inits)


class ScalarBlock(nn.Module):
    """The sLSTM block: x_BTD, state, reset_BT -> x_BTD, state."""

    mixer_fields: FrozenDict
    layers: int
    hidden: int  # G
    dtype: DTypeLike
    param_dtype: DTypeLike

    def initial_state(self, batch: int) -> Any:
        return zoo.make("slstm", parent=None, **self.mixer_fields).initial_state(batch)

    def setup(self):
        D, G = self.mixer_fields["width"], self.hidden
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        self.mixer_norm, self.mlp_norm = layer_norm(self), layer_norm(self)
        self.mixer = zoo.make("slstm", **self.mixer_fields)
        self.gate_up = nn.Dense(2 * G, kernel_init=small(D), **kinds)
        self.out = nn.Dense(D, kernel_init=shrunk(D, self.layers), **kinds)

    def __call__(self, x_BTD, state, reset_BT):
        y_BTD, state = self.mixer(self.mixer_norm(x_BTD), state, reset_BT)
        x_BTD = x_BTD + y_BTD
        gate_BTG, up_BTG = jnp.split(self.gate_up(self.mlp_norm(x_BTD)), 2, axis=-1)
        return x_BTD + self.out(nn.gelu(gate_BTG, approximate=False) * up_BTG), state


def blocks(
    width: int,
    layers: int,
    ratio: str = "7:1",
    slstm_at: tuple[int, ...] | None = None,
    heads: int = 4,
    inner: int | None = None,
    hidden: int | None = None,
    qkv_block: int = 4,
    conv_width: int = 4,
    impl: str = "auto",
    slstm_impl: str = "auto",
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> list[tuple[Any, FrozenDict]]:
    """The class of each layer of a stack and its fields, after checking what XLSTM, which has these fields, says."""
    contract.positive(width=width, layers=layers, conv_width=conv_width)
    check_impl("xlstm", impl, FORMS)
    F = -(-width // 32) * 64 if inner is None else inner
    G = -(-13 * width // 640) * 64 if hidden is None else hidden
    contract.positive(hidden=G)
    contract.divisible("inner", F, "heads", heads)
    contract.divisible("inner", F, "qkv_block", qkv_block)
    if slstm_at is not None and not all(contract.whole_number(l) and 0 <= l < layers for l in slstm_at):
        raise ValueError(f"slstm_at: expected layers in 0 ... {layers - 1}, got {slstm_at}")
    scalar = full_layers(ratio, layers) if slstm_at is None else [l in slstm_at for l in range(layers)]

    kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    cell = {"width": width, "heads": heads, "conv_width": conv_width, **kinds}
    matrix = {**cell, "inner": F, "qkv_block": qkv_block, "layers": layers, "impl": impl}
    found: list[tuple[Any, FrozenDict]] = []
    for l in range(layers):
        if not scalar[l]:
            found.append((MatrixBlock, FrozenDict(matrix)))
            continue
        mixer = {**cell, "impl": slstm_impl, "depth": l / max(1, layers - 1)}
        zoo.make("slstm", parent=None, **mixer).sizes()
        own = {"mixer_fields": FrozenDict(mixer), "hidden": G, "layers": layers, **kinds}
        found.append((ScalarBlock, FrozenDict(own)))
    return found


class XLSTM(nn.Module):
    """xLSTM[a:b]: tokens_BT -> (logits_BTZ, state). Logits are float32, or float64 when `dtype` is. The state is a
    tuple of the layers' states, batch first.

    Raises ValueError, by name, when made: for sizes below 1, sizes that heads or blocks do not divide, a ratio that is
    none, places of sLSTM blocks that are none, unknown forms; when called: as memzoo.models.backbone.LanguageModel.
    """

    vocab: int
    width: int
    layers: int
    ratio: str = "7:1"  # a:b, of mLSTM blocks to sLSTM blocks, or the nearest there is
    slstm_at: tuple[int, ...] | None = None  # which layers, from 0 on, are sLSTM blocks, whatever the ratio
    heads: int = 4
    inner: int | None = None  # F, of an mLSTM block; 2 width, up to a multiple of 64
    hidden: int | None = None  # G, of an sLSTM block's MLP; 1.3 width, up to a multiple of 64
    qkv_block: int = 4  # so many channels of q, k or v come from as many
    conv_width: int = 4
    tied: bool = False  # the head is the embedding
    remat: bool = False  # keep only each layer's input for the backward pass
    impl: str = "auto"  # of mLSTM: 'scan', 'associative', 'chunk'
    slstm_impl: str = "auto"  # 'scan', 'newton'
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        contract.positive(vocab=self.vocab)
        object.__setattr__(self, "slstm_at", None if self.slstm_at is None else tuple(self.slstm_at))
        self.blocks()
        super().__post_init__()

    def blocks(self) -> list[tuple[Any, FrozenDict]]:
        """The class of each layer and its fields."""
        names = inspect.signature(blocks).parameters
        return blocks(**{name: getattr(self, name) for name in names})

    def initial_state(self, batch: int) -> tuple[Any, ...]:
        return tuple(kind(**fields, parent=None).initial_state(batch) for kind, fields in self.blocks())

    def setup(self):
        start = small(self.width)
        self.embedding_ZD = self.param("embedding", start, (self.vocab, self.width), self.param_dtype)
        if not self.tied:
            self.head_DZ = self.param("head", start, (self.width, self.vocab), self.param_dtype)
        self.norm = layer_norm(self)
        self.layer = [(nn.remat(kind) if self.remat else kind)(**fields) for kind, fields in self.blocks()]

    def __call__(
        self, tokens_BT: jax.Array, state: tuple[Any, ...] | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        states = begin(self, tokens_BT, state, reset_BT)
        x_BTD = embed(self.embedding_ZD, tokens_BT).astype(self.dtype)
        after = []
        for layer, before in zip(self.layer, states, strict=True):
            x_BTD, last = layer(x_BTD, before, reset_BT)
            after.append(last)
        return logits(self.norm(x_BTD), self.embedding_ZD.T if self.tied else self.head_DZ), tuple(after)


class XLSTM7B(LanguageModel):
    """A LanguageModel of 7B blocks, whose logits stay within +-logit_cap; its mixer's fields are those of its paper."""

    mixers: tuple[Place, ...] = ("mlstm",)
    fields: Mapping[str, Mapping[str, Any]] = FrozenDict({"mlstm": FrozenDict({"heads": 8})})
    hidden: int | None = None  # of the MLP; 8/3 width, up to a multiple of 64
    logit_cap: float = 30.0  # soft; a very large one is none

    def __post_init__(self):
        contract.positive(width=self.width)
        if self.hidden is None:
            object.__setattr__(self, "hidden", -(-self.width // 24) * 64)
        contract.check_numbers(self)
        if not self.logit_cap > 0:
            raise ValueError(f"logit_cap: expected a number > 0, got {self.logit_cap}")
        super().__post_init__()

    def __call__(
        self, tokens_BT: jax.Array, state: tuple[Any, ...] | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        logits_BTZ, state = super().__call__(tokens_BT, state, reset_BT)
        return self.logit_cap * jnp.tanh(logits_BTZ / self.logit_cap), state


def small(width):
    """Nguyen and Salazar's, whatever a weight's own number of inputs."""
    return nn.initializers.normal((2 / 5 / width) ** 0.5)


def shrunk(width, layers):
    """Of what goes back to the residual: the smaller, the more layers there are."""
    return nn.initializers.normal(2 / layers / width**0.5)


normal = nn.initializers.normal(0.1)


def rising(key, shape, dtype=float):
    """Forget biases from 3 in the first head to 6 in the last: 20 to 400 tokens are held."""
    return jnp.linspace(3, 6, *shape, dtype=dtype)
