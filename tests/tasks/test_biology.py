"""Proteins with pieces left out, families, sets of molecules."""

import numpy as np
import pytest

from memzoo.tasks.biology import END, MASKS, family, fill_in_the_middle, in_context, pieces


def test_the_example_of_the_docstring():
    start, A, B, C, D, E, F = 0, *range(4, 10)
    tokens_U, place_U = fill_in_the_middle([start, A, B, C, D, E, F], [(3, 5), (6, 7)])
    one, two = MASKS[:2]
    np.testing.assert_array_equal(tokens_U, [start, A, B, one, E, two, END, one, C, D, two, F])
    np.testing.assert_array_equal(place_U, [0, 1, 2, 3, 5, 6, 0, 3, 3, 4, 6, 6])


def test_nothing_left_out_is_the_protein_itself():
    tokens_U, place_U = fill_in_the_middle([0, 5, 6], [])
    np.testing.assert_array_equal(tokens_U, [0, 5, 6])
    np.testing.assert_array_equal(place_U, [0, 1, 2])


def test_places_put_everything_back():
    """Without masks and ends, tokens in the order of their places are the protein; each mask is there twice."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        protein = rng.integers(4, 30, rng.integers(2, 40))
        left_out = pieces(rng, len(protein), always=True)
        tokens_U, place_U = fill_in_the_middle(protein, left_out)
        real = ~np.isin(tokens_U, (*MASKS, END))
        np.testing.assert_array_equal(tokens_U[real][np.argsort(place_U[real])], protein)
        np.testing.assert_array_equal(np.sort(place_U[real]), np.arange(len(protein)))
        counts = [np.sum(tokens_U == mask) for mask in MASKS]
        assert counts == [2] * len(left_out) + [0] * (5 - len(left_out)) and np.sum(tokens_U == END) == 1
        assert np.argmax(tokens_U == END) < np.nonzero(tokens_U == MASKS[0])[0][1], "what is filled in comes last"


def test_pieces_are_drawn_as_the_paper_says():
    """Their number is Poisson's with mean 1, at most 5; lengths are even in 1 ... part of the room, at most."""
    rng = np.random.default_rng(1)
    drawn = [pieces(rng, 1000) for _ in range(4000)]
    share = np.bincount([len(d) for d in drawn], minlength=6) / 4000
    poisson = np.exp(-1) / np.array([1, 1, 2, 6, 24, 120])
    np.testing.assert_allclose(share, poisson / poisson.sum(), atol=0.03)
    for d in drawn:
        edges = [0, *np.ravel(d)]
        assert all(a <= b for a, b in zip(edges, [*edges[1:], 1000], strict=True)) and edges[1:2] != [0]
    room = np.array([(1000 - d[0][0]) for d in drawn if len(d) == 1])
    length = np.array([d[0][1] - d[0][0] for d in drawn if len(d) == 1])
    assert np.all(length < np.maximum(0.2 * room, 2)) and abs(np.mean(length / (0.2 * room)) - 0.5) < 0.05
    assert all(len(pieces(rng, 10, always=True)) >= 1 for _ in range(50))
    assert pieces(rng, 1) == [] and len(pieces(rng, 2, always=True)) == 1


def test_a_family_is_its_proteins():
    rng = np.random.default_rng(2)
    proteins = [np.concatenate([[0], rng.integers(4, 30, n)]) for n in (5, 9, 7)]
    tokens_U, place_U = family(rng, proteins)
    starts = np.nonzero(tokens_U == 0)[0]
    assert len(starts) == 3 and np.all(place_U[starts] == 0)
    found = []
    for a, b in zip(starts, [*starts[1:], len(tokens_U)], strict=True):
        real = ~np.isin(tokens_U[a:b], (*MASKS, END))
        found.append(tuple(tokens_U[a:b][real][np.argsort(place_U[a:b][real])]))
    assert sorted(found) == sorted(map(tuple, proteins))


def test_molecules_one_after_the_other():
    molecules = [[7, 8], [9], [10, 11, 12]]
    orders = {tuple(in_context(np.random.default_rng(s), molecules, begin=1, between=3, end=2)) for s in range(40)}
    assert len(orders) == 6 and (1, 7, 8, 3, 9, 3, 10, 11, 12, 2) in orders


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fill_in_the_middle([0, 1, 2], [(2, 3), (1, 2)]), "left_out: expected pieces in order"),
        (lambda: fill_in_the_middle([0, 1, 2], [(2, 4)]), r"in 0 ... 3, got \[\(2, 4\)\]"),
        (lambda: fill_in_the_middle([0, 1], [(1, 2)], masks=()), "left_out: expected at most 0 pieces"),
        (lambda: fill_in_the_middle([[0]], []), r"tokens_N: expected integers in one row, got int64\[1, 1\]"),
        (lambda: pieces(np.random.default_rng(0), 5, part=0.0), r"part: expected a number in \(0, 1\], got 0.0"),
        (lambda: family(np.random.default_rng(0), []), "proteins: expected at least one, got none"),
        (lambda: in_context(np.random.default_rng(0), [], 1, 2, 3), "molecules: expected at least one, got none"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
