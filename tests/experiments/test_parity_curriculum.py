"""The script runs end to end at a small size, and refuses what it must."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import parity_curriculum


@pytest.mark.long
def test_a_run_leaves_what_it_says(tmp_path):
    """Both curricula solve the parity of two bits, and of more, one after the other."""
    sizes = {"hidden": 16, "most": 3, "length": 8, "batch": 32, "updates": 400, "eval_every": 40, "learning_rate": 1e-2}
    config = parity_curriculum.Config(tmp_path / "run", ("leaky_rnn", "gru"), ("parity",), **sizes)
    rows = parity_curriculum.main(config)
    assert rows == [json.loads(line) for line in (config.out / "parity_curriculum.jsonl").read_text().splitlines()]
    assert [(row["name"], row["curriculum"]) for row in rows] == [
        (name, curriculum) for name in config.names for curriculum in ("single", "multi")
    ]
    for row in rows:
        assert row["largest"] >= 2 and list(row["solved"]) == [str(N) for N in range(2, row["largest"] + 1)]
        assert list(row["solved"].values()) == sorted(row["solved"].values())
        assert row["forgets_in"] >= 1 and ("tau" in row) == (row["name"] == "leaky_rnn")
    assert "| parity | leaky_rnn | multi |" in (config.out / "table.md").read_text()
    assert (config.out / "solved.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):
        parity_curriculum.main(config)


@pytest.mark.long
def test_a_run_that_diverges_is_recorded(tmp_path):
    sizes = {"hidden": 4, "most": 2, "length": 4, "batch": 2, "updates": 4, "eval_every": 2, "learning_rate": 1e38}
    (row,) = parity_curriculum.main(
        parity_curriculum.Config(tmp_path, ("leaky_rnn",), ("match",), ("single",), **sizes)
    )
    assert "step 2" in row["diverged"] and "Diverged" in (tmp_path / "table.md").read_text()


def test_a_leaky_unit_forgets_in_its_time_constant():
    """Without recurrent weights, and not driven below 0, h is a first-order low-pass: correlation (1 - 1/tau)^lag."""
    model = parity_curriculum.Reader("leaky_rnn", 4, 1)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    tau = np.array([2.0, 5.0, 9.0, 20.0], np.float32)
    mixer = params["params"]["mixer"] | {"tau": tau, "recurrent": np.zeros((4, 4), np.float32)}
    mixer["in"] = {"kernel": np.eye(4, dtype=np.float32), "bias": np.ones(4, np.float32)}
    bits = {"embedding": np.array([[0] * 4, [1] * 4], np.float32)}
    want = np.ceil(-1 / np.log1p(-1 / tau)).mean()
    got = parity_curriculum.forgets_in(model, {"params": params["params"] | {"mixer": mixer, "bits": bits}}, 0, 20_000)
    np.testing.assert_allclose(got, want, rtol=0.15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ("gruu",)}, "names: unknown 'gruu'; did you mean gru"),
        ({"names": ()}, "names: expected at least one, got none"),
        ({"tasks": ("dms",)}, "tasks: unknown 'dms'"),
        ({"curricula": ("both",)}, "curricula: unknown 'both'"),
        ({"most": 1}, "most: expected 2 <= most <= length = 80, got 1"),
        ({"most": 81}, "most: expected 2 <= most <= length = 80, got 81"),
        ({"solved": 0.4}, "solved: expected a number in"),
        ({"updates": 0}, "updates: expected an integer >= 1, got 0"),
    ],
)
def test_bad_fields_are_refused_before_anything_is_trained(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        parity_curriculum.main(parity_curriculum.Config(tmp_path / "new", **fields))
    assert not (tmp_path / "new").exists()
