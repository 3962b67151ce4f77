"""The language model that every mixer goes into: embed, then per layer a mixer and an MLP on a residual, then the head.

    x = x + mixer(RMSNorm(x))        x = x + SwiGLU(RMSNorm(x))        logits = head(RMSNorm(x))

Source: the pre-norm stack of Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023),
arXiv:2302.13971, sec. 2.2; SwiGLU of Shazeer, "GLU Variants Improve Transformer" (2020), arXiv:2002.05202, eq. 6.
Differs: any mixer in the place of attention, which keeps its own initialisation; the MLP's `out` starts smaller by
1/sqrt(2 layers), as in GPT-2.

Dims: B batch, T time, D width, F hidden, Z vocabulary, R repetitions of the pattern.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.typing import DTypeLike

from memzoo import contract, zoo

Place = str | tuple[str, Mapping[str, Any]]


class SwiGLU(nn.Module):
    """x_BTD -> out(silu(gate(x)) * up(x)). `shrink` scales the initial values of `out`."""

    hidden: int
    shrink: float = 1.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gate_BTF, up_BTF = jnp.split(nn.Dense(2 * self.hidden, name="gate_up", **kinds)(x_BTD), 2, axis=-1)
        small = nn.initializers.variance_scaling(self.shrink**2, "fan_in", "truncated_normal")
        return nn.Dense(x_BTD.shape[-1], kernel_init=small, name="out", **kinds)(nn.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """One layer: x_BTD, state, reset_BT -> x_BTD, state."""

    kind: str
    fields: FrozenDict  # of the mixer
    hidden: int
    shrink: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    def setup(self):
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(**kinds), nn.RMSNorm(**kinds)
        self.mixer = zoo.make(self.kind, **self.fields)
        self.mlp = SwiGLU(self.hidden, self.shrink, **kinds)

    def __call__(self, x_BTD, state, reset_BT):
        y_BTD, state = self.mixer(self.mixer_norm(x_BTD), state, reset_BT)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), state


class Stack(nn.Module):
    """Layers in a row: x_BTD, their states, reset_BT -> x_BTD, their states."""

    blocks: tuple[FrozenDict, ...]  # the fields of each Block
    remat: bool
    prevent_cse: bool  # not needed under scan, where it only costs

    def setup(self):
        block = nn.remat(Block, prevent_cse=self.prevent_cse) if self.remat else Block
        self.layer = [block(**fields) for fields in self.blocks]

    def __call__(self, x_BTD, states, reset_BT):
        after = []
        for layer, state in zip(self.layer, states, strict=True):
            x_BTD, state = layer(x_BTD, state, reset_BT)
            after.append(state)
        return x_BTD, tuple(after)


class LanguageModel(nn.Module):
    """tokens_BT -> (logits_BTZ, state). Logits are float32, or float64 when `dtype` is.

    The state is a tuple of the layers' states, batch first, and the same whether or not layers are scanned. With
    `scan_layers` the parameters of the layers are stacked, R first, and compile time does not grow with depth.

    Raises ValueError, by name, when made: for an empty pattern, an unknown mixer or field, sizes below 1, layers that
    a scanned pattern does not divide; when called: for tokens of the wrong rank, dtype or length, tokens outside the
    vocabulary, a state of another model or batch. Under `jit` tokens have no values to check: there a token outside
    the vocabulary makes the logits of its row NaN, from its place on or, in the chunk form, around it.
    """

    vocab: int
    width: int
    layers: int
    # names, or (name, fields) where a place of the pattern has fields of its own, as ("hgrn2", {"lower_bound": 0.5})
    mixers: tuple[Place, ...] = ("gated_deltanet",)  # a pattern, repeated over the layers; the last may be cut short
    fields: Mapping[str, Mapping[str, Any]] = FrozenDict()  # of each mixer, as {"attention": {"window": 128}}
    hidden: int | None = None  # of the MLP; 8/3 width, up to a multiple of 8
    tied: bool = False  # the head is the embedding
    remat: bool = False  # keep only each layer's input for the backward pass
    scan_layers: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        pattern = (self.mixers,) if isinstance(self.mixers, str) else tuple(map(as_place, self.mixers))
        object.__setattr__(self, "mixers", pattern)
        object.__setattr__(self, "fields", contract.frozen(self.fields))
        contract.positive(vocab=self.vocab, width=self.width, layers=self.layers)
        if self.hidden is not None:
            contract.positive(hidden=self.hidden)
        if not pattern:
            raise ValueError("mixers: expected at least one name, got none")
        for place in dict.fromkeys(pattern):
            self.make_mixer(place)
        kinds = dict.fromkeys(place if isinstance(place, str) else place[0] for place in pattern)
        for kind in self.fields:
            if kind not in kinds:
                raise ValueError(f"fields: {kind!r} is not in mixers; {contract.nearest(kind, kinds)}")
        if self.scan_layers:
            contract.divisible("layers", self.layers, "len(mixers)", len(pattern))
        super().__post_init__()

    def places(self) -> tuple[Place, ...]:
        """The mixer of each layer."""
        return tuple(self.mixers[i % len(self.mixers)] for i in range(self.layers))

    def name_and_fields(self, place: Place) -> tuple[str, FrozenDict]:
        kind, own = (place, {}) if isinstance(place, str) else place
        shared = {"width": self.width, "dtype": self.dtype, "param_dtype": self.param_dtype}
        return kind, FrozenDict({**shared, **self.fields.get(kind, {}), **own})

    def make_mixer(self, place: Place) -> Any:
        kind, fields = self.name_and_fields(place)
        return zoo.make(kind, parent=None, **fields)

    def initial_state(self, batch: int) -> tuple[Any, ...]:
        return tuple(self.make_mixer(place).initial_state(batch) for place in self.places())

    def setup(self):
        # About as large as what a layer adds to it: at 0.02 the layers drown it and training is slower. A tied one is
        # the head too, and unit rows keep the first logits small.
        scale = self.width**-0.5 if self.tied else 1.0
        normal = nn.initializers.normal
        self.embedding_ZD = self.param("embedding", normal(scale), (self.vocab, self.width), self.param_dtype)
        if not self.tied:
            self.head_DZ = self.param("head", normal(0.02), (self.width, self.vocab), self.param_dtype)
        self.norm = nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = self.hidden if self.hidden is not None else -(-self.width // 3) * 8
        shared = {"hidden": hidden, "shrink": (2 * self.layers) ** -0.5}
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mixers = map(self.name_and_fields, self.mixers if self.scan_layers else self.places())
        blocks = tuple(FrozenDict({"kind": kind, "fields": fields, **shared, **kinds}) for kind, fields in mixers)
        stack = Stack
        if self.scan_layers:  # every collection is stacked, so that what a mixer sows is too
            stack = nn.scan(
                Stack,
                variable_axes={True: 0},
                split_rngs={True: True},
                in_axes=(0, nn.broadcast),
                length=self.layers // len(self.mixers),
            )
        self.stack = stack(blocks, self.remat, not self.scan_layers)

    def __call__(
        self, tokens_BT: jax.Array, state: tuple[Any, ...] | None = None, reset_BT: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        state = begin(self, tokens_BT, state, reset_BT)
        x_BTD = embed(self.embedding_ZD, tokens_BT).astype(self.dtype)
        if self.scan_layers:
            x_BTD, state_R = self.stack(x_BTD, stacked(state, len(self.mixers)), reset_BT)
            state = unstacked(state_R, self.layers // len(self.mixers))
        else:
            x_BTD, state = self.stack(x_BTD, state, reset_BT)
        return logits(self.norm(x_BTD), self.embedding_ZD.T if self.tied else self.head_DZ), state


class Size(NamedTuple):
    parameters: int
    parameter_bytes: int
    state_bytes: int


def describe(model: LanguageModel, batch: int = 1) -> Size:
    """The number of parameters, and the bytes of the parameters and of the state of `batch` rows. Allocates nothing."""
    contract.positive(batch=batch)
    tokens_BT = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    params = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), tokens_BT))
    state = jax.tree.leaves(jax.eval_shape(lambda: model.initial_state(batch)))
    in_bytes = [sum(a.size * a.dtype.itemsize for a in arrays) for arrays in (params, state)]
    return Size(sum(p.size for p in params), *in_bytes)


def as_place(place: Any) -> Place:
    if isinstance(place, tuple | list) and len(place) == 2 and isinstance(place[1], Mapping):
        return place[0], contract.frozen(place[1])
    if not isinstance(place, str):
        raise ValueError(f"mixers: expected names, or (name, fields), got {place!r}")
    return place


def begin(model: Any, tokens_BT: Any, state: Any, reset_BT: Any) -> tuple[Any, ...]:
    """Checks the arguments of a model's call and returns the states of its layers, each None where `state` is.

    Not the initial state: a mixer may do less where it knows that there is no past.
    """
    check_tokens("tokens_BT", tokens_BT, model.vocab)
    B, T = np.shape(tokens_BT)
    contract.check_reset(reset_BT, B, T)
    if state is None:
        return (None,) * model.layers
    check_states(state, jax.eval_shape(lambda: model.initial_state(B)))
    return state


def embed(embedding_ZD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The rows of the tokens, x_BTD; NaN for a token outside the vocabulary."""
    index_BT = jnp.asarray(tokens_BT).astype(jnp.int32)
    index_BT = jnp.where(index_BT < 0, len(embedding_ZD), index_BT)  # -1 would be the last row
    return jnp.take(embedding_ZD, index_BT, axis=0, mode="fill")


def logits(x_BTD: jax.Array, head_DZ: jax.Array) -> jax.Array:
    """logits_BTZ in float32, or float64 where x is."""
    wide = contract.state_dtype(x_BTD.dtype)
    return jnp.matmul(x_BTD, head_DZ.astype(x_BTD.dtype), preferred_element_type=wide)


def check_tokens(name: str, tokens_BT: Any, vocab: int) -> None:
    """Raises ValueError unless tokens are integers [B, T >= 1] in the vocabulary; not for values inside `jit`."""
    if np.ndim(tokens_BT) != 2 or np.shape(tokens_BT)[1] == 0:
        raise ValueError(f"{name}: expected shape [B, T >= 1], got {list(np.shape(tokens_BT))}")
    if np.shape(tokens_BT)[0] == 0:
        raise ValueError(f"{name}: expected B >= 1, got shape {list(np.shape(tokens_BT))}")
    contract.check_array(name, tokens_BT)
    if not jnp.issubdtype(jnp.result_type(tokens_BT), jnp.integer):
        raise ValueError(f"{name}: expected an integer dtype, got {jnp.result_type(tokens_BT)}")
    if isinstance(tokens_BT, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    values = np.asarray(tokens_BT)
    wrong = values[(values < 0) | (values >= vocab)]
    if wrong.size:
        raise ValueError(f"{name}: expected tokens in 0 ... vocab - 1 = {vocab - 1}, got {wrong[0]}")


def check_states(state: Any, expected: tuple[Any, ...]) -> None:
    if not isinstance(state, tuple) or len(state) != len(expected):
        got = f"{len(state)} of them" if isinstance(state, tuple) else contract.describe(state)
        raise ValueError(f"state: expected a tuple of the states of {len(expected)} layers, got {got}")
    for i, (layer, want) in enumerate(zip(state, expected, strict=True)):
        contract.check_state(layer, want, f"state[{i}]")


def stacked(state: tuple[Any, ...], pattern: int) -> tuple[Any, ...]:
    """The states of all layers -> for each place of the pattern, its states on a new first axis R."""
    return tuple(jax.tree.map(lambda *s: jnp.stack(s), *state[i::pattern]) for i in range(pattern))


def unstacked(state_R: tuple[Any, ...], repetitions: int) -> tuple[Any, ...]:
    """The inverse of `stacked`."""
    return tuple(jax.tree.map(lambda s, r=r: s[r], place) for r in range(repetitions) for place in state_R)
