"""kernel_speed.py runs end to end at a small size, checks what it says, and refuses what it must."""

import json

import pytest

from experiments import kernel_speed

SMALL = {"batch": 2, "heads": 1, "key_dim": 4, "value_dim": 3, "lengths": (8, 16), "copies": 2, "repeats": 1}


@pytest.mark.long
@pytest.mark.parametrize("backend", ("tpu", "sm90"))
def test_kernels_are_checked_without_their_chip(tmp_path, backend):
    config = kernel_speed.Config(tmp_path, interpret=backend, dtype="float32", check_length=70, **SMALL)
    rows = kernel_speed.main(config)
    assert [row["op"] for row in rows] == list(kernel_speed.OPS)
    assert all(row["error"] < 1e-5 and row["gradient_error"] < 1e-4 for row in rows)
    assert "of float64 `scan`" in (tmp_path / "kernel_speed.md").read_text()


@pytest.mark.long
def test_without_a_kernel_the_rest_is_timed(tmp_path):
    config = kernel_speed.Config(tmp_path, ("linear_attention",), **SMALL)
    rows = kernel_speed.main(config)
    assert rows == [json.loads(line) for line in (tmp_path / "kernel_speed.jsonl").read_text().splitlines()]
    assert [(row["T"], row["what"], row["form"]) for row in rows if row["form"] != "fla"] == [
        (T, what, form) for T in (8, 16) for what in ("forward", "forward+backward") for form in ("chunk", "copy")
    ]
    assert all(row["us"] > 0 and (row["times_chunk"] == 1 or row["form"] != "chunk") for row in rows)
    assert (tmp_path / "kernel_speed.png").stat().st_size > 1000
    assert (tmp_path / "kernel_speed.md").read_text().count("| linear_attention | head |") == 8
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):
        kernel_speed.main(config)


def test_bytes_and_flops_of_the_floor():
    """At B = 8, H = 16, K = V = 128, T = 4,096 in bfloat16: 0.54 GB and, in chunks of 64, 52 GFLOP for the forward."""
    bytes_moved, flops = kernel_speed.cost(kernel_speed.Config(), "linear_attention", "head", 4096, "forward")
    assert round(bytes_moved / 1e9, 2) == 0.54 and round(flops / 1e9) == 52
    config = kernel_speed.Config(dtype="float32", batch=1, heads=1)
    assert kernel_speed.cost(config, "linear_scan", "channel", 1, "forward+backward") == (32 * 128, 5 * 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ops": ("delta",)}, "ops: expected one of linear_attention, delta_rule, .*; did you mean delta_rule"),
        ({"decays": ("heads",)}, "decays: expected one of head, key; did you mean head"),
        ({"dtype": "float16"}, "dtype: expected one of bfloat16, float32"),
        ({"lengths": (8, 0)}, "lengths: expected an integer >= 1, got 0"),
        ({"copies": 0}, "copies: expected an integer >= 1, got 0"),
        ({"interpret": "h100"}, "interpret: expected one of tpu, sm90"),
    ],
)
def test_bad_fields_are_refused_before_anything_is_measured(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        kernel_speed.main(kernel_speed.Config(tmp_path / "new", **fields))
    assert not (tmp_path / "new").exists()
