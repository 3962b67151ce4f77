"""How many tokens back can a linear readout of a reservoir see? Short-term memory capacity, by delay and in all.

    python experiments/memory_capacity.py

The input is uniform noise, and r^2(k) the squared correlation of the input k tokens ago with what the best linear
readout of `--units` features makes of it, on data that the readout was not solved for. The memory capacity is the sum
over delays k = 0 .. --delays - 1, and for as many features never more than their number.

sequences   Each of --train and --test sequences has --delays tokens, and the readout sees the last state alone: what a
            classifier of sequences does. Here the ring of res_rmn, as long as a sequence as in its paper, holds all.
stream      One long stream, after --delays tokens of washout, as in the papers on memory capacity. Here the ring comes
            around, and adds the new to the old without end.

Reservoirs that are nearly linear have more capacity, so that the input scale is one for all; alpha and beta of res_esn
are those that the authors of the residual network publish for this task. The readout is ridge regression in float64.

The defaults took 224 seconds for the sequences and 45 for the stream on two CPU cores shared with other work. Expect,
as means of three seeds, at most 100 being possible:

sequences   24 for esn, 26 for its five layers of 20 units, for onion_esn and for res_esn with the identity; 98 for
            res_esn with a random residual, 100 with a cyclic one, 58 for five layers of it. So orthogonal residuals do
            boost memory capacity, as their authors say; depth, at equal size, does not. res_rmn has 95, less than
            res_esn, but it alone sees as far as its ring is long: 40 of them are of delays from 100 on, against 0 to
            3, with an r^2 of 0.3 to 0.5 from delay 40 to the last, where the others see nothing beyond 30, or 110.
stream      the same within 3, but for res_rmn: 10, as each place of its ring is the sum of all inputs that ever were
            there. Its claim is one for sequences no longer than its ring.

`--parts stream` asks one alone. `--out` holds memory_capacity.jsonl (a line per reservoir and seed), table.md, and a
plot of each part.

Dims: B sequences, T time, D width of a layer's input, F features, K delays.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import memzoo
from memzoo import checkpoint, contract
from memzoo.learners import ridge

CLAIMS = (
    "Deep Residual Echo State Networks (2025), abstract: residual layers significantly boost memory capacity over "
    "shallow and deep reservoirs. Residual Reservoir Memory Networks (2025): a linear ring enhances long-term "
    "propagation of the input."
)
Part = Literal["sequences", "stream"]
PARTS: tuple[Part, ...] = ("sequences", "stream")


@dataclass(frozen=True)
class Config:
    parts: tuple[Part, ...] = PARTS
    out: Path = Path("runs/memory_capacity")  # a new directory
    units: int = 100  # features, of all layers together
    delays: int = 200  # K, the length of a sequence, and of the ring of res_rmn
    train: int = 2000  # sequences
    test: int = 1000
    train_tokens: int = 20_000  # of the stream
    test_tokens: int = 10_000
    input_scale: float = 0.25
    penalty: float = 1e-10  # times the mean square of the features
    piece: int = 250  # sequences, or tokens of the stream, at a time
    seeds: int = 3


def reservoirs(config: Config) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Their layers, each the name of a mixer and its fields. Each layer is fed by the features of the one before."""
    random, cyclic = {"alpha": 0.95, "beta": 0.01}, {"alpha": 0.95, "beta": 1e-4, "residual": "cyclic"}
    ring = {"memory_units": config.delays, "memory_input_scale": config.input_scale, "memory_scale": 0.1}

    def deep(name, fields, layers=5):
        units = contract.divisible("units", config.units, "layers", layers)
        return [
            (name, {"units": units, "input_scale": 1.0 if i else config.input_scale, **fields}) for i in range(layers)
        ]

    return {
        "esn": deep("esn", {}, 1),
        "esn, leak 0.5": deep("esn", {"leak": 0.5}, 1),
        "esn, 5 layers": deep("esn", {}),
        "onion_esn": deep("onion_esn", {}, 1),
        "res_esn, identity": deep("res_esn", {"alpha": 0.01, "beta": 1.1, "residual": "identity"}, 1),
        "res_esn, random": deep("res_esn", random, 1),
        "res_esn, cyclic": deep("res_esn", cyclic, 1),
        "res_esn, random, 5 layers": deep("res_esn", random),
        "res_rmn, random": deep("res_rmn", random | ring, 1),
        "res_rmn, cyclic": deep("res_rmn", cyclic | ring, 1),
    }


Layers = tuple[Any, ...]  # mixers; a static argument of what is compiled


def build(layers: list[tuple[str, dict[str, Any]]]) -> Layers:
    widths = [1, *(fields["units"] for _, fields in layers)]
    wide: dict[str, Any] = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    pairs = zip(widths, layers, strict=False)
    return tuple(memzoo.make(name, width=width, **fields, **wide) for width, (name, fields) in pairs)


@partial(jax.jit, static_argnums=0)
def draw(layers: Layers, key: jax.Array) -> list[Any]:
    """Their variables."""
    keys = jax.random.split(key, len(layers))
    return [layer.init(key, jnp.zeros((1, 1, layer.width))) for layer, key in zip(layers, keys, strict=True)]


@partial(jax.jit, static_argnums=(0, 3))
def features(layers: Layers, variables: list[Any], x_BT: jax.Array, last: bool, states: list[Any] | None = None) -> Any:
    """The features of all layers, [B, T, F], or [B, F] of the last token, and their states."""
    found, after, x_BTD = [], [], x_BT[..., None]
    for i, layer in enumerate(layers):
        (_, state), seen = layer.apply(variables[i], x_BTD, states and states[i], mutable=["intermediates"])
        (x_BTD,) = seen["intermediates"]["features"]
        found.append(x_BTD[:, -1] if last else x_BTD)
        after.append(state)
    return jnp.concatenate(found, axis=-1), after


update = jax.jit(ridge.update)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.uniform(-0.8, 0.8, shape)


def of_sequences(config: Config, rng: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    """x_BT in pieces, `count` sequences in all."""
    for at in range(0, count, config.piece):
        yield noise(rng, min(config.piece, count - at), config.delays)


def sequences(config: Config, layers: Layers, variables: list[Any], x_pieces: Iterator[np.ndarray]) -> ridge.Sums:
    """What the last state has to do with the inputs k tokens before it."""
    sums = ridge.init(config.units, config.delays, jnp.float64)
    for x_BT in x_pieces:
        sums = update(sums, features(layers, variables, x_BT, True)[0], x_BT[:, ::-1])
    return sums


def stream(config: Config, layers: Layers, variables: list[Any], x_T: np.ndarray) -> ridge.Sums:
    """What each state after the washout has to do with the inputs k tokens before it, piece by piece."""
    K, tokens = config.delays, len(x_T)
    sums = ridge.init(config.units, K, jnp.float64)
    _, states = features(layers, variables, x_T[None, :K], False)
    for at in range(K, tokens, config.piece):
        end = min(at + config.piece, tokens)
        features_BTF, states = features(layers, variables, x_T[None, at:end], False, states)
        before_TK = np.lib.stride_tricks.sliding_window_view(x_T, K)[at - K + 1 : end - K + 1, ::-1]
        sums = update(sums, features_BTF[0], before_TK)
    return sums


def curve(config: Config, part: str, layers: Layers, variables: list[Any], seed: int) -> np.ndarray:
    """r^2 by delay, [K]. Reservoirs of one seed see the same input, and their readouts are tested on another."""
    rng = np.random.default_rng(seed)
    if part == "sequences":
        counts = config.train, config.test
        train, test = (sequences(config, layers, variables, of_sequences(config, rng, count)) for count in counts)
    else:
        counts = config.train_tokens, config.test_tokens
        train, test = (stream(config, layers, variables, noise(rng, config.delays + count)) for count in counts)
    penalty = config.penalty * jnp.mean(jnp.diag(train.square_FF))
    kernel_FK, _ = ridge.solve(train, penalty)
    return np.asarray(ridge.explained(test, kernel_FK))


def reach(r2_K: np.ndarray) -> int:
    """How many delays, from 0 on, are recalled better than not: r^2 >= 1/2."""
    below = np.flatnonzero(r2_K < 0.5)
    return int(below[0]) if below.size else len(r2_K)


def table(config: Config, rows: list[dict[str, Any]]) -> str:
    """Markdown: for each part and reservoir, means over the seeds."""
    text = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}, {config.seeds} seeds, "
    text += f"{config.units} features, delays 0 to {config.delays - 1}\n\n{CLAIMS}\n"
    for part in config.parts:
        columns = f"memory capacity | +- | of delays >= {config.units} | delays with r^2 >= 1/2 | radius"
        text += f"\n## {part}\n\n| reservoir | {columns} |\n|---|{'---:|' * 5}\n"
        for name, mine in by_name(rows, part).items():
            total = [row["capacity"] for row in mine]
            far, delays, radius = (np.mean([row[key] for row in mine]) for key in ("far", "reach", "radius"))
            text += (
                f"| {name} | {np.mean(total):.1f} | {np.std(total):.1f} | {far:.1f} | {delays:.0f} | {radius:.3f} |\n"
            )
    return text


def by_name(rows: list[dict[str, Any]], part: str) -> dict[str, list[dict[str, Any]]]:
    mine = [row for row in rows if row["part"] == part]
    return {
        name: [row for row in mine if row["reservoir"] == name] for name in dict.fromkeys(r["reservoir"] for r in mine)
    }


def plot(config: Config, rows: list[dict[str, Any]], part: str) -> None:
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, mine in by_name(rows, part).items():
        axes.plot(np.mean([row["r2"] for row in mine], axis=0), label=name, linewidth=1)
    axes.set(xlabel="delay", ylabel="r^2", ylim=(0, 1.02), title=part)
    axes.legend(fontsize="x-small")
    figure.savefig(config.out / f"{part}.png")


def main(config: Config) -> list[dict[str, Any]]:
    sizes = ("units", "delays", "train", "test", "train_tokens", "test_tokens", "piece", "seeds")
    contract.positive(**{name: getattr(config, name) for name in sizes})
    if not config.parts:
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got none")
    if not config.penalty > 0:
        raise ValueError(f"penalty: expected a number > 0, got {config.penalty}")
    kinds = reservoirs(config)
    checkpoint.check(config.out, {}, resume=False)
    config.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with jax.enable_x64(True):
        for part in config.parts:
            for name, seed in tqdm([(name, seed) for name in kinds for seed in range(config.seeds)], desc=part):
                begin = time.perf_counter()
                layers = build(kinds[name])
                variables = draw(layers, jax.random.key(seed))
                r2_K = curve(config, part, layers, variables, seed)
                conditions = [layer.echo_state(own) for layer, own in zip(layers, variables, strict=True)]
                radius = max(float(jnp.max(condition.radius)) for condition in conditions)
                row = {"part": part, "reservoir": name, "seed": seed, "capacity": float(r2_K.sum())}
                row |= {
                    "far": float(r2_K[config.units :].sum()),
                    "reach": reach(r2_K),
                    "radius": radius,
                    "r2": [round(float(r2), 5) for r2 in r2_K],
                }
                rows.append(row | {"seconds": round(time.perf_counter() - begin, 1)})
                lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
                (config.out / "memory_capacity.jsonl").write_text("".join(lines))
            plot(config, rows, part)
    (config.out / "table.md").write_text(table(config, rows))
    print((config.out / "table.md").read_text())
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
