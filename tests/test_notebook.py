"""docs/tour.ipynb: what is saved in it was executed, and it runs."""

import importlib.util
import json

import pytest

from tests.tiny_runs import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def code_cells(cells):
    return [cell for cell in cells if cell["cell_type"] == "code"]


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def test_the_saved_notebook_was_executed_from_top_to_bottom():
    cells = code_cells(json.loads(NOTEBOOK.read_text())["cells"])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert str(ROOT) not in NOTEBOOK.read_text() and NOTEBOOK.stat().st_size < 400_000


def kinds(cell):
    """What a cell shows; printed text may come in any number of pieces."""
    return list(dict.fromkeys(output["output_type"] for output in cell["outputs"]))


@pytest.mark.skipif(
    importlib.util.find_spec("nbclient") is None, reason="nbclient is not installed: launch/install.sh test"
)
def test_the_notebook_runs_and_its_outputs_are_of_the_saved_kinds(monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.delenv("MPLBACKEND", raising=False)  # so that pictures are shown
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # it trains so long that LLVM's optimisations pay
    saved = json.loads(NOTEBOOK.read_text())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(ROOT)}}).execute()
    ran, before = code_cells(notebook.cells), code_cells(saved["cells"])
    assert list(map(pictures, ran)) == list(map(pictures, before)) and sum(map(pictures, ran)) >= 2
    assert list(map(kinds, ran)) == list(map(kinds, before))
