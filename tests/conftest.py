"""Settings for all tests.

Compiling is most of what the tests do: XLA's least optimisation halves it, and is a second opinion on rounding besides.
Tests of one architecture share compiled functions, so they run in one process: `-n 2 --dist loadgroup`.
"""

import os

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def pytest_collection_modifyitems(items):
    for item in items:
        parameters = getattr(item, "callspec", None)
        name = parameters.params.get("name") if parameters else None
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name}:{name}" if name else item.path.name))
