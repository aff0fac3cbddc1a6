"""Folders of frames and masks: official trees, and one clear line for what does not fit."""
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import frame_pixels, label_map, make_davis, make_video_folder
from refusals import refused
from stremn.data.vos import DAVIS, FramesAndMasks, VideoFolder, load_clip
from stremn.images import resize_mask, write_mask

H, W = 12, 16


# ---------------------------------------------------------------- folders
def test_video_folder_streams_names_frames_and_masks(tmp_path):
    make_video_folder(tmp_path / "f", tmp_path / "m", n=11, masked=(0, 5))
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
    make_video_folder(tmp_path / "f", tmp_path / "m", n=1)
    write_mask(tmp_path / "m" / "00000.png", torch.tensor([[-1, 0, 3, 1] * 4] * H))
    video = VideoFolder(tmp_path / "f", tmp_path / "m", merge=True)
    assert video.mask(0)[0, :4].tolist() == [-1, 0, 1, 1] and video.object_ids == [1]


def test_folders_that_do_not_fit_are_refused(tmp_path):
    make_video_folder(tmp_path / "v" / "f", tmp_path / "v" / "m", n=3)
    frames, masks = tmp_path / "v" / "f", tmp_path / "v" / "m"
    (tmp_path / "empty").mkdir()
    refused(["nowhere", "no such folder"], VideoFolder, tmp_path / "nowhere")
    refused(["empty", "folder of frames"], VideoFolder, tmp_path / "empty")
    refused(["a file"], VideoFolder, frames / "00000.jpg")
    refused(["only folders", "f, m"], VideoFolder, tmp_path / "v")
    refused(["empty", "folder of masks"], VideoFolder, frames, tmp_path / "empty")
    refused(["nowhere", "folder of masks"], VideoFolder, frames, tmp_path / "nowhere")
    Image.fromarray(frame_pixels(size=(H, W + 1))).save(frames / "00003.jpg")
    refused(["00003.jpg", "00000.jpg", f"{W}x{H}", f"{W + 1}x{H}"], VideoFolder, frames)
    (frames / "00003.jpg").unlink()
    write_mask(masks / "00001.png", torch.zeros(H + 2, W, dtype=torch.long))
    refused(["00001.png", f"{W}x{H + 2}"], VideoFolder, frames, masks)
    write_mask(masks / "00001.png", torch.zeros(H, W, dtype=torch.long))
    write_mask(masks / "00009.png", torch.zeros(H, W, dtype=torch.long))
    refused(["00009.png", "expected a frame named 00009"], VideoFolder, frames, masks)
    Image.fromarray(frame_pixels()).save(frames / "00002.png")
    refused(["00002.jpg and 00002.png"], VideoFolder, frames)
    (frames / "00002.png").write_text("buy milk")
    (frames / "00002.jpg").unlink()
    refused(["00002.png", "image"], VideoFolder, frames)


def test_a_truncated_frame_in_a_good_folder_is_named_when_it_is_read(tmp_path):
    make_video_folder(tmp_path / "f", n=3)
    bad = tmp_path / "f" / "00001.jpg"
    bad.write_bytes(bad.read_bytes()[:-20])
    stream = iter(VideoFolder(tmp_path / "f"))
    assert next(stream)[0] == "00000"
    refused(["00001.jpg", "truncated"], next, stream)


@pytest.mark.parametrize(("mode", "bits", "refusal"), [
    ("grey", 10, "values below 1024"), ("grey", 12, "found values below 4096"), ("grey", 16, None),
    ("rgb", 10, "values below 1024"), ("rgb", 16, None)])
def test_ten_bits_in_sixteen_are_not_black(tmp_path, mode, bits, refusal):
    (tmp_path / "f").mkdir()
    for t in range(4):
        values = np.linspace(0, 2 ** bits - 1, H * W).reshape(H, W).astype(np.uint16)
        if mode == "grey":
            Image.fromarray(values).save(tmp_path / "f" / f"{t}.png")
        else:
            save_deep(tmp_path / "f" / f"{t}.png", np.stack([values] * 3, -1))
    if refusal:
        refused(["0.png: expected 16-bit frames", refusal, "8 bits"], VideoFolder, tmp_path / "f")
    else:
        assert VideoFolder(tmp_path / "f").frame(0).max() == 1


def save_deep(path, pixels):
    "A PNG of 16 bits a channel, which Pillow reads but does not write."
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    h, w = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = w.to_bytes(4, "big") + h.to_bytes(4, "big") + bytes((16, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b""))


# ---------------------------------------------------------------- a mask among the frames
@pytest.mark.parametrize(("given", "others", "left_out"), [
    ("00000_mask.png", [], ["00000_mask.png"]),
    ("mask.PNG", [], ["mask.PNG"]),
    ("00000.png", [], ["00000.png"]),                                          # beside 00000.jpg: of the same frame
    ("00000_mask.png", ["00001_mask.png", "00002_mask.png"], ["00000_mask.png", "00001_mask.png", "00002_mask.png"])])
def test_the_given_mask_is_no_frame(tmp_path, given, others, left_out):
    make_video_folder(tmp_path / "f", n=3)
    for name in (given, *others):
        Image.new("L", (W, H)).save(tmp_path / "f" / name)
    video = VideoFolder(tmp_path / "f", given=tmp_path / "f" / ".." / "f" / given)
    assert (video.names, video.left_out) == (["00000", "00001", "00002"], left_out)
    assert video.frame_files["00000"].name == "00000.jpg"


def test_a_mask_named_like_the_frames_is_refused(tmp_path):
    make_video_folder(tmp_path / "f", n=3)
    given = tmp_path / "f" / "00003.png"
    Image.new("L", (W, H)).save(given)
    refused(["00003.png: expected a mask outside the folder", "3 pictures named like it", "mask.png"],
            VideoFolder, tmp_path / "f", given=given)
    Image.new("L", (W, H)).save(tmp_path / "f" / "cover.png")
    refused("00003.png: expected a mask outside the folder", VideoFolder, tmp_path / "f", given=given)
    given.rename(tmp_path / "00003.png")
    assert VideoFolder(tmp_path / "f", given=tmp_path / "00003.png").left_out == []


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


def test_lists_that_windows_wrote_are_read(tmp_path):
    make_davis(tmp_path, ["bear", "cows"])
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_bytes(b"\xef\xbb\xbfbear\r\ncows\r\n")
    assert DAVIS(tmp_path).names == ["bear", "cows"]
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_bytes("bear\n".encode("utf-16"))
    refused(["val.txt", "UTF-8"], DAVIS, tmp_path)


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
    make_video_folder(tmp_path / "flat" / "JPEGImages" / "v1", tmp_path / "flat" / "Annotations" / "v1", masked=(0,))
    make_video_folder(tmp_path / "flat" / "JPEGImages" / "v2")
    assert FramesAndMasks(tmp_path / "deep").names == ["b9", "b10"]
    flat = FramesAndMasks(tmp_path / "flat")
    assert flat["v1"].object_ids == [1, 2] and flat["v2"].object_ids == [] and flat["v2"].mask(0) is None
    make_davis(tmp_path / "deep", ["b9"], res="480p")
    refused(["240p, 480p", "resolution="], FramesAndMasks, tmp_path / "deep")
    assert FramesAndMasks(tmp_path / "deep", "480p").names == ["b9"]
    refused(["720p", "240p"], FramesAndMasks, tmp_path / "deep", "720p")
    refused("no such folder", FramesAndMasks, tmp_path / "nowhere")
    refused("JPEGImages", FramesAndMasks, tmp_path)


# ---------------------------------------------------------------- clips
def test_load_clip_marks_frames_without_a_mask(tmp_path):
    make_video_folder(tmp_path / "f", tmp_path / "m", n=5, masked=(0, 3))
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
