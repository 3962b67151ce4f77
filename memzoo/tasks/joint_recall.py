"""Multi-query joint recall: the value of a key depends on the context that it was told in, and all of them are asked.

    begin, then for each context: its name and, for each key, the key and its value; ask, and the same in another order

Contexts, and the keys of each, come in random orders, another one when asked. A model reads it all and is scored where
the next token is a value that it was told. Keys are the same in all contexts and values are drawn independently, so
that neither the key nor the context says anything alone, and the whole table has to be kept.

Source: Zhan, Zhao, Zhu, Tang, "Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse
Attention" (2025), arXiv:2507.00449, sec. 3; sizes and order of tokens from the released code.
Differs: sizes are drawn for each sequence, not enumerated, and sequences are drawn independently, without an end: the
released set has 10,000 for each pair of sizes from 5 to 16, and refuses one that it has. Of the default sizes the same
sequence practically never comes twice, nor in training and evaluation; of tables of a few cells it does. Tokens are
numbered without gaps.

Dims: B batch, U tokens, T = U - 1, N contexts, K keys, V values.
"""

from dataclasses import dataclass
from typing import NamedTuple

import grain
import jax
import numpy as np

from memzoo.contract import positive, whole_number

PAD, BEGIN, ASK, SPECIAL = 0, 1, 2, 3


class Recall(NamedTuple):
    """tokens: the first T are read. asked: after which of them the next token is a value that was told. PAD behind."""

    tokens_U: np.ndarray
    asked_T: np.ndarray


@dataclass(frozen=True)
class JointRecall:
    """The sizes of the tables: the smallest and the largest, both included, one of them drawn for each sequence.

    Raises ValueError, by name, for sizes that are no integers >= 1 and for ranges that are empty.
    """

    contexts: tuple[int, int] = (5, 16)
    keys: tuple[int, int] = (5, 16)
    values: int = 16

    def __post_init__(self):
        for name in ("contexts", "keys"):
            low, high = pair_of_integers(name, getattr(self, name), "smallest, largest")
            if not 1 <= low <= high:
                raise ValueError(f"{name}: expected 1 <= smallest <= largest, got {low}, {high}")
        positive(values=self.values)

    @property
    def vocab(self) -> int:
        """Special tokens, then values, keys and contexts."""
        return SPECIAL + self.values + self.keys[1] + self.contexts[1]

    @property
    def tokens(self) -> int:
        """U, of the largest table."""
        return 2 + 2 * self.contexts[1] * (1 + 2 * self.keys[1])

    def draw(self, rng: np.random.Generator) -> Recall:
        """One sequence, int32 and bool, padded to the longest."""
        N, K = (rng.integers(*size, endpoint=True) for size in (self.contexts, self.keys))
        value_NK = rng.integers(self.values, size=(N, K))
        told, asked = (self.listing(rng, value_NK) for _ in range(2))
        tokens_U = np.concatenate([[BEGIN], told.ravel(), [ASK], asked.ravel()]).astype(np.int32)
        is_key = np.zeros(asked.shape, bool)
        is_key[:, 1::2] = True
        asked_U = np.concatenate([np.zeros(2 + told.size, bool), is_key.ravel()])
        behind = (0, self.tokens - len(tokens_U))
        return Recall(np.pad(tokens_U, behind, constant_values=PAD), np.pad(asked_U, behind)[:-1])

    def listing(self, rng: np.random.Generator, value_NK: np.ndarray) -> np.ndarray:
        """[N, 1 + 2 K]: a row per context, in random order: its token, then each key and its value, in random order."""
        N, K = value_NK.shape
        context_N1 = rng.permutation(N)[:, None]
        key_NK = rng.permuted(np.tile(np.arange(K), (N, 1)), axis=1)
        keys_from = SPECIAL + self.values
        rows = np.empty((N, 1 + 2 * K), np.int64)
        rows[:, :1] = keys_from + self.keys[1] + context_N1
        rows[:, 1::2] = keys_from + key_NK
        rows[:, 2::2] = SPECIAL + value_NK[context_N1, key_NK]
        return rows


def pair_of_integers(name, value, of):
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(map(whole_number, value)):
        raise ValueError(f"{name}: expected two integers, {of}, got {value!r}")
    return value


class Source:
    """Sequences by number, as a source of random access for grain: each a function of the seed, split and number."""

    def __init__(self, task: JointRecall, seed: int, held_out: bool = False):
        if not whole_number(seed) or not 0 <= seed < 2**32:
            raise ValueError(f"seed: expected an integer in 0 ... 2**32 - 1, got {seed!r}")
        self.task, self.seed, self.held_out = task, seed, held_out

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, number: int) -> Recall:
        return self.task.draw(np.random.default_rng((self.seed, self.held_out, number)))


def training_batches(
    task: JointRecall, batch: int, seed: int, shard: tuple[int, int] | None = None
) -> grain.DatasetIterator:
    """An endless iterator of Recall, [B, U] and [B, T], whose position `get_state` and `set_state` read and set.

    shard: (index, count), this process's part; by default jax's process index and count. Sequences are numbered, and
    no two shards share a number. Raises ValueError, by name, for a batch, seed or shard that does not fit.
    """
    positive(batch=batch)
    if shard is None:
        shard = jax.process_index(), jax.process_count()
    index, count = pair_of_integers("shard", shard, "index, count")
    if not 0 <= index < count:
        raise ValueError(f"shard: expected 0 <= index < count, got {index}, {count}")
    sequences = grain.MapDataset.source(Source(task, seed))[index::count]
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(sequences.batch(batch).to_iter_dataset(ahead))


def evaluation(task: JointRecall, rows: int, seed: int) -> Recall:
    """[rows, U] and [rows, T]: sequences drawn independently of those of training."""
    positive(rows=rows)
    source = Source(task, seed, held_out=True)
    drawn = [source[number] for number in range(rows)]
    return Recall(*(np.stack(parts) for parts in zip(*drawn, strict=True)))
