"""The TPU kernels compiled for real chips, which are not there: `pytest -m aot`, with the extra `aot` installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "kernels" / "aot_tpu.py"
KERNELS = {"linear_attention": {"forward", "queries", "keys"}, "delta_rule": {"forward", "backward"}}
SCAN = {("linear_scan", "per channel", kernel) for kernel in ("forward", "backward")}


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which the extra `aot` installs")
@pytest.mark.parametrize("size", ("usual", "largest", "odd"))
@pytest.mark.parametrize("topology", ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"))
def test_every_kernel_compiles(topology, size):
    """Within the VMEM that there is, and at the usual size with few registers spilled."""
    command = [sys.executable, SCRIPT, topology, size]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    if size != "usual":
        assert len(rows) == 5  # ops, decays
        return
    assert {(row["op"], row["decay"], row["kernel"]) for row in rows} == SCAN | {
        (op, decay, kernel)
        for op, kernels in KERNELS.items()
        for decay in ("per head", "per key")
        for kernel in kernels
    }
    assert all((row["matmul"] > 0) == (row["op"] != "linear_scan") and 0 < row["bundles"] < 6000 for row in rows)
    assert all(row["spills"] < 0.2 * row["bundles"] for row in rows if row["decay"] == "per head")
    assert all(row["spills"] == 0 and row["bundles"] < 24 * 128 for row in rows if row["op"] == "linear_scan")
