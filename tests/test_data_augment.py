"""Augmentation: grids against loops and libraries, colours against torchvision, labels that stay on their objects."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import RBFInterpolator
from torchvision.transforms import functional as tv

from helpers import NO_COLOUR_CHANGE, boxes_picture
from refusals import refused
from stremn.core import make_generator
from stremn.data.augment import (
    HANDLES, IMAGENET_GREY, VIDEO_AUGMENT, AugmentConfig, PasteConfig, affine, augment_clip, choose_objects, crop,
    draw_crop, frame_changes, jitter, object_points, paste, paste_object, pixel_centres, recolour, resample, sample_at,
    sampling_grid, share_inside, thin_plate, wander,
)
from stremn.data.clips import Clip

H, W = 24, 36


def clip_of(frames=4, size=(H, W), seed=0):
    pictures = [boxes_picture(seed + t, size) for t in range(frames)]
    return Clip(torch.stack([f for f, _ in pictures]), torch.stack([m for _, m in pictures]), "synthetic")


def random_matrices(seed, n=4, size=(H, W)):
    g = make_generator(seed)
    u = 2 * torch.rand(n, 5, generator=g) - 1
    A = affine(3 * u[:, 0], 1 + .4 * u[:, 1], .4 * u[:, 2], .5 * u[:, 3:])
    v = (2 * torch.rand(4, generator=g) - 1).tolist()
    half = (20 * math.copysign(.6 + .4 * abs(v[0]), v[0]), 14 + 4 * v[1])
    return u, A, crop(size, (18 + 6 * v[2], 12 + 6 * v[3]), half), (18 + 6 * v[2], 12 + 6 * v[3]), half


# ---------------------------------------------------------------- where a pixel comes from
@pytest.mark.parametrize("seed", range(6))
def test_the_grid_equals_the_single_steps_in_float64(seed):
    u, A, C, centre, half = random_matrices(seed)
    grid, S = sampling_grid(C @ A, 7), 7
    for t in range(len(A)):
        turn, scale, lean = 3 * u[t, 0].item(), 1 + .4 * u[t, 1].item(), math.tan(.4 * u[t, 2].item())
        for i in range(S):
            for j in range(S):
                x, y = (2 * j + 1) / S - 1 - .5 * u[t, 3].item(), (2 * i + 1) / S - 1 - .5 * u[t, 4].item()
                x, y = math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y
                x, y = x / scale, y / scale
                x, y = centre[0] + half[0] * (x - lean * y), centre[1] + half[1] * y
                assert torch.allclose(grid[t, i, j], torch.tensor([2 * x / W - 1, 2 * y / H - 1]), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_grid_equals_pytorchs_affine_grid(seed):
    _, A, C, *_ = random_matrices(seed)
    want = F.affine_grid((C @ A)[:, :2], (len(A), 1, 11, 11), align_corners=False)
    assert torch.allclose(sampling_grid(C @ A, 11), want, atol=1e-5)


def test_identity_and_mirror_are_exact():
    frame, labels = boxes_picture(size=(24, 24))
    for half, want in (((12., 12.), lambda x: x), ((-12., 12.), lambda x: x.flip(-1))):
        grid = sampling_grid(crop((24, 24), (12., 12.), half)[None], 24)
        new, ids = resample(frame[None], labels[None], grid)
        assert torch.allclose(new[0], want(frame), atol=1e-5) and torch.equal(ids[0], want(labels))


@pytest.mark.parametrize("size", (1, 5, 16))
def test_the_thin_plate_equals_scipys(size):
    line = np.linspace(-1, 1, HANDLES)
    held = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)                     # x fastest
    offsets = np.random.default_rng(size).normal(size=(HANDLES**2, 2))
    reference = RBFInterpolator(held, offsets, kernel="thin_plate_spline", degree=1)(pixel_centres(size).numpy())
    ours = thin_plate(size) @ torch.from_numpy(offsets).float()
    assert np.allclose(ours.numpy(), reference, atol=1e-4)


def test_thin_plate_rows_sum_to_one():
    assert torch.allclose(thin_plate(13).sum(1), torch.ones(169), atol=1e-5)  # all handles by one: all pixels by one


@pytest.mark.parametrize("outside", ("grey", "reflect"))
def test_labels_stay_on_their_objects(outside):
    frame, labels = boxes_picture(1)
    for seed in range(25):
        _, A, C, *_ = random_matrices(seed)
        bend = .08 * torch.randn(len(A), 16, 2, generator=make_generator(seed))
        grid = sampling_grid(C @ A, 40, bend)
        _, ids = resample(frame[None], labels[None], grid, outside)
        assert set(ids.unique().tolist()) <= {0, 1, 2}
        for i in (1, 2):
            soft = sample_at((labels == i).float()[None, None], grid, outside)[:, 0]
            sure = (soft < .01) | (soft > .99)
            assert ((ids == i) == (soft > .5))[sure].all()


def test_beyond_the_picture_it_is_grey_or_reflected():
    frame, labels = torch.zeros(1, 3, H, W), torch.ones(1, H, W, dtype=torch.long)
    grid = sampling_grid(crop((H, W), (W / 2, H / 2), (2 * W, 2 * H))[None], 32)
    new, ids = resample(frame, labels, grid)
    assert torch.allclose(new[0, :, 0, 0], torch.tensor(IMAGENET_GREY)) and ids[0, 0, 0] == 0 and ids[0, 16, 16] == 1
    new, ids = resample(frame, labels, grid, "reflect")
    assert (new.abs() < 1e-6).all() and (ids == 1).all()


def test_strong_reduction_is_averaged_first():
    board = ((torch.arange(256)[:, None] + torch.arange(256)) % 2).float().expand(1, 1, 256, 256)
    for turn in (0., .5):
        A = affine(torch.tensor([turn]), torch.ones(1), torch.zeros(1), torch.zeros(1, 2))
        small = sample_at(board, sampling_grid(crop((256, 256), (128., 128.), (80., 80.)) @ A, 16))
        assert (small - .5).abs().max() < .02


def test_unannotated_frames_stay_so():
    clip = clip_of(3)
    clip.masks[1] = -1
    new = augment_clip(clip, make_generator(0), 16)
    assert (new.masks[1] == -1).all() and (new.masks[[0, 2]] >= 0).all()


# ---------------------------------------------------------------- colours
def test_recolour_equals_torchvision():
    x = .35 + .3 * torch.rand(3, 3, 9, 11, generator=make_generator(0))
    b, c, s = torch.tensor([1.1, .9, 1.]), torch.tensor([.8, 1.2, 1.]), torch.tensor([1.2, .5, 0.])
    want = torch.stack([tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(f, p), q), r)
                        for f, p, q, r in zip(x, b.tolist(), c.tolist(), s.tolist())])
    assert torch.allclose(recolour(x, b, c, s, torch.zeros(3)), want, atol=1e-3)


def test_hue_turns_around_grey():
    x, one = torch.rand(2, 3, 5, 5, generator=make_generator(1)), torch.ones(2)
    assert torch.allclose(recolour(x, one, one, one, 2 * math.pi / 3 * one), x.roll(1, 1), atol=1e-5)
    turned = recolour(.3 + .4 * x, one, one, one, .4 * one)
    assert torch.allclose(recolour(turned, one, one, one, -.4 * one), .3 + .4 * x, atol=1e-5)
    assert torch.allclose(turned.mean(1), (.3 + .4 * x).mean(1), atol=1e-5)


def test_jitter_is_reproducible_and_stays_in_range():
    x = torch.rand(4, 3, 8, 8, generator=make_generator(2))
    assert torch.equal(jitter(x, make_generator(3)), jitter(x, make_generator(3)))
    assert torch.allclose(jitter(x, make_generator(3), NO_COLOUR_CHANGE), x, atol=1e-5)
    grey = jitter(x, make_generator(3), replace(NO_COLOUR_CHANGE, grey=1.))
    assert torch.allclose(grey[:, 0], grey[:, 1], atol=1e-5) and torch.allclose(grey[:, 0], grey[:, 2], atol=1e-5)
    loud = jitter(x, make_generator(4), AugmentConfig(brightness=.9, contrast=.9, saturation=.9, hue=.5))
    assert loud.min() >= 0 and loud.max() <= 1


# ---------------------------------------------------------------- from frame to frame
def test_drift_mixes_a_straight_line_with_draws_of_each_frame():
    straight = wander(make_generator(0), 9, 5, 1.)
    assert torch.allclose(straight.diff(dim=0).diff(dim=0), torch.zeros(7, 5), atol=1e-6)
    own = torch.cat([wander(make_generator(s), 2, 50, 0.) for s in range(40)], 1)
    assert abs(torch.corrcoef(own)[0, 1]) < .1
    assert wander(make_generator(0), 1, 3, .5).abs().max() <= 1


def test_frame_changes_stay_in_range():
    c = AugmentConfig(frame_turn=20, frame_scale=(.5, 2.), frame_shear=0, frame_shift=.1, bend_chance=.5)
    A, bend = frame_changes(make_generator(1), 400, c)
    scale = torch.linalg.det(A).pow(-.5)
    turn = torch.atan2(A[:, 1, 0], A[:, 0, 0])
    where = torch.linalg.inv(A)[:, :2, 2]
    assert .5 <= scale.min() and scale.max() <= 2 and turn.abs().max() <= math.radians(20) and where.abs().max() <= .2
    assert abs((bend.flatten(1).abs().amax(1) > 0).float().mean() - .5) < .1
    assert frame_changes(make_generator(1), 5, replace(c, bend_chance=0.))[1] is None


# ---------------------------------------------------------------- the window
@pytest.mark.parametrize("outside", ("grey", "reflect"))
def test_the_object_stays(outside):
    labels = torch.zeros(60, 100, dtype=torch.long)
    labels[48:58, 85:97] = 1
    c = AugmentConfig(zoom=(1.5, 2.5), outside=outside)
    for seed in range(40):
        clip = Clip(torch.rand(3, 3, 60, 100, generator=make_generator(seed)), labels.expand(3, -1, -1), "")
        assert (augment_clip(clip, make_generator(seed), 32, c).masks[0] == 1).any()


def test_share_inside_counts_what_is_rendered():
    labels = torch.zeros(60, 100, dtype=torch.long)
    labels[20:44, 30:62] = 1
    for seed in range(20):
        g = make_generator(seed)
        A, _ = frame_changes(g, 1, AugmentConfig(bend_chance=0))
        C = draw_crop(g, (60, 100), object_points(labels), A[0], AugmentConfig(zoom=(1., 4.), keep=0.))
        shown = sample_at(labels[None, None].float(), sampling_grid(C @ A, 90)).sum()
        share = shown * torch.linalg.det((C @ A)[0]).abs() * 60 * 100 / 90**2 / labels.sum()
        assert abs(share_inside(object_points(labels), (C @ A)[0]) - share) < .12


def test_object_points_lie_on_objects():
    for size in ((30, 40), (300, 500)):
        labels = torch.zeros(size, dtype=torch.long)
        labels[3:5, 7:9] = 3
        labels[10:25, 20:33] = 1
        p = (object_points(labels) + 1) / 2 * torch.tensor(size[::-1])
        assert 0 < len(p) <= 800 and (labels[p[:, 1].long(), p[:, 0].long()] > 0).all()
    assert len(object_points(torch.zeros(9, 9, dtype=torch.long))) == 0


def test_a_tiny_object_is_put_in_the_middle():
    labels = torch.zeros(50, 80, dtype=torch.long)
    labels[0, 0] = 1                                                                  # no window is there by chance
    c = AugmentConfig(zoom=(3., 3.), keep=1., tries=1)
    C = draw_crop(make_generator(0), (50, 80), object_points(labels), torch.eye(3), c)
    assert share_inside(object_points(labels), C) == 1


# ---------------------------------------------------------------- any clip
@pytest.mark.parametrize("size", (1, 16, 50))
@pytest.mark.parametrize("config", (VIDEO_AUGMENT, AugmentConfig(), AugmentConfig(outside="reflect", drift=.7)))
def test_an_augmented_clip_is_reproducible_and_valid(size, config):
    clip, before = clip_of(), torch.get_rng_state()
    a, b = (augment_clip(clip, make_generator(5), size, config) for _ in range(2))
    assert torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(clip.frames, clip_of().frames)
    assert a.frames.shape == (4, 3, size, size) and a.masks.shape == (4, size, size) and a.masks.dtype == torch.long
    assert a.frames.min() >= 0 and a.frames.max() <= 1 and set(a.masks.unique().tolist()) <= {0, 1, 2}
    other = augment_clip(clip, make_generator(6), size, config)
    assert size == 1 or not torch.equal(a.frames, other.frames)


def test_a_clip_without_objects_can_be_augmented():
    clip = clip_of()
    clip.masks[:] = 0
    assert augment_clip(clip, make_generator(0), 16).ids == []
    refused("size: expected 1 or more pixels, found 0", augment_clip, clip, make_generator(0), 0)


@pytest.mark.parametrize("field, value", (
    ("flip", 1.5), ("grey", -.1), ("zoom", (0., 1.)), ("zoom", (2., 1.)), ("frame_scale", (1.1, .9)), ("stretch", .5),
    ("tries", 0), ("bend", -1.), ("brightness", 2.), ("frame_contrast", -1.), ("outside", "black"), ("frame_turn", -3.),
    ("keep", 2.)))
def test_settings_outside_their_range_are_refused(field, value):
    refused([f"{field}: expected", "found"], AugmentConfig, **{field: value})


# ---------------------------------------------------------------- choosing objects
def test_chosen_objects_equal_those_found_by_loops():
    for seed in range(40):
        g = make_generator(seed)
        labels = torch.tensor([0, 3, 7, 2, -1])[torch.randint(5, (3, 6, 6), generator=g)]
        least, most = int(torch.randint(1, 10, (), generator=g)), int(torch.randint(1, 4, (), generator=g))
        new = choose_objects(labels, g, most, least)
        eligible = [i for i in (2, 3, 7) if (labels[0] == i).sum() >= least]
        pairs = {(a, b) for a, b in zip(labels.flatten().tolist(), new.flatten().tolist())}
        chosen = sorted(a for a, b in pairs if b > 0)
        assert all((a == -1) == (b == -1) for a, b in pairs) and len(pairs) == len({a for a, _ in pairs})
        assert set(chosen) <= set(eligible) and len(chosen) == min(most, len(eligible))
        assert [b for i in chosen for a, b in pairs if a == i] == list(range(1, len(chosen) + 1))


def test_objects_must_be_in_the_first_frame_to_be_chosen():
    g = make_generator(0)
    assert choose_objects(torch.full((2, 3, 3), -1), g, 2).unique().tolist() == [-1]
    late = torch.zeros(2, 3, 3, dtype=torch.long)
    late[1, 0, 0] = 4
    assert choose_objects(late, g, 2).unique().tolist() == [0]                        # first seen in the second frame
    row = torch.tensor([[[1, 2, 3]]])
    picks = {tuple(choose_objects(row, make_generator(s), 1).flatten().tolist()) for s in range(30)}
    assert picks == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}


# ---------------------------------------------------------------- pasting
def test_what_is_pasted_lies_in_front():
    g, labels = make_generator(0), torch.zeros(2, 5, 5, dtype=torch.long)
    behind, front = torch.rand(2, 2, 3, 5, 5, generator=g).unbind()
    alpha = torch.rand(2, 5, 5, generator=g)
    frames, ids = paste(behind, labels + 1, front, alpha, 7)
    assert torch.allclose(frames, behind * (1 - alpha[:, None]) + front * alpha[:, None], atol=1e-6)
    assert torch.equal(ids == 7, alpha >= .5) and set(ids.unique().tolist()) == {1, 7}


def test_a_pasted_object_gets_the_next_label_and_frames_without_annotation_stay_without():
    behind, over = clip_of(size=(24, 24)), clip_of(size=(24, 24), seed=7)
    behind.masks[2] = -1
    a, b = (paste_object(behind, over, make_generator(3), PasteConfig(grow=2.)) for _ in range(2))
    assert torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks)
    assert a.ids == [1, 2, 3] and (a.masks[2] == -1).all() and (a.masks[[0, 1, 3]] >= 0).all()
    assert torch.equal(behind.frames, clip_of(size=(24, 24)).frames)


def test_a_vanishing_object_is_there_in_the_first_frame_and_gone_in_the_last():
    for seed in range(10):
        behind, over = clip_of(size=(24, 24)), clip_of(size=(24, 24), seed=7)
        clip = paste_object(behind, over, make_generator(seed), PasteConfig(vanish=1.))
        shown = (clip.masks == 3).flatten(1).any(1).tolist()
        assert shown[0] and not shown[-1] and shown == sorted(shown, reverse=True)


@pytest.mark.parametrize("field, value", (("size", (0., 1.)), ("size", (2., 1.)), ("grow", .5), ("vanish", 1.5)))
def test_ways_of_pasting_outside_their_range_are_refused(field, value):
    refused([f"{field}: expected", "found"], PasteConfig, **{field: value})
