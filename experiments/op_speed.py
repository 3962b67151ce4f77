"""How fast is each form of each op, and a whole layer beside a peer's? Ratios within one run, never absolute times.

python experiments/op_speed.py --out runs/op_speed             # everything below
python experiments/op_speed.py --ops delta_rule --lengths 1024 4096 --sizes 128 --heads 1 --out runs/quick

Every row times all forms of one op in turn, A B C A B C ..., and prints medians, and how many times faster than `scan`.
A form whose compiled program wants more than --memory-limit is left out, with what it would want. `bytes` is that
program's temporary memory; `growth` is time per token at this length over that at the length before.
Layers are compared with memax 0.1.1 (`pip install memax==0.1.1 equinox`) where it is installed.
"""

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
import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import memzoo
from memzoo import checkpoint, contract, ops


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/op_speed")  # a new directory: op_speed.jsonl, op_speed.png
    ops: tuple[str, ...] = ("linear_scan", "linear_attention", "delta_rule")
    decays: tuple[str, ...] = ("head",)  # of linear_attention and delta_rule: none, head, key
    batch: int = 4
    heads: tuple[int, ...] = (1, 4)
    sizes: tuple[int, ...] = (64, 128)  # K = V
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    layers: bool = True  # compare layers with memax, where it is installed
    repeats: int = 5
    memory_limit: float = 6.0  # GB of temporary memory


def arguments(op: str, decay: str, B: int, T: int, H: int, K: int) -> tuple[Any, ...]:
    """Positional arguments of the op: unit keys, write strengths in (0, 1), log-decays about -0.1."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    if op == "linear_scan":
        return jax.nn.sigmoid(normal(B, T, H * K)), normal(B, T, H * K)
    shape = {"none": (), "head": (B, T, H), "key": (B, T, H, K)}[decay]
    log_decay = -0.1 * jnp.abs(normal(*shape)) if shape else None
    qkv = normal(B, T, H, K), ops.unit(normal(B, T, H, K)), normal(B, T, H, K)
    return (*qkv, log_decay) if op == "linear_attention" else (*qkv, jax.nn.sigmoid(normal(B, T, H)), log_decay)


def forward(op: str, impl: str) -> Callable[..., Any]:
    return lambda *args: getattr(ops, op)(*args, impl=impl)[0]


def forward_backward(op: str, impl: str) -> Callable[..., Any]:
    gradient = jax.grad(lambda args: jnp.sum(forward(op, impl)(*args) ** 2))
    return lambda *args: gradient(args)


def compile_all(functions: dict[str, Callable[..., Any]], args: tuple[Any, ...], limit: float) -> tuple[dict, dict]:
    """(compiled programs that fit, temporary bytes of all of them)."""
    compiled = {name: jax.jit(f).lower(*args).compile() for name, f in functions.items()}
    analyses: dict[str, Any] = {name: program.memory_analysis() for name, program in compiled.items()}
    wanted = {name: analysis.temp_size_in_bytes for name, analysis in analyses.items()}
    return {name: program for name, program in compiled.items() if wanted[name] <= limit * 1e9}, wanted


def time_all(compiled: dict[str, Callable[..., Any]], args: tuple[Any, ...], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn so that a change of the machine's speed meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, program in compiled.items():
            for call in range(4):  # the first pays for the caches and pages that the last program took
                begin = time.perf_counter()
                jax.block_until_ready(program(*args))
                if call:
                    seconds[name].append(time.perf_counter() - begin)
                if call and seconds[name][-1] > 0.5:
                    break
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(config: Config, op: str, decay: str, H: int, K: int) -> list[dict[str, Any]]:
    forms = sys.modules[f"memzoo.ops.{op}"].FORMS
    rows: list[dict[str, Any]] = []
    before: dict[tuple[str, str], float] = {}
    for T in config.lengths:
        args = arguments(op, decay, config.batch, T, H, K)
        for what, build in (("forward", forward), ("forward+backward", forward_backward)):
            programs = {impl: build(op, impl) for impl in forms}
            compiled, wanted = compile_all(programs, args, config.memory_limit)
            seconds = time_all(compiled, args, config.repeats)
            for impl in forms:
                row = {"op": op, "decay": decay, "H": H, "K": K, "T": T, "what": what, "impl": impl}
                row["bytes"] = wanted[impl]
                if impl in seconds:
                    per_token = seconds[impl] / T
                    row["us_per_token"] = round(1e6 * per_token, 3)
                    row["times_scan"] = round(seconds["scan"] / seconds[impl], 2) if "scan" in seconds else None
                    row["growth"] = round(per_token / before[what, impl], 2) if (what, impl) in before else None
                    before[what, impl] = per_token
                rows.append(row)
                print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    name = f"{row['op']}, decay {row['decay']}, H={row['H']}, K=V={row['K']}, T={row['T']:,}, {row['what']}"
    memory = f"{row['bytes'] / 1e6:,.0f} MB"
    if "us_per_token" not in row:
        tqdm.write(f"{name:76} {row['impl']:12} left out: wants {memory}")
        return
    times = f"{row['times_scan']:.2f} x scan" if row["times_scan"] else "(no scan)"
    growth = f"growth {row['growth']:.2f}" if row["growth"] else ""
    tqdm.write(f"{name:76} {row['impl']:12} {row['us_per_token']:9.2f} us/token {times:>14} {memory:>10} {growth}")


def measure_layers(config: Config) -> list[dict[str, Any]]:
    """Whole layers at B = 4, T = 1,024, forward and backward, beside memax's of the same width and state size."""
    try:
        import equinox
        from memax.equinox.semigroups import fart, gdn, lru
    except ImportError:
        tqdm.write("memax is not installed: layers are not compared")
        return []
    rows = []
    peers = {"gated_deltanet": gdn.GDN, "linear_attention": fart.FART, "lru": lru.LRU}
    B, T = config.batch, 1024
    for (name, peer), size in ((pair, size) for pair in peers.items() for size in config.sizes):
        x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, size)), jnp.float32)
        fields = {} if name == "lru" else {"heads": 1, "key_dim": size, "value_dim": size}
        ours = memzoo.make(name, width=size, **fields)
        params = jax.jit(ours.init)(jax.random.key(0), x_BTD)
        theirs = peer(hidden_size=size, recurrent_size=size, key=jax.random.key(0))
        weights, rest = equinox.partition(theirs, equinox.is_inexact_array)
        start_T = jnp.zeros(T, bool)

        def our_loss(params, x_BTD, ours=ours):
            return jnp.sum(ours.apply(params, x_BTD)[0] ** 2)

        def their_loss(weights, x_BTD, rest=rest, start_T=start_T):
            layer = equinox.combine(weights, rest)
            row = lambda x_TD: layer(layer.initialize_carry(), (x_TD, start_T))[1]
            return jnp.sum(jax.vmap(row)(x_BTD) ** 2)

        grad = lambda f: jax.grad(f, argnums=(0, 1))
        programs: dict[str, Callable[..., Any]] = {}
        wanted: dict[str, int] = {}
        for who, f, p in (("memzoo", our_loss, params), ("memax", their_loss, weights)):
            fits, bytes_of = compile_all({who: grad(f)}, (p, x_BTD), 4 * config.memory_limit)
            wanted |= bytes_of
            if who in fits:
                programs[who] = lambda x, run=fits[who], p=p: run(p, x)
        seconds = time_all(programs, (x_BTD,), config.repeats)
        row = {"layer": name, "width": size, "state": size, "T": T, "what": "forward+backward", "bytes": wanted}
        if len(seconds) == 2:
            row["times_memax"] = round(seconds["memax"] / seconds["memzoo"], 1)
            row["ms"] = {who: round(1e3 * s, 1) for who, s in seconds.items()}
        rows.append(row)
        tqdm.write(f"layer {name}, width and state {size}: {row.get('times_memax')} x memax {row.get('ms')}")
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time per token against T, a panel per op, decay, H and K; forward dashed."""
    panels = list(dict.fromkeys((r["op"], r["decay"], r["H"], r["K"]) for r in rows if "op" in r))
    figure = Figure(figsize=(4 * min(4, len(panels)), 3 * -(-len(panels) // 4)), layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 4), min(4, len(panels)), index + 1)
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for r in rows:
            if "us_per_token" in r and (r["op"], r["decay"], r["H"], r["K"]) == panel:
                lines.setdefault((r["impl"], r["what"]), []).append((r["T"], r["us_per_token"]))
        for (impl, what), points in lines.items():
            color = f"C{['scan', 'associative', 'chunk'].index(impl)}"
            style = "--" if what == "forward" else "-"
            axes.loglog(*zip(*points, strict=True), style, color=color, marker=".", label=f"{impl}, {what}")
        axes.set(title="{}, decay {}, H={}, K=V={}".format(*panel), xlabel="T", ylabel="us per token")
        if index == 0 and lines:
            axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    contract.positive(batch=config.batch, repeats=config.repeats)
    for op in config.ops:
        if op not in (known := ("linear_scan", "linear_attention", "delta_rule")):
            raise ValueError(f"ops: unknown op {op!r}; {contract.nearest(op, known)}")
    checkpoint.check(config.out, {}, resume=False)
    config.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    tqdm.write(f"jax {jax.__version__}, {jax.device_count()} x {device.device_kind}, {time.strftime('%Y-%m-%d')}")
    rows = measure_layers(config) if config.layers else []
    cases = [
        (op, decay, H, K)
        for op in config.ops
        for decay in (("key",) if op == "linear_scan" else config.decays)
        for H in config.heads
        for K in config.sizes
    ]
    for case in tqdm(cases, unit="case", leave=False):
        rows += measure(config, *case)
        (config.out / "op_speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, config.out / "op_speed.png")
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
