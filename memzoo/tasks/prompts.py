"""Just read twice: prompts that repeat their context, prefixes with tokens to fill in, and sets that share an element.

    context, question, answer   ->   context, question, context, question, answer         JRT-Prompt, `times` = 2

At the second reading a model knows what it will be asked, and what to keep in a memory that is too small for all.
Functions of one example each, for `grain.MapDataset.map` or any other loop.

Source: Arora, Timalsina, Singhal, Spector, Eyuboglu, Zhao, Rao, Rudra, Ré, "Just read twice: closing the recall gap for
recurrent language models" (2024), arXiv:2407.05483; rates, order of tokens and sizes from the released code
(HazyResearch/prefix-linear-attention).

Dims: N tokens of a context, M of a question, K of an answer, U = N + M + ... + K, T = U - 1.
"""

import numbers
from typing import NamedTuple

import numpy as np

from memzoo.contract import positive, whole_number

SEPARATE, ASK, SPECIAL = 0, 1, 2


class Prompt(NamedTuple):
    context_N: np.ndarray
    question_M: np.ndarray
    answer_K: np.ndarray


class Asked(NamedTuple):
    """tokens: the first T are read. asked: after which of them the next token is of the answer."""

    tokens_U: np.ndarray
    asked_T: np.ndarray


class Masked(NamedTuple):
    """inputs: what is read. targets: at `filled` the token that was masked there, at `next` the one that comes next."""

    inputs_T: np.ndarray
    targets_T: np.ndarray
    filled_T: np.ndarray
    next_T: np.ndarray


def repeated(prompt: Prompt, times: int = 2, question_each: bool = True) -> Asked:
    """JRT-Prompt: the context `times` times, with the question after each, or only after the last, then the answer.

    times = 1 is the plain prompt. Raises ValueError, by name, for times < 1 and for an answer without a token.
    """
    positive(times=times)
    if not len(prompt.answer_K):
        raise ValueError("answer_K: expected at least one token, got none")
    once = [prompt.context_N, prompt.question_M] if question_each else [prompt.context_N]
    readings = once * (times - 1) + [prompt.context_N, prompt.question_M]
    tokens_U = np.concatenate([*readings, prompt.answer_K]).astype(np.int32)
    return Asked(tokens_U, np.arange(1, len(tokens_U)) >= len(tokens_U) - len(prompt.answer_K))


def masked_prefix(tokens_U: np.ndarray, prefix: int, mask: int, rng: np.random.Generator, rate: float = 0.15) -> Masked:
    """What JRT-RNN is trained on: each token of the prefix is masked at `rate` and to be filled in where it stands.

    After the prefix the next token is predicted, as ever; inside it nothing is, as it sees what comes next. The paper's
    loss is the mean over `next` plus 1/4 of that over `filled`. The prefix of a mixer that looks ahead (jrt) has to be
    this one: in a longer one, tokens would see those that they are to predict.
    Raises ValueError, by name, for a prefix that leaves no token to predict, and for a rate outside of 0 ... 1.
    """
    T = len(tokens_U) - 1
    if not whole_number(prefix) or not 0 <= prefix < T:
        raise ValueError(f"prefix: expected an integer, 0 <= prefix < {T}, the tokens that are read, got {prefix!r}")
    if not isinstance(rate, numbers.Real) or not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a number in 0 ... 1, got {rate!r}")
    next_T = np.arange(T) >= prefix
    filled_T = ~next_T & (rng.random(T) < rate)
    inputs_T, targets_T = np.where(filled_T, mask, tokens_U[:-1]), np.where(next_T, tokens_U[1:], tokens_U[:-1])
    return Masked(inputs_T.astype(np.int32), targets_T.astype(np.int32), filled_T, next_T)


def disjoint_sets(
    rng: np.random.Generator, short: int = 4, long: int = 8, elements: int = 32, long_first: bool = False
) -> Prompt:
    """Two sets of tokens with one in common: which? A causal memory has to keep the whole of the set that comes first.

    Elements are SPECIAL and up. With the short set first its few tokens suffice to know the answer when it comes.
    Raises ValueError, by name, for sets that are empty or need more elements than there are.
    """
    positive(short=short, long=long, elements=elements)
    if elements < short + long - 1:
        raise ValueError(f"elements: expected at least {short + long - 1}, got {elements}")
    drawn = SPECIAL + rng.permutation(elements)[: short + long - 1]
    sets = rng.permutation(drawn[:short]), rng.permutation(drawn[short - 1 :])
    first, second = reversed(sets) if long_first else sets
    return Prompt(np.concatenate([first, [SEPARATE], second]), np.array([ASK]), drawn[short - 1 : short])
