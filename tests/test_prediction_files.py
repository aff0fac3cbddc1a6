"""Prediction on files: the frames a network wants, the same numbers as `forward`, true scores, nothing half done."""
import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from stremn.core import make_generator
from stremn.config import to_json
from stremn.data.walkers import WalkersConfig, walkers
from stremn.data.video import VideoFile, VideoWriter, open_source
from stremn.data.vos import VideoFolder
from stremn.images import read_frame, to_pixels
from stremn.prediction.train import PredictionPhase, PredictionTask, PredictionTraining
from stremn.prediction.files import (
    InputSpec, PredictOptions, as_csv, comparison_video, framed, input_spec, names_after, predict_video, read_window,
    score_prediction, take_frames)
from stremn.prediction.stream import VideoPredictor, find_predictor
from stremn.core import check_output_folder, fill_folder
from stremn.models.hub import save_weights
from stremn.models.prediction import PredictionModel
from stremn.models.recall import RecallConfig, RecallModel
from stremn.models.prediction_baselines import ConstantVelocity, ConvLSTM, ConvLSTMConfig, CopyLast, SimVP, SimVPConfig
from stremn.models.vos import VOSModel
from stremn.train.loop import FitConfig, fit
from helpers import TINY_PREDICTION, TINY_PREDICTION_BANK
from refusals import refused


def network(**changes):
    "A small network in evaluation mode."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PredictionModel(replace(TINY_PREDICTION, **changes)).eval()


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def walker():
    return walkers(3, WalkersConfig(frames=12, size=16, colour=True, noise=0.)).frames  # (12,3,16,16)


def folder_of(path, frames, names=None):
    "Lossless PNGs."
    path.mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(to_pixels(frame)).save(path / f"{names[t] if names else f'{t:05}'}.png")
    return path


def run(model, source, out, **options):
    "With a task that fits twelve frames of 16 pixels."
    options = dict(observe=4, frames=5, size=16, progress=False) | options
    return predict_video(model, source, out, PredictOptions(**options))


def foretold(model, seen, future):
    "What a stream predicts after these frames (M,C,S,S), and which of all frames it holds in the end."
    predictor = VideoPredictor(model)
    for frame in seen:
        predictor.observe(frame)
    *_, (_, memory) = predictor.rollout(future)
    return predictor.predict(future), sorted(memory.frames[0].tolist())


# ---------------------------------------------------------------- what a network wants
def test_configs_and_cards_are_read(model, tmp_path):
    assert input_spec(model) == InputSpec(1, 64, 10, 4, 1)
    assert input_spec(CopyLast()) == InputSpec(3, 64, 10, 1, 1) and input_spec(ConstantVelocity()).min_frames == 2
    assert input_spec(ConvLSTM(ConvLSTMConfig(channels=3, patch=2, hidden=2, layers=1))) == InputSpec(3, 64, 10, 2, 1)
    assert input_spec(SimVP(SimVPConfig(observed=12))) == InputSpec(1, 64, 12, 4, 12)
    training = PredictionTraining(TINY_PREDICTION, observed=6, clip=WalkersConfig(size=32))
    path = save_weights(model, tmp_path / "net.safetensors", {"config": {"task": to_json(training)}}, "prediction")
    assert input_spec(find_predictor(path)) == input_spec(find_predictor(str(path))) == InputSpec(1, 32, 6, 4, 1)
    for protocol, view, smooth in (("kth", "whole", False), ("h36m", "half", False), ("small", "square", True)):
        card = {"config": {"task": to_json(replace(training, protocol=protocol))}}
        save_weights(model, path, card, "prediction")
        assert input_spec(find_predictor(path)) == InputSpec(1, 32, 6, 4, 1, view, smooth)


def test_what_was_trained_is_predicted_as_it_was_trained(tmp_path, walker):
    "A card as `fit` leaves it, all the way."
    training = PredictionTraining(TINY_PREDICTION, observed=3, stages=(PredictionPhase(1, 1, 1),),
                                  clip=WalkersConfig(size=16))
    weights = fit(PredictionTask(training), FitConfig(warmup=1), tmp_path / "run", "cpu", progress=False)
    assert input_spec(find_predictor(weights)) == InputSpec(1, 16, 3, 4, 1)
    done = predict_video(weights, folder_of(tmp_path / "f", walker), tmp_path / "o",
                         PredictOptions(frames=1, progress=False))
    assert len(done.seen) == 3 and read_frame(tmp_path / f"o/{done.names[0]}.png").shape[1:] == (16, 16)


def test_a_network_that_recalls_is_one_of_them(tmp_path, walker):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bank = replace(TINY_PREDICTION_BANK, locality=1.)
        net = RecallModel(RecallConfig(widths=(4, 6), strides=(2, 2), groups=2, bank=bank))
    weights = save_weights(net, tmp_path / "r.safetensors", {}, "recall")
    assert input_spec(find_predictor(weights)) == InputSpec(1, 64, 10, 4, 1)
    done = run(weights, folder_of(tmp_path / "f", walker), tmp_path / "o")
    without = run(weights, tmp_path / "f", tmp_path / "p", slots=0)
    assert done.known == 5 and len(done.stored) == 3 and without.stored == []
    assert done.scores["mse"] != without.scores["mse"]


def test_what_predicts_nothing_is_refused(tmp_path):
    refused("found VOSConfig", input_spec, VOSModel())
    refused("found Linear", input_spec, torch.nn.Linear(2, 2))
    refused("found VOSConfig", predict_video, "vos-tiny", folder_of(tmp_path / "f", torch.rand(2, 3, 8, 8)),
            tmp_path / "o")


# ---------------------------------------------------------------- frames
def middle(frame, size):
    "The middle square by a loop: mean of whole blocks, then brightness."
    h, w = frame.shape[1:]
    side, out = min(h, w), np.zeros((size, size))
    top, left, k = (h - side) // 2, (w - side) // 2, side // size
    for y in range(size):
        for x in range(size):
            block = frame[:, top + y * k:top + (y + 1) * k, left + x * k:left + (x + 1) * k].double()
            out[y, x] = float((block.mean((1, 2)) * torch.tensor([.299, .587, .114])).sum())
    return torch.from_numpy(out)[None]


def test_frames_are_the_middle_square_in_grey():
    smooth = torch.linspace(0, 1, 24)[None, None, :] * torch.tensor([.2, .9, .5])[:, None, None]
    frame = smooth.expand(3, 12, 24)
    _, same = read_window([("a", frame, None)], 0, 1, 12, 1)
    assert (same[0] - middle(frame, 12)).abs().max() < 1.01 / 255
    _, small = read_window([("a", frame, None)], 0, 1, 4, 1)
    assert (small[0, :, :, 1:3] - middle(frame, 4)[:, :, 1:3]).abs().max() < 1.01 / 255  # linear: a triangle is a mean
    assert read_window([("a", frame, None)], 0, 1, 4, 3)[1].shape == (1, 3, 4, 4)
    whole = read_window([("a", frame, None)], 0, 1, 12, 1, "whole")[1]
    assert float(whole[0, 0, 6, -1] - whole[0, 0, 6, 0]) > 1.5 * float(same[0, 0, 6, -1] - same[0, 0, 6, 0])


def test_every_source_and_every_start(tmp_path, walker):
    folder = folder_of(tmp_path / "f", walker)
    rows = [(f"{t:05}", frame, None) for t, frame in enumerate(walker)]
    for start, count in ((0, 12), (3, 4), (10, 9), (12, 1), (40, 2)):
        want = [n for n, *_ in rows][start:start + count]
        for source in (VideoFolder(folder), rows, iter(rows), ((n, to_pixels(f), None) for n, f, _ in rows)):
            names, frames = read_window(source, start, count, 16, 3)
            assert names == want and frames.shape == (len(want), 3, 16, 16)
            assert len(want) == 0 or (frames - walker[start:start + count]).abs().max() < 1.01 / 255


def test_no_more_is_read_than_wanted(tmp_path, walker):
    folder = folder_of(tmp_path / "f", walker)
    for t in (0, 1, 7):
        (folder / f"{t:05}.png").write_bytes((folder / f"{t:05}.png").read_bytes()[:90])   # header whole, pixels cut
    assert [n for n, _ in take_frames(VideoFolder(folder), 2, 5)] == [f"{t:05}" for t in range(2, 7)]
    refused("00007.png: expected a frame, found a damaged or truncated file",
            read_window, VideoFolder(folder), 2, 6, 16, 1)

    def endless():
        for t in range(10**9):
            assert t < 8
            yield f"{t}", walker[0], None
    assert read_window(endless(), 3, 5, 16, 1)[0] == ["3", "4", "5", "6", "7"]


@pytest.mark.parametrize("bad, said", [
    (torch.full((3, 16, 16), math.nan), "found nan to nan"), (torch.full((3, 16, 16), 2.), "found 2 to 2"),
    (torch.zeros(3, 8, 16), "expected 16 x 16 (height x width) as before, found 8 x 16"),
    (torch.zeros(4, 16, 16), "found (4, 16, 16)"), ("a.png", "found str"), (torch.zeros(3, 16, 16).long(), "int64")])
def test_what_is_no_frame_is_refused_by_name(tmp_path, model, walker, bad, said):
    rows = [(f"f{t}", bad if t == 2 else frame, None) for t, frame in enumerate(walker)]
    refused(["source, frame f2: ", said], run, model, rows, tmp_path / "o")
    refused("found this one twice", read_window, [("a", walker[0], None)] * 2, 0, 2, 16, 1)
    for name in ("../a", "", "a/b", 7):
        refused("source: expected names that can name", read_window, [(name, walker[0], None)], 0, 1, 16, 1)
    assert list(tmp_path.iterdir()) == []


def test_names_go_on_counting():
    assert names_after(["7"], 4) == ["8", "9", "10", "11"]
    assert names_after(["00098", "00099"], 2) == ["00100", "00101"]
    assert names_after(["x-10-a", "x-20-a"], 2) == ["x-30-a", "x-40-a"]
    assert names_after(["2024_5", "2025_9"], 1) == ["2025_10"]          # another prefix: no step can be told
    assert names_after(["5", "3"], 2) == ["4", "5"] and names_after(["a", "b"], 1) == ["b+1"]
    assert names_after(["clip9"], 0) == []
    for names in (["00008", "00010"], ["img_001"], ["z"]):
        assert len({*names, *names_after(names, 30)}) == len(names) + 30


# ---------------------------------------------------------------- scores
def test_scores_by_hand_and_in_the_table():
    g = make_generator(3)
    found, last, true = torch.rand(5, 1, 9, 9, generator=g), torch.rand(1, 9, 9, generator=g), torch.rand(
        3, 1, 9, 9, generator=g)
    scores = score_prediction(found, last, true)
    assert list(scores) == ["mse", "mae", "psnr", "ssim", "copy_mse", "copy_mae", "copy_psnr", "copy_ssim"]
    for i in range(3):
        for start, guess in (("", found[i]), ("copy_", last)):
            squares = sum((float(a) - float(b))**2 for a, b in zip(guess.flatten(), true[i].flatten()))
            assert scores[start + "mse"][i] == pytest.approx(squares, rel=1e-6)
            assert scores[start + "psnr"][i] == pytest.approx(-10 * math.log10(squares / 81), rel=1e-6)
    rows = list(csv.DictReader(as_csv(["a", 'b, c', "d"], scores).splitlines()))
    assert [r["frame"] for r in rows] == ["a", "b, c", "d"]
    assert all(float(r[m]) == pytest.approx(scores[m][i], rel=1e-5) for i, r in enumerate(rows) for m in scores)


def test_a_perfect_prediction_is_infinitely_good():
    still = torch.rand(2, 3, 8, 8, generator=make_generator(4))
    scores = score_prediction(still, still[0], still)
    assert scores["psnr"] == [math.inf]*2 and scores["ssim"] == [1., 1.] and "inf" in as_csv("ab", scores)


# ---------------------------------------------------------------- pictures
def test_panels():
    frame = torch.rand(1, 30, 30)
    big = framed(frame, (1., 0., 0.), 100, 3)
    assert big.shape == (3, 126, 126) and torch.equal(big[:, 3:-3:4, 3:-3:4], frame.expand(3, -1, -1))
    assert big[:, 0, 0].tolist() == [1., 0., 0.] and framed(torch.rand(3, 200, 200)).shape == (3, 208, 208)
    seen, found = torch.rand(2, 3, 160, 160), torch.rand(4, 3, 160, 160)
    for n, width in ((0, 168), (1, 504), (4, 504)):
        true = torch.rand(n, 3, 160, 160)
        pictures = list(comparison_video(seen, found, true))
        assert [tuple(p.shape) for p in pictures] == [(3, 168, width)] * 6
        for i in range(4):
            inside = [part[:, 4:-4, 4:-4] for part in pictures[2 + i].split(168, 2)]
            assert torch.equal(inside[1 if n else 0], found[i])
            if i < n:
                assert torch.equal(inside[0], true[i])
                assert torch.allclose(inside[2], .5 + (true[i] - found[i]) / 2)
            elif n:
                assert bool((inside[0] == .5).all() and (inside[2] == .5).all())


# ---------------------------------------------------------------- folders
@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_becomes_a_folder(tmp_path, walker, channels):
    m = network(channels=channels, output="sigmoid")
    names = [f"walk_{t:03}" for t in range(5, 65, 5)]
    source = folder_of(tmp_path / "f", walker, names)
    done = run(m, source, tmp_path / "a" / "o", start=1)
    assert (done.seen, done.names, done.known) == (names[1:5], names[5:10], 5)
    assert sorted(p.name for p in done.folder.iterdir()) == sorted(
        [*[f"{n}.png" for n in names[5:10]], "metrics.csv", "predicted.mp4"])
    _, clip = read_window(open_source(source), 1, 9, 16, channels)
    want, stored = foretold(m, clip[:4], 5)
    for n, frame in zip(done.names, want):
        assert Image.open(done.folder / f"{n}.png").mode == ("L" if channels == 1 else "RGB")
        assert (read_frame(done.folder / f"{n}.png") - frame).abs().max() < .51 / 255
    scores = score_prediction(want, clip[3], clip[4:])
    assert done.scores == pytest.approx({k: sum(v) / 5 for k, v in scores.items()}, rel=1e-5)
    assert (done.folder / "metrics.csv").read_text() == as_csv(done.names, scores)
    assert done.stored == [names[1 + t] for t in stored]
    lines = done.summary.splitlines()
    assert "5 predicted after 4 seen (walk_010 to walk_025): walk_030.png to walk_050.png" in lines[0]
    assert lines[1].split()[:3] == ["5", "true", "frames"] and lines[2].startswith("PredictionModel")
    assert lines[3].startswith("copy of the last frame") and lines[4].startswith("in memory at the end: seen ")


def test_the_future_may_be_unknown_or_end_early(tmp_path, model, walker):
    source = folder_of(tmp_path / "f", walker)
    none, some = run(model, source, tmp_path / "n", start=8), run(model, source, tmp_path / "s", start=6)
    assert (none.known, none.scores, some.known) == (0, {}, 2)
    assert none.names == [f"{t:05}" for t in range(12, 17)] and some.names == [f"{t:05}" for t in range(10, 15)]
    assert not (none.folder / "metrics.csv").exists() and "true frames" not in none.summary
    assert len((some.folder / "metrics.csv").read_text().splitlines()) == 3
    assert VideoFile(none.folder / "predicted.mp4").size == (168, 168)
    written = VideoFile(some.folder / "predicted.mp4")
    assert (written.size, written.length, written.fps) == ((168, 504), 9, 24.)
    one = run(model, source, tmp_path / "one", frames=1, observe=1, video=False)
    assert (one.names, one.known) == (["00001"], 1) and not (one.folder / "predicted.mp4").exists()
    assert "00001.png in " in one.summary


def test_a_video_file_gives_its_own_speed(tmp_path, model, walker):
    with VideoWriter(tmp_path / "in.mp4", 12.5, (16, 16)) as out:
        for frame in walker:
            out.write(frame)
    done = run(model, str(tmp_path / "in.mp4"), str(tmp_path / "o"))
    assert VideoFile(done.folder / "predicted.mp4").fps == 12.5 and done.names[0] == "00004"
    assert VideoFile(run(model, tmp_path / "in.mp4", tmp_path / "p", fps=5).folder / "predicted.mp4").fps == 5


def test_baselines_and_weights_by_name(tmp_path, model, walker):
    source = folder_of(tmp_path / "f", walker)
    copied = run("copy", source, tmp_path / "c")
    assert all(copied.scores[m] == pytest.approx(copied.scores[f"copy_{m}"]) for m in ("mse", "mae", "psnr", "ssim"))
    assert copied.stored == [] and "in memory" not in copied.summary and "\ncopy  " in copied.summary
    small = ConvLSTM(ConvLSTMConfig(hidden=3, layers=1, patch=2, kernel=3))
    assert run(small, source, tmp_path / "l").known == 5
    path = save_weights(model, tmp_path / "mine.safetensors", {}, "prediction")
    by_file, by_hand = run(path, source, tmp_path / "w"), run(model, source, tmp_path / "m")
    assert by_file.model == "mine" and by_file.scores == pytest.approx(by_hand.scores)


@pytest.mark.parametrize("options, said", [
    (dict(start=9), "f: expected 4 frames to watch from frame 9 on, found 3"),
    (dict(start=99), "from frame 99 on, found 0"), (dict(start=-1), "start: expected 0 or more"),
    (dict(frames=0), "frames: expected 1 or more"), (dict(frames=2.), "frames: expected 1 or more"),
    (dict(observe=0), "observe: expected 1 or more"), (dict(size=18), "size: expected a multiple of 4"),
    (dict(size=4), "size: expected 7 or more"), (dict(view="round"), "view: expected whole, square or half"),
    (dict(policy="no such rule"), "policy"), (dict(slots=-2), "slots"), (dict(slots="default"), "slots"),
    (dict(device="tpu"), "device"),
    (dict(fps=-3), "frames a second")])
def test_a_task_that_cannot_be_done_writes_nothing(tmp_path, model, walker, options, said):
    source = folder_of(tmp_path / "f", walker)
    refused(said, run, model, source, tmp_path / "o", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_sources_that_cannot_be_read(tmp_path, model, walker):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    for source, said in ((tmp_path / "text.mp4", "expected a video file"), (tmp_path / "gone", "found no such file"),
                         (tmp_path / "empty", "expected a folder of frames")):
        refused([str(source), said], run, model, source, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_nothing_is_overwritten_that_is_not_ours(tmp_path, model, walker):
    source = folder_of(tmp_path / "f", walker)
    out = run(model, source, tmp_path / "o").folder
    refused("expected no result in it, found 00004.png (--overwrite", run, model, source, out)
    assert run(model, source, out, frames=2, overwrite=True).names == ["00004", "00005"]
    assert len(list(out.iterdir())) == 4                                          # nothing of the longer run remains
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    refused("from frame 11 on", run, model, source, out, start=11, overwrite=True)
    refused("another folder than that of the source", run, model, source, source, overwrite=True)
    refused("another folder than that of the source", run, model, source, tmp_path, overwrite=True)
    (tmp_path / "walk.mp4").write_text("video")
    refused("found a file", run, model, source, tmp_path / "walk.mp4", overwrite=True)
    refused("can be made", run, model, source, tmp_path / "walk.mp4" / "below")
    assert before == {p.name: p.read_bytes() for p in out.iterdir()} and len(list(source.iterdir())) == 12
    (out / "thesis.tex").write_text("my life")
    assert run(model, source, out, overwrite=True).folder == out and (out / "thesis.tex").read_text() == "my life"
    check_output_folder(tmp_path / "new", False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "o", "walk.mp4"]


def test_whatever_goes_wrong_leaves_no_folder(tmp_path, model, walker, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt
    source = folder_of(tmp_path / "f", walker)
    monkeypatch.setattr("stremn.prediction.files.comparison_video", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(model, source, tmp_path / "o")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    monkeypatch.undo()
    broken = network()
    broken.leave.bias.data.fill_(math.nan)
    refused("finite", run, broken, source, tmp_path / "o")
    with pytest.raises(RuntimeError), fill_folder(tmp_path / "o") as part:
        (part / "00000.png").write_bytes(b"half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
