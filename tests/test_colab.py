"""The notebooks run from top to bottom as they are, and are committed with what they show."""

import json
import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "colab").glob("*.ipynb"))


def read(notebook):
    return nbformat.read(ROOT / notebook, as_version=4)


def outputs(cells):
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_it_is_committed_with_badge_and_outputs(notebook):
    cells = read(notebook).cells
    assert f"https://colab.research.google.com/github/memzoo/memzoo/blob/main/{notebook}" in cells[0].source
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run once, from the top"
    shown = outputs(cells)
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not any(output.output_type == "error" for output in shown)
    for place in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages"):
        assert place not in json.dumps(shown), "a path of the machine that it was run on"


@pytest.mark.long
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_it_runs(notebook, tmp_path, monkeypatch):
    """With this interpreter, whatever kernels are installed."""
    pytest.importorskip("ipykernel")
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    env = {"PYTHONPATH": path, "XLA_FLAGS": "", "IPYTHONDIR": str(tmp_path / "ipython")}
    kernel = tmp_path / "kernels" / "here"
    kernel.mkdir(parents=True)
    kernel_json = {"argv": argv, "display_name": "here", "language": "python", "env": env}
    (kernel / "kernel.json").write_text(json.dumps(kernel_json))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))

    fresh = read(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(fresh, kernel_name="here", timeout=600, resources=where).execute()
    kinds = lambda nb: [[output.output_type for output in cell.get("outputs", [])] for cell in nb.cells]
    assert [sorted(set(k)) for k in kinds(fresh)] == [sorted(set(k)) for k in kinds(read(notebook))]
