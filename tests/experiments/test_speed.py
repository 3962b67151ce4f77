"""The measuring scripts run end to end at a small size, measure what they say, and refuse what they must."""

import json

import pytest

from experiments import decode_speed, memory_speed, newton_speed, op_speed


@pytest.mark.long
def test_op_speed(tmp_path):
    out = tmp_path / "run"
    config = op_speed.Config(out, ("linear_scan", "delta_rule"), ("key",), 2, (1,), (4,), (8, 16), False, 1, 6.0, ())
    rows = op_speed.main(config)
    assert rows == [json.loads(line) for line in (out / "op_speed.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * (5 + 3) and (out / "op_speed.png").stat().st_size > 1000
    for row in rows:
        assert row["us_per_token"] > 0 and (row["bytes"] > 0 or row["impl"] == "multiply")
        assert (row["growth"] is None) == (row["T"] == 8)
        assert row["times_scan"] == 1 if row["impl"] == "scan" else row["times_scan"] > 0
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):
        op_speed.main(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ops": ("delta",)}, "ops: unknown op 'delta'; did you mean delta_rule"),
        ({"decays": ("head", "heads")}, "decays: unknown decay 'heads'; did you mean head"),
        ({"lengths": (8, 0)}, "lengths: expected an integer >= 1, got 0"),
        ({"heads": (0,)}, "heads: expected an integer >= 1, got 0"),
        ({"sizes": (0,)}, "sizes: expected an integer >= 1, got 0"),
        ({"growth": (4, 0)}, "growth: expected an integer >= 1, got 0"),
        ({"width": 0}, "width: expected an integer >= 1, got 0"),
        ({"width": 7, "architectures": ("attention",)}, "width: expected a positive multiple of heads = 4, got 7"),
        ({"architectures": ("lrru",)}, "'lrru'.*did you mean lru"),
    ],
)
def test_op_speed_refuses_bad_fields_before_anything_is_measured(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        op_speed.main(op_speed.Config(tmp_path / "new", **{"architectures": (), **fields}))
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_op_speed_leaves_out_what_does_not_fit(tmp_path):
    config = op_speed.Config(tmp_path, ("delta_rule",), ("head",), 1, (1,), (4,), (8,), False, 1, 0.0, ())
    assert all("us_per_token" not in row for row in op_speed.main(config))


@pytest.mark.long
def test_op_speed_of_architectures(tmp_path):
    names = ("gru", "lru")
    ops = {"ops": ("linear_scan",), "heads": (1,), "sizes": (4,), "lengths": (8,)}
    config = op_speed.Config(tmp_path, **ops, layers=False, repeats=1, architectures=names, width=6, growth=(4, 9))
    rows = op_speed.main(config)
    assert rows == [json.loads(line) for line in (tmp_path / "op_speed.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "architecture" in row]
    assert [(row["architecture"], row["T"], row["state_floats"]) for row in rows] == [
        (name, T, floats) for name, floats in (("gru", 6), ("lru", 12)) for T in (4, 9)
    ]
    for row in rows:
        assert row["us_per_token"] > 0 and row["times_linear_attention"] > 0 and row["peer_floats"] >= 6
        assert (row["growth"] is None) == (row["T"] == 4)


@pytest.mark.long
def test_decode_speed(tmp_path):
    rows = decode_speed.main(decode_speed.Config(tmp_path, ("gru", "attention"), 8, 2, 3, 9, 5, 1))
    assert [row["name"] for row in rows] == ["gru", "attention"]
    for row in rows:
        assert row["us_early"] > 0 and row["us_late"] > 0 and row["bytes_early"] == row["bytes_late"]
    with pytest.raises(ValueError, match="late: expected at least"):
        decode_speed.main(decode_speed.Config(tmp_path / "other", late=10))
    with pytest.raises(ValueError, match="unknown architecture 'gruu'; did you mean gru"):
        decode_speed.main(decode_speed.Config(tmp_path / "other", ("gruu",)))


@pytest.mark.long
def test_newton_speed(tmp_path):
    """The second length would take longer than a call may."""
    config = newton_speed.Config(tmp_path, ("gru", "slstm"), (8,), (6, 10**9), repeats=1)
    rows = newton_speed.main(config)
    assert rows == [json.loads(line) for line in (tmp_path / "newton_speed.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2 and (tmp_path / "newton_speed.png").stat().st_size > 1000
    for row in rows:
        if row["T"] == 6:
            assert row["times_scan"] > 0 and 2 <= row["iterations"] <= 6 and row["left_out"] == []
        else:
            assert row["ms"] == {} and row["left_out"] == ["scan", "newton"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ("mamba",)}, "names: unknown name 'mamba'"),
        ({"states": (8, 6)}, "states: expected a multiple of 4, and of 32 above it, got 6"),
        ({"states": (48,)}, "states: expected a multiple of 4, and of 32 above it, got 48"),
        ({"lengths": (0,)}, "lengths: expected an integer >= 1, got 0"),
        ({"jacobian": "ful"}, "jacobian: expected one of .*did you mean full"),
    ],
)
def test_newton_speed_refuses_bad_fields_before_anything_is_measured(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        newton_speed.main(newton_speed.Config(tmp_path / "new", **fields))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["network", pytest.param("ttt_linear", marks=pytest.mark.long)])
@pytest.mark.long
def test_memory_speed(tmp_path, name):
    config = memory_speed.Config(tmp_path, (name,), (1, 3), (7,), width=6, heads=3, repeats=1)
    rows = memory_speed.main(config)
    assert rows == [json.loads(line) for line in (tmp_path / "memory_speed.jsonl").read_text().splitlines()]
    assert [row["chunk"] for row in rows] == [1, 3] and (tmp_path / "memory_speed.png").stat().st_size > 1000
    assert all(row["us_per_token"] > 0 and row["bytes"] > 0 for row in rows)
    assert rows[0]["times_1"] == 1 and rows[1]["times_1"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ("titan",)}, "names: unknown name 'titan'; did you mean titans"),
        ({"names": ()}, "names, chunks, lengths: expected at least one of each, got none"),
        ({"names": ("lstm",)}, "names: unknown name 'lstm'"),
        ({"chunks": ()}, "names, chunks, lengths: expected at least one of each, got none"),
        ({"chunks": (1, 0)}, "chunks: expected an integer >= 1, got 0"),
        ({"lengths": (0,)}, "lengths: expected an integer >= 1, got 0"),
        ({"width": 10}, "width: expected a positive multiple of heads = 4, got 10"),
    ],
)
def test_memory_speed_refuses_bad_fields_before_anything_is_measured(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        memory_speed.main(memory_speed.Config(tmp_path / "new", **fields))
    assert not (tmp_path / "new").exists()
