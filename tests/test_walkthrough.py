"""walkthrough.ipynb: its cells run from top to bottom, without Jupyter. As a program: store new outputs.

    python tests/test_walkthrough.py"""
import contextlib
import io
import json
import os

from conftest import ROOT

NOTEBOOK = ROOT / "walkthrough.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(notebook):
    """Run every code cell in one namespace -> what each printed."""
    names, printed = {}, []
    with contextlib.chdir(ROOT):
        for cell in code_cells(notebook):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec("".join(cell["source"]), names)  # noqa: S102  our own notebook
            printed.append(out.getvalue())
    return names, printed


def test_the_walkthrough_runs_and_learns():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = code_cells(notebook)
    assert cells and all(len(cell["source"]) <= 20 and cell["outputs"] for cell in cells)
    names, printed = run_cells(notebook)
    # not the answers: a processor that rounds otherwise may draw another token
    assert printed[:2] == ["".join(cell["outputs"][0]["text"]) for cell in cells[:2]]
    advantages, old, new = names["advantages"][0].tolist(), names["old"], names["new"]
    assert sum(a * (new[j] - old[j]) for j, a in enumerate(advantages)) > 0
    assert names["after"] > names["before"]


def store():
    notebook = json.loads(NOTEBOOK.read_text())
    for cell, text in zip(code_cells(notebook), run_cells(notebook)[1], strict=True):
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": lines}]
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    store()
