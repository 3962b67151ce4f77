"""Facts of the RetNet paper, arXiv:2307.08621."""

import jax
import jax.numpy as jnp
import numpy as np

import memzoo
from memzoo.mixers import retnet
from memzoo.ops import rotary

mixer = memzoo.make("retnet", width=8, heads=2)
apply = jax.jit(mixer.apply)
position, turn = jax.jit(rotary.places, static_argnums=1), jax.jit(retnet.turn)


def test_recurrence_is_the_parallel_form():
    """(Q K' * D) V with complex rotations exp(i n theta) and D_nm = gamma^(n - m), eq. 5, in numpy."""
    T, H, K, V = 70, 3, 4, 5
    gamma = 1 - 2.0 ** (-5 - np.arange(H))
    q, k, v = (jax.random.normal(jax.random.key(i), (1, T, H, size)) for i, size in enumerate((K, K, V)))
    n_BT = position(jnp.array([7]), T, None)
    turned = turn(q, n_BT), turn(k, n_BT), v, jnp.log(jnp.float32(gamma)), jnp.zeros((1, H, K, V)), None
    q, k = (np.float64(x[0, ..., 0::2]) + 1j * np.float64(x[0, ..., 1::2]) for x in (q, k))
    theta = 10000.0 ** -np.linspace(0, 1, K // 2)
    phase = np.exp(1j * np.arange(T)[:, None, None] * theta)
    scores = np.einsum("nhf,mhf->hnm", q * phase, np.conj(k * phase)).real
    distance = np.arange(T)[:, None] - np.arange(T)
    D = np.where(distance >= 0, gamma[:, None, None] ** np.maximum(distance, 0), 0)
    expected = np.einsum("hnm,mhv->nhv", scores * D, np.float64(v[0]))
    for impl in ("scan", "chunk"):
        np.testing.assert_allclose(
            jax.jit(retnet.retention, static_argnums=6)(*turned, impl)[0][0], expected, atol=5e-5
        )


def test_angles_are_exact_far_into_a_stream():
    """q_n . k_m depends on n - m alone, at any n, and across the counter's wrap-around."""
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 64)) for i in range(2))
    at = {}
    for n in (0, 1_000_003, 2**31 - 4):
        n_BT = jnp.array([[n]], jnp.int32)
        at[n] = jnp.sum(turn(q, n_BT + 9) * turn(k, n_BT))
    np.testing.assert_allclose([at[1_000_003], at[2**31 - 4]], at[0], atol=2e-5)


def test_output_does_not_depend_on_where_the_stream_is():
    x_BTD = jax.random.normal(jax.random.key(0), (1, 20, 8))
    params = jax.jit(mixer.init)(jax.random.key(1), x_BTD)
    late = retnet.State(mixer.initial_state(1).S_BHKV, jnp.array([1_000_000], jnp.int32))
    y_BTD, state = apply(params, x_BTD, late)
    np.testing.assert_allclose(y_BTD, apply(params, x_BTD, mixer.initial_state(1))[0], atol=1e-5)
    assert state.n_B == 1_000_020


def test_each_head_forgets_at_its_own_rate():
    """A token of zeros writes nothing: S decays by 1 - 2^-5 in the first head, 1 - 2^-6 in the second."""
    x_BTD = jax.random.normal(jax.random.key(0), (1, 1, 8))
    params = jax.jit(mixer.init)(jax.random.key(1), x_BTD)
    before = apply(params, x_BTD, mixer.initial_state(1))[1]
    after = apply(params, jnp.zeros((1, 1, 8)), before)[1]
    gamma = np.array([31 / 32, 63 / 64])[:, None, None]
    np.testing.assert_allclose(after.S_BHKV[0], gamma * before.S_BHKV[0], rtol=1e-6)


def test_position_restarts_at_a_reset():
    reset_BT = jnp.array([[0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
    assert position(jnp.array([5, 9]), 6, reset_BT).tolist() == [[5, 6, 0, 1, 2, 0], [9, 10, 11, 12, 13, 14]]
