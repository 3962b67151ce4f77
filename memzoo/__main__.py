"""The catalogue in a terminal: `python -m memzoo`, `--family "delta rule"`, `--card gated_deltanet`."""

import argparse
import dataclasses
import importlib
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

import memzoo

WIDTH = 256  # of a card, unless --width says another


def listing(family: str | None, columns: int) -> str:
    """A line per architecture under its family, no wider than `columns` where that leaves room for words."""
    cards = [memzoo.card(name) for name in memzoo.names(family)]
    indent = 4 + max(len(card.name) for card in cards)
    lines = []
    for kind in dict.fromkeys(card.family for card in cards):
        lines += ["", kind]
        for card in cards:
            if card.family == kind:
                text = card.line + (" (its state grows)" if card.state == "grows" else "")
                lines += beside(f"  {card.name}", text, indent, columns)
    return "\n".join([*lines[1:], "", *textwrap.wrap("--card NAME says more of one", columns)])


def card(name: str, width: int, columns: int) -> str:
    """What the catalogue, the file and the class say of one architecture, with its sizes at `width`."""
    row = memzoo.card(name)
    mixer = memzoo.make(name, width=width)
    params = jax.eval_shape(lambda: mixer.init(jax.random.key(0), jnp.zeros((1, 1, width))))
    state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: mixer.initial_state(1)))
    total = sum(leaf.size * leaf.dtype.itemsize for _, leaf in state)
    parts = [f"{jax.tree_util.keystr(path).lstrip('.')} {leaf.dtype} {list(leaf.shape[1:])}" for path, leaf in state]
    paper = f"{row.title}, https://arxiv.org/abs/{row.arxiv}" if row.arxiv else row.title
    rows = [
        ("family", row.family),
        ("paper", paper),
        ("forms", f"{', '.join(row.forms)}; the first is the definition"),
        ("state", f"{total:,} bytes per sequence at width {width}" + (", and grows" if row.state == "grows" else "")),
        *(("", part) for part in parts),
        ("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} at width {width}"),
        ("class", f"{row.module}.{row.flax_class}"),
        *zip(["fields", *[""] * len(comments := fields(mixer))], comments, strict=False),
    ]
    said = importlib.import_module(row.module).__doc__ or ""
    lines = [row.name, "", *paragraphs(said, columns), ""]
    for label, text in rows:
        lines += beside(label, text, 12, columns)
    return "\n".join(lines)


def fields(mixer) -> list[str]:
    """Each field of a mixer with its default, and what its line in the class says of it."""
    source = inspect.getsource(type(mixer))
    said = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    lines = []
    for field in dataclasses.fields(mixer):
        if field.name not in ("parent", "name"):
            value = field.default
            default = "" if value is dataclasses.MISSING else f" = {getattr(value, '__name__', None) or repr(value)}"
            lines.append(field.name + default + (f"  ({said[field.name]})" if field.name in said else ""))
    return lines


def paragraphs(text: str, columns: int) -> Iterable[str]:
    """The lines of a docstring, its sentences wrapped, its equations as they are."""
    whole = re.sub(r"(?<=\S)\n(?!\s|Source: |Differs: |Dims: )", " ", inspect.cleandoc(text))
    for line in whole.splitlines():
        as_it_is = not line or line.startswith(" ")
        yield from [line] if as_it_is else textwrap.wrap(line, min(columns, 120), break_on_hyphens=False)


def beside(label: str, text: str, indent: int, columns: int) -> Iterable[str]:
    """The label, and the text beside it, wrapped."""
    lines = textwrap.wrap(text, max(columns - indent, 20), break_on_hyphens=False)
    return (f"{left:<{indent}}{line}" for left, line in zip([label, *[""] * len(lines)], lines, strict=False))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m memzoo", description="The catalogue of recurrent memory architectures.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--family", help="only the architectures of this family")
    what.add_argument("--card", metavar="NAME", help="all about one: equation, source, forms, sizes, fields")
    parser.add_argument("--width", type=int, help=f"the width that a card gives sizes for ({WIDTH})")
    given = parser.parse_args(arguments)
    columns = shutil.get_terminal_size().columns
    try:
        if given.card is not None:
            print(card(given.card, WIDTH if given.width is None else given.width, columns))
        elif given.width is not None:
            raise ValueError("width: expected --card NAME beside it, as a card alone has sizes")
        else:
            print(listing(given.family, columns))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
