"""The `stremn` command as a user meets it: what it writes, what it says, and the one line when something is wrong."""
import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import av
import numpy as np
import pytest
import torch
from PIL import Image

import stremn
from helpers import TINY_VOS, files_below, make_davis_2016, make_video_folder, own_rules, stremn_main
from stremn import cli
from stremn.train.loop import Recipe
from stremn.vos import train as vos_train
from stremn.experiments.prediction import NETWORKS
from stremn.experiments.tables import TABLES, stored_records
from stremn.results import Record
from stremn.core import StremnError
from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.data.video import VideoWriter
from stremn.images import PALETTE, read_mask, to_pixels, write_mask
from stremn.memory.rules import RULES, all_rules
from stremn.models.prediction_baselines import WEIGHTLESS

SIZE, FRAMES = 64, 7


@pytest.fixture
def work(tmp_path, monkeypatch, weights) -> Path:
    "A folder to stand in: frames/, first.png and clip.mp4 show the same seven frames with two objects."
    monkeypatch.chdir(tmp_path)
    clip = chameleon(3, ChameleonConfig(frames=FRAMES, size=SIZE, objects=2, modes=2))
    frames = clip.frames[:, :, :48]                                                       # 64 wide, 48 high
    (tmp_path / "frames").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(to_pixels(frame)).save(tmp_path / "frames" / f"{t:04d}.jpg", quality=95)
    labels = clip.masks[:, :48]
    labels[0, 2:6, 2:6], labels[0, 10:14, 2:6] = 1, 7                                     # ids need not be neighbours
    labels[0][labels[0] == 2] = 7
    write_mask(tmp_path / "first.png", labels[0])
    with VideoWriter(tmp_path / "clip.mp4", 12., (48, SIZE)) as out:
        for frame in frames:
            out.write(frame)
    return tmp_path


def segment(capsys, weights, source="frames", *more, mask="first.png", out="masks"):
    words = ["segment", source, "--mask", mask, "--out", out, "--device", "cpu", *more]
    return stremn_main(capsys, *words, *([] if "--weights" in more else ["--weights", weights]))


# ---------------------------------------------------------------- it works
@pytest.mark.parametrize("source", ["frames", "clip.mp4"])
def test_segment_writes_masks_and_overlay(work, weights, capsys, source):
    before = files_below(work)
    status, out, err = segment(capsys, weights, source, "--quiet")
    assert (status, err) == (0, []) and out[0] == "7 masks in masks, objects 1, 7" and "frames 0, " in out[1]
    names = [f"{t:04d}" if source == "frames" else f"{t:05d}" for t in range(FRAMES)]
    assert sorted(p.name for p in (work / "masks").iterdir()) == [*(f"{n}.png" for n in names), "overlay.mp4"]
    for name in names:
        with Image.open(work / "masks" / f"{name}.png") as image:
            assert image.mode == "P" and image.size == (64, 48)
            table = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            assert (table == PALETTE[:len(table)]).all()
        assert set(read_mask(work / "masks" / f"{name}.png").unique().tolist()) <= {0, 1, 7}
    assert torch.equal(read_mask(work / "masks" / f"{names[0]}.png"), read_mask(work / "first.png"))
    with av.open(str(work / "masks" / "overlay.mp4")) as box:
        shown = [f.to_ndarray(format="rgb24").shape for f in box.decode(video=0)]
        assert shown == [(48, 64, 3)] * FRAMES
        assert source == "frames" or box.streams.video[0].average_rate == 12
    assert {k: v for k, v in files_below(work).items() if not k.startswith("masks")} == before


def test_check_mask_says_what_it_sees(work, capsys):
    "Every label with its colour, size and box, the rule, and a mask in the colours of DAVIS to go on with."
    labels = np.zeros((48, 64), int)
    labels[4:24, 10:40], labels[30:40, 50:60] = 1, 2
    colours = np.array([(0, 0, 0), (250, 0, 0), (0, 250, 0)], np.uint8)
    Image.fromarray(colours[labels]).quantize(3).save(work / "m.png")
    status, out, err = stremn_main(capsys, "check-mask", "m.png", "--out", "a/seen.png")
    assert (status, err) == (0, []) and out[0] == "m.png: 64x48 (width x height), 2 objects"
    assert out[1] == ("read as: by colour, which the palette's indices contradict: flat colours numbered as they "
                      "appear; background: black")
    assert [line.split() for line in out[4:6]] == [
        ["1", "(250,", "0,", "0)", "600", "19.5%", "10,", "4,", "30,", "20"],
        ["2", "(0,", "250,", "0)", "100", "3.3%", "50,", "30,", "10,", "10"]]
    assert out[3].split()[0] == "background" and out[-1] == "drawn in a/seen.png"
    assert (read_mask(work / "a" / "seen.png").numpy() == labels).all()


def test_check_mask_draws_over_the_frame(work, capsys):
    status, out, err = stremn_main(capsys, "check-mask", "first.png", "--frame", "frames/0000.jpg", "--out", "seen.png")
    assert (status, err, out[-1]) == (0, [], "drawn in seen.png")
    seen = np.array(Image.open(work / "seen.png")).astype(int)
    frame = np.array(Image.open(work / "frames" / "0000.jpg")).astype(int)
    labels = read_mask(work / "first.png").numpy()
    changed = (seen != frame).any(-1)
    assert seen.shape == (48, 64, 3) and changed[labels > 0].mean() > .95 and changed[labels == 0].mean() < .1


@pytest.mark.parametrize("command", ["check-mask", "segment"])
def test_doubts_about_a_mask_are_lines_on_stderr(work, weights, capsys, command):
    labels = (read_mask(work / "first.png") == 7).numpy()
    Image.fromarray(np.where(labels, 0, 255).astype(np.uint8)).save(work / "inverted.png")
    more = ["frames", "--mask", "inverted.png", "--out", "o", "--weights", weights, "--quiet", "--no-video"]
    words = [command, "inverted.png"] if command == "check-mask" else [command, *more]
    status, out, err = stremn_main(capsys, *words)
    assert status == 0 and out and len(err) == 1 and err[0].startswith("stremn: warning: inverted.png: objects cover")


@pytest.mark.parametrize(("name", "more", "said"), [
    ("frames/0000.jpg", [], "frames/0000.jpg: expected a mask in flat colours"),
    ("none.png", [], "none.png: expected a mask, found no such file"),
    ("black.png", [], "black.png: expected at least one object"),
    ("large.png", [], "large.png: expected ids from 1 to 254, as the masks to write can hold, found 300"),
    ("first.png", ["--frame", "small.jpg"], "first.png: expected a mask of 9x9 (width x height) as small.jpg"),
    ("first.png", ["--out", "seen.jpg"], "--out: expected a name ending in .png"),
    ("first.png", ["--out", "first.png"], "--out: expected another file than those that are read")])
def test_check_mask_refuses_in_one_line(work, capsys, name, more, said):
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(work / "black.png")
    Image.fromarray(300 * (read_mask(work / "first.png") > 0).numpy().astype(np.uint16)).save(work / "large.png")
    Image.new("RGB", (9, 9)).save(work / "small.jpg")
    before = files_below(work)
    status, out, err = stremn_main(capsys, "check-mask", name, *more)
    assert (status, out, len(err)) == (2, [], 1) and err[0].startswith(f"stremn: error: {said}")
    assert files_below(work) == before


def test_options_reach_the_segmenter(work, weights, capsys):
    status, out, _ = segment(capsys, weights, "frames", "--quiet", "--no-video", "--policy", "newest", "--slots", "2")
    assert status == 0 and not (work / "masks" / "overlay.mp4").exists() and "frames 0, 6;" in out[1]
    status, out, _ = segment(capsys, weights, "frames", "--quiet", "--overwrite", "--slots", "all")
    assert status == 0 and "frames 0, 1, 2, 3, 4, 5, 6;" in out[1] and (work / "masks" / "overlay.mp4").exists()
    status, out, _ = segment(capsys, weights, "frames", "--quiet", out="a/b/c")
    assert status == 0 and len(list((work / "a/b/c").glob("*.png"))) == FRAMES


def test_a_rule_of_ones_own_by_module_and_function(work, weights, capsys):
    "It does what a rule of the package does, in both directions; a name alone imports nothing."
    more = ["--quiet", "--no-video", "--slots", "3"]
    with own_rules(work):
        for name in ("my_rules:mine", "newest", "lru"):
            out = name.replace(":", "_")
            status, out, err = segment(capsys, weights, "frames", *more, "--policy", name, out=out)
            assert (status, err) == (0, []) and len(out) == 2
        words = ["predict", "frames", "--weights", "prediction-tiny", "--observe", "4", "--frames", "2", "--no-video"]
        for name in ("my_rules:mine", "newest"):
            out = "p_" + name.replace(":", "_")
            more = ["--out", out, "--policy", name, "--device", "cpu", "--quiet"]
            assert stremn_main(capsys, *words, *more)[::2] == (0, [])
    masks = {n: [p.read_bytes() for p in sorted((work / n).glob("*.png"))] for n in ("my_rules_mine", "newest", "lru")}
    assert masks["my_rules_mine"] == masks["newest"] != masks["lru"]
    predicted = [[p.read_bytes() for p in sorted((work / n).glob("*.png"))] for n in ("p_my_rules_mine", "p_newest")]
    assert predicted[0] == predicted[1] and len(predicted[0]) == 2


def test_the_given_mask_may_lie_among_the_frames(work, weights, capsys):
    (work / "first.png").rename(work / "frames" / "0000_mask.png")
    words = ["segment", "frames", "--mask", "frames/0000_mask.png", "--out", "masks", "--weights", weights, "--quiet"]
    status, out, err = stremn_main(capsys, *words, "--no-video")
    assert (status, err) == (0, []) and out[0] == "no frames, like the mask: 0000_mask.png"
    assert sorted(p.stem for p in (work / "masks").iterdir()) == sorted(p.stem for p in (work / "frames").glob("*.jpg"))


def test_evaluate_segments_what_is_missing_and_scores(work, weights, capsys):
    words = ["evaluate", make_davis_2016(work), "--pred", "pred", "--segment", "--year", "2016", "--weights", weights,
             "--quiet"]
    before = files_below(work / "DAVIS")
    status, out, err = stremn_main(capsys, *words)
    assert (status, err) == (0, []) and out[-1].startswith("2 sequences segmented now, 0 found in pred")
    assert sorted(p.name for p in (work / "pred").iterdir()) == ["one", "scores.csv", "two"]
    assert sorted(p.name for p in (work / "pred" / "one").iterdir()) == [f"{t:05d}.png" for t in range(5)]
    for name in ("one", "two"):                                                           # the truth as a prediction: 1
        for t in range(5):
            truth = work / "DAVIS" / "Annotations" / "480p" / name / f"{t:05d}.png"
            (work / "pred" / name / truth.name).write_bytes(truth.read_bytes())
    status, out, err = stremn_main(capsys, *words)
    assert (status, err) == (0, []) and out[-1].startswith("0 sequences segmented now, 2 found in pred")
    scored = [r for r in csv.DictReader((work / "pred" / "scores.csv").open()) if r["video"] in ("one", "two")]
    assert [(r["video"], float(r["J"]), float(r["F"])) for r in scored] == [("one", 1., 1.), ("two", 1., 1.)]
    assert files_below(work / "DAVIS") == before


def test_data_lists_what_is_there(work, capsys):
    make_davis_2016(work)
    status, out, err = stremn_main(capsys, "data", work)
    assert (status, err) == (0, []) and out[0].startswith("data set")
    assert any(line.split()[:5] == ["DAVIS", "2016", "val", "480p", "2"] for line in out)
    assert sum(line.startswith("get DAVIS 2016: https://") for line in out) == 1
    where = str(work / "DAVIS")
    assert [x for x in out if x.startswith("next: ")] == [
        f"next: stremn evaluate {where} --pred masks --segment --weights vos-small --year 2016"]
    assert max(len(line.replace(str(work), "")) for line in out) <= 120


def test_models_lists_weights(capsys, monkeypatch, tmp_path):
    status, out, err = stremn_main(capsys, "models")
    assert (status, err) == (0, []) and [x.split()[0] for x in out if " weights  " in x] == stremn.available()
    monkeypatch.setattr("stremn.models.hub.FOLDER", tmp_path)
    status, out, _ = stremn_main(capsys, "models")
    assert status == 0 and "stremn train" in out[0]


def test_train_goes_on_and_refuses_another_config(work, capsys, monkeypatch):
    tiny = vos_train.ChameleonTraining()
    stages = tuple(replace(s, batch=1, clip=replace(s.clip, size=16)) for s in tiny.stages)
    small = replace(tiny, model=TINY_VOS, stages=stages)
    monkeypatch.setitem(vos_train.PROTOCOLS, "tiny", lambda: (Recipe("", small),))
    words = ["train", "vos", "--out", "runs/a", "--device", "cpu", "--quiet", "--steps", "1"]
    status, out, err = stremn_main(capsys, *words)
    assert (status, err, out) == (0, [], ["3 steps, finished: weights in runs/a/model.safetensors"])
    before = files_below(work)
    status, out, _ = stremn_main(capsys, *words, "--save-every", "7")
    assert status == 0 and "was finished before" in out[0] and files_below(work) == before
    for other in (["--seed", "1"], ["--steps", "9"]):
        status, out, err = stremn_main(capsys, *words, *other)
        assert (status, out, len(err)) == (2, [], 1) and "last.safetensors" in err[0] and files_below(work) == before


def test_train_on_a_folder_of_ones_own(work, capsys):
    "Three videos: one is held out, scored before and after; the weights segment; the run is found finished."
    for v in "abc":
        make_video_folder(work / "clips" / v / "frames", work / "clips" / v / "masks", n=6)
    words = ["train", "vos", "--data", "clips", "--out", "own", "--start", "vos-tiny", "--steps", "2", "--size", "32",
             "--batch", "1", "--device", "cpu", "--quiet"]
    status, out, err = stremn_main(capsys, *words)
    assert (status, err) == (0, []) and out[:3] == [
        "clips: videos: 3, frames with masks: 18, objects: 6, sizes: 16x12", "held out: c",
        "2 steps, finished: weights in own/model.safetensors"]
    assert [x.partition(": J&F")[0] for x in out[3:]] == [
        "held-out videos, vos-tiny", "held-out videos, own/model.safetensors"]
    card = stremn.load("own/model.safetensors").card["config"]["task"]
    assert (card["protocol"], card["videos"], card["held"]) == ("own", ["own"], ["c"])
    again = stremn_main(capsys, *words)[1]
    assert again[2] == "2 steps, was finished before: weights in own/model.safetensors" and again[3:] == out[3:]
    status, out, err = stremn_main(capsys, "segment", "clips/c/frames", "--mask", "clips/c/masks/00000.png", "--out",
                                   "m", "--weights", "own/model.safetensors", "--quiet", "--no-video")
    assert (status, err, out[0]) == (0, [], "6 masks in m, objects 1, 2")


def test_reproduce_ends_in_a_report(work, capsys):
    "From the shipped weights, one row, and its number is the stored one."
    status, out, _ = stremn_main(capsys, "reproduce", "--out", "again", "--rows", "first_last", "--quiet")
    assert status == 0 and "report.md" in out[-1]
    assert {p.name for p in (work / "again").iterdir()} == {"report.md", "t1-swapped.png", "records"}
    found = Record.load(work / "again" / "records" / "t1-swapped" / "first_last-s0.json")
    stored = Record.load(stored_records() / "t1-swapped" / "first_last-s0.json")
    assert found.clips["J"] == pytest.approx(stored.clips["J"], abs=2e-3)     # other threads, other rounding
    assert "| first_last |" in (work / "again" / "report.md").read_text()


def test_every_table_is_known_by_name():
    "The command line lists them itself: it knows no study before it runs one."
    (names,) = get_args(get_type_hints(cli.Table, include_extras=True)["name"])[:1]
    assert list(get_args(names)) == list(TABLES)


def test_table_prints_what_is_stored_and_says_what_is_not(work, capsys):
    "No training in this test: the studies' records are made by hand."
    for name, values in {"oldest": (.5, .6), "learned": (.6, .7)}.items():
        for study in ("t1-swapped", "t1-retrained"):
            Record(name, {"J": sum(values) / 2}, {"protocol": "tiny"}, 0, 1., {"J": dict(zip("ab", values))}).save(
                work / "records" / study)
    status, out, err = stremn_main(capsys, "table", "1", "--out", "records")
    assert (status, err) == (0, []) and sum(line.split()[:3] == ["learned", "74.8", "0.650"] for line in out) == 2
    assert any("t1-retrained" in line for line in out)
    status, out, err = stremn_main(capsys, "table", "1", "--out", "records", "--markdown")
    assert (status, err) == (0, []) and sum("| learned | 0.650 |" in line for line in out) == 2


# ---------------------------------------------------------------- it explains itself
@pytest.mark.parametrize("command", ["segment", "predict", "evaluate", "train", "data", "models", "table",
                                     "reproduce"])
def test_help_of_every_command(capsys, command):
    status, out, _ = stremn_main(capsys, command, "--help")
    text = " ".join(" ".join(out).replace("│", " ").split())
    assert status == 0 and f"usage: stremn {command}" in text
    assert "{None}" not in text and "--no-quiet" not in text
    if command == "predict":
        assert all(name in text for name in WEIGHTLESS)
    if command == "train":
        assert all(name in text for name in NETWORKS) and get_args(cli.Predictor) == tuple(NETWORKS)
    if command in ("segment", "evaluate"):
        for names in ([*RULES], [n for n in all_rules() if n not in RULES and ":" not in n]):
            assert ", ".join(names[:-1]) + f" or {names[-1]}" in text                     # the lists cannot go stale


def test_version_and_no_words(capsys):
    assert stremn_main(capsys, "--version") == (0, [f"stremn {stremn.__version__}"], [])
    status, out, err = stremn_main(capsys)
    assert (status, out) == (2, []) and any("segment" in line for line in err)
    assert stremn_main(capsys, "segment", "frames")[0] == 2 and stremn_main(capsys, "fly")[0] == 2


def test_doctor(capsys, monkeypatch, tmp_path):
    status, out, err = stremn_main(capsys, "doctor")
    assert (status, err) == (0, []) and out[-1].split()[:2] == ["segmenting", "works:"]
    monkeypatch.setattr("stremn.doctor.FOLDER", tmp_path)
    monkeypatch.setattr("stremn.models.hub.FOLDER", tmp_path)
    status, out, err = stremn_main(capsys, "doctor")
    assert (status, err) == (1, []) and "does not work" in out[-1] and "vos-tiny" in out[-1]


# ---------------------------------------------------------------- slips of the fingers
@pytest.mark.parametrize(("line", "said"), [
    ("segmnt a", "command: expected one of segment, ... found segmnt; did you mean segment?"),
    ("evalute a", "command: expected one of segment, ... found evalute; did you mean evaluate?"),
    ("fly", "command: expected one of segment, ... found fly"),
    ("--vrsion", "command: expected one of segment, ... found --vrsion; did you mean --version?"),
    ("segment a --mask b --out c --polcy x", "segment: ... found --polcy; did you mean --policy?"),
    ("segment --polic=oldest a --mask b --out c", "segment: ... found --polic; did you mean --policy?"),
    ("evaluate a --pred b --al-frames", "evaluate: ... found --al-frames; did you mean --all-frames?"),
    ("train vos --out r --stps 3", "train: ... found --stps; did you mean --steps?"),
    ("table 1 --makdown", "table: ... found --makdown; did you mean --markdown?"),
    ("segment a --mask b --out c --device cud",
     "--device: expected one of auto, cpu, cuda, found cud; did you mean cuda?"),
    ("train voss --out r", "train: expected one of vos, prediction, found voss; did you mean vos?"),
    ("train vos --out r --protocol papr", "--protocol: ... found papr; did you mean paper?"),
    ("train prediction --out r --network simv", "--network: ... found simv; did you mean simvp?"),
    ("bench mem", "bench: expected one of cost, memory, found mem; did you mean memory?"),
    ("table fogetting", "table: ... found fogetting; did you mean forgetting?"),
    ("bench memory --levels esy", "level: expected one of easy, medium, hard, found 'esy'; did you mean easy?"),
    ("diagnose --policy oldst", "policy: ... found 'oldst'; did you mean oldest?"),
    ("segment a --mask b --out c --weights vos-smal", "weights: ... found 'vos-smal'; did you mean vos-small?"),
    ("train vos --out r --steps many", "--steps: expected a whole number, found many"),
    ("bench memory --clips x", "--clips: expected a whole number, found x"),
    ("segment a --mask b --out c --max-distance far", "--max-distance: expected a number, found far"),
    ("segment a --mask", "--mask: expected a value, found none"),
    ("segment", "segment: expected --out PATH, found none"),
    ("segment a --mask c", "segment: expected --out PATH, found none"),
    ("segment a b --mask c --out d", "segment: expected no further word, found b"),
    ("data --quiet", "data: ... found --quiet")])
def test_a_slip_is_one_line_and_the_nearest_name(tmp_path, monkeypatch, capsys, line, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = stremn_main(capsys, *line.split())
    assert (status, out, len(err)) == (2, [], 1), (status, out, err)
    first, *rest = said.split("...")
    assert err[0].startswith("stremn: error: " + first)
    assert not rest or err[0].endswith(rest[0]) and ("did you mean" in said) == ("did you mean" in err[0])
    assert rest or err[0] == "stremn: error: " + said
    assert not list(tmp_path.iterdir())


def test_the_nearest_name_of_a_list():
    assert cli.did_you_mean("x: expected one of oldest, newest, found 'oldst'").endswith("; did you mean oldest?")
    for line in ("x: expected one of oldest, newest, found 'zebra'", "x: expected a folder, found a file", "stopped"):
        assert cli.did_you_mean(line) == line


def test_what_tyro_says_in_other_words_is_still_one_line():
    "Its wording is not promised: a box that nobody knows is printed without its frame."
    framed = "╭─ New ───────╮\n│ this is new │\n│ and goes on │\n│ ─────────── │\n│ For help,   │\n╰─────────────╯\n"
    plain = " New           \n ------------- \n  this is new  \n  and goes on  \n  -------------\n  For help,    \n"
    for box in (framed, plain):                                                           # as the terminal can
        assert cli.usage_line(["data", "x"], box) == "this is new and goes on"


# ---------------------------------------------------------------- bad input
def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def spoil(work: Path, case: str) -> dict:
    "Make one thing wrong; the arguments of `segment` that meet it, and pieces of the line to expect."
    first = read_mask(work / "first.png")
    if case == "missing folder":
        return dict(source="nowhere", pieces=["nowhere"])
    if case == "empty folder":
        (work / "empty").mkdir()
        return dict(source="empty", pieces=["empty", "no images"])
    if case == "missing mask":
        return dict(mask="nowhere.png", pieces=["nowhere.png"])
    if case == "mask of another size":
        write_mask(work / "first.png", first[:-1])
        return dict(pieces=["first.png", "64x48", "64x47"])
    if case == "mask with no object":
        write_mask(work / "first.png", first * 0)
        return dict(pieces=["first.png", "at least one object"])
    if case == "truncated jpg":
        cut(work / "frames" / "0000.jpg", .5)
        return dict(pieces=["0000.jpg", "truncated"])
    if case == "truncated mask":
        cut(work / "first.png", .5)
        return dict(pieces=["first.png", "truncated"])
    if case == "truncated mp4":
        cut(work / "clip.mp4", .6)
        return dict(source="clip.mp4", pieces=["clip.mp4", "expected"])
    if case == "text as video":
        (work / "clip.mp4").write_text("this is not a film\n" * 50)
        return dict(source="clip.mp4", pieces=["clip.mp4", "expected a video file"])
    if case == "image as video":
        return dict(source="frames/0000.jpg", pieces=["0000.jpg", "single image"])
    if case == "frame of another size":
        Image.new("RGB", (64, 40)).save(work / "frames" / "0005.jpg")
        return dict(pieces=["0005.jpg", "64x48", "64x40"])
    if case == "K = 0":
        return dict(more=["--slots", "0"], pieces=["--slots", "'0'"])
    if case == "K in words":
        return dict(more=["--slots", "four"], pieces=["--slots", "'four'"])
    if case == "unknown policy":
        return dict(more=["--policy", "best"], pieces=["'best'", "most_similar"])
    if case == "policy of no module":
        return dict(more=["--policy", "no_rules:mine"], pieces=["module:function", "no_rules:mine"])
    if case == "unknown weights":
        return dict(more=["--weights", "vos-giant"], pieces=["vos-giant"])
    if case == "weights of something else":
        (work / "w.safetensors").write_bytes(b"nothing of the kind")
        return dict(more=["--weights", "w.safetensors"], pieces=["w.safetensors"])
    if case == "out holds a result":
        (work / "masks").mkdir()
        (work / "masks" / "0000.png").write_text("mine")
        return dict(pieces=["masks", "found 0000.png (--overwrite"])
    if case == "out is a film":
        return dict(out="new.mp4", pieces=["--out: expected a folder, found new.mp4", "--out new,"])
    if case == "out is a file":
        (work / "masks").write_text("mine")
        return dict(pieces=["masks", "found a file"])
    if case == "out below a file":
        return dict(out="first.png/masks", pieces=["first.png"])
    raise KeyError(case)


CASES = ["missing folder", "empty folder", "missing mask", "mask of another size", "mask with no object",
         "truncated jpg", "truncated mask", "truncated mp4", "text as video", "image as video",
         "frame of another size", "K = 0", "K in words", "unknown policy", "policy of no module", "unknown weights",
         "weights of something else"]
FOLDERS = ["out holds a result", "out is a film", "out is a file", "out below a file"]


@pytest.mark.parametrize(("case", "deep"), [*((c, d) for c in CASES for d in (False, True)),
                                            *((c, False) for c in FOLDERS)])
def test_bad_input_gives_one_line_and_leaves_nothing(work, weights, capsys, case, deep):
    plan = spoil(work, case)
    plan.setdefault("out", "new/masks" if deep else "masks")
    before = files_below(work)
    words = ["--quiet", *plan.get("more", [])]
    source, mask = plan.get("source", "frames"), plan.get("mask", "first.png")
    status, out, err = segment(capsys, weights, source, *words, mask=mask, out=plan["out"])
    assert (status, out, len(err)) == (2, [], 1), (status, out, err)
    assert err[0].startswith("stremn: error: ") and all(p in err[0] for p in plan["pieces"]), err[0]
    assert files_below(work) == before


def test_a_late_fault_keeps_masks_says_so_and_can_be_mended(work, weights, capsys):
    "A damaged frame in the middle: the masks before it are there, and once it is mended the run goes on."
    good = (work / "frames" / "0004.jpg").read_bytes()
    cut(work / "frames" / "0004.jpg", .5)
    status, out, err = segment(capsys, weights, "frames", "--quiet", mask="first.png", out="masks")
    assert (status, out, len(err)) == (2, [], 1)
    assert "0004.jpg" in err[0] and err[0].endswith("4 masks are in masks; --resume goes on")
    (work / "frames" / "0004.jpg").write_bytes(good)
    status, out, err = segment(capsys, weights, "frames", "--quiet", "--resume", mask="first.png", out="masks")
    assert (status, err) == (0, []) and out[0].startswith("7 masks in masks")
    status, *_ = segment(capsys, weights, "frames", "--quiet", mask="first.png", out="whole")
    assert files_below(work / "masks") == files_below(work / "whole")


def test_a_video_without_its_end_keeps_its_masks(work, weights, capsys):
    cut(work / "clip.mp4", .99)
    status, out, err = segment(capsys, weights, "clip.mp4", "--quiet", mask="first.png", out="masks")
    assert (status, len(err)) == (2, 1) and "masks are in masks; --resume goes on" in err[0]
    assert len(list((work / "masks").glob("*.png"))) == int(err[0].split(" masks are in")[0].split()[-1])


def test_the_line_is_a_line_of_its_own_after_a_progress_bar(work, weights, capsys):
    cut(work / "frames" / "0004.jpg", .5)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["segment", "frames", "--mask", "first.png", "--out", "masks", "--weights", str(weights)])
    err = capsys.readouterr().err
    assert "frame/s" in err and err.splitlines()[-1].startswith("stremn: error: ") and err.count("stremn: error") == 1


@pytest.mark.parametrize(("words", "pieces"), [
    (["evaluate", "nowhere", "--pred", "p"], ["nowhere", "DAVIS"]),
    (["evaluate", "frames", "--pred", "p"], ["frames"]),
    (["evaluate", "DAVIS", "--pred", "first.png", "--year", "2016"], ["first.png", "found a file"]),
    (["evaluate", "DAVIS", "--pred", "p", "--year", "2016", "--split", "test"], ["test"]),
    (["evaluate", "DAVIS", "--pred", "p", "--segment", "--year", "2016", "--weights", "vos-giant"], ["vos-giant"]),
    (["data", "nowhere"], ["nowhere"]),
    (["train", "vos", "--out", "first.png"], ["first.png", "folder to write to"]),
    (["train", "vos", "--out", "first.png/run"], ["first.png", "folder to write to"]),
    (["train", "vos", "--out", "run", "--data", "."], ["<video>/frames + <video>/masks", "one video"]),
    (["train", "vos", "--out", "run", "--steps", "0"], ["--steps", "0"]),
    (["train", "vos", "--out", "run", "--seed", "-1"], ["seed", "-1"]),
    (["train", "vos", "--out", "run", "--parts", "long"], ["--parts", "none for a protocol of one run", "long"]),
    (["train", "vos", "--out", "run", "--protocol", "paper", "--parts", "x"], ["--parts", "stills, videos", "x"]),
    (["train", "vos", "--out", "run", "--save-every", "0"], ["save_every", "0"]),
    (["train", "vos", "--out", "run", "--precision", "fp16", "--device", "cpu"], ["fp16"]),
    (["table", "2", "--out", "nowhere"], ["nowhere", "--run"]),
    (["table", "2", "--seeds", "0"], ["--seeds", "0"]),
    (["reproduce", "--rows", "nobody"], ["nobody", "oldest"]),
    (["reproduce", "--out", "first.png"], ["first.png"])])
def test_other_commands_refuse_in_one_line(work, capsys, words, pieces):
    make_davis_2016(work)
    before = files_below(work)
    status, out, err = stremn_main(capsys, *words, "--quiet") if words[0] != "data" else stremn_main(capsys, *words)
    assert (status, out, len(err)) == (2, [], 1), (status, out, err)
    assert err[0].startswith("stremn: error: ") and all(p in err[0] for p in pieces), err[0]
    assert files_below(work) == before


def test_a_sequence_without_objects_is_named(work, weights, capsys):
    mask = make_davis_2016(work) / "Annotations" / "480p" / "one" / "00000.png"
    write_mask(mask, read_mask(mask) * 0)
    before = files_below(work)
    words = ["evaluate", "DAVIS", "--pred", "pred", "--segment", "--year", "2016", "--weights", weights,
             "--quiet"]
    status, out, err = stremn_main(capsys, *words)
    assert (status, out, len(err)) == (2, [], 1) and "one" in err[0] and "at least one object" in err[0]
    assert files_below(work) == before


@pytest.mark.parametrize(("error", "status", "line"), [
    (StremnError("file: expected\n  this,\tfound that"), 2, "stremn: error: file: expected this, found that"),
    (PermissionError(13, "Permission denied", "there"), 2, "stremn: error: there: Permission denied"),
    (KeyboardInterrupt(), 130, "stremn: interrupted")])
def test_exit_statuses(monkeypatch, capsys, tmp_path, error, status, line):
    def fail(self):
        raise error
    monkeypatch.setattr(cli.Data, "run", fail)
    assert stremn_main(capsys, "data", tmp_path) == (status, [], [line])


def test_bugs_are_not_hidden(monkeypatch, tmp_path):
    "Only what the user can put right becomes a line; anything else keeps its traceback."
    def fail(self):
        raise ZeroDivisionError
    monkeypatch.setattr(cli.Data, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["data", str(tmp_path)])


# ---------------------------------------------------------------- from a real shell
def test_from_a_shell(work, weights):
    program = Path(sys.executable).with_name("stremn")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [program, "segment", "frames", "--mask", "first.png", "--out", "masks", "--weights", weights, "--quiet"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and len(list((work / "masks").glob("*.png"))) == FRAMES
    before = files_below(work)
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "") and files_below(work) == before
    assert done.stderr.startswith("stremn: error: masks: ") and done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_error():
    "`stremn data | head -1`: the reader goes away, nothing is said."
    code = "from stremn import cli; cli.Data.run = lambda self: print('x' * 10**6); cli.main(['data'])"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(300) == 141


def test_the_pipe_of_a_help_may_be_closed():
    child = subprocess.Popen([sys.executable, "-c", "from stremn import cli; cli.main(['segment', '--help'])"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert b"Traceback" not in child.stderr.read() and child.wait(300) in (141, 0)


def test_help_does_not_wait_for_torch():
    code = ("import sys\nfrom stremn import cli\ntry: cli.main(['train', '--help'])\n"
            "except SystemExit: sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300).returncode == 0


# ---------------------------------------------------------------- prediction
def test_predict_goes_on_where_frames_end(work, capsys):
    words = ["predict", "frames", "--weights", "copy", "--observe", "3", "--size", "16", "--device", "cpu", "--quiet"]
    status, out, err = stremn_main(capsys, *words, "--frames", "2", "--out", "a", "--no-video")
    assert (status, err) == (0, []) and "2 predicted after 3 seen" in out[0]
    assert len(list((work / "a").glob("*.png"))) == 2 and (work / "a/metrics.csv").is_file()
    before = files_below(work)
    for more, piece in {("--slots", "3"): "slots", ("--slots", "few"): "--slots", ("--weights", "nobody"): "nobody",
                        ("--frames", "0"): "frames", ("--start-frame", "99"): "frames"}.items():
        status, out, err = stremn_main(capsys, *words, "--out", "b", *more)
        assert (status, out, len(err)) == (2, [], 1) and piece in err[0] and files_below(work) == before


def test_train_prediction_goes_on(work, capsys, monkeypatch):
    from stremn.experiments import prediction as contest
    from stremn.prediction import train as forecasting
    lesson = contest.RECIPES["tiny"]
    clip = replace(lesson.training.clip, size=16)
    stages = (forecasting.PredictionPhase(4, 1, 2),)
    model = contest.ConvLSTMConfig(hidden=4, layers=1)
    monkeypatch.setitem(contest.NETWORKS, "convlstm", contest.Network(model, 1.))
    training = replace(lesson.training, clip=clip, stages=stages, observed=3)
    monkeypatch.setitem(contest.RECIPES, "tiny", replace(lesson, training=training))
    words = ["train", "prediction", "--network", "convlstm", "--out", "run", "--steps", "2", "--device", "cpu",
             "--quiet"]
    status, out, err = stremn_main(capsys, *words)
    assert (status, err, out) == (0, [], ["2 steps, finished: weights in run/averaged.safetensors"])
    status, out, err = stremn_main(capsys, *words)
    assert status == 0 and "was finished before" in out[0]
    status, out, err = stremn_main(capsys, *words, "--dry-run", "--batch", "2")
    assert (status, len(out)) == (0, 1) and "multiply-adds" in out[0]
    before = files_below(work)
    for more, piece in {("--protocol", "paper"): "--protocol: expected tiny, small, kth", ("--start", "x"): "--start",
                        ("--parts", "soft"): "--parts: expected none for prediction, found soft",
                        ("--seed", "1"): "last.safetensors", ("--protocol", "small", "--data", "none"): "none"}.items():
        status, out, err = stremn_main(capsys, *words, *more)
        assert (status, out, len(err)) == (2, [], 1) and piece in err[0] and files_below(work) == before, err
    status, out, err = stremn_main(capsys, "train", "vos", "--out", "v", "--network", "simvp")
    assert (status, len(err)) == (2, 1) and "--network" in err[0]
    status, out, err = stremn_main(capsys, "train", "vos", "--out", "v", "--protocol", "kth")
    assert (status, len(err)) == (2, 1) and "--protocol: expected tiny, small, paper" in err[0]


def test_a_mask_is_not_deleted_by_what_it_starts(work, weights, capsys):
    (work / "o").mkdir()
    (work / "o/first.png").write_bytes((work / "first.png").read_bytes())
    before = files_below(work)
    status, _, err = segment(capsys, weights, "frames", "--overwrite", mask="o/first.png", out="o")
    assert status == 2 and "another folder than that of the mask" in err[0] and files_below(work) == before


def test_paths_that_the_terminal_cannot_show_are_written_otherwise(work):
    words = ["segment", "frames", "--mask", "first.png", "--out", "帧", "--quiet", "--weights", "vos-tiny"]
    script = Path(sys.executable).with_name("stremn")
    done = subprocess.run([script, *words], capture_output=True, text=True, cwd=work,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and "masks in \\u5e27" in done.stdout
    assert len(list((work / "帧").glob("*.png"))) == FRAMES


def test_a_network_of_the_other_task_is_named(work, capsys):
    words = ["segment", "frames", "--mask", "first.png", "--out", "o", "--weights", "prediction-tiny"]
    status, _, err = stremn_main(capsys, *words)
    assert status == 2 and "expected a network that segments, found prediction-tiny" in err[0] and len(err) == 1


def test_verbose_shows_where_an_error_arose(work, capsys):
    words = ["segment", "nowhere", "--mask", "first.png", "--out", "o"]
    plain = stremn_main(capsys, *words)
    status, out, err = stremn_main(capsys, *words, "--verbose")
    assert (status, out) == (2, []) == plain[:2] and err[-1] == plain[2][0]
    assert err[0].startswith("Traceback") and any("open_source" in line for line in err)
