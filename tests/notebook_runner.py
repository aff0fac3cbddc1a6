"""Notebooks run as `nbdev_test` runs them, each in a process forked from one that has loaded torch already."""
import multiprocessing
import os
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "matplotlib.figure", "ipywidgets", "nbdev.test"])


def _run_here(notebook: str, root: Path, said: Path):
    "In the new process: run the notebook, with both streams in a file."
    with said.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(root)
    os.environ.pop("IN_TEST", None)                    # it turns nbdev's commands off
    from nbdev.test import nbdev_test
    nbdev_test(path=notebook, n_workers=0)


def run_notebook(notebook: str, root: Path, said: Path, limit: float = 600) -> tuple[int | None, str]:
    "Run one notebook; its exit status (None: it took longer than `limit` seconds), and what it said."
    process = FORKS.Process(target=_run_here, args=(notebook, root, said))
    process.start()
    process.join(limit)
    status = process.exitcode
    process.kill()
    return status, said.read_text()
