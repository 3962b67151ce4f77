"""What is installed, and what a bare clone can do with it."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import memzoo

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", dist]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (path,) = dist.glob("*.whl")
    return path


def test_a_wheel_holds_both_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"memzoo", "memzoo_kernels"}
    on_disk = {path.relative_to(ROOT).as_posix() for path in (ROOT / "memzoo").rglob("*.py")}
    assert on_disk <= set(names)
    assert {"memzoo/py.typed", "memzoo_kernels/__init__.py", "memzoo_kernels/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_wheel_works_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import memzoo, memzoo_kernels; print(memzoo.__file__, memzoo.make('gru', width=8).width)"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.stdout.split() == [str(tmp_path / "memzoo" / "__init__.py"), "8"], result.stderr


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert memzoo.__version__ == project["version"]
    assert f"## [{memzoo.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_a_bare_clone_collects():
    """With pytest and the library's own dependencies alone, every test is found or left out, and none breaks."""
    extras = ["grain", "chex", "tyro", "tqdm", "matplotlib", "tensorboardX", "nbclient", "nbformat", "hatchling"]
    code = f"""
import sys
for name in {extras}:
    sys.modules[name] = None
import pytest
strict = ["-W", "error::pytest.PytestUnknownMarkWarning", "-p", "no:cacheprovider", "-p", "no:xdist"]
sys.exit(pytest.main(["--collect-only", "-q", *strict]))
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "tests/test_contract.py::" in result.stdout and "tests/test_train.py::" not in result.stdout


def test_tests_that_share_programs_run_in_one_process(request):
    """Or every process compiles all of them: pytest-xdist has to see the groups that conftest.py makes."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("only with -n and --dist loadgroup")
    assert request.node.nodeid.endswith("@test_package.py")
