"""A stamp changes with what its group runs, and with nothing else."""

import importlib.util
import json
import shutil
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import jax
import memzoo_kernels
import pytest

from tests import closure, conftest
from tests.test_contract import B, D, T, make

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """stamps(file, old, new) -> group -> its stamp, in a copy of the sources with that change."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("memzoo", "kernels", "tests", "experiments"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def run(file=None, old="", new=""):
        sound = (copy / file).read_text() if file else ""
        assert sound.count(old) == 1 or not file, file
        if file:
            (copy / file).write_text(sound.replace(old, new))
        spec = importlib.util.spec_from_file_location("closure_of_copy", copy / "tests" / "closure.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = {name: module.stamp(copy / "tests" / "test_contract.py", name) for name in ("gla", "gru", "s4")}
        found |= {
            path: module.stamp(copy / "tests" / path) for path in ("mixers/test_gla.py", "ops/test_linear_scan.py")
        }
        if file:
            (copy / file).write_text(sound)
        return found

    return run


@pytest.fixture(scope="module")
def unchanged(stamps):
    return stamps()


OF_GLA = {"gla", "mixers/test_gla.py"}
ALL = {"gla", "gru", "s4", "mixers/test_gla.py", "ops/test_linear_scan.py"}


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("memzoo/mixers/gla.py", "jnp.outer(k_K, v_V)", "jnp.outer(v_V, k_K)", OF_GLA),
        ("memzoo/mixers/gla.py", "import jax\n", "import jax  # a comment\n\n\n", set()),
        ("memzoo/ops/__init__.py", '"""The recurrences', '"""All recurrences', set()),
        ("memzoo/ops/chunks.py", "preferred_element_type=wide)", "preferred_element_type=None)", OF_GLA),
        ("memzoo/ops/hippo.py", "import jax\n", "import jax\n\nUNUSED = 1\n", {"s4"}),
        ("kernels/memzoo_kernels/linear_attention_tpu.py", "import jax\n", "import jax\n\nUNUSED = 1\n", OF_GLA),
        ("memzoo/ops/checks.py", "import jax.numpy as jnp\n", "import jax\n\nUNUSED = 1\n", ALL),
        ("tests/test_contract.py", "B, T, D = 2, 72, 12", "B, T, D = 2, 73, 12", {"gla", "gru", "s4"}),
        ("tests/test_contract.py", '    "gru": {"hidden": 7},', '    "gru": {"hidden": 8},', {"gru"}),
        ("tests/test_contract.py", '    "gru": {"hidden": 7},', '    "gru": {"hidden": 7},\n    "new": {},', set()),
        (
            "memzoo/zoo.py",
            '    Card("gru"',
            '    Card("new", "", "", "", "", ("scan",), "", "New"),\n    Card("gru"',
            set(),
        ),
        ("memzoo/zoo.py", '"reset and update gates around one state"', '"gates"', {"gru"}),
        ("tests/mixers/test_gla.py", "import jax\n", "import jax\n\nUNUSED = 1\n", {"mixers/test_gla.py"}),
    ],
)
def test_the_stamp_changes_with_what_the_group_runs(stamps, unchanged, file, old, new, changed):
    now = stamps(file, old, new)
    assert {group for group in now if now[group] != unchanged[group]} == changed


@pytest.mark.parametrize(("name", "impl"), [("gla", "pallas"), ("s4", "conv"), ("titans", "chunk"), ("gru", "newton")])
def test_all_that_runs_is_in_the_closure(name, impl):
    ran, tool = set(), sys.monitoring.PROFILER_ID

    def note(code, _):
        ran.add(code.co_filename)
        return sys.monitoring.DISABLE  # once is enough

    sys.monitoring.use_tool_id(tool, "closure")
    sys.monitoring.register_callback(tool, sys.monitoring.events.PY_START, note)
    sys.monitoring.set_events(tool, sys.monitoring.events.PY_START)
    try:
        with memzoo_kernels.interpreted("tpu"):
            x, mixer = jax.ShapeDtypeStruct((B, T, D), "float32"), make(name, impl)
            jax.eval_shape(mixer.init_with_output, jax.random.key(0), x)
    finally:
        sys.monitoring.set_events(tool, sys.monitoring.events.NO_EVENTS)
        sys.monitoring.free_tool_id(tool)
    packages = {ROOT / package for package in ("memzoo", "kernels", "tests")}
    ours = {Path(file) for file in ran if any(Path(file).is_relative_to(package) for package in packages)}
    ours = {file for file in ours if file.name != "__init__.py"}  # which run when they are imported
    files, _ = closure.closure(ROOT / "tests" / "test_contract.py", name)
    assert closure.mixer(name) in ours
    assert ours - files - {Path(__file__)} == set()


@pytest.mark.parametrize(("outcomes", "noted"), [("pp", True), ("pf", False), ("fp", False), ("p", False), ("", False)])
def test_a_group_is_noted_when_all_of_it_has_passed(tmp_path, monkeypatch, outcomes, noted):
    monkeypatch.setattr(conftest, "PROVEN", tmp_path / "proven.json")
    (tmp_path / "proven.json").write_text('{"another": "1"}')
    proof = conftest.Proof()
    for outcome in outcomes:
        for when in ("setup", "call", "teardown"):
            failed = outcome == "f" and when == "call"
            properties = [("proof", ("group", "2", 2))]
            proof.pytest_runtest_logreport(SimpleNamespace(user_properties=properties, failed=failed, when=when))
    proof.pytest_runtest_logreport(SimpleNamespace(user_properties=[], failed=False, when="teardown"))
    want = {"another": "1"} | ({"group": "2"} if noted else {})
    assert json.loads((tmp_path / "proven.json").read_text()) == want


def items(*long):
    """Collected tests, of which these are long."""
    marker = lambda is_long: lambda name: is_long if name == "long" else None
    return [SimpleNamespace(get_closest_marker=marker(is_long), user_properties=[]) for is_long in long]


@pytest.mark.parametrize(
    ("option", "known", "left"),
    [
        ("--prove", "same", [2, 3, 3]),  # the default test of the first group, all of the two others
        ("--unproven", "same", [2, 3, 3]),
        ("--unproven", "same and the turn", [3, 3, 3]),
        ("--prove", "same and the turn", [2, 3, 3]),
        ("--unproven", "other", [3, 3, 3]),
    ],
)
def test_what_has_passed_as_it_is_is_left_out(tmp_path, monkeypatch, option, known, left):
    path = ROOT / "tests" / "test_contract.py"
    group, now = "tests/test_contract.py:gla", closure.stamp(path, "gla")
    turn = zlib.crc32(group.encode()) % 8
    monkeypatch.setattr(conftest, "PROVEN", tmp_path / "proven.json")
    monkeypatch.setattr(conftest, "eighth", lambda: turn if known.endswith("turn") else (turn + 1) % 8)
    (tmp_path / "proven.json").write_text(json.dumps({group: now if known.startswith("same") else "0"}))
    groups = {
        ("", path, "gla"): items(False, True, False),
        ("", path, "gru"): items(False, True, True),
        ("", ROOT / "tests" / "test_zoo.py", None): items(False, False, False),
    }
    config = SimpleNamespace(
        getoption=lambda name: name == option, hook=SimpleNamespace(pytest_deselected=lambda items: None)
    )
    conftest.leave_out_proven(config, groups)
    assert [len(tests) for tests in groups.values()] == left
    *_, last = groups["", path, "gru"]
    assert last.user_properties == [("proof", ("tests/test_contract.py:gru", closure.stamp(path, "gru"), 2))]


def test_what_is_noted_is_of_groups_that_exist():
    for group in conftest.known():
        path, name = group.split(":")
        assert (ROOT / path).is_file(), group
        if path == "tests/test_contract.py":
            assert not name or name in closure.cards(), group
