"""Lattice: its update is orthogonal to every slot and the gradient of its loss, its recurrence, and how it begins.

Dims: T time, D width, H heads, M slots, V value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import lattice
from tests.miras import sigmoid, silu, unit

T, D, H, M, V = 7, 6, 3, 4, 5


def sphere(S_VM):
    return S_VM / np.linalg.norm(S_VM, axis=0)


def problem():
    rng = np.random.default_rng(0)
    return sphere(rng.normal(size=(V, M))), rng.normal(size=M), rng.normal(size=V)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_the_change_is_the_gradient_of_its_loss_and_orthogonal_to_every_slot(dtype, tolerance):
    S_VM, k_M, v_V = (x.astype(dtype) for x in problem())

    def loss(S_VM):
        return jnp.sum((S_VM / jnp.sqrt(jnp.sum(S_VM**2, axis=0)) @ k_M - v_V) ** 2) / 2

    with jax.enable_x64(dtype == np.float64):
        both = jax.jit(lambda S_VM: (lattice.change(S_VM, k_M, v_V), jax.grad(loss)(S_VM)))
        change_VM, gradient_VM = map(np.asarray, both(S_VM))
    assert change_VM.dtype == dtype
    np.testing.assert_allclose(change_VM, -gradient_VM, atol=tolerance)
    np.testing.assert_allclose(np.sum(S_VM * change_VM, axis=0), 0, atol=tolerance)


def test_what_is_known_changes_nothing():
    S_VM, k_M, _ = problem()
    np.testing.assert_allclose(lattice.change(S_VM, k_M, S_VM @ k_M), 0, atol=1e-6)


def test_slots_with_keys_of_their_own_come_to_hold_the_values():
    """Of length 1, in steps of 1/2: the angle to the value falls with each, and what one learns another keeps."""
    S_VM, _, _ = problem()
    values_VM = sphere(np.random.default_rng(1).normal(size=(V, M)))
    nothing = np.zeros((V, M))
    one = jax.jit(lambda S_VM, k_M, v_V: lattice.step(nothing, S_VM, nothing, True, k_M, k_M, v_V, 0.5)[0][0])
    for _ in range(20):
        for m in range(M):
            S_VM = np.asarray(one(S_VM, np.eye(M)[m], values_VM[:, m]))
    np.testing.assert_allclose(S_VM, values_VM, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.cases(1)
def test_is_its_recurrence_written_out(chunk):
    """What is read, and the slots: as the chunk began, and what it has added since."""
    mixer = memzoo.make("lattice", width=D, heads=H, slots=M, value_dim=V, conv_width=1, chunk=chunk)
    rng = np.random.default_rng(2)
    x_1TD = rng.normal(size=(1, T, D)).astype("float32")
    p = jax.jit(mixer.init)(jax.random.key(0), x_1TD[:, :1])
    p = jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), p)
    y_1TD, state = jax.jit(mixer.apply)(p, x_1TD)
    p, x_TD = jax.tree.map(np.float64, p["params"]), np.float64(x_1TD[0])
    qkv_THE = silu(x_TD @ p["qkv"]["kernel"] * p["conv"][0]).reshape(T, H, 2 * M + V)
    q_THM, k_THM, v_THV = np.split(qkv_THE, [M, 2 * M], axis=-1)
    beta_TH = sigmoid(x_TD @ p["beta"]["kernel"] + p["beta"]["bias"])
    y_THV = np.zeros((T, H, V))
    for h in range(H):
        slots = began = list(sphere(p["slots"][h]).T)
        for t in range(T):
            if t % chunk == 0:
                slots = began = [s / np.linalg.norm(s) for s in slots]
            k_M = unit(k_THM[t, h])
            e_V = v_THV[t, h] - sum(k_M[m] * began[m] for m in range(M))
            new = [e_V - s * (s @ e_V) for s in began]
            slots = [s + beta_TH[t, h] * k_M[m] * new[m] for m, s in enumerate(slots)]
            y_THV[t, h] = sum(unit(q_THM[t, h])[m] * s / np.linalg.norm(s) for m, s in enumerate(slots))
        if T % chunk == 0:
            slots = began = [s / np.linalg.norm(s) for s in slots]
        now_VM = sphere(p["slots"][h]) + state.memory.S_BHVM[0, h] + state.memory.U_BHVM[0, h]
        np.testing.assert_allclose(now_VM, np.stack(slots, 1), atol=1e-5)
        np.testing.assert_allclose(state.memory.U_BHVM[0, h], np.stack(slots, 1) - np.stack(began, 1), atol=1e-5)
    assert state.memory.place_B == T % chunk
    y_THV = y_THV / np.sqrt(np.mean(y_THV**2, -1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    y_THV = y_THV * silu(np.einsum("td,dhv->thv", x_TD, p["gate"]["kernel"]))
    np.testing.assert_allclose(y_1TD[0], np.einsum("thv,hvd->td", y_THV, p["out"]["kernel"]), atol=1e-5)


@pytest.mark.long
def test_slots_of_a_chunk_have_length_1_and_what_it_adds_is_orthogonal_to_them():
    mixer = memzoo.make("lattice", width=D, heads=H, slots=M, value_dim=V, chunk=16)
    x_1TD = np.random.default_rng(3).normal(size=(1, 43, D)).astype("float32")
    p = jax.jit(mixer.init)(jax.random.key(0), x_1TD)
    _, state = jax.jit(mixer.apply)(p, x_1TD)
    S_HVM, U_HVM = np.asarray(p["params"]["slots"] + state.memory.S_BHVM[0]), np.asarray(state.memory.U_BHVM[0])
    np.testing.assert_allclose(np.linalg.norm(S_HVM, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.sum(S_HVM * U_HVM, axis=1), 0, atol=1e-6)
    assert state.memory.place_B == 11 and np.abs(U_HVM).max() > 0.1


def test_by_chunks_what_is_added_and_taken_back_leaves_slots_of_length_1():
    """Lengths are then differences of large numbers, in which rounding must not be read as a length of 0 or less."""
    C, rng = 16, np.random.default_rng(4)
    S_VM, q_CM, k_CM, v_CV = sphere(rng.normal(size=(V, M))), *(rng.normal(size=(C, n)) for n in (M, M, V))
    k_CM[1::2], v_CV = -k_CM[::2], 1e4 * np.repeat(v_CV[::2], 2, axis=0)
    every, no = np.ones(C, bool), np.zeros(C, int)
    told = (np.float32(x) for x in (q_CM, k_CM, v_CV, np.full(C, 0.5)))
    U_VM, y_CV = jax.jit(lattice.tell)(np.float32(S_VM), np.zeros((V, M), "float32"), every, no, *told)
    assert np.isfinite(U_VM).all() and np.isfinite(y_CV).all()


def test_begins_with_slots_uniform_on_the_sphere():
    S_HVM = np.asarray(lattice.on_spheres(jax.random.key(0), (4, 16, 64)))
    np.testing.assert_allclose(np.linalg.norm(S_HVM, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.mean(S_HVM**2, axis=(0, 2)), 1 / 16, rtol=0.35)  # 256 columns
    assert np.abs(S_HVM.mean(axis=(0, 2))).max() < 0.06


def test_bad_fields_are_named():
    for match, fields in {
        "width: expected a positive multiple of heads = 4": {"width": 6},
        "slots: expected an integer >= 1, got 0": {"width": 8, "slots": 0},
        "value_dim: expected an integer >= 2": {"width": 8, "value_dim": 1},
        "chunk: expected an integer >= 1, got 0": {"width": 8, "chunk": 0},
        "conv_width: expected an integer >= 1, got 0": {"width": 8, "conv_width": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            memzoo.make("lattice", **fields).initial_state(1)
