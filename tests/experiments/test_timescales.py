"""The three questions run end to end at a small size, and their data is what they say."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import timescales
from experiments.timescales import Config

TINY = Config(
    width=8, batch=4, length=8, string=5, curves=3, symbols=4, eval_rows=8,
    sampling_steps=3, recall_steps=3, copying_steps=4,
)  # fmt: skip


@pytest.mark.long
def test_a_run_leaves_what_it_says(tmp_path, monkeypatch):
    few = {
        "sampling": ("s4", "gru"),
        "recall": ("stable_ssm, direct", "polarized_mamba"),
        "copying": ("mamba, default", "mamba, mimetic"),
    }
    for part, kinds in few.items():
        run, known, label = timescales.PARTS[part]
        assert set(kinds) <= set(known)
        monkeypatch.setitem(timescales.PARTS, part, (run, kinds, label))
    config = replace(TINY, out=tmp_path / "run")
    rows = timescales.main(config)
    assert rows == [json.loads(line) for line in (config.out / "timescales.jsonl").read_text().splitlines()]
    models = [(row["part"], row["model"]) for row in rows]
    kinds = {"sampling": ("s4", "s4, dt rescaled", "gru"), "recall": few["recall"], "copying": few["copying"]}
    assert models == [(part, kind) for part in kinds for kind in kinds[part]]
    places = {"sampling": [2, 4, 8, 16, 32], "recall": [1, 2, 4, 8, 16, 32, 64], "copying": [1, 2, 3, 4]}
    for row in rows:
        assert [int(at) for at in row["accuracy"]] == places[row["part"]]
        assert all(0 <= value <= 1 for value in row["accuracy"].values()) and np.isfinite(row["train_loss"])
        assert ("slowest" in row) == row["model"].startswith("stable_ssm")
    slowest = [row["slowest"] for row in rows if "slowest" in row]
    np.testing.assert_allclose(slowest, np.exp(-0.5 * 0.1), atol=0.01)  # it has hardly moved in three steps

    text = (config.out / "table.md").read_text()
    for part, names in kinds.items():
        assert timescales.CLAIMS[part] in text and all(f"\n| {name} | " in text for name in names)
        assert (config.out / f"{part}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):
        timescales.main(config)


def test_the_table_has_means_over_seeds():
    found = (0.5, "gru", 0), (1.0, "gru", 1), (0.25, "lru", 0), (0.75, "lru", 1)
    rows = [{"part": "sampling", "model": m, "seed": s, "accuracy": {"8": a, "16": a / 2}} for a, m, s in found]
    assert timescales.mean_over_seeds(rows, "sampling") == {
        "gru": {"8": 0.75, "16": 0.375},
        "lru": {"8": 0.5, "16": 0.25},
    }
    text = timescales.table(replace(TINY, parts=("sampling",), seeds=2), rows)
    assert "\n| gru | 0.75 | 0.38 |\n| lru | 0.50 | 0.25 |\n" in text and "chance 0.33" in text


@pytest.mark.long
def test_a_model_that_diverges_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    """The first model's first batch is full of inf. What is written is JSON, and the table has the other alone."""
    run, _, label = timescales.PARTS["sampling"]
    curves, bad = timescales.trajectories, iter([True])

    def trajectories(*args):
        x_BTX, class_B = curves(*args)
        return (np.full_like(x_BTX, np.inf) if next(bad, False) else x_BTX), class_B

    monkeypatch.setattr(timescales, "trajectories", trajectories)
    monkeypatch.setitem(timescales.PARTS, "sampling", (run, ("gru", "lru"), label))
    config = replace(TINY, parts=("sampling",), out=tmp_path / "run")
    first, second = timescales.main(config)
    assert (first["model"], second["model"]) == ("gru", "lru")
    assert first["diverged"].startswith("step 1: grad_norm is nan, loss is nan") and "accuracy" not in first
    assert "diverged" not in second and np.isfinite(second["train_loss"])
    strict = lambda line: json.loads(line, parse_constant=pytest.fail)
    assert [strict(line) for line in (config.out / "timescales.jsonl").read_text().splitlines()] == [first, second]
    text = (config.out / "table.md").read_text()
    assert f"Diverged, and in no mean: gru, seed 0: {first['diverged']}." in text
    assert "\n| lru | " in text and "\n| gru | " not in text


def test_the_table_says_so_where_all_diverged():
    rows = [{"part": "copying", "model": "mamba, default", "seed": 3, "diverged": "step 7: grad_norm is inf"}]
    text = timescales.table(replace(TINY, parts=("copying",)), rows)
    assert "mamba, default, seed 3: step 7: grad_norm is inf." in text and "| model" not in text


def test_bad_input_is_named(tmp_path):
    for match, fields in (
        ("length: expected a positive multiple of .* = 4, got 18", {"length": 18}),
        ("recall_steps: .*got 0", {"recall_steps": 0}),
        ("parts: expected some of sampling, recall, copying, got none", {"parts": ()}),
    ):
        with pytest.raises(ValueError, match=match):
            timescales.main(replace(TINY, out=tmp_path / "new", **fields))
        assert not (tmp_path / "new").exists()


def test_curves_are_the_same_at_every_rate():
    """Up to the noise: every second point of twice the rate is a point of the rate."""
    slow, classes = timescales.trajectories(np.random.default_rng(3), 5, 6, 50)
    fast, again = timescales.trajectories(np.random.default_rng(3), 5, 6, 100)
    np.testing.assert_array_equal(classes, again)
    apart = slow - fast[:, 1::2]
    assert apart.std() == pytest.approx(0.05 * 2**0.5, rel=0.15) and abs(apart).max() < 0.5
    other, _ = timescales.trajectories(np.random.default_rng(4), 5, 6, 50)
    assert (slow - other).std() > 0.5
    closed = np.abs(fast[:, 0] - fast[:, -1]).mean()
    assert closed < 0.5 * np.abs(fast[:, 0] - fast[:, 50]).mean()


def test_a_value_stands_where_it_is_asked_for():
    tokens_BT, value_B = timescales.recalls(np.random.default_rng(0), 6, 200, 32)
    at = tokens_BT < 6
    assert (at.sum(1) == 1).all() and (tokens_BT[at] == value_B).all() and (tokens_BT[:, -1] == 7).all()
    distance_B = 31 - at.argmax(1)
    assert distance_B.min() == 1 and 16 < distance_B.max() <= 31
    assert np.median(distance_B) < 10, "as many below the root of the length as above"
    tokens_BT, value_B = timescales.recalls(np.random.default_rng(0), 6, 9, 32, 12)
    assert (tokens_BT[:, 31 - 12] == value_B).all() and (tokens_BT[:, :19] == 6).all()


def test_a_copy_is_a_copy():
    tokens_BT = timescales.copies(np.random.default_rng(0), 5, 7, 4)
    assert tokens_BT.shape == (7, 9) and (tokens_BT[:, 4] == 5).all()
    np.testing.assert_array_equal(tokens_BT[:, :4], tokens_BT[:, 5:])
    assert tokens_BT[:, :4].max() < 5


def test_rescaling_is_of_dt_alone():
    params = {"params": {"a": {"log_dt": jnp.zeros(3), "dt": jnp.ones(2)}, "log_dt_bias": jnp.ones(2)}}
    half = timescales.rescaled(params, 0.5)["params"]
    np.testing.assert_allclose(np.exp(half["a"]["log_dt"]), 0.5)
    assert (half["a"]["dt"] == 1).all() and (half["log_dt_bias"] == 1).all()


@pytest.mark.long
def test_a_continuous_layer_told_of_its_rate_gives_what_it_gave():
    """On a curve without noise: S4 at twice the rate and half the dt ends where it did."""
    t = lambda L: (np.arange(L) + 1)[None, :, None] / L
    curve = lambda L: jnp.asarray(np.concatenate([np.sin(6 * t(L)), np.cos(9 * t(L)) - 1], -1), jnp.float32)
    model = timescales.Classifier("s4", 8, 3)
    params = model.init(jax.random.key(0), curve(4))
    slow, told = model.apply(params, curve(256)), model.apply(timescales.rescaled(params, 0.5), curve(512))
    untold = model.apply(params, curve(512))
    assert jnp.abs(told - slow).max() < 0.1 * jnp.abs(untold - slow).max()


def test_the_steps_of_stable_ssm_do_not_learn():
    grads = jax.grad(
        lambda params: sum(
            leaf.sum() for leaf in jax.tree.leaves(jax.tree_util.tree_map_with_path(timescales.fixed_step, params))
        )
    )({"log_dt": jnp.ones(2), "w": jnp.ones(2)})
    assert (grads["log_dt"] == 0).all() and (grads["w"] == 1).all()
