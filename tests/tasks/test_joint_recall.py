"""Every value asked for was told of that key in that context, in another order, and neither alone gives it away."""

import json

import numpy as np
import pytest

from memzoo.tasks import joint_recall
from memzoo.tasks.joint_recall import ASK, BEGIN, PAD, SPECIAL, JointRecall

SMALL = JointRecall(contexts=(2, 4), keys=(3, 5), values=7)


def kind(task, token):
    """(what a token is, its number)."""
    for name, size in (("special", SPECIAL), ("value", task.values), ("key", task.keys[1]), ("context", 10**9)):
        if token < size:
            return name, int(token)
        token -= size


def read(task, tokens):
    """{(context, key): value} in the order of the tokens, and where the keys are; checks the grammar on the way."""
    table, keys, context, key = {}, [], None, None
    for place, (what, number) in enumerate(kind(task, token) for token in tokens):
        if key is not None:
            assert what == "value"
            table[context, key], key = number, None
        elif what == "context":
            context = number
        else:
            assert what == "key" and context is not None and (context, number) not in table
            key = number
            keys.append(place)
    assert key is None
    return table, keys


def halves(task, tokens):
    tokens = tokens[: len(tokens) - np.count_nonzero(tokens == PAD)]
    assert tokens[0] == BEGIN and (tokens == ASK).sum() == 1 and (tokens == PAD).sum() == 0
    at = int(np.flatnonzero(tokens == ASK)[0])
    return tokens[1:at], tokens[at + 1 :], at + 1


def test_what_is_asked_is_what_was_told():
    rows = joint_recall.evaluation(SMALL, rows=50, seed=0)
    assert rows.tokens_U.shape == (50, SMALL.tokens) and rows.asked_T.shape == (50, SMALL.tokens - 1)
    assert rows.tokens_U.max() < SMALL.vocab and rows.tokens_U.dtype == np.int32 and rows.asked_T.dtype == bool
    sizes, same_order = set(), 0
    for tokens, asked in zip(*rows, strict=True):
        told, again, from_ = halves(SMALL, tokens)
        table, _ = read(SMALL, told)
        answers, keys = read(SMALL, again)
        assert table == answers
        contexts, names = ({pair[i] for pair in table} for i in range(2))
        assert contexts == set(range(len(contexts))) and names == set(range(len(names)))
        assert len(table) == len(contexts) * len(names)
        assert np.flatnonzero(asked).tolist() == [from_ + place for place in keys]
        assert all(kind(SMALL, tokens[t + 1])[0] == "value" for t in np.flatnonzero(asked))
        sizes.add((len(contexts), len(names)))
        same_order += list(table) == list(answers)
    assert sizes == {(n, k) for n in (2, 3, 4) for k in (3, 4, 5)} and same_order < 5


def test_the_longest_has_no_padding():
    largest = JointRecall(contexts=(4, 4), keys=(5, 5), values=7)
    tokens, _ = joint_recall.evaluation(largest, rows=1, seed=0)
    assert (tokens != PAD).all() and largest.tokens == tokens.size == 2 + 2 * 4 * (1 + 2 * 5)


def test_neither_the_key_nor_the_context_tells_the_value():
    """The best guess from either alone, from all that was told in the sequence, is far from right; from both it is."""
    task = JointRecall(contexts=(5, 5), keys=(6, 6), values=8)
    right = {"key": [], "context": [], "both": []}
    for tokens in joint_recall.evaluation(task, rows=100, seed=1).tokens_U:
        told, again, _ = halves(task, tokens)
        table, _ = read(task, told)
        for (context, key), value in read(task, again)[0].items():
            by_key = np.bincount([v for (_, k), v in table.items() if k == key])
            by_context = np.bincount([v for (c, _), v in table.items() if c == context])
            right["key"].append(by_key.argmax() == value)
            right["context"].append(by_context.argmax() == value)
            right["both"].append(table[context, key] == value)
    assert np.mean(right["both"]) == 1 and max(np.mean(right["key"]), np.mean(right["context"])) < 0.45


def test_defaults_are_those_of_the_released_set():
    """16 contexts and keys at most, 5 at least, 16 values: up to 1,058 tokens."""
    task = JointRecall()
    assert (task.contexts, task.keys, task.values, task.tokens) == ((5, 16), (5, 16), 16, 2 * 16 * 33 + 2)
    lengths = (joint_recall.evaluation(task, rows=200, seed=0).tokens_U != PAD).sum(1)
    assert lengths.min() < 300 and lengths.max() > 800 and lengths.min() >= 2 + 2 * 5 * 11


def test_only_the_seed_decides_and_held_out_sequences_are_others():
    first_3, again_3, other = (next(joint_recall.training_batches(SMALL, 40, seed)).tokens_U for seed in (3, 3, 4))
    assert (first_3 == again_3).all()
    rows = {row.tobytes() for row in first_3}
    assert len(rows) == 40
    assert not rows & {row.tobytes() for row in other}
    assert not rows & {row.tobytes() for row in joint_recall.evaluation(SMALL, 40, seed=3).tokens_U}


def test_processes_share_no_sequence_and_a_saved_position_continues():
    shards = [joint_recall.training_batches(SMALL, 5, 0, shard=(index, 3)) for index in range(3)]
    seen = [row.tobytes() for shard in shards for _ in range(4) for row in next(shard).tokens_U]
    assert len(set(seen)) == 60
    position = json.loads(json.dumps(shards[1].get_state()))
    after = [next(shards[1]) for _ in range(3)]
    other = joint_recall.training_batches(SMALL, 5, 0, shard=(1, 3))
    other.set_state(position)
    for batch in after:
        np.testing.assert_array_equal(next(other).tokens_U, batch.tokens_U)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"contexts": (0, 3)}, "contexts: expected 1 <= smallest <= largest, got 0, 3"),
        ({"keys": (4, 3)}, "keys: expected 1 <= smallest <= largest, got 4, 3"),
        ({"values": 0}, "values: expected an integer >= 1, got 0"),
        ({"values": 2.0}, "values: expected an integer >= 1, got 2.0"),
        ({"contexts": (2.5, 3)}, r"contexts: expected two integers, smallest, largest, got \(2.5, 3\)"),
        ({"keys": 5}, "keys: expected two integers, smallest, largest, got 5"),
    ],
)
def test_sizes_that_are_none_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        JointRecall(**fields)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"seed": -1}, r"seed: expected an integer in .*got -1"),
        ({"seed": 1.5}, r"seed: expected an integer in .*got 1.5"),
        ({"batch": 0}, "batch: expected an integer >= 1, got 0"),
        ({"shard": (3, 2)}, "shard: expected 0 <= index < count, got 3, 2"),
        ({"shard": (-1, 2)}, "shard: expected 0 <= index < count, got -1, 2"),
        ({"shard": (0, 1.0)}, r"shard: expected two integers, index, count, got \(0, 1.0\)"),
        ({"shard": 3}, "shard: expected two integers, index, count, got 3"),
    ],
)
def test_batches_that_are_none_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        joint_recall.training_batches(SMALL, **{"batch": 2, "seed": 0, **arguments})
    with pytest.raises(ValueError, match="rows: expected an integer >= 1, got 0"):
        joint_recall.evaluation(SMALL, rows=0, seed=0)


def test_draws_are_independent_so_that_tables_of_a_few_cells_come_again():
    task = JointRecall(contexts=(1, 1), keys=(1, 1), values=2)
    rows = next(joint_recall.training_batches(task, 40, seed=0)).tokens_U
    assert len({row.tobytes() for row in rows}) == 2
