"""Who still finds a needle in a haystack that is longer than any it was trained on? Titans, ATLAS, and what they claim
to beat.

    python experiments/needle.py

trains two layers of each model on texts of up to 256 tokens, which hold a needle at any depth and ask for it at their
end (memzoo/tasks/needle.py), with the same sentence over and over as hay (passkey) and with words at random (needle).
Half of the steps have texts of 16 tokens, from which a model learns to answer at all; the others, in equal parts, each
twice as long. It then asks in texts of 2,048 ... 65,536 tokens, read in pieces through the state. A table has the share
of values that are right for each length, the mean over depths; a heat map has each depth.

    python experiments/needle.py --resume

goes on where it was killed: models that are finished are not trained again.

The paper (arXiv:2501.00663, sec. 5.3, trained on 4,096 tokens and asked for a needle in 2,048 ... 16,384) says: Titans,
MAC first, hold nearly all of it beyond the length of training, where TTT, Mamba-2 and DeltaNet fall off. At the size of
this script that was not found, nor for ATLAS: titans and atlas learn the length they see, and fall off sooner than
Gated DeltaNet; titans_mac, titans_mal and titans_mag do not learn that length in these steps. One seed; chance is 0.06:

    passkey             256    512  1,024  2,048  4,096  8,192 16,384 65,536
    gated_deltanet     1.00   0.97   0.65   0.42   0.28   0.20   0.28   0.20
    mamba2             0.95   0.62   0.40   0.23   0.25   0.20   0.28   0.25
    titans             0.97   0.12   0.10   0.03   0.03   0.07   0.07   0.07
    atlas              1.00   0.82   0.25   0.12   0.15   0.17   0.15
    titans_mac         0.50   0.38   0.17   0.05   0.07   0.07   0.03   0.10
    titans_mal         0.45   0.15   0.12   0.25   0.15   0.15   0.07   0.17
    titans_mag         0.33   0.25   0.12   0.17   0.28   0.23   0.20   0.20
    window             0.38   0.20   0.23   0.28   0.20   0.25   0.28   0.25

    needle              256    512  1,024  2,048  4,096  8,192 16,384 65,536
    gated_deltanet     1.00   1.00   1.00   1.00   0.80   0.55   0.38   0.20
    mamba2             0.95   0.57   0.33   0.20   0.23   0.20   0.25   0.25
    titans             1.00   0.82   0.12   0.10   0.07   0.10   0.07   0.05
    titans_mac         0.45   0.25   0.17   0.17   0.12   0.07   0.10   0.07
    titans_mal         0.42   0.25   0.15   0.12   0.15   0.12   0.12   0.10
    titans_mag         0.33   0.28   0.23   0.28   0.25   0.20   0.17   0.30
    window             0.40   0.25   0.30   0.23   0.20   0.28   0.23   0.28

At 32,768 tokens it is as at 65,536. Of atlas, which takes an hour and a half on one core, only this was asked. With the
memory's default step, 1 / chunk, titans_mac and titans_mag were not finite on `needle` of 128 tokens after those of 64.

Attention over a window finds only what is in reach of its layers, `layers` windows from the end.

`--models`, `--kinds` and `--lengths` ask less or further, `--train-length`, `--width` and `--steps` train more. `--out`
holds config.json, needle.jsonl (a line per kind, model and seed), table.md and heat.png. A model whose loss is not
finite stops there, and has a line that says so.

Dims: B texts, U tokens of a text and its answer, M values of the answer, P tokens of a piece, N depths, L lengths.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
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
from memzoo.models.titans_mac import TitansMAC
from memzoo.models.titans_mag import TitansMAG
from memzoo.models.titans_mal import TitansMAL
from memzoo.tasks.needle import KINDS, Needle


def stack(mixer: str, config: Any, task: Needle, **fields: Any) -> LanguageModel:
    return LanguageModel(task.vocab, config.width, config.layers, (mixer,), {mixer: fields})


def titans(model: Callable[..., Any], sees: str, config: Any, task: Needle) -> Any:
    fields = {"heads": config.heads, "memory": {"chunk": config.chunk, "step": config.step}, sees: config.reach}
    return model(task.vocab, config.width, config.layers, **fields)


MODELS: dict[str, Callable[[Any, Needle], Any]] = {
    "titans": lambda c, task: stack("titans", c, task, heads=c.heads, chunk=c.chunk),
    "titans_mac": partial(titans, TitansMAC, "segment"),
    "titans_mag": partial(titans, TitansMAG, "window"),
    "titans_mal": partial(titans, TitansMAL, "window"),
    # Keys of half the width: their features are pairs of channels, and each token's momentum is a matrix of these.
    "atlas": lambda c, task: stack("atlas", c, task, heads=c.heads, chunk=c.chunk, key_dim=c.width // c.heads // 2),
    "gated_deltanet": lambda c, task: stack("gated_deltanet", c, task, heads=c.heads),
    "mamba2": lambda c, task: stack("mamba2", c, task, head_dim=c.width // c.heads),
    "window": lambda c, task: stack("attention", c, task, heads=c.heads, window=c.reach, sinks=0),
}


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/needle")  # a new directory, or with --resume that of a run with the same configuration
    resume: bool = False
    models: tuple[str, ...] = tuple(MODELS)
    kinds: tuple[str, ...] = KINDS
    answer: int = 2  # values of a needle
    values: int = 16  # that there are
    layers: int = 2
    width: int = 64
    heads: int = 4  # of all but mamba2
    reach: int = 64  # of windows and segments
    chunk: int = 16  # of the memories that learn while they read
    step: float = 0.02  # of those in titans_mac, _mag and _mal, whose loss soon is not finite with 1 / chunk
    begin_length: int = 16  # of the first texts of training
    train_length: int = 256  # of the last
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)  # of the test, beside that of training
    depths: int = 5  # from 0 to 1, evenly
    tokens: int = 4096  # of the texts of one step, together
    steps: int = 800
    learning_rate: float = 4e-3  # at its peak
    seeds: int = 1
    eval_rows: int = 4  # texts for each length and depth
    piece: int = 256  # tokens read at once in the test
    log_every: int = 50  # steps from one look at the loss to the next


def run(config: Config, kind: str, name: str, seed: int) -> dict[str, Any]:
    """Trains one model. Returns its accuracy by length and depth, and what it cost."""
    task = Needle(kind, values=config.values, answer=config.answer)
    model, M = MODELS[name](config, task), config.answer
    init_key, test_key, batches_key, key = jax.random.split(jax.random.key(seed), 4)
    params = jax.jit(model.init)(init_key, jnp.zeros((1, config.train_length), jnp.int32))

    def nats(length, params, key, _):
        depth_key, key = jax.random.split(key)
        tokens_BU = task.draw(key, jax.random.uniform(depth_key, (config.tokens // length,)), length)
        logits_BTZ, _ = model.apply(params, tokens_BU[:, :-1])
        return jnp.mean(train.cross_entropy(logits_BTZ[:, -M:], tokens_BU[:, -M:]))

    optimizer = train.adamw(config.learning_rate, config.steps, weight_decay=0.1)

    @partial(jax.jit, donate_argnums=0, static_argnums=2)
    def many(state, numbers, length):
        step = train.make_step(partial(nats, length), optimizer)
        return lax.scan(lambda state, i: step(state, jax.random.fold_in(batches_key, i)), state, numbers)

    state = train.create(params, optimizer, key)
    row: dict[str, Any] = {"kind": kind, "model": name, "seed": seed, "parameters": describe(model).parameters}
    row["state_bytes"] = describe(model).state_bytes
    begin, losses = time.perf_counter(), {}
    looks = tqdm(training(config), desc="training", leave=False)
    for start, end, length in looks:
        state, metrics = many(state, jnp.arange(start, end), length)
        mean = {metric: float(jnp.mean(values)) for metric, values in metrics.items()}
        losses[str(end)] = round(train.guard(end, mean, lambda: "none, as none is kept")["loss"], 4)
        looks.set_postfix(step=end, length=length, loss=losses[str(end)])
    row |= {"loss": losses, "train_seconds": round(time.perf_counter() - begin, 1), "accuracy": {}}

    @jax.jit
    def read(tokens_BP, memory):
        logits_BPZ, memory = model.apply(state.params, tokens_BP, memory)
        return jnp.argmax(logits_BPZ[:, -M:], axis=-1), memory

    for length in tqdm((config.train_length, *config.lengths), desc="asking", unit="length", leave=False):
        depth_B = np.repeat(depths(config), config.eval_rows)
        tokens_BU = np.asarray(task.draw(jax.random.fold_in(test_key, length), depth_B, length))
        right_BM = answered(read, model, tokens_BU, config.piece, M) == tokens_BU[:, -M:]
        row["accuracy"][str(length)] = right_BM.reshape(config.depths, -1).mean(1).round(4).tolist()
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def training(config: Config) -> list[tuple[int, int, int]]:
    """(first step, the one after the last, length of the texts), from one look at the loss to the next."""
    lengths = [config.begin_length]
    while lengths[-1] < config.train_length:
        lengths.append(min(2 * lengths[-1], config.train_length))
    first = config.steps if len(lengths) == 1 else config.steps // 2
    ends = first + (config.steps - first) * np.arange(len(lengths)) // max(1, len(lengths) - 1)
    looks = []
    for length, start, end in zip(lengths, (0, *ends), ends, strict=False):
        looks += [
            (i, min(i + config.log_every, int(end)), length) for i in range(int(start), int(end), config.log_every)
        ]
    return looks


def depths(config: Config) -> np.ndarray:
    return np.linspace(0, 1, config.depths)


def answered(read: Callable, model: Any, tokens_BU: np.ndarray, piece: int, M: int) -> np.ndarray:
    """What the model says in the places of the answer, [B, M], given the values before each."""
    memory, said = model.initial_state(len(tokens_BU)), []
    T = tokens_BU.shape[1] - 1
    for start in range(0, T, piece):
        said_BM, memory = read(tokens_BU[:, start : min(start + piece, T)], memory)
        said.append(np.asarray(said_BM))
    return np.concatenate(said[-1 - M :], axis=1)[:, -M:]


def table(config: Config, rows: list[dict[str, Any]]) -> str:
    """Markdown: the share of values that are right, the mean over depths and the seeds that did not diverge."""
    lengths = [str(length) for length in (config.train_length, *config.lengths)]
    text = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}, {config.seeds} seeds, "
    text += f"{config.steps} steps, texts of up to {config.train_length} tokens; chance {1 / config.values:.2f}\n"
    for kind in config.kinds:
        text += f"\n## {kind}\n\n| model | {' | '.join(lengths)} | parameters | bytes of state | seconds |\n"
        text += "|---|" + "---:|" * (len(lengths) + 3) + "\n"
        for name in config.models:
            mine = [row for row in rows if (row["kind"], row["model"]) == (kind, name) and "diverged" not in row]
            if mine:
                found = np.mean([[np.mean(row["accuracy"][length]) for length in lengths] for row in mine], axis=0)
                size = f"{mine[0]['parameters']:,} | {mine[0]['state_bytes']:,}"
                seconds = np.mean([row["seconds"] for row in mine])
                text += f"| {name} | {' | '.join(f'{x:.2f}' for x in found)} | {size} | {seconds:.0f} |\n"
    if diverged := [row for row in rows if "diverged" in row]:
        said = (f"{row['kind']}, {row['model']}, seed {row['seed']}: {row['diverged']}" for row in diverged)
        text += f"\nDiverged, and in no mean: {'; '.join(said)}.\n"
    return text


def plot(config: Config, rows: list[dict[str, Any]]) -> None:
    """A heat map for each kind and model: depth down, length across, mean over seeds."""
    lengths = [str(length) for length in (config.train_length, *config.lengths)]
    size = 1.2 + 1.6 * len(config.models), 0.8 + 1.8 * len(config.kinds)
    panels = (figure := Figure(figsize=size, layout="constrained")).subplots(
        len(config.kinds), len(config.models), sharex=True, sharey=True, squeeze=False
    )
    image = None
    for axes, (kind, name) in zip(panels.flat, ((k, n) for k in config.kinds for n in config.models), strict=True):
        mine = [row["accuracy"] for row in rows if (row["kind"], row["model"]) == (kind, name) and row["accuracy"]]
        axes.set_title(f"{name}\n{kind}", fontsize="small")
        if mine:
            heat_NL = np.mean([[accuracy[length] for length in lengths] for accuracy in mine], axis=0).T
            image = axes.imshow(heat_NL, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(lengths)), lengths, rotation=90, fontsize="x-small")
        axes.set_yticks(range(config.depths), [f"{depth:.2f}" for depth in depths(config)], fontsize="x-small")
    figure.supxlabel("length of the text; the first is that of training", fontsize="small")
    figure.supylabel("depth of the needle", fontsize="small")
    if image is not None:
        figure.colorbar(image, ax=panels.ravel().tolist(), label="right")
    figure.savefig(config.out / "heat.png")


def settings(config: Config) -> dict[str, Any]:
    """What a run that goes on must have as it was."""
    return {name: value for name, value in asdict(config).items() if name not in ("out", "resume")}


def begin(config: Config) -> list[dict[str, Any]]:
    """The lines of the run to continue, or none and a new directory."""
    stored = config.out / "config.json"
    if not config.resume:
        checkpoint.check(config.out, {}, resume=False)
        config.out.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(settings(config), indent=2) + "\n")
        return []
    if not stored.is_file():
        raise ValueError(f"resume: expected a run in {config.out}, got none; begin one without --resume")
    then, now = json.loads(stored.read_text()), json.loads(json.dumps(settings(config)))
    if differ := [f"{name} was {then.get(name)!r}, now {now[name]!r}" for name in now if then.get(name) != now[name]]:
        raise ValueError(f"resume: {config.out} is a run of another configuration: {'; '.join(differ)}")
    lines = config.out / "needle.jsonl"
    whole = lines.read_text().splitlines(keepends=True) if lines.exists() else []
    rows = [json.loads(line) for line in whole if line.endswith("\n")]  # less one that a kill cut short
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def main(config: Config) -> list[dict[str, Any]]:
    sizes = ("layers", "width", "heads", "reach", "chunk", "depths", "tokens", "steps", "seeds")
    contract.positive(**{name: getattr(config, name) for name in (*sizes, "eval_rows", "piece", "log_every")})
    if not config.models or not config.kinds:
        raise ValueError("models, kinds: expected at least one of each, got none")
    for kind in config.kinds:
        task = Needle(kind, values=config.values, answer=config.answer)
        for length in (config.begin_length, config.train_length, *config.lengths):
            if not contract.whole_number(length) or length < task.shortest:
                raise ValueError(
                    f"begin_length, train_length, lengths: expected integers >= {task.shortest}, got {length}"
                )
        for name in config.models:
            if name not in MODELS:
                raise ValueError(f"models: unknown model {name!r}; {contract.nearest(name, MODELS)}")
            MODELS[name](config, task)  # or the first would run in vain
    if not config.begin_length <= config.train_length <= config.tokens:
        order = config.begin_length, config.train_length, config.tokens
        raise ValueError(f"train_length: expected begin_length <= train_length <= tokens, got {order}")
    rows = begin(config)
    done = {(row["kind"], row["model"], row["seed"]) for row in rows}
    cases = [(kind, name, seed) for kind in config.kinds for name in config.models for seed in range(config.seeds)]
    for case in (left := tqdm([case for case in cases if case not in done], unit="run")):
        kind, name, seed = case
        left.set_description(f"{kind}, {name}, seed {seed}")
        try:
            row = run(config, kind, name, seed)
        except train.NonFiniteError as error:  # a result too; the others go on
            row = {"kind": kind, "model": name, "seed": seed, "accuracy": {}}
            row["diverged"] = str(error).partition(";")[0]
        means = {length: round(float(np.mean(found)), 3) for length, found in row["accuracy"].items()}
        left.write(f"{kind}, {name}, seed {seed}: {row.get('diverged', means)}")
        rows.append(row)
        with (config.out / "needle.jsonl").open("a") as lines:
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
