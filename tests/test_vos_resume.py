"Runs that are stopped: what is kept, what is refused, and that going on is bit-equal."
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from stremn.core import StremnError
from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.data.vos import VideoFolder
from stremn.images import read_mask, write_mask
from stremn.memory.rules import RULES
from stremn.models.hub import load
from stremn.vos import files
from stremn.vos.files import segment_dataset, segment_video
from stremn.vos.resume import MEMORY, RUN, Checkpoints, only_run
from stremn.vos.stream import VideoSegmenter

CLIP = chameleon(1_000_003, ChameleonConfig(frames=14))


@pytest.fixture(scope="module")
def model():
    return load("vos-tiny")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    "What an uninterrupted run leaves."
    out = tmp_path_factory.mktemp("whole") / "out"
    segment(model, out)
    return contents(out)


class Cut(Exception):
    "Not one of ours."


def frames(stop=None, error=Cut):
    for t, frame in enumerate(CLIP.frames):
        if t == stop: raise error("frame 9 is damaged")
        yield f"{t:05d}", frame, None


def segment(model, out, stop=None, error=Cut, mask=None, policy=None, **options):
    mask = CLIP.masks[0] if mask is None else mask
    return segment_video(VideoSegmenter(model, policy), frames(stop, error), mask, out, progress=False, **options)


def contents(out):
    return {p.name: p.read_bytes() for p in sorted(Path(out).iterdir()) if p.name != RUN}


@pytest.mark.parametrize("error", [StremnError, KeyboardInterrupt, Cut, SystemExit])
def test_a_late_fault_keeps_every_finished_mask_and_the_run_goes_on(tmp_path, model, whole, error):
    out = tmp_path / "o"
    with pytest.raises(error) as told: segment(model, out, 9, error)
    assert contents(out) == {f"{t:05d}.png": whole[f"{t:05d}.png"] for t in range(9)}
    if error in (StremnError, KeyboardInterrupt):
        assert str(told.value).endswith(f"9 masks are in {out}; --resume goes on")
    with pytest.raises(StremnError, match="--resume goes on, --overwrite starts again"): segment(model, out)
    seen = []
    done = segment_video(VideoSegmenter(model), ((n, f, seen.append(n)) for n, f, _ in frames()), CLIP.masks[0], out,
                         resume=True, progress=False)
    assert done.frames == 14 and contents(out) == whole and not (out / RUN).exists()


def test_the_memory_at_the_end_is_that_of_an_unbroken_run(tmp_path, model):
    whole = segment(model, tmp_path / "whole", policy="ucb")
    with pytest.raises(Cut): segment(model, tmp_path / "o", 9, policy="ucb")
    assert segment(model, tmp_path / "o", policy="ucb", resume=True).memory == whole.memory


def test_what_was_done_is_not_segmented_again(tmp_path, model, monkeypatch):
    with pytest.raises(Cut): segment(model, tmp_path / "o", 9)
    seen = []
    step = VideoSegmenter.step
    monkeypatch.setattr(VideoSegmenter, "step", lambda self, *a, **k: seen.append(self.state.t) or step(self, *a, **k))
    segment(model, tmp_path / "o", resume=True)
    assert seen == [9, 10, 11, 12, 13]


def test_a_run_that_was_never_begun_begins(tmp_path, model, whole):
    segment(model, tmp_path / "o", resume=True)
    assert contents(tmp_path / "o") == whole


def test_masks_of_later_frames_are_given_once(tmp_path, model):
    masks = {"00000": CLIP.masks[0], "00005": CLIP.masks[5], "00011": CLIP.masks[11]}
    whole = segment(model, tmp_path / "whole", mask=masks)
    with pytest.raises(Cut): segment(model, tmp_path / "o", 9, mask=masks)
    done = segment(model, tmp_path / "o", mask=masks, resume=True)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole") and done.memory == whole.memory


def test_another_run_does_not_go_on(tmp_path, model):
    out = tmp_path / "o"
    with pytest.raises(Cut): segment(model, out, 9)
    other = torch.where(CLIP.masks[0] > 0, 2, 0)
    for options, word in (({"mask": other}, "mask"), ({"policy": "oldest"}, "policy")):
        with pytest.raises(StremnError, match=f"found another {word} .--overwrite starts again"):
            segment(model, out, resume=True, **options)
    (out / "00004.png").unlink()
    with pytest.raises(StremnError, match="00004.png: expected a mask, found no such file"):
        segment(model, out, resume=True)
    with pytest.raises(StremnError, match="expected a run that was stopped, found a finished result"):
        segment(model, tmp_path / "f"), segment(model, tmp_path / "f", resume=True)
    with pytest.raises(StremnError, match="resume: expected it without overwrite, found both"):
        segment(model, out, resume=True, overwrite=True)


def test_a_shorter_video_is_not_the_one_that_was_stopped(tmp_path, model):
    with pytest.raises(Cut): segment(model, tmp_path / "o", 9)
    short = ((n, f, None) for n, f, _ in [*frames()][:5])
    with pytest.raises(StremnError, match="expected a video of 9 frames or more"):
        segment_video(VideoSegmenter(model), short, CLIP.masks[0], tmp_path / "o", resume=True, progress=False)


def test_overwrite_forgets_a_run_that_was_stopped(tmp_path, model, whole):
    with pytest.raises(Cut): segment(model, tmp_path / "o", 9, policy="oldest")
    segment(model, tmp_path / "o", overwrite=True)
    assert contents(tmp_path / "o") == whole


def test_a_second_run_into_one_folder_is_refused_and_the_first_finishes(tmp_path, model, whole):
    out = tmp_path / "o"

    def both():
        for t, item in enumerate(frames()):
            if t == 5:
                with pytest.raises(StremnError, match="expected no other run that fills this folder, found one"):
                    segment(model, out, overwrite=True)
                with pytest.raises(StremnError, match="found one at work"): segment(model, out, resume=True)
                with only_run(tmp_path / "other"): pass             # the lock is that of one video
            yield item
    segment_video(VideoSegmenter(model), both(), CLIP.masks[0], out, progress=False)
    assert contents(out) == whole


def test_files_that_appear_meanwhile_stay(tmp_path, model, whole):
    out = tmp_path / "o"
    out.mkdir(mode=0o750)
    inode = out.stat().st_ino

    def busy():
        for t, item in enumerate(frames()):
            if t == 5: (out / "notes.txt").write_text("mine")
            yield item
    segment_video(VideoSegmenter(model), busy(), CLIP.masks[0], out, progress=False)
    assert contents(out) == whole | {"notes.txt": b"mine"} and out.stat().st_ino == inode


@pytest.mark.parametrize("fps", [2000., -1.])
def test_an_overlay_that_cannot_be_written_stops_nothing(tmp_path, model, whole, fps):
    with pytest.warns(UserWarning, match="no overlay: .*expected between 0 and 1000 frames a second"):
        done = segment(model, tmp_path / "o", fps=fps)
    assert done.frames == 14 and contents(tmp_path / "o") == {k: v for k, v in whole.items() if k != "overlay.mp4"}


def test_an_overlay_that_fails_in_the_middle_or_at_the_end_stops_nothing(tmp_path, model, whole, monkeypatch):
    for name in ("write", "__exit__"):
        def fails(self, *a): raise StremnError("disk: expected room, found none")
        with monkeypatch.context() as m:
            m.setattr(files.VideoWriter, name, fails)
            with pytest.warns(UserWarning, match="no overlay: disk"): segment(model, tmp_path / name)
        assert contents(tmp_path / name) == {k: v for k, v in whole.items() if k != "overlay.mp4"}


def test_a_full_disk_keeps_what_is_there(tmp_path, model, whole, monkeypatch):
    write = files.write_mask

    def full(path, labels):
        if path.name == "00006.png": raise OSError(28, "No space left on device", str(path))
        return write(path, labels)
    with monkeypatch.context() as m:
        m.setattr(files, "write_mask", full)
        m.setattr(files, "Checkpoints", partial(Checkpoints, frames=4))
        with pytest.raises(StremnError, match="00006.png: No space left on device; 6 masks are in .*--resume goes on"):
            segment(model, tmp_path / "o")
    segment(model, tmp_path / "o", resume=True)
    assert contents(tmp_path / "o") == whole


def test_a_run_stopped_within_a_step_goes_on_bit_equal(tmp_path, model, monkeypatch):
    "After the rule has drawn its numbers, and before the frame is remembered."
    segment(model, tmp_path / "whole", policy="random")
    memorize = type(model).memorize

    def stops(self, memories, encoded, masks, t, *a, **k):
        found = memorize(self, memories, encoded, masks, t, *a, **k)
        if t == 8: raise KeyboardInterrupt
        return found
    with monkeypatch.context() as m:
        m.setattr(type(model), "memorize", stops)
        with pytest.raises(KeyboardInterrupt): segment(model, tmp_path / "o", policy="random")
    segment(model, tmp_path / "o", policy="random", resume=True)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_a_rule_without_a_name_keeps_masks_but_cannot_go_on(tmp_path, model, whole):
    with pytest.raises(StremnError) as told: segment(model, tmp_path / "o", 9, StremnError, policy=RULES["oldest"])
    assert str(told.value).endswith(f"9 masks are in {tmp_path / 'o'}")
    assert len(contents(tmp_path / "o")) == 9 and not (tmp_path / "o" / RUN).exists()


def test_a_data_set_goes_on_in_the_middle_of_a_video(tmp_path, model):
    class Videos(dict):
        names = ["a", "b"]
    videos = Videos()
    for v in videos.names:
        for t in range(6):
            write_mask(tmp_path / "truth" / v / f"{t:05d}.png", CLIP.masks[t])
            write_mask(tmp_path / "frames" / v / f"{t:05d}.png", CLIP.masks[t])
        videos[v] = VideoFolder(tmp_path / "frames" / v, tmp_path / "truth" / v)
    segment_dataset(lambda: VideoSegmenter(model), videos, tmp_path / "whole", progress=False)

    class Stops(VideoSegmenter):
        def step(self, *a, **k):
            if self.state.t == 4: raise KeyboardInterrupt
            return super().step(*a, **k)
    with pytest.raises(KeyboardInterrupt):
        segment_dataset(lambda: Stops(model), videos, tmp_path / "o", progress=False)
    assert (tmp_path / "o/a" / RUN / MEMORY).exists() and len(contents(tmp_path / "o/a")) == 4
    done = segment_dataset(lambda: VideoSegmenter(model), videos, tmp_path / "o", progress=False)
    assert list(done) == ["a", "b"]
    for v in videos.names: assert contents(tmp_path / "o" / v) == contents(tmp_path / "whole" / v)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_moment_goes_on_bit_equal():
    "Six times here; fifty with STREMN_LONG=1."
    times = "50" if os.environ.get("STREMN_LONG") else "6"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "kill_runs.py"
    done = subprocess.run([sys.executable, script, times], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert f"{times} runs killed" in done.stdout and "all bit-equal" in done.stdout


def test_nobody_is_warned_of_nothing(tmp_path, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segment(model, tmp_path / "o")
    assert (read_mask(tmp_path / "o/00000.png") == CLIP.masks[0]).all()
