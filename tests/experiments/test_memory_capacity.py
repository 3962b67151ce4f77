"""The experiment runs end to end at a small size, and its curves are what theory says where it says something."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import memory_capacity
from experiments.memory_capacity import Config

TINY = Config(units=10, delays=12, train=60, test=40, train_tokens=200, test_tokens=100, piece=25, seeds=2)


@pytest.mark.long
def test_a_run_leaves_what_it_says(tmp_path, monkeypatch):
    kinds = memory_capacity.reservoirs(TINY)
    few = ("esn", "res_esn, random, 5 layers", "res_rmn, cyclic")
    monkeypatch.setattr(memory_capacity, "reservoirs", lambda _: {name: kinds[name] for name in few})
    config = replace(TINY, out=tmp_path / "run")
    rows = memory_capacity.main(config)
    assert rows == [json.loads(line) for line in (config.out / "memory_capacity.jsonl").read_text().splitlines()]
    want = [(part, name, seed) for part in memory_capacity.PARTS for name in few for seed in range(2)]
    assert [(row["part"], row["reservoir"], row["seed"]) for row in rows] == want
    for row in rows:
        assert len(row["r2"]) == 12 and min(row["r2"]) >= 0 and max(row["r2"]) <= 1 + 1e-9
        assert row["capacity"] == pytest.approx(sum(row["r2"]), abs=1e-3) and 0.5 < row["radius"] < 1.1
    text = (config.out / "table.md").read_text()
    assert all(f"\n| {name} | " in text for name in few) and memory_capacity.CLAIMS in text
    for part in memory_capacity.PARTS:
        assert (config.out / f"{part}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):
        memory_capacity.main(config)


def test_all_its_reservoirs_have_as_many_features():
    kinds = memory_capacity.reservoirs(Config())
    assert {sum(fields["units"] for _, fields in layers) for layers in kinds.values()} == {100}


@pytest.mark.parametrize("part", memory_capacity.PARTS)
@pytest.mark.cases(1)
def test_a_ring_without_loss_recalls_as_many_tokens_as_it_has_units(part):
    """A shift by one place, and hardly anything besides: delays below its size, and by theory no others.

    With 8 units and 12 delays; in the stream all fades by alpha a token, so that the ring does not add up.
    """
    config = replace(TINY, units=8, train=400, train_tokens=2000, test=300, test_tokens=1000)
    fields = {"units": 8, "residual": "cyclic", "alpha": 0.5, "input_scale": 1e-3, "spectral_radius": 0.0}
    with jax.enable_x64(True):
        layers = memory_capacity.build([("res_esn", fields)])
        r2_K = memory_capacity.curve(config, part, layers, memory_capacity.draw(layers, jax.random.key(0)), 0)
    np.testing.assert_allclose(r2_K[:6], 1, atol=1e-2)
    assert 7 < r2_K.sum() < 8.2 and (r2_K[9:] < 0.1).all()


@pytest.mark.parametrize("part", memory_capacity.PARTS)
def test_each_state_is_paired_with_what_came_before(part, monkeypatch):
    """Features that are the input itself and the input before: delays 0 and 1, and no others."""

    def echo(layers, variables, x_BT, last, before_B=0.0):
        before_BT = np.concatenate([np.zeros((len(x_BT), 1)) + before_B, x_BT[:, :-1]], axis=1)
        both_BTF = np.stack([x_BT, before_BT], axis=-1)
        return both_BTF[:, -1] if last else both_BTF, x_BT[:, -1]

    monkeypatch.setattr(memory_capacity, "features", echo)
    with jax.enable_x64(True):
        config = replace(TINY, units=2, train=2000, train_tokens=2010)
        r2_K = memory_capacity.curve(config, part, (), [], 0)
    np.testing.assert_allclose(r2_K[:2], 1, atol=1e-6)
    assert (r2_K[2:] < 0.2).all()


def test_bad_input_is_named(tmp_path):
    for match, fields in (
        ("parts: expected some of sequences, stream, got none", {"parts": ()}),
        ("units: expected a positive multiple of layers = 5, got 12", {"units": 12}),
        ("seeds: expected an integer >= 1, got 0", {"seeds": 0}),
        ("penalty: expected a number > 0, got 0.0", {"penalty": 0.0}),
    ):
        with pytest.raises(ValueError, match=match):
            memory_capacity.main(replace(TINY, out=tmp_path / "new", **fields))
        assert not (tmp_path / "new").exists()
