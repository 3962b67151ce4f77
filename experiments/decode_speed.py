"""Does a token cost more the further one has read? Time per decoded token and bytes of state, early and late.

python experiments/decode_speed.py

For every architecture whose card says that its state is constant: one layer reads 64 and 16,384 tokens, then decodes
with T = 1 from both states in turn. Expect ratios of times about 1, and below 1.2; and the same bytes.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from tqdm import tqdm

import memzoo
from memzoo import checkpoint, contract


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/decode_speed")  # a new directory: decode_speed.jsonl
    names: tuple[str, ...] = ()  # of architectures; by default all whose state is constant
    width: int = 64
    batch: int = 4
    early: int = 64  # tokens read before decoding
    late: int = 16_384
    tokens: int = 256  # decoded for one timing
    repeats: int = 15


def measure(config: Config, name: str) -> dict[str, Any]:
    mixer = memzoo.make(name, width=config.width)
    x_BTD = jax.random.normal(jax.random.key(0), (config.batch, config.late, config.width))
    params = jax.jit(mixer.init)(jax.random.key(1), x_BTD[:, :1])
    read = jax.jit(lambda x_BTD: mixer.apply(params, x_BTD)[1])
    states = {"early": read(x_BTD[:, : config.early]), "late": read(x_BTD)}

    @jax.jit
    def decode(state, x_BTD):
        def token(state, x_BD):
            y_B1D, state = mixer.apply(params, x_BD[:, None], state)
            return state, y_B1D

        return lax.scan(token, state, jnp.moveaxis(x_BTD, 1, 0))

    seconds: dict[str, list[float]] = {when: [] for when in states}
    for turn in range(config.repeats + 2):
        for when, state in states.items():
            begin = time.perf_counter()
            jax.block_until_ready(decode(state, x_BTD[:, : config.tokens]))
            if turn > 1:
                seconds[when].append((time.perf_counter() - begin) / config.tokens)
    times = {when: statistics.median(values) for when, values in seconds.items()}
    sizes = {when: sum(leaf.nbytes for leaf in jax.tree.leaves(state)) for when, state in states.items()}
    return {
        "name": name,
        **{f"us_{when}": round(1e6 * value, 2) for when, value in times.items()},
        "ratio": round(times["late"] / times["early"], 3),
        **{f"bytes_{when}": value for when, value in sizes.items()},
    }


def main(config: Config) -> list[dict[str, Any]]:
    contract.positive(
        width=config.width, batch=config.batch, early=config.early, tokens=config.tokens, repeats=config.repeats
    )
    if config.late < max(config.early, config.tokens):
        raise ValueError(f"late: expected at least early and tokens, got {config.late}")
    for name in config.names:
        memzoo.make(name, width=config.width)  # a typo, or what does not fit, is known before the first is timed
    names = config.names or [name for name in memzoo.names() if memzoo.card(name).state == "constant"]
    checkpoint.check(config.out, {}, resume=False)
    device = jax.devices()[0]
    tqdm.write(f"jax {jax.__version__}, {device.device_kind}, {time.strftime('%Y-%m-%d')}")
    tqdm.write(f"{'':18} us per token at {config.early:>6,} and {config.late:>6,}   ratio   bytes of state at both")
    rows = []
    config.out.mkdir(parents=True, exist_ok=True)
    for name in tqdm(names, leave=False):
        row = measure(config, name)
        rows.append(row)
        times = f"{row['us_early']:22.1f} {row['us_late']:10.1f}"
        tqdm.write(f"{name:18} {times} {row['ratio']:7.3f} {row['bytes_early']:>10,} {row['bytes_late']:>10,}")
        (config.out / "decode_speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
