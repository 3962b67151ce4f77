"""Text, or any other file, as a stream of bytes: the last tenth held out, the rest in shuffled windows.

Every offset of the training part begins a window, and an epoch takes each offset once, in an order that only the seed
decides. A window of T tokens is T + 1 bytes: the first T are read, the last T predicted.

Dims: N bytes, B batch, T time, U = T + 1, M windows.
"""

from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np

VOCAB = 256


class Corpus(NamedTuple):
    train_N: np.ndarray
    held_out_N: np.ndarray


class Windows:
    """The windows of U bytes at every offset, as a source of random access for grain."""

    def __init__(self, bytes_N: np.ndarray, window: int):
        self.bytes_N, self.window = bytes_N, window

    def __len__(self) -> int:
        return len(self.bytes_N) - self.window

    def __getitem__(self, offset: int) -> np.ndarray:
        return np.asarray(self.bytes_N[offset : offset + self.window + 1])


def corpus(path: str | Path | None = None, window: int = 1) -> Corpus:
    """The bytes of a file, mapped and not read, or of Python's own reference text; the last tenth is held out.

    At least one window of each part is kept. Raises ValueError for a file that is missing, empty or shorter than that.
    """
    if window < 1:
        raise ValueError(f"window: expected an integer >= 1, got {window}")
    bytes_N = python_reference() if path is None else mapped(Path(path))
    size, need = len(bytes_N), window + 1
    if size < 2 * need:
        raise ValueError(
            f"data: expected at least {2 * need} bytes, one window of {window} + 1 to train on and one held out, "
            f"got {size} in {path or 'pydoc_data.topics'}"
        )
    cut = min(max(int(size * 0.9), need), size - need)
    return Corpus(bytes_N[:cut], bytes_N[cut:])


def mapped(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(
            f"data: expected a file, got {path}, which {'is not one' if path.exists() else 'does not exist'}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"data: expected a file with text in it, got {path}, which is empty")
    return np.memmap(path, np.uint8, mode="r")


def python_reference() -> np.ndarray:
    """The reference text inside every Python installation: about 490 kB of English, a little other in each version."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return np.frombuffer(text.encode(), np.uint8)


def training_batches(
    bytes_N: np.ndarray, window: int, batch: int, seed: int, shard: tuple[int, int] | None = None
) -> grain.DatasetIterator:
    """An endless iterator of uint8 [B, U], whose position `get_state` and `set_state` read and set.

    shard: (index, count), this process's part of every epoch; by default jax's process index and count. Two shards
    share no window.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer in 0 ... 2**32 - 1, got {seed}")
    index, count = shard if shard is not None else (jax.process_index(), jax.process_count())
    source = Windows(bytes_N, window)
    if len(source) < count:
        raise ValueError(f"data: expected a window for each of {count} processes, got {len(source)} in all")
    windows = grain.MapDataset.source(source).seed(seed)[index::count].shuffle().repeat()
    # One thread keeps a step ahead; windows are copied under the interpreter's lock, so more would only wait for it.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(windows.batch(batch).to_iter_dataset(ahead))


def evaluation_windows(bytes_N: np.ndarray, window: int, most: int | None = None) -> np.ndarray:
    """uint8 [M, U]: windows end to end that predict each byte once, or `most` of them, evenly spread."""
    starts_M = np.arange(0, len(bytes_N) - window, window)
    if most is not None and most < len(starts_M):
        starts_M = starts_M[np.arange(most) * len(starts_M) // most]
    return np.stack([bytes_N[start : start + window + 1] for start in starts_M])
