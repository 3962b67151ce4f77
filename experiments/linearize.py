"""Can a trained Transformer be made a recurrent model for a fraction of its training? Softmax to Liger and to Lizard.

    python experiments/linearize.py

trains a small softmax teacher on text, as language_model.py does, and gives its weights to each student:

    liger    the weights as they are; then fine-tuning
    lizard   the weights and a few new ones; attention transfer, in which the new ones alone are trained until each
             layer's outputs are near those of the teacher's layer (mean squared error); then fine-tuning

Fine-tuning trains low-rank changes of q, k and v (rank 8, alpha 16: the papers' LoRA) and what is new, all else frozen;
`--rank 0` trains everything. The teacher is fine-tuned alike, to tell what is recovered from what any training gives.
A student sees --reach tokens by softmax, a quarter of what the teacher sees, and the rest through its memory.

Expect, in nats per held-out byte, the teacher at 1.333 (fine-tuned alike 1.330); Liger at 1.986 as converted and 1.372
fine-tuned, 94 % of what was lost; Lizard at 2.731 as converted, 1.717 after transfer and 1.457 fine-tuned, 91 %: 250 s
on two CPU cores shared with other work, of which the teacher takes 80.

`--out` holds table.md, linearize.jsonl (a line per stage, losses in nats per held-out byte), loss.png, config.json, and
the teacher's run as language_model.py writes it. `--resume` goes on where a run was killed: in the teacher bit for bit,
after it with the first student that is not finished.

Source: of the stages, the papers of memzoo/mixers/liger.py and lizard.py.

Dims: B batch, T time, D width, U = T + 1 bytes of a window, R rank, H heads, K key.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import language_model
import optax
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from matplotlib.figure import Figure
from tqdm import tqdm

from memzoo import checkpoint, contract, host, parallel, train
from memzoo.models.backbone import describe
from memzoo.ops.initial import like_torch
from memzoo.tasks import text

STUDENTS = ("liger", "lizard")
ALPHA = 16  # low-rank changes are multiplied by alpha / rank


@dataclass(frozen=True)
class Config:
    students: tuple[str, ...] = STUDENTS
    layers: int = 2
    width: int = 128
    hidden: int | None = None  # of the MLP; by default 8/3 of the width
    window: int = 128  # tokens predicted in one training window
    reach: int = 32  # tokens that a student's softmax sees
    batch: int = 16  # windows per step, over all devices
    steps: int = 600  # of the teacher
    learning_rate: float = 4e-3  # of the teacher, at its peak, after warmup
    transfer_steps: int = 200
    transfer_rate: float = 1e-2
    tune_steps: int = 200
    tune_rate: float = 5e-3
    rank: int = 8  # of the changes to q, k and v in fine-tuning; 0 is to train all parameters
    seed: int = 0
    data: Path | None = None  # any file; by default Python's own reference text
    out: Path = Path("runs/linearize")  # a new directory
    resume: bool = False  # continue the run in --out
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    eval_every: int = 200  # steps of the teacher from one evaluation and checkpoint to the next
    eval_windows: int = 2048  # held-out windows to evaluate, or all where there are fewer


def main(config: Config) -> list[dict[str, Any]]:
    """Trains what is not finished, and returns the lines of linearize.jsonl."""
    fields = ("layers", "width", "window", "reach", "batch", "steps", "transfer_steps", "tune_steps", "eval_every")
    contract.positive(**{field: getattr(config, field) for field in (*fields, "eval_windows")})
    if not contract.whole_number(config.rank) or config.rank < 0:
        raise ValueError(f"rank: expected an integer >= 0, got {config.rank!r}")
    for name in ("transfer_rate", "tune_rate"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}: expected a finite number > 0, got {getattr(config, name)}")
    for name in config.students:
        if name not in STUDENTS:
            raise ValueError(f"students: unknown student {name!r}; {contract.nearest(name, STUDENTS)}")
    corpus = text.corpus(config.data, config.window)
    record = asdict(config) | {"data": config.data and str(config.data), "data_bytes": sum(map(len, corpus))}
    for once in ("out", "resume", "students"):
        del record[once]
    rows = finished(config, record)
    teacher, state, lines = language_model.run(training(config))
    (config.out / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    theirs = flatten_dict(jax.device_get(state.params["params"]), sep="/")  # a step takes its state's arrays for itself
    for name in ("teacher", *config.students):
        if name not in {row["name"] for row in rows}:
            rows += convert(config, corpus, teacher, theirs, name)
            rows[0]["seconds"] = lines[-1]["seconds"]
            write(config, rows)
    write(config, rows)
    print("\n" + (config.out / "table.md").read_text())
    return rows


def training(config: Config) -> language_model.Config:
    """The configuration of the teacher's run, which goes on where there is one."""
    known = language_model.Config.__dataclass_fields__
    fields = {field: value for field, value in asdict(config).items() if field in known}
    out = config.out / "teacher"
    return language_model.Config(**fields | {"mixer": "attention", "out": out, "resume": out.exists()})


def finished(config: Config, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the run to continue, once it is known to be of this configuration, as far as it is recorded."""
    if not config.resume:
        checkpoint.check(config.out, {}, resume=False)
        return []
    if not config.out.is_dir():
        raise ValueError(f"resume: expected a run in {config.out}, got none; begin one without --resume")
    stored, lines = config.out / "config.json", config.out / "linearize.jsonl"
    then = json.loads(stored.read_text()) if stored.is_file() else record
    if differ := [
        f"{name} was {then.get(name)!r}, now {now!r}" for name, now in record.items() if then.get(name) != now
    ]:
        raise ValueError(f"resume: {config.out} is a run of another configuration: {'; '.join(differ)}")
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def convert(config, corpus, teacher, theirs, name) -> list[dict[str, Any]]:
    """The stages of one student, or of the teacher as if it were one. theirs: its weights, flat, by path."""
    model = teacher
    if name != "teacher":
        model = teacher.clone(mixers=(name,), fields={name: {"window": config.reach}})
    keys = jax.random.split(jax.random.key(config.seed + 1), 3)
    init = jax.jit(model.init)(keys[0], jnp.zeros((1, 1), jnp.int32))["params"]
    new = {path: leaf for path, leaf in flatten_dict(init, sep="/").items() if path not in theirs}
    nats = lambda params, batch_BU: language_model.nats(model, {"params": assembled(params)}, batch_BU)
    spread = parallel.make("jit", config.batch)
    windows_MU = text.evaluation_windows(corpus.held_out_N, config.window, config.eval_windows)

    def held_out_loss(params, batch, axis):
        windows_BU, real_B = batch
        return jnp.sum(jnp.where(real_B[:, None], nats(params, windows_BU), 0))

    evaluate = spread.compile_eval(held_out_loss)
    rows: list[dict[str, Any]] = []
    last_good = lambda: f"the teacher's, in {config.out / 'teacher'}"

    def report(stage, params, steps, seconds):
        batches = language_model.padded(windows_MU, config.batch)
        total = sum(float(evaluate(params, spread.put_batch(batch))) for batch in batches)
        trained = sum(leaf.size for leaf in jax.tree.leaves(params["trained"])) if rows else 0
        val_loss = train.guard(steps, {"val_loss": total / windows_MU[:, 1:].size}, last_good)["val_loss"]
        row = {"name": name, "stage": stage, "val_loss": val_loss, "seconds": round(seconds, 1)}
        rows.append(row | {"trained": trained, "parameters": describe(model).parameters})
        rows[-1]["state_bytes"] = describe(model).state_bytes
        print(f"{name} {stage}: held out {row['val_loss']:.3f} nats per byte")

    def stage(called, loss, params, steps, rate, key):
        """Trains what is in params["trained"]."""
        begin = time.perf_counter()
        adamw = train.adamw(rate, steps, warmup=steps, weight_decay=0.0)
        optimizer = optax.partition(
            {"trained": adamw, "frozen": optax.set_to_zero()}, {"trained": "trained", "frozen": "frozen"}
        )
        step = spread.compile_step(train.make_step(loss, optimizer))
        batches = text.training_batches(corpus.train_N, config.window, config.batch, config.seed + 1)
        state = spread.put_state(train.create(params, optimizer, key))
        ahead: dict[str, Any] = {}
        for n in (bar := tqdm(range(1, steps + 1), desc=f"{name}, {called}", unit="step")):
            state, metrics = step(state, spread.put_batch(next(batches)))
            if ahead:  # looked at one step late, so that the device never waits
                values = train.guard(n - 1, ahead, last_good)
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            ahead = metrics
        train.guard(steps, ahead, last_good)
        params = spread.one(state).params
        report(called, params, steps, time.perf_counter() - begin)
        return params

    params = {"frozen": theirs, "trained": {"new": new, "low": {}}}
    report("trained" if model is teacher else "converted", params, 0, 0.0)
    if new:
        loss = lambda params, batch_BU, key: transfer_loss(teacher, model.make_mixer(name), params, batch_BU)
        params = stage("transferred", loss, params, config.transfer_steps, config.transfer_rate, keys[1])
    if config.rank:
        params["trained"]["low"] = low_rank(theirs, config.rank, keys[2])
    else:
        params["trained"]["new"] = {**theirs, **params["trained"]["new"]}
    mean_nats = lambda params, batch_BU, key: jnp.mean(nats(params, batch_BU))
    stage("fine-tuned", mean_nats, params, config.tune_steps, config.tune_rate, keys[2])
    return rows


def assembled(params: dict[str, Any]) -> dict[str, Any]:
    """The teacher's weights, frozen; in their place or beside them what is new; and low-rank changes."""
    flat = lax.stop_gradient(params["frozen"]) | params["trained"]["new"]
    for path, (A_DR, B_RHK) in params["trained"]["low"].items():
        flat[path] = flat[path] + ALPHA / A_DR.shape[1] * jnp.einsum("dr,rhk->dhk", A_DR, B_RHK)
    return unflatten_dict(flat, sep="/")


def low_rank(theirs: dict[str, Any], R: int, key: jax.Array) -> dict[str, Any]:
    """Changes, at first 0, of each layer's q, k and v: as LoRA begins, A random, B 0."""
    paths = sorted(path for path in theirs if path.split("/")[-3:-1] in [["mixer", name] for name in "qkv"])
    changes = {}
    for path, key_ in zip(paths, jax.random.split(key, len(paths)), strict=True):
        D, H, K = theirs[path].shape
        changes[path] = like_torch(key_, (D, R)), jnp.zeros((R, H, K))
    return changes


def transfer_loss(teacher, mixer, params, batch_BU):
    """The mean over layers of |mixer(x) - the teacher's layer(x)|^2, on what comes to that layer in the teacher."""
    of_interest = lambda module, method: module.name in ("mixer_norm", "mixer")
    frozen = unflatten_dict(lax.stop_gradient(params["frozen"]), sep="/")
    _, kept = teacher.apply(
        {"params": frozen}, batch_BU[:, :-1], capture_intermediates=of_interest, mutable=["intermediates"]
    )
    student, errors = assembled(params)["stack"], []
    for layer, outputs in kept["intermediates"]["stack"].items():
        (x_BTD,), ((want_BTD, _),) = outputs["mixer_norm"]["__call__"], outputs["mixer"]["__call__"]
        got_BTD, _ = mixer.apply({"params": student[layer]["mixer"]}, x_BTD)
        errors.append(jnp.mean((got_BTD - want_BTD).astype(jnp.float32) ** 2))
    return sum(errors) / len(errors)


def write(config: Config, rows: list[dict[str, Any]]) -> None:
    """linearize.jsonl, table.md and loss.png."""
    part = config.out / "linearize.jsonl.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(config.out / "linearize.jsonl")
    teacher = rows[0]["val_loss"]
    lines = [
        f"{config.layers} layers of width {config.width}, a teacher of {config.steps} steps of {config.batch} x "
        f"{config.window} bytes of {config.data or 'the Python reference'}, softmax over {config.reach} in students; "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}",
        "",
        "| model | stage | nats per byte | over teacher | recovered | seconds | trained | parameters | state bytes |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lost = next(other["val_loss"] for other in rows if other["name"] == row["name"]) - teacher
        over = row["val_loss"] - teacher
        recovered = f"{1 - over / lost:.0%}" if lost > 0.01 else ""
        numbers = " | ".join(f"{row[key]:,}" for key in ("seconds", "trained", "parameters", "state_bytes"))
        loss = f"{row['val_loss']:.3f} | {over:+.3f} | {recovered}"
        lines.append(f"| {row['name']} | {row['stage']} | {loss} | {numbers} |")
    (config.out / "table.md").write_text("\n".join(lines) + "\n")
    plot(rows, config.out / "loss.png")


def plot(rows, path):
    """A line per model, over its stages."""
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        axes.plot([row["stage"] for row in mine], [row["val_loss"] for row in mine], marker="o", label=name)
    axes.set(ylabel="nats per held-out byte")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    host.keep_pages()
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, NotImplementedError, train.NonFiniteError) as error:
        sys.exit(f"error: {error}")
