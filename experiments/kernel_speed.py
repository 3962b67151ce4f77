"""How fast are the kernels, beside XLA's form, a copy of the same bytes, what the chip could do at best, and fla?

python experiments/kernel_speed.py --out runs/kernel_speed                  # on a GPU or TPU that has kernels
python experiments/kernel_speed.py --lengths 4096 --ops delta_rule --out runs/quick
python experiments/kernel_speed.py --interpret sm90 --out runs/checked      # any machine: checks, and times nothing

Each op is checked first: outputs, last state and every gradient of the kernel against `scan` in float64 on the host, on
fewer rows and tokens, as relative root mean squares. Then all forms of one case are timed in turn, A B C A B C ..., on
--copies sets of inputs that take turns too, so that none finds its inputs in a cache; a time is the median of
--repeats, each of a few calls. `copy` reads and writes as many bytes as the op has to, half of them each. `floor` is
the larger of those bytes over the chip's bandwidth and the flops, in chunks of 64, over its peak in bfloat16; beside
each time stands what fraction of it that is. Where torch and flash-linear-attention are installed (`pip install
fla-core`), their chunk kernels run the same shapes in the same process.

Expect of bfloat16 about 3e-3, and 1e-2 of gradients. No kernel has been timed yet: there was no chip to time it on.
"""

import contextlib
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import memzoo_kernels
import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from memzoo import contract, ops

OPS = ("linear_attention", "delta_rule", "linear_scan")
DECAYS = ("head", "key")
DTYPES = ("bfloat16", "float32")
PEAKS = {  # bytes and bfloat16 flops per second, of the makers' sheets
    "NVIDIA H100 80GB HBM3": (3.35e12, 989e12),
    "NVIDIA H200": (4.8e12, 989e12),
    "TPU v4": (1.2e12, 275e12),
    "TPU v5 lite": (0.82e12, 197e12),
    "TPU v5": (2.77e12, 459e12),
    "TPU v6 lite": (1.64e12, 918e12),
}
FLA = {
    ("linear_attention", "head"): ("fla.ops.simple_gla", "chunk_simple_gla"),
    ("linear_attention", "key"): ("fla.ops.gla", "chunk_gla"),
    ("delta_rule", "head"): ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    ("delta_rule", "key"): ("fla.ops.kda", "chunk_kda"),
}
C = 64  # tokens in a chunk, in the count of flops


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/kernel_speed")  # a new directory: kernel_speed.jsonl, kernel_speed.md, kernel_speed.png
    ops: tuple[str, ...] = OPS
    decays: tuple[str, ...] = ("head",)  # head, key
    dtype: str = "bfloat16"  # bfloat16, float32
    batch: int = 8
    heads: int = 16
    key_dim: int = 128
    value_dim: int = 128
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    check_length: int = 300
    check_rows: int = 1  # rows of the check, of two heads each
    copies: int = 3
    repeats: int = 20
    interpret: str = ""  # sm90 or tpu: only check, in Pallas' interpreter


def arguments(config: Config, op: str, decay: str, B: int, T: int, H: int, seed: int) -> tuple[np.ndarray, ...]:
    """Positional arguments of the op, float32: unit keys, write strengths in (0, 1), log-decays about -0.1."""
    rng, K, V = np.random.default_rng(seed), config.key_dim, config.value_dim
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    if op == "linear_scan":
        a, x = np.asarray(normal(2, B, T, H * V))
        return np.exp(-0.1 * np.abs(a)), x
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    log_decay = -0.1 * np.abs(normal(B, T, H, K) if decay == "key" else normal(B, T, H))
    beta = [1 / (1 + np.exp(-normal(B, T, H)))] if op == "delta_rule" else []
    return unit(normal(B, T, H, K)), unit(normal(B, T, H, K)), normal(B, T, H, V), *beta, log_decay


def typed(args: tuple[np.ndarray, ...], dtype: str) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(x, dtype if i < 3 else jnp.float32) for i, x in enumerate(args))


def shapes(config: Config, op: str, B: int, T: int, H: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the outputs and the last state. The channels of `linear_scan` are the values of all heads."""
    K, V = config.key_dim, config.value_dim
    return ((B, T, H * V), (B, H * V)) if op == "linear_scan" else ((B, T, H, V), (B, H, K, V))


def forward(op: str, impl: str) -> Callable[..., Any]:
    return lambda *args: getattr(ops, op)(*args, impl=impl)


def forward_backward(op: str, impl: str) -> Callable[..., Any]:
    """Outputs and, for cotangents dy and dS that are given, the gradients."""

    def run(dy, dS, *args):
        outputs, pull = jax.vjp(forward(op, impl), *args)
        return outputs, pull((dy.astype(outputs[0].dtype), dS.astype(outputs[1].dtype)))

    return run


def check(config: Config, op: str, decay: str) -> dict[str, float]:
    """Relative root mean squares of the kernel's errors: the worst of the outputs, and of the gradients."""
    B, T, H = config.check_rows, config.check_length, 2
    held = typed(arguments(config, op, decay, B, T, H, seed=0), config.dtype)
    normal = np.random.default_rng(1).standard_normal
    dy, dS = (jnp.asarray(normal(shape, np.float32), config.dtype) for shape in shapes(config, op, B, T, H))
    got = jax.tree.map(np.asarray, jax.jit(forward_backward(op, "pallas"))(dy, dS, *held))
    wide = [np.asarray(x, np.float64) for x in (dy, dS, *held)]
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        want = jax.tree.map(np.asarray, jax.jit(forward_backward(op, "scan"))(*wide))
    worst = lambda a, b: max(relative(x, y) for x, y in zip(a, b, strict=True))
    return {"error": worst(got[0], want[0]), "gradient_error": worst(got[1], want[1])}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.asarray(a, np.float64) - b) ** 2) / np.mean(b**2)))


def cost(config: Config, op: str, decay: str, T: int, what: str) -> tuple[int, int]:
    """(bytes that have to move, flops of the matmuls), each array read or written once."""
    K, V, e = config.key_dim, config.value_dim, jnp.dtype(config.dtype).itemsize
    tokens = config.batch * T * config.heads
    if op == "linear_scan":
        each = (2 * e + 4, 2) if what == "forward" else (5 * e + 12, 5)
        return each[0] * V * tokens, each[1] * V * tokens
    gates = 4 * ((K if decay == "key" else 1) + (op == "delta_rule"))
    numbers = e * (2 * K + 2 * V) + gates, 2 * (C * (K + V) + 2 * K * V)
    if op == "delta_rule":
        numbers = numbers[0], 2 * (C * (2 * K + 2 * V) + 3 * K * V)
    if what == "forward+backward":  # q, k, v, dy and gates in, dq, dk, dv and theirs out, besides the forward pass
        numbers = numbers[0] + e * (4 * K + 3 * V) + 2 * gates, 3 * numbers[1]
    return numbers[0] * tokens, numbers[1] * tokens


def fla_form(op: str, decay: str, what: str, inputs: list[tuple[jax.Array, ...]]) -> Callable[[int], None] | None:
    """A call of flash-linear-attention's kernel on the same values, or None where it or torch is missing."""
    try:
        import torch

        module, name = FLA[op, decay]
        kernel = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, KeyError):
        return None
    if not torch.cuda.is_available():
        return None
    tensors = [[torch.utils.dlpack.from_dlpack(x).clone().requires_grad_() for x in args] for args in inputs]

    def run(n: int) -> None:
        dy, _, q, k, v, *gates = tensors[n]
        gates = gates if op == "linear_attention" else [gates[1], gates[0]]
        y = kernel(q, k, v, *gates, scale=1.0, output_final_state=True)[0]
        if what == "forward+backward":
            torch.autograd.grad(y, [q, k, v, *gates], dy.detach())

    return run


def synchronise_torch() -> None:
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.synchronize()


def time_all(forms: dict[str, Callable[[int], Any]], copies: int, repeats: int) -> dict[str, float]:
    """Median seconds of one call of each form, which take turns, as their inputs do."""
    calls = {}

    def seconds_of(form, count) -> float:
        begin = time.perf_counter()
        jax.block_until_ready([form(i % copies) for i in range(count)][-1])
        synchronise_torch()
        return (time.perf_counter() - begin) / count

    for name, form in forms.items():
        seconds_of(form, copies)  # compiles
        calls[name] = max(1, min(64, round(0.02 / seconds_of(form, copies))))
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            times[name].append(seconds_of(form, calls[name]))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure(config: Config, op: str, decay: str, T: int, what: str) -> list[dict[str, Any]]:
    bytes_moved, flops = cost(config, op, decay, T, what)
    peak = PEAKS.get(jax.devices()[0].device_kind)
    floor = max(bytes_moved / peak[0], flops / peak[1]) if peak else None
    inputs = []
    for seed in range(config.copies):
        args = typed(arguments(config, op, decay, config.batch, T, config.heads, seed), config.dtype)
        dS = jnp.zeros(shapes(config, op, config.batch, T, config.heads)[1], jnp.float32)
        inputs.append((args[1].astype(jnp.float32) if op == "linear_scan" else args[2], dS, *args))
    forms: dict[str, Callable[[int], Any]] = {}
    make, first = (forward, 2) if what == "forward" else (forward_backward, 0)
    for impl in ("pallas", "chunk"):
        forms[impl] = functools.partial(lambda program, n: program(*inputs[n][first:]), jax.jit(make(op, impl)))
    halves = [jnp.full(bytes_moved // 8, n, jnp.int32) for n in range(config.copies)]
    copy = jax.jit(lambda x: x + 1)
    forms["copy"] = lambda n: copy(halves[n])
    if (peer := fla_form(op, decay, what, inputs)) is not None:
        forms["fla"] = peer
    try:
        jax.eval_shape(lambda: forms["pallas"](0))
    except NotImplementedError as error:
        tqdm.write(f"{op}, decay per {decay}, T={T:,}: {error}")
        del forms["pallas"]
    seconds = time_all(forms, config.copies, config.repeats)
    sizes = {"batch": config.batch, "heads": config.heads, "K": config.key_dim, "V": config.value_dim, "T": T}
    rows = []
    for form, s in seconds.items():
        row = {"op": op, "decay": decay, "dtype": config.dtype, **sizes, "what": what, "form": form, "us": 1e6 * s}
        row |= {"bytes": bytes_moved, "flops": flops, "times_chunk": seconds["chunk"] / s}
        row |= {"times_copy": seconds["copy"] / s, "floor": floor / s if floor else None}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], title: str) -> str:
    head = "| op | decay | T | pass | form | us | x chunk | of copy's speed | of the floor's |"
    lines = [title, "", head, "|" + "---|" * 9]
    for r in rows:
        if "us" in r:
            floor = f"{r['floor']:.2f}" if r["floor"] else ""
            cells = r["op"], r["decay"], f"{r['T']:,}", r["what"], r["form"], f"{r['us']:,.0f}"
            lines.append("| " + " | ".join((*cells, f"{r['times_chunk']:.2f}", f"{r['times_copy']:.2f}", floor)) + " |")
    checked = [r for r in rows if "error" in r]
    lines += ["", *(f"{r['op']}, decay per {r['decay']}: " + errors(r) for r in checked), ""]
    return "\n".join(lines)


def errors(row: dict[str, Any]) -> str:
    return f"error {row['error']:.1e}, of gradients {row['gradient_error']:.1e} of float64 `scan`, in {row['dtype']}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against T, a panel per op, decay and pass."""
    rows = [row for row in rows if "us" in row]
    panels = list(dict.fromkeys((r["op"], r["decay"], r["what"]) for r in rows))
    figure = Figure(figsize=(4.5 * min(2, len(panels)), 3.5 * -(-len(panels) // 2)), layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 2), min(2, len(panels)), index + 1)
        here = [r for r in rows if (r["op"], r["decay"], r["what"]) == panel]
        for number, form in enumerate(("pallas", "chunk", "copy", "fla")):
            points = [(r["T"], r["us"]) for r in here if r["form"] == form]
            if points:
                axes.loglog(*zip(*points, strict=True), color=f"C{number}", marker=".", label=form)
        floors = [(r["T"], r["us"] * r["floor"]) for r in here if r["form"] == "copy" and r["floor"]]
        if floors:
            axes.loglog(*zip(*floors, strict=True), "k:", label="floor")
        axes.set(title="{}, decay per {}, {}".format(*panel), xlabel="T", ylabel="us")
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    for field in ("batch", "heads", "key_dim", "value_dim", "check_length", "check_rows", "copies", "repeats"):
        contract.positive(**{field: getattr(config, field)})
    for T in config.lengths:
        contract.positive(lengths=T)
    choices = {"ops": (config.ops, OPS), "decays": (config.decays, DECAYS), "dtype": ((config.dtype,), DTYPES)}
    choices["interpret"] = ((config.interpret,) if config.interpret else (), memzoo_kernels.BACKENDS)
    for field, (chosen, known) in choices.items():
        for name in chosen:
            if name not in known:
                raise ValueError(f"{field}: expected one of {', '.join(known)}; {contract.nearest(name, known)}")
    if config.out.exists() and not (config.out.is_dir() and not any(config.out.iterdir())):
        raise ValueError(f"out: expected a new or empty directory, got {config.out}")
    config.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    title = f"jax {jax.__version__}, {device.device_kind}, {time.strftime('%Y-%m-%d')}, {config.dtype}"
    tqdm.write(title)
    rows: list[dict[str, Any]] = []
    cases = [(op, d) for op in config.ops for d in (("channel",) if op == "linear_scan" else config.decays)]
    for op, decay in tqdm(cases, unit="case", leave=False):
        interpreted = memzoo_kernels.interpreted(config.interpret) if config.interpret else contextlib.nullcontext()
        try:
            with interpreted:
                rows.append({"op": op, "decay": decay, "dtype": config.dtype, **check(config, op, decay)})
            tqdm.write(f"{op}, decay per {decay}: {errors(rows[-1])}")
        except NotImplementedError as error:
            tqdm.write(f"{op}, decay per {decay}: {error}")
        for T in () if config.interpret else config.lengths:
            for what in ("forward", "forward+backward"):
                rows += measure(config, op, decay, T, what)
                tqdm.write("; ".join(f"{r['form']} {r['us']:,.0f} us" for r in rows if r.get("T") == T)[-100:])
        (config.out / "kernel_speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (config.out / "kernel_speed.md").write_text(table(rows, title))
    if any("us" in row for row in rows):
        plot(rows, config.out / "kernel_speed.png")
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
