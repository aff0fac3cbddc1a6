"Files around the package agree with it: citation, forms, container, continuous integration."
import configparser
import re
from pathlib import Path

import pytest
import yaml

import stremn
from helpers import stremn_main
from stremn.models.cards import NOTES, describe_weights
from stremn.models.hub import available, load

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = configparser.ConfigParser(delimiters=["="], interpolation=None)
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]


def parsed(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version_and_of_the_paper():
    cff = parsed("CITATION.cff")
    assert cff["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= cff.keys()
    assert cff["version"] == stremn.__version__ == SETTINGS["version"] and cff["repository-code"] == SETTINGS["git_url"]
    paper, = cff["references"]
    assert [a["family-names"] for a in paper["authors"]] == ["Nguyen", "Kim", "Li"] and "2109.06474" in paper["url"]


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_forms_ask_for_what_helps(name):
    form = parsed(f".github/ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids)) and all(part["attributes"]["label"] for part in form["body"])
    assert name != "bug.yml" or any("stremn doctor" in str(part) for part in form["body"])


def test_systems_begin_with_the_oldest_supported():
    job = parsed(".github/workflows/ci.yml")["jobs"]["systems"]
    matrix = job["strategy"]["matrix"]
    assert {os.split("-")[0] for os in matrix["os"]} == {"ubuntu", "macos", "windows"}
    oldest = re.search(r"torch>=([\d.]+)", SETTINGS["requirements"])[1]
    assert f"torch=={oldest}.*" in str(job["steps"]) and matrix["python"][0] == SETTINGS["min_python"]


def test_the_container_installs_what_is_documented():
    lines = (ROOT / "Dockerfile").read_text()
    assert "whl/cpu" in lines and 'ENTRYPOINT ["stremn"]' in lines and "\nUSER " in lines
    assert "whl/cpu" in (ROOT / "README.md").read_text(encoding="utf-8")       # without gigabytes of CUDA


@pytest.mark.parametrize("name", available())
def test_every_network_has_a_card(name, capsys):
    status, out, err = stremn_main(capsys, "models", name)
    assert (status, err) == (0, []) and "\n".join(out) == describe_weights(name)
    said = dict(line.split(None, 1) for line in out[1:])
    model = load(name)
    assert f"{sum(p.numel() for p in model.parameters()):,} weights" in said["network"]
    assert {"what", "for", "limits", "data", "steps", "license", "scores", "file", "load"} <= said.keys()
    assert said["limits"] == NOTES[name]["limits"]
    assert ("forgets" in said) == name.startswith("vos") and str(model.card["steps"]) == said["steps"]


def test_a_file_of_weights_has_a_card_too(weights, capsys):
    status, out, _ = stremn_main(capsys, "models", weights)
    assert status == 0 and out[0] == str(weights) and any("VOSModel" in line for line in out)
    status, _, err = stremn_main(capsys, "models", "vos-smal")
    assert status == 2 and err[0].endswith("did you mean vos-small?") and len(err) == 1
