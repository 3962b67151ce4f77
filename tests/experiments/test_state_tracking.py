"""The script runs end to end at a small size, and refuses what it must."""

import json

import pytest

from experiments import state_tracking


@pytest.mark.long
def test_a_run_leaves_what_it_says(tmp_path):
    """A real diagonal follows parity, beyond the lengths that it was trained on."""
    sizes = {"width": 16, "train_length": 12, "lengths": (12, 48), "batch": 16, "steps": 90, "eval_every": 40}
    config = state_tracking.Config(tmp_path / "run", ("bilinear, diagonal", "lstm"), ("Z2",), **sizes)
    rows = state_tracking.main(config)
    assert rows == [json.loads(line) for line in (config.out / "state_tracking.jsonl").read_text().splitlines()]
    assert [(row["model"], row["group"], list(row["loss"])) for row in rows] == [
        (model, "Z2", ["40", "80", "90"]) for model in config.models
    ]
    assert rows[0]["accuracy"] == {"12": 1.0, "48": 1.0}
    table = (config.out / "table.md").read_text()
    assert "| model | Z2, chance 0.50 |" in table and "| bilinear, diagonal | 1.00, 1.00 |" in table
    assert (config.out / "accuracy.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):
        state_tracking.main(config)


@pytest.mark.long
def test_a_model_that_diverges_is_recorded(tmp_path):
    sizes = {"width": 16, "train_length": 4, "lengths": (4,), "batch": 2, "steps": 4, "learning_rate": 1e30}
    (row,) = state_tracking.main(state_tracking.Config(tmp_path, ("lstm",), ("Z2",), **sizes))
    assert "step 4" in row["diverged"] and "Diverged" in (tmp_path / "table.md").read_text()


def test_words_grow_to_the_longest():
    config = state_tracking.Config(steps=100, begin_length=3, train_length=20)
    lengths = [int(state_tracking.word_length(config, i)) for i in range(100)]
    assert lengths == [3] * 25 + [6] * 25 + [12] * 25 + [20] * 25
    alone = state_tracking.Config(steps=100, begin_length=8, train_length=8)
    assert {int(state_tracking.word_length(alone, i)) for i in (0, 99)} == {8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ("mamba",)}, "models: unknown model 'mamba'; did you mean mamba2"),
        ({"models": ()}, "models, groups, lengths: expected at least one of each"),
        ({"groups": ()}, "models, groups, lengths: expected at least one of each"),
        ({"groups": ("A5",)}, "name: expected Z2, Z3"),
        ({"lengths": (0,)}, "lengths: expected an integer >= 1, got 0"),
        ({"begin_length": 33}, "begin_length: expected at most train_length = 32, got 33"),
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"width": 6, "models": ("deltanet",)}, "width: expected a positive multiple of heads = 4, got 6"),
    ],
)
def test_bad_fields_are_refused_before_anything_is_trained(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        state_tracking.main(state_tracking.Config(tmp_path / "new", **fields))
    assert not (tmp_path / "new").exists()
