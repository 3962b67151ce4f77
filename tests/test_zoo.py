"""The catalogue says what is there, and a mistake in a name is answered with what was meant."""

import dataclasses
import importlib
import math
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import memzoo
from memzoo import contract, zoo
from memzoo.ops.checks import IMPLS

ROOT = Path(__file__).parents[1]


def test_the_catalogue_is_the_files_on_disk():
    on_disk = {path.stem for path in (ROOT / "memzoo" / "mixers").glob("*.py")} - {"__init__"}
    assert sorted(memzoo.names()) == sorted(on_disk)


def test_families_are_a_partition():
    families = dict.fromkeys(memzoo.card(name).family for name in memzoo.names())
    assert sorted(name for family in families for name in memzoo.names(family)) == sorted(memzoo.names())
    assert memzoo.names("delta rule")[:2] == ("deltanet", "gated_deltanet")


@pytest.mark.parametrize("name", memzoo.names())
def test_a_card_is_well_formed(name):
    card = memzoo.card(name)
    assert card.name == name and re.fullmatch(r"[a-z][a-z0-9_]*", name)
    assert re.fullmatch(r"\d{4}\.\d{4,5}|", card.arxiv)
    assert card.state in ("constant", "grows")
    assert card.forms[0] == "scan" and set(card.forms) <= set(IMPLS) and len(set(card.forms)) == len(card.forms)
    for text in (card.family, card.title, card.line):
        assert text == text.strip() and text and "|" not in text and "\n" not in text, "it goes into a table"
    assert not card.line.endswith(".")

    module = importlib.import_module(card.module)
    flax_class = getattr(module, card.flax_class)
    assert issubclass(flax_class, nn.Module) and flax_class.__module__ == card.module
    assert module.__doc__ and "\nSource: " in module.__doc__ and "\nDims: " in module.__doc__
    assert card.arxiv in module.__doc__, "the paper of the card is the paper of the file"
    title, source = (re.sub(r"\s+", " ", text).lower() for text in (card.title, module.__doc__))
    assert title in source


@pytest.mark.parametrize("name", memzoo.names())
def test_every_field_but_width_has_a_default(name):
    mixer = memzoo.make(name, width=24)
    assert type(mixer).__name__ == memzoo.card(name).flax_class
    assert (mixer.width, mixer.impl, mixer.dtype, mixer.param_dtype) == (24, "auto", jnp.float32, jnp.float32)
    for impl in memzoo.card(name).forms:
        assert memzoo.make(name, width=24, impl=impl).impl == impl
    with pytest.raises(TypeError, match="width"):
        memzoo.make(name)


def test_names_that_are_not_there_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"name: unknown architecture 'gated_delta_net'; did you mean gated_deltanet"):
        memzoo.make("gated_delta_net", width=8)
    with pytest.raises(ValueError, match=r"name: unknown architecture 'GRU2'"):
        memzoo.card("GRU2")
    with pytest.raises(ValueError, match=r"name: unknown architecture 7"):
        memzoo.card(7)
    with pytest.raises(ValueError, match=r"unknown architecture 'qqq'; there are attention, lstm, .*gated_deltanet"):
        memzoo.card("qqq")
    with pytest.raises(ValueError, match=r"family: unknown family 'delta-rule'; did you mean delta rule"):
        memzoo.names("delta-rule")
    with pytest.raises(ValueError, match=r"head: gla has no such field; did you mean heads"):
        memzoo.make("gla", width=8, head=2)
    with pytest.raises(ValueError, match=r"impl: expected one of auto, scan, newton; got 'newtn', did you mean newton"):
        memzoo.make("gru", width=8, impl="newtn")
    with pytest.raises(NotImplementedError, match=r"impl: gru has no form 'chunk'; it has scan, newton"):
        memzoo.make("gru", width=8, impl="chunk")


@pytest.mark.parametrize("name", memzoo.names())
def test_sizes_that_do_not_fit_are_named(name):
    with pytest.raises(ValueError, match=r"width: expected .*, got 0"):
        memzoo.make(name, width=0)
    if "heads" in type(memzoo.make(name, width=8)).__dataclass_fields__:
        with pytest.raises(ValueError, match=r"width: expected a positive multiple of heads = 4, got 10"):
            memzoo.make(name, width=10, heads=4)


def test_nearest():
    assert contract.nearest("gura", ("gru", "lru", "lstm")) == "did you mean gru?"
    assert contract.nearest("xyz", ("gru", "lru")) == "there are gru, lru"


def test_write_table_touches_only_what_is_between_the_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{zoo.BEGIN}old\n{zoo.END}after\n")
    zoo.write_table(path)
    assert path.read_text() == f"before\n{zoo.BEGIN}{zoo.table()}{zoo.END}after\n"


@pytest.mark.parametrize("name", memzoo.names())
def test_numbers_that_are_none_are_refused_by_name(name):
    """Each field that is a float by default, when it is NaN, infinite or a string."""
    card = memzoo.card(name)
    for field in dataclasses.fields(getattr(importlib.import_module(card.module), card.flax_class)):
        if isinstance(field.default, float):
            for value in (math.nan, math.inf, "1"):
                with pytest.raises(ValueError, match=f"{field.name}.*: expected"):
                    memzoo.make(name, width=12, **{field.name: value})


def test_inside_another_module_a_mixer_can_have_a_name():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x_BTD):
            return memzoo.make("gru", width=6, name="second")(memzoo.make("gru", width=6, name="first")(x_BTD)[0])

    shapes = jax.eval_shape(Two().init, jax.random.key(0), jnp.zeros((1, 1, 6)))
    assert set(shapes["params"]) == {"first", "second"}
