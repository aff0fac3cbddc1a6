"""`stremn evaluate` on every split the paper tests on, and several looks at a frame, as a user meets them."""
import csv
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import files_below, make_davis_2016, stremn_main
from stremn import cli
from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.images import PALETTE, read_mask, to_pixels, write_mask
from stremn.vos.stream import VideoSegmenter

LAST, ENTERS = 6, {1: 0, 2: 3}  # every third frame is asked for; object 2 comes late
NAMES = [f"{t:05d}" for t in range(LAST + 1)]


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    "An empty folder to stand in."
    monkeypatch.chdir(tmp_path)
    return tmp_path


def youtube(work: Path, public: bool, kinds=("dog", "yeti")) -> Path:
    "A YouTube-VOS tree: two videos of two objects, at 6 and at 30 frames a second; training knows dogs."
    root, meta = work / "yt", {}
    for n, name in enumerate("ab"):
        clip = chameleon(n, ChameleonConfig(frames=LAST + 1, size=32, objects=2, vanish=0.))
        for t, (frame, mask) in enumerate(zip(clip.frames, clip.masks)):
            for split in ["valid_all_frames", "valid"][:2 - (t % 3 > 0)]:
                (root / split / "JPEGImages" / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(to_pixels(frame)).save(root / split / "JPEGImages" / name / f"{NAMES[t]}.jpg")
            here = [i for i, e in ENTERS.items() if e <= t if public or e == t]
            if here and t % 3 == 0:
                shown = torch.where(torch.isin(mask, torch.tensor(here)), mask, 0)
                write_mask(root / "valid" / "Annotations" / name / f"{NAMES[t]}.png", shown)
        meta[name] = {"objects": {str(i): {"frames": NAMES[e::3]} | ({"category": kinds[i - 1]} if kinds else {})
                                  for i, e in ENTERS.items()}}
    (root / "train").mkdir()
    (root / "valid" / "meta.json").write_text(json.dumps({"videos": meta}))
    train = {"t": {"objects": {"1": {"frames": ["0"], "category": "dog"}}}}
    (root / "train" / "meta.json").write_text(json.dumps({"videos": train}))
    return root


def evaluate(capsys, weights, root, *more):
    "Segment what is missing, and score."
    return stremn_main(capsys, "evaluate", root, "--pred", "pred", "--segment", "--weights", weights, "--quiet", *more)


# ---------------------------------------------------------------- YouTube-VOS
@pytest.mark.parametrize("year", ["2018", "2019"])
def test_youtube_with_the_truth_is_scored_by_seen_and_unseen(work, weights, capsys, year):
    root = youtube(work, public=True)
    before = files_below(root)
    status, out, err = evaluate(capsys, weights, root, "--year", year)
    assert (status, err) == (0, []) and out[-1].startswith("2 videos segmented now, 0 found in pred; scores in")
    assert [line.split("|")[1].strip() for line in out[2:5]] == ["seen", "unseen", "overall"]
    assert sorted(p.name for p in (work / "pred" / "a").iterdir()) == [f"{n}.png" for n in NAMES[::3]]
    for name in "ab":                                                                  # object 2 is told at frame 3
        maps = {n: read_mask(work / "pred" / name / f"{n}.png") for n in NAMES[::3]}
        told = read_mask(root / "valid" / "Annotations" / name / f"{NAMES[3]}.png") == 2
        assert 2 not in maps[NAMES[0]] and told.any() and (maps[NAMES[3]][told] == 2).all()
        for n in NAMES[::3]:
            write_mask(work / "pred" / name / f"{n}.png", read_mask(root / "valid" / "Annotations" / name / f"{n}.png"))
    status, out, err = evaluate(capsys, weights, root, "--year", year, "--all-frames")
    assert (status, err) == (0, []) and out[-1].startswith("0 videos segmented now, 2 found in pred")
    assert "| overall | 4 | 1.000 |" in " ".join(out)
    rows = list(csv.DictReader((work / "pred" / "scores.csv").open()))
    assert [(r["object"], r["group"], float(r["J"])) for r in rows] == [("1", "seen", 1.), ("2", "unseen", 1.)] * 2
    assert files_below(root) == before


def test_youtube_without_the_truth_is_packed_for_the_server(work, weights, capsys):
    root = youtube(work, public=False, kinds=None)
    words = ["--year", "2018", "--split", "valid", "--all-frames", "--zip", "out/v.zip"]
    status, out, err = evaluate(capsys, weights, root, *words)
    assert (status, err, len(out)) == (0, [], 2) and out[0].endswith("2 videos segmented now, 0 found in pred; "
                                                                      "packed in out/v.zip")
    assert "not scored" in out[1] and "hand in out/v.zip (https://youtube-vos.org)" in out[1]
    assert sorted(p.name for p in (work / "pred").iterdir()) == ["a", "b"]
    assert sorted(p.name for p in (work / "pred" / "a").iterdir()) == [f"{n}.png" for n in NAMES]
    with zipfile.ZipFile(work / "out" / "v.zip") as z:
        assert z.namelist() == [f"Annotations/{v}/{n}.png" for v in "ab" for n in NAMES[::3]]
        with Image.open(z.open("Annotations/a/00003.png")) as image:
            assert image.mode == "P" and image.getpalette()[:768] == PALETTE.ravel().tolist()
    status, out, err = evaluate(capsys, weights, root, "--year", "2018")
    assert (status, err) == (0, []) and "0 videos segmented now, 2 found" in out[0] and "--zip FILE" in out[1]


def test_what_is_seen_has_to_be_known_before_anything_is_segmented(work, weights, capsys):
    root = youtube(work, public=True, kinds=None)
    refusals = [["meta.json", "expected a category for every object"]]
    for pieces in refusals:
        status, out, err = evaluate(capsys, weights, root, "--year", "2019")
        assert (status, out, len(err)) == (2, [], 1) and all(p in err[0] for p in pieces), err
    (root / "train" / "meta.json").unlink()
    status, out, err = evaluate(capsys, weights, root, "--year", "2019")
    assert (status, out, len(err)) == (2, [], 1) and "train/meta.json" in err[0] and "seen in training" in err[0]
    assert not (work / "pred").exists()


def test_a_damaged_truth_is_not_taken_for_a_hidden_one(work, weights, capsys):
    root = youtube(work, public=True)
    (root / "valid" / "Annotations" / "a" / f"{NAMES[6]}.png").unlink()
    status, out, err = evaluate(capsys, weights, root, "--year", "2018")
    assert (status, out, len(err)) == (2, [], 1) and "Annotations/a" in err[0] and NAMES[6] in err[0]


# ---------------------------------------------------------------- DAVIS
def test_hidden_files_do_not_make_a_truth(work):
    root = make_davis_2016(work)
    for name in ("one", "two"):
        folder = root / "Annotations" / "480p" / name
        for t in range(1, 5):
            (folder / f"{t:05d}.png").unlink()
        (folder / "._00000.png").write_bytes(b"x")
        (folder / "00000.png").rename(folder / "00000.PNG")
    data = cli.open_split(root, 2016, "val", "480p", False, False)
    assert cli.only_given(data)
    write_mask(folder / "00001.png", read_mask(folder / "00000.PNG"))
    assert not cli.only_given(data)


def test_test_dev_is_segmented_and_packed(work, weights, capsys):
    root = make_davis_2016(work)
    (root / "ImageSets" / "2017").mkdir()
    (root / "ImageSets" / "2017" / "test-dev.txt").write_text("one\ntwo\n")
    for name in ("one", "two"):
        for t in range(1, 5):
            (root / "Annotations" / "480p" / name / f"{t:05d}.png").unlink()
    status, out, err = evaluate(capsys, weights, root, "--split", "test-dev", "--zip", "t.zip")
    assert (status, err) == (0, []) and out[0] == "2 sequences segmented now, 0 found in pred; packed in t.zip"
    assert "hand in t.zip (https://davischallenge.org)" in out[1] and not (work / "pred" / "scores.csv").exists()
    with zipfile.ZipFile(work / "t.zip") as z:
        assert z.namelist() == [f"{v}/{t:05d}.png" for v in ("one", "two") for t in range(5)]
        for name in z.namelist():
            assert set(read_mask(Path(z.extract(name, work / "unpacked"))).unique().tolist()) <= {0, 1}


def test_a_public_split_is_scored_and_packed(work, weights, capsys):
    status, out, err = evaluate(capsys, weights, make_davis_2016(work), "--year", "2016", "--zip", "v.zip")
    assert (status, err) == (0, []) and "packed in v.zip; scores in pred/scores.csv" in out[-1]
    assert (work / "v.zip").is_file() and "| one | 1 |" in " ".join(out)


def test_weights_are_read_once_and_only_if_something_is_missing(work, weights, capsys, monkeypatch):
    made, own = [], cli.SegmentOptions.segmenter
    monkeypatch.setattr(cli.SegmentOptions, "segmenter", lambda self: made.append(1) or own(self))
    root = make_davis_2016(work)
    assert evaluate(capsys, weights, root, "--year", "2016", "--policy", "random")[0] == 0 and made == [1]
    fresh = own(cli.parse(["segment", "x", "--mask", "y", "--out", "z", "--policy", "random", "--weights",
                            str(weights)]))
    for t in range(5):                                               # the second sequence: nothing of the first is left
        mask = read_mask(root / "Annotations" / "480p" / "two" / "00000.png") if t == 0 else None
        frame = Image.open(root / "JPEGImages" / "480p" / "two" / f"{t:05d}.jpg")
        assert torch.equal(fresh.step(frame, mask), read_mask(work / "pred" / "two" / f"{t:05d}.png"))
    assert evaluate(capsys, "no-such-weights", root, "--year", "2016")[0] == 0 and made == [1]


def results_of(work: Path, root: Path) -> Path:
    "The truth as a perfect result."
    shutil.copytree(root / "Annotations" / "480p", work / "pred")
    return work / "pred"


def test_results_are_scored_and_none_is_invented(work, capsys, monkeypatch):
    monkeypatch.setattr(cli.SegmentOptions, "segmenter", lambda self: pytest.fail("nobody asked for a network"))
    root = make_davis_2016(work)
    pred = results_of(work, root)
    words = ["evaluate", root, "--pred", "pred", "--year", "2016", "--quiet"]
    status, out, err = stremn_main(capsys, *words)
    assert (status, err) == (0, []) and out[-1] == "2 sequences found in pred; scores in pred/scores.csv"
    assert "| one | 1 | 3 | 1.000 | 1.000 | 1.000 |" in " ".join(out)
    shutil.rmtree(pred / "two")
    before = files_below(work)
    status, out, err = stremn_main(capsys, *words)
    assert files_below(work) == before                                         # nothing was segmented
    assert (status, out, len(err)) == (2, [], 1)
    assert "pred: expected masks of all 2 videos, found none of 1, two; in pred: one" in err[0]
    (pred / "two").mkdir()                                                     # an empty folder is no result
    assert "found none of 1, two" in stremn_main(capsys, *words)[2][0] and not any((pred / "two").iterdir())


def test_scores_are_printed_even_where_their_file_cannot_be_written(work, capsys):
    root = make_davis_2016(work)
    (results_of(work, root) / "scores.csv").mkdir()                            # as a folder without the right to write
    status, out, err = stremn_main(capsys, "evaluate", root, "--pred", "pred", "--year", "2016", "--quiet")
    assert (status, err) == (0, []) and "| one | 1 | 3 | 1.000 | 1.000 | 1.000 |" in " ".join(out)
    assert out[-1] == "2 sequences found in pred; scores above, not in pred/scores.csv: Is a directory"


@pytest.mark.parametrize(("pred", "pieces"), [
    ("perd", ["perd: expected a folder of masks, found no such folder", "--segment makes what is missing"]),
    ("empty", ["found none of 2, one, two; in empty: empty", "--segment"]),
    ("deep", ["found none of 2, one, two; in deep: 480p", "--segment"]),
    ("deep/480p/one/00000.png", ["found a file"])])
def test_results_in_another_place_are_asked_for(work, capsys, pred, pieces):
    root = make_davis_2016(work)
    (work / "empty").mkdir()
    (work / "deep").mkdir()
    results_of(work, root).rename(work / "deep" / "480p")
    before = files_below(work)
    status, out, err = stremn_main(capsys, "evaluate", root, "--pred", pred, "--year", "2016", "--quiet")
    assert (status, out, len(err)) == (2, [], 1) and all(p in err[0] for p in pieces), err
    assert files_below(work) == before


def test_results_of_youtube_are_not_invented_either(work, capsys):
    root = youtube(work, public=True)
    shutil.copytree(root / "valid" / "Annotations" / "a", work / "pred" / "a")
    words = ["evaluate", root, "--pred", "pred", "--year", "2018", "--quiet"]
    status, out, err = stremn_main(capsys, *words)
    assert (status, out) == (2, []) and "expected masks of all 2 videos, found none of 1, b" in err[0]
    shutil.copytree(root / "valid" / "Annotations" / "b", work / "pred" / "b")
    status, out, err = stremn_main(capsys, *words)
    assert (status, err) == (0, []) and "| overall | 4 | 1.000 |" in " ".join(out)


# ---------------------------------------------------------------- several looks
@pytest.mark.parametrize(("words", "looks", "far"), [
    ([], None, None), (["--flip"], 2, None), (["--multi-scale"], 4, None), (["--multi-scale", "--flip"], 8, None),
    (["--max-distance", "0.2"], 1, .2), (["--flip", "--max-distance", "12"], 2, 12.)])
def test_looks_reach_the_segmenter(weights, words, looks, far):
    s = cli.parse(["segment", "x", "--mask", "y", "--out", "z", "--weights", str(weights), *words]).segmenter()
    assert type(s) is VideoSegmenter
    assert len(s.test_time.views) == (looks or 1) and s.test_time.max_distance == far
    assert {v.scale for v in s.test_time.views} == ({1., 1.15, 1.3, 1.5} if "--multi-scale" in words else {1.})
    assert any(v.flip for v in s.test_time.views) == ("--flip" in words)


def test_the_mirror_changes_the_masks_and_policy_and_slots_still_count(work, weights, capsys):
    root = make_davis_2016(work)
    frames, first = root / "JPEGImages" / "480p" / "one", root / "Annotations" / "480p" / "one" / "00000.png"
    for out, more in (("plain", []), ("looks", ["--flip", "--multi-scale", "--max-distance", "0.5"])):
        status, said, err = stremn_main(capsys, "segment", frames, "--mask", first, "--out", out, "--weights", weights,
                                        "--quiet", "--no-video", "--policy", "newest", "--slots", "2", *more)
        assert (status, err) == (0, []) and said[0] == f"5 masks in {out}, objects 1" and "frames 0, 4;" in said[1]
    masks = [[read_mask(work / out / f"{t:05d}.png") for t in range(5)] for out in ("plain", "looks")]
    assert torch.equal(masks[0][0], masks[1][0]) and any(not torch.equal(a, b) for a, b in zip(*masks))
    status, _, err = evaluate(capsys, weights, root, "--year", "2016", "--flip")
    assert (status, err) == (0, [])


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(("words", "pieces"), [
    (["--max-distance", "0"], ["--max-distance", "0.0"]),
    (["--max-distance", "-3"], ["--max-distance", "-3"]),
    (["--max-distance", "nan"], ["--max-distance", "nan"]),
    (["--max-distance", "inf"], ["--max-distance", "inf"]),
    (["--year", "2016", "--all-frames"], ["--all-frames", "--year 2018 or 2019", "2016"]),
    (["--year", "2016", "--zip", "v.tar"], ["--zip", ".zip", "v.tar"]),
    (["--year", "2016", "--zip", "v"], ["--zip", ".zip"]),
    (["--year", "2018", "--resolution", "720p"], ["--resolution", "--year 2016 or 2017"]),
    (["--year", "2018"], ["valid", "meta.json"]),
    (["--year", "2019", "--split", "val"], ["a folder val with meta.json"]),
    (["--year", "2016", "--split", "test-dev"], ["test-dev", "lists for val"]),
    (["--split", "nowhere"], ["nowhere"])])
def test_wrong_options_give_one_line_and_leave_nothing(work, weights, capsys, words, pieces):
    root = make_davis_2016(work)
    before = files_below(work)
    status, out, err = evaluate(capsys, weights, root, *["--year", "2016"][:2 * ("--max-distance" in words)], *words)
    assert (status, out, len(err)) == (2, [], 1), (status, out, err)
    assert err[0].startswith("stremn: error: ") and all(p in err[0] for p in pieces), err[0]
    assert files_below(work) == before


def test_a_part_of_a_split_is_scored_but_not_packed(work, weights, capsys):
    root = make_davis_2016(work)
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p" / "two").rename(work / kind)
    before = files_below(work)
    words = ["--year", "2016", "--allow-missing"]
    status, out, err = evaluate(capsys, weights, root, *words, "--zip", "v.zip")
    assert (status, out, len(err)) == (2, [], 1) and "--zip" in err[0] and "two" in err[0]
    assert files_below(work) == before
    assert evaluate(capsys, weights, root, *words)[0] == 0


@pytest.mark.parametrize("words", [["--year", "2020"], ["--max-distance", "near"], ["--max-distance"], ["--filp"],
                                   ["--zip"]])
def test_usage_errors_end_with_2_and_name_the_option(work, weights, capsys, words):
    status, out, err = evaluate(capsys, weights, "DAVIS", *words)
    assert (status, out) == (2, []) and words[0] in " ".join(err) and not list(work.iterdir())


# ---------------------------------------------------------------- bench memory
def test_bench_memory_prints_statistics_and_scores_and_keeps_records(work, weights, capsys):
    words = ["bench", "memory", "--weights", weights, "--levels", "easy", "--clips", "1", "--quiet", "--policy"]
    status, out, err = stremn_main(capsys, *words, "oldest", "oracle", "--out", "kept")
    assert (status, err) == (0, []) and out[-1] == "Records in kept"
    assert sorted(p.name for p in (work / "kept").iterdir()) == ["easy-oldest-s0.json", "easy-oracle-s0.json"]
    assert any(line.startswith("| MOSEv2 (published) | 61.8% | 50.3% | 13.6 |") for line in out)
    scores = json.loads((work / "kept" / "easy-oldest-s0.json").read_text())["metrics"]
    assert f"| oldest | {scores['J']:.3f} | {scores['J_visible']:.3f} |" in out
    before = files_below(work)
    assert stremn_main(capsys, *words, "newest")[0] == 0 and files_below(work) == before


@pytest.mark.parametrize(("words", "pieces"), [
    (["memory", "--quick"], ["--quick: expected bench cost, found bench memory"]),
    (["memory", "--networks", "tiny"], ["--networks"]), (["--clips", "3"], ["--clips: expected bench memory"]),
    (["cost", "--policy", "oldest"], ["--policy"]), (["memory", "--levels", "extreme"], ["easy, medium, hard"]),
    (["memory", "--policy", "best"], ["policy: expected one of"]), (["memory", "--clips", "0"], ["clips", "found 0"]),
    (["memory", "--slots", "0", "--clips", "1"], ["slots"]), (["memory", "--weights", "none"], ["none"]),
    (["memory", "--policy", "no.such:rule"], ["module:function", "no.such:rule"])])
def test_bench_refuses_what_it_cannot_measure(work, capsys, words, pieces):
    status, out, err = stremn_main(capsys, "bench", *words, "--out", "kept/here", "--quiet")
    assert (status, out, len(err)) == (2, [], 1) and all(p in err[0] for p in pieces), err
    assert not list(work.iterdir())
