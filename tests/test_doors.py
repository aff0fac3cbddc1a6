"""The names that outsiders rely on: where they are found, that they are typed, and that `help()` says everything."""
import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stremn

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["stremn", *sorted(f"stremn.{p.parent.name}" for p in (ROOT / "stremn").glob("*/__init__.py"))]
EVERYDAY = ["MemoryBank", "PredictionModel", "RULES", "Record", "StremnError", "VOSModel", "VideoPredictor",
            "VideoSegmenter", "available", "evaluate_davis", "load", "save_weights"]


def door(package: str):
    "The module behind a package's name."
    return importlib.import_module(package)


NAMES = [(package, name) for package in PACKAGES for name in door(package).__all__]


def test_twelve_names_at_the_top():
    assert stremn.__all__ == EVERYDAY == dir(stremn)
    with pytest.raises(AttributeError, match="module 'stremn' has no attribute 'Memory'"):
        assert stremn.Memory


@pytest.mark.parametrize("package, name", NAMES, ids=lambda x: x.removeprefix("stremn."))
def test_a_door_leads_to_the_thing_itself(package, name):
    found = getattr(door(package), name)
    assert not inspect.ismodule(found), "a module of the same name would hide it"
    home = getattr(found, "__module__", None)
    if home and home.startswith("stremn."):
        assert getattr(importlib.import_module(home), name) is found
        assert package == "stremn" or home.startswith(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_same_names(package):
    tree = ast.parse(Path(door(package).__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    assert sorted(a.asname for n in block.body for a in n.names) == sorted(door(package).__all__)
    assert all(a.asname == a.name for n in block.body for a in n.names)


def test_importing_the_package_is_instant():
    code = "import sys, stremn, stremn.memory, stremn.vos; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("package, name", NAMES, ids=lambda x: x.removeprefix("stremn."))
def test_help_says_everything(package, name):
    found = getattr(door(package), name)
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        return                                                               # data: RULES and its like
    doc = inspect.getdoc(found) or ""
    assert re.match(r"\S.{10,}", doc), "no summary"
    if inspect.isfunction(found) or not fields_are_documented(found):
        assert "Example:" in doc and ">>>" in doc, f"no example in {doc[:80]!r}"
    if inspect.isfunction(found):
        taken = inspect.signature(found).parameters
        assert "Returns:" in doc and ("Args:" in doc or not taken), f"no Args or Returns in {doc[:80]!r}"
        missing = [p for p in taken if not re.search(rf"^\s*(?:[\w*, ]*\b)?\*{{0,2}}{p}\b.*:", doc, re.M)]
        assert not missing, f"not explained: {missing}"


def fields_are_documented(kind: type) -> bool:
    "Configs and tuples say what they hold in a comment on each field, which nbdev and editors show."
    return hasattr(kind, "__dataclass_fields__") or hasattr(kind, "_fields") or issubclass(kind, Exception)


def test_the_public_api_is_typed():
    "mypy on a user's code, which goes through the doors, and on the memory itself."
    done = subprocess.run([sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent",
                           "--no-error-summary", "tests/typed_use.py", "stremn/memory"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


def test_the_type_checker_can_fail(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import stremn\nstremn.MemoryBank(slots=4).write('memory')\nstremn.VideoSegmentor\n")
    done = subprocess.run([sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", wrong],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "VideoSegmentor" in done.stdout and "Missing positional" in done.stdout
