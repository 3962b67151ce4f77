"""Imports flow one way, the library needs only its own dependencies, and importing it starts no backend."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Bottom to top. A part imports the parts below its layer and, where it is a folder of one piece, itself.
LAYERS = (
    ("memzoo_kernels",),
    ("contract", "host"),
    ("ops",),
    ("mixers", "zoo"),  # zoo finds mixers by name, when asked
    ("models",),
    ("sample", "learners", "tasks", "train", "parallel", "checkpoint", "__main__"),
    ("experiments",),
)
OF_ONE_PIECE = ("memzoo_kernels", "ops", "models")
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
NEEDS_THE_EXTRA = ("train", "checkpoint", "tasks", "experiments")

FILES = {
    path.relative_to(root).with_suffix("").as_posix().replace("/", "."): path
    for root in (ROOT, ROOT / "kernels")
    for package in ("memzoo", "memzoo_kernels", "experiments")
    for path in sorted((root / package).rglob("*.py"))
}
MODULES = {name.removesuffix(".__init__") for name in FILES}
LIBRARY = sorted(module for module in MODULES if not set(module.split(".")) & {*NEEDS_THE_EXTRA})


def part(module):
    """memzoo.ops.recur -> ops, memzoo_kernels.x -> memzoo_kernels; what `import memzoo` gives is the catalogue's."""
    names = module.split(".")
    return names[0] if names[0] != "memzoo" else names[1] if len(names) > 1 else "zoo"


def imports(path, tried=True):
    """The modules that a file imports; not `tried` leaves out what stands in a `try`, which it can do without."""
    tree = ast.parse(path.read_text())
    inside = {id(node) for outer in ast.walk(tree) if isinstance(outer, ast.Try) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        if id(node) in inside and not tried:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


@pytest.mark.parametrize("file", FILES)
def test_imports_flow_one_way(file):
    if file == "memzoo.__init__":
        assert set(imports(FILES[file])) == {"memzoo.zoo"}
        return
    mine = part(file)
    for module in imports(FILES[file]):
        if module.split(".")[0] not in ("memzoo", "memzoo_kernels", "experiments"):
            continue
        other = part(module)
        below = LEVEL[other] < LEVEL[mine] or (mine == other and mine in OF_ONE_PIECE)
        assert below, f"{file} imports {module}"


def import_names(requirements):
    """The names under which distributions are imported, for all that are not their own."""
    names = {re.match(r"[\w-]+", requirement).group() for requirement in requirements}
    return {{"orbax-checkpoint": "orbax"}.get(name, name) for name in names}


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_imported_that_is_not_asked_for(file):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = import_names(project["dependencies"]) | {"memzoo", "memzoo_kernels", *sys.stdlib_module_names}
    if part(file) in NEEDS_THE_EXTRA:
        allowed |= import_names(project["optional-dependencies"]["experiments"])
    if part(file) == "experiments":  # run as a script, one finds those beside it
        allowed |= {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert {module.split(".")[0] for module in imports(FILES[file], tried=False)} <= allowed


def test_the_library_imports_alone_and_starts_no_backend():
    assert {"memzoo", "memzoo.sample", "memzoo.models.backbone", "memzoo_kernels"} <= set(LIBRARY)
    code = f"""
import importlib, sys
for name in ("grain", "chex", "tyro", "tqdm", "matplotlib", "tensorboardX"):
    sys.modules[name] = None  # importing it fails
import jax
jax.config.update("jax_platforms", "none_of_that_name")  # starting a backend fails
for name in {LIBRARY}:
    importlib.import_module(name)
try:
    jax.devices()
except RuntimeError:
    print("imported")
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert result.stdout == "imported\n", result.stderr
