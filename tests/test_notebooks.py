"""Every notebook runs top to bottom, flags respected (`slow`, `gpu` and `data` cells are skipped)."""
from pathlib import Path

import contracts
import pytest
from test_contracts import TWO, add, code, good_tree, shown, tree  # noqa: F401  (fixtures)

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p.relative_to(ROOT).as_posix() for p in contracts.notebook_paths(ROOT)]


def nbdev_test(notebook: str, root: Path):
    "Run one notebook in a process of its own."
    return contracts.run(contracts.tool("nbdev_test"), "--path", notebook, "--n_workers", "0", cwd=root)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_runs(notebook):
    done = nbdev_test(notebook, ROOT)
    assert done.returncode == 0 and "Success." in done.stdout, f"\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def test_a_notebook_that_stops_is_seen(tree):  # noqa: F811
    assert nbdev_test(f"nbs/{TWO}", tree).returncode == 0
    add(tree, TWO, code("assert two(1) == 4", shown()))
    done = nbdev_test(f"nbs/{TWO}", tree)
    assert done.returncode == 1 and "AssertionError" in done.stderr


def test_flagged_cells_are_skipped(tree):  # noqa: F811
    add(tree, TWO, *(code(f"#| {flag}\nraise ValueError") for flag in ("slow", "gpu", "data")))
    assert nbdev_test(f"nbs/{TWO}", tree).returncode == 0
