"""Settings for all tests.

Compiling is most of what the tests do: XLA's least optimisation halves it, and is a second opinion on rounding besides.
Tests of one architecture share compiled functions, so they run in one process: `-n 2 --dist loadgroup`.
Where only the library's own dependencies and pytest are installed, tests of what needs more are left out.
"""

import importlib.util
import os

import jax
import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

EXTRA = ("optax", "orbax", "grain", "chex", "tyro", "tqdm", "matplotlib", "tensorboardX")
missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
collect_ignore = ["experiments", "tasks", "test_checkpoint.py", "test_parallel.py", "test_train.py"] if missing else []


def pytest_report_header():
    return f"left out, without {', '.join(missing)}: {', '.join(collect_ignore)}" if missing else None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    groups = {}
    for item in items:
        parameters = getattr(item, "callspec", None)
        name = parameters.params.get("name") if parameters else None
        group = f"{item.path.name}:{name}" if name else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
        groups.setdefault(group, []).append(item)
    items[:] = [item for group in groups.values() for item in group]  # in one process too


def pytest_runtest_teardown(item, nextitem):
    """Compiled functions go with the tests that share them: a process can map only 65,530 pieces of memory."""
    if nextitem is not None and _group(item) != _group(nextitem):
        jax.clear_caches()


def _group(item):
    return next(item.iter_markers("xdist_group")).args
