"""The experiment runs end to end at a small size, and its capacities are what theory says where it says something."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import capacity
from experiments.capacity import Config, Memory

TINY = Config(dims=(3, 4), passes=2, counts=3, seeds=2)


@pytest.mark.long
def test_a_run_leaves_what_it_says(tmp_path):
    config = replace(TINY, out=tmp_path / "run")
    rows = capacity.main(config)
    assert rows == [json.loads(line) for line in (config.out / "capacity.jsonl").read_text().splitlines()]
    want = [(name, d, passes) for name in capacity.MEMORIES for d in (3, 4) for passes in (1, 2)]
    assert [(row["memory"], row["d"], row["passes"]) for row in rows] == want
    for row in rows:
        assert len(row["pairs"]) == len(row["shares"]) <= 3 and 0 <= min(row["shares"]) <= max(row["shares"]) <= 1
        assert row["step"] in capacity.MEMORIES[row["memory"]].steps and 0 <= row["capacity"] <= row["pairs"][-1]
    text = (config.out / "table.md").read_text()
    assert all(f"\n| {name} | " in text for name in capacity.MEMORIES) and capacity.CLAIMS in text
    for name in ("curves", "capacity"):
        assert (config.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):
        capacity.main(config)


@pytest.mark.long
def test_the_delta_rule_stores_as_many_pairs_as_keys_have_channels():
    """Read again and again, as many as are linearly independent, and exactly; twice as many it does not."""
    config = replace(TINY, passes=200, counts=2, cosine=0.99)
    exact = Memory((1.0,), most=1.0)  # n = 2 and n = d
    n_G, shares = capacity.recall(config, exact, 4, 1.0)
    assert n_G.tolist() == [2, 4] and shares[1].tolist() == [1, 1] and shares[0, 1] < 1
    n_G, shares = capacity.recall(config, exact._replace(most=4.0), 4, 1.0)
    assert n_G.tolist() == [2, 16] and shares[1, 0] == 1 and shares[1, 1] < 0.5


def test_one_pass_of_the_dot_product_is_the_sum_of_outer_products():
    config = replace(TINY, passes=1, counts=2, cosine=0.7)
    memory = capacity.MEMORIES["matrix, dot product"]
    n_G, (found, _) = capacity.recall(config, memory, 4, 1.0)
    k_STN, v_STV = map(np.asarray, capacity.pairs(config, memory, 4, n_G[-1]))
    for g, n in enumerate(n_G):
        read_SnV = np.einsum("sav,sak,sbk->sbv", v_STV[:, :n], k_STN[:, :n], k_STN[:, :n])
        cosine_Sn = np.sum(read_SnV * v_STV[:, :n], -1) / np.linalg.norm(read_SnV, axis=-1)
        np.testing.assert_allclose(found[g], np.mean(cosine_Sn >= 0.7))


def test_capacity_and_its_growth():
    n_G = np.array([2, 4, 8, 16])
    assert capacity.capacity(n_G, np.array([1, 1, 0.8, 0.1]), 0.8) == pytest.approx(8)
    assert capacity.capacity(n_G, np.array([1, 1, 0.6, 0.1]), 0.8) == pytest.approx(4 * 2**0.5)
    assert capacity.capacity(n_G, np.array([0.7, 1, 1, 1]), 0.8) == 0
    assert capacity.capacity(n_G, np.ones(4), 0.8) == 16
    assert capacity.exponent([2, 4, 8], [12, 48, 192]) == pytest.approx(2)


def test_bad_input_is_named(tmp_path):
    for match, fields in (
        ("dims: expected sizes >= 2, got ()", {"dims": ()}),
        ("passes: expected an integer >= 1, got 0", {"passes": 0}),
        ("share: expected a number in (0, 1], got 0", {"share": 0}),
    ):
        with pytest.raises(ValueError) as error:
            capacity.main(replace(TINY, out=tmp_path / "new", **fields))
        assert str(error.value) == match or match in str(error.value)
        assert not (tmp_path / "new").exists()
