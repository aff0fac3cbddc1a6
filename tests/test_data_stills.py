"""Stills to clips: labels that stay on their objects, official trees of pictures, refusals."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from helpers import (
    NO_COLOUR_CHANGE, STILL_LAYOUTS, STILL_SIZE, box_polygon, boxes_picture, make_coco, make_stills, people_mask,
    save_pixels, write_picture,
)
from refusals import refused
from stremn.core import make_generator
from stremn.data import stills
from stremn.data.augment import AugmentConfig
from stremn.data.stills import (
    Still, StillConfig, StillFolder, StillSampler, draw_polygons, moving_object, occluder, small_still, still_clip,
)
from stremn.images import write_mask

H, W = STILL_SIZE


# ---------------------------------------------------------------- stills to clips
def disc(colour, size=(40, 52), radius=12):
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    inside = (y - size[0] // 2)**2 + (x - size[1] // 2)**2 < radius**2
    return Still((inside * torch.tensor(colour).reshape(3, 1, 1)).byte(), inside.byte(), f"disc {colour}")


RED, GREEN = disc((255, 0, 0)), disc((0, 255, 0))
WHITE = Still(torch.full((3, 30, 30), 255).byte(), torch.zeros(30, 30).byte())


@pytest.mark.parametrize("drift", (0., 1.))
def test_pixels_and_labels_agree(drift):
    config = StillConfig(replace(NO_COLOUR_CHANGE, drift=drift), least=0.)
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


@pytest.mark.parametrize("field, value", (
    ("paste", 2.), ("paste_size", (.5, .1)), ("occlude_size", (0., .1)), ("travel", -1.)))
def test_settings_outside_their_range_are_refused(field, value):
    refused([f"{field}: expected", "found"], StillConfig, **{field: value})


def test_small_remains_are_background():
    config = StillConfig(NO_COLOUR_CHANGE, least=.9)
    assert still_clip(RED, make_generator(0), 2, 32, 2, config).ids == []


def test_a_pasted_object_has_the_size_asked_for():
    stiff = AugmentConfig(frame_turn=0, frame_shear=0, frame_scale=(1, 1), bend_chance=0)
    plain = StillConfig(stiff, paste_size=(.3, .3), travel=0.)
    for seed in range(10):
        colours, alpha = moving_object(GREEN, 1, make_generator(seed), 1, 100, plain)
        wide = (alpha[0] > .5).any(0).sum().item()
        high = (alpha[0] > .5).any(1).sum().item()
        assert colours.shape == (1, 3, 100, 100) and max(wide, high) <= 31
        if not (alpha[0, [0, -1]].any() or alpha[0][:, [0, -1]].any()) and alpha.any():
            assert abs(wide - 30) <= 2 and abs(high - 30) <= 2


def test_an_occluder_comes_from_outside():
    for seed in range(10):
        _, alpha = occluder(WHITE, make_generator(seed), 6, 64, StillConfig())
        area = alpha.flatten(1).mean(1)
        assert area[0] < area.max() and area.max() > .02 and 0 <= alpha.min() and alpha.max() <= 1


def test_a_small_still_keeps_shape_and_labels():
    frame, labels = boxes_picture(0, (90, 120))
    s = small_still(frame, labels, 40, "x")
    assert s.image.shape == (3, 30, 40) and s.labels.shape == (30, 40) and s.ids == [1, 2] and s.name == "x"
    assert s.image.dtype == s.labels.dtype == torch.uint8
    assert torch.equal(small_still(frame, labels, 120).labels.long(), labels)
    assert Still(s.image, torch.ones(30, 40).byte()).ids == [1]


# ---------------------------------------------------------------- official trees
@pytest.mark.parametrize("layout", STILL_LAYOUTS)
def test_each_layout_is_recognised_and_read(layout, tmp_path):
    make_stills(tmp_path, layout)
    for s in (StillFolder(tmp_path), StillFolder(tmp_path, layout)):
        assert s.layout == layout and s.names == ["2", "10"] and len(s) == 2
        frame, labels = s[1]
        assert frame.shape == (3, H, W) and frame.dtype == torch.float32
        assert (labels.numpy() > 0).tolist() == (STILL_LAYOUTS[layout][2]() > 0).tolist()
        assert labels.max() == (2 if STILL_LAYOUTS[layout][2] is people_mask else 1)


@pytest.mark.parametrize("compressed", (False, True))
@pytest.mark.parametrize("dtype", (np.uint8, np.uint16, np.float64))
def test_masks_of_sbd_equal_scipys(tmp_path, dtype, compressed):
    file = tmp_path / "inst" / "2008_000002.mat"
    write_picture(tmp_path / "img" / "2008_000002.jpg", 0, STILL_SIZE)
    file.parent.mkdir()
    fields = {"Boundaries": [[1, 2]], "Segmentation": people_mask().astype(dtype), "Categories": np.array([[15], [15]])}
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


def test_coco_skips_crowds_and_puts_small_objects_in_front(tmp_path):
    crowd = {"image_id": 40, "area": 9, "iscrowd": 1, "segmentation": {"counts": [3], "size": [H, W]}}
    small = {"image_id": 7, "area": 36, "iscrowd": 0, "segmentation": [box_polygon(10, 10, 5, 5)]}
    outlines = [box_polygon(4, 4, 19, 15), box_polygon(30, 2, 3, 3)]
    large = {"image_id": 7, "area": 300, "iscrowd": 0, "segmentation": outlines}
    make_coco(tmp_path, [small, crowd, large])
    s = StillFolder(tmp_path)
    assert s.layout == "coco" and s.names == ["000000000007"]                         # 40 has only a crowd
    labels = s[0][1]
    assert labels[12, 12] == 2 and labels[6, 6] == 1 and labels[3, 31] == 1 and labels[0, 0] == 0 and labels.max() == 2


def test_polygons_have_the_area_of_their_outlines():
    g = make_generator(0)
    for _ in range(20):
        angle = torch.rand(6, generator=g).mul(2 * math.pi).sort().values
        radius = 8 + 6 * torch.rand(6, generator=g)
        x, y = 20 + radius * angle.cos(), 18 + radius * angle.sin()
        mask = draw_polygons([[torch.stack([x, y], 1).flatten().tolist()]], (36, 40))
        area = (x * y.roll(-1) - y * x.roll(-1)).sum().abs() / 2
        edge = torch.stack([x.roll(-1) - x, y.roll(-1) - y]).norm(dim=0).sum()
        assert abs(mask.sum() - area) <= edge                                     # a pixel on either side


def test_folders_that_do_not_fit_are_refused(tmp_path):
    refused(["nowhere: expected a folder", "no such folder"], StillFolder, tmp_path / "nowhere")
    refused(["expected folders", "images + masks", "found nothing"], StillFolder, tmp_path)
    make_stills(tmp_path / "a", "folders")
    refused("layout: expected one of auto, coco", StillFolder, tmp_path / "a", "davis")
    refused("instances_train2017.json: expected COCO's instances, found no", StillFolder, tmp_path / "a", "coco")
    save_pixels(tmp_path / "a" / "masks" / "10.png", np.zeros((H, W + 1), np.uint8))
    refused(["10.jpg", f"expected a mask of {W}x{H}", f"found {W + 1}x{H}"], StillFolder(tmp_path / "a").__getitem__, 1)
    (tmp_path / "a" / "masks" / "10.png").unlink()
    refused(["10.jpg: expected a picture", "a mask"], StillFolder, tmp_path / "a")
    (tmp_path / "a" / "images" / "10.jpg").unlink()
    save_pixels(tmp_path / "a" / "masks" / "77.png", people_mask())
    refused(["77.png: expected a picture"], StillFolder, tmp_path / "a")
    (tmp_path / "a" / "masks" / "77.png").unlink()
    (tmp_path / "a" / "images" / "2.jpg").write_bytes(b"no image")
    refused(["2.jpg: expected a frame"], StillFolder(tmp_path / "a").__getitem__, 0)


def test_broken_trees_of_coco_are_refused(tmp_path):
    one = {"image_id": 7, "area": 1, "iscrowd": 0, "segmentation": [box_polygon(2, 2, 5, 5)]}
    make_coco(tmp_path, [one], pictures=(40,))
    refused(["000000000007.jpg: expected the 1 pictures", "1 of them missing"], StillFolder, tmp_path)
    make_coco(tmp_path, [{**one, "image_id": 8}])
    refused("found KeyError", StillFolder, tmp_path)
    make_coco(tmp_path, [])
    refused("expected pictures with objects, found none", StillFolder, tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{")
    refused("found JSONDecodeError", StillFolder, tmp_path)


def test_soft_masks_need_a_threshold(tmp_path):
    write_picture(tmp_path / "images" / "a.png", 0, STILL_SIZE)
    soft = np.linspace(0, 255, H * W).reshape(H, W).astype(np.uint8)
    save_pixels(tmp_path / "masks" / "a.png", soft)
    refused(["a.png: expected a mask", "with threshold="], StillFolder(tmp_path).__getitem__, 0)
    for cut in (1, 100, 128, 255):
        assert StillFolder(tmp_path, threshold=cut)[0][1].tolist() == (soft >= cut).astype(int).tolist()
    named = StillFolder(tmp_path, "ecssd")
    assert named.threshold == 128 and named[0][1].sum() == (soft >= 128).sum()


def test_unlabelled_pixels_are_background(tmp_path):
    write_picture(tmp_path / "images" / "a.png", 0, STILL_SIZE)
    labels = torch.from_numpy(people_mask()).long()
    labels[0] = -1
    write_mask(tmp_path / "masks" / "a.png", labels)
    assert StillFolder(tmp_path)[0][1].unique().tolist() == [0, 1, 2]


# ---------------------------------------------------------------- an endless supply
def test_the_sampler_decodes_each_picture_once(tmp_path, monkeypatch):
    make_stills(tmp_path / "a", "folders")
    make_stills(tmp_path / "b", "ecssd")
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


def test_the_sampler_takes_stills_in_memory_and_a_single_folder(tmp_path):
    assert StillSampler([[RED, GREEN]]).sample(make_generator(0), 2, 16).frames.shape == (2, 3, 16, 16)
    make_stills(tmp_path, "folders")
    assert len(StillSampler(StillFolder(tmp_path))) == 2
    refused("stills: expected at least one, found none", StillSampler, [])
    empty = StillSampler([[WHITE]])
    refused("stills: expected an object to follow, found none", empty.sample, make_generator(0), 2, 16)


@pytest.mark.parametrize("name, count, most", (("ecssd", 1000, 1), ("pennfudan", 170, 8)))
def test_real_stills_are_read_and_sampled(data_root, name, count, most):
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
