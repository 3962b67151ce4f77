"""Stacks of linear and full attention at any ratio: constant memory in most layers, exact recall in a few.

    3:1     linear, linear, linear, full, and again        0:1     a Transformer        1:0     linear layers alone

Source: Wang, Zhu, Abreu, Shan, Kergan, Pan, Chou, Li, Zhang, Huang, Eshraghian, "A Systematic Analysis of Hybrid Linear
Attention" (2025), arXiv:2507.06457: ratios of 24:1, 12:1, 6:1 and 3:1, full layers evenly among the linear ones, which
are HGRN, RetNet, GLA, HGRN-2, DeltaNet or Gated DeltaNet. It recommends HGRN-2 or Gated DeltaNet from 3:1 to 6:1.
Differs: full attention here is the zoo's: full as long as a text is no longer than its window, 1,024 tokens where
`fields` has no other, and of constant memory beyond it. A mixer whose paper gives each layer another decay gets that of
its layer's height (HGRN and HGRN2 by `lower_bound`, Lightning Attention by `depth`, RWKV-7 by `layer` and `layers`, in
its initial values), fixed where the paper learns it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from memzoo import contract
from memzoo.models.backbone import LanguageModel, Place

# The fields that a mixer has in layer l of L.
BY_HEIGHT: dict[str, Callable[[int, int], dict[str, float]]] = {
    "hgrn": lambda l, L: {"lower_bound": l / L},
    "hgrn2": lambda l, L: {"lower_bound": l / L},
    "lightning": lambda l, L: {"depth": l / (L - 1) if L > 1 else 0.0},
    "rwkv7": lambda l, L: {"layer": l, "layers": L},
    "slstm": lambda l, L: {"depth": l / (L - 1) if L > 1 else 0.0},
}


def hybrid(
    vocab: int,
    width: int,
    layers: int,
    ratio: str = "3:1",
    linear: str = "gated_deltanet",
    full: str = "attention",
    fields: Mapping[str, Mapping[str, Any]] | None = None,
    **of_the_stack: Any,
) -> LanguageModel:
    """A LanguageModel whose layers are `linear` and `full` ones in the ratio of, say, 3:1, or the nearest there is.

    fields: of `linear` and `full`, whichever the ratio leaves; of_the_stack: what else a LanguageModel takes.
    Raises ValueError, by name, for a ratio that is not of whole numbers or 0:0, for a single layer that should be of
    both kinds, and as LanguageModel does.
    """
    contract.positive(layers=layers)
    fields = {} if fields is None else fields
    for kind in fields:
        if kind not in (linear, full):
            known = contract.nearest(kind, (linear, full))
            raise ValueError(f"fields: {kind!r} is neither the linear nor the full mixer; {known}")
    kinds = [full if is_full else linear for is_full in full_layers(ratio, layers)]
    places = tuple(place(kind, l, layers, fields.get(kind, {})) for l, kind in enumerate(kinds))
    used = {kind: fields[kind] for kind in fields if kind in kinds}
    return LanguageModel(vocab, width, layers, shortest(places), used, **of_the_stack)


def full_layers(ratio: str, layers: int) -> list[bool]:
    """Which layers are full: the nearest number of them, evenly spread, the last one of each stretch, the top too.

    At least one layer of each kind that the ratio has.
    """
    parts = re.fullmatch(r"(\d+):(\d+)", ratio) if isinstance(ratio, str) else None
    if parts is None or not any(map(int, parts.groups())):
        raise ValueError(f"ratio: expected linear:full, two whole numbers and not both 0, got {ratio!r}")
    n_linear, n_full = map(int, parts.groups())
    both = n_linear > 0 and n_full > 0
    if both and layers < 2:
        raise ValueError(f"layers: expected at least 2 for a ratio of {ratio}, got {layers}")
    # rounded in whole numbers, halves up
    count = (2 * layers * n_full + n_linear + n_full) // (2 * (n_linear + n_full))
    if both:
        count = min(max(count, 1), layers - 1)
    return [(l + 1) * count // layers > l * count // layers for l in range(layers)]


def place(kind: str, l: int, layers: int, given: Mapping[str, Any]) -> Place:
    """The mixer, with the fields that its layer decides, less those that are given."""
    by_height = BY_HEIGHT[kind](l, layers) if kind in BY_HEIGHT else {}
    own = {name: value for name, value in by_height.items() if name not in given}
    return (kind, own) if own else kind


def shortest(places: tuple[Place, ...]) -> tuple[Place, ...]:
    """The shortest pattern that, repeated, is these places, so that layers can be scanned."""
    lengths = (n for n in range(1, len(places) + 1) if len(places) % n == 0)
    return next(places[:n] for n in lengths if places[:n] * (len(places) // n) == places)
