"""Facts of the MemMamba paper, arXiv:2510.03279."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import mem_mamba
from tests.initial import begins_as_in_torch

IMPLS = ("scan", "chunk")
M, K = 5, 3
FIELDS = {"width": 6, "state_size": 3, "dt_rank": 2}


@jax.jit
def random(key):
    return jax.random.normal(jax.random.key(key), (2, 150, 6))


def run_notes(impl, *args, tau2=0.1):
    return jax.jit(lambda *a: mem_mamba.notes(*a, tau2, impl, chunk=16))(*args)


def pool_inputs(T=150):
    rng = np.random.default_rng(0)
    q, note = rng.standard_normal((2, 2, T, K))
    excess = (rng.uniform(size=(2, T)) - 0.6).clip(0)  # two in five are noted
    excess[0, 40:80] = 0  # more than a chunk without any
    excess[1, 90:110] = 0.3  # more than M in one chunk
    log_decay = -np.exp(rng.uniform(np.log(1e-3), np.log(5), (2, T)))
    reset = np.zeros((2, T), bool)
    reset[0, [0, 33, 34]] = reset[1, [50, T - 1]] = True
    return q, note, excess, log_decay, reset


def in_python(q, note, excess, log_decay, reset, tau2):
    """One row: a deque of notes, each with what the SSM still holds of it, as the token before left it."""
    pool, out = collections.deque(maxlen=M), []
    for t in range(len(q)):
        if reset[t]:
            pool.clear()
        c = np.zeros(K)
        if pool:
            S = np.array([s for s, _ in pool])
            forgotten = 1 - np.mean([held for _, held in pool])
            if forgotten > tau2:
                weight = np.exp(S @ q[t] / np.sqrt(K))
                c = (forgotten - tau2) * weight @ S / weight.sum()
        out.append(c)
        pool = collections.deque([(s, held * np.exp(log_decay[t])) for s, held in pool], maxlen=M)
        if excess[t] > 0:
            pool.append((excess[t] * note[t], 1.0))
    return np.array(out), pool


@pytest.mark.parametrize("impl", IMPLS)
def test_the_pool_is_first_in_first_out_and_read_when_forgotten(impl):
    *xs, reset = pool_inputs()
    empty = mem_mamba.Pool(jnp.zeros((2, M, K)), jnp.zeros((2, M)), jnp.zeros(2, jnp.int32))
    c_BTK, pool = run_notes(impl, *map(jnp.float32, xs), empty, jnp.asarray(reset))
    for b in range(2):
        want, notes = in_python(*(x[b] for x in xs), reset[b], 0.1)
        np.testing.assert_allclose(c_BTK[b], want, atol=1e-5)
        n = len(notes)
        assert pool.count_B[b] == n
        if n:
            np.testing.assert_allclose(pool.note_BMK[b, M - n :], [s for s, _ in notes], rtol=1e-5)
            np.testing.assert_allclose(np.exp(pool.log_kept_BM[b, M - n :]), [h for _, h in notes], atol=1e-5)
        assert not pool.note_BMK[b, : M - n].any()
    assert (np.abs(c_BTK).max(-1) > 0).mean() > 0.5, "the test itself"


@pytest.mark.long
@pytest.mark.parametrize("taus", [{"tau1": 1.0}, {"tau2": 1.0}, {"tau1": 1.0, "tau2": 1.0}])
@pytest.mark.parametrize("impl", IMPLS)
def test_with_thresholds_of_1_it_is_mamba(impl, taus):
    x_BTD = random(0)
    mixer = memzoo.make("mem_mamba", impl=impl, **FIELDS, **taus)
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)["params"]
    mamba = memzoo.make("mamba", impl=impl, **FIELDS)
    shared = {k: v for k, v in params.items() if k not in ("query", "note", "importance", "fuse")}
    assert jax.tree.map(jnp.shape, shared) == jax.tree.map(jnp.shape, mamba.init(jax.random.key(0), x_BTD)["params"])
    want, state = mamba.apply({"params": shared}, x_BTD)  # not under jit, which would fuse the two in different ways
    got, same = mixer.apply({"params": params}, x_BTD)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(same.h_BNE, state.h_BNE)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(mixer.apply({"params": p}, x_BTD)[0] ** 2)))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def first_token_counts(name, T, **fields):
    """How much of the first token, an important one among others that are not, reaches the last output."""
    mixer = memzoo.make(name, **FIELDS, **fields)
    x_BTD = 0.3 * random(1)[:1, :1].repeat(T, 1) * jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, T, 6)))
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD[:, :1])["params"]
    params["dt"]["bias"] = jnp.zeros_like(params["dt"]["bias"])  # forgets within some tokens
    x_BTD = x_BTD.at[:, :, 0].set(-5).at[:, 0, 0].set(5)
    if name == "mem_mamba":
        params["importance"] = {"kernel": jnp.zeros((6, 1)).at[0].set(1), "bias": jnp.zeros(1)}
    gradient = jax.grad(lambda x: jnp.sum(mixer.apply({"params": params}, x)[0][:, -1] ** 2))
    return np.abs(jax.jit(gradient)(x_BTD)[0, 0]).max()


@pytest.mark.long
def test_a_note_lasts_where_the_state_forgets():
    near, far = (first_token_counts("mem_mamba", T, pool_size=2) for T in (100, 1000))
    assert near > 1e-6 and far > 0.1 * near
    assert first_token_counts("mamba", 100) < 1e-12


@pytest.mark.long
def test_initial_steps_decays_and_importance():
    """Mamba's own; and of noise about a half is noted."""
    mixer = memzoo.make("mem_mamba", width=500, state_size=3, dt_rank=1, pool_size=1000, note_dim=2)
    x_BTD = jax.random.normal(jax.random.key(1), (1, 300, 500))
    params = jax.jit(mixer.init)(jax.random.key(0), x_BTD)
    p = params["params"]
    np.testing.assert_allclose(np.exp(p["A_log"]), np.arange(1, 4)[:, None] * np.ones(1000), rtol=1e-5)
    log_dt = np.sort(np.log(np.log1p(np.exp(np.float64(p["dt"]["bias"])))))
    uniform = (log_dt - np.log(1e-3)) / np.log(100)
    assert np.abs(uniform - (np.arange(1000) + 0.5) / 1000).max() < 0.05
    _, state = jax.jit(mixer.apply)(params, x_BTD)
    assert 100 < state.pool.count_B[0] < 200


def test_initial_weights_are_those_of_the_released_code():
    """The defaults of torch's Linear and Conv1d, and dt's own, of the standard deviation (3 fan_in)^-1/2."""
    mixer = memzoo.make("mem_mamba", width=48)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 48)))["params"]
    W, R = len(p["conv"]), p["dt"]["kernel"].shape[0]
    assert begins_as_in_torch(p["in"]["kernel"], 48) and begins_as_in_torch(p["out"]["kernel"], 96)
    assert all(begins_as_in_torch(weight, 96) for weight in (p["dt_low"]["kernel"], p["B"], p["C"]))
    assert begins_as_in_torch(p["conv"], W) and begins_as_in_torch(p["conv_bias"], W)
    assert (W, R) == (4, 3) and begins_as_in_torch(p["dt"]["kernel"], R)
    np.testing.assert_allclose(np.std(p["in"]["kernel"]), (3 * 48) ** -0.5, rtol=0.03)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match=r"tau1: expected a number >= 0, got -0.1"):
        memzoo.make("mem_mamba", width=4, tau1=-0.1)
    with pytest.raises(ValueError, match="pool_size: expected an integer >= 1, got 0"):
        memzoo.make("mem_mamba", width=4, pool_size=0)
    with pytest.raises(NotImplementedError, match="mem_mamba has no form 'associative'"):
        memzoo.make("mem_mamba", width=4, impl="associative")
    with pytest.raises(ValueError, match="conv_width: expected an integer >= 1, got 0"):
        memzoo.make("mem_mamba", width=4, conv_width=0)
