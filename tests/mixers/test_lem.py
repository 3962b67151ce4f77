"""Facts of the LEM paper, arXiv:2110.04744: bounds on states and errors, and the differential equation behind it.

Dims: B batch, T time, D width, F hidden, G = F.
"""

import jax
import numpy as np
import pytest

import memzoo
from memzoo.mixers import lem
from tests.initial import begins_as_in_torch

B, T, D, F = 2, 300, 3, 4
rng = np.random.default_rng(0)
x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)


def parameters(scale=1.0, **fields):
    """Weights of the cell drawn anew, normal with deviation `scale`."""
    mixer = memzoo.make("lem", width=D, hidden=F, **fields)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"]
    return mixer, jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(np.float32), params)


def parts(params):
    """W and b for d, e, z and y; U for d, e and z; U for y; all in float64."""
    p = jax.tree.map(np.float64, params)
    W, b = np.split(p["in"]["kernel"], 4, axis=1), np.split(p["in"]["bias"], 4)
    return list(zip(W, b, strict=True)), np.split(p["from_y"], 3, axis=1), p["from_z"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_equals_its_equation(impl):
    mixer, params = parameters(dt=0.3, impl=impl)
    (Wd, We, Wz, Wy), (Ud, Ue, Uz), Uy = parts(params)
    o_BTD, state = jax.jit(mixer.apply)({"params": params}, x_BTD)
    y, z, of = np.zeros((B, F)), np.zeros((B, F)), lambda W: x_BTD[:, t] @ W[0] + W[1]
    for t in range(T):
        d, e = 0.3 * sigmoid(of(Wd) + y @ Ud), 0.3 * sigmoid(of(We) + y @ Ue)
        z = (1 - d) * z + d * np.tanh(of(Wz) + y @ Uz)
        y = (1 - e) * y + e * np.tanh(of(Wy) + z @ Uy)
        np.testing.assert_allclose(o_BTD[:, t], y @ np.float64(params["out"]["kernel"]), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.y_BF, y, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.z_BF, z, rtol=1e-3, atol=1e-4)


def test_states_are_bounded_and_reach_the_bound():
    """|y_n|, |z_n| <= 1 - (1 - dt)^n, less than 1 and n dt, whatever the weights: equal where all is saturated."""
    n, bound = 5, 1 - (1 - 0.01) ** 5
    mixer, params = parameters(scale=30, dt=0.01)
    run = jax.jit(mixer.apply)
    _, state = run({"params": params}, 1e3 * x_BTD[:, :n])
    assert 0.5 * bound < max(np.abs(s).max() for s in state) <= bound * (1 + 1e-5)
    open_gates = jax.tree.map(np.zeros_like, params)
    open_gates["in"]["bias"][:] = 100
    for s in run({"params": open_gates}, x_BTD[:, :n])[1]:
        np.testing.assert_allclose(s, bound, rtol=1e-5)


@pytest.mark.parametrize("impl", ["scan", "newton"])
@pytest.mark.cases(1)
def test_errors_neither_explode_nor_vanish(impl):
    """One token's Jacobian is within G dt of the identity, by rows, G = 1 + 1.5 eta + 1.5 eta^2 dt, where eta bounds
    the rows of all recurrent weights: from |sigmoid'| <= 1/4, |tanh'| <= 1 and |y|, |z| <= 1. So T of them, with
    G T dt = log 1.5, are within 1/2 of it, however large T is."""
    mixer, params = parameters(impl=impl)
    _, of_y, of_z = parts(params)
    eta = max(np.abs(U).sum(0).max() for U in (*of_y, of_z))
    dt = np.log(1.5) / (T * (1 + 1.5 * eta + 0.01 * eta**2))
    assert 1.5 * dt <= 0.01
    mixer = mixer.clone(dt=float(dt))
    h, dh = rng.uniform(-1, 1, size=(2, 2, B, F)).astype(np.float32)

    def back(h, dh):
        last = lambda h: mixer.apply({"params": params}, x_BTD, lem.State(*h))[1]
        return jax.vjp(last, tuple(h))[1](lem.State(*dh))[0]

    moved_B = np.abs(np.stack(jax.jit(back)(h, dh)) - dh).sum((0, 2)) / np.abs(dh).sum((0, 2))
    assert np.all(moved_B < 0.5) and np.all(moved_B > 1e-3)


def test_is_an_integrator_of_first_order():
    """With dt to 0 it follows y' = sigmoid(..) (tanh(..) - y), z' likewise: twice the steps, half the error."""
    mixer, params = parameters()
    (Wd, We, Wz, Wy), (Ud, Ue, Uz), Uy = parts(params)
    x_BD = np.float64(x_BTD[:, 0])
    of = lambda W: x_BD @ W[0] + W[1]

    def slope(s):
        y, z = s
        dy = sigmoid(of(We) + y @ Ue) * (np.tanh(of(Wy) + z @ Uy) - y)
        return np.stack([dy, sigmoid(of(Wd) + y @ Ud) * (np.tanh(of(Wz) + y @ Uz) - z)])

    s, h = np.zeros((2, B, F)), 0.01  # to time 2, by Runge and Kutta
    for _ in range(200):
        k1 = slope(s)
        k2 = slope(s + h / 2 * k1)
        k3 = slope(s + h / 2 * k2)
        s = s + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(s + h * k3))

    def error(steps):
        x = np.repeat(x_BTD[:, :1], steps, axis=1)
        return np.abs(np.stack(jax.jit(mixer.clone(dt=2 / steps).apply)({"params": params}, x)[1]) - s).max()

    assert error(64) < 0.02
    assert 1.7 < error(64) / error(128) < 2.3


def test_initial_distribution():
    """Uniform in +-1/sqrt(F), kernels from the input and biases too."""
    mixer = memzoo.make("lem", width=5, hidden=60)
    params = jax.jit(mixer.init)(jax.random.key(0), np.zeros((1, 1, 5), np.float32))["params"]
    for weight in (params["in"]["kernel"], params["in"]["bias"], params["from_y"], params["from_z"]):
        assert begins_as_in_torch(weight, 60)


@pytest.mark.parametrize("dt", [0.0, -1.0, 1.5])
def test_a_step_that_is_none_is_refused(dt):
    with pytest.raises(ValueError, match=rf"dt: expected a number in \(0, 1\], got {dt}"):
        memzoo.make("lem", width=D, dt=dt).initial_state(B)
