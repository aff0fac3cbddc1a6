"""Image files: dialects of masks, frames of any mode, resizing; what does not fit is refused in one line."""
import os

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import frame_pixels, label_map
from refusals import refused
from stremn.core import StremnError
from stremn.images import (
    PALETTE, fit_size, image_size, natural_key, read_frame, read_mask, resize_frame, resize_mask, to_frame, to_pixels,
    write_mask,
)

H, W = 12, 16


def voc_reference():
    "The published Matlab/Python loop of the VOC devkit, label by label."
    out = []
    for i in range(256):
        r = g = b = 0
        c = i
        for j in range(8):
            r, g, b = r | ((c & 1) << 7 - j), g | ((c >> 1 & 1) << 7 - j), b | ((c >> 2 & 1) << 7 - j)
            c >>= 3
        out.append((r, g, b))
    return np.array(out)


DAVIS = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128),
         (128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128),
         (64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128)]


def test_palette_is_the_voc_colour_map_that_davis_ships():
    assert (PALETTE == voc_reference()).all()
    assert PALETTE.dtype == np.uint8 and [tuple(c) for c in PALETTE[:len(DAVIS)].tolist()] == DAVIS
    assert tuple(PALETTE[255].tolist()) == (224, 224, 192), "void"
    assert len({tuple(c) for c in PALETTE.tolist()}) == 256


@pytest.mark.parametrize("seed", range(5))
def test_masks_of_any_ids_round_trip(tmp_path, seed):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 255, (H + seed, W), generator=rng)
    path = write_mask(tmp_path / "a" / "m.png", labels)
    assert torch.equal(read_mask(path), labels) and read_mask(path).dtype == torch.int64
    assert os.listdir(path.parent) == ["m.png"]
    with Image.open(path) as image:
        assert image.mode == "P" and image.getpalette()[:768] == PALETTE.ravel().tolist()


@pytest.mark.parametrize("seed", range(3))
def test_colour_masks_are_looked_up_backwards(tmp_path, seed):
    labels = np.random.default_rng(seed).integers(0, 255, (H, W))
    Image.fromarray(PALETTE[labels]).save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png").numpy() == labels).all()
    Image.fromarray(PALETTE[labels]).convert("RGBA").save(tmp_path / "a.png")
    assert (read_mask(tmp_path / "a.png").numpy() == labels).all()


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGB", "RGBA", "grey palette", "16 bit"])
def test_black_and_white_is_one_object(tmp_path, mode):
    one = label_map(ids=(1,))
    image = Image.fromarray(255 * one)
    if mode == "grey palette":
        image = image.copy()
        image.putpalette(np.arange(256).repeat(3).tolist())
    elif mode == "16 bit":
        image = Image.fromarray((65535 * one.astype(np.int32)).astype(np.uint16))
    else:
        image = image.convert(mode)
    image.save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png").numpy() == one).all()


def test_all_white_is_all_object_and_all_black_is_none(tmp_path):
    for value in (0, 255):
        Image.fromarray(np.full((H, W), value, np.uint8)).save(tmp_path / "m.png")
        assert read_mask(tmp_path / "m.png").unique().tolist() == [value // 255]


@pytest.mark.parametrize("ids", [(1, 2), (3, 200), (7,), (1, 254)])
def test_grey_ids_are_kept_as_they_are(tmp_path, ids):
    Image.fromarray(label_map(ids=ids)).save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png").numpy() == label_map(ids=ids)).all()


def test_255_is_unlabelled_in_a_palette_and_in_colour(tmp_path):
    labels = label_map(ids=(1, 255))
    image = Image.fromarray(labels)
    image.putpalette(PALETTE.ravel().tolist())
    image.save(tmp_path / "p.png")
    Image.fromarray(PALETTE[labels]).save(tmp_path / "c.png")
    want = np.where(labels == 255, -1, labels.astype(int))
    assert (read_mask(tmp_path / "p.png").numpy() == want).all()
    assert (read_mask(tmp_path / "c.png").numpy() == want).all()


def test_masks_that_are_none_are_refused_by_name(tmp_path):
    soft = tmp_path / "soft.png"
    Image.fromarray(255 * label_map(ids=(1,))).resize((40, 30), Image.Resampling.BILINEAR).save(soft)
    refused(["soft.png", "expected a mask", "levels"], read_mask, soft)
    Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W)).save(soft)
    refused(["soft.png", "levels"], read_mask, soft)
    Image.fromarray(PALETTE[label_map()]).resize((40, 30), Image.Resampling.BILINEAR).save(soft)
    refused(["soft.png", "palette", "colours outside it"], read_mask, soft)
    Image.fromarray(frame_pixels()).save(tmp_path / "photo.jpg")
    refused(["photo.jpg", "palette"], read_mask, tmp_path / "photo.jpg")
    Image.fromarray(frame_pixels()).convert("CMYK").save(tmp_path / "cmyk.tif")
    refused(["cmyk.tif", "CMYK"], read_mask, tmp_path / "cmyk.tif")
    refused(["none.png", "no such file"], read_mask, tmp_path / "none.png")


def test_write_mask_refuses_what_it_cannot_store_and_leaves_nothing(tmp_path):
    good = torch.zeros(H, W, dtype=torch.long)
    refused("from -1 to 254", write_mask, tmp_path / "m.png", good + 255)
    refused("from -1 to 254", write_mask, tmp_path / "m.png", good - 2)
    refused("whole numbers", write_mask, tmp_path / "m.png", good.float())
    refused("(H,W)", write_mask, tmp_path / "m.png", good[None])
    refused(".png", write_mask, tmp_path / "m.jpg", good)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_mask_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_mask(tmp_path / "m.png", torch.ones(H, W, dtype=torch.long))

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_mask(path, torch.zeros(H, W, dtype=torch.long))
    assert os.listdir(tmp_path) == ["m.png"] and read_mask(path).min() == 1


def test_frames_round_trip_and_stay_in_range(tmp_path):
    Image.fromarray(frame_pixels()).save(tmp_path / "f.png")
    frame = read_frame(tmp_path / "f.png")
    assert frame.shape == (3, H, W) and frame.dtype == torch.float32 and 0 <= frame.min() and frame.max() <= 1
    assert (to_pixels(frame) == frame_pixels()).all()
    assert (to_pixels((frame * 255).round().byte()) == frame_pixels()).all()


def test_frames_of_other_modes(tmp_path):
    grey = Image.fromarray(frame_pixels()[..., 0])
    grey.save(tmp_path / "l.png")
    Image.fromarray(frame_pixels()[..., 0].astype(np.uint16) * 257).save(tmp_path / "i.png")
    for name in ("l.png", "i.png"):
        assert torch.equal(read_frame(tmp_path / name), to_frame(frame_pixels()[..., :1].repeat(3, 2)))
    Image.fromarray(frame_pixels()).convert("RGBA").save(tmp_path / "a.png")
    assert torch.equal(read_frame(tmp_path / "a.png"), to_frame(frame_pixels()))


def test_orientation_of_photographs_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(frame_pixels()).save(tmp_path / "p.jpg", exif=exif)
    assert image_size(tmp_path / "p.jpg") == (W, H) == tuple(read_frame(tmp_path / "p.jpg").shape[-2:])


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "webp"])
def test_truncated_frames_never_pass_for_whole_ones(tmp_path, ending):
    path = tmp_path / f"f.{ending}"
    Image.fromarray(frame_pixels()).save(path)
    data, whole = path.read_bytes(), read_frame(path)
    caught = 0
    for cut in np.linspace(1, len(data) - 1, 25).astype(int):
        path.write_bytes(data[:cut])
        try:
            assert torch.equal(read_frame(path), whole)
        except StremnError as error:
            caught += path.name in str(error)
    assert caught > 20


def test_frames_that_are_none_are_refused_by_name(tmp_path):
    (tmp_path / "x.jpg").write_text("buy milk")
    refused(["x.jpg", "not an image"], read_frame, tmp_path / "x.jpg")
    (tmp_path / "e.jpg").touch()
    refused(["e.jpg", "0 bytes"], read_frame, tmp_path / "e.jpg")
    refused([tmp_path.name, "a folder"], read_frame, tmp_path)
    for bad in (torch.full((3, H, W), 200.), torch.full((3, H, W), float("nan")), torch.full((3, H, W), -.5)):
        refused("expected values in [0,1]", to_pixels, bad)
    refused("(3,H,W)", to_pixels, torch.zeros(H, W))


def test_natural_order():
    names = [f"{i}" for i in (1, 2, 9, 10, 11, 100)] + ["a1", "a2", "a10"]
    assert sorted(reversed(names), key=natural_key) == names


@pytest.mark.parametrize("seed", range(5))
def test_resizing_invents_no_labels_and_no_values(seed):
    g = torch.Generator().manual_seed(seed)
    h, w = (int(v) for v in torch.randint(1, 40, (2,), generator=g))
    labels = torch.randint(0, 3, (2, H, W), generator=g) * 100 - 1
    assert set(resize_mask(labels, (h, w)).unique().tolist()) <= set(labels.unique().tolist())
    frame = resize_frame(torch.rand(2, 3, H, W, generator=g), (h, w))
    assert frame.shape == (2, 3, h, w) and frame.min() >= 0 and frame.max() <= 1
    assert torch.equal(resize_mask(labels, (H, W)), labels)


def test_fit_size():
    assert fit_size((480, 854), 240) == (240, 427) and fit_size((854, 480), 240) == (427, 240)
    assert fit_size((10, 20), (3, 4)) == (3, 4)
    for bad in (0, -3, (0, 4), (1, 2, 3)):
        refused("size", fit_size, (10, 20), bad)
