"""Settings for all tests.

Compiling is most of what the tests do: XLA's least optimisation halves it, and is a second opinion on rounding besides.
Tests of one architecture share compiled functions, so they run in one process: `-n 2 --dist loadgroup`.
Where only the library's own dependencies and pytest are installed, tests of what needs more are left out.

Results of the long tests are kept in `proven.json`: for each group the stamp of all that it depends on, as `closure.py`
computes it, with which it passed. `--unproven` leaves out the long tests of groups that passed with the stamp that they
have now, but for an eighth of them, another one with each commit; `--prove` leaves out all of those, and notes what
else passes.
"""

import importlib.util
import json
import os
import subprocess
import zlib
from collections import Counter

import jax
import pytest

from tests.closure import ROOT, stamp

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

EXTRA = ("optax", "orbax", "grain", "chex", "tyro", "tqdm", "matplotlib", "tensorboardX")
PROVEN = ROOT / "tests" / "proven.json"
missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
collect_ignore = ["experiments", "tasks", "test_checkpoint.py", "test_parallel.py", "test_train.py"] if missing else []


def pytest_report_header():
    return f"left out, without {', '.join(missing)}: {', '.join(collect_ignore)}" if missing else None


def pytest_addoption(parser):
    group = parser.getgroup("memzoo", "results of the long tests, kept in tests/proven.json")
    group.addoption("--unproven", action="store_true", help="leave out what passed as it is, but for an eighth of it")
    group.addoption("--prove", action="store_true", help="leave out what passed as it is, and note what passes")


def pytest_configure(config):
    if not config.getoption("--prove"):
        return
    if any("::" in argument for argument in config.args):
        raise pytest.UsageError("--prove: expected whole files, as a group passes whole or not at all")
    if not hasattr(config, "workerinput"):  # with pytest-xdist: in the process that hears of all results
        config.pluginmanager.register(Proof())


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups, and before -m and -k
def pytest_collection_modifyitems(config, items):
    groups = {}
    for item in items:
        parameters = getattr(item, "callspec", None)
        name = parameters.params.get("name") if parameters else None
        group = f"{item.path.name}:{name}" if name else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
        groups.setdefault((group, item.path, name), []).append(item)
    few_by_default(items)
    if config.getoption("--unproven") or config.getoption("--prove"):
        leave_out_proven(config, groups)
    items[:] = [item for group in groups.values() for item in group]  # in one process too


def few_by_default(items):
    """Of the cases of a test marked `cases(k)`, k from the first to the last are default tests; the others are long."""
    tests = {}
    for item in items:
        if item.get_closest_marker("cases") and not is_long(item):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for cases in tests.values():
        (k,) = cases[0].get_closest_marker("cases").args
        kept = {round(i * (len(cases) - 1) / max(1, k - 1)) for i in range(k)}
        for i, item in enumerate(cases):
            if i not in kept:
                item.add_marker(pytest.mark.long)


def leave_out_proven(config, groups):
    """Leaves out those long tests that passed as they are. The others are told their group's stamp and its size."""
    proven, out = known(), []
    for (_, path, name), items in groups.items():
        long = [item for item in items if is_long(item)]
        if not long:
            continue
        group, now = f"{path.relative_to(ROOT).as_posix()}:{name or ''}", stamp(path, name)
        if proven.get(group) == now and (config.getoption("--prove") or zlib.crc32(group.encode()) % 8 != eighth()):
            out += long
            items[:] = [item for item in items if not is_long(item)]
        for item in long:
            item.user_properties.append(("proof", (group, now, len(long))))
    config.hook.pytest_deselected(items=out)


def is_long(item):
    return item.get_closest_marker("long") and not item.get_closest_marker("aot")


def known():
    return json.loads(PROVEN.read_text()) if PROVEN.exists() else {}


def eighth():
    """Another one with each commit; the first where there is no repository."""
    count = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return int(count.stdout or 0) % 8


class Proof:
    """Writes the stamp of each group down when all of its long tests have passed, so that a run can be broken off."""

    def __init__(self):
        self.passed, self.failed = Counter(), set()

    def pytest_runtest_logreport(self, report):
        proof = dict(report.user_properties).get("proof")
        if proof is None:
            return
        group, now, total = proof
        if report.failed:
            self.failed.add(group)
        self.passed[group] += report.when == "teardown"
        if self.passed[group] == total and group not in self.failed:
            PROVEN.write_text(json.dumps(known() | {group: now}, indent=0, sort_keys=True) + "\n")


def pytest_runtest_teardown(item, nextitem):
    """Compiled functions go with the tests that share them: a process can map only 65,530 pieces of memory."""
    if nextitem is not None and _group(item) != _group(nextitem):
        jax.clear_caches()


def _group(item):
    return next(item.iter_markers("xdist_group")).args
