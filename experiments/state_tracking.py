"""Which recurrences follow a state that every token changes? Parity, sums modulo m, and products of permutations.

    python experiments/state_tracking.py

trains one layer of each model on words of up to 32 elements of a group (memzoo/tasks/state_tracking.py), scored at
every token: first on words of 2, then of 4, and so on, since on words of 32 alone none learns S5 in that time. It tests
on words up to 16 times as long. A table has the accuracy over the second half of the words of each length: of 32, the
longest that were trained on, and of 512, where only what is a state machine is still right.

The bilinear paper claims a hierarchy: real diagonal transitions follow parity, rotations sums modulo m, both of which
commute, and full, CP-factorised or block-diagonal ones any finite automaton; decays, which are positive, as in Mamba-2
and in DeltaNet whose beta is below 1, not even parity. DeltaNet whose beta goes to 2 has negative eigenvalues, and
reflects. LSTM and sLSTM are not linear in their state, and can follow any automaton.

A run takes 35 to 105 s on one core. Expect, one seed, at 32 and at 512 elements:

    at 32, at 512        Z2           Z5           S3           S5
    chance              0.50         0.20         0.17         0.01
    bilinear, full      1.00, 1.00   1.00, 0.42   1.00, 0.91   1.00, 0.06
    bilinear, CP        1.00, 1.00   1.00, 0.54   1.00, 0.16   0.01, 0.01
    bilinear, block     1.00, 1.00   1.00, 0.26   1.00, 0.61   0.02, 0.01
    bilinear, rotation  1.00, 0.29   1.00, 0.07   0.32, 0.16   0.01, 0.01
    bilinear, diagonal  1.00, 1.00   0.91, 0.21   0.32, 0.34   0.02, 0.02
    mamba2              0.67, 0.50   0.27, 0.20   0.17, 0.16   0.01, 0.01
    deltanet            0.54, 0.50   0.19, 0.20   0.15, 0.17   0.01, 0.01
    deltanet, beta to 2 1.00, 0.61   0.26, 0.20   0.16, 0.17   0.01, 0.01
    lstm                1.00, 1.00   0.92, 0.21   0.96, 0.66   0.01, 0.01
    slstm               1.00, 1.00   0.76, 0.20   0.98, 0.58   0.01, 0.01

At 32 elements that is the paper's order, S5 aside, which CP and block could follow too, and did not learn. On words of
32 from the start (`--begin-length 32 --steps 1000`) S5 stays at chance for full, CP and block, but what is learned
lasts longer: at 512 full and CP are right on Z2, Z5 and S3, block on Z2 and Z5 and 0.78 of S3. lstm and slstm do not
learn S3 that way (0.35, 0.18 at 32).

`--models` and `--groups` ask less, `--steps`, `--width` and `--lengths` more. `--out` holds state_tracking.jsonl (a
line per model, group and seed), table.md and accuracy.png. One whose loss is not finite stops there, and says so.

Dims: B batch, T time, N elements of the group.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from matplotlib.figure import Figure
from tqdm import tqdm

from memzoo import checkpoint, contract, host, train
from memzoo.models.backbone import LanguageModel, describe
from memzoo.tasks import state_tracking

# Name of the mixer and its fields; sizes that have about the same number of parameters are not to be had.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bilinear, full": ("bilinear_rnn", {"kind": "full", "hidden": 32}),
    "bilinear, CP": ("bilinear_rnn", {"kind": "cp", "hidden": 32}),
    "bilinear, block": ("bilinear_rnn", {"kind": "block"}),
    "bilinear, rotation": ("bilinear_rnn", {"kind": "rotation"}),
    "bilinear, diagonal": ("bilinear_rnn", {"kind": "diagonal"}),
    "mamba2": ("mamba2", {"state_size": 16, "head_dim": 16}),
    "deltanet": ("deltanet", {}),
    "deltanet, beta to 2": ("deltanet", {"allow_neg_eigval": True}),
    "lstm": ("lstm", {}),
    "slstm": ("slstm", {}),
}


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/state_tracking")  # a new directory
    models: tuple[str, ...] = tuple(MODELS)
    groups: tuple[str, ...] = ("Z2", "Z5", "S3", "S5")
    layers: int = 1
    width: int = 64
    begin_length: int = 2  # of the first words of training
    train_length: int = 32  # of the last
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512)  # of the test
    batch: int = 64
    steps: int = 1500
    learning_rate: float = 4e-3  # at its peak
    seeds: int = 1
    eval_every: int = 250
    eval_rows: int = 128


def make(config: Config, kind: str, elements: int) -> LanguageModel:
    name, fields = MODELS[kind]
    return LanguageModel(elements, config.width, config.layers, (name,), fields={name: fields})


def run(config: Config, kind: str, group: str, seed: int) -> dict[str, Any]:
    """Trains one model. Returns its accuracy by length, and what it cost."""
    G_NN = state_tracking.group(group)
    model = make(config, kind, len(G_NN))
    init_key, key = jax.random.split(jax.random.key(seed))
    test_key, batches_key, key = jax.random.split(key, 3)
    params = jax.jit(model.init)(init_key, jnp.zeros((1, config.train_length), jnp.int32))

    def nats(params, i, _):
        B, T = config.batch, config.train_length
        reset_BT = jnp.broadcast_to(jnp.arange(T) % word_length(config, i) == 0, (B, T))
        u_BT, y_BT = state_tracking.draw(jax.random.fold_in(batches_key, i), G_NN, B, T, reset_BT)
        return jnp.mean(train.cross_entropy(model.apply(params, u_BT, None, reset_BT)[0], y_BT))

    optimizer = train.adamw(config.learning_rate, config.steps, weight_decay=0.01)
    step = train.make_step(nats, optimizer)
    many = jax.jit(lambda state, numbers: lax.scan(step, state, numbers))

    @jax.jit
    def right(params):
        """How often it is right at each place of the longest words."""
        u_BT, y_BT = state_tracking.draw(test_key, G_NN, config.eval_rows, max(config.lengths))
        return jnp.mean(jnp.argmax(model.apply(params, u_BT)[0], axis=-1) == y_BT, axis=0)

    state = train.create(params, optimizer, key)
    row: dict[str, Any] = {"model": kind, "group": group, "seed": seed, "parameters": describe(model).parameters}
    begin, losses = time.perf_counter(), {}
    for start in range(0, config.steps, config.eval_every):
        end = min(start + config.eval_every, config.steps)
        state, metrics = many(state, jnp.arange(start, end))
        mean = {name: float(jnp.mean(values)) for name, values in metrics.items()}
        losses[str(end)] = train.guard(end, mean, lambda: "none, as none is kept")["loss"]
    right_T = np.asarray(right(state.params))
    row["accuracy"] = {str(T): round(float(right_T[T // 2 : T].mean()), 4) for T in config.lengths}
    return row | {"loss": losses, "seconds": round(time.perf_counter() - begin, 1)}


def word_length(config: Config, i: Any) -> jax.Array:
    """Of the words of step i, which follow one another in a row: each as many steps, and then twice as long."""
    count = 1 + math.ceil(math.log2(config.train_length / config.begin_length))
    return jnp.minimum(config.begin_length * 2 ** (i * count // config.steps), config.train_length)


def table(config: Config, rows: list[dict[str, Any]]) -> str:
    """Markdown: accuracy at the trained and at the longest length, the mean over the seeds that did not diverge."""
    known, longest = (str(find(config.lengths)) for find in (min, max))
    text = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}, {config.seeds} seeds, "
    text += f"{config.steps} steps\n\nAccuracy over the second half of words of {known} and of {longest} elements.\n\n"
    sizes = {group: len(state_tracking.group(group)) for group in config.groups}
    text += "| model | " + " | ".join(f"{group}, chance {1 / N:.2f}" for group, N in sizes.items()) + " |\n"
    text += "|---|" + "---:|" * len(sizes) + "\n"
    for kind in config.models:
        cells = []
        for group in sizes:
            mine = [row["accuracy"] for row in rows if (row["model"], row["group"]) == (kind, group)]
            found = [[accuracy[known], accuracy[longest]] for accuracy in mine if accuracy]
            cells.append("{:.2f}, {:.2f}".format(*np.mean(found, axis=0)) if found else "")
        text += f"| {kind} | " + " | ".join(cells) + " |\n"
    if diverged := [row for row in rows if "diverged" in row]:
        said = (f"{row['model']}, {row['group']}, seed {row['seed']}: {row['diverged']}" for row in diverged)
        text += f"\nDiverged, and in no mean: {'; '.join(said)}.\n"
    return text


def plot(config: Config, rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(3.5 * len(config.groups), 4), layout="constrained")
    panels = figure.subplots(1, len(config.groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, config.groups, strict=True):
        for row in rows:
            if row["group"] == group and row["accuracy"]:
                index = config.models.index(row["model"])
                style = {"color": f"C{index % 10}", "marker": ".", "label": row["model"] if row["seed"] == 0 else None}
                axes.semilogx(list(map(int, row["accuracy"])), list(row["accuracy"].values()), **style)
        axes.axhline(1 / len(state_tracking.group(group)), color="grey", linestyle=":")
        axes.set(title=group, xlabel="length", ylim=(0, 1.02))
    panels[0].set(ylabel="accuracy, second half")
    if any(row["accuracy"] for row in rows):
        panels[-1].legend(fontsize="x-small")
    figure.savefig(config.out / "accuracy.png")


def main(config: Config) -> list[dict[str, Any]]:
    sizes = ("layers", "width", "begin_length", "train_length", "batch", "steps", "seeds", "eval_every", "eval_rows")
    contract.positive(**{name: getattr(config, name) for name in sizes})
    if config.begin_length > config.train_length:
        raise ValueError(
            f"begin_length: expected at most train_length = {config.train_length}, got {config.begin_length}"
        )
    for T in config.lengths:
        contract.positive(lengths=T)
    if not config.models or not config.groups or not config.lengths:
        raise ValueError("models, groups, lengths: expected at least one of each, got none")
    for kind in config.models:
        if kind not in MODELS:
            raise ValueError(f"models: unknown model {kind!r}; {contract.nearest(kind, MODELS)}")
        for group in config.groups:
            make(config, kind, len(state_tracking.group(group)))  # or the first would run in vain
    checkpoint.check(config.out, {}, resume=False)
    config.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    cases = [(kind, group, seed) for group in config.groups for kind in config.models for seed in range(config.seeds)]
    for kind, group, seed in (cases_left := tqdm(cases, unit="run")):
        try:
            row = run(config, kind, group, seed)
        except train.NonFiniteError as error:  # a result too; the others go on
            row = {"model": kind, "group": group, "seed": seed, "accuracy": {}}
            row["diverged"] = str(error).partition(";")[0]
        cases_left.write(f"{group}, {kind}, seed {seed}: {row.get('diverged', row['accuracy'])}")
        rows.append(row)
        with (config.out / "state_tracking.jsonl").open("a") as lines:
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
    except (ValueError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
