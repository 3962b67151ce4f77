"""Where does Newton's method beat the loop over tokens? Nonlinear recurrences, their time and iterations, by length.

python experiments/newton_speed.py --out runs/newton_speed                                      # on an accelerator
python experiments/newton_speed.py --lengths 256 1024 4096 --states 8 32 --out runs/newton_cpu  # on two CPU cores

Every row times `newton` and `scan` of one architecture in turn, as initialised, on noise, and prints medians, how many
times as fast as the loop Newton's method is (below 1 it is slower), and the iterations it took. The loop's time is
bound by the number of tokens, each of which waits for the one before; an iteration's by how much is computed: for a
state of X channels T matrices [X, X] multiplied in log T rounds, or, beyond 64 channels to a block, T vectors, and then
more iterations. So newton can win where states are small, T is long, and the machine has more to compute with than one
token needs; two CPU cores have not: there, by the second command, forward and backward, it is slower everywhere, 0.10
to 0.46 times as fast with 8 channels (sLSTM 0.03 to 0.05), 0.02 to 0.07 with 32, in 4 to 9 iterations. It was not run
on an accelerator. A form that wants more than --memory-limit, or, from what shorter ones took, more than --time-limit
for a call, is left out.

`--out` holds newton_speed.jsonl and newton_speed.png.

Dims: B batch, T time, D width, X state channels.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from op_speed import compile_all, time_all
from tqdm import tqdm

import memzoo
from memzoo import checkpoint, contract, ops

FORMS = ("scan", "newton")
WIDTH = 16
# Fields that make a state of X channels: two for each hidden unit, or four, in heads of up to 8 units.
FIELDS = {
    "gru": lambda X: {"width": WIDTH, "hidden": X},
    "lstm": lambda X: {"width": WIDTH, "hidden": X // 2},
    "slstm": lambda X: {"width": X // 4, "heads": max(1, X // 32)},
    "lem": lambda X: {"width": WIDTH, "hidden": X // 2},
    "elm": lambda X: {"width": WIDTH, "memories": X},
}


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/newton_speed")  # a new directory
    names: tuple[str, ...] = tuple(FIELDS)
    states: tuple[int, ...] = (8, 16, 32, 64, 128, 256)  # X, multiples of 4, and of 32 above it
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    batch: int = 1
    jacobian: str = "auto"  # see ops.newton_scan
    repeats: int = 3
    memory_limit: float = 6.0  # GB of temporary memory
    time_limit: float = 10.0  # seconds of one call


def with_iterations(mixer: Any) -> Any:
    """(params, x_BTD) -> (y_BTD, iterations), of a mixer whose form is newton: it keeps them to itself."""

    def apply(params, x_BTD):
        taken = []

        def nonlinear_scan(step, h_BX, xs, reset_BT=None, *, impl, **how):
            *states, iterations = ops.newton_scan(step, h_BX, xs, reset_BT, **how)
            taken.append(iterations)
            return states

        with mock.patch.object(ops, "nonlinear_scan", nonlinear_scan):
            y_BTD, _ = mixer.apply(params, x_BTD)
        return y_BTD, taken[0]

    return apply


def measure(config: Config, name: str, X: int) -> list[dict[str, Any]]:
    forms = {impl: memzoo.make(name, impl=impl, jacobian=config.jacobian, **FIELDS[name](X)) for impl in FORMS}
    D = forms["scan"].width
    params = jax.jit(forms["scan"].init)(jax.random.key(0), jnp.zeros((1, 1, D)))
    rows: list[dict[str, Any]] = []
    slowest: dict[tuple[str, str], float] = {}  # seconds per token of the length before
    for T in config.lengths:
        shape, compiled = (config.batch, T, D), {}
        for what in ("forward", "forward+backward"):
            allowed = [impl for impl in forms if slowest.get((what, impl), 0) * T <= config.time_limit]
            functions = {impl: function(forms[impl], impl, what) for impl in allowed}
            args: tuple[Any, Any] = params, jax.ShapeDtypeStruct(shape, jnp.float32)
            compiled[what], wanted = compile_all(functions, args, config.memory_limit)
            if compiled[what]:
                args = params, np.random.default_rng(0).standard_normal(shape, np.float32)
            seconds = time_all(compiled[what], args, config.repeats)
            slowest |= {(what, impl): s / T for impl, s in seconds.items()}
            row: dict[str, Any] = {"name": name, "state": X, "T": T, "what": what}
            row["left_out"] = [impl for impl in forms if impl not in seconds]
            row["ms"] = {impl: round(1e3 * s, 3) for impl, s in seconds.items()}
            row["megabytes"] = {impl: round(1e-6 * size, 1) for impl, size in wanted.items()}
            if len(seconds) == 2:
                row["times_scan"] = round(seconds["scan"] / seconds["newton"], 3)
            if "newton" in compiled["forward"]:
                row["iterations"] = int(compiled["forward"]["newton"](*args)[1])
            rows.append(row)
            print_row(row)
    return rows


def function(mixer: Any, impl: str, what: str) -> Any:
    forward = with_iterations(mixer) if impl == "newton" else mixer.apply
    if what == "forward":
        return forward
    return jax.grad(lambda params, x_BTD: jnp.sum(forward(params, x_BTD)[0] ** 2), argnums=(0, 1))


def print_row(row: dict[str, Any]) -> None:
    name = f"{row['name']}, {row['state']} channels, T={row['T']:,}, {row['what']}"
    times = ", ".join(f"{impl} {ms:,.2f} ms" for impl, ms in row["ms"].items())
    ratio = f"newton is {row['times_scan']:.2f} x scan" if "times_scan" in row else f"left out: {row['left_out']}"
    tqdm.write(f"{name:50} {times:40} {ratio}, {row.get('iterations')} iterations")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times as fast as scan newton is, by T, and the iterations, a column per architecture."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(3 * len(names), 6), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, squeeze=False)
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["what"] == "forward+backward":
            lines.setdefault((row["name"], row["state"]), []).append(row)
    for (name, X), own in lines.items():
        column = names.index(name)
        for i, key in enumerate(("times_scan", "iterations")):
            points = [(row["T"], row[key]) for row in own if key in row]
            if points:
                axes[i, column].loglog(*zip(*points, strict=True), marker=".", label=f"{X} channels")
    for column, name in enumerate(names):
        axes[0, column].axhline(1, color="grey", linewidth=0.5)
        axes[0, column].set(title=name)
        axes[1, column].set(xlabel="T")
    axes[0, 0].set(ylabel="times as fast as scan, forward + backward")
    axes[1, 0].set(ylabel="iterations")
    axes[0, 0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    contract.positive(batch=config.batch, repeats=config.repeats)
    if not config.names or not config.lengths or not config.states:
        raise ValueError("names, lengths, states: expected at least one of each, got none")
    for T in config.lengths:
        contract.positive(lengths=T)
    for X in config.states:
        if X < 4 or X % (32 if X > 32 else 4):
            raise ValueError(f"states: expected a multiple of 4, and of 32 above it, got {X}")
    for name in config.names:
        if name not in FIELDS:
            raise ValueError(f"names: unknown name {name!r}; {contract.nearest(name, FIELDS)}")
    ops.check_jacobian(config.jacobian)
    checkpoint.check(config.out, {}, resume=False)
    config.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    tqdm.write(f"jax {jax.__version__}, {device.device_kind}, B={config.batch}, {time.strftime('%Y-%m-%d')}")
    rows: list[dict[str, Any]] = []
    for name, X in tqdm([(name, X) for name in config.names for X in config.states], leave=False):
        rows += measure(config, name, X)
        (config.out / "newton_speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, config.out / "newton_speed.png")
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
