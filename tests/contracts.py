"""The project's contracts: each is a function from a root folder to a list of violations, empty when it holds.

They take any root, so that tests/test_contracts.py can show each one failing on a small tree with a planted violation.
"""
import ast
import configparser
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
MAX_NOTEBOOK_KB = 300
MAX_FILE_KB = 1000
MAX_EXPORTED_LINES = 40
MAX_OTHER_LINES = 20
MAX_CLASS_LINES = 80
MAX_METHOD_LINES = 12
MAX_COLUMNS = 100
MAX_COMMENT_COLUMNS = 120
SKIPPED_FOLDERS = {".git", ".venv", "__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".ruff_cache", ".hypothesis",
                   "build", "dist", "runs", "reproduced", "_proc", "_docs"}
DATA_SUFFIXES = {".mp4", ".avi", ".mov", ".npy", ".npz", ".pt", ".pth", ".pkl", ".zip", ".tar", ".gz", ".tgz",
                 ".h5", ".safetensors"}
NOTEBOOK_TOOLS = {"nbdev", "fastcore", "execnb", "IPython", "pytest", "nbformat"}
IMPORT_NAMES = {"pillow": "PIL", "scikit-image": "skimage", "opencv-python-headless": "cv2", "pytest-xdist": "xdist"}
WITHOUT_EXTRAS = {"stremn.viz", "stremn.widgets"} # these two need the extra `notebooks`, and say so
PRIVATE = re.compile(r"file:/{3}|(?<![\w.~/})*-])/(?:work|home|root|tmp|Users|opt|mnt)\b(?![\w-])")
UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME)\b")
MAGIC = re.compile(r"^\s*[%!].*$", re.M)


# ---- reading a tree ------------------------------------------------------------------------------------------------

def settings(root: Path) -> dict:
    "settings.ini."
    ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
    ini.read(root / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


def joined(value) -> str:
    "A notebook's text: a string, or a list of lines."
    return value if isinstance(value, str) else "".join(value)


class Cell:
    "One cell: its kind, source, directives and outputs."

    def __init__(self, raw: dict, index: int):
        self.kind, self.index = raw["cell_type"], index
        self.source = joined(raw["source"])
        self.outputs = raw.get("outputs", [])
        lines = self.source.strip().splitlines() if self.kind == "code" else []
        head = itertools.takewhile(lambda line: line.startswith("#|"), lines)
        self.directives = {m[1]: m[2] for line in head if (m := re.match(r"#\|\s*([\w-]+):?\s*(.*?)\s*$", line))}
        self.code = re.sub(r"^#\|.*$\n?", "", self.source, flags=re.M).strip("\n") if self.kind == "code" else ""
        self.exported = bool({"export", "exports", "exporti"} & self.directives.keys())

    def tree(self) -> ast.Module:
        "The code as a syntax tree, magics left out."
        return ast.parse(MAGIC.sub("", self.code))

    def texts(self) -> list[str]:
        "Source and every output that is text."
        out = [self.source]
        for output in self.outputs:
            out += [joined(output.get("text", "")), *output.get("traceback", [])]
            out += [joined(v) for k, v in output.get("data", {}).items() if k.startswith("text/") or "svg" in k]
        return out


class Notebook:
    "One notebook: its path, cells, and the module it exports, if any."

    def __init__(self, path: Path, root: Path):
        self.path, self.name = path, path.relative_to(root / "nbs").as_posix()
        self.raw = json.loads(path.read_text(encoding="utf-8"))
        self.cells = [Cell(raw, i) for i, raw in enumerate(self.raw["cells"])]
        self.code = [c for c in self.cells if c.kind == "code" and c.source.strip()]
        self.module = next((c.directives["default_exp"] for c in self.code if "default_exp" in c.directives), None)


def notebook_paths(root: Path) -> list[Path]:
    "Every notebook but private scratch (a name or folder that begins with _ or .), in order."
    found = (root / "nbs").rglob("*.ipynb")
    return sorted(p for p in found if not any(part[0] in "._" for part in p.relative_to(root / "nbs").parts))


def notebooks(root: Path) -> list[Notebook]:
    "Every notebook, in order."
    return [Notebook(p, root) for p in notebook_paths(root)]


def modules(root: Path) -> dict[str, Path]:
    "Generated modules by dotted name, `stremn.` included; packages and nbdev's index left out."
    lib = root / "stremn"
    return {".".join(("stremn", *p.relative_to(lib).with_suffix("").parts)): p
            for p in sorted(lib.rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")}


def committed(root: Path) -> list[Path]:
    "Files that are, or would be, committed; outside git, every file but caches."
    git = subprocess.run(["git", "-C", root, "ls-files", "-coz", "--exclude-standard"], capture_output=True, text=True)
    if git.returncode == 0 and (root / ".git").exists():
        found = [root / name for name in git.stdout.split("\0") if name]
    else:
        found = [p for p in root.rglob("*")
                 if not any(s in SKIPPED_FOLDERS or s.endswith(".egg-info") for s in p.relative_to(root).parts)]
    return sorted(p for p in found if p.is_file())


def texts(root: Path):
    "(place, text) for every committed text: files as they are, notebooks cell by cell without their pictures."
    for nb in notebooks(root):
        for cell in nb.cells:
            for text in cell.texts():
                yield f"nbs/{nb.name} cell {cell.index}", text
    for path in committed(root):
        if path.suffix == ".ipynb":
            continue
        try:
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def tool(name: str) -> str:
    "A console script of the environment that runs the tests."
    return str(Path(sys.executable).with_name(name))


def run(*command, cwd: Path) -> subprocess.CompletedProcess:
    "Run a command, output captured, without the variable that turns nbdev's commands off."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def copied(root: Path, to: Path) -> Path:
    "A copy of what nbdev reads and writes."
    for name in ("nbs", "stremn"):
        if (root / name).is_dir():
            skip = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", "weights", "records", "images")
            shutil.copytree(root / name, to / name, ignore=skip)
    shutil.copy(root / "settings.ini", to)
    return to


# ---- order and names -----------------------------------------------------------------------------------------------

EXPORTING = ("lessons", "library") # folders of nbs/ whose notebooks may export; results/ holds pages

# Floors of the package, lowest first. A module imports from its own floor and from those below it; the two towers share
# a floor and never import each other, nor do losses and metrics.
FLOORS = [("core",), ("config",), ("paper",), ("results",), ("images",), ("viz",), ("data",), ("memory",), ("nets",),
          ("models",), ("losses", "metrics"), ("train",), ("vos", "prediction"), ("experiments",),
          ("doctor",), ("adapters",), ("cli",)]


def numbers_are_unique(root: Path) -> list[str]:
    "Notebooks are NN_name.ipynb, numbers are not shared in a folder, and in library/ a package stays within one ten."
    bad, owner, tens = [], {}, {}
    for nb in notebooks(root):
        folder, _, file = nb.name.rpartition("/")
        if file == "index.ipynb" or folder not in EXPORTING:
            continue
        match = re.fullmatch(r"(\d\d[b-z]?)_([a-z][a-z0-9_.]*)\.ipynb", file)
        if not match:
            bad.append(f"{nb.name}: expected NN_module.path.ipynb")
            continue
        number, name = match.groups()
        if (folder, number) in owner:
            bad.append(f"{nb.name}: number shared with {owner[folder, number]}")
        owner[folder, number] = nb.name
        package = name.split(".")[0]
        if folder == "library" and "." in name and tens.setdefault(package, number[0]) != number[0]:
            bad.append(f"{nb.name}: other notebooks of {package} have numbers {tens[package]}x")
    return bad


def names_match_modules(root: Path) -> list[str]:
    "NN_module.path.ipynb exports to module.path; only lessons and library notebooks export, one a module."
    bad, owner = [], {}
    for nb in notebooks(root):
        exporting = nb.name.split("/")[0] in EXPORTING and nb.name.count("/") == 1
        if nb.module and (not exporting or nb.path.stem.split("_", 1)[-1] != nb.module):
            bad.append(f"{nb.name}: exports to {nb.module}")
        if nb.module and owner.setdefault(nb.module, nb.name) != nb.name:
            bad.append(f"{nb.name}: {owner[nb.module]} exports to {nb.module}, too")
        if not nb.module and any(c.exported for c in nb.code):
            bad.append(f"{nb.name}: exports cells but has no default_exp")
    return bad


def imported_modules(tree: ast.AST, known: set[str]):
    "(module, problem) for each import of the package: the dotted module, or what is wrong with the import."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "stremn":
                    yield None, f"`import {alias.name}`: write `from stremn.x import y`"
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield None, "relative import: write `from stremn.x import y`"
            elif (node.module or "").split(".")[0] == "stremn":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}".removeprefix("stremn.")
                    outer = node.module.removeprefix("stremn").removeprefix(".")
                    if inner in known or outer in known:
                        yield (inner if inner in known else outer), None
                    elif alias.name != "__version__":
                        yield None, f"`from {node.module} import {alias.name}`: no notebook makes it"


def package_imports(root: Path):
    "(notebook, its module, imported module, problem) for each import of the package in an exported cell."
    books = [nb for nb in notebooks(root) if nb.module]
    known = {nb.module for nb in books}
    for nb in books:
        for cell in nb.code:
            if cell.exported:
                for module, problem in imported_modules(cell.tree(), known):
                    yield nb.name, nb.module, module, problem


def arrows_point_down(root: Path) -> list[str]:
    "Exported cells import the package as `from stremn.x import y`, from their own room or a lower floor only."
    floor = {package: i for i, packages in enumerate(FLOORS) for package in packages}
    bad = []
    for name, importer, imported, problem in package_imports(root):
        if problem:
            bad.append(f"{name}: {problem}")
            continue
        above, below = importer.split(".")[0], imported.split(".")[0]
        unknown = [p for p in (above, below) if p not in floor]
        if unknown:
            bad.append(f"{name}: {unknown[0]} is on no floor (FLOORS in tests/contracts.py)")
        elif above != below and floor[above] <= floor[below]:
            bad.append(f"{name}: imports {imported}, which is not on a lower floor")
    return bad


def imports_run_in_no_circle(root: Path) -> list[str]:
    "Modules of one package import each other in one direction."
    below = {}
    for _, importer, imported, problem in package_imports(root):
        if not problem:
            below.setdefault(importer, set()).add(imported)
    bad, done = [], set()

    def visit(module, path):
        if module in path:
            bad.append(" -> ".join([*path[path.index(module):], module]))
        elif module not in done:
            for other in sorted(below.get(module, ())):
                visit(other, [*path, module])
            done.add(module)
    for module in sorted(below):
        visit(module, [])
    return bad


def no_star_imports(root: Path) -> list[str]:
    "No `import *`, in any cell."
    return [f"{nb.name} cell {c.index}: import *"
            for nb in notebooks(root) for c in nb.code for node in ast.walk(c.tree())
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)]


def no_tools_in_modules(root: Path) -> list[str]:
    "Exported cells import none of the notebook tools."
    bad = []
    for nb in notebooks(root):
        for cell in (c for c in nb.code if c.exported):
            for node in ast.walk(cell.tree()):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                        [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                bad += [f"{nb.name} cell {cell.index}: {n}" for n in names if n.split(".")[0] in NOTEBOOK_TOOLS]
    return bad


# ---- notebooks and modules -----------------------------------------------------------------------------------------

def no_orphans(root: Path) -> list[str]:
    "Each module has its notebook, each exporting notebook its module; a subpackage's __init__.py only re-exports."
    made, files = {f"stremn.{nb.module}" for nb in notebooks(root) if nb.module}, modules(root)
    bad = [f"{files[m].relative_to(root).as_posix()}: no notebook makes it" for m in sorted(files.keys() - made)]
    bad += [f"{m}: its notebook was never exported" for m in sorted(made - files.keys())]
    inits = [p for p in (root / "stremn").rglob("__init__.py") if p.parent != root / "stremn"]
    return bad + [f"{p.relative_to(root).as_posix()}: does more than re-export" for p in inits if not only_doors(p)]


def only_doors(path: Path) -> bool:
    "Is this `__init__.py` empty, or a docstring, imports, `__all__` and the two lazy hooks alone?"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        door = isinstance(node, (ast.Import, ast.ImportFrom))
        door |= isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        door |= isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        if not door:
            return False
    return True


def headers_name_notebooks(root: Path) -> list[str]:
    "Generated files say so, and name the notebook that makes them."
    bad = []
    for module, path in modules(root).items():
        head = "\n".join(path.read_text(encoding="utf-8").splitlines()[:12])
        match = re.search(r"AUTOGENERATED! DO NOT EDIT! File to edit: (\S+\.ipynb)", head)
        where = path.relative_to(root).as_posix()
        if not match:
            bad.append(f"{where}: no autogenerated header")
        elif not (path.parent / match[1]).resolve().is_file():
            bad.append(f"{where}: names {match[1]}, which is not there")
        elif Path(match[1]).stem.split("_", 1)[-1] != module.removeprefix("stremn."):
            bad.append(f"{where}: names {match[1]}")
    return bad


def python_files(root: Path) -> dict[str, str]:
    "Everything in stremn/ that is Python, by path."
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in (root / "stremn").rglob("*.py")}


def export_is_in_sync(root: Path) -> list[str]:
    "Exporting all notebooks again changes nothing in stremn/."
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(root, Path(folder))
        before = python_files(copy)
        for path in modules(copy).values():
            path.unlink()
        done = run(tool("nbdev_export"), cwd=copy)
        if done.returncode:
            return [f"nbdev_export failed: {done.stderr.strip()[-500:]}"]
        after = python_files(copy)
    return [f"{name}: differs from its notebook; run `make export`"
            for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def notebooks_are_clean(root: Path) -> list[str]:
    "nbdev_clean changes nothing."
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(root, Path(folder))
        done = run(tool("nbdev_clean"), cwd=copy)
        if done.returncode:
            return [f"nbdev_clean failed: {done.stderr.strip()[-500:]}"]
        return [f"{p.relative_to(root).as_posix()}: not clean; run `make clean-notebooks`" for p in notebook_paths(root)
                if p.read_bytes() != (copy / p.relative_to(root)).read_bytes()]


def notebooks_are_small(root: Path) -> list[str]:
    "Each notebook is below 300 kB."
    sizes = {p: p.stat().st_size / 1000 for p in notebook_paths(root)}
    return [f"{p.name}: {kb:.0f} kB, at most {MAX_NOTEBOOK_KB}" for p, kb in sizes.items() if kb >= MAX_NOTEBOOK_KB]


def no_widget_state(root: Path) -> list[str]:
    "No widget metadata or widget output; a cell that begins with `#| interactive` is committed without output."
    bad = [f"{nb.name}: metadata.widgets" for nb in notebooks(root) if "widgets" in nb.raw["metadata"]]
    for nb in notebooks(root):
        for cell in nb.code:
            widget = any("widget" in mime for o in cell.outputs for mime in o.get("data", {}))
            if widget or ("interactive" in cell.directives and cell.outputs):
                bad.append(f"{nb.name} cell {cell.index}: interactive output")
    return bad


def no_error_outputs(root: Path) -> list[str]:
    "No cell ends in an error, and none writes to stderr."
    return [f"{nb.name} cell {c.index}: {o.get('ename', 'stderr')}" for nb in notebooks(root) for c in nb.code
            for o in c.outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


def lessons_show_something(root: Path) -> list[str]:
    "A code cell without a leading directive has an output; a figure cell has a picture, unless its flag skips it."
    bad = []
    for nb in notebooks(root):
        for cell in nb.code:
            where = f"{nb.name} cell {cell.index}"
            if not cell.source.lstrip().startswith("#|") and not cell.outputs:
                bad.append(f"{where}: no output: {cell.code.splitlines()[0][:60]}")
            skipped = {"slow", "gpu", "data", "eval"} & cell.directives.keys()
            drawn = any(mime.startswith("image/") for o in cell.outputs for mime in o.get("data", {}))
            if cell.directives.get("label", "").startswith("fig-") and not drawn and not skipped:
                bad.append(f"{where}: {cell.directives['label']} without a picture")
    return bad


def without_docstrings(code: str, tree: ast.Module) -> list[str]:
    "Lines of code: docstrings and blank lines do not count."
    lines = code.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines[first.lineno - 1:first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return [line for line in lines if line.strip()]


def long_methods(node: ast.ClassDef) -> list[str]:
    "Methods of a class whose bodies are too long, docstrings not counted."
    bad = []
    for method in (n for n in node.body if isinstance(n, ast.FunctionDef)):
        body = method.body[1:] if ast.get_docstring(method) is not None else method.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        if lines > MAX_METHOD_LINES:
            bad.append(f"{node.name}.{method.name}: {lines} lines, at most {MAX_METHOD_LINES}")
    return bad


def only_data(tree: ast.Module) -> bool:
    "Nothing but constants: such a cell is read as a table and may be of any length."
    return all(isinstance(node, (ast.Assign, ast.AnnAssign)) for node in tree.body)


def cells_are_short(root: Path) -> list[str]:
    """Exported cells have at most 40 lines, or are one class of at most 80 with methods of 12; others have 20.

    Docstrings, blank lines and directives do not count; an exported cell of nothing but data may be longer.
    """
    bad = []
    for nb in notebooks(root):
        for cell in nb.code:
            tree, where = cell.tree(), f"{nb.name} cell {cell.index}"
            lines = len(without_docstrings(cell.code, tree))
            if not cell.exported:
                most = MAX_OTHER_LINES
            elif len(tree.body) == 1 and isinstance(tree.body[0], ast.ClassDef) and lines > MAX_EXPORTED_LINES:
                most = MAX_CLASS_LINES
                bad += [f"{where}: {found}" for found in long_methods(tree.body[0])]
            else:
                most = lines if only_data(tree) else MAX_EXPORTED_LINES
            if lines > most:
                bad.append(f"{where}: {lines} lines, at most {most}")
    return bad


def documentation(tree: ast.Module) -> set[int]:
    "Numbers of the lines that are docstrings, or help strings under a field."
    return {line for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str) for line in range(node.lineno, node.end_lineno + 1)}


def too_wide(line: str, documents: bool = False) -> bool:
    "Is the code of a line wider than 100 columns, or the whole line, with its comment, wider than 120?"
    if len(line) <= MAX_COLUMNS:
        return False
    comment = re.search(r"\s+# ", line)
    code = "" if documents else line[:comment.start()] if comment else line
    return len(code) > MAX_COLUMNS or len(line) > MAX_COMMENT_COLUMNS


def lines_fit(root: Path) -> list[str]:
    "Code in notebooks has at most 100 columns, comments and docstrings 120; tests and tools 120; captions any number."
    bad = []
    for nb in notebooks(root):
        for cell in nb.code:
            documents = documentation(cell.tree())
            bad += [f"{nb.name} cell {cell.index}, line {i}: {len(line)} columns"
                    for i, line in enumerate(cell.code.splitlines(), 1) if too_wide(line, i in documents)]
    return bad + [f"{p.relative_to(root).as_posix()}, line {i}: {len(line)} columns" for p in committed(root)
                  if p.suffix == ".py" and not p.is_relative_to(root / "stremn")
                  for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
                  if len(line) > MAX_COMMENT_COLUMNS]


LECTURE = re.compile(r"^\| after this \||\bpredict first\b|^#+ (?:what next|exercises?\b)|\bexercise \d\b", re.I | re.M)
BY_NUMBER = re.compile(r"\bnotebooks? \d\d\b", re.I)


def library_is_reference(root: Path) -> list[str]:
    "Library notebooks carry no lecture dress: no exercises, no predictions, no `what next`."
    return [f"{nb.name} cell {c.index}: {m[0]}" for nb in notebooks(root) if nb.name.startswith("library/")
            for c in nb.cells for m in [LECTURE.search(c.source)] if m]


def text_names_modules(root: Path) -> list[str]:
    "Text refers to notebooks by module or link, never by number."
    return [f"{where}: {m[0]}" for where, text in texts(root) for m in [BY_NUMBER.search(text)]
            if m and not where.startswith("CHANGELOG")]


def lessons_do_not_print(root: Path) -> list[str]:
    "A lesson ends in the value worth seeing, not in print."
    return [f"{nb.name} cell {c.index}: print" for nb in notebooks(root) for c in nb.code if not c.exported
            for node in ast.walk(c.tree()) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"]


def notebooks_open_alike(root: Path) -> list[str]:
    "The first words of a notebook are a heading and one quoted sentence."
    bad = []
    for nb in notebooks(root):
        first = next((c.source for c in nb.cells if c.kind == "markdown"), "")
        if not re.match(r"# \S.*\n+(?:.*\n)*?> \S", first):
            bad.append(f"{nb.name}: expected `# Title` and `> one sentence`, found {first[:40]!r}")
    return bad


# ---- the package ---------------------------------------------------------------------------------------------------

BLOCKED_IMPORT = """
import importlib, sys
root, blocked, names = sys.argv[1], set(sys.argv[2].split()), sys.argv[3].split()
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked: raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, root)
for name in names:
    try: importlib.import_module(name)
    except Exception as e: print(f"{name}: {type(e).__name__}: {e}")
"""


def requirement_names(line: str) -> set[str]:
    "Distribution names in a line of settings.ini."
    return {Requirement(word).name.lower() for word in line.split()}


def import_names(distributions: set[str]) -> set[str]:
    "What those distributions are called in an import."
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in distributions}


def imports_without_extras(root: Path) -> list[str]:
    "Every module but viz and widgets imports where nothing of the extras is installed."
    ini = settings(root)
    extras = requirement_names(ini["dev_requirements"]) | requirement_names(ini["notebook_requirements"])
    blocked = import_names(extras - requirement_names(ini["requirements"]))
    blocked |= NOTEBOOK_TOOLS | {"cv2", "skimage", "pandas"}
    names = ["stremn", *(m for m in modules(root) if m not in WITHOUT_EXTRAS)]
    done = run(sys.executable, "-c", BLOCKED_IMPORT, root, " ".join(blocked), " ".join(names), cwd=root)
    crash = [f"importing stopped: {done.stderr.strip()[-500:]}"] if done.returncode else []
    return crash + done.stdout.splitlines()


def imports_are_declared(root: Path) -> list[str]:
    "What a module imports from outside is in the requirements, or in an extra: `notebooks` or `prompt`."
    ini = settings(root)
    extras = [ini.get(f"{extra}_requirements", "") for extra in ("notebook", "prompt")]
    allowed = import_names(requirement_names(" ".join([ini["requirements"], *extras])))
    allowed |= set(sys.stdlib_module_names) | {"stremn"}
    bad = set()
    for path in modules(root).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            bad |= {f"{path.relative_to(root).as_posix()}: {n} is in no requirement" for n in names
                    if n.split(".")[0] not in allowed}
    return sorted(bad)


def constraints_fit(root: Path) -> list[str]:
    "constraints.txt pins every requirement, inside its range."
    text = re.sub(r"^#.*$", "", (root / "constraints.txt").read_text(encoding="utf-8"), flags=re.M)
    lines = [Requirement(line) for line in text.split()]
    pins, ini = {r.name.lower(): next(iter(r.specifier)).version for r in lines}, settings(root)
    bad = []
    for word in " ".join(ini[k] for k in ("requirements", "dev_requirements", "notebook_requirements")).split():
        need = Requirement(word)
        if need.name.lower() not in pins:
            bad.append(f"{need.name}: not pinned")
        elif not need.specifier.contains(pins[need.name.lower()], prereleases=True):
            bad.append(f"{need}: pinned to {pins[need.name.lower()]}")
    return sorted(set(bad))


def versions_agree(root: Path) -> list[str]:
    "One version in settings.ini, in stremn.__version__ and in the change log."
    version, bad = settings(root)["version"], []
    init = re.search(r"^__version__ = [\"'](.+?)[\"']", (root / "stremn" / "__init__.py").read_text(), re.M)
    if not init or init[1] != version:
        bad.append(f"stremn.__version__ is {init and init[1]}, settings.ini says {version}")
    if not re.search(rf"^## {re.escape(version)}\b", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.M):
        bad.append(f"CHANGELOG.md has no entry for {version}")
    return bad


# ---- the repository ------------------------------------------------------------------------------------------------

@cache
def readme_tool():
    "The README maker, .ci/readme.py, as a module."
    spec = importlib.util.spec_from_file_location("readme_tool", HERE.parent / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def readme_is_in_sync(root: Path) -> list[str]:
    "README.md and its pictures are what nbs/index.ipynb gives."
    text, images = readme_tool().readme(json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8")))
    wanted = {"README.md": text.encode(), **images}
    return [f"{name}: differs from nbs/index.ipynb; run `make export`" for name, content in wanted.items()
            if not (root / name).is_file() or (root / name).read_bytes() != content]


def links_lead_somewhere(root: Path) -> list[str]:
    "Relative links in notebooks and Markdown files lead to files that are there."
    bad, link = [], re.compile(r"\]\(([^)\s#]+)[^)]*\)|\b(?:src|href)=[\"']([^\"'#]+)")
    places = [(f"nbs/{nb.name}", nb.path.parent, c.source)
              for nb in notebooks(root) for c in nb.cells if c.kind == "markdown"]
    places += [(p.name, p.parent, p.read_text(encoding="utf-8")) for p in root.glob("*.md")]
    for where, folder, text in places:
        prose = re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", text, flags=re.S)
        for found in link.findall(prose):
            target = found[0] or found[1]
            if not re.match(r"[a-z][a-z0-9+.-]*:|attachment:", target) and not (folder / target).exists():
                bad.append(f"{where}: {target} is not there")
    return bad


def no_private_paths(root: Path) -> list[str]:
    "No file, source or output names a folder of the machine it was made on."
    return [f"{where}: {text[max(0, m.start()-20):m.end()+20]!r}"
            for where, text in texts(root) for m in [PRIVATE.search(text)] if m]


def nothing_unfinished(root: Path) -> list[str]:
    "No note to self is left in any file."
    return [f"{where}: {m[0]}" for where, text in texts(root) for m in [UNFINISHED.search(text)] if m]


def no_large_files(root: Path) -> list[str]:
    "No data, and no file above 1 MB, but the weights in stremn/weights."
    bad = []
    for path in committed(root):
        name, kb = path.relative_to(root).as_posix(), path.stat().st_size / 1000
        if not name.startswith("stremn/weights/") and (kb > MAX_FILE_KB or path.suffix in DATA_SUFFIXES):
            bad.append(f"{name}: {kb:.0f} kB")
    return bad


def ruff_passes(root: Path) -> list[str]:
    "The linter accepts notebooks, tests and tools."
    places = [p for p in ("nbs", "tests", "setup.py", ".ci") if (root / p).exists()]
    done = run(sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", *places, cwd=root)
    return done.stdout.splitlines() + done.stderr.splitlines() if done.returncode else []


CONTRACTS = [
    numbers_are_unique, names_match_modules, arrows_point_down, imports_run_in_no_circle, no_star_imports,
    no_tools_in_modules,
    no_orphans, headers_name_notebooks, export_is_in_sync, notebooks_are_clean, notebooks_are_small, no_widget_state,
    no_error_outputs, lessons_show_something, cells_are_short, lines_fit, library_is_reference, text_names_modules,
    lessons_do_not_print, notebooks_open_alike,
    imports_without_extras, imports_are_declared, constraints_fit, versions_agree,
    readme_is_in_sync, links_lead_somewhere, no_private_paths, nothing_unfinished, no_large_files, ruff_passes,
]
