"""Compiles the TPU kernels for chips that are not there, and counts their instructions.

    python kernels/aot_tpu.py                   all chips at the usual size, and writes the table of kernels/README.md
    python kernels/aot_tpu.py v5e:2x2 usual     one chip, one size: a line of JSON for each kernel

It wants the libtpu that pairs with the installed jax: the extra `aot`. A compilation fails where a kernel wants more
VMEM than there is, or an instruction that the chip does not have; Pallas' interpreter knows neither. At the usual size
the program of one chunk of one head, or of 1024 channels, is counted: its bundles, one a cycle unless it waits for
memory, and how many of them store or load a spilled register.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_directory = tempfile.TemporaryDirectory()
DUMP = _directory.name
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
if sys.argv[2:] == ["usual"]:  # to write all stages of all programs takes longer than to compile them
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from memzoo_kernels import delta_rule_tpu, linear_attention_tpu, linear_scan_tpu  # noqa: E402

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
MODULES = {"linear_attention": linear_attention_tpu, "delta_rule": delta_rule_tpu, "linear_scan": linear_scan_tpu}
CASES = [(op, decay) for op in ("linear_attention", "delta_rule") for decay in ("per head", "per key")]
CASES.append(("linear_scan", "per channel"))
SIZES = {  # T, K, V, dtype
    "usual": (512, 128, 128, "bfloat16"),
    "largest": (300, 256, 256, "float32"),
    "odd": (1, 5, 129, "bfloat16"),  # one token, and tiles that are not full
}
SCANS = {"usual": (512, 1024, "float32"), "largest": (300, 2560, "bfloat16"), "odd": (1, 5, "bfloat16")}  # T, X, dtype
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table of TPU kernels begins -->\n", "<!-- table of TPU kernels ends -->\n"


def compile_for(topology: str, size: str) -> None:
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    for op, decay in CASES:
        seen = set(os.listdir(DUMP))
        compile_one(op, decay, size, device)
        row = {"chip": device.device_kind, "op": op, "decay": decay, "size": size}
        for kernel, counts in counted(set(os.listdir(DUMP)) - seen).items() or [("", {})]:
            print(json.dumps(row | {"kernel": kernel} | counts), flush=True)


def compile_one(op, decay, size, device):
    B, H = 2, 4
    where = jax.sharding.SingleDeviceSharding(device)
    of = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)
    if op == "linear_scan":
        T, X, dtype = SCANS[size]
        arrays = [of(B, T, X, dtype=dtype), of(B, T, X, dtype=dtype), of(B, X)]
    else:
        T, K, V, dtype = SIZES[size]
        q, v = of(B, T, H, K, dtype=dtype), of(B, T, H, V, dtype=dtype)
        beta = [of(B, T, H)] if op == "delta_rule" else []
        arrays = [q, q, v, *beta, of(B, T, H, K) if decay == "per key" else of(B, T, H), of(B, H, K, V)]

    def outputs_and_gradients(reset_BT, *arrays):
        outputs, pull = jax.vjp(lambda *arrays: getattr(MODULES[op], op)(*arrays, reset_BT), *arrays)
        return outputs, pull(outputs)

    traced = jax.jit(outputs_and_gradients).trace(of(B, T, dtype="bool"), *arrays)
    traced.lower(lowering_platforms=("tpu",)).compile()


def counted(files) -> dict[str, dict[str, int]]:
    found = {}
    for file in files:
        kernel = re.search(r"(?:linear_attention|delta_rule|linear_scan)_tpu_([a-z]+)", file)
        if not kernel:
            continue
        text = Path(DUMP, file).read_text()
        counts = found.setdefault(kernel[1], {})
        if "schedule-analysis_final_bundles" in file:
            counts["bundles"] = int(re.search(r"total scheduled bundles:\s+(\d+)", text)[1])
        elif "-final_hlo-static-per-bundle-utilization" in file:
            slots = [slot.strip() for slot in text.splitlines()[1].split(",")]
            rows = [line.split() for line in text.split("UTILIZATION:")[1].splitlines() if line.strip()]
            for name, slot in (("spills", "VSTORE:SPILL"), ("fills", "VLOAD:FILL"), ("matmul", "MXU")):
                counts[name] = sum(int(row[slots.index(slot)]) for row in rows)
    return found


def write(rows: list[dict]) -> None:
    cells = collections.defaultdict(dict)
    for row in rows:
        C = MODULES[row["op"]].CHUNK
        cell = f"{row['bundles'] / C:.1f} ({row['spills'] / C:.1f})"
        cells[row["op"], row["decay"], row["kernel"]][row["chip"]] = cell
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    lines = [f"| op | decay | kernel | {' | '.join(chips)} |", "|---" * (3 + len(chips)) + "|"]
    for names, by_chip in sorted(cells.items()):
        lines.append(f"| {' | '.join((*names, *(by_chip[chip] for chip in chips)))} |")
    before, rest = README.read_text().split(BEGIN, 1)
    README.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    if sys.argv[1:]:
        compile_for(*sys.argv[1:])
    else:  # each chip in a process of its own
        run = lambda chip: subprocess.run([sys.executable, __file__, chip, "usual"], check=True, capture_output=True)
        write([json.loads(line) for chip in TOPOLOGIES for line in run(chip).stdout.splitlines()])
