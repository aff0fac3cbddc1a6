"Probabilities and cut-outs next to the masks: the same answer, in another form, whatever happens on the way."
import numpy as np
import pytest
import torch
from PIL import Image

from refusals import refused
from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.images import to_pixels
from stremn.vos.exports import write_cutout, write_prob
from stremn.vos.files import segment_video
from stremn.vos.stream import VideoSegmenter

CLIP = chameleon(5, ChameleonConfig(frames=7, size=32, objects=2, modes=2))
ENTERS = 3                                                                     # frame in which object 9 enters
MASKS = {"0": torch.where(CLIP.masks[0] == 1, 1, 0), str(ENTERS): torch.where(CLIP.masks[ENTERS] == 2, 9, 0)}


def stream(stop=None):
    for t, frame in enumerate(CLIP.frames):
        if t == stop: raise KeyboardInterrupt
        yield str(t), frame, None


def segment(model, out, stop=None, **how):
    how = dict(progress=False, video=False) | how
    return segment_video(VideoSegmenter(model, "random", slots=3), stream(stop), MASKS, out, **how)


def read(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_extras_say_what_the_masks_say(tmp_path, model):
    segment(model, tmp_path / "plain")
    segment(model, tmp_path / "o", extras=("prob", "alpha"))
    plain, found = read(tmp_path / "plain"), read(tmp_path / "o")
    assert plain == {k: v for k, v in found.items() if "/" not in k}           # the masks are the same files
    again, pixels = VideoSegmenter(model, "random", slots=3), 0
    for t, frame in enumerate(CLIP.frames):
        prob = again.step(frame, MASKS.get(str(t)), return_prob=True)
        stored = np.load(tmp_path / "o" / "prob" / f"{t}.npz")
        assert stored["ids"].tolist() == ([0, 1] if t < ENTERS else [0, 1, 9])
        assert np.array_equal(stored["prob"], prob.numpy().astype(np.float16))
        labels = np.array(Image.open(tmp_path / "o" / f"{t}.png"))
        sure = np.sort(stored["prob"], 0)
        sure = sure[-1] > sure[-2]                                             # half precision makes ties
        pixels += sure.sum()
        assert np.array_equal(stored["ids"][stored["prob"].argmax(0)][sure], labels[sure])
        cutout = np.array(Image.open(tmp_path / "o" / "alpha" / f"{t}.png"))
        assert np.array_equal(cutout[..., :3], to_pixels(frame))
        assert np.abs(cutout[..., 3] / 255 - (1 - prob[0].numpy())).max() <= .5 / 255 + 1e-6
    assert pixels > 32 * 32 * 5


def test_a_run_that_was_stopped_has_the_same_extras(tmp_path, model):
    segment(model, tmp_path / "whole", extras=("prob", "alpha"))
    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            segment(model, tmp_path / "o", stop, extras=("prob", "alpha"), resume=stop == 4)
    refused("another extras", segment, model, tmp_path / "o", resume=True, extras=("alpha",))
    segment(model, tmp_path / "o", resume=True, extras=("prob", "alpha"))
    assert read(tmp_path / "whole") == read(tmp_path / "o")


def test_overwrite_leaves_no_old_extras_and_no_other_file_is_touched(tmp_path, model):
    out = tmp_path / "o"
    segment(model, out, extras=("alpha",))
    (out / "alpha" / "old.png").write_bytes(b"x")
    (out / "alpha" / "notes.txt").write_bytes(b"mine")
    segment(model, out, extras=("alpha",), overwrite=True)
    names = sorted(p.name for p in (out / "alpha").iterdir())
    assert names == sorted([f"{t}.png" for t in range(7)] + ["notes.txt"])


def test_what_is_no_extra_is_refused(tmp_path, model):
    refused(["prob, alpha", "found rgb"], segment, model, tmp_path / "o", extras=("rgb",))
    refused("expected 3 planes", write_prob, tmp_path / "a.npz", torch.rand(2, 4, 5), [1, 2])
    assert not list(tmp_path.iterdir())


def test_a_cutout_without_objects_is_transparent(tmp_path):
    write_cutout(tmp_path / "a.png", torch.rand(3, 4, 5), torch.ones(1, 4, 5))
    assert np.array(Image.open(tmp_path / "a.png"))[..., 3].max() == 0
