"""Image files: dialects of masks, frames of any mode, resizing; what does not fit is refused in one line."""
import os
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from helpers import frame_pixels, label_map
from refusals import refused
from stremn.core import StremnError
from stremn.images import (
    PALETTE, as_frame, as_labels, fit_size, image_size, list_pictures, mask_doubts, natural_key, natural_order,
    read_frame, read_mask, resize_frame, resize_mask, to_frame, to_pixels, understand_mask, write_mask,
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
    labels = np.kron(np.random.default_rng(seed).integers(0, 255, (H, W)), np.ones((4, 4), int))
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
    wide = Image.fromarray(255 * (ROUND == 1).astype(np.uint8)).filter(ImageFilter.GaussianBlur(20))
    wide.save(soft)
    refused(["soft.png", "expected a mask in flat colours", "without smoothing"], read_mask, soft)
    Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W)).save(soft)
    refused(["soft.png", "found 192 colours or grey levels"], read_mask, soft)
    Image.fromarray(COLOURS[ROUND]).convert("P").save(soft)                               # the whole object is dithered
    refused(["soft.png", "flat colours"], read_mask, soft)
    Image.fromarray(frame_pixels(size=(60, 80))).save(tmp_path / "photo.jpg")
    refused(["photo.jpg", "a photograph?"], read_mask, tmp_path / "photo.jpg")
    Image.fromarray(frame_pixels()).convert("CMYK").save(tmp_path / "cmyk.tif")
    refused(["cmyk.tif", "CMYK"], read_mask, tmp_path / "cmyk.tif")
    refused(["none.png", "no such file"], read_mask, tmp_path / "none.png")
    Image.fromarray(np.where(ROUND == 2, 255, ROUND).astype(np.uint8)).save(soft)
    refused(["soft.png", "0, 1, 255", "unlabelled"], read_mask, soft)                     # void, or an object?


# ---------------------------------------------------------------- what a person sees
Y, X = np.ogrid[:120, :160]
ROUND = np.where((Y - 70) ** 2 + (X - 90) ** 2 < 900, 1, 0)                               # a disc, 1, below a box, 2
ROUND[10:35, 10:60] = 2
COLOURS = np.array([(0, 0, 0), (200, 30, 30), (20, 180, 40)], np.uint8)
DISC = np.where(ROUND == 1, 1, 0)
WHITE = np.uint8(255) * DISC[..., None].astype(np.uint8).repeat(3, 2)
SEEN = np.array([0, 2, 1])[ROUND]                                                         # the box comes first


def with_palette(indices, colours):
    "A palette picture."
    image = Image.fromarray(np.asarray(indices, np.uint8))
    image.putpalette(np.asarray(colours, np.uint8).ravel().tolist())
    return image


def with_alpha(colour, alpha):
    "An RGBA picture."
    return Image.fromarray(np.dstack([np.broadcast_to(colour, (120, 160, 3)), alpha]).astype(np.uint8))


def compressed(image, kind="JPEG", **how):
    "A picture that went through a lossy file."
    file = BytesIO()
    image.save(file, kind, **how)
    return Image.open(file)


def blurred(pixels, radius):
    "Soft edges."
    return Image.fromarray(np.asarray(pixels, np.uint8)).filter(ImageFilter.GaussianBlur(radius))


def halved(pixels):
    "Antialiased by a factor of two."
    return Image.fromarray(pixels).resize((80, 60), Image.Resampling.BOX)


def read_back(tmp_path, image, **how):
    "The labels of a picture in a file."
    image.save(tmp_path / "m.png", **how)
    return read_mask(tmp_path / "m.png").numpy()


FILLERS = [(9, 9, 9)] * 254
PALETTES = {
    "quantize puts white first": (Image.fromarray(WHITE).quantize(2), DISC),
    "pngquant permutes DAVIS": (with_palette(np.array([2, 0, 1])[ROUND], PALETTE[[1, 2, 0]]), ROUND),
    "quantize permutes DAVIS": (Image.fromarray(PALETTE[ROUND]).quantize(256), ROUND),
    "quantize of other colours": (Image.fromarray(COLOURS[ROUND]).quantize(3), SEEN),
    "labelme and CVAT": (with_palette(np.array([0, 2, 4])[ROUND], [(0, 0, 0), (9, 9, 9), (255, 0, 0), (9, 9, 9),
                                                                   (10, 200, 30)]), np.array([0, 2, 4])[ROUND]),
    "white background, index 0": (with_palette(ROUND, [(255, 255, 255), (255, 0, 0), (10, 200, 30)]), ROUND),
    "one late object of YouTube-VOS": (with_palette(9 * DISC, [(0, 0, 0), *FILLERS[:8], (255, 255, 255)]), 9 * DISC),
    "no background, index 0 unused": (with_palette(2 - DISC, [(0, 0, 0), (236, 95, 103), (249, 145, 87)]), 2 - DISC),
    "white on black at 255": (with_palette(255 * DISC, [(0, 0, 0), *FILLERS, (255, 255, 255)]), DISC),
    "red on black at 255": (with_palette(255 * DISC, [(0, 0, 0), *FILLERS, (255, 0, 0)]), DISC),
    "void in DAVIS's colour": (with_palette(255 * DISC, PALETTE), -DISC),
    "void beside an object": (with_palette(np.array([0, 255, 1])[ROUND], [
        (0, 0, 0), (200, 0, 0), *FILLERS[1:], (255, 255, 255)]), np.array([0, -1, 1])[ROUND]),
}


@pytest.mark.parametrize("name", PALETTES)
def test_a_palette_is_trusted_unless_its_colours_contradict_it(tmp_path, name):
    image, wanted = PALETTES[name]
    assert image.mode == "P" and (read_back(tmp_path, image) == wanted).all()


CLEAR = ROUND == 0
ALPHA = {
    "white, and its shape": (with_alpha((255, 255, 255), 255 * DISC), DISC),
    "black, and its shape": (with_alpha((0, 0, 0), 255 * DISC), DISC),
    "half transparent": (with_alpha((255, 255, 255), 128 * DISC), DISC),
    "grey with alpha": (with_alpha((255, 255, 255), 255 * DISC).convert("LA"), DISC),
    "black on hidden white": (with_alpha(255 - WHITE, 255 * DISC), DISC),
    "two colours on hidden white": (with_alpha(np.where(CLEAR[..., None], 255, COLOURS[ROUND]), 255 * ~CLEAR), SEEN),
    "DAVIS on hidden black": (with_alpha(PALETTE[ROUND], 255 * ~CLEAR), ROUND),
    "opaque": (with_alpha(PALETTE[ROUND], np.full((120, 160), 255)), ROUND),
    "a palette of levels of alpha": (with_alpha((255, 255, 255), 255 * DISC).quantize(2), DISC),
}


@pytest.mark.parametrize("name", ALPHA)
def test_transparency_is_what_one_sees(tmp_path, name):
    image, wanted = ALPHA[name]
    assert (read_back(tmp_path, image) == wanted).all()


def test_transparent_entries_of_a_palette_and_of_grey(tmp_path):
    assert (read_back(tmp_path, with_palette(ROUND, PALETTE), transparency=0) == ROUND).all()
    assert (read_back(tmp_path, Image.fromarray(ROUND.astype(np.uint8)), transparency=0) == ROUND).all()


def test_a_cut_out_photograph_is_its_opaque_part_with_a_word(tmp_path):
    with pytest.warns(UserWarning, match="photograph"):
        assert (read_back(tmp_path, with_alpha(frame_pixels(size=(120, 160)), 255 * DISC)) == DISC).all()


def test_colours_and_transparency_that_disagree_are_refused(tmp_path):
    half = np.broadcast_to(255 * (X < 80), (120, 160))
    with_alpha(COLOURS[ROUND], half).save(tmp_path / "m.png")
    refused(["m.png", "hidden below", "without transparency"], read_mask, tmp_path / "m.png")


RED = np.dstack([255 * DISC, 0 * DISC, 0 * DISC]).astype(np.uint8)
SOFT = {
    "blurred grey": (blurred(255 * DISC, .7), DISC),
    "blurred grey, far": (blurred(255 * DISC, 2), DISC),
    "blurred grey in a palette": (blurred(255 * DISC, .7).convert("P"), DISC),
    "blurred red in a web palette": (blurred(RED, .7).convert("P"), DISC),
    "blurred, of eight levels": (blurred(255 * DISC, .7).quantize(8), DISC),
    "blurred, 16 bits": (Image.fromarray(np.asarray(blurred(255 * DISC, .7)).astype(np.uint16) * 257), DISC),
    "blurred transparency": (with_alpha((255, 255, 255), np.asarray(blurred(255 * DISC, .7))), DISC),
    "grey JPEG": (compressed(Image.fromarray(128 * DISC.astype(np.uint8)), quality=95), 128 * DISC),
    "white JPEG": (compressed(Image.fromarray(WHITE), quality=75), DISC),
    "red JPEG": (compressed(Image.fromarray(RED), quality=75), DISC),
    "two colours, JPEG": (compressed(Image.fromarray(COLOURS[ROUND]), quality=92, subsampling=0), SEEN),
    "two colours, WebP": (compressed(Image.fromarray(COLOURS[ROUND]), "WEBP", quality=85), SEEN),
    "two colours, blurred": (blurred(COLOURS[ROUND], .7), SEEN),
    "DAVIS, blurred": (blurred(PALETTE[ROUND], .7), ROUND),
}


@pytest.mark.parametrize("name", SOFT)
def test_soft_edges_and_noise_are_cleaned_with_a_word(tmp_path, name):
    image, wanted = SOFT[name]
    with pytest.warns(UserWarning, match="m.png: .* pixels of soft edges or noise"):
        got = read_back(tmp_path, image)
    assert set(got.ravel().tolist()) == set(wanted.ravel().tolist())
    assert (got != wanted).mean() < .005                                                  # edges may move by a pixel


@pytest.mark.parametrize("name", ["DAVIS", "other colours", "ids"])
def test_halved_masks_keep_their_objects(tmp_path, name):
    "Halved DAVIS colours are DAVIS colours, of other ids; halved ids 0 and 2 give a 1, and are refused."
    if name == "ids":
        halved((2 * DISC).astype(np.uint8)).save(tmp_path / "m.png")
        return refused(["m.png", "interpolation"], read_mask, tmp_path / "m.png")
    with pytest.warns(UserWarning, match="soft edges"):
        got = read_back(tmp_path, halved((PALETTE if name == "DAVIS" else COLOURS)[ROUND]))
    wanted = (ROUND if name == "DAVIS" else SEEN)[::2, ::2]
    assert set(got.ravel().tolist()) == {0, 1, 2} and (got != wanted).mean() < .02


def small_objects(seed, n=60):
    "Blobs of 20 pixels here and there, ids 1 to n; the later lie above."
    rng = np.random.default_rng(seed)
    labels = np.zeros((120, 160), np.uint8)
    for i in range(1, n + 1):
        y, x = rng.integers(0, 115), rng.integers(0, 155)
        labels[y:y + 4, x:x + 5] = i
    return labels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("error")
def test_true_masks_are_read_exactly(tmp_path, seed):
    "Many small objects, a grid of cells without gaps, one object in another, a thin ring, lines of one pixel."
    grid = np.pad(np.arange(1, 61).reshape(6, 10).repeat(4, 0).repeat(5, 1), 20)
    nested = DISC + ((Y - 70) ** 2 + (X - 90) ** 2 < 100)
    ring = DISC + ((Y - 70) ** 2 + (X - 90) ** 2 < 600)
    lines = np.where(X == 90, 2, DISC) + 3 * ((Y == 20) & (X < 50))
    for labels in (small_objects(seed), grid, nested, ring, lines):
        assert (read_back(tmp_path, Image.fromarray(labels.astype(np.uint8))) == labels).all()
        assert (read_back(tmp_path, Image.fromarray(PALETTE[labels])) == labels).all()


COLOUR_MASKS = {
    "any colours on black": (COLOURS[ROUND], SEEN),
    "white around": (np.where(CLEAR[..., None], 255, COLOURS[ROUND]).astype(np.uint8), SEEN),
    "DAVIS on white": (np.where(CLEAR[..., None], 255, PALETTE[ROUND]).astype(np.uint8), ROUND),
    "greys that differ, one white": (np.array([0, 255, 128], np.uint8)[ROUND], SEEN),
    "greys without black": (np.array([40, 200, 128], np.uint8)[ROUND], SEEN),
    "40 ids": (np.pad(np.arange(1, 41).reshape(5, 8).repeat(6, 0).repeat(6, 1), 20).astype(np.uint8),) * 2,
}


@pytest.mark.parametrize("name", COLOUR_MASKS)
def test_flat_colours_are_objects(tmp_path, name):
    pixels, wanted = COLOUR_MASKS[name]
    assert (read_back(tmp_path, Image.fromarray(pixels)) == wanted).all()


def test_an_object_on_most_of_the_picture_gets_a_word(tmp_path):
    with pytest.warns(UserWarning, match="m.png: objects cover 85% of the picture .inverted"):
        assert (read_back(tmp_path, Image.fromarray(255 - WHITE)) == 1 - DISC).all()
    write_mask(tmp_path / "p.png", torch.from_numpy(1 - DISC))
    assert len(mask_doubts(understand_mask(tmp_path / "p.png"), "p.png")) == 1            # told to those who ask


# ---------------------------------------------------------------- masks from Python
@pytest.mark.filterwarnings("error")
def test_masks_from_python_are_read_as_files_are(tmp_path):
    "Files, pictures, colours and bytes by one rule; whole numbers and truth values as they stand."
    path = write_mask(tmp_path / "m.png", torch.from_numpy(ROUND))
    forms = [path, str(path), Image.open(path), PALETTE[ROUND], torch.from_numpy(PALETTE[ROUND]), ROUND,
             np.dstack([PALETTE[ROUND], np.full_like(ROUND, 255)]).astype(np.uint8), ROUND.astype(np.uint8)]
    for form in forms:
        got = as_labels(form, (120, 160))
        assert got.dtype == torch.int64 and (got.numpy() == ROUND).all()
    for form in (255 * DISC.astype(np.uint8), WHITE, DISC == 1, DISC.astype(float), torch.from_numpy(DISC).half(),
                 torch.from_numpy(255 * DISC).byte(), Image.fromarray(WHITE).quantize(2)):
        assert (as_labels(form, (120, 160)).numpy() == DISC).all()


def test_numbers_of_more_than_eight_bits_keep_their_meaning():
    for values in ([[0, 255], [-1, 254]], [[0, 255], [255, 0]], [[0, 300], [7, -1]]):
        assert as_labels(np.array(values), (2, 2)).tolist() == values
        assert as_labels(torch.tensor(values, dtype=torch.int16), (2, 2)).tolist() == values


@pytest.mark.parametrize(("mask", "said"), [
    (np.full((2, 2), .5), ["floating point of 0 and 1 only", "from 0.5 to 0.5", "mask > 0.5"]),
    (255. * DISC, ["0 and 1 only", "from 0 to 255"]), (np.array([[np.nan, 1]]), ["0 and 1 only", "nan"]),
    (np.zeros((3, 4, 5), np.uint8), ["(3, 4, 5)", "(H,W,3)"]), (np.zeros((2, 2), complex), ["complex"]),
    (None, ["the path of one, found NoneType"]), ({1: 2}, ["found dict"]), ("none.png", ["none.png", "no such file"]),
    (np.arange(4096, dtype=np.uint8).reshape(64, 64), ["mask: expected", "flat colours"])])
def test_what_is_no_mask_is_refused_with_a_way_out(mask, said):
    refused(said, as_labels, mask, (2, 2))


def test_a_mask_of_another_size_is_refused_in_every_form(tmp_path):
    path = write_mask(tmp_path / "m.png", torch.from_numpy(ROUND))
    for form in (path, Image.open(path), PALETTE[ROUND], ROUND):
        refused("size 161x120 (width x height), found 160x120", as_labels, form, (120, 161))


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
    assert torch.equal(as_frame(Image.open(tmp_path / "i.png")), read_frame(tmp_path / "i.png"))
    Image.fromarray(frame_pixels()).convert("RGBA").save(tmp_path / "a.png")
    assert torch.equal(read_frame(tmp_path / "a.png"), to_frame(frame_pixels()))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("note", range(1, 9))
def test_orientation_is_honoured_in_every_format(tmp_path, ending, note):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255                                                       # white corner, top left as stored
    exif = Image.Exif()
    exif[0x0112] = note
    path = tmp_path / f"p.{ending}"
    Image.fromarray(stored).save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    want = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.swapaxes(0, 1),
            6: np.rot90(stored, -1), 7: stored[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(stored)}[note]
    frame = read_frame(path)
    assert image_size(path) == tuple(frame.shape[-2:]) == want.shape[:2]
    assert (frame - to_frame(want)).abs().max() < .1
    if ending != "jpg":                                                        # a mask is turned if it says so
        assert torch.equal(read_mask(path), torch.from_numpy((want[..., 0] > 0).astype(np.int64)))


def test_a_note_behind_the_pixels_counts_and_a_broken_one_does_not(tmp_path):
    path, exif = tmp_path / "p.png", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(frame_pixels()).save(path, exif=exif)
    data = path.read_bytes()
    at = data.index(b"eXIf") - 4
    chunk = data[at:at + 12 + int.from_bytes(data[at:at + 4], "big")]
    path.write_bytes(data.replace(chunk, b"")[:-12] + chunk + data[-12:])      # before IEND
    assert image_size(path) == (W, H) == tuple(read_frame(path).shape[-2:])
    Image.fromarray(frame_pixels()).save(tmp_path / "b.jpg", exif=b"Exif\0\0MM no such thing")
    assert image_size(tmp_path / "b.jpg") == (H, W) == tuple(read_frame(tmp_path / "b.jpg").shape[-2:])


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


@pytest.mark.parametrize("names", [
    ["-3", "-2", "-1", "0", "1", "2", "10"], ["f_-2", "f_-1", "f_0"], ["t-2", "t-1", "t0", "t1"],
    ["-1.5s", "-0.5s", "0.5s"],
    ["a-1", "a-2", "a-10"], ["2020-01-04", "2020-01-05", "2020-11-01"],
    ["1.05", "1.1"], ["0.9", "1.0", "1.05", "10.2"], ["0.25", "0.5", "0.75", "1.0"], ["-1.1", "-1.05", "0.0"],
    ["f_1.25s", "f_1.5s", "f_10.5s"], ["1.25ms", "1.5ms"], ["v1.9", "v1.10"], ["shot1.9", "shot1.10"],
    ["1.2.9", "1.2.10"],
    ["9", "10", "①", "②"], ["９", "１０"]])
def test_signs_points_and_other_digits_are_read_as_they_make_sense_together(names):
    assert natural_order(reversed(names), "clip") == names


@pytest.mark.parametrize("names", [["-1", "-2", "-3"], ["f_-1", "f_-2"], ["1.25", "1.5"], ["shot1.98", "shot1.101"]])
def test_an_order_with_two_readings_is_refused(names):
    refused(["clip: expected names in one order", repr(names[0]), "0001"], natural_order, names, "clip")


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


# ---------------------------------------------------------------- a folder
def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_a_folder_is_listed_by_name_in_natural_order(tmp_path):
    clip = touch(tmp_path / "clip", "10.JPG", "9.jpeg", "100.Png", "._9.png", ".DS_Store", "Thumbs.db", "desktop.ini",
                 "9.json", "list.txt", "overlay.mp4")
    (clip / "extra").mkdir()
    assert {k: p.name for k, p in list_pictures(clip).items()} == {"9": "9.jpeg", "10": "10.JPG", "100": "100.Png"}
    assert list(list_pictures(clip)) == ["9", "10", "100"]
    assert list(list_pictures(clip, (".jpg", ".jpeg", ".png"))) == ["9", "10", "100"]
    assert list_pictures(touch(tmp_path / "empty")) == {}
    assert list(list_pictures(clip, skip="10.JPG")) == ["9", "100"]


@pytest.mark.parametrize("lost", ["00002.heic", "b.HEIC", "00002.txt", "00002.gif", "00002", "00002.jpg.part",
                                  "00002.jpg~", "00002.npy"])
def test_a_frame_is_never_dropped_in_silence(tmp_path, lost):
    clip = touch(tmp_path / "clip", "00000.jpg", "00001.jpg", "00003.jpg")
    assert len(list_pictures(clip)) == 3
    refused([f"{lost}: expected pictures (.jpg", "convert it, or move it"], list_pictures, touch(clip, lost))


def test_odd_digits_in_names_are_no_traceback(tmp_path):
    clip = touch(tmp_path / "clip", "①.jpg", "00000.jpg", "٣.jpg")
    assert list(list_pictures(clip)) == ["00000", "٣", "①"]


def test_links_folders_and_twins_are_refused_by_name(tmp_path):
    clip = touch(tmp_path / "clip", "00000.jpg", "00001.jpg")
    (clip / "00002.jpg").symlink_to("/nowhere/x.jpg")
    refused("00002.jpg: expected a picture, found a link to nothing", list_pictures, clip)
    (clip / "00002.jpg").unlink()
    (clip / "00002.jpg").mkdir()
    refused("00002.jpg: expected a picture, found a folder", list_pictures, clip)
    (clip / "00002.jpg").rmdir()
    (clip / "00002.jpg").symlink_to(clip / "00001.jpg")
    assert list(list_pictures(clip)) == ["00000", "00001", "00002"]
    refused("found 00001.PNG and 00001.jpg", list_pictures, touch(clip, "00001.PNG"))
