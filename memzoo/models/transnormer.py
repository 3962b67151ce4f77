"""TransNormerLLM: Lightning Attention whose layers forget the less the higher they are, norms and gates without extras.

    x = x + GLA(SRMSNorm(x))        x = x + SGLU(SRMSNorm(x))        logits = head(SRMSNorm(x))
    GLA: memzoo.mixers.lightning, with LRPE-d (learned rotations, and the decay of all layers) in the first layer
    SGLU(x) = W_o (W_v x * W_u x)                                    SRMSNorm(x) = sqrt(d) x / |x|

Source: Qin, Li, Sun, Sun, Shen, Han, Wei, Lv, Luo, Qiao, Zhong, "TransNormerLLM: A Faster and Better Large Language
Model with Improved TransNormer" (2023), arXiv:2307.14995, as of Qin, Sun, Li, Shen, Sun, Zhong, "Various Lengths,
Constant Speed: Efficient Language Modeling with Lightning Attention" (2024), arXiv:2405.17381, sec. 4, eq. 9-14; the
released models' decays, initial rotations, and embeddings that are also the head, and scaled by sqrt(d) on the way in.
Differs: see the mixer; weights other than embeddings begin as LeCun's, the released ones with deviation 0.02.

Dims: B batch, T time, D width, F hidden, Z vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from memzoo import contract, zoo
from memzoo.models.backbone import begin, embed, logits


class SGLU(nn.Module):
    """x_BTD -> out(v(x) * u(x)): a gated linear unit without the activation."""

    hidden: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        v_BTF, u_BTF = (nn.Dense(self.hidden, name=name, **kinds)(x_BTD) for name in ("v", "u"))
        return nn.Dense(x_BTD.shape[-1], name="out", **kinds)(v_BTF * u_BTF)


class Block(nn.Module):
    """One layer: x_BTD, state, reset_BT -> x_BTD, state."""

    mixer_fields: FrozenDict
    hidden: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    def setup(self):
        self.norm = nn.RMSNorm(use_scale=False, dtype=self.dtype)
        self.mixer = zoo.make("lightning", **self.mixer_fields)
        self.sglu = SGLU(self.hidden, self.dtype, self.param_dtype)

    def __call__(self, x_BTD, state, reset_BT):
        y_BTD, state = self.mixer(self.norm(x_BTD), state, reset_BT)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.sglu(self.norm(x_BTD)), state


class TransNormer(nn.Module):
    """tokens_BT -> (logits_BTZ, state). Logits are float32, or float64 when `dtype` is. The state is a tuple of the
    layers' states, batch first.

    Raises ValueError, by name, when made: for sizes below 1, a width that heads do not divide, unknown slopes or forms;
    when called: as memzoo.models.backbone.LanguageModel does.
    """

    vocab: int
    width: int
    layers: int
    heads: int = 8
    hidden: int | None = None  # of the SGLU; 8/3 width, up to a multiple of 8
    lrpe: bool = True  # rotations in the first layer; without them it forgets as the others do
    slopes: str = "released"  # or "paper": of the decays, see the mixer
    tied: bool = True  # the head is the embedding
    remat: bool = False  # keep only each layer's input for the backward pass
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        contract.positive(vocab=self.vocab, width=self.width, layers=self.layers)
        if self.hidden is not None:
            contract.positive(hidden=self.hidden)
        self.make_mixer(0)
        super().__post_init__()

    def mixer_fields(self, layer: int) -> FrozenDict:
        kinds = {"impl": self.impl, "dtype": self.dtype, "param_dtype": self.param_dtype}
        depth = layer / max(1, self.layers - 1)
        lrpe = self.lrpe and layer == 0
        own = {"width": self.width, "heads": self.heads, "depth": depth, "slopes": self.slopes, "lrpe": lrpe}
        return FrozenDict({**own, **kinds})

    def make_mixer(self, layer: int) -> Any:
        return zoo.make("lightning", parent=None, **self.mixer_fields(layer))

    def initial_state(self, batch: int) -> tuple[Any, ...]:
        return tuple(self.make_mixer(layer).initial_state(batch) for layer in range(self.layers))

    def setup(self):
        small = nn.initializers.normal(0.02)
        self.embedding_ZD = self.param("embedding", small, (self.vocab, self.width), self.param_dtype)
        if not self.tied:
            self.head_DZ = self.param("head", small, (self.width, self.vocab), self.param_dtype)
        self.norm = nn.RMSNorm(use_scale=False, dtype=self.dtype)
        hidden = self.hidden if self.hidden is not None else -(-self.width // 3) * 8
        block = nn.remat(Block) if self.remat else Block
        fields = map(self.mixer_fields, range(self.layers))
        self.layer = [block(own, hidden, self.dtype, self.param_dtype) for own in fields]

    def __call__(
        self, tokens_BT: jax.Array, state: tuple[Any, ...] | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        states = begin(self, tokens_BT, state, reset_BT)
        x_BTD = (embed(self.embedding_ZD, tokens_BT) * self.width**0.5).astype(self.dtype)
        after = []
        for layer, before in zip(self.layer, states, strict=True):
            x_BTD, last = layer(x_BTD, before, reset_BT)
            after.append(last)
        return logits(self.norm(x_BTD), self.embedding_ZD.T if self.tied else self.head_DZ), tuple(after)
