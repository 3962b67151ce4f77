"""The table of all architectures: killed and resumed, with one that fails, and beside honest baselines."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import zoo_language
from experiments.zoo_language import Config
from memzoo import checkpoint
from memzoo.tasks import text

ROOT = Path(__file__).parents[2]
FLAGS = "--names gru lru --layers 1 --width 6 --window 16 --batch 4 --steps 30 --eval-every 5 --eval-windows 20"
TINY = Config(("gru", "lru"), 1, 6, window=16, batch=4, steps=30, eval_every=5, eval_windows=20)
LOSSES = ("step", "train_loss", "val_loss")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is never killed: its configuration and its lines."""
    config = replace(TINY, out=tmp_path_factory.mktemp("zoo") / "whole")
    return config, zoo_language.main(config)


def losses(out, name):
    rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    return [[row[key] for key in LOSSES] for row in rows]


def kill_after(process, path):
    end = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_run_leaves_what_it_says(whole):
    config, rows = whole
    lines = [json.loads(line) for line in (config.out / "zoo_language.jsonl").read_text().splitlines()]
    assert {row["name"]: row for row in lines} == rows and list(rows) == ["gru", "lru"]
    for name, row in rows.items():
        assert row["val_loss"] == losses(config.out, name)[-1][2] < math.log(256)
        assert row["seconds"] > 0 and row["tokens_per_second"] > 0
        assert row["parameters"] == parameters(config.out / name)
    assert rows["gru"]["state_bytes"] == 6 * 4 and rows["lru"]["state_bytes"] == 6 * 8
    table = (config.out / "table.md").read_text()
    for name in ("gru", "lru", "bigram counts", "unigram counts"):
        assert f"\n| {name} |" in table
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_names_what_does_no_better_than_pairs(whole, capsys):
    config, rows = whole
    assert zoo_language.main(replace(config, resume=True)) == rows, "nothing is trained again"
    corpus = text.corpus(None, config.window)
    bigram = zoo_language.baselines(corpus, config.window, config.eval_windows)["bigram"]
    worse = [name for name, row in rows.items() if row["val_loss"] >= bigram]
    assert worse, "30 steps are too few"
    assert capsys.readouterr().out.endswith(f"no better than counts of pairs of bytes: {', '.join(worse)}\n")


def parameters(out):
    """How many numbers the last checkpoint holds of them."""
    with checkpoint.manager(out) as checkpoints:
        restored = checkpoints.restore(30, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    return sum(leaf.size for leaf in jax.tree.leaves(restored["params"]))


@pytest.mark.long
def test_killed_in_the_second_and_resumed_a_run_gives_the_same_numbers(whole, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    command = [sys.executable, ROOT / "experiments" / "zoo_language.py", *FLAGS.split(), "--out", out]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    kill_after(process, out / "lru" / "checkpoints" / "10")
    (before,) = (json.loads(line) for line in (out / "zoo_language.jsonl").read_text().splitlines())

    trained = []
    run = zoo_language.language_model.run
    monkeypatch.setattr(zoo_language.language_model, "run", lambda one: trained.append(one.mixer) or run(one))
    config = replace(whole[0], out=out, resume=True)
    rows = zoo_language.main(config)
    assert rows["gru"] == before and trained == ["lru"], "what was finished is not trained again"
    for name in ("gru", "lru"):
        assert losses(out, name) == losses(whole[0].out, name)
        assert rows[name]["val_loss"] == whole[1][name]["val_loss"]

    assert zoo_language.main(config) == rows and trained == ["lru"]
    more = zoo_language.main(replace(config, names=("lstm",)))
    assert list(more) == ["gru", "lru", "lstm"] and trained == ["lru", "lstm"]


@pytest.mark.long
def test_one_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    config = replace(TINY, names=("retnet", "gru"), out=tmp_path / "run", steps=5)
    rows = zoo_language.main(config)  # four heads do not divide a width of 6
    assert rows["retnet"]["error"].startswith("ValueError: width: expected a positive multiple of heads = 4, got 6")
    assert "val_loss" in rows["gru"]
    assert "| retnet | linear attention | failed: ValueError: width" in (config.out / "table.md").read_text()
    trained = []
    run = zoo_language.language_model.run
    monkeypatch.setattr(zoo_language.language_model, "run", lambda one: trained.append(one.mixer) or run(one))
    assert zoo_language.main(replace(config, resume=True)) == rows and trained == ["retnet"], "it is tried again"


@pytest.mark.long
def test_a_loss_that_is_not_finite_is_reported(tmp_path):
    config = replace(TINY, names=("gru",), out=tmp_path / "run", learning_rate=1e38, warmup=0)
    row = zoo_language.main(config)["gru"]
    assert row["error"].startswith("NonFiniteError: step ") and "val_loss" not in row


def test_bad_input_is_named(whole, tmp_path):
    def refused(match, config=TINY, **fields):
        with pytest.raises(ValueError, match=match):
            zoo_language.main(replace(config, **{"out": tmp_path / "new"} | fields))
        assert not (tmp_path / "new").exists()

    refused("unknown architecture 'grru'; did you mean gru", names=("lru", "grru"))
    refused("steps: .*got 0", steps=0)
    refused("resume: expected a run in .*, got none", resume=True)
    refused("out: .*whole, which holds something already", out=whole[0].out)
    refused("width was 6, now 8", out=whole[0].out, resume=True, width=8)
    refused("steps was 30, now 40", out=whole[0].out, resume=True, steps=40, names=("lstm",))


def test_counts_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    bytes_N = rng.choice(np.frombuffer(b"abcab", np.uint8), 500)
    n_YZ = zoo_language.pairs(bytes_N[:-1], bytes_N[1:], block=64)
    slow_YZ = np.zeros((256, 256))
    for y, z in itertools.pairwise(bytes_N):
        slow_YZ[y, z] += 1
    np.testing.assert_array_equal(n_YZ, slow_YZ)

    p_Z, p_YZ = zoo_language.unigram(n_YZ, 0.5)[0], zoo_language.bigram(n_YZ, 0.5, 2.0)
    np.testing.assert_allclose([p_Z.sum(), *p_YZ.sum(1)], 1)
    a, b = ord("a"), ord("b")
    count = sum(z == b for z in bytes_N[1:])
    assert p_Z[b] == pytest.approx((count + 0.5) / (499 + 128))
    assert p_YZ[a, b] == pytest.approx((slow_YZ[a, b] + 2 * p_Z[b]) / (slow_YZ[a].sum() + 2))
    assert zoo_language.nats(p_YZ, n_YZ) == pytest.approx(
        -np.mean([math.log(p_YZ[y, z]) for y, z in itertools.pairwise(bytes_N)])
    )


def test_baselines_reach_the_entropy_of_a_chain():
    """Of a Markov chain the entropies are known; no held-out byte is counted."""
    rng = np.random.default_rng(1)
    next_YZ = np.array([[0.9, 0.1, 0.0], [0.0, 0.5, 0.5], [0.7, 0.0, 0.3]])
    chain = [0]
    for _ in range(60_000):
        chain.append(rng.choice(3, p=next_YZ[chain[-1]]))
    bytes_N = np.array(chain, np.uint8) + 65
    corpus = text.Corpus(bytes_N[:54_000], bytes_N[54_000:])
    found = zoo_language.baselines(corpus, 20, 10_000)
    values, vectors = np.linalg.eig(next_YZ.T)
    stays_Y = np.real(vectors[:, np.argmax(values.real)])
    stays_Y = stays_Y / stays_Y.sum()
    entropy = lambda p: -sum(x * math.log(x) for x in p if x > 0)
    assert found["unigram"] == pytest.approx(entropy(stays_Y), abs=0.02)
    assert found["bigram"] == pytest.approx(sum(stays_Y[y] * entropy(next_YZ[y]) for y in range(3)), abs=0.02)

    unseen = text.Corpus(corpus.train_N, np.full(500, 200, np.uint8))  # never in the training part
    lost = zoo_language.baselines(unseen, 20, 10_000)
    assert math.isfinite(lost["bigram"]) and min(lost.values()) > 8
