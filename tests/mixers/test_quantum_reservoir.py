"""What is simulated is a quantum channel: states stay states, and the angles set how fast it forgets.

Dims: B batch, T time, D width, M reservoirs, Q qubits, Y = 2^Q, S = Y / 2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import quantum_reservoir

D, S, ANGLES = 2, 4, (0.1, 0.2, 0.4)
M = len(ANGLES)
X, Y, Z = np.array([[0, 1], [1, 0]]), np.array([[0, -1j], [1j, 0]]), np.diag([1, -1])


@pytest.fixture(scope="module")
def initialised():
    mixer = memzoo.make("quantum_reservoir", width=D, angles=ANGLES)
    variables = jax.tree.map(np.array, jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, D))))
    for name in ("J", "h"):  # so that reservoirs differ in their angles alone
        assert not np.allclose(variables["reservoir"][name][0], variables["reservoir"][name][1])
        variables["reservoir"][name][1:] = variables["reservoir"][name][0]
    return mixer, variables


def on(qubit, pauli):
    before, after = np.eye(2**qubit), np.eye(2 ** (2 - qubit))
    return np.kron(np.kron(before, pauli), after)


def exponential(H, angle):
    """exp(-i angle H), from the eigenvectors of H."""
    energy, V = np.linalg.eigh(H)
    return (V * np.exp(-1j * angle * energy)) @ V.conj().T


def evolutions(variables):
    r = jax.tree.map(np.float64, variables["reservoir"])
    for i, angle in enumerate(ANGLES):
        U_YY = np.eye(8)
        for j, k in ((0, 1), (0, 2), (1, 2)):
            U_YY = exponential(r["J"][i, j, k] * (on(j, X) @ on(k, X) + on(j, Y) @ on(k, Y)), angle) @ U_YY
        yield exponential(sum(r["h"][i, j] * on(j, Z) for j in range(3)), angle) @ U_YY


def token(rho_SS, phi, U_YY):
    """(rho, the whole system's density matrix before the trace)."""
    amplitudes = np.array([np.cos(phi / 2 + np.pi / 4), np.sin(phi / 2 + np.pi / 4)])
    whole = U_YY @ np.kron(np.outer(amplitudes, amplitudes), rho_SS) @ U_YY.conj().T
    return whole[:S, :S] + whole[S:, S:], whole


def random_states(rng, B):
    A = rng.standard_normal((B, M, S, S)) + 1j * rng.standard_normal((B, M, S, S))
    rho = A @ A.conj().swapaxes(-1, -2)
    return rho / np.trace(rho, axis1=-2, axis2=-1)[..., None, None]


def state_of(rho_BMSS):
    return quantum_reservoir.State((rho_BMSS - np.eye(S) / S).astype(np.complex64))


def test_is_the_channel_and_what_is_measured_of_it(initialised):
    """Against matrices in NumPy: products of Kronecker products, and observables one by one."""
    mixer, variables = initialised
    rng = np.random.default_rng(0)
    x_TD, rho_MSS = rng.standard_normal((7, D)), random_states(rng, 1)[0]
    (_, last), seen = jax.jit(lambda *a: mixer.apply(*a, mutable=["intermediates"]))(
        variables, np.float32(x_TD[None]), state_of(rho_MSS[None])
    )
    features_TMF = np.asarray(seen["intermediates"]["features"][0]).reshape(7, M, 7)
    sets = [[q for q in range(3) if n >> (2 - q) & 1] for n in range(1, 8)]
    for i, U_YY in enumerate(evolutions(variables)):
        np.testing.assert_allclose(U_YY @ U_YY.conj().T, np.eye(8), atol=1e-12)
        rho = rho_MSS[i]
        for t in range(7):
            rho, whole = token(rho, x_TD[t] @ variables["reservoir"]["w"][:, i], U_YY)
            want = [np.trace(whole @ np.linalg.multi_dot([np.eye(8), *(on(q, Z) for q in s), np.eye(8)])) for s in sets]
            np.testing.assert_allclose(features_TMF[t, i], want, atol=1e-5)
        np.testing.assert_allclose(last.delta_BMSS[0, i] + np.eye(S) / S, rho, atol=1e-5)


def test_states_stay_states(initialised):
    """Of trace 1, Hermitian and positive, after a thousand tokens; expectations within +-1."""
    mixer, variables = initialised
    x_BTD = 3 * np.random.default_rng(1).standard_normal((3, 1000, D)).astype(np.float32)
    (_, last), seen = jax.jit(lambda *a: mixer.apply(*a, mutable=["intermediates"]))(variables, x_BTD)
    rho = np.asarray(last.delta_BMSS) + np.eye(S) / S
    np.testing.assert_allclose(np.trace(rho, axis1=-2, axis2=-1), 1, atol=1e-5)
    np.testing.assert_allclose(rho, rho.conj().swapaxes(-1, -2), atol=1e-5)
    assert np.linalg.eigvalsh(rho).min() > -1e-5
    assert np.abs(seen["intermediates"]["features"][0]).max() < 1 + 1e-5


def test_the_eigenvalues_of_the_channel_are_at_most_one_and_move_with_the_angle(initialised):
    """The largest is 1, of the state that stays; the next is `radius`, nearer to 1 the smaller the angle."""
    mixer, variables = initialised
    radius = []
    for U_YY in evolutions(variables):
        columns = [token(unit.reshape(S, S), 0.0, U_YY)[0].reshape(-1) for unit in np.eye(S * S)]
        modulus = np.sort(np.abs(np.linalg.eigvals(np.stack(columns, axis=1))))[::-1]
        np.testing.assert_allclose(modulus[0], 1, atol=1e-6)
        radius.append(modulus[1])
    np.testing.assert_allclose(jax.jit(mixer.radius)(variables), radius, rtol=1e-3)
    assert 1 > radius[0] > radius[1] > radius[2]


def test_two_starts_meet_and_never_part(initialised):
    """Their trace distance, under any input; the longest memory is that of the smallest angle."""
    mixer, variables = initialised
    rng = np.random.default_rng(2)
    states = [state_of(random_states(rng, 2))]
    x_BTD = rng.standard_normal((1, 30, D)).repeat(2, 0).astype(np.float32)
    apply = jax.jit(mixer.apply)
    for t in range(30):
        states.append(apply(variables, x_BTD[:, t : t + 1], states[-1])[1])
    deltas = np.stack([state.delta_BMSS for state in states])
    apart_TM = np.abs(np.linalg.eigvalsh(deltas[:, 0] - deltas[:, 1])).sum(-1) / 2
    assert (apart_TM[1:] <= apart_TM[:-1] + 1e-5).all()
    kept = apart_TM[-1] / apart_TM[0]
    assert kept[0] > kept[1] > kept[2]


def test_the_memory_learns_of_the_input(initialised):
    """Ten tokens of one sign or of the other leave it in states that can be told apart."""
    mixer, variables = initialised
    x_BTD = np.ones((2, 10, D), np.float32)
    x_BTD[1] = -1
    _, last = jax.jit(mixer.apply)(variables, x_BTD)
    delta_BMSS = np.asarray(last.delta_BMSS)
    apart_M = np.abs(np.linalg.eigvalsh(delta_BMSS[0] - delta_BMSS[1])).sum(-1) / 2
    assert (apart_M > 0.02).all()


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("qubits: expected an integer >= 2, got 1", {"qubits": 1}),
        (r"angles: expected numbers > 0, got \(\)", {"angles": ()}),
        (r"angles: expected numbers > 0, got \(0.5, 0.0\)", {"angles": (0.5, 0.0)}),
        (r"angles: .* got \(nan,\)", {"angles": (float("nan"),)}),
        ("input_scale: expected a number >= 0, got -1", {"input_scale": -1.0}),
    ],
)
def test_bad_fields_are_named(match, fields):
    with pytest.raises(ValueError, match=match):
        memzoo.make("quantum_reservoir", width=D, **fields).initial_state(1)
