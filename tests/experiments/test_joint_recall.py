"""The question runs end to end at a small size, and leaves what it says."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import joint_recall
from experiments.joint_recall import MODELS, Config
from memzoo.tasks.joint_recall import JointRecall

TINY = Config(
    contexts=(1, 2), keys=(1, 2), values=3, layers=1, width=8, state_size=4, head_dim=4, bucket_keys=2,
    selected_keys=2, bits=1, batch=2, steps=3, eval_every=2, eval_rows=4,
)  # fmt: skip


@pytest.mark.long
def test_a_run_leaves_what_it_says(tmp_path):
    config = replace(TINY, models=("hax", "mamba2"), out=tmp_path / "run")
    rows = joint_recall.main(config)
    assert rows == [json.loads(line) for line in (config.out / "joint_recall.jsonl").read_text().splitlines()]
    assert [(row["model"], row["seed"]) for row in rows] == [("hax", 0), ("mamba2", 0)]
    for row in rows:
        assert list(row["accuracy"]) == ["2", "3"] and np.isfinite(row["train_loss"])
        counted = np.array(list(row["accuracy"].values())) * config.eval_rows * 4  # tables of 2 by 2
        np.testing.assert_allclose(counted, counted.round(), atol=1e-6)
    text = (config.out / "table.md").read_text()
    assert joint_recall.CLAIM in text and all(f"\n| {row['model']} | " in text for row in rows)
    assert (config.out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):
        joint_recall.main(config)


def test_the_models_compared_are_as_large_as_they_say():
    """The second is the first without what it finds; the fourth keeps as many bytes as the first, at the defaults."""
    task = JointRecall()
    sizes = {kind: joint_recall.describe(joint_recall.make(Config(), kind, task)) for kind in MODELS}
    hax, alone, wide, larger = (sizes[kind] for kind in MODELS)
    assert hax.parameters > alone.parameters and wide.parameters > hax.parameters
    assert 0.7 < larger.state_bytes / hax.state_bytes < 1.3 and alone.state_bytes < hax.state_bytes / 5
    models = [joint_recall.make(Config(), kind, task) for kind in MODELS]
    assert [(model.mixers[0], model.width) for model in models] == [
        ("hax", 64),
        ("mamba2", 64),
        ("mamba2", 128),
        ("mamba2", 64),
    ]


def test_the_table_has_means_over_seeds_and_says_what_diverged():
    found = ("hax", 0, 0.5), ("hax", 1, 1.0), ("mamba2", 0, 0.25)
    size = {"parameters": 1234, "state_bytes": 56, "seconds": 7.0}
    rows = [{"model": m, "seed": s, "accuracy": {"2": 0.0, "3": a}, **size} for m, s, a in found]
    rows.append({"model": "mamba2", "seed": 1, "diverged": "step 2: loss is nan"})
    text = joint_recall.table(replace(TINY, models=("hax", "mamba2"), seeds=2), rows)
    assert "\n| hax | 0.75 | 1,234 | 56 | 7 |\n| mamba2 | 0.25 | 1,234 | 56 | 7 |\n" in text and "chance 0.33" in text
    assert "Diverged, and in no mean: mamba2, seed 1: step 2: loss is nan." in text


@pytest.mark.long
def test_a_model_that_diverges_is_recorded(tmp_path):
    rate = 1e30  # of steps that leave the numbers there are
    config = replace(TINY, models=("mamba2",), out=tmp_path / "run", learning_rate=rate, eval_every=1)
    (row,) = joint_recall.main(config)
    assert row["diverged"].startswith("step ") and "accuracy" not in row
    assert json.loads((config.out / "joint_recall.jsonl").read_text()) == row
    assert row["diverged"] in (config.out / "table.md").read_text()


def test_bad_input_is_named(tmp_path):
    for match, fields in (
        ("steps: .*got 0", {"steps": 0}),
        ("models: unknown model 'haxx'; did you mean hax", {"models": ("haxx",)}),
        ("models: expected some of hax, .*, got none", {"models": ()}),
        ("contexts: expected 1 <= smallest <= largest, got 3, 2", {"contexts": (3, 2)}),
        ("bits: expected an integer >= 1, got 0", {"bits": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            joint_recall.main(replace(TINY, out=tmp_path / "new", **fields))
        assert not (tmp_path / "new").exists()
