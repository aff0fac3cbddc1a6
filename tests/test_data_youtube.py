"""YouTube-VOS: what is given and what is asked for, which categories are unseen."""
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import make_youtube, object_strips, write_picture
from refusals import refused
from stremn.data.catalog import describe_data
from stremn.data.clips import collate, sample_indices
from stremn.data.vos import DAVIS, FramesAndMasks, VideoFolder, load_clip
from stremn.data.youtube import Note, YouTubeVideo, YouTubeVOS, categories, given_masks, read_meta, unseen_objects
from stremn.images import write_mask

KINDS = {1: "dog", 2: "cat", 7: "yeti"}


@pytest.fixture
def tree(tmp_path):
    videos = {"a": {1: 0, 7: 10}, "b": {7: 5, 2: 15}}
    make_youtube(tmp_path, "valid", videos, kinds=KINDS, all_frames="valid_all_frames")
    make_youtube(tmp_path, "train", {"t": {1: 0, 2: 5}}, kinds=KINDS, all_frames="all_frames/train_all_frames")
    return tmp_path


# ---------------------------------------------------------------- meta.json
def test_notes_are_what_the_file_says(tree):
    notes = read_meta(tree / "valid" / "meta.json")
    assert notes == {"a": {1: Note(("00000", "00005", "00010", "00015", "00020"), "dog"),
                           7: Note(("00010", "00015", "00020"), "yeti")},
                     "b": {2: Note(("00015", "00020"), "cat"),
                           7: Note(("00005", "00010", "00015", "00020"), "yeti")}}


@pytest.mark.parametrize("text,match", [
    ("{", "damaged"),
    ("[]", '"videos"'),
    ('{"videos": {}}', '"videos"'),
    ('{"videos": {"v": {}}}', ["video v", '"objects"']),
    ('{"videos": {"v": {"objects": {}}}}', '"objects"'),
    ('{"videos": {"v": {"objects": {"x": {}}}}}', "found 'x'"),
    ('{"videos": {"v": {"objects": {"0": {"frames": ["0"]}}}}}', "from 1 to 254"),
    ('{"videos": {"v": {"objects": {"255": {}}}}}', "'255'"),
    ('{"videos": {"v": {"objects": {"3": {}}}}}', ["object 3", '"frames"', "None"]),
    ('{"videos": {"v": {"objects": {"3": []}}}}', "object 3"),
    ('{"videos": {"v": {"objects": {"3": {"frames": []}}}}}', "object 3"),
    ('{"videos": {"v": {"objects": {"3": {"frames": [5]}}}}}', "[5]")])
def test_a_wrong_meta_file_is_refused(tmp_path, text, match):
    (tmp_path / "meta.json").write_text(text)
    refused(["meta.json", *([match] if isinstance(match, str) else match)], read_meta, tmp_path / "meta.json")


def test_frames_of_a_note_are_sorted_by_number(tmp_path):
    (tmp_path / "m.json").write_text('{"videos": {"v": {"objects": {"3": {"frames": ["10", "9", "100"]}}}}}')
    assert read_meta(tmp_path / "m.json") == {"v": {3: Note(("9", "10", "100"), None)}}
    text = (tmp_path / "m.json").read_text()
    (tmp_path / "m.json").write_text(text, encoding="utf-8-sig")
    assert read_meta(tmp_path / "m.json") == {"v": {3: Note(("9", "10", "100"), None)}}
    (tmp_path / "m.json").write_text(text, encoding="utf-16")
    refused("m.json: expected text in UTF-8", read_meta, tmp_path / "m.json")
    refused("no such file", read_meta, tmp_path / "none.json")
    refused("a folder", read_meta, tmp_path)


# ---------------------------------------------------------------- what is given
@pytest.mark.parametrize("seed", range(20))
def test_given_masks_against_a_loop_over_pixels(tmp_path, seed):
    rng = np.random.default_rng(seed)
    maps = rng.choice([0, 0, 0, 1, 3, 200, 255], (5, 3, 4)) * (rng.random((5, 1, 1)) < 0.8)
    for t in range(6):
        path = tmp_path / "f" / f"{t}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(path)
        if t < 5:
            write_mask(tmp_path / "m" / f"{t}.png", torch.from_numpy(np.where(maps[t] == 255, -1, maps[t])))
    want, seen = {}, set()
    for t in range(5):
        new = {int(v) for v in maps[t].flatten() if v not in (0, 255) and int(v) not in seen}
        for y in range(3):
            for x in range(4):
                if maps[t, y, x] in new:
                    want.setdefault(str(t), torch.zeros(3, 4, dtype=torch.long))[y, x] = int(maps[t, y, x])
        seen |= new
    got = given_masks(VideoFolder(tmp_path / "f", tmp_path / "m"))
    assert list(got) == list(want) and all(torch.equal(got[k], want[k]) for k in want)
    some = {i for i in seen if i != 3}
    only = given_masks(VideoFolder(tmp_path / "f", tmp_path / "m"), some)
    assert {i for m in only.values() for i in m.unique().tolist()} - {0} == some
    refused("object 99", given_masks, VideoFolder(tmp_path / "f", tmp_path / "m"), {*seen, 99})


def test_reading_stops_when_all_have_come_in(tree, monkeypatch):
    video, read = YouTubeVOS(tree, "train")["t"], []
    mask = YouTubeVideo.mask
    monkeypatch.setattr(YouTubeVideo, "mask", lambda self, i: read.append(i) or mask(self, i))
    assert {k: m.unique().tolist() for k, m in video.given.items()} == {"00000": [0, 1], "00005": [0, 2]}
    assert read == [0, 1]


def test_test_dev_gives_its_first_masks_only(tmp_path):
    for name in ("x", "y"):
        for t in range(4):
            write_picture(tmp_path / "JPEGImages" / "480p" / name / f"{t:05d}.jpg", t)
        write_mask(tmp_path / "Annotations" / "480p" / name / "00000.png", object_strips(0, {1: 0, 2: 0}))
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "test-dev.txt").write_text("x\ny\n")
    videos = DAVIS(tmp_path, 2017, "test-dev")
    assert videos.names == ["x", "y"] and list(given_masks(videos["y"])) == ["00000"]
    assert torch.equal(given_masks(videos["x"])["00000"], object_strips(0, {1: 0, 2: 0}))
    assert [(r.split, r.found, r.expected) for r in describe_data(tmp_path) if r.found] == [("test-dev", 2, 30)]


# ---------------------------------------------------------------- trees
def test_a_split_at_both_rates(tree):
    slow, fast = YouTubeVOS(tree), YouTubeVOS(tree, all_frames=True)
    assert slow.names == fast.names == ["a", "b"]
    for name in slow.names:
        assert slow[name].names == [f"{t:05d}" for t in range(0, 21, 5)]
        assert fast[name].names == [f"{t:05d}" for t in range(21)]
        assert slow[name].asked == fast[name].asked and slow[name].object_ids == sorted(slow.notes[name])
        given = [{k: m.tolist() for k, m in videos[name].given.items()} for videos in (slow, fast)]
        assert given[0] == given[1]
    assert {k: m.unique().tolist() for k, m in fast["b"].given.items()} == {"00005": [0, 7], "00015": [0, 2]}
    assert fast["b"].asked[0] == "00005" and fast["b"].annotated == [5, 15] and fast[1].name == "b"
    assert [v.name for v in fast] == ["a", "b"] and isinstance(next(iter(fast)), YouTubeVideo)
    train = YouTubeVOS(tree, "train", all_frames=True)["t"]
    assert train.annotated == [0, 5, 10, 15, 20] and len(train) == 21


def test_trees_are_found_however_they_were_unpacked(tree, tmp_path_factory):
    base = tmp_path_factory.mktemp("years")
    for year, n in ((2018, 1), (2019, 2)):
        make_youtube(base / str(year), "valid", {f"v{k}": {1: 0} for k in range(n)}, last=5)
    assert len(YouTubeVOS(base)) == 1 and len(YouTubeVOS(base, year=2019)) == 2
    assert YouTubeVOS(tree / "valid").names == ["a", "b"]
    assert YouTubeVOS(tree / "valid", all_frames=True)["a"].length == 21
    refused(["test", "meta.json", "train"], YouTubeVOS, tree, "test")
    refused("no such folder", YouTubeVOS, tree / "nowhere")
    refused("2018 or 2019", YouTubeVOS, tree, year=2020)
    refused(["valid_all_frames", "separate download"], YouTubeVOS, base, all_frames=True)


def test_what_is_absent_is_named(tree):
    (tree / "valid" / "Annotations" / "b").rename(tree / "gone")
    refused(["expected the 2 videos", "missing b", "allow_missing"], YouTubeVOS, tree)
    some = YouTubeVOS(tree, allow_missing=True)
    assert some.names == ["a"] and some.missing == ["b"] and list(some.notes) == ["a"]
    (tree / "valid" / "JPEGImages" / "a" / "00015.jpg").unlink()
    refused(["frames that meta.json names", "00015"], lambda: some["a"])
    (tree / "valid" / "JPEGImages" / "a").rename(tree / "gone too")
    refused("none of 2", YouTubeVOS, tree, allow_missing=True)


def test_a_mask_that_does_not_show_its_object_is_refused(tree):
    write_mask(tree / "valid" / "Annotations" / "b" / "00015.png", object_strips(15, {7: 5}))
    refused(["object 2", "found none"], lambda: YouTubeVOS(tree)["b"].given)


# ---------------------------------------------------------------- seen and unseen
def test_seen_is_what_training_names(tree):
    seen = categories(YouTubeVOS(tree, "train").notes)
    assert seen == {"dog", "cat"}
    assert unseen_objects(YouTubeVOS(tree).notes, seen) == {("a", 7), ("b", 7)}
    assert unseen_objects(YouTubeVOS(tree, "train").notes, seen) == set()
    refused("training split", unseen_objects, YouTubeVOS(tree).notes, [])
    refused(["found none for 1", "object 3 of v"], unseen_objects, {"v": {3: Note(("0",))}}, seen)


# ---------------------------------------------------------------- clips
@pytest.mark.parametrize("all_frames", [False, True])
def test_clips_of_ten_frames_from_either_rate(tmp_path, all_frames):
    make_youtube(tmp_path, "train", {"t": {1: 0, 2: 25}}, last=60, all_frames="train_all_frames")
    video = YouTubeVOS(tmp_path, "train", all_frames=all_frames)["t"]
    index = sample_indices(len(video.annotated), 10, 2, torch.Generator().manual_seed(0))
    clip = load_clip(video, [video.annotated[i] for i in index], size=(9, 9))
    assert clip.frames.shape == (10, 3, 9, 9) and (clip.masks >= 0).all()
    assert collate([clip]).valid.sum() == len(clip.ids)


def test_real_clips_as_a_folder(data_root):
    for video in FramesAndMasks(data_root / "multi"):
        given = given_masks(video)
        ids = {i for m in given.values() for i in m.unique().tolist()}
        assert list(given)[0] == video.names[0] and ids - {0} == set(video.object_ids)
        for name, labels in given.items():
            shown = video.mask(video.names.index(name))
            assert torch.equal(labels[labels > 0], shown[labels > 0])
