"""J and F against two independent programs (vos-benchmark, scipy in float64), on random and real masks."""
import math

import numpy as np
import pytest
import torch

from helpers import label_video, vos_benchmark

from stremn.core import StremnError
from stremn.images import read_mask
from stremn.metrics.vos import (Report, boundary, contour_accuracy, jaccard, near, score_object, score_video,
                                statistics, tolerance_radius, visible_mean)

ndimage = pytest.importorskip("scipy.ndimage")


# ---- two other programs ---------------------------------------------------------------------------------------------
def official_boundary(mask):
    "Boundary map from the Berkeley rule, by shifted copies with the border rows and columns overwritten."
    m = np.pad(mask.astype(bool), ((0, 1), (0, 1)))
    here, right, below, corner = m[:-1, :-1], m[:-1, 1:], m[1:, :-1], m[1:, 1:]
    edge = (here != right) | (here != below) | (here != corner)
    edge[-1, :] = here[-1, :] != right[-1, :]
    edge[:, -1] = here[:, -1] != below[:, -1]
    edge[-1, -1] = False
    return edge


def official(pred, truth, share=.008):
    "J and F of one frame in float64, with a real dilation by a disk."
    pred, truth = (np.asarray(x).astype(bool) for x in (pred, truth))
    union = (pred | truth).sum()
    J = (pred & truth).sum() / union if union else 1.
    r = math.ceil(share * np.linalg.norm(truth.shape))
    y, x = np.mgrid[-r:r + 1, -r:r + 1]
    disk = x * x + y * y <= r * r
    a, b = official_boundary(pred), official_boundary(truth)
    if not a.any() or not b.any():
        return J, float(a.any() == b.any())
    P = (a & ndimage.binary_dilation(b, disk)).sum() / a.sum()
    R = (b & ndimage.binary_dilation(a, disk)).sum() / b.sum()
    return J, 2 * P * R / (P + R) if P + R else 0.


def blobs(seed, shape, share=.3, smooth=2.):
    "Smooth random masks; some frames are empty, some are full."
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(shape), (0, smooth, smooth))
    mask = field > np.quantile(field, 1 - share, axis=(1, 2), keepdims=True)
    mask[rng.random(shape[0]) < .1] = False
    mask[rng.random(shape[0]) < .05] = True
    return mask


# ---- frames -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape",
                         [(12, 30, 47), (8, 64, 64), (4, 120, 214), (2, 240, 427), (20, 1, 9), (20, 9, 1), (3, 1, 1)])
def test_j_and_f_of_a_frame_equal_scipy_in_float64(shape):
    smooth = min(2., min(shape[1:]) / 8)
    for seed in range(3):
        p, t = blobs(seed, shape, smooth=smooth), blobs(seed + 100, shape, share=.25, smooth=smooth)
        near = np.roll(p, (1, 2), (1, 2))
        t = np.where(np.arange(shape[0])[:, None, None] % 2 == 0, near, t)                   # near misses and strangers
        want = np.array([official(a, b) for a, b in zip(p, t)])
        assert np.abs(jaccard(p, t).numpy() - want[:, 0]).max() < 1e-12
        assert np.abs(contour_accuracy(p, t).numpy() - want[:, 1]).max() < 1e-12


@pytest.mark.parametrize("tolerance", [.001, .02, .1, 1, 3, 7.5])
def test_any_tolerance_is_a_dilation_by_a_disk(tolerance):
    p, t = blobs(1, (6, 40, 56)), blobs(2, (6, 40, 56))
    r = tolerance_radius(40, 56, tolerance)
    want = [official(a, b, r / math.hypot(40, 56) - 1e-9)[1] for a, b in zip(p, t)]
    assert np.abs(contour_accuracy(p, t, tolerance).numpy() - want).max() < 1e-12


def test_noise_that_touches_every_border_is_scored_alike():
    rng = np.random.default_rng(0)
    for H, W in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 7), (11, 5)):
        p, t = rng.random((200, H, W)) < .5, rng.random((200, H, W)) < .5
        assert (boundary(p).numpy() == np.stack([official_boundary(m) for m in p])).all()
        want = np.array([official(a, b) for a, b in zip(p, t)])
        assert np.abs(jaccard(p, t).numpy() - want[:, 0]).max() < 1e-12
        assert np.abs(contour_accuracy(p, t).numpy() - want[:, 1]).max() < 1e-12


def test_near_is_exact_and_keeps_frames_apart():
    g = torch.Generator().manual_seed(0)
    for r in (0, 1, 2, 5, 9):
        a, b = (torch.stack([torch.randint(0, n, (60,), generator=g) for n in (3, 40, 50)], 1) for _ in range(2))
        d = (a[:, None, 1:] - b[None, :, 1:]).square().sum(-1).where(a[:, None, 0] == b[None, :, 0],
                                                                     torch.tensor(10**9))
        assert (near(a, b, r) == (d <= r * r).any(1)).all()
    assert near(a[:0], b, 3).shape == (0,) and not near(a, b[:0], 3).any()


def test_measures_are_symmetric_bounded_and_perfect_for_equal_masks():
    p, t = (torch.from_numpy(blobs(s, (40, 32, 32), share=.4)) for s in (5, 6))
    for measure in (jaccard, contour_accuracy):
        v = measure(p, t)
        assert v.dtype == torch.float64 and v.shape == (40,) and (v >= 0).all() and (v <= 1).all()
        assert torch.equal(v, measure(t, p))
        assert (measure(p, p) == 1).all()
        for d in ((-1,), (-2,)):
            if measure is jaccard:
                assert torch.equal(v, measure(p.flip(d), t.flip(d)))
    assert torch.equal(jaccard(p, t) == 1, (p == t).flatten(1).all(1))
    assert torch.equal(contour_accuracy(p, ~p), torch.ones(40, dtype=torch.float64))


def test_leading_axes_numbers_and_arrays_are_accepted():
    p, t = blobs(3, (6, 20, 24)), blobs(4, (6, 20, 24))
    for f in (jaccard, contour_accuracy):
        flat = f(p, t)
        assert torch.equal(f(p.reshape(2, 3, 20, 24), t.reshape(2, 3, 20, 24)), flat.view(2, 3))
        assert f(p[0], t[0]).shape == () and f(p[0], t[0]) == flat[0]
        assert torch.equal(f(torch.from_numpy(p).float() * 255, t.astype(np.uint8)), flat)
        assert f(p[:0], t[:0]).shape == (0,)


def test_many_frames_are_worked_off_in_parts():
    p, t = blobs(8, (9, 300, 400)), blobs(9, (9, 300, 400))             # 9 frames of 120,000 pixels: more than one part
    assert torch.equal(contour_accuracy(p, t), torch.stack([contour_accuracy(a, b) for a, b in zip(p, t)]))


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(StremnError, match="masks: expected one shape"):
        jaccard(np.zeros((4, 5)), np.zeros((5, 4)))
    with pytest.raises(StremnError, match="masks: expected one shape"):
        contour_accuracy(np.zeros((4, 5)), np.zeros((5, 4)))
    with pytest.raises(StremnError, match="mask: expected shape"):
        jaccard(np.zeros(4), np.zeros(4))
    with pytest.raises(StremnError, match="tolerance: expected a positive number"):
        contour_accuracy(np.zeros((4, 5)), np.zeros((4, 5)), 0)
    with pytest.raises(StremnError, match="found 2 frames"):
        score_object(np.zeros((2, 4, 5)), np.zeros((2, 4, 5)))
    with pytest.raises(StremnError, match="objects: expected 'first', 'all' or a list of ids, found 'some'"):
        score_video(np.zeros((5, 4, 5)), np.ones((5, 4, 5)), objects="some")
    with pytest.raises(StremnError, match="videos: expected at least one object"):
        Report({"a": {}})


# ---- videos -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_videos_agree_with_vos_benchmark(seed):
    truth = label_video(seed)
    pred = np.where(np.random.default_rng(seed).random(truth.shape) < .1, label_video(seed + 50),
                    np.roll(truth, (1, 1), (1, 2)))
    for drop in (True, False):
        J, F = vos_benchmark(pred, truth, drop)
        got = score_video(pred, truth, drop_ends=drop)
        assert set(got) == set(J)
        for i, s in got.items():
            assert abs(s.j - J[i]) < 1e-6 and abs(s.f - F[i]) < 1e-6 and s.id == i
            assert s.frames.tolist() == list(range(1, 6) if drop else range(7))


def test_vos_benchmark_counts_late_objects_differently():
    "It counts an object from the first scored frame that shows it; the official program counts empty frames as 1."
    truth = np.zeros((6, 20, 20), int)
    truth[0, 5:9, 5:9] = truth[3:, 5:9, 5:9] = 1
    pred = np.roll(truth, 1, 2)
    ours, (J, _) = score_video(pred, truth)[1], vos_benchmark(pred, truth)
    assert ours.J[:2].tolist() == [1., 1.] and ours.J[2] < 1
    assert J[1] == pytest.approx(ours.J[2:].mean().item()) and ours.j > J[1]


def test_which_objects_and_frames_count():
    truth = np.zeros((8, 20, 20), int)
    truth[:, 2:8, 2:8] = 3
    truth[4:, 12:18, 12:18] = 5                                                # enters in frame 4
    pred = truth.copy()
    pred[:, 0, 0] = 9                                                          # an id nobody knows
    assert list(score_video(pred, truth)) == [3]
    late = score_video(pred, truth, objects="all")
    assert list(late) == [3, 5] and late[5].frames.tolist() == [5, 6] and late[3].frames.tolist() == list(range(1, 7))
    assert score_video(pred, truth, objects=[5])[5].frames.tolist() == list(range(1, 7))
    sparse = truth.copy()
    sparse[[0, 2, 6]] = -1                                                     # annotated: 1 3 4 5 7
    assert score_video(pred, sparse)[3].frames.tolist() == [3, 4, 5]
    assert score_video(pred, sparse, drop_ends=False)[3].frames.tolist() == [1, 3, 4, 5, 7]
    truth[7] = 0
    truth[7, 0, 0] = 7                                                      # enters in the last frame: nothing to score
    assert list(score_video(pred, truth, objects="all")) == [3, 5]
    assert all(s.j == 1 for s in late.values())


def test_statistics_are_those_of_the_official_report():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4, 5, 7, 48, 88, 102):
        v = rng.random(n)
        ends = np.round(np.linspace(1, n, 5) + 1e-10).astype(int) - 1
        first, last = v[ends[0]:ends[1] + 1], v[ends[3]:ends[4] + 1]
        got = statistics(v)
        assert got == pytest.approx((v.mean(), (v > .5).mean(), first.mean() - last.mean()), abs=1e-12)
    assert statistics([.5, .5]).recall == 0                                    # strictly above one half
    assert statistics(torch.linspace(1, 0, 50)).decay > .7
    with pytest.raises(StremnError):
        statistics([])


def test_means_are_over_objects():
    def fake(j):
        score = score_object(np.zeros((3, 2, 2)), np.zeros((3, 2, 2)))
        return score._replace(J=torch.tensor([j]).double(), F=torch.tensor([j / 2]).double())
    r = Report({"crowd": {1: fake(.2), 2: fake(.4), 3: fake(.6)}, "solo": {1: fake(1.)}})
    assert r.metrics["J"] == pytest.approx(.55) and r.metrics["F"] == pytest.approx(.275)
    assert r.metrics["JF"] == pytest.approx(.4125)
    assert r.per_video == pytest.approx({"crowd": .3, "solo": .75})
    assert r.metrics["J_recall"] == pytest.approx(.5) and r.metrics["J_decay"] == 0
    assert len(r.to_csv().splitlines()) == 5 and "crowd" in r._repr_markdown_()


# ---- real masks ---------------------------------------------------------------------------------------------------
def spoiled(truth, kind):
    "Predictions made from true label maps: moved, eroded, dilated."
    if kind == "moved":
        return truth.roll((2, 3), (1, 2))
    out = torch.zeros_like(truth)
    for i in truth.unique().tolist():
        if i > 0:
            change = ndimage.binary_erosion if kind == "eroded" else ndimage.binary_dilation
            out[torch.from_numpy(np.stack([change(m, iterations=3) for m in (truth == i).numpy()]))] = i
    return out


@pytest.mark.parametrize("video,kind", [("davis2016/Annotations/240p/blackswan", "moved"),
                                        ("davis2016/Annotations/240p/breakdance", "eroded"),
                                        ("multi/Annotations/240p/dogs_jump", "moved"),
                                        ("multi/Annotations/240p/dogs_jump", "dilated"),
                                        ("davis2016/Annotations/480p/dog", "eroded")])
def test_real_masks_agree_with_both_programs(data_root, video, kind):
    files = sorted((data_root / video).glob("*.png"))[:14 if "240p" in video else 6]
    if not files:
        pytest.skip(f"no {video} below STREMN_DATA")
    truth = torch.stack([read_mask(f) for f in files]).clamp(min=0)
    pred = spoiled(truth, kind)
    got, (J, F) = score_video(pred, truth), vos_benchmark(pred, truth)
    assert set(got) == set(J)
    for i, s in got.items():
        want = np.array([official(p, t) for p, t in zip((pred == i).numpy()[1:-1], (truth == i).numpy()[1:-1])])
        assert np.abs(s.J.numpy() - want[:, 0]).max() < 1e-12 and np.abs(s.F.numpy() - want[:, 1]).max() < 1e-12
        assert abs(s.j - J[i]) < 1e-6 and abs(s.f - F[i]) < 1e-6
        assert .05 < s.j < 1


def test_frames_without_the_target_do_not_count_among_the_visible_ones():
    "DAVIS counts an empty frame that was left empty as 1; the mean over visible frames leaves it out."
    truth = torch.zeros(8, 16, 16, dtype=torch.long)
    truth[:5, 4:12, 4:12] = 1
    pred = truth.clone()
    pred[1:5, 4:8] = 0                                    # half of it is missed
    score = score_video(pred, truth)[1]
    assert score.visible.tolist() == [True] * 4 + [False] * 2 and score.j_visible == pytest.approx(.5)
    assert score.j == pytest.approx((4 * .5 + 2) / 6)
    assert score_object(pred == 1, truth == 1).j_visible == score.j_visible
    values = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    seen = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) > .5
    by_hand = [sum(v for v, s in zip(row, at) if s) / sum(at) for row, at in zip(values.tolist(), seen.tolist())]
    assert visible_mean(values, seen).tolist() == pytest.approx(by_hand)
    assert visible_mean(values, torch.zeros(3, 7)).isnan().all()
    with pytest.raises(StremnError, match="one shape"):
        visible_mean(values, seen[:2])
