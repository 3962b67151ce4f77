"""A stream of 131,072 tokens stays finite, and in pieces of 4,096 equals one call, in every architecture of constant
state, in the form that it trains in.

Left out by default, for its time: `python -m pytest -m long` runs it.

Dims: P pieces, C tokens of one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import memzoo
from tests.test_contract import D, all_finite, assert_close, make, setup

T, C = 131_072, 4_096
CONSTANT = [name for name in memzoo.names() if memzoo.card(name).state == "constant"]
# In chunks, or as a convolution, where there is such a form: the definition in pieces is the same loop. Not newton,
# which holds a matrix for each token: test_newton has thousands. Not trees, which hold every state, nor kernels, which
# are interpreted here.
FORMS = [(name, next((f for f in ("chunk", "conv") if f in memzoo.card(name).forms), "scan")) for name in CONSTANT]


# What they learn of a token depends on what they have learned, so that rounding may grow: within thousands of tokens a
# difference of 1e-5 moves outputs of atlas as much as any other would. They must stay finite, and begin alike.
SENSITIVE = ("moneta", "yaad", "atlas")


@pytest.mark.long
@pytest.mark.parametrize(("name", "impl"), FORMS)
def test_a_long_stream_in_pieces_equals_one_call(name, impl):
    params, _, state, _, _ = setup(name)
    state = jax.tree.map(lambda leaf: leaf[:1], state)
    x = jax.random.normal(jax.random.key(0), (1, T, D))
    mixer = make(name, impl)

    def piece(state, x_1CD):
        y_1CD, state = mixer.apply(params, x_1CD, state)
        return state, (y_1CD, state)

    x_P1CD = jnp.moveaxis(x.reshape(1, T // C, C, D), 1, 0)
    last, (y_P1CD, states) = jax.jit(lambda state: lax.scan(piece, state, x_P1CD))(state)
    whole, last_of_whole = jax.jit(mixer.apply)(params, x, state)
    assert all_finite((y_P1CD, states, whole))
    whole_P1CD = np.moveaxis(np.reshape(whole, (1, T // C, C, D)), 1, 0)
    if name in SENSITIVE:
        assert_close(y_P1CD[0][:, :50], whole_P1CD[0][:, :50], 1e-4)
        return
    assert_close(last, last_of_whole, 1e-4)
    largest = np.max(np.abs(whole))  # a memory that has faded to nothing is measured against what it was
    for got, want in zip(y_P1CD, whole_P1CD, strict=True):  # each: an error that grows must not hide among the first
        assert_close((got, largest), (want, largest), 1e-4)
