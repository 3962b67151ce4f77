"""The script runs end to end at a small size, goes on where it stopped, and refuses what it must."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import needle
from experiments.needle import MODELS, Config
from memzoo.tasks.needle import Needle

TINY = Config(
    width=8, heads=2, layers=1, reach=8, chunk=4, begin_length=8, train_length=16, lengths=(24,), depths=2, tokens=32,
    steps=4, eval_rows=3, piece=7, log_every=2, kinds=("passkey",), models=("gated_deltanet", "window"),
)  # fmt: skip


@pytest.mark.long
def test_a_run_leaves_what_it_says_and_goes_on(tmp_path):
    config = replace(TINY, out=tmp_path / "run")
    rows = needle.main(config)
    lines = (config.out / "needle.jsonl").read_text().splitlines(keepends=True)
    assert rows == [json.loads(line) for line in lines]
    assert [(row["kind"], row["model"], list(row["loss"])) for row in rows] == [
        ("passkey", "gated_deltanet", ["2", "4"]),
        ("passkey", "window", ["2", "4"]),
    ]
    for row in rows:
        assert list(row["accuracy"]) == ["16", "24"] and np.shape(row["accuracy"]["24"]) == (2,)
        counted = np.array(row["accuracy"]["24"]) * 3 * 2
        np.testing.assert_allclose(counted, counted.round(), atol=1e-3)
    text = (config.out / "table.md").read_text()
    assert "\n| model | 16 | 24 | " in text and all(f"\n| {row['model']} | " in text for row in rows)
    assert (config.out / "heat.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):
        needle.main(config)
    with pytest.raises(ValueError, match="run of another configuration: steps was 4, now 5"):
        needle.main(replace(config, resume=True, steps=5))

    (config.out / "needle.jsonl").write_text(lines[0] + lines[1][:20])  # killed while it wrote
    again = needle.main(replace(config, resume=True))
    without = lambda rows: [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    assert again[0] == rows[0] and without(again) == without(rows)
    assert again == [json.loads(line) for line in (config.out / "needle.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_model_that_diverges_is_recorded(tmp_path):
    (row,) = needle.main(replace(TINY, models=("window",), out=tmp_path / "run", learning_rate=1e30, log_every=1))
    assert row["diverged"].startswith("step ") and row["diverged"] in (tmp_path / "run" / "table.md").read_text()


@pytest.mark.parametrize(("U", "piece", "M"), [(30, 7, 2), (31, 10, 2), (30, 29, 3), (30, 64, 2), (30, 4, 6)])
def test_answers_are_read_across_pieces(U, piece, M):
    """A model that says the token it reads says, in the answer's places, the tokens before them."""

    class Echo:
        def initial_state(self, batch):
            return 0

    tokens_BU = np.random.default_rng(0).integers(0, 9, (3, U))
    read = lambda tokens_BP, memory: (tokens_BP[:, -M:], memory + tokens_BP.shape[1])
    np.testing.assert_array_equal(needle.answered(read, Echo(), tokens_BU, piece, M), tokens_BU[:, -M - 1 : -1])


@pytest.mark.long
def test_the_models_compared_are_of_about_the_same_size():
    """At the defaults; and windows and segments have the same reach."""
    config = Config()
    assert config.train_length <= 1024 and min(config.lengths) >= 2 * config.train_length
    sizes = {name: needle.describe(make(config, Needle())) for name, make in MODELS.items()}
    parameters = [size.parameters for size in sizes.values()]
    assert max(parameters) < 2 * min(parameters)
    layer = {
        name: MODELS[name](config, Needle()).initial_state(1)[0] for name in ("window", "titans_mal", "titans_mac")
    }
    assert layer["window"].k_BGMK.shape[2] == layer["titans_mal"].window.window.k_BGMK.shape[2] == 64
    assert layer["titans_mac"].cache_BC2GY.shape[1] == 64


def test_texts_of_training_grow():
    """Half of the steps are short ones; each step is made once, and the last texts are as long as they get."""
    looks = needle.training(replace(TINY, begin_length=8, train_length=50, steps=40, log_every=6))
    steps = [(i, length) for start, end, length in looks for i in range(start, end)]
    assert [i for i, _ in steps] == list(range(40))
    counts = {length: sum(of == length for _, of in steps) for length in (8, 16, 32, 50)}
    assert counts == {8: 20, 16: 6, 32: 7, 50: 7} and [of for _, of in steps] == sorted(of for _, of in steps)
    assert needle.training(replace(TINY, begin_length=16, steps=3)) == [(0, 2, 16), (2, 3, 16)]


def test_the_table_has_means_over_depths_and_seeds():
    size = {"parameters": 1234, "state_bytes": 56, "seconds": 7.0, "kind": "passkey", "model": "window"}
    rows = [{**size, "seed": seed, "accuracy": {"16": [1.0, 0.5], "24": [0.0, seed]}} for seed in (0, 1)]
    rows.append({"kind": "passkey", "model": "window", "seed": 2, "accuracy": {}, "diverged": "step 2: loss is nan"})
    text = needle.table(replace(TINY, seeds=3), rows)
    assert "\n| window | 0.75 | 0.25 | 1,234 | 56 | 7 |\n" in text and "chance 0.06" in text
    assert "Diverged, and in no mean: passkey, window, seed 2: step 2: loss is nan." in text


def test_bad_input_is_named(tmp_path):
    for match, fields in (
        ("steps: expected an integer >= 1, got 0", {"steps": 0}),
        ("models: unknown model 'titan'; did you mean titans", {"models": ("titan",)}),
        ("models, kinds: expected at least one of each, got none", {"models": ()}),
        ("kind: unknown kind 'pass'; did you mean passkey", {"kinds": ("pass",)}),
        ("begin_length, train_length, lengths: expected integers >= 4, got 3", {"lengths": (3,)}),
        (r"expected begin_length <= train_length <= tokens, got \(8, 16, 15\)", {"tokens": 15}),
        ("width: expected a positive multiple of heads = 3, got 8", {"heads": 3, "models": ("titans_mal",)}),
        ("resume: expected a run in .*, got none", {"resume": True}),
    ):
        with pytest.raises(ValueError, match=match):
            needle.main(replace(TINY, out=tmp_path / "new", **fields))
        assert not (tmp_path / "new").exists()
