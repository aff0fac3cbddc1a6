"""Videos to predict: windows against the published loaders' walks, official trees, the real clips, refusals."""
import gzip
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import make_kth, shade, write_avi, write_digits, write_mp4
from refusals import refused
from stremn.core import StremnError
from stremn.data.catalog import count_windows, describe_prediction
from stremn.data.prediction import (
    PREDICTION_DATA, PredictionData, VideoEntry, action_videos, bounce, each_window, entry_windows, folder_videos,
    human_videos, kth_videos, moving_digits, prediction_data, prepare, read_digits, read_entry, read_moving,
    read_sequences, runs, spread, training_entries, window_starts, windows_to_test,
)
from stremn.images import LUMA
from stremn.models.prediction import PredictionConfig
from stremn.prediction.train import PredictionPhase, PredictionTask, PredictionTraining


# ---------------------------------------------------------------- windows
def mim_walk(names, length, step, interval=2, apart=5):
    "MIM's rule, read off its loader: one list of all frames, start after start; (video, number of its first frame)."
    at, out = 0, []
    while at + interval * length - 1 < len(names):
        (f0, n0), (f1, n1) = names[at], names[at + interval * (length - 1)]
        if f0 != f1:
            at += 1
            continue
        if n1 - n0 == apart * (length - 1) * interval:
            out.append((f0, n0))
        at += step
    return out


@pytest.mark.parametrize("step", [10, 5])
def test_windows_of_human36m_are_mims_but_for_its_last_one(step):
    rng = np.random.default_rng(step)
    for _ in range(20):
        videos = {f: list(range(1, 5 * int(rng.integers(1, 60)) + 1, 5)) for f in range(6)}
        ours = [(f, n[s]) for f, n in videos.items() for s in window_starts(n, 8, step, 2, 5)]
        theirs = mim_walk([(f, n) for f, ns in videos.items() for n in ns], 8, step)
        assert ours == theirs or ours[:-1] == theirs and len(videos[5]) == ours[-1][1] // 5 + 15


def predrnn_walk(frames, length, category):
    "PredRNN's rule, read off its loader: from the end; (video, number of the first frame), sorted."
    at, out = len(frames) - 1, []
    while at >= length - 1:
        (f0, n0), (f1, n1) = frames[at - length + 1], frames[at]
        if f0 == f1 and n1 - n0 == length - 1:
            out.append((f0, n0))
            at -= length - 1 if category[f1] == 1 else 2
        at -= 1
    return sorted(out)


def test_kth_windows_are_predrnns():
    rng = np.random.default_rng(0)
    for _ in range(20):
        videos = [sorted((1 + rng.choice(150, int(rng.integers(60, 150)), replace=False)).tolist()) for _ in range(4)]
        videos += [list(range(1, int(n))) for n in rng.integers(2, 100, 4)]
        category = rng.integers(1, 3, len(videos))
        for name, split in (("kth", "test"), ("kth-predrnn", "train")):
            p = prediction_data(name)
            entries = [VideoEntry(str(f), 1, "running" if category[f] == 2 else "boxing", tuple(n), ())
                       for f, n in enumerate(videos)]
            ours = [(f, x.numbers[s]) for f, x in enumerate(entries) for s in entry_windows(x, p, split)]
            theirs = predrnn_walk([(f, n) for f, ns in enumerate(videos) for n in ns], p.length(split), category)
            assert ours == theirs


def test_windows_stay_inside_and_apart():
    rng = np.random.default_rng(1)
    for _ in range(200):
        n = sorted(rng.choice(80, int(rng.integers(1, 80)), replace=False).tolist())
        length, stride, k = (int(x) for x in rng.integers(1, 9, 3))
        for back in (False, True):
            found = window_starts(n, length, stride, k, 1, back)
            assert found == sorted(found) and all(b - a >= stride for a, b in zip(found, found[1:]))
            for s in found:
                used = n[s:s + (length - 1) * k + 1]
                assert used == list(range(used[0], used[0] + (length - 1) * k + 1))


def test_a_video_is_split_at_its_gaps():
    assert runs([]) == [range(0, 0)]
    assert runs([1, 2, 3, 7, 8, 12]) == [range(0, 3), range(3, 5), range(5, 6)]
    assert runs([1, 6, 11, 12], 5) == [range(0, 3), range(3, 4)]


def test_protocols_split_people_without_overlap():
    for p in PREDICTION_DATA.values():
        train, choose, test = (set(p.groups(s)) for s in ("train", "choose", "test"))
        assert train and not train & choose and not test & set(p.train) and choose <= set(p.train)
        assert p.source and p.length("test") == p.observed + p.future
    assert prediction_data("kth").groups("test") == tuple(range(17, 26))
    assert prediction_data("h36m").groups("test") == (9, 11)
    own = PredictionData(name="x", dataset="folder", observed=2, future=2, learned=2, size=16, channels=1,
                         train=(0,), choose=(), test=(1,))
    assert prediction_data(own) is own
    refused("protocol: expected one of", prediction_data, "nope")
    refused("split: expected train, choose or test", own.groups, "val")


# ---------------------------------------------------------------- one frame
def bilinear(plane, size):
    "Four pixels around each centre, in float64, edges repeated: OpenCV's INTER_LINEAR."
    h, w = plane.shape
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y, x = (i + .5) * h / size - .5, (j + .5) * w / size - .5
            y0, x0 = int(np.floor(y)), int(np.floor(x))
            for dy in (0, 1):
                for dx in (0, 1):
                    part = (1 - abs(y - y0 - dy)) * (1 - abs(x - x0 - dx))
                    out[i, j] += part * plane[min(max(y0 + dy, 0), h - 1), min(max(x0 + dx, 0), w - 1)]
    return out


def test_prepare_is_opencvs_resize_of_the_right_part():
    frame = torch.rand(3, 60, 84, generator=torch.Generator().manual_seed(0))
    grey = sum(w * c for w, c in zip(LUMA, frame)).double().numpy()
    for view, part in (("whole", grey), ("square", grey[:, 12:72]), ("half", grey[15:45, 21:63])):
        found = prepare(frame, 16, 1, view, antialias=False)
        assert found.dtype == torch.uint8 and found.shape == (1, 16, 16)
        assert np.abs(found[0].numpy() - 255 * bilinear(part, 16)).max() < .51
    colour = prepare(frame, 16, 3, "whole", antialias=False)
    assert np.abs(colour[2].numpy() - 255 * bilinear(frame[2].double().numpy(), 16)).max() < .51
    smooth = prepare(frame, 4, 1, "square").float()
    cells = 255 * torch.from_numpy(grey[:, 12:72]).reshape(4, 15, 4, 15).mean((1, 3))
    assert (smooth[0] - cells).abs().max() < 12 < (prepare(frame, 4, 1, "square", False)[0] - cells).abs().max()
    odd = prepare(frame[:, :50], 16, 3, "half", antialias=False)              # MIM's slice [50//4:-50//4], 25 of 50
    assert np.abs(odd[0].numpy() - 255 * bilinear(frame[0, 12:37, 21:63].double().numpy(), 16)).max() < .51
    refused("view: expected", prepare, frame, 8, 1, "left")
    refused("frame: expected shape (3,H,W), found (1, 60, 84)", prepare, frame[:1], 8)
    refused("channels: expected 1 or 3", prepare, frame, 8, 2)
    refused("size: expected 1 or more", prepare, frame, 0)


# ---------------------------------------------------------------- KTH
def test_kth_reads_the_listed_frames_and_no_others(tmp_path):
    root = make_kth(tmp_path, {(1, "boxing"): 70, (16, "walking"): 40, (17, "boxing"): 70, (20, "running"): 40},
               {(17, "boxing"): "3-32, 33-34, 40-69", (20, "running"): "1-35"})
    videos = {f.name: f for f in kth_videos(root, allow_missing=True)}
    assert videos["person17_boxing_d1"].numbers == (*range(3, 35), *range(40, 70))
    x, names = windows_to_test(root, "kth", allow_missing=True)
    assert names == ["person17_boxing_d1@5", "person17_boxing_d1@40", "person20_running_d1@3", "person20_running_d1@6"]
    assert x.shape == (4, 30, 1, 128, 128) and x.dtype == torch.uint8
    for name, window in zip(names, x):
        first = int(name.split("@")[1])
        assert torch.equal(window[:, 0, 64, 64].int(), torch.tensor([shade(first - 1 + t) for t in range(30)]).int())
    train, names = training_entries(root, "kth", allow_missing=True)
    assert names == ["person01_boxing_d1@1"] and train[0].shape == (70, 1, 128, 128)
    held, names = training_entries(root, "kth", "choose", allow_missing=True)
    assert names == ["person16_walking_d1@1"]
    assert [tuple(r[:5]) for r in count_windows(root, "kth", True)] == [("kth", "train", 2, 110, 3),
                                                                       ("kth", "test", 2, 97, 4)]
    assert [r.published for r in count_windows(root, "kth-predrnn", True)] == [108_717, 4_086]
    some, names = windows_to_test(root, "kth", 2, True)
    assert torch.equal(some, x[[0, 2]]) and len(names) == 2
    assert [n for n, _ in each_window(root, "kth", None, True)][1] == "person17_boxing_d1@40"


def test_folders_of_frames_give_the_same_videos_of_kth(tmp_path):
    for n in (1, 2, 3, 7):
        path = tmp_path / "walking" / "person02_walking_d3_uncomp" / f"image_{n:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (160, 120), 10 * n).save(path, quality=100)
    entry, = kth_videos(tmp_path, allow_missing=True)
    assert (entry.name, entry.group, entry.action, entry.numbers) == ("person02_walking_d3", 2, "walking", (1, 2, 3, 7))
    assert read_entry(entry, "kth", [3, 0])[:, 0, 0, 0].tolist() == [70, 10]
    refused("found none in 0 videos", windows_to_test, tmp_path, "kth", allow_missing=True)
    refused(["30 frames for train of kth", "2 pieces, the longest of 3"], training_entries, tmp_path, "kth",
            allow_missing=True)
    refused("expected KTH's 599 videos, found 1; missing person01_boxing_d1", kth_videos, tmp_path)
    (entry.source[0].parent / "image_1.png").write_bytes(entry.source[0].read_bytes())
    refused("expected one image a number, found two", kth_videos, tmp_path, True)
    for f in entry.source[0].parent.iterdir():
        f.rename(f.with_name(f"odd{f.name}"))
    refused("expected frames called image_0001.jpg, found 5 other images", kth_videos, tmp_path, True)


def test_short_and_broken_videos_of_kth_are_cut_or_refused(tmp_path):
    root = make_kth(tmp_path, {(17, "boxing"): 40}, {(17, "boxing"): "1-30, 31-99"})
    assert kth_videos(root, True)[0].numbers == tuple(range(1, 41))        # listed beyond the end: cut there
    video = root / "boxing" / "person17_boxing_d1_uncomp.avi"
    entry = VideoEntry("x", 17, "boxing", tuple(range(1, 60)), video)
    refused("expected frame 59, found the end after 40", read_entry, entry, "kth")
    refused("expected at least one frame", read_entry, entry, "kth", [])
    (root / "00sequences.txt").write_text("person17_boxing_d1 frames 50-60")
    refused("expected frames 50 on, found a video of 40", kth_videos, root, True)
    (root / "00sequences.txt").write_text("person18_boxing_d1 frames 1-60")
    refused("expected a line for person17_boxing_d1, found none", kth_videos, root, True)
    (root / "00sequences.txt").unlink()
    refused("expected KTH's 00sequences.txt, found no such file", kth_videos, root, True)
    (root / "00sequences.txt").write_text("nothing\n")
    refused("expected lines like", read_sequences, root / "00sequences.txt")
    (root / "00sequences.txt").write_text("person17_boxing_d1 frames all")
    refused("line 1: expected frames like 1-95", read_sequences, root / "00sequences.txt")
    (root / "00sequences.txt").write_text("person17_boxing_d1 frames 5-1, 4-9\r\nperson17_boxing_d2\tframes\t2 - 3")
    assert read_sequences(root / "00sequences.txt") == {"person17_boxing_d1": tuple(range(1, 10)),
                                                       "person17_boxing_d2": (2, 3)}
    (root / "00sequences.txt").write_text("person17_boxing_d1 frames 1-40")
    video.write_bytes(video.read_bytes()[:200])
    refused(str(video), kth_videos, root, True)
    refused("expected KTH, found no data set of videos", kth_videos, tmp_path / "boxing")
    refused("no such folder", kth_videos, tmp_path / "nowhere")


# ---------------------------------------------------------------- Human3.6M
def test_frames_and_videos_of_human36m_give_the_same_windows(tmp_path):
    flat, tree = tmp_path / "flat", tmp_path / "tree"
    flat.mkdir()
    for take, n in (("", 80), (" 1", 200)):
        write_avi(tree / "S9" / "Videos" / f"Walking{take}.54138969.mp4".replace(".mp4", ".avi"), n % 110, (40, 40))
        for i in range(1, n % 110 + 1, 5):
            name = f"S9_Walking{take.replace(' ', '_')}.54138969_{i:06}.jpg"
            Image.new("RGB", (40, 40), (shade(i - 1),) * 3).save(flat / name, quality=100)
    for other in ("S9_WalkDog.54138969_000001.jpg", "S9_WalkTogether_1.54138969_000001.jpg", "S9_Eating.1_000001.jpg"):
        Image.new("RGB", (40, 40)).save(flat / other)
    write_avi(tree / "S9" / "Videos" / "WalkingDog.54138969.avi", 10, (40, 40))
    assert [f.name for f in human_videos(flat, True)] == [f.name for f in human_videos(tree, True)]
    (x, names), (y, same) = (windows_to_test(p, "h36m", allow_missing=True) for p in (flat, tree))
    assert names == same == ["S9_Walking.54138969@1", "S9_Walking_1.54138969@1", "S9_Walking_1.54138969@26"][:len(same)]
    assert x.shape[1:] == (8, 3, 128, 128) and (x.int() - y.int()).abs().max() <= 1
    assert (y[0, :, 0, 0, 0].int() - torch.tensor([shade(10 * t) for t in range(8)])).abs().max() <= 1
    refused(["expected walking scenes of subjects", "found none of [1, 5, 6, 7, 8, 11]"], human_videos, flat)


def test_training_videos_of_human36m_have_every_second_stored_frame(tmp_path):
    for i in range(1, 200, 5):
        Image.new("RGB", (40, 40), (i,) * 3).save(tmp_path / f"S1_Walking_1.55011271_{i:06}.jpg", quality=100)
    (video,), names = training_entries(tmp_path, "h36m", allow_missing=True)
    assert video.shape == (20, 3, 128, 128) and names == ["S1_Walking_1.55011271@1"]
    assert (video[:, 0, 0, 0].int() - torch.arange(1, 200, 10)).abs().max() <= 1


# ---------------------------------------------------------------- Moving MNIST
@pytest.mark.parametrize("name,pack", [("train-images-idx3-ubyte.gz", True), ("train-images.idx3-ubyte", False)])
def test_digits_come_packed_or_not(tmp_path, name, pack):
    digits = write_digits(tmp_path / name, pack=pack)
    assert (read_digits(tmp_path / name) == digits).all()
    videos, names = training_entries(tmp_path, "mmnist", limit=3)
    again, _ = training_entries(tmp_path.parent, "mmnist", limit=3)
    held, _ = training_entries(tmp_path, "mmnist", "choose", limit=3)
    assert len(videos) == 3 == len(names) and videos[0].shape == (20, 1, 64, 64) and videos[0].dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(videos, again)) and not torch.equal(videos[0], held[0])


def test_a_digit_moves_whole_and_the_brighter_is_seen():
    rng = np.random.default_rng(3)
    digits = rng.integers(1, 256, (4, 28, 28), dtype=np.uint8)
    for i in range(20):
        one = moving_digits(digits, np.random.default_rng(i), 30, 1)
        assert (one.ne(0).flatten(1).sum(1) == 28 * 28).all()
        patch = one[0, 0][one[0, 0] > 0].reshape(28, 28).numpy()
        assert any((patch == d).all() for d in digits)
        two = moving_digits(digits, np.random.default_rng(i), 30, 2)
        assert (two >= one).all()                                                  # the first digit is the same one
        way = bounce(rng.random(2), rng.random() * 7, 100)
        assert way.min() >= 0 and way.max() <= 36 and np.abs(np.diff(way, axis=0)).max() <= 4
    refused("size: expected more than 28", moving_digits, digits, rng, size=28)


def test_stored_sequences_are_read_as_they_are(tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (20, 7, 64, 64), dtype=np.uint8)
    np.save(tmp_path / "mnist_test_seq.npy", stored)
    x, names = windows_to_test(tmp_path, "mmnist")
    assert (x[:, :, 0].numpy() == stored.transpose(1, 0, 2, 3)).all() and names == [str(i) for i in range(7)]
    x, names = windows_to_test(tmp_path, "mmnist", 3)
    assert names == ["0", "2", "4"] == [str(i) for i in spread(7, 3)]
    assert [tuple(r) for r in count_windows(tmp_path, "mmnist")] == [("mmnist", "test", 7, 140, 7, 10_000)]
    refused("expected MNIST's train-images-idx3-ubyte, from which", training_entries, tmp_path, "mmnist")
    refused("limit: expected 1 or more", spread, 5, 0)
    np.save(tmp_path / "mnist_test_seq.npy", stored[:12])
    refused("expected at least 20 frames, found 12", windows_to_test, tmp_path, "mmnist")
    np.save(tmp_path / "mnist_test_seq.npy", stored.astype(float))
    refused("expected uint8 (20,10000,64,64), found float64", read_moving, tmp_path / "mnist_test_seq.npy")
    (tmp_path / "mnist_test_seq.npy").write_bytes(b"\x93NUMPY")
    refused("found no readable .npy", read_moving, tmp_path / "mnist_test_seq.npy")


def test_moving_digits_obey_the_size(tmp_path):
    digits = write_digits(tmp_path / "train-images-idx3-ubyte")
    wide = replace(prediction_data("mmnist"), size=96)
    for split, salt in (("train", 0), ("choose", 1)):
        videos, _ = training_entries(tmp_path, wide, split, limit=2)
        for i, video in enumerate(videos):
            assert video.shape == (20, 1, 96, 96)
            assert torch.equal(video, moving_digits(digits, np.random.default_rng([salt, i]), 20, size=96))
    corners = torch.cat(training_entries(tmp_path, wide, limit=20)[0])
    assert corners[..., 64:, :].any() and corners[..., 64:].any()                  # they use the whole canvas
    refused("size: expected more than 28, found 28", training_entries, tmp_path, replace(wide, size=28), limit=1)
    np.save(tmp_path / "mnist_test_seq.npy", np.zeros((20, 3, 64, 64), np.uint8))
    assert windows_to_test(tmp_path, "mmnist")[0].shape == (3, 20, 1, 64, 64)
    refused(["size: expected 64, the side of the frames in", "mnist_test_seq.npy, found 96"], windows_to_test, tmp_path,
            wide)


def test_broken_files_of_digits_are_refused(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_digits(path)
    whole = path.read_bytes()
    refused("mnist_test_seq.npy, found none", windows_to_test, tmp_path, "mmnist")
    for broken, said in ((whole[:100], "expected gzip, found damage"), (b"", "found a file that begins with nothing"),
                         (b"not digits, but longer than a head", "begins with 6e6f7420"),
                         (gzip.decompress(whole)[:-1], "expected 3920 bytes of 5 pictures, found 3919")):
        path.write_bytes(broken)
        refused(said, read_digits, path)
    refused("found no such file", read_digits, tmp_path / "other")


# ---------------------------------------------------------------- folders, inventory, tasks
def test_any_folder_is_split_by_position_or_by_train_and_test(tmp_path):
    for i in range(6):
        write_mp4(tmp_path / f"clip{i}.mp4", 22)
    for t in range(25):
        (tmp_path / "shots").mkdir(exist_ok=True)
        Image.new("RGB", (32, 24), (9 * t, 0, 0)).save(tmp_path / "shots" / f"{t}.png")
    (tmp_path / "notes.txt").write_text("not a video")
    assert [(f.name, f.group) for f in folder_videos(tmp_path)] == [
        ("clip0", 2), ("clip1", 0), ("clip2", 0), ("clip3", 0), ("clip4", 1), ("clip5", 0), ("shots", 0)]
    videos, names = training_entries(tmp_path, "folder")
    assert names[-1] == "shots@1" and videos[-1][:, 0, 9, 9].tolist() == [9 * t for t in range(25)]   # natural order
    x, names = windows_to_test(tmp_path, "folder")
    assert names == ["clip4@1"] and x.shape == (1, 20, 3, 64, 64)
    for part in ("train", "test"):
        write_mp4(tmp_path / part / "a.mp4", 20)
    assert [(f.name, f.group) for f in folder_videos(tmp_path)] == [("train/a", 2), ("test/a", 1)]
    refused("found none", folder_videos, tmp_path / "shots")
    refused("found a file", folder_videos, tmp_path / "notes.txt")


def test_videos_of_a_folder_have_different_names(tmp_path):
    for i in range(1, 12):
        (tmp_path / f"walk.{i:02}").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / f"walk.{i:02}" / "1.png")
    write_mp4(tmp_path / "a.mp4", 3)
    (tmp_path / "empty.avi").mkdir()                                               # a folder without images: no video
    walks = [f"walk.{i:02}" for i in range(1, 12)]
    assert [f.name for f in folder_videos(tmp_path)] == ["a", *walks]
    for other in ("a", "a.mkv"):
        (tmp_path / other).mkdir() if other == "a" else write_mp4(tmp_path / "b.mp4", 3).rename(tmp_path / other)
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / "1.png")
        found = folder_videos(tmp_path)
        assert len({f.name for f in found}) == len(found) and {"a", "a.mp4", other, *walks} == {f.name for f in found}
    assert all(f.name == (f.source if f.name.startswith("a.") else f.source[0].parent).name for f in found)
    for part in ("train", "test"):
        write_mp4(tmp_path / "own" / part / "a.mp4", 3)
    write_mp4(tmp_path / "own" / "test" / "a.avi.mp4", 3).rename(tmp_path / "own" / "test" / "a.avi")
    assert [f.name for f in folder_videos(tmp_path / "own")] == ["train/a", "test/a.avi", "test/a.mp4"]


def test_videos_feed_the_training_task(tmp_path):
    root = make_kth(tmp_path, {(1, "boxing"): 40, (2, "boxing"): 33, (15, "boxing"): 35})
    videos, _ = training_entries(root, "kth", allow_missing=True)
    held, _ = training_entries(root, "kth", "choose", allow_missing=True)
    task = PredictionTask(PredictionTraining(PredictionConfig(), stages=(PredictionPhase(1, 2, 20),)), videos, held)
    frames = task.batch(0, 0, 0).frames
    assert frames.shape == (2, 30, 1, 128, 128) and 0 <= frames.min() and frames.max() <= 1
    first = frames[:, :, 0, 0, 0].mul(255).round()
    assert torch.equal(first.diff(dim=1), torch.full((2, 29), 2.))                 # neighbours, in order


# ---------------------------------------------------------------- the real clips
def test_real_action_clips_are_read(data_root):
    root = data_root / "actions"
    if not (root / "indoor").is_dir():
        pytest.skip(f"no actions/indoor below STREMN_DATA={data_root}")
    rows = count_windows(root, "small")
    assert [(r.split, r.videos) for r in rows] == [("train", 18), ("test", 9)]
    videos, names = action_videos(root, (3,), 16, (1,))
    assert names == ["PS7A1P3T1", "PS7A2P3T1", "PS7A3P3T1"] and all(f.shape[1:] == (1, 16, 16) for f in videos)
    assert all(f.dtype == torch.uint8 and len(f) > 60 and f.float().std() > 20 for f in videos)
    x, _ = windows_to_test(root, "small", 2)
    assert x.shape == (2, 30, 1, 64, 64)
    refused("expected clips of persons [1, 4], found those of [1, 2, 3]", action_videos, root, (1, 4))
    refused("expected takes [9]", action_videos, root, (1,), 16, (9,))
    found = {(r.dataset, r.split): r.found for r in describe_prediction(root)}
    assert found["action clips", "train"] == 18 and found["action clips", "test"] == 9


def test_action_clips_must_be_there(tmp_path):
    with pytest.raises(StremnError, match="expected action clips, found no data set"):
        action_videos(tmp_path)
    write_mp4(tmp_path / "x.mp4", 3)
    (tmp_path / "x.mp4").rename(tmp_path / "PS7A1P1T1.avi")
    videos, names = action_videos(tmp_path, (1,), 8)
    assert names == ["PS7A1P1T1"] and videos[0].shape == (3, 1, 8, 8)
    refused("expected 27 clips, found 1", count_windows, tmp_path, "small")
