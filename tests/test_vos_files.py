"""Files: a source becomes a folder or nothing, a split is walked through, archives are whole."""

import json
import os
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.data.video import VideoFile, VideoWriter, open_source
from stremn.data.vos import DAVIS, VideoFolder, VideoSet
from stremn.data.youtube import YouTubeVOS
from stremn.images import PALETTE, read_mask, to_pixels, write_mask
from stremn.vos.files import ArchiveMask, given_masks, segment_dataset, segment_video, write_zip, zip_masks
from stremn.vos.multiscale import multi_scale
from stremn.vos.stream import VideoSegmenter
from refusals import refused


@pytest.fixture(scope="module")
def clip():
    return chameleon(5, ChameleonConfig(frames=9, size=32, objects=2, modes=2, stay=(2, 3), fade=1))


# ---------------------------------------------------------------- sources and folders
def stream(clip, n=6, broken=None):
    for t in range(n):
        yield f"{t:05d}", clip.frames[t] if t != broken else clip.frames[t][:, :9], None


def test_a_source_becomes_a_folder(tmp_path, model, clip):
    labels = torch.stack([*VideoSegmenter(model).track(clip.frames[:6], clip.masks[0])])
    out = tmp_path / "a" / "out"
    done = segment_video(VideoSegmenter(model), stream(clip), clip.masks[0], out, fps=10, progress=False)
    names = [f"{t:05d}.png" for t in range(6)]
    assert sorted(p.name for p in done.folder.iterdir()) == [*names, "overlay.mp4"] and done.folder == out
    assert torch.equal(torch.stack([read_mask(done.folder / n) for n in names]), labels)
    video = VideoFile(done.folder / "overlay.mp4")
    assert (video.length, video.fps, video.size) == (6, 10., (32, 32))
    assert (done.frames, done.objects) == (6, [1, 2]) and done.memory[0].last == 5


def test_a_video_file_gives_its_own_speed(tmp_path, model, clip):
    with VideoWriter(tmp_path / "in.mp4", 12.5, (32, 32)) as out:
        for frame in clip.frames[:5]:
            out.write(frame)
    segment_video(VideoSegmenter(model), VideoFile(tmp_path / "in.mp4"), clip.masks[0], tmp_path / "o", progress=False)
    assert VideoFile(tmp_path / "o" / "overlay.mp4").fps == 12.5
    segment_video(VideoSegmenter(model), VideoFile(tmp_path / "in.mp4"), clip.masks[0], tmp_path / "p", video=False,
                   progress=False)
    assert not (tmp_path / "p" / "overlay.mp4").exists()


def test_masks_may_be_given_by_name(tmp_path, model, clip):
    masks = {"00000": torch.where(clip.masks[0] == 1, 1, 0), "00003": torch.where(clip.masks[3] == 2, 254, 0)}
    segment_video(VideoSegmenter(model), stream(clip), masks, tmp_path / "o", progress=False)
    assert torch.equal(read_mask(tmp_path / "o" / "00003.png") == 254, masks["00003"] == 254)
    refused("none called nowhere", segment_video, VideoSegmenter(model), stream(clip),
            masks | {"nowhere": masks["00000"]}, tmp_path / "p", progress=False)
    assert [p.name for p in (tmp_path / "p").glob("*.png")] != [], "the masks are there"


def test_ids_that_no_png_can_hold_are_refused_without_naming_a_hidden_file(tmp_path, model, clip):
    refused("mask: expected ids up to 254, as a PNG holds, found 301", segment_video, VideoSegmenter(model),
            stream(clip), clip.masks[0] + 300 * (clip.masks[0] == 1), tmp_path / "o", progress=False)
    assert not (tmp_path / "o").exists()


def test_a_mask_may_be_a_path_or_white_on_black(tmp_path, model, clip):
    "0 and 255, a file or an array: object 1."
    white = 255 * (clip.masks[0] == 1).numpy().astype(np.uint8)
    Image.fromarray(white).save(tmp_path / "m.png")
    for k, mask in enumerate((white, tmp_path / "m.png", str(tmp_path / "m.png"))):
        done = segment_video(VideoSegmenter(model), stream(clip, 2), mask, tmp_path / f"o{k}", video=False,
                             progress=False)
        assert done.objects == [1] and torch.equal(read_mask(done.folder / "00000.png"), (clip.masks[0] == 1).long())


def test_one_frame_is_in_memory_at_a_time(tmp_path, model, clip):
    "No frame is kept once the next one has come."
    import weakref
    seen = []

    def source():
        for t in range(8):
            frame = clip.frames[t].clone()
            seen.append(weakref.ref(frame))
            yield f"{t:05d}", frame, None
            del frame
            assert sum(ref() is not None for ref in seen) <= 1
    segment_video(VideoSegmenter(model), source(), clip.masks[0], tmp_path / "o", video=False, progress=False)
    assert len(seen) == 8


def test_frames_before_the_first_mask_are_background(tmp_path, model, clip):
    masks = {"00002": clip.masks[2]}
    done = segment_video(VideoSegmenter(model), stream(clip), masks, tmp_path / "o", progress=False)
    assert [bool(read_mask(done.folder / f"{t:05d}.png").any()) for t in range(3)] == [False, False, True]
    assert done.frames == 6 and done.memory[0].last == 3


def test_what_fails_at_once_leaves_no_folder(tmp_path, model, clip):
    refused("expected", segment_video, VideoSegmenter(model), stream(clip, broken=0), clip.masks[0],
            tmp_path / "o", progress=False)
    big = torch.where(clip.masks[0] > 0, 300, 0)  # an id that no palette PNG can hold
    refused("300", segment_video, VideoSegmenter(model), stream(clip), big, tmp_path / "o", progress=False)
    refused("found none", segment_video, VideoSegmenter(model), [], clip.masks[0], tmp_path / "o", progress=False)
    refused("mask", segment_video, VideoSegmenter(model), stream(clip), None, tmp_path / "o", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["../x"], ["0", "../../x"], ["0", "0"], [""], ["a/b"], ["CON"], ["x" * 300]])
def test_names_of_frames_are_checked_before_anything_is_written_under_them(tmp_path, model, clip, names):
    rows = [(name, frame, None) for name, (_, frame, _) in zip(names, stream(clip))]
    refused("source", segment_video, VideoSegmenter(model), rows, clip.masks[0], tmp_path / "in" / "o", progress=False)
    finished = {tmp_path / "in" / "o" / "0.png"} if names[0] == "0" else set()   # what was made before is kept
    assert {p for p in tmp_path.rglob("*.png")} == finished
    assert (tmp_path / "in" / "o").exists() == bool(finished)


def test_names_of_videos_are_checked_too(tmp_path, model):
    videos = VideoSet({"../x": (tmp_path, None)})
    refused("found '../x'", segment_dataset, lambda: VideoSegmenter(model), videos, tmp_path / "o")
    mask = ArchiveMask("../a/0.png", tmp_path / "0.png", (8, 8), frozenset())
    refused("found '..'", write_zip, tmp_path / "a.zip", [mask])
    assert list(tmp_path.iterdir()) == []


def test_frames_are_not_replaced_by_their_masks(tmp_path, model, clip):
    for t in range(3):
        (tmp_path / "frames").mkdir(exist_ok=True)
        write_mask(tmp_path / f"frames/{t}.png", clip.masks[t])
    before = {p.name: p.read_bytes() for p in (tmp_path / "frames").iterdir()}
    source = open_source(tmp_path / "frames")
    for goal in ("frames", "frames/../frames", "."):
        refused("another folder than that of the source", segment_video, VideoSegmenter(model), source, clip.masks[0],
                tmp_path / goal, overwrite=True, progress=False)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "frames").iterdir()}


def test_nothing_is_overwritten_that_is_not_ours(tmp_path, model, clip):
    def run(out, n=4, **options):
        return segment_video(VideoSegmenter(model), stream(clip, n), clip.masks[0], out, progress=False, **options)
    run(tmp_path / "o")
    refused("expected no result in it, found 00000.png (--overwrite", run, tmp_path / "o")
    (tmp_path / "o" / "thesis.tex").write_text("my life")
    assert run(tmp_path / "o", 3, overwrite=True).frames == 3
    assert len(list((tmp_path / "o").iterdir())) == 5  # nothing of the longer run remains
    (tmp_path / "film.mp4").write_text("film")
    refused("found a file", run, tmp_path / "film.mp4", overwrite=True)
    refused("can be made", run, tmp_path / "film.mp4" / "below")
    assert (tmp_path / "film.mp4").read_text() == "film" and (tmp_path / "o" / "thesis.tex").read_text() == "my life"
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty").frames == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "film.mp4", "o"]


def test_a_failed_overwrite_keeps_what_was_there(tmp_path, model, clip):
    out = tmp_path / "o"
    segment_video(VideoSegmenter(model), stream(clip), clip.masks[0], out, progress=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    refused("frame 4", segment_video, VideoSegmenter(model), stream(clip, broken=4), clip.masks[0], out,
            overwrite=True, progress=False)
    there = {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".stremn"}
    assert before == there and list(tmp_path.iterdir()) == [out]
    done = segment_video(VideoSegmenter(model), stream(clip), clip.masks[0], out, resume=True, progress=False)
    assert done.frames == 6 and {p.name: p.read_bytes() for p in out.iterdir()} == before


# ---------------------------------------------------------------- whole splits
def write_frames(folder, clip):
    folder.mkdir(parents=True)
    for t, frame in enumerate(clip.frames):
        Image.fromarray(to_pixels(frame)).save(folder / f"{t:05d}.jpg", quality=95)


@pytest.fixture
def davis(tmp_path, clip):
    for name in ("x", "y"):
        write_frames(tmp_path / "DAVIS" / "JPEGImages" / "480p" / name, clip)
        write_mask(tmp_path / "DAVIS" / "Annotations" / "480p" / name / "00000.png", clip.masks[0])
    (tmp_path / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "DAVIS" / "ImageSets" / "2017" / "test-dev.txt").write_text("x\ny\n")
    return DAVIS(tmp_path / "DAVIS", 2017, "test-dev")


@pytest.fixture
def youtube(tmp_path, clip):
    "Object 2 first, at frame 3; object 1 at frame 6; every third frame is asked for."
    root, enters = tmp_path / "yt", {2: 3, 1: 6}
    write_frames(root / "valid_all_frames" / "JPEGImages" / "v", clip)
    for i, e in enters.items():
        write_mask(root / "valid" / "Annotations" / "v" / f"{e:05d}.png", torch.where(clip.masks[e] == i, i, 0))
    objects = {str(i): {"frames": [f"{t:05d}" for t in range(e, 9, 3)]} for i, e in enters.items()}
    (root / "valid" / "meta.json").write_text(json.dumps({"videos": {"v": {"objects": objects}}}))
    return YouTubeVOS(root, all_frames=True)


def test_a_video_that_begins_with_nothing_known(model, clip):
    s = VideoSegmenter(model)
    frames = [clip.frames[0], to_pixels(clip.frames[1]), *clip.frames[2:4]]
    found = s.track(frames, {2: clip.masks[2]})
    assert next(found).equal(torch.zeros(32, 32, dtype=torch.long)) and s.objects == [] and s.memory == []
    next(found)
    later = [*found]
    fresh = VideoSegmenter(model)
    assert torch.equal(later[0], fresh.step(clip.frames[2], clip.masks[2])) and torch.equal(
        later[1], fresh.step(clip.frames[3])
    )
    assert s.objects == fresh.objects and s.memory == fresh.memory
    refused("frame 0: expected a mask", VideoSegmenter(model).step, clip.frames[0])


@pytest.mark.parametrize("make", [
    VideoSegmenter, lambda m: VideoSegmenter(m, test_time=multi_scale((1.0, 1.5), max_distance=0.5))])
def test_a_split_is_walked_through(model, youtube, davis, tmp_path, make):
    done = segment_dataset(lambda: make(model), youtube, tmp_path / "out", progress=False)
    maps = [read_mask(tmp_path / "out" / "v" / f"{t:05d}.png") for t in range(9)]
    assert done["v"].frames == 9 and done["v"].objects == [2, 1]
    assert [set(m.unique().tolist()) <= ids for m, ids in zip(maps, [{0}] * 3 + [{0, 2}] * 3 + [{0, 1, 2}] * 3)] == [
        True
    ] * 9
    for name, given in youtube["v"].given.items():
        assert torch.equal(maps[int(name)][given > 0], given[given > 0])
    again = segment_dataset(lambda: make(model), youtube, tmp_path / "out", progress=False)
    assert again == {} and not list((tmp_path / "out").glob("*/overlay.mp4"))
    (tmp_path / "d" / "x").mkdir(parents=True)
    assert list(segment_dataset(lambda: make(model), davis, tmp_path / "d", progress=False)) == ["y"]
    (tmp_path / "file").write_text("")
    refused("found a file", segment_dataset, lambda: make(model), davis, tmp_path / "file")


def test_what_is_given(davis, youtube, tmp_path):
    assert {k: m.unique().tolist() for k, m in given_masks(youtube["v"]).items()} == {
        "00003": [0, 2],
        "00006": [0, 1],
    }
    assert {k: m.unique().tolist() for k, m in given_masks(davis["x"]).items()} == {"00000": [0, 1, 2]}
    write_mask(tmp_path / "DAVIS" / "Annotations" / "480p" / "x" / "00000.png", torch.zeros(32, 32).long())
    refused("only background", given_masks, davis["x"])
    refused("found none", given_masks, VideoFolder(tmp_path / "DAVIS" / "JPEGImages" / "480p" / "x"))


def test_segment_video_takes_a_segmenter_of_several_views(model, clip, tmp_path):
    write_frames(tmp_path / "f", clip)
    two = VideoSegmenter(model, test_time=multi_scale((1.0,)))
    done = segment_video(two, VideoFolder(tmp_path / "f"), clip.masks[0], tmp_path / "m", progress=False)
    assert done.frames == 9 and (tmp_path / "m" / "overlay.mp4").is_file() and done.memory[0].last == 8


# ---------------------------------------------------------------- archives
def unpacked(path):
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
        return {n: Image.open(BytesIO(z.read(n))) for n in z.namelist()}


def test_the_davis_archive(model, davis, tmp_path):
    segment_dataset(lambda: VideoSegmenter(model), davis, tmp_path / "m", progress=False)
    grey = Image.fromarray(np.asarray(Image.open(tmp_path / "m" / "x" / "00003.png")))  # no palette: another tool's
    grey.save(tmp_path / "m" / "x" / "00003.png")
    images = unpacked(zip_masks(tmp_path / "m", davis, tmp_path / "a" / "test-dev.zip"))
    assert list(images) == [f"{n}/{t:05d}.png" for n in "xy" for t in range(9)]
    for name, image in images.items():
        assert image.mode == "P" and image.getpalette()[:768] == PALETTE.ravel().tolist()
        assert (np.asarray(image) == read_mask(tmp_path / "m" / name).numpy()).all()
    first = (tmp_path / "a" / "test-dev.zip").read_bytes()
    assert zip_masks(tmp_path / "m", davis, tmp_path / "a" / "test-dev.zip").read_bytes() == first
    assert os.listdir(tmp_path / "a") == ["test-dev.zip"]


def test_the_youtube_archive(model, youtube, tmp_path):
    segment_dataset(lambda: VideoSegmenter(model), youtube, tmp_path / "m", progress=False)
    images = unpacked(zip_masks(tmp_path / "m", youtube, tmp_path / "y.zip"))
    assert list(images) == ["Annotations/v/00003.png", "Annotations/v/00006.png"]
    for name, image in images.items():
        assert image.mode == "P" and (np.asarray(image) == read_mask(tmp_path / "m" / "v" / name[-9:]).numpy()).all()
    write_mask(tmp_path / "m" / "v" / "00004.png", torch.full((32, 32), 99))  # nobody asks for it
    zip_masks(tmp_path / "m", youtube, tmp_path / "y.zip")
    write_mask(tmp_path / "m" / "v" / "00003.png", torch.full((32, 32), 1))  # object 1 comes at frame 6
    refused(
        ["00003.png", "expected no objects but 2", "found 1"], zip_masks, tmp_path / "m", youtube, tmp_path / "z.zip"
    )
    assert sorted(p.name for p in tmp_path.glob("*.zip")) == ["y.zip"]


def test_wrong_archives_are_refused_and_leave_nothing(model, davis, tmp_path):
    segment_dataset(lambda: VideoSegmenter(model), davis, tmp_path / "m", progress=False)
    out, mask = tmp_path / "out.zip", tmp_path / "m" / "y" / "00008.png"
    good = zip_masks(tmp_path / "m", davis, out).read_bytes()
    labels = read_mask(mask)
    for change, match in (
        (lambda: write_mask(mask, labels[:, :16]), ["00008.png", "expected a mask of 32x32", "found 16x32"]),
        (lambda: write_mask(mask, labels + 5), ["00008.png", "expected no objects but 1, 2"]),
        (lambda: write_mask(mask, torch.full_like(labels, -1)), ["00008.png", "found -1"]),
        (mask.unlink, ["expected 9 masks", "none for 00008"]),
        (lambda: (tmp_path / "m" / "y").rename(tmp_path / "n"), ["folder with the masks of y"]),
    ):
        change()
        refused(match, zip_masks, tmp_path / "m", davis, out)
        assert out.read_bytes() == good and not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]
    refused("ending in .zip", zip_masks, tmp_path / "m", davis, tmp_path / "out.tar")
    refused("found none", write_zip, tmp_path / "empty.zip", [])
    refused("absent: y", zip_masks, tmp_path / "m", missing(davis), out)
    wanted = ArchiveMask("y/00000.png", tmp_path / "nowhere.png", (1, 1), frozenset())
    refused("nowhere.png", write_zip, tmp_path / "empty.zip", [wanted])
    assert not (tmp_path / "empty.zip").exists()


def missing(davis):
    davis.missing = ["y"]
    return davis


