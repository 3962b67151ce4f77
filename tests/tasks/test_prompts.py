"""Just read twice: repeated prompts, masked prefixes and sets that share an element."""

from functools import partial

import grain
import numpy as np
import pytest

from memzoo.tasks import prompts
from memzoo.tasks.prompts import ASK, SEPARATE, SPECIAL, Prompt

PROMPT = Prompt(np.array([11, 12, 13]), np.array([21, 22]), np.array([31, 32]))


@pytest.mark.parametrize(
    ("times", "question_each", "before"),
    [
        (1, True, [11, 12, 13, 21, 22]),
        (2, True, [11, 12, 13, 21, 22, 11, 12, 13, 21, 22]),
        (2, False, [11, 12, 13, 11, 12, 13, 21, 22]),
        (3, False, [11, 12, 13, 11, 12, 13, 11, 12, 13, 21, 22]),
    ],
)
def test_the_context_is_read_again_before_the_answer(times, question_each, before):
    tokens, asked = prompts.repeated(PROMPT, times, question_each)
    assert tokens.tolist() == [*before, 31, 32] and tokens.dtype == np.int32
    assert [tokens[t + 1] for t in np.flatnonzero(asked)] == [31, 32] and asked.shape == (len(tokens) - 1,)


def test_it_is_a_transform_for_grain():
    sets = grain.MapDataset.range(20).map(lambda number: prompts.disjoint_sets(np.random.default_rng(number)))
    batch = sets.map(partial(prompts.repeated, times=2)).batch(4)[0]
    assert batch.tokens_U.shape == (4, 2 * (4 + 1 + 8 + 1) + 1) and batch.asked_T.sum() == 4
    once = sets.map(partial(prompts.repeated, times=1)).batch(4)[0]
    np.testing.assert_array_equal(batch.tokens_U[:, 14:], once.tokens_U)
    np.testing.assert_array_equal(batch.tokens_U[:, :14], once.tokens_U[:, :-1])


def test_a_masked_prefix_is_to_be_filled_in_and_the_rest_to_be_continued():
    tokens, prefix, mask = np.random.default_rng(0).integers(5, 50, 4001), 3000, 2
    inputs, targets, filled, following = prompts.masked_prefix(tokens, prefix, mask, np.random.default_rng(1))
    np.testing.assert_array_equal(following, np.arange(4000) >= prefix)
    assert not np.any(filled[prefix:]) and abs(filled[:prefix].mean() - 0.15) < 0.03
    np.testing.assert_array_equal(np.where(filled, targets, inputs), tokens[:-1])
    assert np.all(inputs[filled] == mask) and not np.any(inputs[~filled] == mask)
    np.testing.assert_array_equal(targets[following], tokens[prefix + 1 :])


def test_without_a_prefix_it_is_next_token_prediction():
    tokens = np.arange(9)
    inputs, targets, filled, following = prompts.masked_prefix(tokens, 0, 99, np.random.default_rng(0), rate=1.0)
    assert (inputs.tolist(), targets.tolist()) == (tokens[:-1].tolist(), tokens[1:].tolist())
    assert following.all() and not filled.any()


@pytest.mark.parametrize("long_first", [False, True])
def test_the_answer_is_the_one_element_of_both_sets(long_first):
    places = set()
    for number in range(50):
        context, question, answer = prompts.disjoint_sets(np.random.default_rng(number), 3, 5, 20, long_first)
        at = int(np.flatnonzero(context == SEPARATE)[0])
        first, second = context[:at].tolist(), context[at + 1 :].tolist()
        assert [len(first), len(second)] == ([5, 3] if long_first else [3, 5])
        assert len(set(first)) == len(first) and len(set(second)) == len(second)
        assert set(first) & set(second) == set(answer.tolist()) and question.tolist() == [ASK]
        assert min(first + second) >= SPECIAL and max(first + second) < SPECIAL + 20
        places.add((first.index(answer[0]), second.index(answer[0])))
    assert len(places) > 10, "the answer is anywhere in either set"


def test_what_does_not_fit_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="times: expected an integer >= 1, got 0"):
        prompts.repeated(PROMPT, 0)
    with pytest.raises(ValueError, match="answer_K: expected at least one token, got none"):
        prompts.repeated(PROMPT._replace(answer_K=np.array([], int)))
    with pytest.raises(ValueError, match=r"prefix: expected an integer, 0 <= prefix < 8, .* got 8"):
        prompts.masked_prefix(np.arange(9), 8, 0, rng)
    with pytest.raises(ValueError, match=r"prefix: expected an integer, 0 <= prefix < 8, .* got 2.5"):
        prompts.masked_prefix(np.arange(9), 2.5, 0, rng)
    with pytest.raises(ValueError, match=r"times: expected an integer >= 1, got 1.5"):
        prompts.repeated(PROMPT, 1.5)
    with pytest.raises(ValueError, match=r"long: expected an integer >= 1, got 8.0"):
        prompts.disjoint_sets(rng, long=8.0)
    with pytest.raises(ValueError, match=r"elements: expected an integer >= 1, got 32.5"):
        prompts.disjoint_sets(rng, elements=32.5)
    with pytest.raises(ValueError, match=r"rate: expected a number in 0 \.\.\. 1, got 1.5"):
        prompts.masked_prefix(np.arange(9), 3, 0, rng, 1.5)
    with pytest.raises(ValueError, match="elements: expected at least 11, got 10"):
        prompts.disjoint_sets(rng, elements=10)
    with pytest.raises(ValueError, match="short: expected an integer >= 1, got 0"):
        prompts.disjoint_sets(rng, short=0)
