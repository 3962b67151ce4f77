"""Compiles the Hopper kernels for an H200 that is not there, and says how many registers they take and spill.

    python kernels/aot_sm90.py                 all tiles, and writes the table of kernels/README.md
    python kernels/aot_sm90.py default         one tile: a line of JSON for each kernel

About 20 s a tile on two CPU cores. It wants, 265 MB in all and of the version V of the installed jax,
    pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V nvidia-cuda-nvcc nvidia-nvvm
A compilation fails where a kernel wants more shared memory than there is, or an instruction that the chip does not
have; Pallas' interpreter knows neither.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"], os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "cpu", "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.mosaic.gpu import core  # noqa: E402
from memzoo_kernels import delta_rule_sm90, linear_attention_sm90, linear_scan_sm90  # noqa: E402

MODULES = {"linear_attention": linear_attention_sm90, "delta_rule": delta_rule_sm90, "linear_scan": linear_scan_sm90}
CASES = [(op, decay) for op in ("linear_attention", "delta_rule") for decay in ("per head", "per key")]
CASES.append(("linear_scan", "per channel"))  # of which there are as many as keys in all heads
TILES = {"default": (128, 128, "bfloat16"), "largest": (256, 256, "bfloat16"), "float32": (128, 128, "float32")}
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table of Hopper kernels begins -->\n", "<!-- table of Hopper kernels ends -->\n"
PRINTED = re.compile(
    r"entry function '(\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.S
)
# What XLA asks of a chip: openxla/xla, xla/backends/gpu/target_config/specs.
H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0"
  device_address_bits: 64 name: "NVIDIA H200" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def compile_for(tile: str) -> None:
    device = topologies.get_topology_desc("", platform="cuda", topology="1x1x1", target_config=H200).devices[0]
    for op, decay in CASES:
        K, V, dtype = TILES[tile]
        if decay == "per key" and op == "delta_rule" and dtype == "float32":
            K = 64  # what fits
        text, shared = compile_one(op, decay, K, V, dtype, device)
        kernels: dict[str, tuple[int, int]] = {}
        for kernel, spilled, registers in PRINTED.findall(text):  # a kernel of more than one size: the worse
            kernels[kernel] = max(kernels.get(kernel, (0, 0)), (int(spilled), int(registers)))
        for kernel, (spilled, registers) in kernels.items():
            row = {"op": op, "decay": decay, "K": K, "V": V, "dtype": dtype}
            row |= {"kernel": kernel, "registers": registers, "spilled": spilled}
            print(json.dumps(row | {"shared": shared}), flush=True)


def compile_one(op, decay, K, V, dtype, device):
    """(what the compiler prints, the most shared memory that a kernel takes)."""
    B, T, H = 8, 4096, 16
    where = jax.sharding.SingleDeviceSharding(device)
    of = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)
    q, v = of(B, T, H, K, dtype=dtype), of(B, T, H, V, dtype=dtype)
    beta = [of(B, T, H)] if op == "delta_rule" else []
    log_decay = of(B, T, H, K) if decay == "per key" else of(B, T, H)
    arrays = [q, q, v, *beta, log_decay, of(B, H, K, V), of(B, T, dtype="bool")]
    if op == "linear_scan":
        arrays = [of(B, T, H * K, dtype=dtype)] * 2 + [of(B, H * K), arrays[-1]]
    run = getattr(MODULES[op], op)

    def gradients(*arrays):
        outputs, pull = jax.vjp(lambda *differentiable: run(*differentiable, arrays[-1]), *arrays[:-1])
        return outputs, pull(outputs)

    sizes, size_of = [], core._smem_tree_size
    core._smem_tree_size = lambda tree: sizes.append(size_of(tree)) or sizes[-1]
    lowered = [jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)) for f in (run, gradients)]
    core._smem_tree_size = size_of
    with tempfile.TemporaryFile() as log:  # ptxas prints past Python
        kept = os.dup(1), os.dup(2)
        try:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            for program in lowered:
                program.compile()
        finally:
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        log.seek(0)
        return log.read().decode(), max(sizes)


def write(rows: list[dict]) -> None:
    lines = ["| op | decay | K, V | kernel | registers | bytes spilled | shared memory, at most |", "|---" * 7 + "|"]
    for row in rows:
        cells = row["op"], row["decay"], f"{row['K']}, {row['V']}, {row['dtype']}", row["kernel"]
        counts = row["registers"], row["spilled"], f"{row['shared'] / 1024:.0f} KB"
        lines.append(f"| {' | '.join(map(str, cells + counts))} |")
    before, rest = README.read_text().split(BEGIN, 1)
    README.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    if sys.argv[1:]:
        compile_for(sys.argv[1])
    else:  # each tile in a process of its own
        run = lambda tile: subprocess.run([sys.executable, __file__, tile], check=True, stdout=subprocess.PIPE)
        write([json.loads(line) for tile in TILES for line in run(tile).stdout.splitlines()])
