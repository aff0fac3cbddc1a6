"""The tiny protocol: frame scores against an independent loop, held-out clips, records, the report."""
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stremn.results import Record
from stremn.data.clips import Clip
from stremn.data.chameleon import ChameleonConfig, chameleon_batch
from stremn.data.vos import VideoFolder
from stremn.images import to_pixels, write_mask
from stremn.vos.stream import VideoSegmenter
from stremn.experiments.measure import BELADY, POLICIES, UNBOUNDED, VideoEval, ChameleonEval, follow_video, frame_scores, held_out_clips, evaluate_chameleon, measure_policies, belady, video_eval_config, running_mean
from stremn.experiments.vos import VIDEO_STUDIES
from stremn.memory.rules import RULES, Request
from stremn.vos.multiscale import MultiScaleSegmenter, multi_scale
from stremn.experiments.vos import measure_views, measure_baselines, baseline_segmenter
from stremn.results import load_records
from refusals import refused
from test_vos_stream import network

CLIP = ChameleonConfig(frames=10, size=32, modes=2, stay=(1, 2), fade=1, lookalikes=1)


def by_hand(model, clip, policy, slots, seed=0):
    "Stream one clip, count pixels; first and last frame left out."
    segmenter, out = VideoSegmenter(model, belady([clip]) if policy == BELADY else policy, slots, seed=seed), []
    for t, frame in enumerate(clip.frames):
        said = segmenter.step(frame, clip.masks[0] if t == 0 else None).numpy() == 1
        true = clip.masks[t].numpy() == 1
        out.append((said & true).sum() / (said | true).sum() if (said | true).any() else 1.)
    return out[1:-1]


# ---------------------------------------------------------------- scores
@pytest.mark.parametrize("policy", POLICIES)
def test_frame_scores_equal_an_independent_loop(model, clips, policy):
    "One clip a batch, so that lots are the stream's own; then side by side where no lots are drawn."
    rule, slots = ("oldest", None) if policy == UNBOUNDED else (policy, 3)
    wanted = np.array([by_hand(model, c, rule, slots, seed=7 + i) for i, c in enumerate(clips)])
    scores = frame_scores(model, clips, policy, 3, seed=7, batch=1)
    assert scores.shape == (5, 8) and scores.dtype == torch.float32
    assert np.allclose(scores, wanted, atol=1e-6) and wanted.std() > .01
    if policy not in ("random", "reservoir"):
        for batch in (2, 10):
            assert np.allclose(frame_scores(model, clips, policy, 3, batch=batch), wanted, atol=1e-6)


def test_policies_are_the_rules_and_the_unbounded_memory():
    assert POLICIES == (UNBOUNDED, BELADY, *RULES) and not {UNBOUNDED, BELADY} & set(RULES)


def test_lots_depend_on_the_seed_alone(model, clips):
    def scores(seed):
        torch.rand(3)
        return frame_scores(model, clips, "random", 3, seed)
    assert torch.equal(scores(1), scores(1)) and not torch.equal(scores(1), scores(2))


def test_the_network_comes_back_as_it_was(clips):
    model = network(noise="train")
    plain = frame_scores(model, clips, "learned", 3)
    # in evaluation mode, whatever the mode was
    assert torch.equal(frame_scores(model.train(), clips, "learned", 3), plain)
    assert model.training and (model.bank.policy, model.bank.slots) == ("learned", 3)
    refused(["policy: expected one of", "'best'"], frame_scores, model, clips, "best", 3)
    assert model.training and (model.bank.policy, model.bank.slots) == ("learned", 3)


def test_clips_that_cannot_be_scored_are_refused(model, clips):
    refused("found 0", frame_scores, model, [], "oldest", 3)
    short = [c._replace(frames=c.frames[:2], masks=c.masks[:2]) for c in clips]
    refused("at least 3 frames", frame_scores, model, short, "oldest", 3)
    refused("one shape", frame_scores, model, [clips[0], clips[1]._replace(frames=clips[1].frames[:5])], "oldest", 3)


# ---------------------------------------------------------------- the protocol
def test_clips_are_held_out_and_always_the_same():
    c = ChameleonEval(clips=3, clip=CLIP)
    a, b = held_out_clips(c), held_out_clips(replace(c, clips=2, policy="oldest"))
    assert [x.name for x in a] == [f"chameleon-{1_000_000 + i}" for i in range(3)]
    assert all(torch.equal(x.frames, y.frames) and torch.equal(x.masks, y.masks) for x, y in zip(a, b))


def test_no_training_clip_of_an_ordinary_run_is_a_test_clip():
    "NumPy pads short entropy with zeros: the number s is the list [s,0,0,0]. Runs below the first test seed are safe."
    def state(entropy):
        return tuple(np.random.SeedSequence(entropy).generate_state(4))
    first = ChameleonEval().first
    assert state(first) == state([first, 0, 0, 0])                                      # the trap is real
    test = {state(first + i) for i in range(ChameleonEval().clips)}
    train = {state([seed, step, 0, i]) for seed in range(4) for step in (0, 1, 99, 1500) for i in range(8)}
    assert len(test) == 40 and not test & train


def test_a_measurement_is_a_record_with_its_origin(model, clips, tmp_path):
    c = ChameleonEval(policy="newest", slots=2, clips=5, clip=CLIP, seed=3)
    record, scores = evaluate_chameleon(c, model, clips)
    assert record.name == "newest" and record.protocol == "tiny" and record.seed == 3
    assert record.config["slots"] == 2 and record.config["clip"]["frames"] == 10 and record.seconds > 0
    assert record.metrics["J"] == pytest.approx(float(scores.mean()), abs=1e-6)
    assert record.clips["J"] == pytest.approx({x.name: float(s) for x, s in zip(clips, scores.mean(1))})
    assert record.device.startswith("cpu ")
    assert Record.load(record.save(tmp_path)) == record


def test_smooth_by_hand():
    assert running_mean([1., 2., 3., 4.], 3) == ([2, 3], [2., 3.])
    assert running_mean([5., 7.], 1) == ([1, 2], [5., 7.]) and running_mean([1., 2.], 3) == ([], [])
    for bad in (0, 2, -1):
        refused("odd", running_mean, [1., 2.], bad)


# ---------------------------------------------------------------- the oracle
def needed_last(modes, held, t):
    "Belady by hand: useless, then doubled (the older), then needed last; frame 0 is pinned."
    return max((f for f in held if f != 0), key=lambda f: rank_of(modes, held, t, f))


def test_the_oracle_is_belady():
    rng = np.random.default_rng(0)
    for _ in range(200):
        T, n = 30, int(rng.integers(2, 6))
        modes, t = rng.integers(-1, 4, T), int(rng.integers(n, T - 1))
        held = [0, *sorted(rng.choice(np.arange(1, t), n - 1, replace=False).tolist())] if t > n else list(range(n))
        clip = Clip(torch.zeros(T, 3, 1, 1), torch.zeros(T, 1, 1), "made", torch.tensor(modes)[:, None])
        frames = torch.tensor([held])
        a = belady([clip])(Request(frames, frames > 0, t, t, None, None))
        gone, wanted = frames[a > .5].item(), needed_last(modes, held, t)
        assert a.sum() == 1 and (gone == wanted or rank_of(modes, held, t, gone) == rank_of(modes, held, t, wanted))


def rank_of(modes, held, t, f):
    "How dispensable a frame is; equals may go in any order."
    if modes[f] < 0:
        return 2, 0
    if modes[f] == modes[t] or sum(modes[g] == modes[f] for g in held) > 1:
        return 1, t - f
    return 0, next((u - t for u in range(t + 1, len(modes)) if modes[u] == modes[f]), len(modes))


def test_changes_of_the_bank_last_as_long_as_the_test(model, clips):
    before = model.bank.config
    held = frame_scores(model, clips, "reservoir", 3, latest="held")
    assert model.bank.config is before and not torch.equal(held, frame_scores(model, clips, "reservoir", 3))
    noisy = [frame_scores(model, clips, "learned", 3, seed, noise="always") for seed in (0, 1)]
    assert not torch.equal(*noisy)
    assert torch.equal(noisy[0], frame_scores(model, clips, "learned", 3, 0, noise="always"))


def test_only_the_first_frames_of_the_same_clips():
    c = ChameleonEval(clips=2, clip=CLIP)
    for whole, part in zip(held_out_clips(c), held_out_clips(replace(c, upto=4))):
        assert part.frames.shape[0] == 4 and torch.equal(part.frames, whole.frames[:4]) and len(part.modes) == 4


def real(folder, clips):
    "Made clips as folders of files; the first one has a single object."
    videos = []
    for clip, merge in zip(clips, (True, False), strict=True):
        for t in range(7):
            write_mask(folder / clip.name / "masks" / f"{t}.png", clip.masks[t])
            Image.fromarray(to_pixels(clip.frames[t])).save(folder / clip.name / f"{t}.png")
        videos.append(VideoFolder(folder / clip.name, folder / clip.name / "masks", merge))
    return videos


def test_real_video_is_streamed_scored_and_stored_once(tmp_path, model):
    clips = chameleon_batch((7, 8), ChameleonConfig(frames=7, objects=2))
    videos = real(tmp_path, clips)
    c = VideoEval("tiny", "vos-tiny", "made", slots=3)
    rows = measure_policies(c, videos, tmp_path / "out", ("oldest", "unbounded"), model, progress=False)
    one, two = (clip.name for clip in clips)
    assert [r.name for r in rows] == ["oldest", "unbounded"]
    assert set(rows[0].clips["J"]) == {one, f"{two}/1", f"{two}/2"} == set(rows[0].clips["F"])
    for record in rows:
        for m in "JF":
            assert record.metrics[m] == pytest.approx(sum(record.clips[m].values()) / 3)
        assert record.metrics["JF"] == pytest.approx((record.metrics["J"] + record.metrics["F"]) / 2)
    found, true = follow_video(VideoSegmenter(model, "oldest", 3), videos[1])
    for i in (1, 2):
        ious = []
        for a, b in zip(found[1:-1].numpy() == i, true[1:-1].numpy() == i, strict=True):
            ious.append((a & b).sum() / (a | b).sum() if (a | b).any() else 1.)
        assert rows[0].clips["J"][f"{two}/{i}"] == pytest.approx(sum(ious) / 5)
    before = (tmp_path / "out" / "oldest-s0.json").read_bytes()
    measure_policies(c, videos, tmp_path / "out", ("oldest",), model, progress=False)
    assert (tmp_path / "out" / "oldest-s0.json").read_bytes() == before
    measure_policies(c, videos[:1], tmp_path / "out", ("oldest",), model, progress=False)
    assert (tmp_path / "out" / "oldest-s0.json").read_bytes() != before


# ---------------------------------------------------------------- who looks
def test_another_segmenter_is_measured_and_noted(tmp_path, model):
    videos = real(tmp_path, chameleon_batch((7, 8), ChameleonConfig(frames=7, size=48, objects=2)))
    c, mirror = VideoEval("tiny", "vos-tiny", "made", slots=3), partial(MultiScaleSegmenter, flip=True)
    plain, = measure_policies(c, videos, tmp_path / "out", ("oldest",), model, progress=False)
    looks, = measure_policies(c, videos, tmp_path / "looks", ("oldest",), model, progress=False, make=mirror)
    assert looks.config == plain.config | {"segmenter": "MultiScaleSegmenter", "looking": {
        "branches": [[1., False], [1., True]], "far": None, "hard": None, "longest": None}}
    found, true = follow_video(MultiScaleSegmenter(model, flip=True, policy="oldest", slots=3), videos[0])
    ious = [(a & b).sum() / (a | b).sum() if (a | b).any() else 1. for a, b in zip(
        (found[1:-1] == 1).numpy(), (true[1:-1] == 1).numpy(), strict=True)]
    assert looks.clips["J"][videos[0].name] == pytest.approx(np.mean(ious)) and looks.metrics != plain.metrics
    before = (tmp_path / "looks" / "oldest-s0.json").read_bytes()
    measure_policies(c, videos, tmp_path / "looks", ("oldest",), model, progress=False, make=mirror)
    assert (tmp_path / "looks" / "oldest-s0.json").read_bytes() == before             # it answers the same question
    measure_policies(c, videos, tmp_path / "looks", ("oldest",), model, progress=False, make=multi_scale)
    assert (tmp_path / "looks" / "oldest-s0.json").read_bytes() != before             # and not another one


def test_looks_are_rows_measured_once(tmp_path, model):
    videos = real(tmp_path, chameleon_batch((7, 8), ChameleonConfig(frames=7, size=48, objects=2)))
    c, names = VideoEval("tiny", "vos-tiny", "made", slots=3), ("one-look", "two-sizes")
    one, four = measure_views(c, videos, tmp_path / "out", names, model, progress=False)
    assert (one.name, four.name) == names and four.config["segmenter"] == "MultiScaleSegmenter"
    plain, = measure_policies(c, videos, tmp_path / "plain", ("learned",), model, progress=False)
    assert one.clips == plain.clips and four.clips != plain.clips
    assert [b[0] for b in four.config["looking"]["branches"]] == [1., 1., 1.3, 1.3]
    again = measure_views(c, videos, tmp_path / "out", names, model, progress=False)
    assert [r.seconds for r in again] == [one.seconds, four.seconds]
    refused("looks: expected some of one-look, mirror", measure_views, c, videos, tmp_path / "out", ("twice",), model)


def test_peers_are_rows_with_their_own_memory(tmp_path):
    model = network(similarity="l2", shared_keys=True)
    videos = real(tmp_path, chameleon_batch((7, 8), ChameleonConfig(frames=7, objects=2)))
    c = VideoEval("tiny", "vos-tiny", "made", slots=2)
    rows = measure_baselines(c, videos, tmp_path / "out", ("stm", "stm_first_last"), model=model, progress=False)
    assert [r.config["policy"] for r in rows] == ["stm", "stm_first_last"] == [r.name for r in rows]
    two, = measure_policies(c, videos, tmp_path / "two", ("first_last",), model, progress=False)
    assert rows[1].clips == two.clips                              # first and previous frame: a memory both can be
    segmenter = baseline_segmenter(model, "stm")
    follow_video(segmenter, videos[0])
    assert segmenter.memory[0].frames == (0, 5, 6)
    refused("unknown peer", measure_baselines, c, videos, tmp_path / "out", ("aot",), model=model)


def test_a_maker_of_plain_segmenters_changes_no_config(model):
    c = VideoEval("tiny", "vos-tiny", "made", "unbounded", 3)
    assert video_eval_config(c, [], model, lambda *a, **k: VideoSegmenter(*a, **k)) == video_eval_config(c, [], model)


@pytest.mark.parametrize("study", VIDEO_STUDIES)
def test_stored_records_still_answer_the_default_question(study):
    "A new option must not make old numbers stale."
    class Card:
        pass
    folder = Path(__file__).resolve().parent.parent / "nbs" / "results" / "records" / study
    for record in load_records(folder):
        network = Card()
        network.card = {"config": record.config["training"]}
        c = VideoEval(data=VIDEO_STUDIES[study], policy=record.name, seed=record.seed)
        assert video_eval_config(c, range(record.config["videos"]), network) == record.config
