"""What Titans share: the stack, attention over a window with persistent tokens in front, the layer around it, the gate.

    x = layer(x)        x = x + SwiGLU(norm(x))        logits = head(norm(x))

A layer is that of memzoo.models.titans_mac, titans_mag or titans_mal. Titans without attention (LMM) is a LanguageModel
of the mixer `titans`.

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time" (2024), arXiv:2501.00663, sec. 4, for the
layers and the gate; the stack of Touvron et al., "LLaMA" (2023), arXiv:2302.13971, sec. 2.2.
Differs: the paper leaves out sizes of windows, segments and prefixes, and where residual connections and norms are.

Dims: B batch, T time, D width, H heads, K key and value of a head, N persistent tokens, Z vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from memzoo import contract, zoo
from memzoo.models.backbone import SwiGLU, begin, embed, logits
from memzoo.ops.prefix_attention import PrefixCache, empty_prefix_cache, prefix_attention


class WindowAttention(nn.Module):
    """x_BTD, PrefixCache or None, reset_BT, and persistent_ND which all tokens see -> y_BTD, PrefixCache."""

    width: int
    heads: int
    window: int
    impl: str
    dtype: DTypeLike
    param_dtype: DTypeLike

    def initial_state(self, batch: int) -> PrefixCache:
        K = contract.divisible("width", self.width, "heads", self.heads)
        if K % 2:
            raise ValueError(f"heads: expected an even width / heads, to turn pairs, got {self.width} / {self.heads}")
        contract.positive(window=self.window)
        return empty_prefix_cache(batch, self.heads, self.window, K, K, contract.state_dtype(self.dtype))

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, state: PrefixCache | None, reset_BT: jax.Array | None, persistent_ND: jax.Array
    ) -> tuple[jax.Array, PrefixCache]:
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        q, k, v = (nn.DenseGeneral((self.heads, self.width // self.heads), name=name, **kinds) for name in "qkv")
        cache = self.initial_state(len(x_BTD)) if state is None else state
        prefix = k(persistent_ND), v(persistent_ND)
        y_BTHK, cache = prefix_attention(
            q(x_BTD), k(x_BTD), v(x_BTD), *prefix, cache, reset_BT, fresh=state is None, impl=self.impl
        )
        return nn.DenseGeneral(self.width, axis=(-2, -1), name="out", **kinds)(y_BTHK), cache


class WindowState(NamedTuple):
    """Of a WindowLayer."""

    memory: Any
    window: PrefixCache


class WindowLayer(nn.Module):
    """What MAG and MAL are made of. x_BTD, WindowState or None, reset_BT -> x_BTD, WindowState."""

    width: int
    heads: int
    memory_fields: FrozenDict
    window: int
    impl: str
    dtype: DTypeLike
    param_dtype: DTypeLike

    def parts(self, **of_module: Any) -> tuple[Any, WindowAttention]:
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, **of_module}
        memory = zoo.make("titans", **self.memory_fields, **of_module)
        return memory, WindowAttention(self.width, self.heads, self.window, self.impl, **kinds)

    def initial_state(self, batch: int) -> WindowState:
        return WindowState._make(part.initial_state(batch) for part in self.parts(parent=None))


class Gate(nn.Module):
    """y_BTD, m_BTD -> norm(y) * sigmoid(norm(m)): attention, gated by what the memory says."""

    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, y_BTD: jax.Array, m_BTD: jax.Array) -> jax.Array:
        norm = lambda name: nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name=name)
        return norm("attended")(y_BTD) * nn.sigmoid(norm("remembered")(m_BTD))


class Block(nn.Module):
    """A layer and its MLP: x_BTD, state, reset_BT -> x_BTD, state."""

    layer: Any  # its class
    fields: FrozenDict  # of the layer
    hidden: int
    shrink: float

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT):
        kinds: dict[str, Any] = {name: self.fields[name] for name in ("dtype", "param_dtype")}
        x_BTD, state = self.layer(**self.fields, name="layer")(x_BTD, state, reset_BT)
        u_BTD = nn.RMSNorm(name="mlp_norm", **kinds)(x_BTD)
        return x_BTD + SwiGLU(self.hidden, self.shrink, name="mlp", **kinds)(u_BTD), state


class Titans(nn.Module):
    """tokens_BT -> (logits_BTZ, state). Logits are float32, or float64 when `dtype` is. The state is a tuple of the
    layers' states, batch first.

    Raises ValueError, by name, when made: for sizes that do not fit, unknown fields or forms of the memory; when
    called: as memzoo.models.backbone.LanguageModel does.
    """

    vocab: int
    width: int
    layers: int
    heads: int = 4  # of the attention, and of the memory too where `memory` has no other
    persistent: int = 4  # tokens
    memory: Mapping[str, Any] = FrozenDict()  # fields of memzoo.mixers.titans, as {"depth": 1, "chunk": 32}
    hidden: int | None = None  # of the MLP; 8/3 width, up to a multiple of 8
    tied: bool = False  # the head is the embedding
    remat: bool = False  # keep only each layer's input for the backward pass
    impl: str = "auto"  # 'scan', 'chunk'
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        object.__setattr__(self, "memory", contract.frozen(self.memory))
        contract.positive(vocab=self.vocab, width=self.width, layers=self.layers)
        if self.hidden is not None:
            contract.positive(hidden=self.hidden)
        for name in self.memory:
            if name in ("width", "persistent", "impl", "dtype", "param_dtype"):
                raise ValueError(f"memory: {name!r} is that of the model")
        jax.eval_shape(lambda: self.initial_state(1))
        super().__post_init__()

    def layer(self) -> tuple[Any, dict[str, Any]]:
        """The class of a layer, and the fields that are its own."""
        raise NotImplementedError

    def layer_fields(self) -> FrozenDict:
        kinds = {"impl": self.impl, "dtype": self.dtype, "param_dtype": self.param_dtype}
        memory = {"width": self.width, "heads": self.heads, "persistent": self.persistent, **self.memory, **kinds}
        own = {"width": self.width, "heads": self.heads, "memory_fields": memory, **self.layer()[1]}
        return FrozenDict({**own, **kinds})

    def initial_state(self, batch: int) -> tuple[Any, ...]:
        layer = self.layer()[0](**self.layer_fields(), parent=None)
        return tuple(layer.initial_state(batch) for _ in range(self.layers))

    def setup(self):
        scale = self.width**-0.5 if self.tied else 1.0  # as in LanguageModel
        normal = nn.initializers.normal
        self.embedding_ZD = self.param("embedding", normal(scale), (self.vocab, self.width), self.param_dtype)
        if not self.tied:
            self.head_DZ = self.param("head", normal(0.02), (self.width, self.vocab), self.param_dtype)
        self.norm = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = self.hidden if self.hidden is not None else -(-self.width // 3) * 8
        block = nn.remat(Block) if self.remat else Block
        of_block = self.layer()[0], self.layer_fields(), hidden, (2 * self.layers) ** -0.5
        self.block = [block(*of_block) for _ in range(self.layers)]

    def __call__(
        self, tokens_BT: jax.Array, state: tuple[Any, ...] | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        states = begin(self, tokens_BT, state, reset_BT)
        x_BTD = embed(self.embedding_ZD, tokens_BT).astype(self.dtype)
        after = []
        for block, before in zip(self.block, states, strict=True):
            x_BTD, last = block(x_BTD, before, reset_BT)
            after.append(last)
        return logits(self.norm(x_BTD), self.embedding_ZD.T if self.tied else self.head_DZ), tuple(after)
