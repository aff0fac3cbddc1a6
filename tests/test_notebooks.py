"""Every notebook runs top to bottom, flags respected (`slow`, `gpu` and `data` cells are skipped)."""
from pathlib import Path

import contracts
import pytest
from notebook_runner import run_notebook
from test_contracts import TWO, add, code, good_tree, shown, tree  # noqa: F401  (fixtures)

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p.relative_to(ROOT).as_posix() for p in contracts.notebook_paths(ROOT)]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_runs(notebook, tmp_path):
    status, said = run_notebook(notebook, ROOT, tmp_path / "said.txt")
    assert status == 0 and "Success." in said, f"\nstatus {status}\n{said[-8000:]}"


def test_a_notebook_that_stops_is_seen(tree, tmp_path):  # noqa: F811
    assert run_notebook(f"nbs/{TWO}", tree, tmp_path / "said.txt")[0] == 0
    add(tree, TWO, code("assert two(1) == 4", shown()))
    status, said = run_notebook(f"nbs/{TWO}", tree, tmp_path / "said.txt")
    assert status == 1 and "AssertionError" in said


def test_a_notebook_that_never_ends_is_seen(tree, tmp_path):  # noqa: F811
    add(tree, TWO, code("import time\ntime.sleep(60)"))
    assert run_notebook(f"nbs/{TWO}", tree, tmp_path / "said.txt", limit=5)[0] is None


def test_flagged_cells_are_skipped(tree, tmp_path):  # noqa: F811
    add(tree, TWO, *(code(f"#| {flag}\nraise ValueError") for flag in ("slow", "gpu", "data")))
    assert run_notebook(f"nbs/{TWO}", tree, tmp_path / "said.txt")[0] == 0
