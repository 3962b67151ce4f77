"""Runs on disk: a directory that is whole from the moment it exists, continues bit for bit, and is never overwritten.

    config.json     what the run was started with
    checkpoints/    the last few states, each with the position in the data, written by Orbax in the background
    metrics.jsonl   a line per evaluation

A checkpoint is written under another name and renamed when it is whole, so a process killed at any time leaves the last
good one. A line of metrics is written before the checkpoint of its step; `rewind` drops the lines after it.
"""

import json
import logging
import uuid
import warnings
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp


def check(out: Path, config: dict[str, Any], resume: bool) -> None:
    """Raises ValueError where a new run would overwrite something, or where there is nothing that it could resume:
    no checkpoint, or a run of another configuration (it says which fields differ)."""
    if not resume:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(
                f"out: expected a new or empty directory, got {out}, which holds something already and is not "
                "overwritten; continue that run with --resume, or choose another --out"
            )
        return
    stored = out / "config.json"
    if not stored.is_file() or not any((out / "checkpoints").glob("*")):
        raise ValueError(f"resume: expected a run with a checkpoint in {out}, got none; begin one without --resume")
    then, now = json.loads(stored.read_text()), json.loads(json.dumps(config))
    differ = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differ:
        fields = "; ".join(f"{name} was {then.get(name)!r}, now {now.get(name)!r}" for name in differ)
        raise ValueError(f"resume: {out} is a run of another configuration: {fields}")


def create(out: Path, config: dict[str, Any], state: Any, data: grain.DatasetIterator) -> None:
    """Makes the directory of a new run with its configuration and its first checkpoint, all of it or nothing."""
    out = out.absolute()
    fresh = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    fresh.mkdir(parents=True)
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with manager(fresh) as first:
        save(first, state, data)
    try:
        fresh.rename(out)
    except OSError as error:
        raise ValueError(
            f"out: expected a new or empty directory, got {out}: {error}; the run is in {fresh}"
        ) from error


def manager(out: Path, keep: int = 3) -> ocp.CheckpointManager:
    """Of the checkpoints of a run, the last `keep`. Closing it waits until all are written."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(out.absolute() / "checkpoints", options=options)


def save(checkpoints: ocp.CheckpointManager, state: Any, data: grain.DatasetIterator) -> None:
    """Saves state (with a field `step`) and position. Returns once they are copied; the files are written meanwhile."""
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data))
    if not checkpoints.save(int(state.step), args=args):
        raise RuntimeError(f"step {int(state.step)}: not saved, {last_good(checkpoints)} is there already")


def restore(checkpoints: ocp.CheckpointManager, like: Any, data: grain.DatasetIterator) -> Any:
    """The newest state that is whole, in the shapes, dtypes and places of `like`; puts `data` at its position.

    Damaged newer ones are named in a warning and moved aside. Raises ValueError when there is none.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(data))
    damaged: dict[int, Exception] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            state = checkpoints.restore(step, args=args)["state"]
        except Exception as error:  # Orbax raises as many kinds as there are ways to be damaged
            damaged[step] = error
            # It leaves the other failed reads to the event loop, which would bury the warning below under their traces.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            continue
        for bad, why in damaged.items():
            path = Path(checkpoints.directory) / str(bad)
            path.rename(path.with_name(f"damaged.{bad}.{uuid.uuid4().hex[:8]}"))
            warnings.warn(f"checkpoint {path} is damaged, {step} is used: {str(why)[:200]}", stacklevel=2)
        checkpoints.reload()
        return state
    raise ValueError(f"resume: expected a whole checkpoint in {checkpoints.directory}, got none; {damaged}")


def last_good(checkpoints: ocp.CheckpointManager) -> str:
    """Where the newest checkpoint is, once it is written."""
    checkpoints.wait_until_finished()
    return str(Path(checkpoints.directory) / str(checkpoints.latest_step()))


def rewind(metrics: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines after `step`, and one that a kill cut short. Returns the others."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    rows = [row for row in rows if row["step"] <= step]
    part = metrics.with_name(metrics.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(metrics)
    return rows
