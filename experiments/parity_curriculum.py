"""How many last bits does a network learn to hold, one task after the other, or all together?

    python experiments/parity_curriculum.py

trains leaky_rnn, gru and lstm on N-parity and on N-delayed-match-to-sample (memzoo/tasks/last_bits.py), N from 2 on, by
two curricula with the same number of updates: `single`, one head, which learns N alone and goes on to N + 1 once that
is right 98 % of the time; `multi`, a head for each N, all of which go on learning. The paper says that with many heads
larger N are solved, that one head makes the time constants of leaky units grow with N, and many heads leave them small.

The table has the largest N solved, the mean time constant that leaky units learned, and the time, in tokens, within
which the activity of a unit forgets: where its autocorrelation, for random bits, falls below 1/e, over all units.

Each of the 12 runs takes one to two minutes on two CPU cores. Expect, as the largest N with one head and with many:
parity 7 and 15 (leaky_rnn), 12 and 24 (gru), 12 and 25 (lstm); match 15 and 20, 17 and 20, 15 and 20. Many heads solve
more, as the paper says, and forget within 1.0 to 1.3 tokens where one head does within 1.7 to 4.0; but the mean time
constant of leaky_rnn hardly differs, 1.3 or 1.4 and 1.2.

`--out` holds parity_curriculum.jsonl (a line per architecture, task, curriculum and seed, with the update at which each
N was solved), table.md and solved.png. A run whose loss is not finite stops there, and says so.

Dims: B batch, T time, D width, M the largest N, F units.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax
from matplotlib.figure import Figure
from tqdm import tqdm

import memzoo
from memzoo import checkpoint, contract, host, train
from memzoo.tasks import last_bits

NAMES = ("leaky_rnn", "gru", "lstm")
TASKS = {"parity": last_bits.parity, "match": last_bits.match}
CURRICULA = ("single", "multi")
CLAIM = (
    "Khajehabdollahi et al. (2023): multi-head curricula solve larger N than single-head ones; these make the time "
    "constants of units grow with N, multi-head ones leave them small and use the recurrent weights."
)


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/parity_curriculum")  # a new directory
    names: tuple[str, ...] = NAMES
    tasks: tuple[str, ...] = tuple(TASKS)
    curricula: tuple[str, ...] = CURRICULA
    hidden: int = 64
    most: int = 40  # M, where a curriculum ends
    length: int = 80  # T
    batch: int = 64
    updates: int = 3000
    learning_rate: float = 1e-3
    seeds: int = 1
    eval_every: int = 50  # updates from one look at the accuracy to the next
    solved: float = 0.98


class Reader(nn.Module):
    """Bits to the logits of every head, [B, T, M], and the state."""

    kind: str
    hidden: int
    heads: int

    @nn.compact
    def __call__(self, u_BT, state=None):
        x_BTD = nn.Embed(2, self.hidden, name="bits")(u_BT)
        y_BTD, state = memzoo.make(self.kind, width=self.hidden, hidden=self.hidden, name="mixer")(x_BTD, state)
        return nn.Dense(self.heads, name="heads")(y_BTD), state


def run(config: Config, kind: str, task: str, curriculum: str, seed: int) -> dict[str, Any]:
    """Trains one network. Returns the update at which each N was solved, and what it learned of time."""
    T, M, single = config.length, config.most, curriculum == "single"
    model = Reader(kind, config.hidden, 1 if single else M)
    init_key, key = jax.random.split(jax.random.key(seed))
    params = jax.jit(model.init)(init_key, jnp.zeros((1, 1), jnp.int32))
    asked_TM = last_bits.has_answer(T, M)

    def answers(params, key, N):
        """Logits, answers, and which of them count for N: of all heads up to N, or of the one."""
        u_BT = last_bits.draw(key, config.batch, T)
        logits_BTH, _ = model.apply(params, u_BT)
        n_M = jnp.arange(1, M + 1)
        counts_TM = asked_TM & (n_M == N if single else (n_M >= 2) & (n_M <= N))
        return logits_BTH, TASKS[task](u_BT, M), counts_TM

    def loss(params, batch, _):
        logits_BTH, y_BTM, counts_TM = answers(params, *batch)
        nats_BTM = optax.sigmoid_binary_cross_entropy(logits_BTH, y_BTM)
        return jnp.mean(nats_BTM, where=counts_TM)

    @jax.jit
    def accuracy(params, key, N):
        """Of N alone, whatever the curriculum."""
        logits_BTH, y_BTM, _ = answers(params, key, N)
        at = jnp.arange(M) == N - 1
        return jnp.mean((logits_BTH > 0) == y_BTM, where=asked_TM & at)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    step = train.make_step(loss, optimizer)

    @jax.jit
    def many(state, keys, N):
        return lax.scan(lambda state, key: step(state, (key, N)), state, keys)

    state, N, solved = train.create(params, optimizer, key), 2, {}
    draws = jax.random.split(jax.random.fold_in(key, 1), config.updates + 1)
    begin = time.perf_counter()
    for start in range(0, config.updates, config.eval_every):
        end = min(start + config.eval_every, config.updates)
        state, metrics = many(state, draws[start:end], N)
        mean = {name: float(jnp.mean(values)) for name, values in metrics.items()}
        train.guard(end, mean, lambda: "none, as none is kept")
        while N <= M and accuracy(state.params, jax.random.fold_in(draws[-1], end), N) >= config.solved:
            solved[str(N)] = end
            N += 1
        if N > M:
            break
    row = {"name": kind, "task": task, "curriculum": curriculum, "seed": seed, "largest": N - 1 if solved else 0}
    row |= {"solved": solved, "updates": end, "forgets_in": round(forgets_in(model, state.params, seed), 2)}
    if kind == "leaky_rnn":
        row["tau"] = round(float(np.mean(np.maximum(state.params["params"]["mixer"]["tau"], 1))), 3)
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def forgets_in(model: Reader, params: Any, seed: int, T: int = 1000, lags: int = 200) -> float:
    """Tokens after which the autocorrelation of a unit falls below 1/e, the mean over units, `lags` at the most."""
    u_1T = last_bits.draw(jax.random.key(seed), 1, T)

    @jax.jit
    def activity(u_T):
        """h_TF"""

        def token(state, u):
            _, state = model.apply(params, u[None, None], state)
            return state, state.h_BF[0]

        start = memzoo.make(model.kind, width=model.hidden, hidden=model.hidden).initial_state(1)
        return lax.scan(token, start, u_T)[1]

    h_TF = np.asarray(activity(u_1T[0]), np.float64)[lags:]
    h_TF = h_TF - h_TF.mean(axis=0)
    h_TF = h_TF[:, h_TF.std(axis=0) > 1e-6]  # a unit that never moves has no time
    power_F = (h_TF**2).mean(axis=0)
    correlation_LF = [(h_TF[lag:] * h_TF[: len(h_TF) - lag]).mean(axis=0) / power_F for lag in range(lags)]
    below_LF = np.array([*correlation_LF, 0 * power_F]) < np.exp(-1)
    return float(below_LF.argmax(axis=0).mean()) if h_TF.size else 0.0


def table(config: Config, rows: list[dict[str, Any]]) -> str:
    """Markdown: the claim, and the mean over the seeds that did not diverge."""
    text = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}, {config.seeds} seeds\n"
    text += f"\n{CLAIM}\n\nFound, in at most {config.updates} updates and for N of at most {config.most}:\n\n"
    text += "| task | architecture | curriculum | largest N solved | updates | tau | forgets in, tokens |\n"
    text += "|---|---|---|---:|---:|---:|---:|\n"
    mean = lambda mine, key: f"{np.mean([row[key] for row in mine]):,.1f}".removesuffix(".0") if key in mine[0] else ""
    for task, kind, curriculum in cases(config):
        mine = [row for row in rows if (row["task"], row["name"], row["curriculum"]) == (task, kind, curriculum)]
        if mine := [row for row in mine if "diverged" not in row]:
            cells = (mean(mine, key) for key in ("largest", "updates", "tau", "forgets_in"))
            text += f"| {task} | {kind} | {curriculum} | {' | '.join(cells)} |\n"
    if diverged := [row for row in rows if "diverged" in row]:
        said = (f"{row['name']}, {row['task']}, {row['curriculum']}: {row['diverged']}" for row in diverged)
        text += f"\nDiverged, and in no mean: {'; '.join(said)}.\n"
    return text


def cases(config: Config) -> list[tuple[str, str, str]]:
    return [(task, kind, how) for task in config.tasks for kind in config.names for how in config.curricula]


def plot(config: Config, rows: list[dict[str, Any]]) -> None:
    """N against the update at which it was solved."""
    figure = Figure(figsize=(4 * len(config.tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(config.tasks), squeeze=False)[0], config.tasks, strict=True):
        for row in rows:
            if row["task"] == task and row.get("solved"):
                style = {"color": f"C{config.names.index(row['name'])}", "linestyle": "-"}
                style["linestyle"] = "-" if row["curriculum"] == "multi" else ":"
                label = f"{row['name']}, {row['curriculum']}" if row["seed"] == 0 else None
                axes.plot(list(row["solved"].values()), list(map(int, row["solved"])), label=label, **style)
        axes.set(title=task, xlabel="update", ylabel="N solved")
        if axes.lines:
            axes.legend(fontsize="x-small")
    figure.savefig(config.out / "solved.png")


def main(config: Config) -> list[dict[str, Any]]:
    sizes = ("hidden", "most", "length", "batch", "updates", "seeds", "eval_every")
    contract.positive(**{name: getattr(config, name) for name in sizes})
    for field, known in (("names", NAMES), ("tasks", TASKS), ("curricula", CURRICULA)):
        if not getattr(config, field):
            raise ValueError(f"{field}: expected at least one, got none")
        for name in getattr(config, field):
            if name not in known:
                raise ValueError(f"{field}: unknown {name!r}; {contract.nearest(name, known)}")
    if not 2 <= config.most <= config.length:
        raise ValueError(f"most: expected 2 <= most <= length = {config.length}, got {config.most}")
    if not 0.5 < config.solved <= 1:
        raise ValueError(f"solved: expected a number in (0.5, 1], got {config.solved}")
    checkpoint.check(config.out, {}, resume=False)
    config.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    todo = tqdm([(*case, seed) for case in cases(config) for seed in range(config.seeds)], unit="run")
    for task, kind, curriculum, seed in todo:
        try:
            row = run(config, kind, task, curriculum, seed)
        except train.NonFiniteError as error:  # a result too; the others go on
            row = {"name": kind, "task": task, "curriculum": curriculum, "seed": seed}
            row["diverged"] = str(error).partition(";")[0]
        todo.write(f"{task}, {kind}, {curriculum}, seed {seed}: {row.get('diverged', row.get('largest'))}")
        rows.append(row)
        with (config.out / "parity_curriculum.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        (config.out / "table.md").write_text(table(config, rows))
        plot(config, rows)
        jax.clear_caches()
    print((config.out / "table.md").read_text())
    return rows


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    host.keep_pages()
    try:
        main(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
