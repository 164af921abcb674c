"""Every notebook runs from top to bottom, draws its pictures, and is stored without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import simulator

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    numbers = [int(path.name[:2]) for path in NOTEBOOKS]
    assert numbers[0] == 1
    assert numbers == sorted(set(numbers))  # each has its number whichever comes first
    assert len(NOTEBOOKS) >= 2


@every_notebook
def test_is_stored_clean(path: Path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@every_notebook
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws inline unless told otherwise
    monkeypatch.setenv("PYTHONPATH", str(Path(simulator.__file__).parents[1]))  # the package that the other tests import
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    nbformat.write(notebook, tmp_path / path.name)
    outputs = [(cell, output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for _, output in outputs if output.output_type == "error"]
    assert not [output.text for _, output in outputs if output.output_type == "stream" and output.name == "stderr"]
    drawn = {cell.id for cell, output in outputs if "image/png" in output.get("data", {})}
    draws = {cell.id for cell in notebook.cells if cell.cell_type == "code" and "plots.plot_" in cell.source}
    assert drawn == draws
    assert len(drawn) >= 4
