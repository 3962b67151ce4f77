"""The needle is where it should be, once, and its values are the answer."""

from functools import partial

import jax
import numpy as np
import pytest

from memzoo.tasks.needle import ASK, NEEDLE, SPECIAL, Needle

LENGTH = 23
DEPTHS = np.array([0, 0.25, 0.5, 1.0, 1.0])


@pytest.fixture(scope="module", params=["passkey", "needle"])
def drawn(request):
    task = Needle(request.param, words=5, keys=3, values=4, answer=2)
    return task, np.asarray(jax.jit(partial(task.draw, length=LENGTH))(jax.random.key(1), DEPTHS))


def test_the_answer_is_what_the_needle_said(drawn):
    task, tokens_BU = drawn
    assert tokens_BU.shape == (5, LENGTH + 2) and tokens_BU.dtype == np.int32
    assert tokens_BU.min() >= 0 and tokens_BU.max() == task.vocab - 1
    told = 1 + (task.kind == "needle")
    for tokens_U, depth in zip(tokens_BU, DEPTHS, strict=True):
        assert (tokens_U == NEEDLE).sum() == (tokens_U == ASK).sum() == 1
        at, asked = (int(np.flatnonzero(tokens_U == mark)[0]) for mark in (NEEDLE, ASK))
        assert asked == LENGTH - told, "the question ends the text"
        room = asked - (told + 2)
        assert at == np.round(depth * room) and {0: 0, 1: room}.get(depth, at) == at
        np.testing.assert_array_equal(tokens_U[at + 1 : at + told + 2], tokens_U[asked + 1 :])
        values = tokens_U[-2:]
        assert (values >= SPECIAL).all() and (values < SPECIAL + 4).all()


def test_all_else_is_hay(drawn):
    task, tokens_BU = drawn
    first = SPECIAL + 4 + 3
    hay = np.where(tokens_BU >= first, tokens_BU - first, -1)
    assert (hay >= 0).sum() == 5 * (LENGTH - task.shortest)
    if task.kind == "passkey":
        places = np.broadcast_to(np.arange(LENGTH + 2) % 5, hay.shape)
        np.testing.assert_array_equal(hay[hay >= 0], places[hay >= 0])
    else:
        assert len({tuple(row) for row in hay}) == 5, "other words in each row"


def test_a_function_of_the_key_alone():
    task, depth = Needle(), np.array([0.3, 0.9])
    one, again, other = (np.asarray(task.draw(jax.random.key(seed), depth, 50)) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).mean() > 0.5


def test_bad_input_is_named():
    for match, fields in (
        ("kind: unknown kind 'pass'; did you mean passkey", {"kind": "pass"}),
        ("words: expected an integer >= 1, got 0", {"words": 0}),
        ("answer: expected an integer >= 1, got 0", {"answer": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            Needle(**fields)
    with pytest.raises(ValueError, match="length: expected at least 6, for needle and question, got 5"):
        Needle().draw(jax.random.key(0), np.zeros(1), 5)
    with pytest.raises(ValueError, match=r"depth_B: expected numbers in 0 \.\.\. 1, got \[1.5\]"):
        Needle().draw(jax.random.key(0), np.array([1.5]), 50)
