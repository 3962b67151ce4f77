"""How much faster do memories that learn while they read learn by chunks?

    python experiments/memory_speed.py

Every row times one layer, forward and backward, token by token (chunk = 1, its definition) and by chunks of which all
gradients are taken at once, in turn, and prints medians, and how many times as fast the chunks are. `matrix` and
`network` are `ops.memorize` by itself, without a layer's projections, convolutions and norms, which take the same time
however long chunks are: a memory of one matrix and of two, with momentum and decay. Chunks of another size are another
function: what a memory learns of a token is taken where its chunk began. `bytes` is the compiled program's temporary
memory. What wants more than --memory-limit is left out.

Expect on two CPU cores, at 4,096 tokens, chunks of 16 and of 64 so many times as fast as token by token, in a tenth or
less of the memory:

              --heads 1     --heads 4
    network    9.5   18     2.8   5.1
    matrix     9.1   14     3.8   3.6
    titans     8.7   14     3.2   4.9
    ttt_mlp     13   19     4.9   5.4
    yaad       8.5   10     3.0   3.2
    ttt_linear 4.7  6.0     2.0   2.5
    lattice    4.3  5.5     2.9   3.6
    moneta                  2.6   2.6
    memora                  1.6   1.6

(--repeats 3; 5 for network and matrix, 9 for titans with four heads.) Where matrices are small, what a chunk costs is
its many small operations, and a layer's projections. Weights that are no linear function of what is learned (those of
moneta and memora, and the directions of atlas) are made for each token by either form. At 1,024 tokens, with four
heads, dot is 12 and 19 times as fast, omega_net 7.7 and 14.

From 1,024 to 16,384 tokens (`--chunks 16 --lengths 1024 16384 --repeats 5`), time per token grows by 1.07 (lattice),
1.03 (memora), 0.99 (moneta), 0.93 (yaad), 0.77 (ttt_linear), 0.69 (titans), and with `--width 32` by 1.19 (atlas),
1.03 (dot), 0.96 (omega_net). The first calls of a program that wants gigabytes may take ten times as long, until the
system has given it the pages: more repeats leave them out.

`--out` holds memory_speed.jsonl and memory_speed.png.

Dims: B batch, T time, D width, H heads, K key, V value.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from op_speed import compile_all, time_all
from tqdm import tqdm

import memzoo
from memzoo import checkpoint, contract, host, ops
from memzoo.ops.initial import lecun
from memzoo.ops.memory import half_square, mlp

MATRICES = {"matrix": 1, "network": 2}  # of a memory that is timed by itself
NAMES = (*MATRICES, *memzoo.names("test-time memory"))


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/memory_speed")  # a new directory
    names: tuple[str, ...] = ("network", "titans", "ttt_linear", "lattice")
    chunks: tuple[int, ...] = (1, 16, 64)
    lengths: tuple[int, ...] = (1024, 4096)
    width: int = 128
    heads: int = 4
    batch: int = 1
    repeats: int = 3
    memory_limit: float = 8.0  # GB of temporary memory; a program of 9.4 was too much for a machine with 24


def layer(config: Config, name: str, T: int) -> tuple[Callable, tuple]:
    """(chunk, parameters, input) -> y, and the last two."""
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((config.batch, T, config.width)), jnp.float32)
    make = lambda chunk: memzoo.make(name, width=config.width, heads=config.heads, chunk=chunk)
    params = jax.jit(make(config.chunks[0]).init)(jax.random.key(0), x_BTD[:, :1])
    return lambda chunk, params, x_BTD: make(chunk).apply(params, x_BTD)[0], (params, x_BTD)


def alone(config: Config, name: str, T: int) -> tuple[Callable, tuple]:
    """(chunk, weights, the rest) -> y of a memory by itself, and the last two."""
    H, K, keys = config.heads, config.width // config.heads, jax.random.split(jax.random.key(0), 5)
    normal = lambda key, size: jax.random.normal(key, (config.batch, T, H, size))
    q_BTHK, k_BTHK, v_BTHV = ops.unit(normal(keys[0], K)), ops.unit(normal(keys[1], K)), normal(keys[2], K)
    theta_BTH, eta_BTH, alpha_BTH = jnp.moveaxis(jax.nn.sigmoid(normal(keys[3], 3)), -1, 0)
    ends = [K, *[2 * K] * (MATRICES[name] - 1), K]
    A = {str(n): lecun(keys[4], (H, ends[n + 1], ends[n])) for n in range(MATRICES[name])}
    learn = partial(ops.memorize, partial(mlp, MATRICES[name]), half_square)

    gates = ops.Gates(0.02 * (1 - eta_BTH) * theta_BTH, eta_BTH, 0.02 * alpha_BTH)  # with more, a network overshoots
    return lambda chunk, A, told: learn(A, *told, chunk=chunk)[0], (A, (q_BTHK, k_BTHK, v_BTHV, gates))


def measure(config: Config, name: str, T: int) -> list[dict[str, Any]]:
    run, args = (alone if name in MATRICES else layer)(config, name, T)
    loss = lambda chunk, *args: jnp.sum(run(chunk, *args) ** 2)
    programs = {str(chunk): jax.grad(partial(loss, chunk), argnums=(0, 1)) for chunk in config.chunks}
    compiled, wanted = compile_all(programs, args, config.memory_limit)
    for chunk, program in compiled.items():
        if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(program(*args))):
            raise ValueError(f"{name}: expected finite gradients, got others with chunk {chunk}")
    seconds = time_all(compiled, args, config.repeats)
    rows = []
    for chunk in config.chunks:
        row: dict[str, Any] = {"name": name, "width": config.width, "T": T, "chunk": chunk, "bytes": wanted[str(chunk)]}
        if str(chunk) in seconds:
            row["us_per_token"] = round(1e6 * seconds[str(chunk)] / T / config.batch, 2)
            if "1" in seconds:
                row["times_1"] = round(seconds["1"] / seconds[str(chunk)], 2)
        rows.append(row)
        found = f"{row.get('us_per_token', '?')} us/token, {row.get('times_1', '?')} x chunk 1"
        tqdm.write(f"{name}, T={T:,}, chunk {chunk}: {found}, {row['bytes'] / 1e6:,.0f} MB")
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time per token by the chunk, a line for each architecture and length."""
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for name, T in dict.fromkeys((row["name"], row["T"]) for row in rows):
        mine = [row for row in rows if (row["name"], row["T"]) == (name, T) and "us_per_token" in row]
        if mine:
            points = zip(*((row["chunk"], row["us_per_token"]) for row in mine), strict=True)
            axes.loglog(*points, marker=".", label=f"{name}, T = {T:,}")
    axes.set(xlabel="tokens of a chunk", ylabel="us per token, forward + backward")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    contract.positive(width=config.width, heads=config.heads, batch=config.batch, repeats=config.repeats)
    for name in config.names:
        if name not in NAMES:
            raise ValueError(f"names: unknown name {name!r}; {contract.nearest(name, NAMES)}")
    if not config.names or not config.chunks or not config.lengths:
        raise ValueError("names, chunks, lengths: expected at least one of each, got none")
    for field in ("chunks", "lengths"):
        for number in getattr(config, field):
            contract.positive(**{field: number})
    contract.divisible("width", config.width, "heads", config.heads)
    checkpoint.check(config.out, {}, resume=False)
    config.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    tqdm.write(f"jax {jax.__version__}, {device.device_kind}, B={config.batch}, {time.strftime('%Y-%m-%d')}")
    rows: list[dict[str, Any]] = []
    for name, T in tqdm([(name, T) for name in config.names for T in config.lengths], leave=False):
        rows += measure(config, name, T)
        (config.out / "memory_speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, config.out / "memory_speed.png")
    return rows


if __name__ == "__main__":
    host.keep_pages()
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
