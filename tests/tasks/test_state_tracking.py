"""Groups are groups, and the states are the products."""

import jax
import numpy as np
import pytest

from memzoo.tasks import state_tracking
from memzoo.tasks.state_tracking import draw, group


@pytest.mark.parametrize(
    ("name", "size", "abelian"), [("Z2", 2, True), ("Z5", 5, True), ("S3", 6, False), ("S4", 24, False)]
)
def test_a_group_is_one(name, size, abelian):
    """Closed, associative, with the identity and inverses; and only cyclic ones commute."""
    G = group(name)
    assert G.shape == (size, size) and G.dtype == np.int32
    e = np.arange(size)
    np.testing.assert_array_equal(G[G[:, :, None], e], G[e[:, None, None], G[None]])
    assert (G[0] == e).all() and (G[:, 0] == e).all()
    assert all(set(row) == set(e) for row in (*G, *G.T))
    assert (G == G.T).all() == abelian


def test_permutations_compose():
    """Of three, in lexicographic order: 1 swaps the last two, 2 the first two; 3 is 1 after 2, 4 is 2 after 1."""
    G = group("S3")
    assert G[1, 1] == G[2, 2] == 0 and {G[2, 1], G[1, 2]} == {3, 4}
    assert G[3, 3] == 4 and G[G[3, 3], 3] == 0


@pytest.mark.parametrize("name", ["Z2", "Z7", "S5"])
@pytest.mark.cases(1)
def test_states_are_the_products_of_all_before(name):
    G = group(name)
    reset_BT = np.random.default_rng(0).random((4, 37)) < 0.2
    for resets in (None, reset_BT):
        u_BT, y_BT = map(np.asarray, jax.jit(draw, static_argnums=(2, 3))(jax.random.key(3), G, 4, 37, resets))
        assert u_BT.dtype == y_BT.dtype == np.int32 and set(u_BT.ravel()) <= set(range(len(G)))
        for row in range(4):
            state = 0
            for t in range(37):
                state = G[0 if resets is not None and resets[row, t] else state, u_BT[row, t]]
                assert y_BT[row, t] == state


@pytest.mark.parametrize("name", ["Z1", "S7", "S1", "A5", "Z", "Z05", ""])
def test_what_is_no_group_of_these_is_refused(name):
    with pytest.raises(ValueError, match=r"name: expected Z2, Z3, \.\.\. or S2 \.\.\. S6, got"):
        state_tracking.group(name)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="T: expected an integer >= 1, got 0"):
        draw(jax.random.key(0), group("Z2"), 2, 0)
