"""`python -m memzoo` shows the catalogue and its cards, with the library's own dependencies alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import memzoo
from memzoo import __main__ as command

ROOT = Path(__file__).parents[1]


@pytest.fixture
def printed(monkeypatch, capsys):
    """printed(*arguments, columns=80) -> what is printed on a terminal that wide."""

    def run(*arguments, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        command.main(arguments)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_the_listing_has_every_line_of_the_catalogue_and_fits(printed, columns):
    text = printed(columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    words = re.sub(r"\s+", " ", text)
    for name in memzoo.names():
        row = memzoo.card(name)
        assert f" {name} {row.line}" in words and f"\n{row.family}\n" in f"\n{text}"
    starts = {line.index(memzoo.card(name).line[:9]) for name in memzoo.names() for line in text.splitlines()
              if line.startswith(f"  {name} ")}  # fmt: skip
    assert len(starts) == 1, "one column"


def test_a_family_alone(printed):
    text = printed("--family", "delta rule")
    listed = re.findall(r"^  (\w+)  ", text, re.MULTILINE)
    assert tuple(listed) == memzoo.names("delta rule")


@pytest.mark.parametrize("name", memzoo.names())
def test_a_card(printed, name):
    text = printed("--card", name, "--width", "24", columns=200)
    row = memzoo.card(name)
    module = sys.modules[row.module]
    equations = [line for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert equations and all(line in text.splitlines() for line in equations)
    assert "Source: " in text and row.title in text and ", ".join(row.forms) in text

    mixer = memzoo.make(name, width=24)
    state = jax.tree.leaves(jax.eval_shape(lambda: mixer.initial_state(1)))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
    assert f"state       {size:,} bytes per sequence at width 24" in text
    params = jax.eval_shape(mixer.init, jax.random.key(0), jax.numpy.zeros((1, 1, 24)))
    assert f"parameters  {sum(leaf.size for leaf in jax.tree.leaves(params)):,} at width 24" in text
    for field in ("width", "impl = 'auto'", "dtype = float32", "param_dtype = float32"):
        assert re.search(rf"^(fields)? +{field}( |$)", text, re.MULTILINE), field


def test_fields_say_their_defaults_and_what_they_are():
    lines = command.fields(memzoo.make("gated_deltanet", width=8, heads=2))
    assert lines[:3] == [
        "width",
        "heads = 4",
        "key_dim = None  (per head; 3/4 width / heads, the paper's 6 D^2 parameters)",
    ]


def test_equations_are_not_wrapped_and_sentences_are():
    text = "One.\n\n    y = a very long equation\n    z = y\n\nSource: a long\nlong title.\nDiffers: no\n"
    sentences = ["Source: a", "long long", "title.", "Differs:", "no"]
    assert list(command.paragraphs(text, 10)) == ["One.", "", *text.splitlines()[2:4], "", *sentences]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--family", "delta-rule"), "error: family: unknown family 'delta-rule'; did you mean delta rule?"),
        (("--card", "gated_delta_net"), "error: name: unknown architecture 'gated_delta_net'; did you mean gated_d"),
        (("--card", "gated_deltanet", "--width", "10"), "error: width: expected a positive multiple of heads = 4"),
        (("--card", ""), "error: name: unknown architecture ''; there are attention, lstm, slstm"),
        (("--family", ""), "error: family: unknown family ''; there are attention, gated rnn"),
        (("--width", "64"), "error: width: expected --card NAME beside it"),
        (("--family", "ssm", "--width", "64"), "error: width: expected --card NAME beside it"),
        (("--card", "gru", "--width", "0"), "error: width: expected an integer >= 1, got 0"),
    ],
)
def test_mistakes_are_named(printed, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        printed(*arguments)
    assert stopped.value.code.startswith(message)


def test_a_family_and_a_card_exclude_each_other(printed):
    with pytest.raises(SystemExit, match="2"):
        printed("--family", "ssm", "--card", "gru")


def test_the_command_needs_only_the_library_and_starts_no_backend():
    code = """
import runpy, sys
for name in ("optax", "orbax", "grain", "chex", "tyro", "tqdm", "matplotlib", "tensorboardX"):
    sys.modules[name] = None  # importing it fails
import jax
jax.config.update("jax_platforms", "none_of_that_name")  # starting a backend fails
sys.argv = ["memzoo"]
runpy.run_module("memzoo", run_name="__main__")
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "gated_deltanet" in result.stdout, result.stderr
