"""What a group of tests depends on, and a stamp of it: the same stamp, the same result.

A group is a test file, or what a test file has for one architecture or model. It depends on that file and on all that
this reaches by imports, in this repository; on the catalogue's row and the module of each architecture that is named,
on the kernels of each op that is named; and on the version of JAX. Comments, docstrings and layout make no difference,
nor do settings in conftest.py, nor the rows that the catalogue and the contract's tests have for other architectures: a
new one leaves the stamps of the others as they are.
"""

import ast
import functools
import hashlib
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT, ROOT / "kernels", ROOT / "experiments")  # where modules are found, as pytest's pythonpath says
ZOO, CONTRACT = ROOT / "memzoo" / "zoo.py", ROOT / "tests" / "test_contract.py"
# Of these tables only the rows of the architectures that a group depends on count, and of SLOW none.
TABLES = {ZOO: ("_CARDS",), CONTRACT: ("FIELDS", "SLOW")}


def stamp(path: Path, name: str | None = None) -> str:
    """Sixteen hexadecimal digits for the tests of the file `path`, of `name` alone where there is one."""
    files, architectures = closure(path, name)
    content = [f"{file.relative_to(ROOT)} {digest(file)}" for file in sorted(files)]
    content += [row(name) for name in sorted(architectures)]
    return hashlib.sha256("\n".join([jax.__version__, *content]).encode()).hexdigest()[:16]


def closure(path: Path, name: str | None = None) -> tuple[set[Path], set[str]]:
    """The files that are reached from `path`, itself among them, and the architectures that are named."""
    files: set[Path] = set()
    architectures = {name} & cards().keys()
    named = bool(architectures)  # then the test file's table of all of them says nothing of this group
    queue = [path, *(mixer(name) for name in architectures)]
    while queue:
        file = queue.pop()
        if file in files:
            continue
        files.add(file)
        queue += reached(file) - (siblings(name) if file == path else set())
        if (file.is_relative_to(ROOT / "tests") and named) or file == CONTRACT != path:  # imported for its helpers
            continue
        found = mentioned(file) - architectures
        architectures |= found
        queue += [mixer(name) for name in found]
    return files, architectures


def mixer(name):
    return ROOT / "memzoo" / "mixers" / f"{name}.py"


def siblings(name):
    """The models that a file of tests has beside `name`, where that is a model."""
    models = set((ROOT / "memzoo" / "models").glob("*.py"))
    return models - {module(f"memzoo.models.{name}")} if module(f"memzoo.models.{name}") else set()


@functools.cache
def tree(file):
    """The program of a file, without docstrings and without the tables of which rows are looked up."""
    parsed = ast.parse(file.read_text())
    for node in ast.walk(parsed):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    tables = TABLES.get(file, ())
    parsed.body = [node for node in parsed.body if not any(assigns(node, table) for table in tables)]
    return parsed


def assigns(node, name):
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return isinstance(target, ast.Name) and target.id == name


@functools.cache
def digest(file):
    return hashlib.sha256(ast.unparse(tree(file)).encode()).hexdigest()


@functools.cache
def cards():
    """name -> the catalogue's row, as it is written."""
    table = next(node for node in ast.parse(ZOO.read_text()).body if assigns(node, "_CARDS"))
    return {call.args[0].value: ast.unparse(call) for call in table.value.elts}


@functools.cache
def fields():
    """name -> the sizes that the contract's tests take, as they are written."""
    table = next(node for node in ast.parse(CONTRACT.read_text()).body if assigns(node, "FIELDS"))
    return {key.value: ast.unparse(value) for key, value in zip(table.value.keys, table.value.values, strict=True)}


def row(name):
    return f"{cards()[name]} {fields().get(name)}"


@functools.cache
def module(name):
    """The file of a module of this repository, or None."""
    for folder in FOLDERS:
        path = folder.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return file
    return None


@functools.cache
def by_name():
    """What a string can stand for: an op, for its kernels, or the file name of a script."""
    found = {file.name: {file} for file in (ROOT / "experiments").glob("*.py")}
    for file in (ROOT / "kernels" / "memzoo_kernels").glob("[a-z]*_*.py"):
        found.setdefault(file.stem.rpartition("_")[0], set()).add(file)
    return found


@functools.cache
def reached(file):
    """The files that `file` imports from, and the kernels of the ops that it names."""
    found, packages = set(), {}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= imported(alias.name if alias.asname else alias.name.split(".")[0], alias.asname, packages)
                found |= imported(alias.name, None, {})
        elif isinstance(node, ast.ImportFrom) and module(node.module):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if module(inner):
                    found |= imported(inner, alias.asname or alias.name, packages)
                else:
                    found |= provider(node.module, alias.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= by_name().get(node.value, set())
    # What is taken of a package: the modules of its attributes that are used, or all of it where it is handed on.
    attributes = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)]
    used = {id(node.value): node.attr for node in attributes}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Name) and node.id in packages and isinstance(node.ctx, ast.Load):
            package = packages[node.id]
            found |= provider(package, used[id(node)]) if id(node) in used else reached(module(package))
    return found - {file}


def imported(name, known_as, packages):
    """The file of a module that is imported whole. A package is noted, to see what of it is used."""
    path = module(name)
    if path is None:
        return set()
    if path.name != "__init__.py":
        return {path}
    packages[known_as or name] = name
    return {path} if name == "memzoo_kernels" else set()


def provider(package, name):
    """The file that `name` of a module comes from: of a package the module that it is imported from there."""
    path = module(package)
    if path.name != "__init__.py":
        return {path}
    if inner := module(f"{package}.{name}"):
        return {inner} if inner.name != "__init__.py" else reached(inner)
    for node in tree(path).body:
        if isinstance(node, ast.ImportFrom) and any(name == (alias.asname or alias.name) for alias in node.names):
            return provider(node.module, name)
    return {path}


@functools.cache
def mentioned(file):
    """The architectures that a file names in its strings, or all where it asks the catalogue for their names.

    Not in ops, mixers and kernels, where a string of that name is an op's.
    """
    if any(file.is_relative_to(ROOT / folder) for folder in ("memzoo/ops", "memzoo/mixers", "kernels")):
        return set()
    nodes = list(ast.walk(tree(file)))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    if any(node.attr == "names" and node.value.id in ("memzoo", "zoo") for node in attributes):
        return set(cards())
    return {node.value for node in nodes if isinstance(node, ast.Constant) and node.value in cards()}
