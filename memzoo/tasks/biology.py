"""Texts of biology and chemistry: proteins with pieces left out, families of them, sets of molecules.

    start A B C D E F   ->   start A B mask_1 E mask_2 end   mask_1 C D   mask_2 F        fill in the middle
    places 0 1 2 3 4 5 6     0     1 2 3      5 6      0     3      3 4   6      6

A causal model so learns to fill in what it has seen both sides of. Functions of one example each, for
`grain.MapDataset.map` or any other loop.

Source: Schmidinger et al., "Bio-xLSTM: Generative modeling, representation and in-context learning of biological and
chemical sequences" (2024), arXiv:2411.04165, sec. 3, and its released code; fill in the middle with several pieces and
with places is that of Sgarbossa, Malbranke, Bitbol, "ProtMamba: a homology-aware but alignment-free protein state space
model" (2024).

Dims: N tokens of a protein, U of a text.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from memzoo.contract import positive

END, MASKS = 2, (33, 34, 35, 36, 37)  # of Prot-xLSTM's 38 tokens


class Placed(NamedTuple):
    """A text, and the place of each token in its own protein."""

    tokens_U: np.ndarray
    place_U: np.ndarray


def pieces(
    rng: np.random.Generator, tokens: int, most: int = len(MASKS), part: float = 0.2, always: bool = False
) -> list[tuple[int, int]]:
    """What to leave out of a protein of so many tokens: (from, to), in order, apart, and never the first token.

    As many as a Poisson variable of mean 1 says, if that is at most `most` (or there are so many tokens), and at least
    one if `always`; each begins anywhere and is up to about `part` of what there is before the next one, 1 at least.
    """
    positive(tokens=tokens, most=most)
    if not 0 < part <= 1:
        raise ValueError(f"part: expected a number in (0, 1], got {part}")
    most = min(most, tokens - 1)
    number = rng.poisson(1)
    while number > most:
        number = rng.poisson(1)
    number = min(max(number, int(always)), most)
    starts = [*np.sort(rng.choice(np.arange(1, tokens), number, replace=False)), tokens]
    longest = [max(int((after - start) * part), 2) for start, after in pairwise(starts)]
    return [(int(start), int(start + rng.integers(1, n))) for start, n in zip(starts, longest, strict=False)]


def fill_in_the_middle(
    tokens_N: ArrayLike, left_out: Sequence[tuple[int, int]], masks: Sequence[int] = MASKS, end: int = END
) -> Placed:
    """A protein with pieces left out, each replaced by a mask; after `end`, each mask with what it stands for.

    Raises ValueError for pieces that are not in order and apart, or are more than there are masks.
    """
    tokens_N = np.asarray(tokens_N)
    if tokens_N.ndim != 1 or not np.issubdtype(tokens_N.dtype, np.integer):
        raise ValueError(f"tokens_N: expected integers in one row, got {tokens_N.dtype}{list(tokens_N.shape)}")
    if len(left_out) > len(masks):
        raise ValueError(f"left_out: expected at most {len(masks)} pieces, one for each mask, got {len(left_out)}")
    kept, filled, at = [], [], 0
    place_N = np.arange(len(tokens_N))
    for (start, stop), mask in zip(left_out, masks, strict=False):
        if not at <= start < stop <= len(tokens_N):
            raise ValueError(f"left_out: expected pieces in order, apart and in 0 ... {len(tokens_N)}, got {left_out}")
        piece = slice(start, stop)
        kept += [(tokens_N[at:start], place_N[at:start]), ([mask], [start])]
        filled += [([mask], [start]), (tokens_N[piece], place_N[piece])]
        at = stop
    kept += [(tokens_N[at:], place_N[at:])]
    kept += [([end], [0])] if len(left_out) else []
    tokens, places = zip(*kept, *filled, strict=True)
    return Placed(np.concatenate(tokens).astype(tokens_N.dtype), np.concatenate(places).astype(np.int32))


def family(
    rng: np.random.Generator,
    proteins: Sequence[ArrayLike],
    most: int = len(MASKS),
    part: float = 0.2,
    masks: Sequence[int] = MASKS,
    end: int = END,
) -> Placed:
    """Proteins, each with the token that begins one, in any order, with pieces left out of each, in one text."""
    if not len(proteins):
        raise ValueError("proteins: expected at least one, got none")
    order = [np.asarray(proteins[n]) for n in rng.permutation(len(proteins))]
    parts = [fill_in_the_middle(one, pieces(rng, len(one), min(most, len(masks)), part), masks, end) for one in order]
    return Placed(*(np.concatenate(of_all) for of_all in zip(*parts, strict=True)))


def in_context(
    rng: np.random.Generator, molecules: Sequence[ArrayLike], begin: int, between: int, end: int
) -> np.ndarray:
    """Molecules that are alike, in any order, as one text, tokens_U: what comes first says what is wanted next."""
    if not len(molecules):
        raise ValueError("molecules: expected at least one, got none")
    order = [np.asarray(molecules[n]) for n in rng.permutation(len(molecules))]
    apart = [part for molecule in order for part in ([between], molecule)]
    return np.concatenate([[begin], *apart[1:], [end]]).astype(order[0].dtype)
