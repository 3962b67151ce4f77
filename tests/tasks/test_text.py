"""Every offset once an epoch, the held-out part never, the same again from the same seed or position."""

import json

import numpy as np
import pytest

from memzoo.tasks import text

WINDOW, BATCH = 7, 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "noise.bin"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes())
    return path


def offsets(batches, count, path):
    """Where in the file `count` batches come from: 8 random bytes are nowhere twice."""
    data = path.read_bytes()
    windows = np.concatenate([next(batches) for _ in range(count)])
    assert windows.shape == (count * BATCH, WINDOW + 1) and windows.dtype == np.uint8
    return [data.index(window.tobytes()) for window in windows]


def test_an_epoch_takes_every_offset_of_the_first_nine_tenths_once(path):
    train_N, held_out_N = text.corpus(path, WINDOW)
    assert (len(train_N), len(held_out_N)) == (450, 50)
    epoch = 450 - WINDOW
    batches = text.training_batches(train_N, WINDOW, BATCH, seed=0)
    found = offsets(batches, 2 * epoch // BATCH, path)
    first, second = found[:epoch], found[epoch:]
    assert sorted(first) == list(range(epoch))
    assert len(set(second)) == len(second) and second != first[: len(second)]
    assert np.abs(np.diff(first)).mean() > epoch / 6  # shuffled: a third of the epoch on average


def test_only_the_seed_decides(path):
    train_N = text.corpus(path, WINDOW).train_N
    first, again, other = (offsets(text.training_batches(train_N, WINDOW, BATCH, seed), 9, path) for seed in (3, 3, 4))
    assert first == again != other


def test_processes_share_an_epoch_and_no_window(path):
    train_N = text.corpus(path, WINDOW).train_N
    shards = [text.training_batches(train_N, WINDOW, BATCH, 0, shard=(index, 3)) for index in range(3)]
    found = [offsets(shard, 36, path) for shard in shards]  # 144 of each process's 147 or 148
    assert len({offset for shard in found for offset in shard}) == 3 * 144


def test_a_saved_position_continues(path):
    train_N = text.corpus(path, WINDOW).train_N
    batches = text.training_batches(train_N, WINDOW, BATCH, 0)
    offsets(batches, 5, path)
    position = json.loads(json.dumps(batches.get_state()))
    after = offsets(batches, 120, path)  # into the second epoch
    other = text.training_batches(train_N, WINDOW, BATCH, 0)
    next(other)
    other.set_state(position)
    assert offsets(other, 120, path) == after


def test_evaluation_predicts_every_byte_once_or_is_evenly_spread():
    bytes_N = np.arange(7 * 13 + 4, dtype=np.uint8)
    windows_MU = text.evaluation_windows(bytes_N, 7)
    assert windows_MU[:, 1:].ravel().tolist() == list(range(1, 7 * 13 + 1))
    assert (windows_MU[:, :-1] + 1 == windows_MU[:, 1:]).all()
    assert text.evaluation_windows(bytes_N, 7, most=3)[:, 0].tolist() == [0, 28, 56]
    assert len(text.evaluation_windows(bytes_N, 7, most=99)) == 13


def test_a_file_larger_than_32_bits_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(2**34)
    train_N, held_out_N = text.corpus(path, WINDOW)
    assert isinstance(train_N, np.memmap) and len(train_N) + len(held_out_N) == 2**34
    assert not next(text.training_batches(train_N, WINDOW, BATCH, 0)).any()


def test_the_default_corpus_is_english():
    train_N, held_out_N = text.corpus(None, 64)
    assert 400_000 < len(train_N) + len(held_out_N) < 700_000
    assert b"statement" in train_N.tobytes() and b"object" in held_out_N.tobytes()


def test_a_small_file_keeps_a_window_of_each_part(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(bytes(range(16)))
    train_N, held_out_N = text.corpus(path, WINDOW)
    assert train_N.tolist() == list(range(8)) and held_out_N.tolist() == list(range(8, 16))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data: .*nowhere.txt, which does not exist"):
        text.corpus(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"data: .* is not one"):
        text.corpus(tmp_path)
    path = tmp_path / "short.txt"
    path.touch()
    with pytest.raises(ValueError, match=r"data: .*short.txt, which is empty"):
        text.corpus(path)
    path.write_bytes(b"x" * 15)
    with pytest.raises(ValueError, match=r"data: expected at least 16 bytes.*7 \+ 1.*got 15"):
        text.corpus(path, WINDOW)
    with pytest.raises(ValueError, match=r"window: .*got 0"):
        text.corpus(path, 0)
    with pytest.raises(ValueError, match=r"seed: .*got -1"):
        text.training_batches(np.zeros(99, np.uint8), WINDOW, BATCH, -1)
