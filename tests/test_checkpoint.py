"""What is saved comes back bit for bit, a damaged checkpoint gives way to the one before, nothing is overwritten."""

import json
import os
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memzoo import checkpoint
from memzoo.tasks import text


class State(NamedTuple):
    step: jax.Array
    params: Any
    key: jax.Array


def state(step=0, size=50):
    params = {"f": jnp.linspace(0, 1, size), "b": jnp.full((2, 3), 1 / 3, jnp.bfloat16), "empty": ()}
    return State(jnp.int32(step), params, jax.random.key_data(jax.random.key(3)))


def data(seed=0):
    return text.training_batches(np.arange(200, dtype=np.uint8), 5, 2, seed)


@jax.jit
def later(state):
    return state._replace(step=state.step + 1, params=jax.tree.map(lambda x: x * 1.5 + 1, state.params))


later_donated = jax.jit(later, donate_argnums=0)


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints 0, 1 and 2: (its directory, the states, the batch that follows each)."""
    out, batches, now = tmp_path / "run", data(), state()
    checkpoint.create(out, {"width": 8}, now, batches)
    states, following = [now], [next(batches)]
    with checkpoint.manager(out) as checkpoints:
        for _ in range(2):
            states.append(later(states[-1]))
            checkpoint.save(checkpoints, states[-1], batches)
            following.append(next(batches))
    return out, states, following


def test_state_and_position_come_back_together(run):
    out, states, following = run
    with checkpoint.manager(out) as checkpoints:
        assert checkpoint.last_good(checkpoints) == str(out / "checkpoints" / "2")
        batches = data()
        same(checkpoint.restore(checkpoints, state(), batches), states[2])
        np.testing.assert_array_equal(next(batches), following[2])


def test_steps_that_overwrite_the_state_do_not_reach_a_save_in_flight(tmp_path):
    now, batches = state(size=2_000_000), data()
    checkpoint.create(tmp_path / "run", {}, now, batches)
    with checkpoint.manager(tmp_path / "run") as checkpoints:
        now = later_donated(now)
        expected, after = jax.tree.map(np.array, now), next(batches)
        batches = data()
        checkpoint.save(checkpoints, now, batches)
        for _ in range(20):
            now, _ = later_donated(now), next(batches)
        checkpoint.last_good(checkpoints)
        batches = data()
        same(checkpoint.restore(checkpoints, now, batches), expected)
        np.testing.assert_array_equal(next(batches), after)


def test_the_last_three_are_kept(run):
    out, _, _ = run
    with checkpoint.manager(out) as checkpoints:
        for step in (3, 4):
            checkpoint.save(checkpoints, state(step), data())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["2", "3", "4"]


def largest(path):
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


DAMAGE = {
    "a file cut short": lambda path: os.truncate(largest(path), largest(path).stat().st_size // 2),
    "a file lost": lambda path: largest(path).unlink(),
    "the position lost": lambda path: shutil.rmtree(path / "data"),
    "everything lost": lambda path: [shutil.rmtree(path), path.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, damage):
    out, states, following = run
    DAMAGE[damage](out / "checkpoints" / "2")
    with checkpoint.manager(out) as checkpoints:
        batches = data()
        with pytest.warns(UserWarning, match=r"checkpoints/2 is damaged, 1 is used"):
            same(checkpoint.restore(checkpoints, state(), batches), states[1])
        np.testing.assert_array_equal(next(batches), following[1])
        checkpoint.save(checkpoints, states[2], batches)  # the step is free again
    assert any(path.name.startswith("damaged.2.") for path in (out / "checkpoints").iterdir())
    with checkpoint.manager(out) as checkpoints:
        same(checkpoint.restore(checkpoints, state(), data()), states[2])


def test_a_half_written_checkpoint_is_ignored(run):
    out, states, _ = run
    shutil.copytree(out / "checkpoints" / "2", out / "checkpoints" / "3.orbax-checkpoint-tmp")
    with checkpoint.manager(out) as checkpoints:
        same(checkpoint.restore(checkpoints, state(), data()), states[2])


def test_when_all_are_damaged_none_is_touched(run):
    out, _, _ = run
    for step in "012":
        shutil.rmtree(out / "checkpoints" / step / "state")
    with checkpoint.manager(out) as checkpoints, pytest.raises(ValueError, match="resume: expected a whole checkpoint"):
        checkpoint.restore(checkpoints, state(), data())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["0", "1", "2"]


def test_a_run_exists_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", killed)
        checkpoint.create(tmp_path / "run", {}, state(), data())
    assert not (tmp_path / "run").exists()


def test_another_run_is_never_overwritten(run):
    out, _, _ = run
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"out: expected a new or empty directory.*--resume"):
        checkpoint.check(out, {"width": 8}, resume=False)
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):  # begun by two processes at once
        checkpoint.create(out, {"width": 9}, state(), data())
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_only_a_run_of_the_same_configuration_is_resumed(run, tmp_path):
    out, _, _ = run
    checkpoint.check(out, {"width": 8}, resume=True)
    with pytest.raises(ValueError, match="another configuration: width was 8, now 9; depth was None, now 2"):
        checkpoint.check(out, {"width": 9, "depth": 2}, resume=True)
    with pytest.raises(ValueError, match=r"resume: expected a run with a checkpoint in .*nowhere"):
        checkpoint.check(tmp_path / "nowhere", {}, resume=True)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(ValueError, match="resume: expected a run with a checkpoint"):
        checkpoint.check(out, {"width": 8}, resume=True)
    (tmp_path / "empty").mkdir()
    checkpoint.check(tmp_path / "empty", {}, resume=False)


def test_rewind_drops_what_came_after_and_what_was_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert checkpoint.rewind(path, 5) == [] and path.read_text() == ""
    rows = [{"step": step, "loss": 1 / (step + 3)} for step in (5, 10, 15)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 20, "lo')
    whole = path.read_text()
    assert checkpoint.rewind(path, 10) == rows[:2]
    assert whole.startswith(path.read_text()) and path.read_text().count("\n") == 2
