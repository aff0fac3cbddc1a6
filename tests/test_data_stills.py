"""Stills to clips: grids against loops and libraries, labels that stay on objects, official trees, refusals."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.interpolate import RBFInterpolator
from scipy.io import loadmat, savemat
from torchvision.transforms import functional as tv

from stremn.core import make_generator
from stremn.data import stills
from stremn.data.clips import Clip
from stremn.data.augment import IMAGENET_GREY, HANDLES, VIDEO_AUGMENT, AugmentConfig, affine, augment_clip, choose_objects, crop, draw_crop, frame_changes, jitter, sample_at, object_points, paste, pixel_centres, recolour, resample, sampling_grid, share_inside, thin_plate, wander
from stremn.data.stills import Still, StillConfig, StillFolder, StillSampler, draw_polygons, moving_object, occluder, small_still, still_clip
from stremn.images import write_mask
from refusals import refused

H, W = 24, 36
QUIET = AugmentConfig(brightness=0, contrast=0, saturation=0, hue=0, grey=0, frame_brightness=0, frame_contrast=0,
                     frame_saturation=0)


def picture(seed=0, size=(H, W)):
    "Smooth random colours and two boxes."
    low = torch.rand(1, 3, 5, 6, generator=make_generator(seed))
    labels = torch.zeros(size, dtype=torch.long)
    h, w = size
    labels[h // 4:h // 2, w // 6:w // 2] = 1
    labels[h // 2:h * 3 // 4, w // 2:w * 5 // 6] = 2
    return F.interpolate(low, size, mode="bilinear")[0], labels


def clip_of(frames=4, size=(H, W), seed=0):
    made = [picture(seed + t, size) for t in range(frames)]
    return Clip(torch.stack([f for f, _ in made]), torch.stack([m for _, m in made]), "made")


def random_matrices(seed, n=4, size=(H, W)):
    g = make_generator(seed)
    u = 2 * torch.rand(n, 5, generator=g) - 1
    A = affine(3 * u[:, 0], 1 + .4 * u[:, 1], .4 * u[:, 2], .5 * u[:, 3:])
    v = (2 * torch.rand(4, generator=g) - 1).tolist()
    half = (20 * math.copysign(.6 + .4 * abs(v[0]), v[0]), 14 + 4 * v[1])
    return u, A, crop(size, (18 + 6 * v[2], 12 + 6 * v[3]), half), (18 + 6 * v[2], 12 + 6 * v[3]), half


# ---------------------------------------------------------------- where a pixel comes from
@pytest.mark.parametrize("seed", range(6))
def test_grid_against_the_steps_in_float64(seed):
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
def test_grid_is_pytorchs_affine_grid(seed):
    _, A, C, *_ = random_matrices(seed)
    want = F.affine_grid((C @ A)[:, :2], (len(A), 1, 11, 11), align_corners=False)
    assert torch.allclose(sampling_grid(C @ A, 11), want, atol=1e-5)


def test_identity_and_mirror_are_exact():
    frame, labels = picture(size=(24, 24))
    for half, want in (((12., 12.), lambda x: x), ((-12., 12.), lambda x: x.flip(-1))):
        grid = sampling_grid(crop((24, 24), (12., 12.), half)[None], 24)
        new, ids = resample(frame[None], labels[None], grid)
        assert torch.allclose(new[0], want(frame), atol=1e-5) and torch.equal(ids[0], want(labels))


@pytest.mark.parametrize("size", (1, 5, 16))
def test_thin_plate_against_scipy(size):
    line = np.linspace(-1, 1, HANDLES)
    held = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)                     # x fastest
    offsets = np.random.default_rng(size).normal(size=(HANDLES**2, 2))
    judge = RBFInterpolator(held, offsets, kernel="thin_plate_spline", degree=1)(pixel_centres(size).numpy())
    ours = thin_plate(size) @ torch.from_numpy(offsets).float()
    assert np.allclose(ours.numpy(), judge, atol=1e-4)


def test_thin_plate_rows_sum_to_one():
    assert torch.allclose(thin_plate(13).sum(1), torch.ones(169), atol=1e-5)  # all handles by one: all pixels by one


@pytest.mark.parametrize("outside", ("grey", "reflect"))
def test_labels_stay_on_their_objects(outside):
    frame, labels = picture(1)
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


def test_beyond_the_picture():
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
def test_recolour_against_torchvision():
    x = .35 + .3 * torch.rand(3, 3, 9, 11, generator=make_generator(0))
    b, c, s = torch.tensor([1.1, .9, 1.]), torch.tensor([.8, 1.2, 1.]), torch.tensor([1.2, .5, 0.])
    want = torch.stack([tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(f, p), q), r)
                        for f, p, q, r in zip(x, b.tolist(), c.tolist(), s.tolist())])
    assert torch.allclose(recolour(x, b, c, s, torch.zeros(3)), want, atol=1e-3)


def test_hue_turns_around_grey():
    x, one = torch.rand(2, 3, 5, 5, generator=make_generator(1)), torch.ones(2)
    assert torch.allclose(recolour(x, one, one, one, 2 * math.pi / 3 * one), x.roll(1, 1), atol=1e-5)
    there = recolour(.3 + .4 * x, one, one, one, .4 * one)
    assert torch.allclose(recolour(there, one, one, one, -.4 * one), .3 + .4 * x, atol=1e-5)
    assert torch.allclose(there.mean(1), (.3 + .4 * x).mean(1), atol=1e-5)


def test_jitter():
    x = torch.rand(4, 3, 8, 8, generator=make_generator(2))
    assert torch.equal(jitter(x, make_generator(3)), jitter(x, make_generator(3)))
    assert torch.allclose(jitter(x, make_generator(3), QUIET), x, atol=1e-5)
    grey = jitter(x, make_generator(3), replace(QUIET, grey=1.))
    assert torch.allclose(grey[:, 0], grey[:, 1], atol=1e-5) and torch.allclose(grey[:, 0], grey[:, 2], atol=1e-5)
    loud = jitter(x, make_generator(4), AugmentConfig(brightness=.9, contrast=.9, saturation=.9, hue=.5))
    assert loud.min() >= 0 and loud.max() <= 1


# ---------------------------------------------------------------- from frame to frame
def test_drift():
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
def test_change_clip(size, config):
    clip, before = clip_of(), torch.get_rng_state()
    a, b = (augment_clip(clip, make_generator(5), size, config) for _ in range(2))
    assert torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(clip.frames, clip_of().frames)
    assert a.frames.shape == (4, 3, size, size) and a.masks.shape == (4, size, size) and a.masks.dtype == torch.long
    assert a.frames.min() >= 0 and a.frames.max() <= 1 and set(a.masks.unique().tolist()) <= {0, 1, 2}
    other = augment_clip(clip, make_generator(6), size, config)
    assert size == 1 or not torch.equal(a.frames, other.frames)


def test_change_clip_without_objects():
    clip = clip_of()
    clip.masks[:] = 0
    assert augment_clip(clip, make_generator(0), 16).ids == []
    refused("size: expected 1 or more pixels, found 0", augment_clip, clip, make_generator(0), 0)


@pytest.mark.parametrize("field, value", (
    ("flip", 1.5), ("grey", -.1), ("zoom", (0., 1.)), ("zoom", (2., 1.)), ("frame_scale", (1.1, .9)), ("stretch", .5),
    ("tries", 0), ("bend", -1.), ("brightness", 2.), ("frame_contrast", -1.), ("outside", "black"), ("frame_turn", -3.),
    ("keep", 2.)))
def test_config_refuses(field, value):
    refused([f"{field}: expected", "found"], AugmentConfig, **{field: value})


@pytest.mark.parametrize("field, value", (
    ("paste", 2.), ("paste_size", (.5, .1)), ("occlude_size", (0., .1)), ("travel", -1.)))
def test_still_config_refuses(field, value):
    refused([f"{field}: expected", "found"], StillConfig, **{field: value})


# ---------------------------------------------------------------- choosing objects
def test_choose_objects_against_loops():
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


def test_choose_objects_edges():
    g = make_generator(0)
    assert choose_objects(torch.full((2, 3, 3), -1), g, 2).unique().tolist() == [-1]
    late = torch.zeros(2, 3, 3, dtype=torch.long)
    late[1, 0, 0] = 4
    assert choose_objects(late, g, 2).unique().tolist() == [0]                        # first seen in the second frame
    row = torch.tensor([[[1, 2, 3]]])
    picks = {tuple(choose_objects(row, make_generator(s), 1).flatten().tolist()) for s in range(30)}
    assert picks == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}


# ---------------------------------------------------------------- stills to clips
def disc(colour, size=(40, 52), radius=12):
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    inside = (y - size[0] // 2)**2 + (x - size[1] // 2)**2 < radius**2
    return Still((inside * torch.tensor(colour).reshape(3, 1, 1)).byte(), inside.byte(), f"disc {colour}")


RED, GREEN = disc((255, 0, 0)), disc((0, 255, 0))
WHITE = Still(torch.full((3, 30, 30), 255).byte(), torch.zeros(30, 30).byte())


@pytest.mark.parametrize("drift", (0., 1.))
def test_pixels_and_labels_agree(drift):
    config = StillConfig(replace(QUIET, drift=drift), least=0.)
    two = 0
    for seed in range(20):
        clip = still_clip(RED, make_generator(seed), 3, 48, 2, config, GREEN, WHITE)
        r, g, b = clip.frames.unbind(1)
        owner = {}
        for name, strength in (("red", r - g), ("green", g - r)):
            found = clip.masks[strength > .95].unique().tolist()
            assert len(found) <= 1, (seed, name, found)
            owner[name] = found[0] if found else None
        two += None not in owner.values() and owner["red"] != owner["green"] and 0 not in owner.values()
        assert (clip.masks[b > .95] == 0).all()
        assert clip.ids == list(range(1, len(clip.ids) + 1)) and all((clip.masks[0] == i).any() for i in clip.ids)
    assert two > 10


def test_still_clip_is_deterministic_and_local():
    before = torch.get_rng_state()
    a, b = (still_clip(RED, make_generator(2), 4, 32, 2, second=GREEN, hiding=WHITE) for _ in range(2))
    assert torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks)
    assert torch.equal(torch.get_rng_state(), before)
    assert a.frames.shape == (4, 3, 32, 32) and a.masks.dtype == torch.long
    assert 0 <= a.frames.min() and a.frames.max() <= 1


def test_one_object_means_one():
    for seed in range(5):
        assert len(still_clip(RED, make_generator(seed), 2, 32, 1, second=GREEN).ids) <= 1
    refused("objects: expected 1 or more, found 0", still_clip, RED, make_generator(0), objects=0)
    refused("object 5, found [1]", moving_object, RED, 5, make_generator(0), 2, 16, StillConfig())


def test_small_remains_are_background():
    config = StillConfig(QUIET, least=.9)
    assert still_clip(RED, make_generator(0), 2, 32, 2, config).ids == []


def test_single_frame_and_pasted_size():
    stiff = AugmentConfig(frame_turn=0, frame_shear=0, frame_scale=(1, 1), bend_chance=0)
    plain = StillConfig(stiff, paste_size=(.3, .3), travel=0.)
    for seed in range(10):
        colours, alpha = moving_object(GREEN, 1, make_generator(seed), 1, 100, plain)
        wide = (alpha[0] > .5).any(0).sum().item()
        high = (alpha[0] > .5).any(1).sum().item()
        assert colours.shape == (1, 3, 100, 100) and max(wide, high) <= 31
        if not (alpha[0, [0, -1]].any() or alpha[0][:, [0, -1]].any()) and alpha.any():
            assert abs(wide - 30) <= 2 and abs(high - 30) <= 2


def test_occluder_comes_from_outside():
    for seed in range(10):
        _, alpha = occluder(WHITE, make_generator(seed), 6, 64, StillConfig())
        area = alpha.flatten(1).mean(1)
        assert area[0] < area.max() and area.max() > .02 and 0 <= alpha.min() and alpha.max() <= 1


def test_paste_order():
    g, labels = make_generator(0), torch.zeros(2, 5, 5, dtype=torch.long)
    behind, front = torch.rand(2, 2, 3, 5, 5, generator=g).unbind()
    alpha = torch.rand(2, 5, 5, generator=g)
    frames, ids = paste(behind, labels + 1, front, alpha, 7)
    assert torch.allclose(frames, behind * (1 - alpha[:, None]) + front * alpha[:, None], atol=1e-6)
    assert torch.equal(ids == 7, alpha >= .5) and set(ids.unique().tolist()) == {1, 7}


def test_small_still():
    frame, labels = picture(0, (90, 120))
    s = small_still(frame, labels, 40, "x")
    assert s.image.shape == (3, 30, 40) and s.labels.shape == (30, 40) and s.ids == [1, 2] and s.name == "x"
    assert s.image.dtype == s.labels.dtype == torch.uint8
    assert torch.equal(small_still(frame, labels, 120).labels.long(), labels)
    assert Still(s.image, torch.ones(30, 40).byte()).ids == [1]


# ---------------------------------------------------------------- official trees
def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def photo(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def saliency(levels=(0, 255)):
    out = np.full((H, W), levels[0], np.uint8)
    out[6:18, 8:28] = levels[-1]
    if len(levels) > 2:
        out[6, 8:28] = levels[1]
    return out


def people():
    out = np.zeros((H, W), np.uint8)
    out[4:20, 4:12], out[4:20, 20:28] = 1, 2
    return out


PAIRS = {"ecssd": ("images/{}.jpg", "ground_truth_mask/{}.png", saliency),
         "hku-is": ("imgs/{}.png", "gt/{}.png", saliency),
         "msra10k": ("MSRA10K_Imgs_GT/Imgs/{}.jpg", "MSRA10K_Imgs_GT/Imgs/{}.png", saliency),
         "pennfudan": ("PNGImages/{}.png", "PedMasks/{}_mask.png", people),
         "folders": ("images/{}.jpg", "masks/{}.png", people)}


def make_tree(root, layout, names=("2", "10")):
    image, mask, draw = PAIRS[layout]
    for k, name in enumerate(names):
        save(root / image.format(name), photo(k))
        save(root / mask.format(name), draw())


@pytest.mark.parametrize("layout", PAIRS)
def test_layouts(layout, tmp_path):
    make_tree(tmp_path, layout)
    for s in (StillFolder(tmp_path), StillFolder(tmp_path, layout)):
        assert s.layout == layout and s.names == ["2", "10"] and len(s) == 2
        frame, labels = s[1]
        assert frame.shape == (3, H, W) and frame.dtype == torch.float32
        assert (labels.numpy() > 0).tolist() == (PAIRS[layout][2]() > 0).tolist()
        assert labels.max() == (2 if PAIRS[layout][2] is people else 1)


@pytest.mark.parametrize("compressed", (False, True))
@pytest.mark.parametrize("dtype", (np.uint8, np.uint16, np.float64))
def test_sbd_against_scipy(tmp_path, dtype, compressed):
    file = tmp_path / "inst" / "2008_000002.mat"
    save(tmp_path / "img" / "2008_000002.jpg", photo())
    file.parent.mkdir()
    fields = {"Boundaries": [[1, 2]], "Segmentation": people().astype(dtype), "Categories": np.array([[15], [15]])}
    savemat(file, {"other": np.eye(3), "GTinst": fields}, do_compression=compressed)
    s = StillFolder(tmp_path)
    assert s.layout == "sbd" and s[0][1].tolist() == loadmat(file)["GTinst"]["Segmentation"][0, 0].tolist()
    data = file.read_bytes()
    for broken in (b"not a matrix", data[:300], data[:128], data[:126] + b"MI" + data[128:]):
        file.write_bytes(broken)
        refused(["2008_000002.mat: expected a mask of SBD, found"], s.__getitem__, 0)
    savemat(file, {"GTcls": fields})
    refused(["expected a mask of SBD, found KeyError"], s.__getitem__, 0)
    refused("found no such file", stills.read_sbd, tmp_path / "none.mat")


def box(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def make_coco(root, annotations, pictures=(7, 40), split="train2017"):
    for k in pictures:
        save(root / split / f"{k:012d}.jpg", photo(k))
    (root / "annotations").mkdir(exist_ok=True)
    images = [{"id": k, "file_name": f"{k:012d}.jpg"} for k in (7, 40)]
    listed = json.dumps({"images": images, "annotations": annotations})
    (root / "annotations" / f"instances_{split}.json").write_text(listed)


def test_coco(tmp_path):
    crowd = {"image_id": 40, "area": 9, "iscrowd": 1, "segmentation": {"counts": [3], "size": [H, W]}}
    small = {"image_id": 7, "area": 36, "iscrowd": 0, "segmentation": [box(10, 10, 5, 5)]}
    large = {"image_id": 7, "area": 300, "iscrowd": 0, "segmentation": [box(4, 4, 19, 15), box(30, 2, 3, 3)]}
    make_coco(tmp_path, [small, crowd, large])
    s = StillFolder(tmp_path)
    assert s.layout == "coco" and s.names == ["000000000007"]                         # 40 has only a crowd
    labels = s[0][1]
    assert labels[12, 12] == 2 and labels[6, 6] == 1 and labels[3, 31] == 1 and labels[0, 0] == 0 and labels.max() == 2


def test_polygons_against_point_in_polygon():
    g = make_generator(0)
    for _ in range(20):
        angle = torch.rand(6, generator=g).mul(2 * math.pi).sort().values
        radius = 8 + 6 * torch.rand(6, generator=g)
        x, y = 20 + radius * angle.cos(), 18 + radius * angle.sin()
        mask = draw_polygons([[torch.stack([x, y], 1).flatten().tolist()]], (36, 40))
        area = (x * y.roll(-1) - y * x.roll(-1)).sum().abs() / 2
        edge = torch.stack([x.roll(-1) - x, y.roll(-1) - y]).norm(dim=0).sum()
        assert abs(mask.sum() - area) <= edge                                     # a pixel on either side


def test_refusals(tmp_path):
    refused(["nowhere: expected a folder", "no such folder"], StillFolder, tmp_path / "nowhere")
    refused(["expected folders", "images + masks", "found nothing"], StillFolder, tmp_path)
    make_tree(tmp_path / "a", "folders")
    refused("layout: expected one of auto, coco", StillFolder, tmp_path / "a", "davis")
    refused("instances_train2017.json: expected COCO's instances, found no", StillFolder, tmp_path / "a", "coco")
    save(tmp_path / "a" / "masks" / "10.png", np.zeros((H, W + 1), np.uint8))
    refused(["10.jpg", f"expected a mask of {W}x{H}", f"found {W + 1}x{H}"], StillFolder(tmp_path / "a").__getitem__, 1)
    (tmp_path / "a" / "masks" / "10.png").unlink()
    refused(["10.jpg: expected a picture", "a mask"], StillFolder, tmp_path / "a")
    (tmp_path / "a" / "images" / "10.jpg").unlink()
    save(tmp_path / "a" / "masks" / "77.png", people())
    refused(["77.png: expected a picture"], StillFolder, tmp_path / "a")
    (tmp_path / "a" / "masks" / "77.png").unlink()
    (tmp_path / "a" / "images" / "2.jpg").write_bytes(b"no image")
    refused(["2.jpg: expected a frame"], StillFolder(tmp_path / "a").__getitem__, 0)


def test_coco_refusals(tmp_path):
    one = {"image_id": 7, "area": 1, "iscrowd": 0, "segmentation": [box(2, 2, 5, 5)]}
    make_coco(tmp_path, [one], pictures=(40,))
    refused(["000000000007.jpg: expected the 1 pictures", "1 of them missing"], StillFolder, tmp_path)
    make_coco(tmp_path, [{**one, "image_id": 8}])
    refused("found KeyError", StillFolder, tmp_path)
    make_coco(tmp_path, [])
    refused("expected pictures with objects, found none", StillFolder, tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{")
    refused("found JSONDecodeError", StillFolder, tmp_path)


def test_soft_masks_need_a_threshold(tmp_path):
    save(tmp_path / "images" / "a.png", photo())
    soft = np.linspace(0, 255, H * W).reshape(H, W).astype(np.uint8)
    save(tmp_path / "masks" / "a.png", soft)
    refused(["a.png: expected a mask", "with threshold="], StillFolder(tmp_path).__getitem__, 0)
    for cut in (1, 100, 128, 255):
        assert StillFolder(tmp_path, threshold=cut)[0][1].tolist() == (soft >= cut).astype(int).tolist()
    named = StillFolder(tmp_path, "ecssd")
    assert named.threshold == 128 and named[0][1].sum() == (soft >= 128).sum()


def test_unlabelled_pixels_are_background(tmp_path):
    save(tmp_path / "images" / "a.png", photo())
    labels = torch.from_numpy(people()).long()
    labels[0] = -1
    write_mask(tmp_path / "masks" / "a.png", labels)
    assert StillFolder(tmp_path)[0][1].unique().tolist() == [0, 1, 2]


# ---------------------------------------------------------------- an endless supply
def test_stills(tmp_path, monkeypatch):
    make_tree(tmp_path / "a", "folders")
    make_tree(tmp_path / "b", "ecssd")
    read, calls = stills.read_frame, []
    monkeypatch.setattr(stills, "read_frame", lambda p: calls.append(p) or read(p))
    folders = [StillFolder(tmp_path / n) for n in "ab"]
    kept, fresh = StillSampler(folders, side=20), StillSampler(folders, side=20, megabytes=0)
    for seed in range(12):
        a, b = (s.sample(make_generator(seed), 3, 24, 3) for s in (kept, fresh))
        assert torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks) and a.name == b.name
        assert a.frames.shape == (3, 3, 24, 24) and a.ids and all((a.masks[0] == i).any() for i in a.ids)
    before = len(calls)
    for seed in range(12):
        kept.sample(make_generator(seed), 3, 24, 3)
    assert len(calls) == before and len(kept) == 4 and max(kept.still(0).labels.shape) == 20 and not fresh.kept


def test_stills_from_memory_and_alone(tmp_path):
    assert StillSampler([[RED, GREEN]]).sample(make_generator(0), 2, 16).frames.shape == (2, 3, 16, 16)
    make_tree(tmp_path, "folders")
    assert len(StillSampler(StillFolder(tmp_path))) == 2
    refused("stills: expected at least one, found none", StillSampler, [])
    refused("stills: expected an object to follow, found none", StillSampler([[WHITE]]).sample, make_generator(0), 2, 16)


@pytest.mark.parametrize("name, count, most", (("ecssd", 1000, 1), ("pennfudan", 170, 8)))
def test_real_stills(data_root, name, count, most):
    root = data_root / name
    if not root.is_dir():
        pytest.skip(f"no {name} at {root}")
    folder = StillFolder(root)
    assert len(folder) == count and folder.layout == "folders"
    for i in range(0, count, count // 8):
        frame, labels = folder[i]
        assert frame.shape[-2:] == labels.shape and 1 <= labels.max() <= most
    supply = StillSampler(folder)
    for seed in range(6):
        clip = supply.sample(make_generator(seed), 3, 64, 2)
        assert clip.ids and (clip.masks[0] > 0).float().mean() > .004
