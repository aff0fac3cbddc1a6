"Damaged videos and folders: what can be read keeps its numbers, and what cannot is named."
import av
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import stremn_main
from refusals import refused
from stremn.core import StremnError
from stremn.data.damaged import DamagedFolder, in_runs, open_damaged
from stremn.data.video import SourceFrom, VideoFile, open_source

COUNT, GROUP = 24, 8


def write_clip(path, codec, **options):
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as box:
        stream = box.add_stream(codec, rate=25)
        stream.width, stream.height, stream.options = 64, 48, options
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for _ in range(COUNT):
            box.mux(stream.encode(av.VideoFrame.from_ndarray(random.integers(0, 256, (48, 64, 3), np.uint8))))
        box.mux(stream.encode(None))


def hurt(path, which):
    "Overwrite the middle of one compressed picture."
    with av.open(str(path)) as box:
        places = sorted((p.dts if p.pts is None else p.pts, p.pos, p.size) for p in box.demux(video=0) if p.size)
    _, at, size = places[which]
    data = bytearray(path.read_bytes())
    data[at + size // 8:at + size * 7 // 8] = np.random.default_rng(which).bytes(size * 7 // 8 - size // 8)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "ip.mp4", "libx264", g=str(GROUP), bf="0", sc_threshold="0")
    write_clip(folder / "ipb.mkv", "libx264", g=str(GROUP), bf="2", sc_threshold="0")
    write_clip(folder / "intra.avi", "mjpeg")
    return folder


@pytest.mark.parametrize("name", ["ip.mp4", "ipb.mkv", "intra.avi"])
def test_whole_videos_are_read_as_ever(clips, name):
    pairs = list(zip(open_damaged(clips / name), VideoFile(clips / name), strict=True))
    assert len(pairs) == COUNT and all(a == b and torch.equal(x, y) for (a, x, _), (b, y, _) in pairs)


@pytest.mark.parametrize("name", ["ip.mp4", "ipb.mkv", "intra.avi"])
@pytest.mark.parametrize("which", [0, GROUP, GROUP + 3, COUNT - 1])
def test_what_is_read_is_exact_and_the_rest_is_named(clips, tmp_path, name, which):
    good = {n: f for n, f, _ in VideoFile(clips / name)}
    path = tmp_path / name
    path.write_bytes((clips / name).read_bytes())
    hurt(path, which)
    try: noticed = len(list(VideoFile(path))) < COUNT
    except StremnError as error:
        noticed = True
        assert "--skip-damaged" in str(error)
    video = open_damaged(path)
    found = {n: f for n, f, _ in video}
    assert sorted([*found, *video.damaged]) == sorted(good) and video.length == COUNT
    assert noticed or which not in (0, GROUP)                                  # H.264 has no checksum
    if not noticed: return
    assert f"{which:05d}" in video.damaged and all(torch.equal(f, good[n]) for n, f in found.items())
    keep = COUNT - (1 if name == "intra.avi" else GROUP + 2)
    assert len(found) >= keep


def test_a_cut_recording_is_read_to_its_end(clips, tmp_path):
    data = (clips / "ipb.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[:len(data) * 2 // 3])
    video = open_damaged(tmp_path / "cut.mkv")
    names = [n for n, *_ in video]
    assert names[0] == "00000" and GROUP < len(names) < COUNT
    (tmp_path / "zeros.mp4").write_bytes(bytes(5000))
    refused("expected a video file", open_damaged, tmp_path / "zeros.mp4")


def test_nothing_but_damage(clips, tmp_path):
    path = tmp_path / "intra.avi"
    path.write_bytes((clips / "intra.avi").read_bytes())
    for i in range(COUNT): hurt(path, i)
    refused("found no frame that can be decoded", open_damaged, path)


@pytest.fixture
def folder(tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    random = np.random.default_rng(0)
    for t in range(5): Image.fromarray(random.integers(0, 256, (48, 64, 3), np.uint8)).save(frames / f"{t}.jpg")
    return frames


def test_pictures_that_are_not_whole_are_left_out(folder):
    whole = {n: f for n, f, _ in open_source(folder)}
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:700])      # a header, and half of the pixels
    (folder / "3.jpg").write_bytes(b"x")
    refused("3.jpg", open_source, folder)
    video = open_damaged(folder)
    found = {n: f for n, f, _ in video}
    assert isinstance(video, DamagedFolder) and video.damaged == ["1", "3"] and video.length == 5
    assert list(found) == ["0", "2", "4"] and all(torch.equal(f, whole[n]) for n, f in found.items())
    assert [n for n, *_ in SourceFrom(video, 2)] == ["2", "4"]                 # numbered by the folder
    for t in range(5): (folder / f"{t}.jpg").write_bytes(b"x")
    refused("found none that can be read", open_damaged, folder)


def test_neighbours_are_told_as_runs():
    names = [str(i) for i in range(9)]
    assert in_runs(names, ["0", "2", "3", "4", "8"]) == ["0", "2-4", "8"] and in_runs(names, []) == []


def test_segment_goes_on_when_asked_to(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 10:30] = 255
    Image.fromarray(mask).save("mask.png")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:700])
    words = ["segment", folder, "--mask", "mask.png", "--out", "masks", "--quiet", "--weights", "vos-tiny"]
    status, out, err = stremn_main(capsys, *words, "--skip-damaged")
    assert (status, err) == (0, []) and out[-1] == "left out, damaged: 1 of 5 frames, 1"
    assert sorted(p.name for p in (tmp_path / "masks").glob("*.png")) == ["0.png", "2.png", "3.png", "4.png"]
    (folder / "0.jpg").write_bytes(b"x")
    status, out, err = stremn_main(capsys, *words, "--skip-damaged", "--overwrite")
    assert (status, len(err)) == (2, 1) and "found it damaged and 2 the first" in err[0] and "--start 2" in err[0]


def test_a_single_picture_is_no_video(folder):
    refused("found a single image", open_damaged, folder / "0.jpg")
