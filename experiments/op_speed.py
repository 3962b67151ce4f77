"""How fast is each form of each op, each architecture, and a layer beside a peer's? Ratios of one run, never times.

python experiments/op_speed.py --out runs/op_speed             # everything below
python experiments/op_speed.py --ops delta_rule --lengths 1024 4096 --sizes 128 --heads 1 --out runs/quick

Every row times all forms of one op in turn, A B C A B C ..., and prints medians, and how many times faster than `scan`.
A form whose compiled program wants more than --memory-limit (four times that beside a peer) is left out, with what it
would want. `bytes` is that program's temporary memory; `growth` is time per token at this length over that at the
length before. `multiply`, beside linear_scan, is a_t x_t alone: what memory takes, and how that grows.
Architectures are at their defaults, beside linear_attention with a state of the same size; their growth is time per
token at 16,384 over that at 1,024. `--architectures` without names leaves them out.

Temporaries of more than 32 MB cost page faults at every call, which at T = 16,384 is most of the time of what does
little per token. `--keep-pages` measures without (see memzoo.host).

Expect on two CPU cores, of layers at T = 1,024, gated_deltanet 25 to 33 times as fast as memax (width 64) and 51 to 58
(128; once 152), linear_attention 21 to 23 and 54 to 62, lru 4 to 5; much of the peer's time is page faults, and with
--keep-pages the first two are 15 and 28, 9 and 24. Growth is up to 3.4 with page faults, from which `multiply` suffers
most (7); of what was measured without them, at most 1.3, but for lru, 1.7, hax, 1.4, titans, 1.0 to 1.5 from run to
run, and from 1,024 to 16,384 linear_scan, up to 2.4: what fits the caches at 1,024 waits for memory at 16,384, and so
does `multiply`, up to 2. At 16,384, time over that of linear_attention with as large a state: hax 0.2, rat 1.1, based
1.3, lizard, hgrn2 2.1, gam 2.2, jrt 2.7, liger 3.0, aaren 3.2, mlstm 3.8, block_linear, spiking_gla 4.2, lightning 4.6,
rwkv7 4.8, ttt_linear 5.0, titans 5.6 to 9.6, kda 9.0, delta_product 11.5, mom 13.8, causal_rn 15.6.
Layers are compared with memax 0.1.1 (`pip install memax==0.1.1 equinox`) where it is installed.
"""

import functools
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
from memzoo import checkpoint, contract, host, ops

OPS = ("linear_scan", "linear_attention", "delta_rule")
DECAYS = ("none", "head", "key")


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/op_speed")  # a new directory: op_speed.jsonl, op_speed.png
    ops: tuple[str, ...] = OPS
    decays: tuple[str, ...] = ("head",)  # of linear_attention and delta_rule: none, head, key
    batch: int = 4
    heads: tuple[int, ...] = (1, 4)
    sizes: tuple[int, ...] = (64, 128)  # K = V
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    layers: bool = True  # compare layers with memax, where it is installed
    repeats: int = 5
    memory_limit: float = 6.0  # GB of temporary memory
    architectures: tuple[str, ...] = memzoo.names()
    width: int = 64  # of the architectures
    growth: tuple[int, int] = (1024, 16384)  # two lengths
    keep_pages: bool = False  # see memzoo.host: time without what the system takes to hand out memory


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
    if impl == "multiply":
        return jnp.multiply
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

    def call(program) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(program(*args))
        return time.perf_counter() - begin

    for _ in range(repeats):
        for name, program in compiled.items():
            warm = 0.0  # uncounted: for some 0.2 s a program pays for caches and pages that the one before it took
            while warm < 0.3:
                warm += call(program)
            for _ in range(3):
                seconds[name].append(call(program))
                if seconds[name][-1] > 0.5:
                    break
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(config: Config, op: str, decay: str, H: int, K: int) -> list[dict[str, Any]]:
    forms = (*sys.modules[f"memzoo.ops.{op}"].FORMS, *(["multiply"] if op == "linear_scan" else []))
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


def measure_architecture(config: Config, name: str) -> list[dict[str, Any]]:
    """At its defaults, forward and backward, in turn with linear_attention of one head with a state as large."""
    mixer = memzoo.make(name, width=config.width)
    size = max(1, round(state_floats(mixer) ** 0.5))
    peer = memzoo.make("linear_attention", width=config.width, heads=1, key_dim=size, value_dim=size)
    programs: dict[str, Callable[..., Any]] = {}
    wanted: dict[str, int] = {}
    for who, layer in (("it", mixer), ("peer", peer)):
        loss = lambda params, x_BTD, layer=layer: jnp.sum(layer.apply(params, x_BTD)[0] ** 2)
        for T in config.growth:
            x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((config.batch, T, config.width)), jnp.float32)
            params = jax.jit(layer.init)(jax.random.key(0), x_BTD[:, :1])
            gradient = {f"{who} {T}": jax.grad(loss, argnums=(0, 1))}
            fits, bytes_of = compile_all(gradient, (params, x_BTD), config.memory_limit)
            wanted |= bytes_of
            programs |= {key: functools.partial(program, params, x_BTD) for key, program in fits.items()}
    seconds = time_all(programs, (), config.repeats)
    rows: list[dict[str, Any]] = []
    for T in config.growth:
        row: dict[str, Any] = {"architecture": name, "width": config.width, "T": T, "bytes": wanted[f"it {T}"]}
        row |= {"state_floats": state_floats(mixer), "peer_floats": state_floats(peer)}
        if f"it {T}" in seconds and f"peer {T}" in seconds:
            row["us_per_token"] = round(1e6 * seconds[f"it {T}"] / T, 2)
            row["times_linear_attention"] = round(seconds[f"it {T}"] / seconds[f"peer {T}"], 2)
            before = rows[0].get("us_per_token") if rows else None
            row["growth"] = round(row["us_per_token"] / before, 2) if before else None
        rows.append(row)
        found = ", ".join(f"{key} {row.get(key)}" for key in ("us_per_token", "times_linear_attention", "growth"))
        tqdm.write(f"{name:16} {row['state_floats']:7,} floats, T={T:6,}: {found}, {row['bytes'] / 1e6:,.0f} MB")
    return rows


def state_floats(mixer: Any) -> int:
    """Real numbers in the state of one row; two for a complex one."""
    state = jax.tree.leaves(jax.eval_shape(lambda: mixer.initial_state(1)))
    return sum(s.size * (1 + jnp.iscomplexobj(s)) for s in state if jnp.issubdtype(s.dtype, jnp.inexact))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time per token against T, a panel per op, decay, H and K; forward dashed."""
    panels = list(dict.fromkeys((r["op"], r["decay"], r["H"], r["K"]) for r in rows if "op" in r))
    figure = Figure(figsize=(4 * min(4, len(panels)), 3 * -(-len(panels) // 4)), layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 4), min(4, len(panels)), index + 1)
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for r in rows:
            if "us_per_token" in r and "op" in r and (r["op"], r["decay"], r["H"], r["K"]) == panel:
                lines.setdefault((r["impl"], r["what"]), []).append((r["T"], r["us_per_token"]))
        for (impl, what), points in lines.items():
            color = f"C{['scan', 'associative', 'chunk', 'sweep', 'multiply'].index(impl)}"
            style = "--" if what == "forward" else "-"
            axes.loglog(*zip(*points, strict=True), style, color=color, marker=".", label=f"{impl}, {what}")
        axes.set(title="{}, decay {}, H={}, K=V={}".format(*panel), xlabel="T", ylabel="us per token")
        if index == 0 and lines:
            axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    contract.positive(batch=config.batch, repeats=config.repeats, width=config.width)
    for field in ("heads", "sizes", "lengths", "growth"):
        for number in getattr(config, field):
            contract.positive(**{field: number})
    for name in config.architectures:
        memzoo.make(name, width=config.width)  # refuses an unknown one, and a width that its heads do not divide
    for field, known in (("ops", OPS), ("decays", DECAYS)):
        for name in getattr(config, field):
            if name not in known:
                raise ValueError(f"{field}: unknown {field[:-1]} {name!r}; {contract.nearest(name, known)}")
    checkpoint.check(config.out, {}, resume=False)
    if config.keep_pages and not host.keep_pages():
        raise ValueError("keep_pages: expected a system whose C library is glibc")
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
    write = lambda: (config.out / "op_speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write()
    for name in tqdm(config.architectures, unit="architecture", leave=False):
        rows += measure_architecture(config, name)
        write()
    for case in tqdm(cases, unit="case", leave=False):
        rows += measure(config, *case)
        write()
    if config.ops:
        plot(rows, config.out / "op_speed.png")
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
