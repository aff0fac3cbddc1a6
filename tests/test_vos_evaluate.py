"""YouTube-VOS's measure against independent loops in float64: late objects, gaps, two groups, four means."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from stremn.core import StremnError
from stremn.images import write_mask
from stremn.data.youtube import YouTubeVOS, categories
from stremn.metrics.vos import Report, YouTubeReport, score_late, score_video
from stremn.vos.evaluate import evaluate_youtube

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
def test_late_objects_against_loops(seed):
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
def test_four_means_and_their_mean(seed):
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


def test_what_a_perfect_and_an_empty_prediction_score():
    _, truth = scene(1)
    assert all(s.j == s.f == 1 for s in score_late(truth, truth).values())
    nothing = score_late(torch.zeros_like(truth), truth)
    for i, s in nothing.items():
        away = torch.tensor([not (truth[t] == i).any() for t in s.frames])
        assert s.J.tolist() == s.F.tolist() == away.double().tolist()


def test_entries_may_be_told():
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
    with pytest.raises(StremnError, match="every video is empty"):
        YouTubeReport({})


# ---------------------------------------------------------------- from a tree
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

    def refused(match, pred="masks"):
        with pytest.raises(StremnError, match=match):
            evaluate_youtube(tree / pred, data, {"dog"})

    refused("not found", "nowhere")
    lost = tree / "masks" / "v1" / "00015.png"
    lost.unlink()
    refused("00015.png")
    write_mask(lost, torch.full((H, W), 77))
    refused("found also")
    (tree / "train" / "Annotations" / "v0" / "00025.png").unlink()
    refused("stay with the server")
