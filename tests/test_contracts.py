"""The contracts hold here, hold on a small good tree, and each one is seen to fail on a planted violation."""
import json
import os
import shutil
from pathlib import Path

import contracts
import pytest
from contracts import CONTRACTS

ROOT = Path(__file__).resolve().parent.parent


ONE, TWO = "library/01_core.ipynb", "library/20_memory.twice.ipynb"


# ---- a small good tree ---------------------------------------------------------------------------------------------

def code(source: str, *outputs: dict, **metadata) -> dict:
    "A code cell; its id is settled when the notebook is written."
    return {"cell_type": "code", "execution_count": None, "metadata": metadata, "outputs": list(outputs),
            "source": source}


def words(source: str) -> dict:
    "A markdown cell."
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def shown(value="3", mime: str = "text/plain") -> dict:
    "The output of a cell that ends in a value."
    return {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {mime: [value]}}


def write_notebook(path: Path, *cells: dict, **metadata) -> None:
    "Write cells as nbdev_clean leaves them."
    for i, cell in enumerate(cells):
        cell.setdefault("id", f"{i:08x}")
        if isinstance(cell["source"], str):
            cell["source"] = cell["source"].splitlines(keepends=True)
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nb = {"cells": list(cells), "metadata": {"kernelspec": kernel, **metadata}, "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def add(root: Path, name: str, *cells: dict, **metadata) -> None:
    "Append cells to a notebook of the tree."
    path = root / "nbs" / name
    nb = json.loads(path.read_text(encoding="utf-8"))
    new = ({**c, "id": f"{99 + i:08x}"} for i, c in enumerate(cells))
    write_notebook(path, *nb["cells"], *new, **{**nb["metadata"], **metadata})


def export(root: Path) -> None:
    "Export every notebook of the tree."
    done = contracts.run(contracts.tool("nbdev_export"), cwd=root)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def good_tree(tmp_path_factory) -> Path:
    "Two modules, an index, and everything the contracts look at."
    root = tmp_path_factory.mktemp("good")
    for name in ("settings.ini", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    (root / "CHANGELOG.md").write_text(f"# Change log\n\n## {contracts.settings(ROOT)['version']}\n")
    index = "# Small\n\n> A small tree\n\nSee [one](library/01_core.ipynb)."
    write_notebook(root / "nbs" / "index.ipynb", words(index),
                   code("1 + 2", shown()))
    write_notebook(root / "nbs" / ONE, code("#| default_exp core"), words("# One\n\n> Adds one"),
                   code("#| export\ndef one(x): return x + 1"), code("one(2)", shown()))
    write_notebook(root / "nbs" / TWO, code("#| default_exp memory.twice"), words("# Two\n\n> Adds two"),
                   code("#| export\nfrom stremn.core import one"), code("#| export\ndef two(x): return one(one(x))"),
                   code("two(1)", shown()), code("#| interactive\ntwo(0)"))
    export(root)
    contracts.readme_tool().main(root)
    for extra in (root / "nbs").glob("*.yml"):
        extra.unlink()
    return root


@pytest.fixture
def tree(good_tree, tmp_path) -> Path:
    "A copy of the good tree to spoil."
    return Path(shutil.copytree(good_tree, tmp_path / "tree"))


# ---- violations ----------------------------------------------------------------------------------------------------

def plant_shared_number(root): (root / "nbs" / ONE).rename(root / "nbs" / "library" / "20_core.ipynb")
def plant_bare_name(root): (root / "nbs" / ONE).rename(root / "nbs" / "library" / "core.ipynb")
def plant_split_layer(root): shutil.copy(root / "nbs" / TWO, root / "nbs" / "library" / "30_memory.more.ipynb")
def plant_wrong_name(root): (root / "nbs" / ONE).rename(root / "nbs" / "library" / "01_uno.ipynb")
def plant_nameless_export(root): write_notebook(root / "nbs" / "library" / "02_x.ipynb", code("#| export\ny = 1"))
def plant_upward_arrow(root): add(root, ONE, code("#| export\nfrom stremn.memory.twice import two"))
def plant_upward_arrow_inside(root): add(root, ONE, code("#| export\ndef f():\n    from stremn.memory import twice"))
def plant_relative_import(root): add(root, TWO, code("#| export\nfrom ..core import one"))
def plant_plain_import(root): add(root, TWO, code("#| export\nimport stremn.core"))
def plant_unknown_import(root): add(root, TWO, code("#| export\nfrom stremn.three import three"))
def plant_star(root): add(root, TWO, code("#| hide\nfrom math import *"))
def plant_fastcore(root): add(root, TWO, code("#| export\nfrom fastcore.basics import store_attr"))
def plant_orphan(root): (root / "stremn" / "three.py").write_text("x = 1\n")
def plant_missing_module(root): (root / "stremn" / "core.py").unlink()
def plant_code_in_init(root): (root / "stremn" / "memory" / "__init__.py").write_text("x = 1\n")


def plant_function_in_init(root):
    "Doors lead somewhere; they do nothing themselves."
    (root / "stremn" / "memory" / "__init__.py").write_text("from .twice import two\ndef three(x): return two(x)\n")


def plant_exporting_page(root):
    "A page of results that exports."
    write_notebook(root / "nbs" / "results" / "t1_x.ipynb", code("#| default_exp x"), code("#| export\ny = 1"))


def plant_two_makers(root):
    "Two notebooks for one module."
    write_notebook(root / "nbs" / "lessons" / "02_core.ipynb", code("#| default_exp core"), code("#| export\ny = 1"))


def plant_room_without_floor(root):
    "A package that nobody placed."
    write_notebook(root / "nbs" / "library" / "40_attic.ipynb", code("#| default_exp attic"),
                   code("#| export\nfrom stremn.core import one"))


def plant_arrow_between_towers(root):
    "Segmentation that knows of prediction."
    for name, needs in (("60_vos.a", "prediction.b"), ("70_prediction.b", "core")):
        write_notebook(root / "nbs" / "library" / f"{name}.ipynb", code(f"#| default_exp {name[3:]}"),
                       code(f"#| export\nfrom stremn.{needs} import one"))


def plant_circle(root):
    "Two modules of one package that import each other."
    for name, needs in (("60_vos.a", "vos.b"), ("61_vos.b", "vos.a")):
        write_notebook(root / "nbs" / "library" / f"{name}.ipynb", code(f"#| default_exp {name[3:]}"),
                       code(f"#| export\nfrom stremn.{needs} import one"))


def plant_lost_header(root): (root / "stremn" / "core.py").write_text("x = 1\n")
def plant_renamed_notebook(root): (root / "nbs" / ONE).rename(root / "nbs" / "library" / "02_core.ipynb")
def plant_edited_notebook(root): add(root, ONE, code("#| export\ndef zero(x): return x"))
def plant_missing_index(root): (root / "stremn" / "_modidx.py").unlink()
def plant_metadata(root): add(root, ONE, code("one(3)", shown("4"), collapsed=True))
def plant_execution_count(root): add(root, ONE, {**code("one(3)", shown("4")), "execution_count": 7})
def plant_fat(root): add(root, ONE, code("one(3)", shown("x" * 300_000)))
def plant_widget_state(root): add(root, ONE, widgets={"state": {}})
def plant_widget_output(root): add(root, ONE, code("one(3)", shown("{}", "application/vnd.jupyter.widget-view+json")))
def plant_interactive_output(root): add(root, ONE, code("#| interactive\none(3)", shown("4")))
def plant_stderr(root): add(root, ONE, code("one(3)", {"output_type": "stream", "name": "stderr", "text": ["careful"]}))
def plant_silent_lesson(root): add(root, ONE, code("x = one(3)"))
def plant_empty_figure(root): add(root, ONE, code("#| label: fig-x\none(3)", shown("4")))
def plant_long_export(root): add(root, ONE, code("#| export\n" + "\n".join(f"print({i})" for i in range(41))))
def plant_long_class(root): add(root, ONE, class_of("    def f{i}(self): return {i}", 81))
def plant_long_lesson(root): add(root, ONE, code("\n".join(f"x{i} = {i}" for i in range(21)), shown()))
def plant_print(root): add(root, ONE, code("print(one(3))", shown("4")))
def plant_no_title(root): write_notebook(root / "nbs" / "02_x.ipynb", words("Some words"))
def plant_extra(root): (root / "stremn" / "core.py").write_text("import matplotlib\n")
def plant_undeclared(root): (root / "stremn" / "core.py").write_text("def f():\n    import scipy.stats\n")
def plant_version(root): (root / "stremn" / "__init__.py").write_text('__version__ = "9.9.9"\n')
def plant_unlogged_version(root): (root / "CHANGELOG.md").write_text("# Change log\n\n## 0.0.0\n")
def plant_readme(root): (root / "README.md").write_text("# Another\n")
def plant_dead_link(root): add(root, ONE, words("See [three](30_three.ipynb)."))
def plant_private_source(root): add(root, ONE, code("#| hide\nclips = '" + "/" + "home/ada/clips'"))
def plant_private_output(root): add(root, ONE, code("one(3)", shown("/" + "tmp/ipykernel_7/1.py")))
def plant_private_file(root): (root / "notes.md").write_text("see " + "/" + "work/here")
def plant_note_to_self(root): (root / "notes.md").write_text("TO" + "DO: finish")
def plant_data(root): (root / "clip.mp4").write_bytes(b"0")
def plant_large(root): (root / "table.json").write_bytes(b" " * 1_000_001)
def plant_undefined(root): add(root, ONE, code("one(undefined_name)", shown("4")))
def plant_wide(root): add(root, ONE, code("one(3)  # " + "wide " * 30, shown("4")))
def plant_wide_code(root): add(root, ONE, code("one(" + "1+" * 50 + "1)", shown("4")))
def plant_exercise(root): add(root, ONE, words("## Exercises"))
def plant_number(root): add(root, ONE, words("See note" + "book 25."))
def plant_number_in_code(root): (root / "notes.py").write_text('"Any network of note' + 'books 41 and 43."\n')
def plant_wide_file(root): (root / "setup.py").write_text("x = 1  # " + "wide " * 30)


def class_of(line, n):
    "An exported cell with one class of n such lines."
    return code("#| export\nclass Long:\n" + "\n".join(line.format(i=i) for i in range(n)))


def plant_long_method(root):
    "A class of 45 lines, one of whose methods has them nearly all."
    lines = "\n".join(f"        self.x{i} = {i}" for i in range(43))
    add(root, ONE, code(f"#| export\nclass Long:\n    def f(self):\n{lines}"))


def plant_edited_module(root):
    "A change that no notebook knows of."
    path = root / "stremn" / "core.py"
    path.write_text(path.read_text().replace("+ 1", "+ 2"))


def plant_error(root):
    "A cell that stopped."
    add(root, ONE, code("one()", {"output_type": "error", "ename": "TypeError", "evalue": "", "traceback": []}))


def plant_loose_pin(root):
    "A pin outside the range that settings.ini gives."
    lines = (root / "constraints.txt").read_text().splitlines()
    spoiled = ["torch==1.0" if line.startswith("torch==") else line for line in lines]
    (root / "constraints.txt").write_text("\n".join(spoiled))


def plant_missing_pin(root):
    "A requirement without a pin."
    lines = (root / "constraints.txt").read_text().splitlines()
    (root / "constraints.txt").write_text("\n".join(line for line in lines if not line.startswith("tyro==")))


PLANTS = {
    "numbers_are_unique": [plant_shared_number, plant_bare_name, plant_split_layer],
    "names_match_modules": [plant_wrong_name, plant_nameless_export, plant_exporting_page, plant_two_makers],
    "arrows_point_down": [plant_upward_arrow, plant_upward_arrow_inside, plant_relative_import, plant_plain_import,
                          plant_unknown_import, plant_room_without_floor, plant_arrow_between_towers],
    "imports_run_in_no_circle": [plant_circle],
    "no_star_imports": [plant_star],
    "no_tools_in_modules": [plant_fastcore],
    "no_orphans": [plant_orphan, plant_missing_module, plant_code_in_init, plant_function_in_init],
    "headers_name_notebooks": [plant_lost_header, plant_renamed_notebook],
    "export_is_in_sync": [plant_edited_module, plant_edited_notebook, plant_missing_index],
    "notebooks_are_clean": [plant_metadata, plant_execution_count],
    "notebooks_are_small": [plant_fat],
    "no_widget_state": [plant_widget_state, plant_widget_output, plant_interactive_output],
    "no_error_outputs": [plant_error, plant_stderr],
    "lessons_show_something": [plant_silent_lesson, plant_empty_figure],
    "cells_are_short": [plant_long_export, plant_long_lesson, plant_long_class, plant_long_method],
    "lines_fit": [plant_wide, plant_wide_code, plant_wide_file],
    "library_is_reference": [plant_exercise],
    "text_names_modules": [plant_number, plant_number_in_code],
    "lessons_do_not_print": [plant_print],
    "notebooks_open_alike": [plant_no_title],
    "imports_without_extras": [plant_extra],
    "imports_are_declared": [plant_undeclared],
    "constraints_fit": [plant_loose_pin, plant_missing_pin],
    "versions_agree": [plant_version, plant_unlogged_version],
    "readme_is_in_sync": [plant_readme],
    "links_lead_somewhere": [plant_dead_link],
    "no_private_paths": [plant_private_source, plant_private_output, plant_private_file],
    "nothing_unfinished": [plant_note_to_self],
    "no_large_files": [plant_data, plant_large],
    "ruff_passes": [plant_undefined],
}
PAIRS = [(by_name, plant) for by_name, plants in PLANTS.items() for plant in plants]


# ---- tests ---------------------------------------------------------------------------------------------------------

def listed(violations: list[str]) -> str:
    "Violations one a line, for the failure message."
    return "\n" + "\n".join(violations)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda f: f.__name__)
def test_holds_here(contract):
    violations = contract(ROOT)
    assert not violations, listed(violations)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda f: f.__name__)
def test_holds_on_a_good_tree(contract, good_tree):
    violations = contract(good_tree)
    assert not violations, listed(violations)


@pytest.mark.parametrize("by_name, plant", PAIRS, ids=[f"{n}-{p.__name__.removeprefix('plant_')}" for n, p in PAIRS])
def test_sees_a_planted_violation(by_name, plant, tree):
    plant(tree)
    assert getattr(contracts, by_name)(tree), f"{by_name} did not see {plant.__name__}"


def test_every_contract_has_a_plant():
    assert {c.__name__ for c in CONTRACTS} == PLANTS.keys()


def test_links_of_the_readme():
    relink = contracts.readme_tool().relink
    assert relink("[a](20_x.ipynb) ![b](images/b.png) [c](../LICENSE) [d](https://e.org/f) [g](#h)") == \
        "[a](nbs/20_x.ipynb) ![b](nbs/images/b.png) [c](LICENSE) [d](https://e.org/f) [g](#h)"
    assert relink('<img src="images/b.png"> `[a](b)`\n```\n[c](d)\n```\n[e](f.ipynb#g)') == \
        '<img src="nbs/images/b.png"> `[a](b)`\n```\n[c](d)\n```\n[e](nbs/f.ipynb#g)'


def test_outputs_of_the_readme():
    hidden, plain = code("#| hide\nimport math"), code("#| label: x\n1 + 2", shown())
    image = {**code("figure", shown("aGk=", "image/png")), "id": "abc"}
    text, images = contracts.readme_tool().readme({"cells": [words("# T"), hidden, plain, image]})
    assert "import math" not in text and "label" not in text
    assert "```python\n1 + 2\n```\n\n```\n3\n```" in text
    assert images == {"nbs/images/index-abc.png": b"hi"} and "](nbs/images/index-abc.png)" in text


def test_ci_script_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_docstrings_are_not_counted_as_code():
    tree = contracts.ast.parse(source := '"x"\ndef f():\n    """One.\n\n    Two.\n    """\n    return 1\n')
    assert contracts.without_docstrings(source, tree) == ['"x"', "def f():", "    return 1"]


def test_a_comment_may_be_wider_than_its_code():
    assert not contracts.too_wide("x = 1" + " " * 80 + "  # " + "c" * 30)
    assert contracts.too_wide("x = " + "1+" * 50 + "1  # c") and contracts.too_wide("x = 1  # " + "c" * 120)
    assert contracts.documentation(contracts.ast.parse('x = "a"\n"b"\nclass C:\n    y = 1\n    "c"\n')) == {2, 5}
    assert not contracts.too_wide("c" * 110, True) and contracts.too_wide("c" * 121, True)
