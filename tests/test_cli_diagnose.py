"""`stremn diagnose` as a user meets it: a Chameleon seed, a folder, figures, refusals."""
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers import files_below, stremn_main
from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.experiments.diagnose import diagnose_clip, diagnosis_report
from stremn.images import to_pixels, write_mask
from stremn.memory.rules import ZOO
from stremn.models.hub import load


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    "An empty folder to stand in, with a rule in a file and a clip of five frames in folders."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rules.py").write_text("from stremn.memory.rules import newest\ndef mine(request):\n"
                                           "    return newest(request)\n")
    clip = chameleon(2, ChameleonConfig(frames=5, size=32))
    for name in ("frames", "masks"):
        (tmp_path / name).mkdir()
    for t in range(5):
        Image.fromarray(to_pixels(clip.frames[t])).save(tmp_path / "frames" / f"{t:03d}.png")
        write_mask(tmp_path / "masks" / f"{t:03d}.png", 7 * clip.masks[t])
    yield tmp_path
    ZOO.pop("own_rules:mine", None)


def diagnose(capsys, weights, *words):
    return stremn_main(capsys, "diagnose", "--weights", weights, *words)


def test_a_chameleon_clip(work, weights, capsys):
    words = ["--seed", "5", "--policy", "newest", "oracle", "own_rules:mine", "--slots", "3"]
    status, out, err = diagnose(capsys, weights, *words)
    d = diagnose_clip(chameleon(5), load(weights), ("newest", "oracle", "own_rules:mine"), 3)
    assert (status, err) == (0, []) and out == diagnosis_report(d).splitlines()
    assert out[0] == "chameleon-5: 60 frames, 3 slots, true masks"
    rows = {p: [x.removeprefix(p).strip() for x in out if x.startswith(f"{p} ")] for p in ("newest", "own_rules:mine")}
    newest, mine = rows.values()
    assert len(newest) == 2 and newest == mine                                              # the same rule, twice
    assert any("!" in x for x in newest) and any(x.startswith("newest, step ") for x in out)


def test_figures_are_drawn_if_asked_for(work, weights, capsys):
    before = files_below(work)
    status, out, err = diagnose(capsys, weights, "--policy", "oldest", "oracle", "--out", "a/b")
    assert (status, err, out[-1]) == (0, [], "2 timelines in a/b")
    made = set(files_below(work)) - set(before)
    assert made == {"a", "a/b", "a/b/timeline-oldest.png", "a/b/timeline-oracle.png"}
    with Image.open("a/b/timeline-oldest.png") as image:
        assert image.format == "PNG"


def test_a_folder_has_no_script(work, weights, capsys):
    before = files_below(work)
    status, out, err = diagnose(capsys, weights, "--frames", "frames", "--masks", "masks", "--policy", "oldest",
                                "--slots", "3")
    assert (status, err, out[0]) == (0, [], "frames: 5 frames, 3 slots, true masks")
    assert out[3].startswith("oldest") and out[3].endswith("  0, 3, 4") and out[7].split() == ["oldest", "12"]
    assert files_below(work) == before


def test_no_figures_without_matplotlib_but_a_report(work, weights, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    status, out, err = diagnose(capsys, weights, "--policy", "oldest", "--out", "drawn")
    assert (status, len(err)) == (2, 1) and "matplotlib" in err[0] and not Path("drawn").exists()
    assert out[0].startswith("chameleon-1000029: 60 frames")


@pytest.mark.parametrize("words, pieces", [
    (["--frames", "frames"], ["--frames, --masks", "both folders or none"]),
    (["--frames", "frames", "--masks", "masks", "--seed", "3"], ["--seed", "--frames"]),
    (["--frames", "frames", "--masks", "masks", "--policy", "oracle"], ["modes: expected synthetic clips"]),
    (["--frames", "frames", "--masks", "frames/000.png"], ["frames/000.png: expected a folder of masks"]),
    (["--seed", "-1"], ["--seed: expected 0 or more, found -1"]),
    (["--policy", "best"], ["policy: expected one of oldest"]),
    (["--policy", "own_rules:other"], ["expected module:function, found own_rules:other"]),
    (["--slots", "0"], ["slots: expected 1 or more, found 0"]),
    (["--weights", "nothing"], ["nothing"]),
    (["--out", "own_rules.py"], ["own_rules.py: expected a folder to make, found a file"])])
def test_mistakes_are_one_line(work, weights, capsys, words, pieces):
    before = files_below(work)
    status, out, err = diagnose(capsys, weights, *words)
    assert (status, out, len(err)) == (2, [], 1) and all(p in err[0] for p in pieces), err
    assert files_below(work) == before


def test_a_frame_without_a_mask_is_named(work, weights, capsys):
    (work / "masks" / "003.png").unlink()
    status, out, err = diagnose(capsys, weights, "--frames", "frames", "--masks", "masks")
    assert (status, out, len(err)) == (2, [], 1) and "expected a mask for every frame, found none for frame 3" in err[0]
