"""Facts of the LongMamba paper, arXiv:2504.16053."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.mixers import long_mamba
from memzoo.models.backbone import LanguageModel
from tests.initial import begins_as_in_torch

IMPLS = ("scan", "associative", "chunk")
FIELDS = {"width": 6, "state_size": 3, "dt_rank": 2}
skipping_s6 = jax.jit(long_mamba.skipping_s6, static_argnums=9)


def trained(T, batch=2):
    """Parameters of a Mamba, with steps that depend on the token, and sequences of T tokens."""
    x_BTD = jax.random.normal(jax.random.key(1), (batch, T, 6))
    params = jax.jit(memzoo.make("mamba", **FIELDS).init)(jax.random.key(0), x_BTD[:, :1])["params"]
    params["dt"]["kernel"] = 3 * jax.random.normal(jax.random.key(2), params["dt"]["kernel"].shape)
    return params, x_BTD


@pytest.mark.long
@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_context_it_is_mamba(impl):
    params, x_BTD = trained(70)
    reset_BT = jnp.arange(70)[None].repeat(2, 0) == 33
    mamba, long = (memzoo.make(name, impl=impl, **FIELDS) for name in ("mamba", "long_mamba"))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, long.init(jax.random.key(0), x_BTD)["params"])
    want, state = jax.jit(mamba.apply)({"params": params}, x_BTD, None, reset_BT)
    got, same = jax.jit(long.apply)({"params": params}, x_BTD, None, reset_BT)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(same.h_BNE, state.h_BNE)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_skipped_token_leaves_the_state_bit_for_bit(impl):
    """In its channels, and no others; dt at the threshold is skipped, too."""
    rng = np.random.default_rng(0)
    n = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    N, E = 3, 4
    dt, threshold = jnp.full((1, 1, E), 0.5), jnp.asarray([0.0, 0.4, 0.5, 0.6])
    h = n(1, N, E)
    y, after = skipping_s6(n(1, 1, E), dt, -jnp.exp(n(N, E)), n(1, 1, N), n(1, 1, N), n(E), threshold, h, None, impl)
    np.testing.assert_array_equal(after[..., 2:], h[..., 2:])
    assert (after[..., :2] != h[..., :2]).all() and np.isfinite(y).all()


def test_calibration_has_a_closed_form_for_uniform_steps():
    """Of steps uniform on [0, 1], those above s = sqrt(1 - T / L) add up over L to what all do over T."""
    T = 2000
    dt_BTE = jax.random.uniform(jax.random.key(0), (4, T, 3))
    slow = jnp.full((2, 3), -1e-5)
    for L in (2 * T, 8 * T, 100 * T):
        got = long_mamba.calibrate(dt_BTE, slow, L)
        np.testing.assert_allclose(got, np.sqrt(1 - T / L), atol=0.02)
    for L in (1, T // 2, T):
        np.testing.assert_array_equal(long_mamba.calibrate(dt_BTE, slow, L), 0)


def test_a_channel_is_global_if_its_slowest_state_lasts_the_training_length():
    """exp(-0.1 * 20) = 0.135 and exp(-0.2 * 20) = 0.018, over 20 tokens of dt = 1, more or less."""
    dt_BTE = 1 + 0.01 * jax.random.uniform(jax.random.key(0), (1, 20, 3), minval=-1)
    A_NE = -jnp.asarray([[0.1, 0.2, 9.0], [9.0, 9.0, 0.1]])
    np.testing.assert_array_equal(long_mamba.calibrate(dt_BTE, A_NE, 40) > 0, [True, False, True])
    np.testing.assert_array_equal(long_mamba.calibrate(dt_BTE, A_NE, 40, min_decay=0.01) > 0, True)


def test_decay_over_eight_times_the_training_length_is_restored():
    """What is left of a state of ones, after steps that are log-normal."""
    T, rows = 400, 64
    dt = lambda seed, T: jnp.exp(jax.random.normal(jax.random.key(seed), (rows, T, 3)) - 5)
    A_NE = -jnp.asarray([[0.1, 0.2, 0.3]])
    threshold_E = long_mamba.calibrate(dt(0, T), A_NE, 8 * T)
    assert (threshold_E > 0).all()

    def log_decay(dt_BTE, threshold_E):
        zeros, ones = jnp.zeros_like(dt_BTE), jnp.ones((*dt_BTE.shape[:2], 1))
        start = jnp.zeros(3), threshold_E, jnp.ones((rows, 1, 3)), None
        return np.log(skipping_s6(zeros, dt_BTE, A_NE, ones, ones, *start)[1]).mean(0)[0]

    at_training = log_decay(dt(1, T), jnp.zeros(3))
    np.testing.assert_allclose(log_decay(dt(2, 8 * T), threshold_E), at_training, rtol=0.1)
    np.testing.assert_allclose(log_decay(dt(2, 8 * T), jnp.zeros(3)), 8 * at_training, rtol=0.1)


@pytest.mark.parametrize("scan_layers", (False, True))
@pytest.mark.cases(1)
def test_one_call_calibrates_a_model(scan_layers):
    """A model trained with Mamba lasts eight times longer: same parameters, thresholds beside them."""
    T, kinds = 32, {"vocab": 11, "width": 6, "layers": 2, "scan_layers": scan_layers}
    tokens = jax.random.randint(jax.random.key(0), (2, T), 0, 11)
    fields = {"state_size": 3, "dt_rank": 2}
    mamba = LanguageModel(mixers="mamba", fields={"mamba": fields}, **kinds)
    long = LanguageModel(mixers="long_mamba", fields={"long_mamba": fields | {"context": 8 * T}}, **kinds)
    variables = jax.jit(mamba.init)(jax.random.key(0), tokens)
    (logits, _), calibration = jax.jit(lambda v: long.apply(v, tokens, mutable=["calibration"]))(variables)
    np.testing.assert_array_equal(logits, jax.jit(mamba.apply)(variables, tokens)[0])
    leaves = jax.tree.leaves(calibration)
    assert sum(leaf.size for leaf in leaves) == 2 * 12 and all((leaf > 0).any() for leaf in leaves)
    more = jax.random.randint(jax.random.key(1), (2, 70), 0, 11)
    got = jax.jit(long.apply)(variables | calibration, more)[0]
    assert np.abs(got - jax.jit(mamba.apply)(variables, more)[0]).max() > 1e-5
    with pytest.raises(ValueError, match="calibration: expected 'threshold_256', as context = 256"):
        long.apply(variables, more)


@pytest.mark.long
def test_skipping_streams_and_resets_in_every_form():
    params, x_BTD = trained(70)
    reset_BT = jnp.zeros((2, 70), bool).at[0, [20, 21]].set(True)
    outputs = {}
    for impl in IMPLS:
        mixer = memzoo.make("long_mamba", context=500, impl=impl, **FIELDS)
        _, calibration = mixer.apply({"params": params}, x_BTD, mutable=["calibration"])
        variables = {"params": params} | calibration
        y_BTD, last = jax.jit(mixer.apply)(variables, x_BTD, None, reset_BT)
        one, state = jax.jit(mixer.apply)(variables, x_BTD[:, :37], None, reset_BT[:, :37])
        two, state = jax.jit(mixer.apply)(variables, x_BTD[:, 37:], state, reset_BT[:, 37:])
        alone, _ = jax.jit(mixer.apply)(variables, x_BTD[:1, 21:])
        np.testing.assert_allclose(jnp.concatenate([one, two], 1), y_BTD, atol=1e-5)
        np.testing.assert_allclose(alone[0], y_BTD[0, 21:], atol=1e-5)
        np.testing.assert_allclose(state.h_BNE, last.h_BNE, atol=1e-5)
        outputs[impl] = y_BTD
    plain, _ = memzoo.make("mamba", **FIELDS).apply({"params": params}, x_BTD, None, reset_BT)
    assert np.abs(plain - outputs["scan"]).max() > 1e-3, "some tokens were skipped"
    for impl in IMPLS:
        np.testing.assert_allclose(outputs[impl], outputs["scan"], atol=1e-5)


def test_initial_weights_are_those_of_the_released_code():
    """The defaults of torch's Linear and Conv1d, and dt's own, of the standard deviation (3 fan_in)^-1/2."""
    mixer = memzoo.make("long_mamba", width=48)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 48)))["params"]
    W, R = len(p["conv"]), p["dt"]["kernel"].shape[0]
    assert begins_as_in_torch(p["in"]["kernel"], 48) and begins_as_in_torch(p["out"]["kernel"], 96)
    assert all(begins_as_in_torch(weight, 96) for weight in (p["dt_low"]["kernel"], p["B"], p["C"]))
    assert begins_as_in_torch(p["conv"], W) and begins_as_in_torch(p["conv_bias"], W)
    assert (W, R) == (4, 3) and begins_as_in_torch(p["dt"]["kernel"], R)
    np.testing.assert_allclose(np.std(p["in"]["kernel"]), (3 * 48) ** -0.5, rtol=0.03)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="context: expected an integer >= 1, got 0"):
        memzoo.make("long_mamba", width=4, context=0)
    with pytest.raises(ValueError, match=r"min_decay: expected a number in \[0, 1\], got 2"):
        memzoo.make("long_mamba", width=4, min_decay=2)
    with pytest.raises(ValueError, match="conv_width: expected an integer >= 1, got 0"):
        memzoo.make("long_mamba", width=4, conv_width=0)
