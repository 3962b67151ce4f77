"""Facts of the Wave-RNN paper, arXiv:2309.08045: it begins as a shift register, and waves go round a ring.

Dims: B batch, T time, D width, C channels, N places.
"""

import jax
import numpy as np
import pytest

import memzoo
from memzoo.mixers import wave_rnn

B, T, D, C, N = 2, 17, 3, 2, 7
rng = np.random.default_rng(0)
x_BTD = rng.integers(1, 9, size=(B, T, D)).astype(np.float32)  # sums of which are exact


def parameters(**fields):
    mixer = memzoo.make("wave_rnn", width=D, channels=C, places=N, **fields)
    return mixer, jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"])


@pytest.mark.parametrize(
    ("impl", "activation", "sign"), [("scan", "relu", 1), ("newton", "relu", 1), ("scan", "identity", -1)]
)
@pytest.mark.cases(1)
def test_begins_as_a_shift_register(impl, activation, sign):
    """h_t[-k mod N] = x_{t-k} for k < N, in every channel, to the bit; what is N and 2 N older is added to it."""
    mixer, params = parameters(impl=impl, activation=activation)
    run = jax.jit(mixer.apply)
    _, state = run({"params": params}, sign * x_BTD[:, :N])
    back_N = -np.arange(N) % N
    want_BN = sign * x_BTD[:, :N].sum(-1)[:, ::-1]
    np.testing.assert_array_equal(state.h_BCN[..., back_N], want_BN[:, None].repeat(C, 1))
    _, state = run({"params": params}, sign * x_BTD)
    x_BT = sign * x_BTD[:, ::-1].sum(-1)
    want_BN = np.stack([x_BT[:, k::N].sum(-1) for k in range(N)], axis=-1)
    np.testing.assert_array_equal(state.h_BCN[..., back_N], want_BN[:, None].repeat(C, 1))


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_errors_travel_back_along_the_ring_as_loud_as_they_came(impl):
    mixer, params = parameters(impl=impl)
    h_BCN, dh_BCN = rng.uniform(1, 2, size=(2, B, C, N)).astype(np.float32)

    def back(h_BCN, dh_BCN):
        last = lambda h_BCN: mixer.apply({"params": params}, x_BTD, wave_rnn.State(h_BCN))[1].h_BCN
        return jax.vjp(last, h_BCN)[1](dh_BCN)[0]

    np.testing.assert_array_equal(jax.jit(back)(h_BCN, dh_BCN), np.roll(dh_BCN, T, axis=-1))


def test_equals_a_recurrent_matrix_of_circulant_blocks():
    """The equation with u written out: a unit takes from those near it on the ring, in all channels."""
    mixer, params = parameters(activation="tanh", conv_width=5)
    params["in"] = {"kernel": rng.normal(size=(D, C, N)), "bias": rng.normal(size=(C, N))}
    params["conv"] = rng.normal(size=(5, C, C))
    params = jax.tree.map(np.float32, params)
    x = rng.normal(size=x_BTD.shape).astype(np.float32)
    y_BTD, state = jax.jit(mixer.apply)({"params": params}, x)

    U = np.zeros((C, N, C, N))  # from, to
    for to in range(N):
        for w in range(5):
            U[:, (to + w - 2) % N, :, to] = params["conv"][w]
    U, h = U.reshape(C * N, C * N), np.zeros((B, C * N))
    for t in range(T):
        h = np.tanh(x[:, t] @ params["in"]["kernel"].reshape(D, -1) + h @ U + params["in"]["bias"].ravel())
        np.testing.assert_allclose(y_BTD[:, t], h @ params["out"]["kernel"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.h_BCN.reshape(B, -1), h, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("conv_width", [3, 7])
def test_initial_weights(conv_width):
    """u takes from one place up, in each channel from itself; the input enters at place 0."""
    _, params = parameters(conv_width=conv_width)
    assert np.array_equal(params["conv"][conv_width // 2 + 1], np.eye(C)) and params["conv"].sum() == C
    assert np.all(params["in"]["kernel"][..., 0] == 1) and params["in"]["kernel"].sum() == D * C
    assert not np.any(params["in"]["bias"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"conv_width": 4}, "conv_width: expected an odd integer from 3 to places = 7, got 4"),
        ({"conv_width": 1}, "conv_width: expected an odd integer from 3 .* got 1"),
        ({"conv_width": 9}, "conv_width: expected an odd integer from 3 .* got 9"),
        ({"activation": "rel"}, r"activation: expected one of relu, tanh, identity, got 'rel'; did you mean relu\?"),
    ],
)
def test_bad_fields_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        parameters(**fields)
