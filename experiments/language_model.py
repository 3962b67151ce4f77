"""Which mixer models text best for its size? A byte-level language model of any mixers, on any file.

    python experiments/language_model.py

trains on the reference text inside every Python installation and prints a sample. Expect 1.28 nats per held-out byte
(1.85 bits) after 600 steps: 71 s on two CPU cores, and 114 s with the installation before it.

    python experiments/language_model.py --data tinyshakespeare.txt --layers 4 --width 128 --hidden 256 --window 64 \\
        --batch 12 --steps 2000 --eval-every 500 --out runs/shakespeare

is nanoGPT's CPU setting (0.83 M parameters, the last 10 % held out), which publishes 1.88 nats per character. Expect
1.58 with gated_deltanet, over all the held-out text in windows of 64: 155 s on two CPU cores; 1.57 with `--mixer
titans`. With `--layers 2` 1.618, and 1.621 with titans in 1.5 times as long.

Other mixers, as a pattern over the layers: `--mixer gated_deltanet,gated_deltanet,attention`. On a GPU or TPU the same
with larger flags, as `--width 512 --layers 8 --window 1024 --batch 64 --dtype bfloat16`.

A run that was killed goes on with the same flags and `--resume`, and gives the same losses bit for bit. `--out` holds
metrics.jsonl (a line per evaluation, losses in nats per byte), config.json, loss.png, tensorboard/ and checkpoints/.

Dims: B batch, T time, U = T + 1 bytes of a window, M windows, Z vocabulary.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from tqdm import tqdm

from memzoo import checkpoint, contract, host, parallel, train
from memzoo.models.backbone import LanguageModel, describe
from memzoo.sample import check_settings, generate
from memzoo.tasks import text


@dataclass(frozen=True)
class Config:
    mixer: str = "gated_deltanet"  # NAME, or NAME,NAME,...: a pattern that repeats over the layers
    layers: int = 2
    width: int = 128
    hidden: int | None = None  # of the MLP; by default 8/3 of the width
    window: int = 128  # tokens predicted in one training window
    batch: int = 16  # windows per step, over all devices
    steps: int = 600
    learning_rate: float = 4e-3  # at its peak, after warmup
    warmup: int = 100
    weight_decay: float = 0.3
    seed: int = 0
    data: Path | None = None  # any file; by default Python's own reference text
    out: Path = Path("runs/language_model")  # a new directory
    resume: bool = False  # continue the run in --out from its last checkpoint
    strategy: Literal["jit", "pmap"] = "jit"  # data parallel over a mesh, or one program per device
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    eval_every: int = 100  # steps from one evaluation and checkpoint to the next
    eval_windows: int = 2048  # held-out windows to evaluate, or all where there are fewer
    prompt: str = "The "
    sample: int = 400  # bytes to generate at the end
    temperature: float = 0.8


def nats(model, params, batch_BU):
    """[B, T]: how surprised the model is by each byte."""
    logits_BTZ, _ = model.apply(params, batch_BU[:, :-1])
    return train.cross_entropy(logits_BTZ, batch_BU[:, 1:])


def main(config: Config) -> list[dict[str, Any]]:
    """Trains, prints a sample, and returns the lines of metrics.jsonl."""
    contract.positive(sample=config.sample)
    check_settings(text.VOCAB, config.temperature, None, None, None)
    if not config.prompt:
        raise ValueError("prompt: expected at least one character, got ''")
    model, state, rows = run(config)
    prompt_1T = jnp.array([list(config.prompt.encode())], jnp.int32)
    key = jax.random.wrap_key_data(state.key)
    said = generate(model, state.params, prompt_1T, config.sample, key, config.temperature)
    print(config.prompt + bytes(np.asarray(said.tokens_BS[0], np.uint8)).decode(errors="replace"))
    return rows


def run(config: Config) -> tuple[LanguageModel, train.TrainState, list[dict[str, Any]]]:
    """Trains, or with `resume` goes on, to the last step. Returns the model, its state, the lines of metrics.jsonl."""
    contract.positive(eval_every=config.eval_every, eval_windows=config.eval_windows)
    corpus = text.corpus(config.data, config.window)
    record = settings(config, corpus)
    checkpoint.check(config.out, record, config.resume)
    spread = parallel.make(config.strategy, config.batch)

    dtype = jnp.dtype(config.dtype)
    mixers = tuple(config.mixer.split(","))
    model = LanguageModel(text.VOCAB, config.width, config.layers, mixers, hidden=config.hidden, dtype=dtype)
    optimizer = train.adamw(config.learning_rate, config.steps, config.warmup, config.weight_decay)
    batches = text.training_batches(corpus.train_N, config.window, config.batch, config.seed)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(init_key, jnp.zeros((1, config.window), jnp.int32))
    state = train.create(params, optimizer, key)
    if not config.resume:
        checkpoint.create(config.out, record, state, batches)
    with checkpoint.manager(config.out) as checkpoints:
        if config.resume:
            state = checkpoint.restore(checkpoints, state, batches)
        state, rows = fit(config, model, optimizer, spread, corpus, batches, state, checkpoints)
    return model, state, rows


def settings(config: Config, corpus: text.Corpus) -> dict[str, Any]:
    """What a run and one that continues it have in common: config.json."""
    record = asdict(config) | {"data": config.data and str(config.data), "data_bytes": sum(map(len, corpus))}
    del record["out"], record["resume"]
    return record


def fit(config, model, optimizer, spread, corpus, batches, state, checkpoints):
    """Trains to the last step. Returns the state, as one copy, and the lines of metrics.jsonl."""
    start, size = int(state.step), describe(model)
    print(f"{config.mixer}: {size.parameters:,} parameters, {size.state_bytes:,} bytes of state; from step {start}")
    windows_MU = text.evaluation_windows(corpus.held_out_N, config.window, config.eval_windows)
    held_out = [spread.put_batch(batch) for batch in padded(windows_MU, config.batch)]

    def loss(params, batch_BU, key):
        (logits_BTZ, _), sown = model.apply(params, batch_BU[:, :-1], rngs={"ranking": key}, mutable=["losses"])
        # Some mixers have a loss of their own; hax ranks a random sample of tokens.
        return jnp.mean(train.cross_entropy(logits_BTZ, batch_BU[:, 1:])) + sum(jax.tree.leaves(sown))

    def held_out_loss(params, batch, axis):
        windows_BU, real_B = batch
        total = jnp.sum(jnp.where(real_B[:, None], nats(model, params, windows_BU), 0))
        return total if axis is None else jax.lax.psum(total, axis)

    train_step = spread.compile_step(train.make_step(loss, optimizer))
    eval_step = spread.compile_eval(held_out_loss)
    last_good = partial(checkpoint.last_good, checkpoints)

    rows = checkpoint.rewind(config.out / "metrics.jsonl", start)
    board = SummaryWriter(str(config.out / "tensorboard"), purge_step=start + 1)
    begin = time.perf_counter() - (rows[-1]["seconds"] if rows else 0)  # a killed run's time counts too
    state, losses, ahead = spread.put_state(state), [], None
    steps = tqdm(range(start + 1, config.steps + 1), initial=start, total=config.steps, unit="step")
    with (config.out / "metrics.jsonl").open("a", buffering=1) as lines, board:
        for step in steps:
            state, metrics = train_step(state, spread.put_batch(next(batches)))
            if step == start + 1:  # which compiled
                jax.block_until_ready(metrics)
                clock, timed = time.perf_counter(), step
            if ahead:  # looked at one step late, so that the device never waits
                losses.append(train.guard(step - 1, ahead, last_good)["loss"])
                speed = (step - 1 - timed) * config.batch * config.window / (time.perf_counter() - clock)
                steps.set_postfix(loss=f"{losses[-1]:.3f}", tokens_per_s=f"{speed:,.0f}", refresh=False)
            ahead = metrics
            if step % config.eval_every and step != config.steps:
                continue

            losses.append(train.guard(step, ahead, last_good)["loss"])
            now = time.perf_counter()
            speed = (step - timed) * config.batch * config.window / (now - clock)
            total = sum(float(eval_step(state.params, batch)) for batch in held_out)
            val = train.guard(step, {"val_loss": total / windows_MU[:, 1:].size}, last_good)["val_loss"]
            row = {"step": step, "train_loss": float(np.mean(losses)), "val_loss": val}
            row |= {"seconds": round(time.perf_counter() - begin, 2), "tokens_per_second": round(speed)}
            rows.append(row)
            lines.write(json.dumps(row) + "\n")  # before the checkpoint, so that none lacks its line
            for name in ("train_loss", "val_loss", "tokens_per_second"):
                board.add_scalar(name, row[name], step)
            checkpoint.save(checkpoints, spread.one(state), batches)
            plot(rows, config.out / "loss.png")
            bits = f"{val / math.log(2):.3f} bits per byte"
            steps.write(f"step {step}: train {row['train_loss']:.3f}, held out {val:.3f} nats = {bits}")
            ahead, losses, clock, timed = None, [], time.perf_counter(), step
    return spread.one(state), rows


def padded(windows_MU, B):
    """Batches of B rows, and which of them are real."""
    for i in range(0, len(windows_MU), B):
        rows_BU = np.resize(windows_MU[i : i + B], (B, windows_MU.shape[1]))
        yield rows_BU, np.arange(B) < len(windows_MU) - i


def plot(rows, path):
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for name, label in (("train_loss", "training"), ("val_loss", "held out")):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label)
    axes.set(xlabel="step", ylabel="nats per byte")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    host.keep_pages()
    try:
        main(config)
    except (ValueError, NotImplementedError, train.NonFiniteError) as error:
        sys.exit(f"error: {error}")
