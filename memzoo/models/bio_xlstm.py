"""Bio-xLSTM: xLSTM for DNA, which is read from both ends and on both strands, for proteins, and for molecules.

    DNA     both ways      x = block(x) + back(block(back(x)))      back: the other way round; weights, residual twice
            both strands   logits(x) = g(x) + rc(g(rc(x)))          rc: reversed, each token its complement
    Prot    an xLSTM of mLSTM blocks, whose q and k are turned by the place of a token in its own protein, so that
            proteins of a family may follow one another, and what is filled in later knows where it belongs
    Chem    an xLSTM of mLSTM blocks; examples of what is wanted are molecules that come before

What is read on both strands is equivariant, logits(rc(x)) = rc(logits(x)): either by `strands`, where both share all
weights and learn together, or after the training of one strand at a time (`either_strand`), by `conjoined`.
Proteins with pieces left out, families and sets of molecules as texts are made in memzoo.tasks.biology.

Source: Schmidinger, Schneckenreiter, Seidl, Schimunek, Hoedt, Brandstetter, Mayr, Luukkonen, Hochreiter, Klambauer,
"Bio-xLSTM: Generative modeling, representation and in-context learning of biological and chemical sequences" (2024),
arXiv:2411.04165, sec. 3, and its released code; both kinds of equivariance are those of Schiff et al., "Caduceus:
Bi-Directional Equivariant Long-Range DNA Sequence Modeling" (2024), arXiv:2403.03234.
Differs: the two strands are two rows of one batch, where the code has two halves of all channels, the second reversed;
they meet in the head alone, so that the function is the same. Both kinds of block may share strands, in the code sLSTM
alone. DNA's mLSTM blocks have neither places nor biases, as of the paper of xLSTM.

Dims: B batch, T time, R = B or 2 B rows, D width, Z vocabulary.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from memzoo import contract
from memzoo.models.backbone import begin, check_tokens, embed, logits
from memzoo.models.xlstm import XLSTM, blocks, layer_norm, small

# Caduceus' twelve tokens: seven that are no bases, then A, C, G, T, and N, which is any.
COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)


def reverse_complement(tokens_BT: jax.Array, complement: tuple[int, ...] = COMPLEMENT) -> jax.Array:
    """The same DNA, read from the other end on the other strand."""
    return jnp.asarray(complement, jnp.int32)[jnp.flip(jnp.asarray(tokens_BT), axis=1)]


def either_strand(key: jax.Array, tokens_BT: jax.Array, complement: tuple[int, ...] = COMPLEMENT) -> jax.Array:
    """Each row or its reverse complement, by chance: what a model is trained with that is to be `conjoined`."""
    other_B = jax.random.bernoulli(key, shape=(len(tokens_BT),))
    return jnp.where(other_B[:, None], reverse_complement(tokens_BT, complement), jnp.asarray(tokens_BT, jnp.int32))


def conjoined(
    read: Callable[[jax.Array], jax.Array], tokens_BT: jax.Array, complement: tuple[int, ...] = COMPLEMENT
) -> jax.Array:
    """The mean of what `read`, tokens_BT -> logits_BTZ, says of both strands: equivariant whatever `read` is."""
    there, back = read(tokens_BT), read(reverse_complement(tokens_BT, complement))
    return (there + reverse_complemented(back, complement)) / 2


def reverse_complemented(logits_BTZ: jax.Array, complement: tuple[int, ...] = COMPLEMENT) -> jax.Array:
    """What is said of a token, of its complement at the same distance from the other end."""
    return jnp.flip(logits_BTZ, axis=1)[..., jnp.asarray(complement)]


def check_complement(complement: tuple[int, ...]) -> None:
    Z = len(complement)
    if Z == 0 or not all(map(contract.whole_number, complement)) or sorted(complement) != list(range(Z)):
        raise ValueError(f"complement: expected a permutation of 0 ... Z - 1, got {complement}")
    for token, other in enumerate(complement):
        if complement[other] != token:
            raise ValueError(f"complement: expected pairs, got {token} -> {other} -> {complement[other]}")


class DNAxLSTM(nn.Module):
    """tokens_BT -> logits_BTZ, of each token from all others: for tokens that were masked, or as a representation.
    Logits are float32, or float64 when `dtype` is. There is no state. (What comes next, and after a state, is said by
    memzoo.models.xlstm.XLSTM, trained with `either_strand`.)

    reset_BT: bool, where True another sequence begins; the two know nothing of each other.
    Raises ValueError, by name, when made: for a complement that is none, and what XLSTM refuses; when called: for
    tokens or resets that do not fit.
    """

    width: int = 256
    layers: int = 4
    ratio: str = "0:1"  # a:b, of mLSTM blocks to sLSTM blocks, or the nearest there is
    complement: tuple[int, ...] = COMPLEMENT  # of each token of the vocabulary
    strands: bool = False  # read both, which makes it equivariant
    both_ways: bool = True  # read each from both ends
    slstm_at: tuple[int, ...] | None = None  # which layers, from 0 on, are sLSTM blocks, whatever the ratio
    heads: int = 4
    inner: int | None = None  # of an mLSTM block; 2 width, up to a multiple of 64
    hidden: int | None = None  # of an sLSTM block's MLP; 1.1 width, down to a multiple of 8
    qkv_block: int = 4
    remat: bool = False  # keep only each layer's input for the backward pass
    impl: str = "auto"  # of mLSTM: 'scan', 'associative', 'chunk'
    slstm_impl: str = "auto"  # 'scan', 'newton'
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        contract.check_numbers(self)
        contract.positive(width=self.width)
        object.__setattr__(self, "complement", tuple(self.complement))
        object.__setattr__(self, "slstm_at", None if self.slstm_at is None else tuple(self.slstm_at))
        check_complement(self.complement)
        self.blocks()
        super().__post_init__()

    def blocks(self) -> list[Any]:
        """The class of each layer and its fields."""
        sizes = ("width", "layers", "ratio", "slstm_at", "heads", "inner", "qkv_block")
        kinds = ("impl", "slstm_impl", "dtype", "param_dtype")
        hidden = max(8, 11 * self.width // 80 * 8) if self.hidden is None else self.hidden
        return blocks(hidden=hidden, **{name: getattr(self, name) for name in (*sizes, *kinds)})

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, reset_BT: jax.Array | None = None) -> jax.Array:
        Z = len(self.complement)
        check_tokens("tokens_BT", tokens_BT, Z)
        B, T = np.shape(tokens_BT)
        contract.check_reset(reset_BT, B, T)
        start = small(self.width)
        embedding_ZD = self.param("embedding", start, (Z, self.width), self.param_dtype)
        head_DZ = self.param("head", start, (self.width, Z), self.param_dtype)

        tokens_RT, reset_RT = jnp.asarray(tokens_BT), jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
        if self.strands:
            tokens_RT = jnp.concatenate([tokens_RT, reverse_complement(tokens_RT, self.complement)])
            reset_RT = jnp.concatenate([reset_RT, back(reset_RT)])
        x_RTD = embed(embedding_ZD, tokens_RT).astype(self.dtype)
        for l, (kind, fields) in enumerate(self.blocks()):
            block = (nn.remat(kind) if self.remat else kind)(**fields, name=f"layer_{l}")
            there_RTD, _ = block(x_RTD, None, reset_RT)
            if self.both_ways:
                back_RTD, _ = block(jnp.flip(x_RTD, axis=1), None, back(reset_RT))
                there_RTD = there_RTD + jnp.flip(back_RTD, axis=1)
            x_RTD = there_RTD
        logits_RTZ = logits(layer_norm(self, "norm")(x_RTD), head_DZ)
        if not self.strands:
            return logits_RTZ
        return logits_RTZ[:B] + reverse_complemented(logits_RTZ[B:], self.complement)


def back(reset_BT):
    """Resets for the other way round: a sequence that ended before one begins where it ended."""
    return jnp.flip(jnp.concatenate([reset_BT[:, 1:], jnp.zeros_like(reset_BT[:, :1])], axis=1), axis=1)


class ProtXLSTM(nn.Module):
    """tokens_BT -> (logits_BTZ, state). Logits are float32, or float64 when `dtype` is. The state is a tuple of the
    layers' states, batch first, and the place of the next token, int32.

    place_BT: the place of each token in its own protein, integers. By default they are counted: from 0 at a token that
    begins a protein (`start`) and at a reset, and a mask shares the place of what comes after it.
    Raises ValueError, by name, as memzoo.models.xlstm.XLSTM does, and for places that are no integers [B, T].
    """

    vocab: int = 38
    width: int = 1024
    layers: int = 16
    heads: int = 4
    inner: int | None = None  # 2 width, up to a multiple of 64; even
    qkv_block: int = 4
    conv_width: int = 4
    rotary_base: float = 500_000.0
    start: int = 0  # the token before each protein
    masks: tuple[int, ...] = (33, 34, 35, 36, 37)  # tokens that stand for a piece that is left out
    remat: bool = False  # keep only each layer's input for the backward pass
    impl: str = "auto"  # 'scan', 'associative', 'chunk'
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        contract.positive(vocab=self.vocab)
        contract.check_numbers(self)
        object.__setattr__(self, "masks", tuple(self.masks))
        for name, tokens in (("start", (self.start,)), ("masks", self.masks)):
            if not all(contract.whole_number(z) and 0 <= z < self.vocab for z in tokens):
                raise ValueError(f"{name}: expected tokens in 0 ... vocab - 1 = {self.vocab - 1}, got {tokens}")
        if not self.rotary_base > 0:
            raise ValueError(f"rotary_base: expected a number > 0, got {self.rotary_base}")
        F = self.blocks()[0][1]["inner"]
        contract.divisible("inner", F, "a pair of channels", 2)
        super().__post_init__()

    def blocks(self) -> list[Any]:
        """The class of each layer and its fields."""
        names = ("width", "layers", "heads", "inner", "qkv_block", "conv_width", "impl", "dtype", "param_dtype")
        return blocks(ratio="1:0", **{name: getattr(self, name) for name in names})

    def initial_state(self, batch: int) -> tuple[Any, ...]:
        layers = (kind(**fields, parent=None).initial_state(batch) for kind, fields in self.blocks())
        return (*layers, jnp.zeros((batch,), jnp.int32))

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        state: tuple[Any, ...] | None = None,
        reset_BT: jax.Array | None = None,
        place_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        states = begin(self, tokens_BT, state, reset_BT)
        B, T = np.shape(tokens_BT)
        *before, next_B = states if state is not None else (*states, jnp.zeros((B,), jnp.int32))
        start = small(self.width)
        embedding_ZD = self.param("embedding", start, (self.vocab, self.width), self.param_dtype)
        head_DZ = self.param("head", start, (self.width, self.vocab), self.param_dtype)

        advance_BT = (~jnp.isin(jnp.asarray(tokens_BT), jnp.asarray(self.masks, jnp.int32))).astype(jnp.int32)
        if place_BT is None:
            place_BT = self.count(jnp.asarray(tokens_BT), advance_BT, next_B, reset_BT)
        elif np.shape(place_BT) != (B, T) or not jnp.issubdtype(jnp.result_type(place_BT), jnp.integer):
            got = f"{jnp.result_type(place_BT)}{list(np.shape(place_BT))}"
            raise ValueError(f"place_BT: expected integers of shape [B = {B}, T = {T}], got {got}")
        place_BT = jnp.asarray(place_BT, jnp.int32)

        x_BTD, after = embed(embedding_ZD, tokens_BT).astype(self.dtype), []
        for l, ((kind, fields), memory) in enumerate(zip(self.blocks(), before, strict=True)):
            kind = nn.remat(kind) if self.remat else kind
            block = kind(**fields, rotary_base=float(self.rotary_base), name=f"layer_{l}")
            x_BTD, memory = block(x_BTD, memory, reset_BT, place_BT)
            after.append(memory)
        state = (*after, place_BT[:, -1] + advance_BT[:, -1])
        return logits(layer_norm(self, "norm")(x_BTD), head_DZ), state

    def count(self, tokens_BT, advance_BT, next_B, reset_BT):
        """The places of tokens, of which nothing is known but where they begin."""
        begins_BT = tokens_BT == self.start
        begins_BT = begins_BT if reset_BT is None else begins_BT | reset_BT
        passed_BT = jnp.cumsum(advance_BT, axis=1) - advance_BT  # which of those before have a place of their own
        since_BT = lax.cummax(jnp.where(begins_BT, passed_BT, -1), axis=1)
        return passed_BT + jnp.where(since_BT >= 0, -since_BT, next_B[:, None])


def chem_xlstm(vocab: int = 37, width: int = 512, layers: int = 9, heads: int = 8, **fields: Any) -> XLSTM:
    """An XLSTM of mLSTM blocks, with the sizes of the paper's for molecules, 14.8M parameters."""
    return XLSTM(vocab, width, layers, **{"ratio": "1:0", "heads": heads, **fields})
