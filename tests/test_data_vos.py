"""Folders of frames and masks: dialects of masks, official trees, and one clear line for what does not fit."""
import os

import numpy as np
import pytest
import torch
from PIL import Image

from stremn.core import StremnError
from stremn.data.vos import DAVIS, FramesAndMasks, VideoFolder, load_clip
from stremn.data.catalog import OFFICIAL, describe_data
from stremn.images import PALETTE, fit_size, image_size, natural_key, read_frame, read_mask, resize_frame, resize_mask, to_frame, to_pixels, write_mask
from refusals import refused

H, W = 12, 16


def picture(seed=0, size=(H, W)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def label_map(t=0, size=(H, W), ids=(1, 2)):
    out = np.zeros(size, np.uint8)
    for k, i in enumerate(ids):
        out[1 + k * 4:4 + k * 4, 2 + t % 4:8 + t % 4] = i
    return out


def make_video(frames, masks=None, n=3, ids=(1, 2), masked=None):
    frames.mkdir(parents=True)
    if masks:
        masks.mkdir(parents=True)
    for t in range(n):
        Image.fromarray(picture(t)).save(frames / f"{t:05d}.jpg")
        if masks and (masked is None or t in masked):
            write_mask(masks / f"{t:05d}.png", torch.from_numpy(label_map(t, ids=ids)).long())


def make_davis(root, names, res="480p", **kwargs):
    for name in names:
        make_video(root / "JPEGImages" / res / name, root / "Annotations" / res / name, **kwargs)


# ---------------------------------------------------------------- masks
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


def test_palette_is_the_voc_colour_map():
    assert (PALETTE == voc_reference()).all()


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
    Image.fromarray(picture()).save(tmp_path / "photo.jpg")
    refused(["photo.jpg", "palette"], read_mask, tmp_path / "photo.jpg")
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "cmyk.tif")
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


# ---------------------------------------------------------------- frames
def test_frames_round_trip_and_stay_in_range(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "f.png")
    frame = read_frame(tmp_path / "f.png")
    assert frame.shape == (3, H, W) and frame.dtype == torch.float32 and 0 <= frame.min() and frame.max() <= 1
    assert (to_pixels(frame) == picture()).all() and (to_pixels((frame * 255).round().byte()) == picture()).all()


def test_frames_of_other_modes(tmp_path):
    grey = Image.fromarray(picture()[..., 0])
    grey.save(tmp_path / "l.png")
    Image.fromarray(picture()[..., 0].astype(np.uint16) * 257).save(tmp_path / "i.png")
    for name in ("l.png", "i.png"):
        assert torch.equal(read_frame(tmp_path / name), to_frame(picture()[..., :1].repeat(3, 2)))
    Image.fromarray(picture()).convert("RGBA").save(tmp_path / "a.png")
    assert torch.equal(read_frame(tmp_path / "a.png"), to_frame(picture()))


def test_orientation_of_photographs_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "p.jpg", exif=exif)
    assert image_size(tmp_path / "p.jpg") == (W, H) == tuple(read_frame(tmp_path / "p.jpg").shape[-2:])


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "webp"])
def test_truncated_frames_never_pass_for_whole_ones(tmp_path, ending):
    path = tmp_path / f"f.{ending}"
    Image.fromarray(picture()).save(path)
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


# ---------------------------------------------------------------- folders
def test_natural_order():
    names = [f"{i}" for i in (1, 2, 9, 10, 11, 100)] + ["a1", "a2", "a10"]
    assert sorted(reversed(names), key=natural_key) == names


def test_video_folder_streams_names_frames_and_masks(tmp_path):
    make_video(tmp_path / "f", tmp_path / "m", n=11, masked=(0, 5))
    for junk in (".00000.jpg", "Thumbs.db", "list.txt"):
        (tmp_path / "f" / junk).write_text("junk")
    video = VideoFolder(tmp_path / "f", tmp_path / "m")
    assert (len(video), video.length, video.size, video.name, video.fps) == (11, 11, (H, W), "f", None)
    assert video.names == [f"{t:05d}" for t in range(11)] and video.object_ids == [1, 2]
    for _ in range(2):
        stream = list(video)
        assert [n for n, _, _ in stream] == video.names
        assert [t for t, (_, _, m) in enumerate(stream) if m is not None] == [0, 5]
    assert torch.equal(video.mask(5), torch.from_numpy(label_map(5)).long()) and video.mask(1) is None


def test_merge_makes_one_object_and_keeps_unlabelled_pixels(tmp_path):
    make_video(tmp_path / "f", tmp_path / "m", n=1)
    write_mask(tmp_path / "m" / "00000.png", torch.tensor([[-1, 0, 3, 1] * 4] * H))
    video = VideoFolder(tmp_path / "f", tmp_path / "m", merge=True)
    assert video.mask(0)[0, :4].tolist() == [-1, 0, 1, 1] and video.object_ids == [1]


def test_folders_that_do_not_fit_are_refused(tmp_path):
    make_video(tmp_path / "v" / "f", tmp_path / "v" / "m", n=3)
    frames, masks = tmp_path / "v" / "f", tmp_path / "v" / "m"
    (tmp_path / "empty").mkdir()
    refused(["nowhere", "no such folder"], VideoFolder, tmp_path / "nowhere")
    refused(["empty", "folder of frames"], VideoFolder, tmp_path / "empty")
    refused(["a file"], VideoFolder, frames / "00000.jpg")
    refused(["2 folders", "f, m"], VideoFolder, tmp_path / "v")
    refused(["empty", "folder of masks"], VideoFolder, frames, tmp_path / "empty")
    refused(["nowhere", "folder of masks"], VideoFolder, frames, tmp_path / "nowhere")
    Image.fromarray(picture(size=(H, W + 1))).save(frames / "00003.jpg")
    refused(["00003.jpg", "00000.jpg", f"{W}x{H}", f"{W + 1}x{H}"], VideoFolder, frames)
    (frames / "00003.jpg").unlink()
    write_mask(masks / "00001.png", torch.zeros(H + 2, W, dtype=torch.long))
    refused(["00001.png", f"{W}x{H + 2}"], VideoFolder, frames, masks)
    write_mask(masks / "00001.png", torch.zeros(H, W, dtype=torch.long))
    write_mask(masks / "00009.png", torch.zeros(H, W, dtype=torch.long))
    refused(["00009.png", "expected a frame named 00009"], VideoFolder, frames, masks)
    Image.fromarray(picture()).save(frames / "00002.png")
    refused(["00002.jpg and 00002.png"], VideoFolder, frames)
    (frames / "00002.png").write_text("buy milk")
    (frames / "00002.jpg").unlink()
    refused(["00002.png", "image"], VideoFolder, frames)


def test_a_truncated_frame_in_a_good_folder_is_named_when_it_is_read(tmp_path):
    make_video(tmp_path / "f", n=3)
    bad = tmp_path / "f" / "00001.jpg"
    bad.write_bytes(bad.read_bytes()[:-20])
    stream = iter(VideoFolder(tmp_path / "f"))
    assert next(stream)[0] == "00000"
    refused(["00001.jpg", "truncated"], next, stream)


# ---------------------------------------------------------------- data sets
def test_davis_2017_and_2016_from_the_same_files(tmp_path):
    make_davis(tmp_path, ["bear", "cows"])
    for year in ("2016", "2017"):
        (tmp_path / "ImageSets" / year).mkdir(parents=True)
        (tmp_path / "ImageSets" / year / "val.txt").write_text("cows\nbear\n\n")
    both = DAVIS(tmp_path, 2017, "val")
    assert both.names == ["cows", "bear"] and [v.name for v in both] == ["cows", "bear"]
    assert both["bear"].object_ids == [1, 2]
    assert DAVIS(tmp_path, 2016, "val")["bear"].object_ids == [1] and both[1].name == both[-1].name == "bear"
    assert len(DAVIS(tmp_path, 2017, "val")) == 2 and both.missing == []
    with pytest.raises(IndexError):
        both[2]
    refused(["'dog'", "cows"], both.__getitem__, "dog")


def test_davis_2016_as_its_own_archive_lists_it(tmp_path):
    make_davis(tmp_path / "DAVIS", ["bear", "cows"])
    (tmp_path / "DAVIS" / "ImageSets" / "480p").mkdir(parents=True)
    rows = [f"/JPEGImages/480p/{n}/{t:05d}.jpg /Annotations/480p/{n}/{t:05d}.png \n"
            for n in ("cows", "bear") for t in range(3)]
    (tmp_path / "DAVIS" / "ImageSets" / "480p" / "train.txt").write_text("".join(rows))
    assert DAVIS(tmp_path, 2016, "train").names == ["cows", "bear"]


def test_davis_says_what_is_missing(tmp_path):
    refused(["nowhere", "DAVIS folder"], DAVIS, tmp_path / "nowhere")
    make_davis(tmp_path, ["bear"])
    refused(["val.txt", "no lists"], DAVIS, tmp_path, 2017, "val")
    lists = tmp_path / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("bear\nboat\n")
    (lists / "val.txt").write_text("boat\n")
    (lists / "test-dev.txt").write_text("\n")
    refused(["test.txt", "test-dev, train, val"], DAVIS, tmp_path, 2017, "test")
    refused(["expected 2 sequences", "found 1", "missing boat", "allow_missing"], DAVIS, tmp_path, 2017, "train")
    some = DAVIS(tmp_path, 2017, "train", allow_missing=True)
    assert some.names == ["bear"] and some.missing == ["boat"]
    refused("found none of 1", DAVIS, tmp_path, 2017, "val", allow_missing=True)
    refused("empty file", DAVIS, tmp_path, 2017, "test-dev")
    refused(["1080p", "480p"], DAVIS, tmp_path, 2017, "train", "1080p")
    refused("2016 or 2017", DAVIS, tmp_path, 2018)


def test_frames_and_masks_finds_either_depth(tmp_path):
    make_davis(tmp_path / "deep", ["b10", "b9"], res="240p")
    make_video(tmp_path / "flat" / "JPEGImages" / "v1", tmp_path / "flat" / "Annotations" / "v1", masked=(0,))
    make_video(tmp_path / "flat" / "JPEGImages" / "v2")
    assert FramesAndMasks(tmp_path / "deep").names == ["b9", "b10"]
    flat = FramesAndMasks(tmp_path / "flat")
    assert flat["v1"].object_ids == [1, 2] and flat["v2"].object_ids == [] and flat["v2"].mask(0) is None
    make_davis(tmp_path / "deep", ["b9"], res="480p")
    refused(["240p, 480p", "resolution="], FramesAndMasks, tmp_path / "deep")
    assert FramesAndMasks(tmp_path / "deep", "480p").names == ["b9"]
    refused(["720p", "240p"], FramesAndMasks, tmp_path / "deep", "720p")
    refused("no such folder", FramesAndMasks, tmp_path / "nowhere")
    refused("JPEGImages", FramesAndMasks, tmp_path)


def test_describe_data_counts_against_the_official_numbers(tmp_path):
    make_davis(tmp_path / "a" / "DAVIS", ["bear", "cows"])
    make_davis(tmp_path / "a" / "DAVIS", ["bear"], res="Full-Resolution")
    (tmp_path / "a" / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "a" / "DAVIS" / "ImageSets" / "2017" / "train.txt").write_text("bear\ncows\nboat\n")
    for split in ("train", "valid"):
        make_video(tmp_path / "yt" / split / "JPEGImages" / "x", tmp_path / "yt" / split / "Annotations" / "x", n=1)
        (tmp_path / "yt" / split / "meta.json").write_text("{}")
    make_video(tmp_path / "mine" / "JPEGImages" / "x", tmp_path / "mine" / "Annotations" / "x", n=1)
    rows = describe_data(tmp_path)
    found = {(r.dataset, r.split, r.resolution): (r.where, r.found, r.expected, r.complete) for r in rows if r.found}
    assert found == {("DAVIS 2017", "train", "480p"): ("a/DAVIS", 2, 60, False),
                     ("DAVIS 2017", "train", "Full-Resolution"): ("a/DAVIS", 1, 60, False),
                     ("YouTube-VOS 2018", "train", ""): ("yt/train", 1, 3471, False),
                     ("YouTube-VOS 2018", "valid", ""): ("yt/valid", 1, 474, False),
                     ("mine", "all", ""): ("mine", 1, None, True)}
    absent = {(r.dataset, r.split): r.expected for r in rows if not r.found}
    assert absent == {key: n for key, n in OFFICIAL.items() if key not in {k[:2] for k in found}}
    assert all(r.source.startswith("https://") for r in rows if r.expected)
    refused("no such folder", describe_data, tmp_path / "nowhere")


def test_the_next_command_fits_what_is_there(tmp_path):
    root = tmp_path / "my data"
    make_davis(root / "DAVIS", ["bear", "cows"])
    make_davis(root / "DAVIS", ["bear"], res="240p")
    (root / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    (root / "DAVIS" / "ImageSets" / "2017" / "val.txt").write_text("bear\ncows\n")
    (root / "DAVIS" / "ImageSets" / "2017" / "test-dev.txt").write_text("bear\nboat\n")
    (root / "DAVIS" / "ImageSets" / "2016").mkdir()
    (root / "DAVIS" / "ImageSets" / "2016" / "train.txt").write_text("bear\n")
    start = f"stremn evaluate '{root / 'DAVIS'}' --pred masks --weights vos-small"
    train = f"stremn train vos --protocol small --data '{root}' --out run"
    said = {(r.dataset, r.split, r.resolution): r.next for r in describe_data(root) if r.found}
    assert said == {("DAVIS 2017", "val", "480p"): start,
                    ("DAVIS 2017", "val", "240p"): start + " --resolution 240p --allow-missing",
                    ("DAVIS 2017", "test-dev", "480p"): start + " --split test-dev --allow-missing",
                    ("DAVIS 2017", "test-dev", "240p"): start + " --split test-dev --resolution 240p --allow-missing",
                    ("DAVIS 2016", "train", "480p"): "", ("DAVIS 2016", "train", "240p"): train}


# ---------------------------------------------------------------- clips
def test_load_clip_marks_frames_without_a_mask(tmp_path):
    make_video(tmp_path / "f", tmp_path / "m", n=5, masked=(0, 3))
    video = VideoFolder(tmp_path / "f", tmp_path / "m", name="v")
    clip = load_clip(video)
    assert clip.frames.shape == (5, 3, H, W) and clip.masks.shape == (5, H, W) and clip.masks.dtype == torch.int64
    assert clip.name == "v"
    assert [bool((m == -1).all()) for m in clip.masks] == [False, True, True, False, True]
    back = load_clip(video, [3, 0], size=(6, 8))
    assert back.frames.shape == (2, 3, 6, 8) and torch.equal(back.masks[0], resize_mask(clip.masks[3], (6, 8)))
    refused("from 0 to 4", load_clip, video, [0, 5])
    refused("from 0 to 4", load_clip, video, [-1])
    refused("at least one", load_clip, video, [])


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


# ---------------------------------------------------------------- real data
def test_real_davis_opens(data_root):
    root = data_root / "davis2016"
    train, val = DAVIS(root, 2016, "train", "240p"), DAVIS(root, 2016, "val", "240p", allow_missing=True)
    assert len(train) == 30 and len(val) == 10
    for video in [*train, *val]:
        assert len(video) >= 25 and len(video.mask_files) == len(video) and video.size[0] == 240
        assert video.mask(0).unique().tolist() == [0, 1] and video.frame(len(video) - 1).shape == (3, *video.size)


def test_real_480p_grey_masks_are_zero_and_one(data_root):
    for video in DAVIS(data_root / "davis2016", 2016, "val", "480p", allow_missing=True):
        assert video.size == (480, 854)
        with Image.open(video.mask_files["00000"]) as image:
            assert image.mode == "L"
        assert all(video.mask(i).unique().tolist() == [0, 1] for i in range(0, len(video), 20))


def test_real_multi_object_clips(data_root):
    multi = FramesAndMasks(data_root / "multi")
    assert len(multi) == 7 and multi["dogs_jump"].mask(0).unique().tolist() == [0, 1, 2, 3]
    clip = load_clip(multi["dogs_jump"], [0, 5], size=96)
    assert clip.ids == [1, 2, 3] and clip.frames.shape[-2] == 96
