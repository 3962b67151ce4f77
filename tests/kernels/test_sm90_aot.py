"""The Hopper kernels compiled for an H200, which is not there: `pytest -m aot`, with what kernels/aot_sm90.py wants."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "kernels" / "aot_sm90.py"
LINEAR = {"linear_attention_forwards_dotted", "linear_attention_backwards_dotted"}
PLAIN = {"per_key_plain_forwards", "per_key_plain_backwards"}
KERNELS = {
    ("linear_attention", "per head"): LINEAR | {"linear_attention_forwards", "linear_attention_backwards"},
    ("linear_attention", "per key"): PLAIN,
    ("delta_rule", "per head"): LINEAR | {"delta_rule_y", "delta_rule_yu", "delta_rule_E"},
    ("delta_rule", "per key"): PLAIN | {"per_key_before_forwards", "per_key_after_backwards"},
    ("linear_scan", "per channel"): {"linear_scan_forwards", "linear_scan_backwards"},
}


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the plugin of jax for CUDA")
@pytest.mark.parametrize("tile", ("default", "largest", "float32"))
def test_every_kernel_compiles(tile):
    """Within the shared memory that there is, and in the default tile without spilling a register."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    result = subprocess.run(
        [sys.executable, SCRIPT, tile], capture_output=True, text=True, timeout=900, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for case, kernels in KERNELS.items():
        assert {row["kernel"] for row in rows if (row["op"], row["decay"]) == case} == kernels
    assert all(0 < row["registers"] <= 255 and 0 < row["shared"] <= 227 * 1024 for row in rows)
    if tile == "default":
        assert all(row["spilled"] == 0 for row in rows)
