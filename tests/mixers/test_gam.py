"""Facts of the Gated Associative Memory paper, arXiv:2509.00605.

Dims: as in memzoo/mixers/gam.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.models.backbone import LanguageModel
from tests.initial import begins_as_in_torch

B, T, D, M, W = 2, 11, 5, 7, 3


def setup(**fields):
    mixer = memzoo.make("gam", width=D, slots=M, **fields)
    params = jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D))))
    return mixer, params, np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(params, x_TD, before_PD):
    """One sequence, token by token, after the inputs `before`."""
    p = jax.tree.map(np.float64, params["params"])
    inputs, y = [*before_PD], []
    for x_D in x_TD:
        inputs.append(x_D)
        local = p["bias"] + sum(p["conv"][w] * inputs[-W + w] for w in range(W))
        exp = np.exp([slot @ x_D for slot in p["bank"]])
        found = sum(e * slot for e, slot in zip(exp, p["bank"], strict=True)) / exp.sum()
        gates = sigmoid(x_D @ p["gate"]["kernel"] + p["gate"]["bias"])
        y.append(gates[:D] * local + gates[D:] * found)
    return np.array(y)


@pytest.mark.parametrize("impl", ["scan", "conv"])
def test_is_the_equation_of_the_paper(impl):
    mixer, params, x = setup(impl=impl)
    past = np.random.default_rng(1).normal(size=(B, W - 1, D)).astype(np.float32)
    y, state = jax.jit(mixer.apply)(params, x, type(mixer.initial_state(B))(past))
    np.testing.assert_allclose(y, [reference(params, x[b], past[b]) for b in range(B)], atol=1e-5)
    np.testing.assert_array_equal(state.past_BPD, x[:, -W + 1 :])


def test_without_a_neighbourhood_each_token_is_alone():
    """W = 1: the path through the bank takes tokens in any order, and no state is left."""
    mixer, params, x = setup(conv_width=1)
    apply, order = jax.jit(mixer.apply), np.random.default_rng(2).permutation(T)
    y, state = apply(params, x)
    np.testing.assert_array_equal(apply(params, x[:, order])[0], np.asarray(y)[:, order])
    assert state.past_BPD.size == 0


def test_the_bank_retrieves_a_slot_in_one_step():
    """Far apart slots: what is near to one comes back as that slot, as in a Hopfield network; behind its gate alone."""
    mixer, params, _ = setup()
    slots = 20 * np.eye(M, D, dtype=np.float32)
    gate = {"kernel": np.zeros((D, 2 * D), np.float32), "bias": np.repeat(np.float32([-50, 50]), D)}
    params = {"params": {**params["params"], "bank": slots, "gate": gate}}
    noisy = slots[None, :D] + np.random.default_rng(3).normal(size=(1, D, D)).astype(np.float32)
    y, _ = jax.jit(mixer.apply)(params, noisy)
    np.testing.assert_allclose(y[0], slots[:D], atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.cases(1)
def test_recall_ends_where_the_convolutions_end(layers):
    """A key asked for layers (W - 1) + 1 tokens after it was shown, or later, is unknown: there is no other memory."""
    model = LanguageModel(vocab=9, width=8, layers=layers, mixers=("gam",), fields={"gam": {"slots": M}})
    tokens = np.random.default_rng(4).integers(0, 9, (1, T))
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    other = tokens.copy()
    other[0, 0] = (other[0, 0] + 1) % 9
    apply = jax.jit(model.apply)
    one, two = (np.asarray(apply(params, ids)[0]) for ids in (tokens, other))
    seen = layers * (W - 1) + 1
    assert (np.abs(one - two)[0, :seen].max(-1) > 1e-5).all()
    np.testing.assert_array_equal(one[0, seen:], two[0, seen:])


def test_weights_begin_as_in_the_released_code():
    mixer = memzoo.make("gam", width=40, slots=60)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 40)))["params"]
    for weight, fan_in in ((p["conv"], W), (p["bias"], W), (p["gate"]["kernel"], 40), (p["gate"]["bias"], 40)):
        assert begins_as_in_torch(weight, fan_in)
    assert begins_as_in_torch(p["bank"], (60 + 40) / 6)  # Xavier's: +-sqrt(6 / (M + D))


@pytest.mark.parametrize("field", ["slots", "conv_width", "width"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}: expected an integer >= 1, got 0"):
        memzoo.make("gam", **{"width": D, field: 0})
