"""Folders of a person's own: every layout gives the same videos, and what is left out is said."""
from pathlib import Path

import pytest
import torch

from helpers import label_map, make_video_folder
from refusals import refused
from stremn.data.folders import LEAST, LAYOUTS, OwnVideos, open_folder

LAYOUT_PATHS = {
    "{v}/frames {v}/masks": "by video", "{v}/Images {v}/Labels": "other names",
    "JPEGImages/{v} Annotations/{v}": "YouTube-VOS", "JPEGImages/480p/{v} Annotations/480p/{v}": "DAVIS",
    "frames/{v} masks/{v}": "two folders", "images/{v} labels/{v}": "two folders, other names"}


@pytest.mark.parametrize("layout", LAYOUT_PATHS)
def test_every_layout_gives_the_same_videos(tmp_path, layout):
    for v, n in {"a": 6, "b": 8, "c": 7}.items():
        make_video_folder(*(tmp_path / part.format(v=v) for part in layout.split()), n=n)
    own = open_folder(tmp_path)
    assert [(v.name, len(v), v.object_ids) for v in own.videos] == [
        ("a", 6, [1, 2]), ("b", 8, [1, 2]), ("c", 7, [1, 2])]
    assert own.skipped == {} and torch.equal(own.videos[1].mask(3), torch.from_numpy(label_map(3)).long())


def test_one_video_alone_is_not_held_out(tmp_path):
    make_video_folder(tmp_path / "cat/frames", tmp_path / "cat/masks", n=5)
    own = open_folder(tmp_path / "cat")
    assert [v.name for v in own.videos] == ["cat"] and own.held_out() == []
    assert own.summary().splitlines() == [
        f"{tmp_path}/cat: videos: 1, frames with masks: 5, objects: 2, sizes: 16x12",
        "held out: none, of a single video"]


def test_frames_without_a_mask_are_left_out_and_videos_with_few_are_skipped(tmp_path):
    make_video_folder(tmp_path / "a/frames", tmp_path / "a/masks", n=9)
    make_video_folder(tmp_path / "late/frames", tmp_path / "late/masks", n=9)
    make_video_folder(tmp_path / "sparse/frames", tmp_path / "sparse/masks", n=20, masked=range(0, 20, 3))
    make_video_folder(tmp_path / "two/frames", tmp_path / "two/masks", n=9, masked=(0, 4))
    make_video_folder(tmp_path / "empty/frames", tmp_path / "empty/masks", n=9, ids=())
    make_video_folder(tmp_path / "bare/frames", n=9)
    (tmp_path / "bare/masks").mkdir()
    (tmp_path / "notes").mkdir()
    for t in range(3):                                                       # the objects come in frame 3
        (tmp_path / f"late/masks/{t:05d}.png").write_bytes((tmp_path / "empty/masks/00000.png").read_bytes())
    own = open_folder(tmp_path)
    assert {v.name: v.names for v in own.videos} == {
        "a": [f"{t:05d}" for t in range(9)], "late": [f"{t:05d}" for t in range(3, 9)],
        "sparse": [f"{t:05d}" for t in range(0, 20, 3)]}
    assert own.skipped == {"bare": "no folder of masks", "notes": "no frames and masks in it",
                           "empty": f"masks from the first object on: 0, needed: {LEAST}",
                           "two": f"masks from the first object on: 2, needed: {LEAST}"}
    lines = own.summary(["late"]).splitlines()
    assert lines[0] == (
        f"{tmp_path}: videos: 3, frames with masks: 22 (without, left out: 16), objects: 6, sizes: 16x12")
    assert lines[1] == "held out: late" and "skipped two: masks from the first object on: 2, needed: 5" in lines


def test_the_same_seed_holds_out_the_same_videos():
    class Video:
        def __init__(self, name): self.name = name
    def held(n, seed): return OwnVideos(Path(), [Video(f"v{i:02}") for i in range(n)], {}).held_out(seed)
    assert [len(held(n, 0)) for n in (1, 2, 4, 7, 8, 20)] == [0, 1, 1, 1, 2, 4]
    assert held(20, 3) == held(20, 3) == sorted(held(20, 3)) and len({tuple(held(20, s)) for s in range(9)}) > 5


def test_other_folders_are_refused_in_one_line_with_the_layouts(tmp_path):
    refused([str(tmp_path), *LAYOUTS, "found no folders"], open_folder, tmp_path)
    refused(["nowhere", "no such folder"], open_folder, tmp_path / "nowhere")
    make_video_folder(tmp_path / "x/y/frames", tmp_path / "x/y/masks", n=6)
    refused([*LAYOUTS, "found x"], open_folder, tmp_path)
    for level in ("480p", "1080p"):
        make_video_folder(tmp_path / "d/JPEGImages" / level / "a", tmp_path / "d/Annotations" / level / "a", n=6)
    refused(["one resolution", "480p, 1080p"], open_folder, tmp_path / "d")
    make_video_folder(tmp_path / "s/a/frames", tmp_path / "s/a/masks", n=6, masked=(0,))
    refused(["a video to learn from", "a: masks from the first object on: 1"], open_folder, tmp_path / "s")
