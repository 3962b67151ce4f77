"""The README does what it says: its code runs, its commands exist, its table and its links are up to date."""

import inspect
import re
import shlex
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from memzoo import ops, zoo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()
]
INSTALL, TEST = next(c for c in COMMANDS if "pytest" in c).rsplit(" && ", 1)


def test_python_blocks_run_in_order():
    """In one namespace, as someone would type them in."""
    namespace = {"__name__": "readme"}
    blocks = list(re.finditer(r"```python\n(.*?)```", README, re.DOTALL))
    assert len(blocks) >= 5
    for block in blocks:
        line = README[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], ROOT / "README.md", "exec"), namespace)
    average = namespace["Average"](width=6)
    x_BTD = namespace["x_BTD"][..., :6]
    (y_BTD, _), params = average.init_with_output(namespace["jax"].random.key(0), x_BTD)
    scanned_BTD, _ = namespace["Average"](width=6, impl="scan").apply(params, x_BTD)
    assert abs(y_BTD - scanned_BTD).max() < 1e-6


def test_the_table_is_up_to_date():
    """Otherwise: python -c "from memzoo import zoo; zoo.write_table('README.md')" """
    assert README.split(zoo.BEGIN)[1].split(zoo.END)[0] == zoo.table()


def test_every_op_with_a_choice_of_forms_is_named():
    for name, op in inspect.getmembers(ops, inspect.isfunction):
        if "impl" in inspect.signature(op).parameters:
            assert f"`{name}`" in README, name


def test_every_form_is_explained():
    for form in {form for name in zoo.names() for form in zoo.card(name).forms}:
        assert f"\n| `{form}` | " in README, form


def scripts():
    """(script, its flags) for every line that runs an experiment."""
    for command in COMMANDS:
        for part in command.split(" && "):
            words = shlex.split(part)
            if len(words) > 1 and words[1].startswith("experiments/"):
                yield words[1], words[2:]


@pytest.mark.parametrize(("script", "flags"), list(scripts()))
def test_flags_are_those_of_the_script(script, flags):
    tyro = pytest.importorskip("tyro")
    spec = spec_from_file_location(f"readme_{Path(script).stem}", ROOT / script)
    sys.modules[spec.name] = module = module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    config = tyro.cli(module.Config, args=flags)
    if "--out" in flags:
        assert config.out == Path(flags[flags.index("--out") + 1])


def test_extras_are_those_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for names in re.findall(r"'\.\[(.*?)\]'", "\n".join(COMMANDS)) for name in names.split(",")}
    assert named >= {"experiments", "test", "cuda", "tpu"} and named <= set(extras)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\((.*?)\)", README) if not link.startswith(("https:", "#"))]
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link
    for link in re.findall(r"github\.com/|blob/main/(.*?)\)", README):
        assert (ROOT / link).exists(), link
    for anchor in re.findall(r"\]\(#(.*?)\)", README):
        assert f"## {anchor}\n" in README.lower()
    for path in re.findall(r"^    (\S+/?)  ", README, re.MULTILINE):
        assert (ROOT / path.rstrip(",")).exists(), path


def test_ci_does_what_the_readme_says():
    """The same installation and the same test command, in an environment of its own."""
    script = (ROOT / ".ci" / "run").read_text()
    in_place = lambda command: command.replace("python3 -m venv .venv && ", "").replace(".venv", '"$venv"')
    assert in_place(INSTALL) in script and in_place(TEST) in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
