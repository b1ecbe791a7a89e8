"""The notebooks in `examples/` run from top to bottom in an empty folder, and are committed without outputs."""

import nbformat
import pytest
from nbclient import NotebookClient
from support import ROOT, environment

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)  # the kernel inherits it
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "clear the outputs before you commit"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(
        output.output_type in ("stream", "display_data", "execute_result") for c in cells for output in c.outputs
    )
