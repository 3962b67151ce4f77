"""Teacher and students of a few seconds: what a run leaves, what is trained in it, and how it goes on."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import linearize
from experiments.linearize import Config
from memzoo import train
from memzoo.models.backbone import LanguageModel
from memzoo.tasks import text

TINY = Config(layers=1, width=8, window=16, reach=4, batch=4, steps=20, transfer_steps=15, tune_steps=10, rank=2)
TINY = replace(TINY, eval_every=20, eval_windows=20, students=("lizard", "liger"))
STAGES = [
    ("teacher", "trained"),
    ("teacher", "fine-tuned"),
    ("lizard", "converted"),
    ("lizard", "transferred"),
    ("lizard", "fine-tuned"),
    ("liger", "converted"),
    ("liger", "fine-tuned"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is never killed: its configuration and its lines."""
    config = replace(TINY, out=tmp_path_factory.mktemp("linearize") / "whole")
    return config, linearize.main(config)


def small(name, **fields):
    """A model of two layers, and its parameters, flat."""
    model = LanguageModel(text.VOCAB, 8, 2, (name,), fields={name: fields})
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))
    return model, flatten_dict(jax.device_get(params["params"]), sep="/")


@pytest.mark.long
def test_a_run_leaves_what_it_says(whole):
    config, rows = whole
    assert [(row["name"], row["stage"]) for row in rows] == STAGES
    assert [json.loads(line) for line in (config.out / "linearize.jsonl").read_text().splitlines()] == rows
    last = json.loads((config.out / "teacher" / "metrics.jsonl").read_text().splitlines()[-1])
    assert rows[0]["val_loss"] == pytest.approx(last["val_loss"], rel=1e-6) and rows[0]["seconds"] == last["seconds"]
    table = (config.out / "table.md").read_text()
    assert all(
        f"\n| {name} | {stage} | {row['val_loss']:.3f} |" in table
        for (name, stage), row in zip(STAGES, rows, strict=True)
    )
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_what_is_trained_in_each_stage(whole):
    """Low-rank changes of q, k and v: 3 (8 + 8) 2 numbers; Lizard's own: two maps 4 x 2 x 2, a gate of 8, 1 + 4."""
    _, rows = whole
    low, new = 3 * (8 + 8) * 2, 2 * 4 * 2 * 2 + 8 + 1 + 4
    assert [row["trained"] for row in rows] == [0, low, 0, new, low + new, 0, low]
    teacher, _, lizard, _, _, liger, _ = rows
    assert liger["parameters"] == teacher["parameters"] and lizard["parameters"] == teacher["parameters"] + new
    assert liger["state_bytes"] < lizard["state_bytes"] < teacher["state_bytes"]


@pytest.mark.long
def test_fine_tuning_lowers_the_loss(whole):
    losses = {(row["name"], row["stage"]): row["val_loss"] for row in whole[1]}
    for name in ("teacher", "liger", "lizard"):
        before = "trained" if name == "teacher" else "converted"
        assert losses[name, "fine-tuned"] < losses[name, before]


@pytest.mark.long
def test_low_rank_changes_begin_at_0_and_have_their_rank():
    _, theirs = small("attention")
    low = linearize.low_rank(theirs, 2, jax.random.key(1))
    assert len(low) == 6 and {path.split("/")[-2] for path in low} == {"q", "k", "v"}
    params = {"frozen": theirs, "trained": {"new": {}, "low": low}}
    jax.tree.map(np.testing.assert_array_equal, flatten_dict(linearize.assembled(params), sep="/"), theirs)
    rng = np.random.default_rng(0)
    params["trained"]["low"] = jax.tree.map(lambda a: rng.normal(size=a.shape), low)
    changed = flatten_dict(linearize.assembled(params), sep="/")
    for path, kernel in theirs.items():
        change = np.asarray(changed[path] - kernel).reshape(kernel.shape[0], -1)
        assert np.linalg.matrix_rank(change, tol=1e-4) == (2 if path in low else 0), path
    path, (A, B) = next(iter(params["trained"]["low"].items()))
    np.testing.assert_allclose(changed[path] - theirs[path], 8 * np.tensordot(A, B, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_attention_transfer_compares_layer_with_layer_and_trains_what_is_new():
    """0 for the teacher itself; for Lizard the plain mean over layers, and no gradient for the teacher's weights."""
    teacher, theirs = small("attention")
    windows_BU = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.uint8)
    params = {"frozen": theirs, "trained": {"new": {}, "low": {}}}
    same = jax.jit(lambda p: linearize.transfer_loss(teacher, teacher.make_mixer("attention"), p, windows_BU))
    assert same(params) == 0

    student, ours = small("lizard", window=3)
    params["trained"]["new"] = {path: leaf for path, leaf in ours.items() if path not in theirs}
    loss = lambda p: linearize.transfer_loss(teacher, student.make_mixer("lizard"), p, windows_BU)
    run = jax.jit(jax.value_and_grad(loss))
    value, gradients = run(params)
    assert value > 1e-4 and not any(np.any(g) for g in gradients["frozen"].values())
    assert all(np.any(g) for g in gradients["trained"]["new"].values())
    down = {path: leaf - 0.1 * gradients["trained"]["new"][path] for path, leaf in params["trained"]["new"].items()}
    assert run({"frozen": theirs, "trained": {"new": down, "low": {}}})[0] < value


@pytest.mark.long
def test_killed_in_the_second_student_and_resumed_a_run_gives_the_same_numbers(whole, monkeypatch):
    config, rows = whole
    lines = config.out / "linearize.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    converted, convert = [], linearize.convert
    monkeypatch.setattr(linearize, "convert", lambda *args: converted.append(args[-1]) or convert(*args))
    again = linearize.main(replace(config, resume=True))
    assert converted == ["liger"]
    assert [row["val_loss"] for row in again] == [row["val_loss"] for row in rows]
    assert linearize.main(replace(config, resume=True)) == again and converted == ["liger"]


@pytest.mark.long
def test_a_run_stops_at_what_is_not_finite(tmp_path, monkeypatch):
    """A loss that is NaN in a stage's last step alone, and a held-out loss."""
    corpus = text.corpus(None, TINY.window)
    teacher, theirs = small("attention")
    config = replace(TINY, out=tmp_path, transfer_steps=1, eval_windows=4)
    nan = lambda teacher, mixer, params, batch_BU: np.nan * sum(map(jnp.sum, params["trained"]["new"].values()))
    always = lambda loss: lambda model, params, batch_BU: jnp.full(batch_BU[:, 1:].shape, loss)
    monkeypatch.setattr(linearize, "transfer_loss", nan)
    monkeypatch.setattr(linearize.language_model, "nats", always(1.0))
    with pytest.raises(train.NonFiniteError, match=r"step 1: .*loss is nan; the last good .* is the teacher's, in"):
        linearize.convert(config, corpus, teacher, theirs, "lizard")
    monkeypatch.setattr(linearize.language_model, "nats", always(np.nan))
    with pytest.raises(train.NonFiniteError, match="step 0: val_loss is nan"):
        linearize.convert(config, corpus, teacher, theirs, "liger")


def test_bad_input_is_named(tmp_path):
    def refused(match, **fields):
        with pytest.raises(ValueError, match=match):
            linearize.main(replace(TINY, **{"out": tmp_path / "new"} | fields))
        assert not (tmp_path / "new").exists()

    refused("unknown student 'ligre'; did you mean liger", students=("ligre",))
    refused("reach: expected an integer >= 1, got 0", reach=0)
    refused("rank: expected an integer >= 0, got -1", rank=-1)
    refused("tune_steps: .*got 0", tune_steps=0)
    refused("tune_rate: expected a finite number > 0, got -1.0", tune_rate=-1.0)
    refused("learning_rate: .*got -1", learning_rate=-1.0)
    refused("width: .*heads = 4, got 18", width=18)
    refused("data: .*does not exist", data=tmp_path / "nowhere.txt")
    refused("resume: expected a run in .*, got none", resume=True)


@pytest.mark.long
def test_a_finished_run_is_neither_overwritten_nor_resumed_as_another(whole):
    with pytest.raises(ValueError, match=r"out: .*whole, which holds something already"):
        linearize.main(replace(TINY, out=whole[0].out))
    with pytest.raises(ValueError, match="tune_steps was 10, now 11"):
        linearize.main(replace(TINY, out=whole[0].out, resume=True, tune_steps=11))
