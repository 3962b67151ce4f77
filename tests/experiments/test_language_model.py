"""The script as people run it: killed and resumed, over eight devices, and with input that is wrong.

A run of a few seconds is made once; the others must give its numbers. They share a compilation cache, which changes
how long they take and nothing else.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tyro

from experiments import language_model
from experiments.language_model import Config
from memzoo import checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 60
SMALL = f"--layers 1 --width 16 --window 16 --batch 8 --steps {STEPS} --eval-every 5 --eval-windows 20 --sample 40"
LOSSES = ("step", "train_loss", "val_loss")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(out, *flags, devices=1) -> the process."""
    tmp = tmp_path_factory.mktemp("language_model")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(out, *flags, devices=1):
        command = [
            sys.executable,
            ROOT / "experiments" / "language_model.py",
            *SMALL.split(),
            "--out",
            tmp / out,
            *flags,
        ]
        more = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        return tmp / out, subprocess.Popen(
            command, env=env | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def finish(out, process):
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], printed


@pytest.fixture(scope="module")
def whole(start):
    """A run that is never killed: (its directory, its metrics, what it printed)."""
    return finish(*start("whole"))


def parameters(out):
    """Every number in the last checkpoint."""
    with checkpoint.manager(out) as checkpoints:
        state = checkpoints.restore(STEPS, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    return {str(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def losses(rows):
    return [tuple(row[name] for name in LOSSES) for row in rows]


def test_a_run_leaves_what_it_says(whole):
    out, rows, printed = whole
    assert [row["step"] for row in rows] == list(range(5, STEPS + 1, 5))
    assert all(set(row) == {*LOSSES, "seconds", "tokens_per_second"} for row in rows)
    assert rows[0]["val_loss"] == pytest.approx(np.log(256), rel=0.02)  # knows nothing yet
    assert rows[-1]["val_loss"] < 4.5 and rows[-1]["train_loss"] < rows[0]["train_loss"] - 1
    assert "bits per byte" in printed and "\nThe " in printed
    assert json.loads((out / "config.json").read_text())["width"] == 16
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((out / "tensorboard").iterdir())


def kill_after(out, process, step, delay):
    """SIGKILL, `delay` seconds after the checkpoint of `step` is there."""
    end = time.monotonic() + 300
    while not (out / "checkpoints" / str(step)).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_twice_and_resumed_a_run_gives_the_same_numbers_bit_for_bit(start, whole):
    kill_after(*start("killed"), step=10, delay=0.1 * np.random.default_rng().random())
    kill_after(*start("killed", "--resume"), step=30, delay=0.1 * np.random.default_rng().random())
    out, process = start("killed")
    assert process.wait() == 1 and "is not overwritten" in process.stderr.read()
    with (out / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 35, "train_l')
    (out / "checkpoints" / f"{STEPS}.orbax-checkpoint-tmp").mkdir()
    out, rows, printed = finish(*start("killed", "--resume"))

    assert losses(rows) == losses(whole[1])
    assert printed.splitlines()[-1] == whole[2].splitlines()[-1]  # the sample
    expected, found = parameters(whole[0]), parameters(out)
    assert expected.keys() == found.keys() and len(expected) > 20
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


@pytest.mark.long
def test_a_finished_run_resumes_to_its_end(start, whole):
    _, rows, printed = finish(*start("whole", "--resume"))
    assert rows == whole[1] and printed.splitlines()[-1] == whole[2].splitlines()[-1]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_eight_devices_give_the_losses_of_one(start, whole, strategy):
    # For ten steps: then rounding has grown, as it does between any two orders of summation.
    out, process = start(strategy, "--strategy", strategy, devices=8)
    kill_after(out, process, step=10, delay=0)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[:2]]
    np.testing.assert_allclose(losses(rows), losses(whole[1][:2]), rtol=1e-6)


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_and_saves_nothing(start):
    out, process = start("nan", "--learning-rate", "1e38", "--warmup", "0")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: step ")
    assert f"the last good checkpoint is {out / 'checkpoints' / '0'}" in errors
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0"]


def test_an_unknown_mixer_gets_the_nearest_names_and_leaves_nothing(start):
    out, process = start("typo", "--mixer", "gated_deltanet,gated_delta_net")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "unknown architecture 'gated_delta_net'; did you mean gated_deltanet" in errors
    assert not out.exists()


def test_an_unknown_flag_gets_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(Config, args=["--mixr", "gru"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "--mixr" in message and "--mixer" in message


def test_bad_input_is_named(tmp_path, whole):
    def refused(match, **fields):
        fields = {"out": tmp_path / "new", "width": 16, "layers": 1} | fields
        with pytest.raises(ValueError, match=match):
            language_model.main(Config(**fields))
        assert not (tmp_path / "new").exists()

    refused("data: .*does not exist", data=tmp_path / "nowhere.txt")
    refused("width: .*heads = 4, got 18", width=18)
    refused("layers: .*got 0", layers=0)
    refused("window: .*got 0", window=0)
    refused("batch: .*got 0", batch=0)
    refused("steps: .*got 0", steps=0)
    refused("eval_every: .*got 0", eval_every=0)
    refused("learning_rate: .*got -1", learning_rate=-1.0)
    refused("temperature: .*got -1", temperature=-1.0)
    refused("prompt: .*got ''", prompt="")
    refused("resume: expected a run with a checkpoint", resume=True)
    refused("width was 16, now 32; .*batch was 8, now 16; steps was 60", out=whole[0], resume=True, width=32)
    refused("out: .*whole, which holds something already", out=whole[0])
