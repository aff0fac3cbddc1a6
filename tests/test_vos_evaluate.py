"""Folders of masks scored as DAVIS and YouTube-VOS do; YouTube-VOS's measure against loops in float64."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import label_video, vos_benchmark
from refusals import refused

from stremn.core import StremnError
from stremn.images import write_mask
from stremn.data.youtube import YouTubeVOS, categories
from stremn.metrics.vos import Report, YouTubeReport, score_late, score_object, score_video
from stremn.vos.evaluate import evaluate_davis, evaluate_folders, evaluate_youtube

H, W = 24, 30


def measures(pred, truth):
    "J and F of one mask, pixel by pixel in float64: every boundary pixel looks at every other one."
    pred, truth = (np.asarray(x).astype(bool) for x in (pred, truth))
    union = (pred | truth).sum()
    edges = []
    for m in (pred, truth):
        points = []
        for y in range(H):
            for x in range(W):
                right, down = min(x + 1, W - 1), min(y + 1, H - 1)
                corner = m[y + 1, x + 1] if y + 1 < H and x + 1 < W else m[y, x]
                if m[y, x] != m[y, right] or m[y, x] != m[down, x] or m[y, x] != corner:
                    points.append((y, x))
        edges.append(np.array(points, dtype=np.float64).reshape(-1, 2))
    radius = math.ceil(0.008 * math.hypot(H, W))
    a, b = edges
    if len(a) == 0 or len(b) == 0:
        return (pred & truth).sum() / union if union else 1.0, float(len(a) == len(b))
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    P, R = (distance.min(1) <= radius).mean(), (distance.min(0) <= radius).mean()
    return (pred & truth).sum() / union if union else 1.0, 2 * P * R / (P + R) if P + R else 0.0


def scene(seed, frames=6):
    "Truth with objects 3, 5 and 9 of which some come late and some leave; a prediction that is off by some pixels."
    rng = np.random.default_rng(seed)
    truth, pred = np.zeros((2, frames, H, W), np.int64)
    for i in (3, 5, 9):
        enters, leaves = sorted(rng.choice(np.arange(frames + 2), 2, replace=False))
        y, x, h, w = rng.integers(0, 12), rng.integers(0, 15), rng.integers(4, 12), rng.integers(4, 15)
        for t in range(enters, min(frames, leaves)):
            truth[t, y : y + h, x + t : x + t + w] = i
            dy, dx = rng.integers(-2, 3, 2)
            pred[t, max(0, y + dy) : y + dy + h, max(0, x + t + dx) : x + t + dx + w] = i
    return torch.from_numpy(pred), torch.from_numpy(truth)


@pytest.mark.parametrize("seed", range(12))
def test_late_objects_are_scored_as_loops_do(seed):
    pred, truth = scene(seed)
    blank = seed % 3 == 0
    if blank:
        truth[2] = -1
    scores, want = score_late(pred, truth), {}
    for i in (3, 5, 9):
        shown = [t for t in range(6) if (truth[t] == i).any()]
        frames = [t for t in range(6) if shown and t > shown[0] and not (blank and t == 2)]
        if frames:
            want[i] = (frames, *np.array([measures(pred[t] == i, truth[t] == i) for t in frames]).T)
    assert list(scores) == list(want)
    for i, (frames, J, F) in want.items():
        assert scores[i].frames.tolist() == frames and scores[i].J.dtype == torch.float64
        np.testing.assert_allclose(scores[i].J, J, atol=1e-12)
        np.testing.assert_allclose(scores[i].F, F, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_overall_score_is_the_mean_of_four_means(seed):
    videos = {f"v{k}": scene(100 * seed + k) for k in range(3)}
    scores = {v: score_late(*maps) for v, maps in videos.items()}
    keys = [(v, i) for v in scores for i in scores[v]]
    unseen = {key for k, key in enumerate(keys) if k % 3 == 1}
    total = {}
    for v, (pred, truth) in videos.items():
        for i in scores[v]:
            first = min(t for t in range(6) if (truth[t] == i).any())
            rows = [measures(pred[t] == i, truth[t] == i) for t in range(first + 1, 6)]
            for k, name in enumerate("JF"):
                group = "unseen" if (v, i) in unseen else "seen"
                total.setdefault(f"{group}_{name}", []).append(math.fsum(row[k] for row in rows) / len(rows))
    want = {k: math.fsum(v) / len(v) for k, v in total.items()}
    got = YouTubeReport(scores, unseen).metrics
    assert set(got) == {*want, "overall"} and got["overall"] == pytest.approx(math.fsum(want.values()) / 4, abs=1e-12)
    for k in want:
        assert got[k] == pytest.approx(want[k], abs=1e-12)


def test_a_perfect_prediction_scores_one_and_an_empty_one_by_absence():
    _, truth = scene(1)
    assert all(s.j == s.f == 1 for s in score_late(truth, truth).values())
    nothing = score_late(torch.zeros_like(truth), truth)
    for i, s in nothing.items():
        away = torch.tensor([not (truth[t] == i).any() for t in s.frames])
        assert s.J.tolist() == s.F.tolist() == away.double().tolist()


def test_the_frames_where_objects_enter_may_be_given():
    pred, truth = scene(2, frames=6)
    truth[:, 0, 0] = 3
    assert score_late(pred, truth)[3].frames.tolist() == [1, 2, 3, 4, 5]
    assert score_late(pred, truth, {3: 2})[3].frames.tolist() == [3, 4, 5] and list(
        score_late(pred, truth, {3: 2})
    ) == [3]
    assert score_late(pred, truth, {3: 5}) == {}
    assert score_late(pred, truth)[3].J.equal(score_video(pred, truth, [3], drop_ends=False)[3].J[1:])
    with pytest.raises(StremnError, match="one shape"):
        score_late(pred[1:], truth)


def test_a_report_says_what_is_missing():
    scores = {"a": score_late(*scene(3)), "b": score_late(*scene(4))}
    alone = YouTubeReport(scores)
    assert set(alone.metrics) == {"seen_J", "seen_F"} and "one group is empty" in alone._repr_markdown_()
    assert alone.metrics["seen_J"] == pytest.approx(Report(scores).metrics["J"], abs=1e-12)
    i = next(iter(scores["a"]))
    both = YouTubeReport(scores, {("a", i), ("nowhere", 1)})
    assert both.unseen == {("a", i)} and both.metrics["unseen_J"] == scores["a"][i].j
    rows = both.to_csv().splitlines()
    assert rows[0].endswith(",group") and [r.split(",")[-1] for r in rows[1:]].count("unseen") == 1
    assert f"{both.metrics['overall']:.3f}" in both._repr_markdown_()
    with pytest.raises(StremnError, match="expected at least one object, found every video empty"):
        YouTubeReport({})


# ---- YouTube-VOS from a folder -------------------------------------------------------------------------------------
@pytest.fixture
def tree(tmp_path):
    meta, kinds = {}, {3: "dog", 5: "cat", 9: "yeti"}
    for k in range(3):
        pred, truth = scene(10 + k)
        (tmp_path / "train" / "JPEGImages" / f"v{k}").mkdir(parents=True)
        for t in range(6):
            Image.new("RGB", (W, H)).save(tmp_path / "train" / "JPEGImages" / f"v{k}" / f"{5 * t:05d}.jpg")
            write_mask(tmp_path / "train" / "Annotations" / f"v{k}" / f"{5 * t:05d}.png", truth[t])
            write_mask(
                tmp_path / "masks" / f"v{k}" / f"{5 * t:05d}.png", torch.where(torch.isin(pred[t], truth), pred[t], 0)
            )
            write_mask(tmp_path / "masks" / f"v{k}" / f"{5 * t + 1:05d}.png", pred[t])  # between two annotated frames
        first = {i: min(t for t in range(6) if (truth[t] == i).any()) for i in kinds if (truth == i).any()}
        objects = {
            str(i): {"category": kinds[i], "frames": [f"{5 * t:05d}" for t in range(f, 6)]} for i, f in first.items()
        }
        meta[f"v{k}"] = {"objects": objects}
    (tmp_path / "train" / "meta.json").write_text(json.dumps({"videos": meta}))
    return tmp_path


def test_a_folder_scores_as_its_arrays_do(tree):
    data = YouTubeVOS(tree, "train")
    report = evaluate_youtube(tree / "masks", data, {"dog", "cat"})
    scores = {f"v{k}": score_late(*scene(10 + k)) for k in range(3)}
    want = YouTubeReport(scores, {(v, 9) for v in scores})
    assert report.metrics == want.metrics and report.unseen == want.unseen and len(report.unseen) > 0
    assert set(evaluate_youtube(tree / "masks", data, categories(data.notes)).metrics) == {"seen_J", "seen_F"}


def test_what_cannot_be_scored_is_refused(tree):
    data = YouTubeVOS(tree, "train")

    def score(pred="masks"):
        return evaluate_youtube(tree / pred, data, {"dog"})

    refused("nowhere: expected a folder of masks, found no such folder", score, "nowhere")
    lost = tree / "masks" / "v1" / "00015.png"
    lost.unlink()
    refused("v1: expected masks of 6 scored frames, found none of 1, 00015", score)
    write_mask(lost, torch.full((H, W), 77))
    refused("found also", score)
    (tree / "train" / "Annotations" / "v0" / "00025.png").unlink()
    refused("stay with the server", score)


# ---- DAVIS from folders ---------------------------------------------------------------------------------------------
@pytest.fixture
def davis(tmp_path):
    "A DAVIS of two sequences with predictions in `masks`."
    for seed, name in enumerate(("cat", "dog")):
        truth = label_video(seed, T=5, objects=2 + seed)
        for t, frame in enumerate(truth):
            write_mask(tmp_path / "Annotations/480p" / name / f"{t:05d}.png", torch.from_numpy(frame))
            write_mask(tmp_path / "masks" / name / f"{t:05d}.png", torch.from_numpy(np.roll(frame, 1, 1)))
    for year in (2016, 2017):
        (tmp_path / f"ImageSets/{year}").mkdir(parents=True)
        (tmp_path / f"ImageSets/{year}/val.txt").write_text("cat\ndog\n")
        (tmp_path / f"ImageSets/{year}/one.txt").write_text("dog\n\n")
    return tmp_path


def test_davis_from_files_equals_arrays_and_vos_benchmark(davis):
    r = evaluate_davis(davis / "masks", str(davis))
    assert list(r.objects) == [("cat", 1), ("cat", 2), ("dog", 1), ("dog", 2), ("dog", 3)]
    J, F = [], []
    for seed in range(2):
        truth = label_video(seed, T=5, objects=2 + seed)
        j, f = vos_benchmark(np.roll(truth, 1, 2), truth)
        J, F = J + list(j.values()), F + list(f.values())
    assert r.metrics["J"] == pytest.approx(np.mean(J), abs=1e-9)
    assert r.metrics["F"] == pytest.approx(np.mean(F), abs=1e-9)
    assert r.metrics["JF"] == pytest.approx((np.mean(J) + np.mean(F)) / 2, abs=1e-9)
    assert list(evaluate_davis(davis / "masks", davis, split="one").videos) == ["dog"]
    folders = evaluate_folders(davis / "masks", davis / "Annotations/480p")
    assert folders.metrics == r.metrics
    alone = evaluate_folders(davis / "masks/dog", davis / "Annotations/480p/dog")
    assert {i: s.j for (_, i), s in alone.objects.items()} == {i: s.j for i, s in r.videos["dog"].items()}


def test_davis_2016_merges_all_objects(davis):
    r = evaluate_davis(davis / "masks", davis, year=2016)
    truth = label_video(1, T=5, objects=3) > 0
    want = score_object(np.roll(truth, 1, 2), truth)
    assert list(r.objects) == [("cat", 1), ("dog", 1)] and r.videos["dog"][1].j == want.j
    assert r.videos["dog"][1].f == want.f


def test_perfect_predictions_score_one(davis):
    r = evaluate_davis(davis / "Annotations/480p", davis)
    assert r.metrics["J"] == r.metrics["F"] == r.metrics["JF"] == 1 and r.metrics["J_decay"] == 0


def test_ends_need_no_prediction(davis):
    for t in (0, 4):
        (davis / f"masks/cat/{t:05d}.png").unlink()
    evaluate_davis(davis / "masks", davis)
    with pytest.raises(StremnError, match="cat: expected masks of 5 scored frames, found none of 2, 00000, 00004"):
        evaluate_folders(davis / "masks", davis / "Annotations/480p", drop_ends=False)


@pytest.mark.parametrize("harm,expected", [
    (lambda d: (d / "masks/dog/00002.png").unlink(), ("masks/dog: expected masks of 3", "none of 1, 00002")),
    (lambda d: [f.unlink() for f in (d / "masks/dog").iterdir()] and (d / "masks/dog").rmdir(),
     ("masks: expected masks of all 2 videos, found none of 1, dog; in", ": cat")),
    (lambda d: write_mask(d / "masks/dog/00002.png", torch.zeros(10, 20, dtype=torch.long)),
     ("dog/00002.png", "60x48", "20x10")),
    (lambda d: write_mask(d / "masks/cat/00002.png", torch.full((48, 60), 8)), ("cat/00002.png", "[1, 2]", "[8]")),
    (lambda d: write_mask(d / "masks/bird/00000.png", torch.zeros(48, 60, dtype=torch.long)),
     ("masks/bird", "no sequence")),
    (lambda d: write_mask(d / "Annotations/480p/dog/00003.png", torch.zeros(10, 20, dtype=torch.long)),
     ("480p/dog/00003.png", "20x10")),
    (lambda d: write_mask(d / "Annotations/480p/dog/00000.png", torch.zeros(48, 60, dtype=torch.long)),
     ("480p/dog", "first annotated frame")),
    (lambda d: [(d / f"Annotations/480p/dog/0000{t}.png").unlink() for t in range(2, 5)],
     ("480p/dog", "2 annotated frames")),
    (lambda d: (d / "ImageSets/2017/val.txt").write_text("cat\nhorse\n"), ("480p/horse", "found none")),
    (lambda d: (d / "ImageSets/2017/val.txt").write_text("dog\n", encoding="utf-16"), ("val.txt", "UTF-8")),
    (lambda d: (d / "ImageSets/2017/val.txt").write_text(""), ("val.txt", "empty")),
    (lambda d: (d / "ImageSets/2017/val.txt").unlink(), ("val.txt", "found lists for one")),
    (lambda d: (d / "masks").rename(d / "elsewhere"), ("masks", "found no such folder")),
    (lambda d: (d / "masks/dog/00002.png").write_bytes(b"not a picture"), ("dog/00002.png",)),
])
def test_what_does_not_match_is_refused_by_file_name(davis, harm, expected):
    harm(davis)
    with pytest.raises(StremnError) as e:
        evaluate_davis(davis / "masks", davis)
    assert all(part in str(e.value) for part in expected) and "\n" not in str(e.value)


def test_a_mask_is_found_whatever_its_ending_and_whatever_lies_beside_it(davis):
    want = evaluate_davis(davis / "masks", davis).metrics
    for tree in ("masks", "Annotations/480p"):
        (davis / tree / "dog/00002.png").rename(davis / tree / "dog/00002.PNG")
        for junk in ("cat/._00000.png", "cat/Thumbs.db", "._cat", ".DS_Store", "dog/.00001.png"):
            (davis / tree / junk).write_bytes(b"x")
    assert evaluate_davis(davis / "masks", davis).metrics == want
    assert evaluate_folders(davis / "masks", davis / "Annotations/480p").metrics == want
    (davis / "masks/cat/00009.txt").touch()
    refused("cat/00009.txt: expected pictures", evaluate_davis, davis / "masks", davis)


def test_unknown_year_is_refused(davis):
    with pytest.raises(StremnError, match="year: expected 2016 or 2017, found 2018"):
        evaluate_davis(davis / "masks", davis, year=2018)
