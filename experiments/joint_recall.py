"""Can a state-space model recall a value by its key and its context? HAX against the Mamba-2 it is made of.

    python experiments/joint_recall.py

trains two layers of each on multi-query joint recall (memzoo/tasks/joint_recall.py), tables of 1 to 4 contexts by 1 to
4 keys, and counts the values that it gets right in held-out tables of the largest size.

Measured on two CPU cores that other work shared, `--models hax mamba2`, seed 0, 1,500 steps: hax gets 98.4 % of the
values right, mamba2 82.8 %, in 376 and 292 seconds; halfway, at step 750, 91.9 % and 72.9 %. So the SSM does not solve
these tables, but they are small enough for much of one to fit its state. One seed; the two larger SSMs of `MODELS` were
not run at this setting.

`--models hax` asks one alone; --contexts, --keys, --values, --width and --steps make the question larger. The paper's
is --contexts 5 16 --keys 5 16 --values 16 --state-size 32 --bucket-keys 32 --selected-keys 32 --bits 8 --batch 64
--learning-rate 2e-3 --steps 400000. `--out` holds joint_recall.jsonl (a line per model and seed), table.md and
accuracy.png. A model whose loss or gradient is not finite stops there, and has a line that says so.

Dims: B batch, T time, U = T + 1 tokens.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from memzoo import checkpoint, contract, host, train
from memzoo.models.backbone import LanguageModel, describe
from memzoo.tasks import joint_recall
from memzoo.tasks.joint_recall import JointRecall, Recall

CLAIM = (
    "HAX (2025): state-space models cannot solve multi-query joint recall in sub-quadratic time; with sparse attention "
    "that depends on the context they can."
)
# The model, its width and its state size, as multiples of the configuration's: the paper's fair comparison is with an
# SSM twice as wide; eight times the state is about as many bytes as hax keeps.
MODELS = {
    "hax": ("hax", 1, 1),
    "mamba2": ("mamba2", 1, 1),
    "mamba2, twice as wide": ("mamba2", 2, 1),
    "mamba2, 8 times the state": ("mamba2", 1, 8),
}


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = tuple(MODELS)
    out: Path = Path("runs/joint_recall")  # a new directory
    contexts: tuple[int, int] = (1, 4)  # smallest and largest number of a table
    keys: tuple[int, int] = (1, 4)
    values: int = 8
    layers: int = 2
    width: int = 64
    state_size: int = 16
    head_dim: int = 16
    bucket_keys: int = 8  # of hax, as the following
    selected_keys: int = 8
    bits: int = 4
    ranking_weight: float = 0.1
    batch: int = 32
    steps: int = 1500
    learning_rate: float = 4e-3  # at its peak
    seeds: int = 1
    eval_every: int = 125
    eval_rows: int = 256  # held-out tables of the largest size


def make(config: Config, kind: str, task: JointRecall) -> LanguageModel:
    name, wider, larger = MODELS[kind]
    fields = {"state_size": config.state_size * larger, "head_dim": config.head_dim}
    if name == "hax":
        names = ("bucket_keys", "selected_keys", "bits", "ranking_weight")
        fields |= {name: getattr(config, name) for name in names}
    return LanguageModel(task.vocab, config.width * wider, config.layers, (name,), fields={name: fields})


def run(config: Config, kind: str, seed: int) -> dict[str, Any]:
    """Trains one model. Returns its accuracy by step, and what it cost."""
    task = JointRecall(config.contexts, config.keys, config.values)
    largest = JointRecall((config.contexts[1],) * 2, (config.keys[1],) * 2, config.values)
    held_out = joint_recall.evaluation(largest, config.eval_rows, seed)
    batches = joint_recall.training_batches(task, config.batch, seed)
    model = make(config, kind, task)
    init_key, key = jax.random.split(jax.random.key(seed))
    params = jax.jit(model.init)(init_key, jnp.zeros((1, task.tokens - 1), jnp.int32))

    def loss(params, batch: Recall, key):
        (logits_BTZ, _), sown = model.apply(params, batch.tokens_U[:, :-1], rngs={"ranking": key}, mutable=["losses"])
        nats_BT = train.cross_entropy(logits_BTZ, jnp.asarray(batch.tokens_U[:, 1:]))
        return jnp.mean(nats_BT, where=batch.asked_T) + sum(jax.tree.leaves(sown))

    @jax.jit
    def right(params, rows: Recall):
        """How many of the values asked for, and of how many."""
        logits_BTZ, _ = model.apply(params, rows.tokens_U[:, :-1])
        is_right_BT = jnp.argmax(logits_BTZ, axis=-1) == rows.tokens_U[:, 1:]
        return jnp.sum(is_right_BT & rows.asked_T), jnp.sum(rows.asked_T)

    def accuracy(params) -> float:
        pieces = range(0, config.eval_rows, config.batch)
        parts = (Recall(*(x[i : i + config.batch] for x in held_out)) for i in pieces)
        counted = np.sum([jax.device_get(right(params, part)) for part in parts], axis=0)
        return float(counted[0] / counted[1])

    optimizer = train.adamw(config.learning_rate, config.steps, weight_decay=0.1)
    state = train.create(params, optimizer, key)
    step = jax.jit(train.make_step(loss, optimizer), donate_argnums=0)
    row: dict[str, Any] = {"model": kind, "seed": seed, "parameters": describe(model).parameters, "accuracy": {}}
    row["state_bytes"] = describe(model).state_bytes
    begin, ahead = time.perf_counter(), []
    steps = tqdm(range(1, config.steps + 1), desc=f"{kind}, seed {seed}", unit="step", leave=False)
    for i in steps:
        state, metrics = step(state, next(batches))
        ahead.append((i, metrics))
        if i % config.eval_every == 0 or i == config.steps:
            losses = [train.guard(at, metrics, lambda: "none, as none is kept")["loss"] for at, metrics in ahead]
            row["accuracy"][str(i)] = right_now = accuracy(state.params)
            steps.write(f"{kind}, seed {seed}, step {i}: loss {np.mean(losses):.3f}, right {right_now:.3f}")
            ahead = []
    return row | {"train_loss": float(np.mean(losses)), "seconds": round(time.perf_counter() - begin, 1)}


def table(config: Config, rows: list[dict[str, Any]]) -> str:
    """Markdown: the claim, and the mean over the seeds that did not diverge."""
    text = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}, {config.seeds} seeds\n"
    text += f"\n{CLAIM}\n\nFound: accuracy after {config.steps} steps, chance {1 / config.values:.2f}, in tables of "
    text += f"{config.contexts[1]} contexts by {config.keys[1]} keys.\n\n"
    text += "| model | accuracy | parameters | bytes of state | seconds |\n|---|---:|---:|---:|---:|\n"
    for kind in config.models:
        mine = [row for row in rows if row["model"] == kind and "diverged" not in row]
        if mine:
            right, seconds = np.mean([(list(row["accuracy"].values())[-1], row["seconds"]) for row in mine], axis=0)
            size = f"{mine[0]['parameters']:,} | {mine[0]['state_bytes']:,}"
            text += f"| {kind} | {right:.2f} | {size} | {seconds:.0f} |\n"
    if diverged := [row for row in rows if "diverged" in row]:
        said = "; ".join(f"{row['model']}, seed {row['seed']}: {row['diverged']}" for row in diverged)
        text += f"\nDiverged, and in no mean: {said}.\n"
    return text


def plot(config: Config, rows: list[dict[str, Any]]) -> None:
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for row in rows:
        if "diverged" not in row:
            colour = f"C{config.models.index(row['model'])}"
            label = row["model"] if row["seed"] == 0 else None
            axes.plot([int(at) for at in row["accuracy"]], list(row["accuracy"].values()), color=colour, label=label)
    axes.axhline(1 / config.values, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="step", ylabel="accuracy, held out", ylim=(0, 1.02))
    axes.legend(fontsize="small")
    figure.savefig(config.out / "accuracy.png")


def main(config: Config) -> list[dict[str, Any]]:
    sizes = ("layers", "width", "batch", "steps", "seeds", "eval_every", "eval_rows")
    contract.positive(**{name: getattr(config, name) for name in sizes})
    if not config.models:
        raise ValueError(f"models: expected some of {', '.join(MODELS)}, got none")
    for kind in config.models:
        if kind not in MODELS:
            raise ValueError(f"models: unknown model {kind!r}; {contract.nearest(kind, MODELS)}")
        make(config, kind, JointRecall(config.contexts, config.keys, config.values))  # or the first would run in vain
    checkpoint.check(config.out, {}, resume=False)
    config.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for kind, seed in ((kind, seed) for kind in config.models for seed in range(config.seeds)):
        try:
            row = run(config, kind, seed)
        except train.NonFiniteError as error:  # a result too; the others go on
            row = {"model": kind, "seed": seed, "diverged": str(error).partition(";")[0]}
        rows.append(row)
        with (config.out / "joint_recall.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        (config.out / "table.md").write_text(table(config, rows))
        plot(config, rows)
    print((config.out / "table.md").read_text())
    return rows


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    host.keep_pages()
    try:
        main(config)
    except (ValueError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
