"""How well does each architecture of the zoo model text, at the same small size and budget?

    python experiments/zoo_language.py

trains two layers of each at the default of language_model.py, one after the other, and writes a table of their losses
on held-out text, beside those of counts: of bytes (unigram) and of pairs of bytes (bigram). A loss under the bigram's
is one that used more than the last byte.

    python experiments/zoo_language.py --resume

goes on where the first was killed, bit for bit: what was finished is not trained again. What failed, with a loss that
was not finite or an error, is in the table with its message; the others go on, and --resume tries it again.
`--names gru lru` takes these alone; others can be added with --resume. All have the same learning rate, so the order of
two that are close says little.

Each takes one to five minutes on two CPU cores. Expect, against 2.321 nats for pairs of bytes, with a third of the
steps (--steps 200): from 1.43 (mamba2), 1.46 (gru) and 1.47 (mamba) over 1.50 (gated_deltanet) and 1.76 (attention) to
2.20 (linear_attention, based, aaren, which know no order of tokens, and causal_rn 2.23); bilinear_rnn, which forgets
all but its last few tokens, is at 2.36, and at 2.316 after all 600. With all 600, too: hax 1.240, mom 1.259, lizard
1.288, gam 1.299, liger 1.336, jrt 2.077.

`--out` holds table.md, zoo_language.jsonl (a line per architecture), loss.png, and a directory for each architecture
as language_model.py writes it.

Dims: N bytes, M windows, U = T + 1 bytes of a window, Y the byte before, Z vocabulary.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import language_model
import numpy as np
import tyro
from matplotlib.figure import Figure

import memzoo
from memzoo import checkpoint, contract, host
from memzoo.models.backbone import describe
from memzoo.tasks import text


@dataclass(frozen=True)
class Config:
    names: tuple[str, ...] = ()  # of architectures; by default the whole zoo
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
    out: Path = Path("runs/zoo_language")  # a new directory
    resume: bool = False  # continue the run in --out
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    eval_every: int = 200  # steps from one evaluation and checkpoint to the next
    eval_windows: int = 2048  # held-out windows to evaluate, or all where there are fewer


def main(config: Config) -> dict[str, dict[str, Any]]:
    """Trains what is not finished, and returns the lines of zoo_language.jsonl by name."""
    fields = ("layers", "width", "window", "batch", "steps", "eval_every", "eval_windows")
    contract.positive(**{field: getattr(config, field) for field in fields})
    names = config.names or memzoo.names()
    for name in names:
        memzoo.card(name)  # a typo is known before the first is trained
    corpus = text.corpus(config.data, config.window)
    rows = finished(config, corpus)
    baseline = baselines(corpus, config.window, config.eval_windows)
    print(", ".join(f"{kind} {loss:.3f}" for kind, loss in baseline.items()), "nats per held-out byte")
    for index, name in enumerate(names):
        if name in rows and "error" not in rows[name]:
            continue
        print(f"\n{index + 1} of {len(names)}: ", end="")
        rows[name] = measure(config, name)
        write(config, rows, baseline)
        jax.clear_caches()  # or the programs of all would stay in memory
    write(config, rows, baseline)
    print("\n" + (config.out / "table.md").read_text())
    if worse := [name for name, row in rows.items() if row.get("val_loss", 0) >= baseline["bigram"]]:
        print(f"no better than counts of pairs of bytes: {', '.join(worse)}")
    return rows


def training(config: Config, name: str) -> language_model.Config:
    """The configuration of one architecture's run, which goes on where there is one."""
    fields = {field: value for field, value in asdict(config).items() if field != "names"}
    out = config.out / name
    return language_model.Config(**fields | {"mixer": name, "out": out, "resume": out.exists()})


def finished(config: Config, corpus: text.Corpus) -> dict[str, dict[str, Any]]:
    """The lines of the run to continue, by name, once all that is there is known to have this configuration."""
    if not config.resume:
        checkpoint.check(config.out, {}, resume=False)
        return {}
    if not config.out.is_dir():
        raise ValueError(f"resume: expected a run in {config.out}, got none; begin one without --resume")
    for stored in sorted(config.out.glob("[!.]*/config.json")):
        one = training(config, stored.parent.name)
        checkpoint.check(one.out, language_model.settings(one, corpus), resume=True)
    lines = config.out / "zoo_language.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return {row["name"]: row for row in rows}


def measure(config: Config, name: str) -> dict[str, Any]:
    """Trains one architecture. A failure is its result too."""
    row: dict[str, Any] = {"name": name, "family": memzoo.card(name).family}
    try:
        model, _, (*_, last) = language_model.run(training(config, name))
    except Exception as error:  # of any kind: one architecture must not end the others
        print(f"{name}: {type(error).__name__}: {error}")
        return row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    size = describe(model)
    row |= {key: last[key] for key in ("val_loss", "train_loss", "seconds", "tokens_per_second")}
    return row | {"parameters": size.parameters, "state_bytes": size.state_bytes}


def baselines(corpus: text.Corpus, window: int, most: int) -> dict[str, float]:
    """Nats per held-out byte, over the bytes that the models predict, of what counts of the training part say.

        p(z) = (n_z + a) / (N + 256 a)        p(z | y) = (n_yz + b p(z)) / (n_y + b)

    a and b are the best for the last tenth of the training part by the counts of the rest.
    """
    windows_MU = text.evaluation_windows(corpus.held_out_N, window, most)
    held_out_YZ = pairs(windows_MU[:, :-1], windows_MU[:, 1:])
    train_N = corpus.train_N
    cut = int(0.9 * len(train_N))
    fit_YZ, rest_YZ = (pairs(part_N[:-1], part_N[1:]) for part_N in (train_N[:cut], train_N[cut:]))
    grid = 2.0 ** np.arange(-10, 11)
    a = min(grid, key=lambda a: nats(unigram(fit_YZ, a), rest_YZ))
    b = min(grid, key=lambda b: nats(bigram(fit_YZ, a, b), rest_YZ))
    all_YZ = pairs(train_N[:-1], train_N[1:])
    return {"unigram": nats(unigram(all_YZ, a), held_out_YZ), "bigram": nats(bigram(all_YZ, a, b), held_out_YZ)}


def pairs(before, after, block=2**22):
    """[Y, Z]: how often each byte followed each; two arrays of the same shape."""
    before_N, after_N = before.reshape(-1), after.reshape(-1)
    n_YZ = np.zeros(text.VOCAB**2, np.int64)
    for i in range(0, len(before_N), block):  # a file may be larger than the memory
        index = before_N[i : i + block].astype(np.int64) * text.VOCAB + after_N[i : i + block]
        n_YZ += np.bincount(index, minlength=text.VOCAB**2)
    return n_YZ.reshape(text.VOCAB, text.VOCAB)


def unigram(n_YZ, a):
    """p(z), [1, Z]."""
    n_Z = n_YZ.sum(0)
    return ((n_Z + a) / (n_Z.sum() + text.VOCAB * a))[None]


def bigram(n_YZ, a, b):
    """p(z | y), [Y, Z]."""
    return (n_YZ + b * unigram(n_YZ, a)) / (n_YZ.sum(1, keepdims=True) + b)


def nats(p_YZ, n_YZ) -> float:
    """The mean surprise over pairs that occurred n times."""
    return float(-np.sum(n_YZ * np.log(p_YZ)) / n_YZ.sum())


def write(config: Config, rows: dict[str, dict[str, Any]], baseline: dict[str, float]) -> None:
    """zoo_language.jsonl, table.md and loss.png, the best first, those that failed last."""
    config.out.mkdir(parents=True, exist_ok=True)
    part = config.out / "zoo_language.jsonl.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    part.replace(config.out / "zoo_language.jsonl")

    counts = [{"name": f"{kind} counts", "val_loss": loss} for kind, loss in baseline.items()]
    done = sorted([row for row in rows.values() if "error" not in row] + counts, key=lambda row: row["val_loss"])
    lines = [
        f"{config.layers} layers of width {config.width}, {config.steps} steps of {config.batch} x {config.window} "
        f"bytes of {config.data or 'the Python reference'}; {jax.device_count()} x {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}, {time.strftime('%Y-%m-%d')}",
        "",
        "| architecture | family | nats per byte | over bigram | seconds | tokens/s | parameters | state bytes |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in done:
        sizes = [f"{row[key]:,.0f}" if key in row else "" for key in ("seconds", "tokens_per_second", "parameters")]
        sizes.append(f"{row['state_bytes']:,}" if "state_bytes" in row else "")
        loss = f"{row['val_loss']:.3f} | {row['val_loss'] - baseline['bigram']:+.3f}"
        lines.append(f"| {row['name']} | {row.get('family', '')} | {loss} | {' | '.join(sizes)} |")
    for row in rows.values():
        if "error" in row:
            lines.append(f"| {row['name']} | {row['family']} | failed: {row['error'].replace('|', '/')} | | | | | |")
    (config.out / "table.md").write_text("\n".join(lines) + "\n")
    plot([row for row in done if "family" in row], baseline, config.out / "loss.png")


def plot(rows, baseline, path):
    """A bar per architecture, the best on top, and lines for the counts."""
    axes = (figure := Figure(figsize=(6, 1.2 + 0.22 * len(rows)), layout="constrained")).subplots()
    axes.barh([row["name"] for row in rows], [row["val_loss"] for row in rows])
    for index, (kind, loss) in enumerate(baseline.items()):
        axes.axvline(loss, color=f"C{index + 1}", linestyle="--", label=f"{kind} counts")
    axes.invert_yaxis()
    axes.set(xlabel="nats per held-out byte", xlim=(0, None))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    host.keep_pages()
    try:
        rows = main(tyro.cli(Config, description=__doc__))
    except (ValueError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
    if failed := [name for name, row in rows.items() if "error" in row]:
        sys.exit(f"error: {len(failed)} of {len(rows)} failed: {', '.join(failed)}")
