"""What an update does, against numbers worked out by hand, and what it does when a number is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memzoo import parallel, train
from memzoo.models.backbone import LanguageModel


def compiled(loss, optimizer):
    return parallel.make("jit", 1, jax.devices()[:1]).compile_step(train.make_step(loss, optimizer))


def slope(params, batch, key):
    """Its gradient is the batch, whatever the parameters."""
    return jnp.mean(batch @ params["a"])


def test_a_negative_warmup_is_refused():
    with pytest.raises(ValueError, match="warmup: expected an integer >= 0, got -1"):
        train.adamw(0.5, steps=100, warmup=-1)


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    # Under a constant gradient Adam moves by the learning rate itself.
    optimizer = train.adamw(0.5, steps=100, warmup=10, weight_decay=0.0, end=0.1)
    step = compiled(slope, optimizer)
    state = train.create({"a": jnp.zeros(1)}, optimizer, jax.random.key(0))
    seen = [0.0]
    for _ in range(100):
        state, _ = step(state, jnp.full((1, 1), 1e-3))
        seen.append(float(state.params["a"][0]))
    rate = -np.diff(seen)
    t = np.arange(1, 101)
    falling = 0.05 + 0.45 * (1 + np.cos(np.pi * (t - 10) / 90)) / 2
    np.testing.assert_allclose(rate, np.where(t <= 10, 0.05 * t, falling), rtol=2e-3)
    assert int(state.step) == 100


def test_the_gradient_is_clipped_to_its_norm():
    optimizer = train.adamw(0.1, steps=10, clip=2.0)
    state = train.create({"a": jnp.zeros(2)}, optimizer, jax.random.key(0))
    state, metrics = compiled(slope, optimizer)(state, jnp.array([[30.0, 40.0]]))
    assert float(metrics["grad_norm"]) == pytest.approx(50)
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    np.testing.assert_allclose(adam.mu["a"], [0.1 * 2 * 0.6, 0.1 * 2 * 0.8], rtol=1e-5)


def test_only_matrices_decay():
    params = {
        "layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "embedding_ZD": jnp.ones(2),
        "scale": jnp.ones(2),
    }
    optimizer = train.adamw(0.1, steps=1, weight_decay=0.5, end=1.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    after = jax.tree.map(lambda x: float(x.min()), optax.apply_updates(params, updates))
    assert after == {
        "layer": {"kernel": pytest.approx(0.95), "bias": 1},
        "embedding_ZD": pytest.approx(0.95),
        "scale": 1,
    }


def root(params, batch, key):
    return jnp.sum(jnp.sqrt(params["a"])) + jnp.mean(batch)


@pytest.mark.parametrize(("start", "fault", "named"), [(4.0, np.nan, "loss is nan"), (0.0, 0.0, "grad_norm is inf")])
def test_an_update_that_is_not_finite_is_skipped_and_stops(start, fault, named):
    optimizer = train.adamw(0.1, steps=10)
    state = train.create({"a": jnp.full(1, start)}, optimizer, jax.random.key(0))
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    state, metrics = compiled(root, optimizer)(state, jnp.full((1, 1), fault))
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
    with pytest.raises(train.NonFiniteError, match=f"step 7: .*{named}.* last good checkpoint is runs/a/checkpoints/5"):
        train.guard(7, metrics, lambda: "runs/a/checkpoints/5")


def test_the_guard_returns_what_is_finite():
    assert train.guard(1, {"loss": jnp.float32(2.5)}, pytest.fail) == {"loss": 2.5}


def test_the_state_is_donated_and_the_key_used_once():
    def noise(params, batch, key):
        return jax.random.normal(key) + 0 * jnp.sum(params["a"])

    optimizer = train.adamw(0.1, steps=10)
    step = compiled(noise, optimizer)
    first = train.create({"a": jnp.ones(3)}, optimizer, jax.random.key(0))
    copy = jax.tree.map(jnp.copy, first)
    second, drawn = step(first, jnp.zeros((1, 1)))
    assert first.params["a"].is_deleted()
    _, again = step(copy, jnp.zeros((1, 1)))
    _, other = step(second, jnp.zeros((1, 1)))
    assert drawn["loss"] == again["loss"] != other["loss"]


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    logits_BTZ = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets_BT = np.array([[0, 4, 2], [1, 1, 3]], np.uint8)
    p_BTZ = np.exp(logits_BTZ.astype(np.float64))
    p_BTZ /= p_BTZ.sum(-1, keepdims=True)
    expected_BT = [[-np.log(p_BTZ[b, t, targets_BT[b, t]]) for t in range(3)] for b in range(2)]
    np.testing.assert_allclose(
        train.cross_entropy(jnp.array(logits_BTZ), jnp.array(targets_BT)), expected_BT, rtol=1e-5
    )


def test_bfloat16_compute_keeps_the_state_in_float32():
    model = LanguageModel(32, 16, 1, dtype=jnp.bfloat16)
    optimizer = train.adamw(0.1, steps=10)

    def loss(params, batch_BU, key):
        logits_BTZ, _ = model.apply(params, batch_BU[:, :-1])
        assert logits_BTZ.dtype == jnp.float32
        return jnp.mean(train.cross_entropy(logits_BTZ, batch_BU[:, 1:]))

    def run(key, batch_BU):
        state = train.create(model.init(key, batch_BU[:, 1:]), optimizer, key)
        return state, *train.make_step(loss, optimizer)(state, batch_BU)

    before, after, metrics = jax.eval_shape(run, jax.random.key(0), jax.ShapeDtypeStruct((2, 9), jnp.uint8))
    assert before == after
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.float32)}
    assert metrics["loss"].dtype == jnp.float32


def test_bad_settings_are_named():
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"learning_rate: .*got {rate}"):
            train.adamw(rate, steps=1)
    with pytest.raises(ValueError, match=r"steps: .*got 0"):
        train.adamw(0.1, steps=0)
