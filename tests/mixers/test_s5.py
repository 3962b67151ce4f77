"""Facts of the S5 paper, arXiv:2208.04933."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.ops import hippo


def initial(width=3, **fields):
    mixer = memzoo.make("s5", width=width, **fields)
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, width)))
    return mixer, params, {name: np.float64(p) for name, p in params["params"].items()}


def complex_parts(p):
    N = p["log_dt"].size
    B, C = p["B"][:N] + 1j * p["B"][N:], p["C"][:, :N] + 1j * p["C"][:, N:]
    return p["Lambda_real"] + 1j * p["Lambda_imag"], B, C


def hippo_normal(P):
    """HiPPO-LegS plus the rank 1 that makes it normal, entry by entry."""
    A = np.zeros((P, P))
    for n in range(P):
        for k in range(P):
            off = np.sqrt((2 * n + 1) * (2 * k + 1))
            A[n, k] = (-off if n > k else -(n + 1) if n == k else 0) + 0.5 * off
    return A


def distance_from_uniform(x):
    """Kolmogorov-Smirnov, on [0, 1]."""
    return np.abs(np.sort(x) - (np.arange(x.size) + 0.5) / x.size).max()


def test_eigenvalues_begin_as_hippos():
    """Blocks of 10: real parts -1/2, and the imaginary parts of HiPPO-N's eigenvalues above the real axis."""
    _, _, p = initial(state_size=40, blocks=4)
    np.testing.assert_allclose(p["Lambda_real"], np.full(20, -0.5), rtol=1e-6)
    imaginary = np.sort(np.linalg.eigvals(hippo_normal(10)).imag)[5:]
    np.testing.assert_allclose(p["Lambda_imag"].reshape(4, 5), np.tile(imaginary, (4, 1)), rtol=1e-5)


def test_initial_steps_inputs_and_outputs():
    _, _, p = initial(width=50, state_size=8000, blocks=800)
    assert distance_from_uniform((p["log_dt"] - np.log(1e-3)) / np.log(100)) < 0.03
    _, B, C = complex_parts(p)
    np.testing.assert_allclose(np.mean(np.abs(B) ** 2), 1 / 50, rtol=0.05)  # V is unitary
    np.testing.assert_allclose(np.mean(np.abs(C) ** 2), 2 / 8000, rtol=0.05)
    _, _, p = initial(width=50, state_size=400, C_init="complex_normal")
    np.testing.assert_allclose(np.mean(np.abs(complex_parts(p)[2]) ** 2), 1, rtol=0.05)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.cases(1)
def test_is_the_dense_real_system(discretisation):
    """In two blocks of 4: h' = A h + B x with HiPPO-N, dense and real, discretised as a matrix, and y = C h, C real."""
    T, D, P, J, dt = 30, 3, 4, 2, 0.1
    mixer, params, p = initial(D, state_size=P * J, blocks=J, discretisation=discretisation, impl="scan")
    rng = np.random.default_rng(0)
    A, C = np.kron(np.eye(J), hippo_normal(P)), rng.standard_normal((D, P * J))
    # B and C are relative to the eigenvectors, which are free up to a phase each.
    Lambda, B, _ = complex_parts(p)
    V = np.kron(np.eye(J), hippo.legs_normal(P).V_NN[:, P // 2 :])
    np.testing.assert_allclose(A @ V, V * Lambda, atol=1e-5)
    b = 2 * (V @ B).real
    np.testing.assert_allclose(V.conj().T @ b, B, atol=1e-6)

    if discretisation == "zoh":
        both = np.zeros((P * J + D, P * J + D))
        both[: P * J] = dt * np.concatenate([A, b], 1)
        both = np.float64(jax.scipy.linalg.expm(both))
        A_bar, B_bar = both[: P * J, : P * J], both[: P * J, P * J :]
    else:
        both = np.linalg.solve(np.eye(P * J) - dt / 2 * A, np.concatenate([np.eye(P * J) + dt / 2 * A, dt * b], 1))
        A_bar, B_bar = both[:, : P * J], both[:, P * J :]
    x, h, dense = rng.standard_normal((T, D)), np.zeros(P * J), np.zeros((T, D))
    for t in range(T):
        h = A_bar @ h + B_bar @ x[t]
        dense[t] = C @ h + p["D"] * x[t]

    C_V = C @ V
    params["params"]["C"] = jnp.asarray(np.concatenate([C_V.real, C_V.imag], 1), jnp.float32)
    params["params"]["log_dt"] = jnp.full(P * J // 2, np.log(dt), jnp.float32)
    y, state = jax.jit(mixer.apply)(params, jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(y[0], dense, atol=2e-5)
    np.testing.assert_allclose(2 * (V @ np.asarray(state.h_BN[0])).real, h, atol=2e-5)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.cases(1)
def test_half_of_the_states_stand_for_all(discretisation):
    """The same with every conjugate kept, in float64, and each state's own dt."""
    T, D, N = 40, 3, 6
    mixer, params, p = initial(D, state_size=2 * N, blocks=3, discretisation=discretisation)
    Lambda, B, C = (np.concatenate([z, z.conj()], axis) for z, axis in zip(complex_parts(p), (0, 0, 1), strict=True))
    z = np.tile(np.exp(p["log_dt"]), 2) * Lambda
    if discretisation == "zoh":
        a, b = np.exp(z), (np.exp(z) - 1) / Lambda
    else:
        a, b = (1 + z / 2) / (1 - z / 2), z / Lambda / (1 - z / 2)
    x, h, y = np.random.default_rng(0).standard_normal((T, D)), np.zeros(2 * N), np.zeros((T, D), complex)
    for t in range(T):
        h = a * h + b * (B @ x[t])
        y[t] = C @ h + p["D"] * x[t]
    np.testing.assert_allclose(y.imag, 0, atol=1e-12)
    np.testing.assert_allclose(jax.jit(mixer.apply)(params, jnp.asarray(x[None], jnp.float32))[0][0], y.real, atol=1e-5)


def test_twice_the_step_is_each_token_twice():
    """The hold is exact: so S5 runs at another sampling rate by its dt alone."""
    mixer, params, _ = initial(state_size=8)
    x = jax.random.normal(jax.random.key(1), (2, 20, 3))
    slow, _ = jax.jit(mixer.apply)(params, jnp.repeat(x, 2, axis=1))
    double = {**params["params"], "log_dt": params["params"]["log_dt"] + np.log(2)}
    fast, _ = jax.jit(mixer.apply)({"params": double}, x)
    np.testing.assert_allclose(slow[:, 1::2], fast, atol=1e-5)


def test_growing_modes_are_held_back():
    mixer, params, _ = initial(state_size=4)
    params["params"]["Lambda_real"] = jnp.ones(2)
    _, state = jax.jit(mixer.apply)(params, jnp.ones((1, 5000, 3)))
    assert jnp.abs(state.h_BN).max() < 1e3


def test_fields_that_do_not_fit_are_refused():
    assert [memzoo.make("s5", width=width).sizes() for width in (256, 12, 5)] == [(128, 8), (6, 2), (3, 1)]
    for fields, message in (
        ({"state_size": 5}, "state_size: expected an even integer"),
        ({"state_size": 12, "blocks": 4}, "state_size / 2: expected a positive multiple of blocks = 4, got 6"),
        ({"discretisation": "zho"}, "discretisation: .*did you mean zoh"),
        ({"C_init": "trunc_normal"}, "C_init: .*did you mean trunc_standard_normal"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"blocks": 0}, "blocks: expected an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            memzoo.make("s5", width=4, **fields)
