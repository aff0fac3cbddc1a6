"Pipes and cameras: read once, as they come."
import io

import av
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import stremn_main
from refusals import refused
from stremn.data.live import LiveVideo, open_camera, open_pipe
from stremn.data.video import SourceFrom, VideoFile

FRAMES = [np.random.default_rng(t).integers(0, 256, (24, 32, 3), np.uint8) for t in range(5)]


def write(file, kind="matroska", codec="ffv1", pixels="bgr0", **options):
    with av.open(file, "w", format=kind, options=options) as box:
        stream = box.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 24, pixels
        for frame in FRAMES: box.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        box.mux(stream.encode(None))


class Pipe(io.RawIOBase):
    "Bytes that can only be read forward."
    def __init__(self, data): self.data = io.BytesIO(data)
    def readable(self): return True
    def read(self, n=-1): return self.data.read(min(n, 1000))


def piped(**how):
    whole = io.BytesIO()
    write(whole, **how)
    return Pipe(whole.getvalue())


def test_a_pipe_gives_the_frames_once():
    live = open_pipe(piped())
    assert (live.size, live.fps, live.length, live.name) == ((24, 32), 10., None, "standard input")
    assert next(iter(live))[0] == "00000"                                      # a look at the first frame takes nothing
    found = list(live)
    assert [name for name, *_ in found] == [f"{t:05d}" for t in range(5)]
    assert all(np.array_equal((f * 255).round().byte().permute(1, 2, 0), x) for (_, f, _), x in zip(found, FRAMES))
    refused("found it passed", list, live)


def test_a_pipe_is_read_as_a_file_is(tmp_path):
    write(str(tmp_path / "a.mkv"), codec="libx264", pixels="yuv420p")
    live, file = open_pipe(Pipe((tmp_path / "a.mkv").read_bytes())), VideoFile(tmp_path / "a.mkv")
    assert all(torch.equal(a, b) for (_, a, _), (_, b, _) in zip(live, file, strict=True))


def test_what_cannot_be_read_forward_is_refused(tmp_path):
    write(str(tmp_path / "a.mp4"), kind="mp4", codec="libx264", pixels="yuv420p")
    refused("index in front", lambda: list(open_pipe(Pipe((tmp_path / "a.mp4").read_bytes()))))
    for data in (b"", b"nothing of the kind" * 50): refused("standard input: expected a video", open_pipe, Pipe(data))


def test_sizes_stay():
    live = LiveVideo(iter([FRAMES[0], FRAMES[1][:20]]), "mine")
    refused(["mine: expected 24x32", "found 20x32 at frame 1"], list, live)
    assert [n for n, *_ in SourceFrom(LiveVideo(iter(FRAMES), "mine"), 3)] == ["00003", "00004"]


class Camera:
    def __init__(self, number): self.number, self.frames = number, iter(FRAMES)
    def isOpened(self): return self.number == 0
    def get(self, what): return 0.
    def release(self): self.frames = None
    def read(self):
        frame = next(self.frames, None)
        return frame is not None, None if frame is None else frame[..., ::-1]


def test_a_camera_through_opencv(monkeypatch):
    cv2 = pytest.importorskip("cv2")
    refused("camera 99: expected a camera", open_camera, 99)
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    live = open_camera(0)
    assert live.fps is None and [n for n, *_ in live] == [f"{t:05d}" for t in range(5)]
    assert torch.equal(next(iter(live))[1], torch.from_numpy(FRAMES[0]).permute(2, 0, 1) / 255)


def test_segment_reads_a_pipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", type("In", (), {"buffer": piped()}))
    mask = np.zeros((24, 32), np.uint8)
    mask[5:15, 5:15] = 255
    Image.fromarray(mask).save("m.png")
    words = ["--mask", "m.png", "--out", "o", "--quiet", "--weights", "vos-tiny"]
    status, out, err = stremn_main(capsys, "segment", "-", *words)
    assert (status, err) == (0, []) and out[0] == "5 masks in o, objects 1"
    assert len(list((tmp_path / "o").glob("*.png"))) == 5
    status, _, err = stremn_main(capsys, "segment", *words)
    assert status == 2 and "a folder of frames, - for a pipe, or --camera N, found none" in err[0]
