"""Make README.md from nbs/index.ipynb, without Quarto.

usage: python .ci/readme.py [ROOT]

Markdown cells are copied; code cells are shown unless hidden, with their text outputs. Links relative to
nbs/ become relative to the root. A picture among the outputs is written to nbs/images/index-<cell id>.png and linked.
"""
import base64
import json
import posixpath
import re
import sys
from pathlib import Path

BANNER = "<!-- Made from nbs/index.ipynb by .ci/readme.py (`make export`). Edit the notebook. -->\n"
LINK = re.compile(r"""(\]\(|\b(?:src|href)=["'])([^)\s"']+)""")
FENCE = re.compile(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", re.M | re.S)
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")


def text_of(value) -> str:
    "A notebook's text: a string, or a list of lines."
    return value if isinstance(value, str) else "".join(value)


def from_root(target: str) -> str:
    "The same link target seen from the root: `20_x.ipynb` -> `nbs/20_x.ipynb`, `../LICENSE` -> `LICENSE`."
    if re.match(r"[a-z][a-z0-9+.-]*:|#|/", target, re.I):
        return target
    path, mark, rest = re.match(r"([^#?]*)([#?]?)(.*)", target).groups()
    moved = posixpath.normpath(posixpath.join("nbs", path))
    return moved + ("/" if path.endswith("/") else "") + mark + rest


def relink(markdown: str) -> str:
    "Turn every link outside code from nbs-relative to root-relative."
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda m: m[1] + from_root(m[2]), part) for part in parts[::2]]
    return "".join(parts)


def fenced(text: str, language: str = "") -> str:
    "A fenced block whose fence is longer than any inside it."
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def shown_outputs(cell: dict, images: dict) -> list[str]:
    "Markdown for the outputs of a code cell; pictures are added to `images`."
    blocks = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output["output_type"] == "error":
            raise SystemExit(f"nbs/index.ipynb: cell {cell['id']} ends in {output['ename']}")
        if output["output_type"] == "stream":
            blocks.append(fenced(text_of(output["text"])))
        elif "image/png" in data:
            name = f"images/index-{cell['id']}" + (f"-{len(images)}" if images else "") + ".png"
            images[f"nbs/{name}"] = base64.b64decode(text_of(data["image/png"]))
            blocks.append(relink(f"![output of the cell above]({name})"))
        elif "text/markdown" in data:
            blocks.append(relink(text_of(data["text/markdown"]).strip()))
        elif "text/plain" in data:
            blocks.append(fenced(text_of(data["text/plain"])))
    return blocks


def readme(notebook: dict) -> tuple[str, dict[str, bytes]]:
    "README text and the pictures it links to, by path from the root."
    blocks, images = [], {}
    for cell in notebook["cells"]:
        source = text_of(cell["source"]).strip()
        if cell["cell_type"] == "markdown" and source:
            blocks.append(relink(source))
        if cell["cell_type"] != "code" or not source:
            continue
        lines = source.splitlines()
        directives = {m[1]: m[2] for line in lines if (m := DIRECTIVE.match(line))}
        code = "\n".join(line for line in lines if not DIRECTIVE.match(line)).strip()
        if "hide" in directives or directives.get("include") == "false":
            continue
        if "hide_input" not in directives and directives.get("echo") != "false":
            blocks.append(fenced(code, "python"))
        if "hide_output" not in directives and directives.get("output") != "false":
            blocks += shown_outputs(cell, images)
    return BANNER + "\n" + "\n\n".join(blocks) + "\n", images


def main(root: Path) -> None:
    "Write README.md and its pictures under `root`."
    text, images = readme(json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8")))
    for path, content in images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent))
