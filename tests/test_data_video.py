"""Video files: a lazy stream in, a browser's mp4 out, damage reported where it is, and memory that does not grow."""
import gc
import os
from fractions import Fraction
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stremn.data.video import VideoFile, VideoWriter, open_source
from stremn.data.vos import VideoFolder
from stremn.images import to_frame, to_pixels
from refusals import refused


def blocks(t, size=(48, 64)):
    "Frame `t`: coloured 8x8 blocks that move one block a frame."
    colours = np.random.default_rng(0).integers(0, 256, (-(-size[0] // 8), -(-size[1] // 8), 3), dtype=np.uint8)
    return to_frame(np.roll(colours, t, axis=1).repeat(8, 0).repeat(8, 1)[:size[0], :size[1]])


def make(path, n=30, size=(48, 64), fps=25., **kwargs):
    with VideoWriter(path, fps, size, **kwargs) as out:
        for t in range(n):
            out.write(blocks(t, size))
    return Path(path)


def starts(path):
    "Where the bytes of each picture begin, in file order."
    with av.open(str(path)) as box:
        return [p.pos for p in box.demux(video=0) if p.size]


# ---------------------------------------------------------------- round trip
@pytest.mark.parametrize("size", [(48, 64), (47, 63), (48, 63), (47, 64)])
def test_what_is_written_is_read(tmp_path, size):
    video = VideoFile(make(tmp_path / "v.mp4", size=size, quality=1))
    assert (video.name, video.length, video.fps) == ("v", 30, 25.)
    assert video.size == (48, 64)                                                       # odd sizes are padded
    for _ in range(2):                                                                  # a stream can be read again
        stream = list(video)
        assert [name for name, _, _ in stream] == [f"{t:05d}" for t in range(30)]
        for t, (_, frame, mask) in enumerate(stream):
            assert mask is None and frame.shape == (3, 48, 64) and frame.dtype == torch.float32
            inside = (frame - torch.nn.functional.pad(blocks(t, size), (0, size[1] % 2, 0, size[0] % 2),
                                                      mode="replicate"))
            centre = inside[:, 4::8, 4::8]                                     # away from edges, where colour is shared
            assert centre.abs().mean() < .02 and abs(centre.mean()) < .004              # unbiased: no darkening


def test_uint8_frames_are_written_like_floating_point_ones(tmp_path):
    for name, scale in (("a", lambda x: x), ("b", lambda x: torch.from_numpy(to_pixels(x)).permute(2, 0, 1))):
        with VideoWriter(tmp_path / f"{name}.mp4", 25, (48, 64)) as out:
            for t in range(5):
                out.write(scale(blocks(t)))
    pair = (VideoFile(tmp_path / name) for name in ("a.mp4", "b.mp4"))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(*pair, strict=True))


def test_the_file_is_what_browsers_play(tmp_path):
    path = make(tmp_path / "v.mp4", fps=30000 / 1001)
    with av.open(str(path)) as box:
        stream = box.streams.video[0]
        assert "mp4" in box.format.name and stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert stream.average_rate == Fraction(30000, 1001)
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")                                  # playable before it has all arrived


# ---------------------------------------------------------------- nothing half done
def test_an_error_leaves_nothing_or_the_old_file(tmp_path):
    def stop(error, path):
        with VideoWriter(path, 25, (48, 64)) as out:
            out.write(blocks(0))
            raise error

    for error in (RuntimeError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            stop(error, tmp_path / "v.mp4")
        assert os.listdir(tmp_path) == []
    old = make(tmp_path / "v.mp4").read_bytes()
    with pytest.raises(RuntimeError):
        stop(RuntimeError("x"), tmp_path / "v.mp4")
    assert os.listdir(tmp_path) == ["v.mp4"] and (tmp_path / "v.mp4").read_bytes() == old


def test_while_it_is_written_no_mp4_is_there(tmp_path):
    with VideoWriter(tmp_path / "new" / "v.mp4", 25, (48, 64)) as out:
        out.write(blocks(0))
        assert not list((tmp_path / "new").glob("*.mp4"))
    assert os.listdir(tmp_path / "new") == ["v.mp4"]


def test_the_writer_refuses(tmp_path):
    refused(".mp4", VideoWriter, tmp_path / "v.avi", 25, (48, 64))
    refused("frames a second", VideoWriter, tmp_path / "v.mp4", 0, (48, 64))
    refused("(height, width)", VideoWriter, tmp_path / "v.mp4", 25, (0, 64))
    (tmp_path / "d.mp4").mkdir()
    refused("a folder", VideoWriter, tmp_path / "d.mp4", 25, (48, 64))
    refused(["v.mp4", "at least one frame"], make, tmp_path / "v.mp4", n=0)
    out = VideoWriter(tmp_path / "v.mp4", 25, (48, 64))
    refused("with block", out.write, blocks(0))

    def write(frame):
        with VideoWriter(tmp_path / "v.mp4", 25, (48, 64)) as out:
            out.write(blocks(0))
            out.write(frame)

    refused(["48x64", "50x64", "frame 1"], write, blocks(0, (50, 64)))
    refused("[0,1]", write, blocks(0) * 255)
    refused("(3,H,W)", write, blocks(0)[0])
    assert os.listdir(tmp_path) == ["d.mp4"]


# ---------------------------------------------------------------- damage
def test_files_that_are_no_video_are_refused(tmp_path):
    for name, data in (("a.mp4", b"buy milk\n" * 200), ("b.avi", os.urandom(4096)),
                       ("notes.txt", b"hello world\n" * 100)):
        (tmp_path / name).write_bytes(data)
        refused([name, "expected a video file"], VideoFile, tmp_path / name)
    (tmp_path / "empty.mp4").touch()
    refused(["empty.mp4", "empty file"], VideoFile, tmp_path / "empty.mp4")
    refused(["none.mp4", "no such file"], VideoFile, tmp_path / "none.mp4")
    refused("a folder", VideoFile, tmp_path)
    Image.fromarray(to_pixels(blocks(0))).save(tmp_path / "i.png")
    (tmp_path / "i.mp4").write_bytes((tmp_path / "i.png").read_bytes())
    refused(["i.mp4", "single image"], VideoFile, tmp_path / "i.mp4")


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "s.wav"), "w") as box:
        stream = box.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        box.mux(stream.encode(frame))
        box.mux(stream.encode(None))
    refused(["s.wav", "no pictures"], VideoFile, tmp_path / "s.wav")


def test_a_missing_index_is_refused_at_once(tmp_path):
    data = make(tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(data[data.find(b"mdat") - 4:])
    refused(["v.mp4", "cut off"], VideoFile, tmp_path / "v.mp4")
    (tmp_path / "v.mp4").write_bytes(data[:data.find(b"mdat")])
    refused("v.mp4", VideoFile, tmp_path / "v.mp4")


@pytest.mark.parametrize("extra", [0, 7])
def test_a_cut_video_raises_after_the_frames_that_are_whole(tmp_path, extra):
    path = make(tmp_path / "v.mp4")
    path.write_bytes(path.read_bytes()[:starts(path)[20] + extra])                 # between two pictures, or inside one
    got = []

    def read():
        for name, _, _ in VideoFile(path):
            got.append(name)

    refused(["v.mp4", "expected 30 frames"], read)
    assert 10 <= len(got) <= 20 and got == [f"{t:05d}" for t in range(len(got))]
    if not extra:
        assert len(list(VideoFile(path, strict=False))) == 20


def test_damage_in_the_middle_raises_there(tmp_path):
    path = make(tmp_path / "v.mp4")
    data, at = path.read_bytes(), starts(path)
    assert at == sorted(at)
    path.write_bytes(data[:at[12]] + bytes(at[14] - at[12]) + data[at[14]:])            # two pictures of zeros
    got = []

    def read():
        for name, _, _ in VideoFile(path):
            got.append(name)

    refused(["v.mp4", "damaged or missing"], read)
    assert len(got) < 20


def test_avi_cut_short_is_noticed(tmp_path):
    path = tmp_path / "v.avi"
    with av.open(str(path), "w") as box:
        stream = box.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 47, 63, "yuvj420p"
        for t in range(20):
            frame = av.VideoFrame.from_ndarray(to_pixels(blocks(t, (47, 63))), format="rgb24")
            box.mux(stream.encode(frame.reformat(format="yuvj420p")))
        box.mux(stream.encode(None))
    video = VideoFile(path)
    assert video.size == (47, 63) and len(list(video)) == 20                           # odd sizes come back as they are
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    refused(["v.avi", "frames"], lambda: list(VideoFile(path)))


# ---------------------------------------------------------------- phones
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation_notes_are_honoured(tmp_path, turn):
    picture = torch.zeros(3, 32, 64)
    picture[0, :16, :16] = 1.                                                           # red corner, top left as stored
    path = tmp_path / "v.mp4"
    with VideoWriter(path, 25, (32, 64)) as out:
        for _ in range(3):
            out.write(picture)
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 40                                     # 3x3 matrix of the track header, version 0
    c, s = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]                    # clockwise on the screen
    for i, v in enumerate((c, s, 0, -s, c, 0)):
        data[matrix + 4 * i:matrix + 4 * i + 4] = (v << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(bytes(data))
    video = VideoFile(path)
    frame = next(iter(video))[1]
    want = torch.rot90(picture, -turn // 90, (1, 2))
    assert video.size == tuple(want.shape[1:]) == tuple(frame.shape[1:])
    assert (frame - want).abs().mean() < .05


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                                    (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)])
def test_every_display_matrix_is_honoured(tmp_path, matrix):
    "Mirrors, quarter turns, and both: a red spot is where the matrix sends it."
    path, (a, b, c, d) = tmp_path / "v.mp4", matrix
    picture = torch.zeros(3, 32, 64)
    picture[0, 4:12, 44:56] = 1.                                                    # rows 4 to 12, columns 44 to 56
    with VideoWriter(path, 25, (32, 64), quality=1) as out:
        out.write(picture)
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 4 + 40
    for i, v in enumerate((a, b, 0, c, d)):
        data[place + 4 * i:place + 4 * i + 4] = (v << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(bytes(data))
    want = torch.zeros(3, *((64, 32) if b else (32, 64)))
    for y in range(4, 12):
        for x in range(44, 56):
            X, Y = a * x + c * y, b * x + d * y                                     # negative: counted from the far end
            want[0, Y - (Y < 0 or b + d < 0 and Y == 0), X - (X < 0 or a + c < 0 and X == 0)] = 1.
    video = VideoFile(path)
    frame = next(iter(video))[1]
    assert video.size == tuple(want.shape[1:]) == tuple(frame.shape[1:])
    assert (frame - want).abs().mean() < .01, matrix


@pytest.mark.parametrize(("shape", "size"), [(None, (32, 64)), ((2, 1), (32, 128)), ((8, 9), (32, 57)),
                                             ((1280, 1281), (32, 64))])
def test_pixels_that_are_not_square_are_shown_as_players_do(tmp_path, shape, size):
    path = tmp_path / "v.mp4"
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 48:] = 255
    with av.open(str(path), "w") as box:
        stream = box.add_stream("libx264", rate=25, width=64, height=32, pix_fmt="yuv420p")
        if shape:
            stream.codec_context.sample_aspect_ratio = Fraction(*shape)
        for _ in range(2):
            box.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        box.mux(stream.encode())
    video = VideoFile(path)
    frames = [frame for _, frame, _ in video]
    assert video.size == size and {tuple(f.shape[1:]) for f in frames} == {size}
    bright = frames[0].mean(0) > .5
    assert abs(bright.float().mean() - .25) < .03 and bright[:, -size[1] // 5:].all()


# ---------------------------------------------------------------- memory
def resident():
    "Bytes of this process that are in memory (Linux)."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow_with_length(tmp_path):
    video = VideoFile(make(tmp_path / "v.mp4", n=1000, size=(64, 64)))
    seen, most, before, count = [], 0, None, 0
    for _, frame, _ in video:
        seen = [r for r in seen if r() is not None] + [weakref.ref(frame)]
        most, count = max(most, len(seen)), count + 1
        if count == 100 and os.path.exists("/proc/self/statm"):
            gc.collect()
            before = resident()
    assert count == 1000 and most <= 2                                            # the frame in hand and the one before
    if before is not None:
        held = 900 * 64 * 64 * 3 * 4                                         # 44 MB if frames were kept, 11 MB as bytes
        assert resident() - before < held / 8


def test_opening_decodes_no_more_than_it_needs(tmp_path):
    path = make(tmp_path / "v.mp4", n=60)
    path.write_bytes(path.read_bytes()[:starts(path)[30]])
    stream = iter(VideoFile(path))                                                      # the damage lies behind
    assert [next(stream)[0] for _ in range(5)] == [f"{t:05d}" for t in range(5)]


# ---------------------------------------------------------------- one door
def test_open_source(tmp_path):
    make(tmp_path / "v.mp4", n=2)
    (tmp_path / "f").mkdir()
    Image.fromarray(to_pixels(blocks(0))).save(tmp_path / "f" / "0.png")
    assert isinstance(open_source(tmp_path / "v.mp4"), VideoFile)
    assert isinstance(open_source(str(tmp_path / "f")), VideoFolder)
    refused(["0.png", "single image"], open_source, tmp_path / "f" / "0.png")
    refused(["nowhere", "no such file"], open_source, tmp_path / "nowhere")


def test_real_clips_open(data_root):
    for path in sorted((data_root / "actions" / "indoor").glob("*.avi"))[::9]:
        video = VideoFile(path)
        assert video.size == (480, 640) and sum(1 for _ in video) == video.length
