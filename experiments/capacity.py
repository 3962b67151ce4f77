"""How many random pairs does a memory store and read back? By its size, what it descends, its features and its depth.

    python experiments/capacity.py

Keys are uniform on the sphere of d channels, values on another. A memory reads n pairs, `--passes` times over, and then
is asked for all of them. A pair is read back if what comes has a cosine of 0.9 or more with its value, whatever its
length; the capacity is the n at which three in four are. There is no training: the memories are those of
`memzoo.ops.memorize`, learn at chunk 1, and start at 0, or a network at random.

matrix, dot product     linear attention: values are added up
matrix, l2              the delta rule
matrix, window of 8     the Omega rule: the loss of 8 pairs with each token
degree 2, degree 3      a matrix and l2, behind all monomials of that degree
network                 two matrices, 4 d hidden units, SiLU between, l2
network, Muon           the same, with momentum 0.9 through Newton-Schulz

Each has the best of three sizes of step at each d. The defaults took 65 seconds on two CPU cores shared with others.
Expect, for d = 6, 9, 13:

20 passes   6, 10, 13 pairs for the delta rule, which is d, and as many for the Omega rule; 22, 46, 96 and 55, 153, 409
            behind degrees 2 and 3, which is near to the d (d + 1) / 2 and d (d + 1) (d + 2) / 6 features, and grows as
            d^1.9 and d^2.6; 3 for linear attention, whatever d. The network, of 8 d^2 weights, has 12, 16, 18, and 17,
            23, 27 with Muon: more than the matrix, and what it lacks is time: of 30 passes 16, 23, 27, and 21, 25, 51.
1 pass      3, 2, 3 for linear attention and 4, 3, 4 for the delta rule; only features help, 5, 8, 20 and 10, 28, 70,
            as alike keys become less alike behind them. The network learns hardly anything from one pass.

`--out` holds capacity.jsonl (a line per memory, d and pass), table.md, curves.png and capacity.png.

Dims: B runs, T pairs, K key, V value, N features, D sizes, G numbers of pairs.
"""

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from memzoo import checkpoint, contract
from memzoo.ops import Gates, Rule, memorize, unit
from memzoo.ops.memory import dense, half_square, mlp
from memzoo.ops.newton_schulz import newton_schulz
from memzoo.ops.polynomial import polynomial, size

CLAIMS = (
    "ATLAS (2025), abstract and sec. 3: capacity is bounded by the architecture and the feature mapping; O(d) for a "
    "matrix and l2, O(d^p) behind polynomials of degree p, more for deep memories; windows and Muon manage it better."
)


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/capacity")  # a new directory
    dims: tuple[int, ...] = (6, 9, 13)  # d, of keys and of values
    passes: int = 20  # over all pairs; also measured after the first
    counts: int = 12  # G, numbers of pairs tried
    seeds: int = 4
    cosine: float = 0.9
    share: float = 0.75
    seed: int = 0


class Memory(NamedTuple):
    steps: tuple[float, ...]  # sizes of step that are tried
    most: float = 2.0  # the largest number of pairs, in features
    degree: int = 1
    hidden: int = 0  # units for each channel; 0 for a matrix
    window: int = 1
    objective: str = "l2"
    muon: bool = False


MEMORIES = {
    "matrix, dot product": Memory((1.0,), objective="dot"),
    "matrix, l2": Memory((0.3, 0.6, 1.0)),
    "matrix, window of 8": Memory((0.1, 0.2, 0.4), window=8),
    "degree 2": Memory((0.3, 0.6, 1.0), most=1.5, degree=2),
    "degree 3": Memory((0.3, 0.6, 1.0), most=1.2, degree=3),
    "network": Memory((0.3, 1.0, 2.0), most=8.0, hidden=4),
    "network, Muon": Memory((0.01, 0.03, 0.05), most=8.0, hidden=4, muon=True),
}
OBJECTIVES = {
    "l2": half_square,
    "dot": lambda y_V, v_V: -jnp.vdot(y_V, v_V),
}


def numbers(memory: Memory, d: int, G: int) -> np.ndarray:
    """n_G, numbers of pairs, from 2 to the most."""
    return np.unique(np.geomspace(2, max(3, memory.most * features(memory, d)), G).round().astype(int))


def features(memory: Memory, d: int) -> int:
    """Of one degree alone."""
    return size(d, memory.degree) - size(d, memory.degree - 1)


def begin(memory: Memory, key: jax.Array, d: int) -> dict[str, jax.Array]:
    """A_0: zeros, or for a network a draw that keeps the length of its input."""
    N = features(memory, d)
    ends = [N, memory.hidden * d, d] if memory.hidden else [N, d]
    shapes = {str(i): (1, ends[i + 1], ends[i]) for i in range(len(ends) - 1)}
    scale = 1.0 if memory.hidden else 0.0
    keys = jax.random.split(key, len(shapes))
    return {n: scale * jax.random.normal(k, s) * s[2] ** -0.5 for (n, s), k in zip(shapes.items(), keys, strict=True)}


@partial(jax.jit, static_argnums=(0, 1))
def learn(memory: Memory, d: int, A: Any, k_BTN: jax.Array, v_BTV: jax.Array, n_B: jax.Array, step: Any, state: Any):
    """One pass over the first n pairs of each run: (state, cosine_BT of what is read with the values)."""
    layers = 2 if memory.hidden else 1
    there_BT1 = (jnp.arange(k_BTN.shape[1]) < n_B[:, None])[..., None]
    one_BT1 = there_BT1.astype(k_BTN.dtype)
    gates = Gates(step * one_BT1, gamma_BTH=one_BT1)
    if memory.muon:
        gates = Gates(one_BT1, jnp.where(there_BT1, 0.9, 1.0), rate_BTH=step * one_BT1, gamma_BTH=one_BT1)
    rule = Rule(newton_schulz if memory.muon else None, window=memory.window)
    k_BTHN, v_BTHV = k_BTN[:, :, None], v_BTV[:, :, None]
    told = partial(mlp, layers), OBJECTIVES[memory.objective], A, k_BTHN, k_BTHN, v_BTHV, gates, state
    _, state = memorize(*told, rule=rule)
    read = lambda W, k_TN: mlp(layers, dense({name: A[name][0] + w[0] for name, w in W.items()}), k_TN)
    return state, jnp.sum(unit(jax.vmap(read)(state.A, k_BTN)) * v_BTV, axis=-1)


def pairs(config: Config, memory: Memory, d: int, T: int) -> tuple[jax.Array, jax.Array]:
    """k_STN and v_STV for each seed; the keys behind the features, and of length 1."""
    rng = np.random.default_rng(config.seed)
    k_STK, v_STV = (unit(jnp.asarray(rng.normal(size=(config.seeds, T, d)), jnp.float32), 1e-12) for _ in range(2))
    only = np.eye(memory.degree + 1)[memory.degree]
    return polynomial(k_STK, only)[..., -features(memory, d) :], v_STV


def recall(config: Config, memory: Memory, d: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """n_G, and the share of pairs that are read back, [2, G]: after one pass and after all."""
    n_G = numbers(memory, d, config.counts)
    S, G, T = config.seeds, len(n_G), n_G[-1]
    k_STN, v_STV = pairs(config, memory, d, T)
    k_BTN, v_BTV = (jnp.repeat(x, G, axis=0) for x in (k_STN, v_STV))
    n_B, state, shares = jnp.tile(n_G, S), None, []
    A = begin(memory, jax.random.key(config.seed), d)
    for done in range(1, config.passes + 1):
        state, cosine_BT = learn(memory, d, A, k_BTN, v_BTV, n_B, step, state)
        if done in (1, config.passes):
            found_BT = (np.asarray(cosine_BT) >= config.cosine) & (np.arange(T) < np.asarray(n_B)[:, None])
            shares.append(found_BT.sum(1).reshape(S, G).mean(0) / n_G)
    return n_G, np.stack([shares[0], shares[-1]])


def capacity(n_G: np.ndarray, share_G: np.ndarray, share: float) -> float:
    """The n from which on less than `share` is read back, between two that were tried; 0 if it is the first."""
    below = np.flatnonzero(share_G < share)
    if not below.size:
        return float(n_G[-1])
    i = below[0]
    if i == 0:
        return 0.0
    between = (share_G[i - 1] - share) / (share_G[i - 1] - share_G[i])
    return float(np.exp(np.log(n_G[i - 1]) + between * np.log(n_G[i] / n_G[i - 1])))


def exponent(dims: list[int], capacities: list[float]) -> float:
    """p of capacity ~ d^p, by least squares of logarithms."""
    if len(dims) < 2 or min(capacities) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(dims), np.log(capacities), 1)[0])


def by_memory(rows: list[dict[str, Any]], passes: int) -> dict[str, list[dict[str, Any]]]:
    return {name: [row for row in rows if row["memory"] == name and row["passes"] == passes] for name in MEMORIES}


def table(config: Config, rows: list[dict[str, Any]]) -> str:
    """Markdown: the capacity of each memory at each d, and how it grows."""
    text = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}, {config.seeds} seeds, "
    text += f"cosine >= {config.cosine} for {config.share:.0%} of the pairs\n\n{CLAIMS}\n"
    for passes in dict.fromkeys((1, config.passes)):
        text += f"\n## {passes} pass{'es' if passes > 1 else ''}\n\n| memory | "
        text += (
            " | ".join(f"d = {d}" for d in config.dims) + f" | exponent |\n|---|{'---:|' * (len(config.dims) + 1)}\n"
        )
        for name, mine in by_memory(rows, passes).items():
            found = [row["capacity"] for row in mine]
            text += f"| {name} | {' | '.join(f'{n:.0f}' for n in found)} | {exponent(list(config.dims), found):.1f} |\n"
    return text


def plot(config: Config, rows: list[dict[str, Any]]) -> None:
    curves, growth = (Figure(figsize=(9, 4), layout="constrained") for _ in range(2))
    for figure in (curves, growth):
        shown = tuple(dict.fromkeys((1, config.passes)))
        for axes, passes in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            for name, mine in by_memory(rows, passes).items():
                if figure is curves:
                    axes.semilogx(mine[-1]["pairs"], mine[-1]["shares"], label=name, linewidth=1)
                else:
                    axes.loglog(config.dims, [row["capacity"] for row in mine], "o-", label=name, linewidth=1)
            axes.set(title=f"{passes} passes" if passes > 1 else "1 pass")
            if figure is curves:
                axes.set(xlabel=f"pairs, d = {config.dims[-1]}", ylabel="read back")
            else:
                axes.set(xlabel="d", ylabel="capacity")
        axes.legend(fontsize="x-small")
    curves.savefig(config.out / "curves.png")
    growth.savefig(config.out / "capacity.png")


def main(config: Config) -> list[dict[str, Any]]:
    contract.positive(**{name: getattr(config, name) for name in ("passes", "counts", "seeds")})
    if not config.dims or min(config.dims) < 2:
        raise ValueError(f"dims: expected sizes >= 2, got {config.dims}")
    for name in ("cosine", "share"):
        if not 0 < getattr(config, name) <= 1:
            raise ValueError(f"{name}: expected a number in (0, 1], got {getattr(config, name)}")
    checkpoint.check(config.out, {}, resume=False)
    config.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, d in tqdm([(name, d) for name in MEMORIES for d in config.dims]):
        memory = MEMORIES[name]
        tried = [(step, *recall(config, memory, d, step)) for step in memory.steps]
        for i, passes in enumerate(dict.fromkeys((1, config.passes))):
            best = lambda run, i=i: capacity(run[1], run[2][i], config.share)
            step, n_G, shares = max(tried, key=best)
            row = {"memory": name, "d": d, "passes": passes, "step": step, "capacity": best((step, n_G, shares))}
            rows.append(row | {"pairs": n_G.tolist(), "shares": [round(float(s), 4) for s in shares[i]]})
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
        (config.out / "capacity.jsonl").write_text("".join(lines))
    plot(config, rows)
    (config.out / "table.md").write_text(table(config, rows))
    print((config.out / "table.md").read_text())
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
