"""A needle in a haystack: what was told once, anywhere in a long text, is asked for at its end.

    passkey    the same sentence over and over; NEEDLE, M values; ASK                  and the M values
    needle     words at random; NEEDLE, a key, M values; ASK, the key                  and the M values

The needle takes the place of words, at a depth from 0, where the text begins, to 1, just before it is asked for. Keys,
values and words are different tokens, so that nothing in the hay looks like a needle.

Source: passkeys of Mohtashami, Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers"
(2023), arXiv:2305.16300; lengths, depths and the two kinds of hay of Hsieh et al., "RULER: What's the Real Context Size
of Your Long-Context Language Models?" (2024), arXiv:2404.06654, sec. 3.
Differs: in tokens instead of English.

Dims: B batch, M values of the answer, U = length + M tokens, X tokens of the needle.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memzoo.contract import nearest, positive

NEEDLE, ASK, SPECIAL = 0, 1, 2
KINDS = ("passkey", "needle")


@dataclass(frozen=True)
class Needle:
    """Raises ValueError, by name, for an unknown kind and for sizes that are no integers >= 1."""

    kind: str = "needle"  # or "passkey"
    words: int = 32  # of the hay; in passkey, of the sentence
    keys: int = 16
    values: int = 16
    answer: int = 2  # M

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: unknown kind {self.kind!r}; {nearest(str(self.kind), KINDS)}")
        positive(words=self.words, keys=self.keys, values=self.values, answer=self.answer)

    @property
    def vocab(self) -> int:
        """Special tokens, then values, keys and words."""
        return SPECIAL + self.values + self.keys + self.words

    @property
    def shortest(self) -> int:
        """The length of a needle and its question, without hay."""
        return 2 + self.answer + 2 * (self.kind == "needle")

    def draw(self, key: jax.Array, depth_B: jax.Array | np.ndarray, length: int) -> jax.Array:
        """tokens_BU, int32: `length` of them are hay, needle and question, and the last M the answer.

        May be jitted, for a fixed length. Raises ValueError for depths outside of 0 ... 1, and for a length that is
        too short.
        """
        if not isinstance(depth_B, jax.core.Tracer) and not np.all(
            (np.asarray(depth_B) >= 0) & (np.asarray(depth_B) <= 1)
        ):
            raise ValueError(f"depth_B: expected numbers in 0 ... 1, got {np.asarray(depth_B)}")
        if length < self.shortest:
            raise ValueError(f"length: expected at least {self.shortest}, for needle and question, got {length}")
        of_values, of_keys, of_words = jax.random.split(key, 3)
        (B,), M = jnp.shape(depth_B), self.answer
        first_word = SPECIAL + self.values + self.keys
        value_BM = SPECIAL + jax.random.randint(of_values, (B, M), 0, self.values)
        key_B1 = SPECIAL + self.values + jax.random.randint(of_keys, (B, 1), 0, self.keys)
        about_B1 = key_B1 if self.kind == "needle" else key_B1[:, :0]
        mark = lambda token: jnp.full((B, 1), token)
        needle_BX = jnp.concatenate([mark(NEEDLE), about_B1, value_BM], axis=1)
        asked = jnp.concatenate([mark(ASK), about_B1, value_BM], axis=1)

        if self.kind == "needle":
            tokens_BU = first_word + jax.random.randint(of_words, (B, length + M), 0, self.words)
        else:
            tokens_BU = jnp.broadcast_to(first_word + jnp.arange(length + M) % self.words, (B, length + M))
        at_B = jnp.round(jnp.asarray(depth_B) * (length - self.shortest)).astype(jnp.int32)
        put = lambda tokens_U, needle_X, at: lax.dynamic_update_slice(tokens_U, needle_X, (at,))
        tokens_BU = jax.vmap(put)(tokens_BU, needle_BX, at_B)
        return tokens_BU.at[:, length + M - asked.shape[1] :].set(asked).astype(jnp.int32)
