"""Answers are those of the definition, token by token."""

import jax
import numpy as np
import pytest

from memzoo.tasks import last_bits

B, T, M = 3, 11, 5


def test_answers_are_those_of_the_definition():
    u_BT = np.asarray(last_bits.draw(jax.random.key(1), B, T))
    assert set(u_BT.ravel()) == {0, 1} and u_BT.dtype == np.int32
    parity_BTM, match_BTM = (np.asarray(f(u_BT, M)) for f in (last_bits.parity, last_bits.match))
    has_answer_TM = np.asarray(last_bits.has_answer(T, M))
    for N in range(1, M + 1):
        for t in range(T):
            assert has_answer_TM[t, N - 1] == (t + 1 >= N)
            if t + 1 >= N:
                bits = u_BT[:, t - N + 1 : t + 1]
                np.testing.assert_array_equal(parity_BTM[:, t, N - 1], np.bitwise_xor.reduce(bits, axis=1))
                np.testing.assert_array_equal(match_BTM[:, t, N - 1], bits[:, 0] == bits[:, -1])


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="batch: expected an integer >= 1, got 0"):
        last_bits.draw(jax.random.key(0), 0, 3)
    with pytest.raises(ValueError, match="M: expected an integer >= 1, got 0"):
        last_bits.has_answer(3, 0)
