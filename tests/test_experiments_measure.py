"""The three evaluations: frame scores against an independent loop, held-out clips, real video, records."""
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from stremn.data.chameleon import ChameleonConfig, chameleon_batch
from stremn.data.clips import Clip
from stremn.data.vos import VideoFolder
from stremn.experiments.grid import Row, run
from stremn.experiments.measure import (
    BELADY, ORACLES, POLICIES, UNBOUNDED, ChameleonEval, PredictionEval, VideoEval, belady, evaluate_chameleon,
    evaluate_videos, follow_video, frame_scores, held_out_clips, running_mean, shared_clips, video_segmenter)
from stremn.experiments.vos import TEST_TIME_ROWS, count_videos, measure_videos
from stremn.images import to_pixels, write_mask
from stremn.memory.rules import RULES, Request
from stremn.results import Record
from stremn.vos.multiscale import TestTimeConfig as TimeConfig
from stremn.vos.multiscale import make_views
from stremn.vos.stream import VideoSegmenter
from helpers import network
from refusals import refused

CLIP = ChameleonConfig(frames=10, size=32, modes=2, stay=(1, 2), fade=1, lookalikes=1)


@pytest.fixture(scope="module")
def model():
    "An untrained network whose answers depend on what it remembers."
    return network(key_channels=6, update_channels=6)


def by_hand(model, clip, policy, slots, seed=0):
    "Stream one clip, count pixels; first and last frame left out."
    rule = belady([clip], ORACLES[policy]) if policy in ORACLES else policy
    segmenter, out = VideoSegmenter(model, rule, slots, "cpu", seed), []
    for t, frame in enumerate(clip.frames):
        said = segmenter.step(frame, clip.masks[0] if t == 0 else None).numpy() == 1
        true = clip.masks[t].numpy() == 1
        out.append((said & true).sum() / (said | true).sum() if (said | true).any() else 1.)
    return out[1:-1]


# ---------------------------------------------------------------- scores
@pytest.mark.parametrize("policy", POLICIES)
def test_frame_scores_equal_an_independent_loop(model, clips, policy):
    "One clip a batch, so that random draws are the stream's own; then side by side where nothing is drawn."
    rule, slots = ("oldest", math.inf) if policy == UNBOUNDED else (policy, 3)
    wanted = np.array([by_hand(model, c, rule, slots, seed=7 + i) for i, c in enumerate(clips)])
    scores = frame_scores(model, clips, policy, 3, seed=7, batch=1)
    assert scores.shape == (5, 8) and scores.dtype == torch.float32
    assert np.allclose(scores, wanted, atol=1e-6) and wanted.std() > .01
    if policy not in ("random", "reservoir"):
        for batch in (2, 10):
            assert np.allclose(frame_scores(model, clips, policy, 3, batch=batch), wanted, atol=1e-6)


def test_policies_are_the_rules_and_the_unbounded_memory():
    assert POLICIES == (UNBOUNDED, BELADY, "oracle_newest", *RULES) and not {UNBOUNDED, *ORACLES} & set(RULES)


def test_random_draws_depend_on_the_seed_alone(model, clips):
    def scores(seed):
        torch.rand(3)
        return frame_scores(model, clips, "random", 3, seed)
    assert torch.equal(scores(1), scores(1)) and not torch.equal(scores(1), scores(2))


def test_the_network_comes_back_as_it_was(clips):
    model = network(key_channels=6, update_channels=6, noise="train")
    plain = frame_scores(model, clips, "learned", 3)
    # in evaluation mode, whatever the mode was
    assert torch.equal(frame_scores(model.train(), clips, "learned", 3), plain)
    own = model.bank.policy
    assert model.training and (own.rule, own.slots) == ("learned", 3)
    refused(["policy: expected one of", "'best'"], frame_scores, model, clips, "best", 3)
    assert model.training and model.bank.policy is own
    assert torch.equal(frame_scores(model, clips, "learned"), plain)         # by default its own slots


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
    shown = [(x.masks[1:-1] == 1).flatten(1).any(1) for x in clips]
    by_hand = {x.name: float(row[seen].mean()) for x, row, seen in zip(clips, scores, shown) if seen.any()}
    assert record.clips["J_visible"] == pytest.approx(by_hand)
    assert record.metrics["J_visible"] == pytest.approx(sum(by_hand.values()) / len(by_hand))
    assert record.device.startswith("cpu ")
    assert Record.load(record.save(tmp_path)) == record


def test_a_running_mean_by_hand():
    assert running_mean([1., 2., 3., 4.], 3) == ([2, 3], [2., 3.])
    assert running_mean([5., 7.], 1) == ([1, 2], [5., 7.]) and running_mean([1., 2.], 3) == ([], [])
    for bad in (0, 2, -1):
        refused("odd", running_mean, [1., 2.], bad)


# ---------------------------------------------------------------- a rule that knows the future
def needed_last(modes, held, t, ties):
    "Belady by hand: useless, then doubled (the older or the newer), then needed last; frame 0 is pinned."
    return max((f for f in held if f != 0), key=lambda f: rank_of(modes, held, t, f, ties))


@pytest.mark.parametrize("ties", ["oldest", "newest"])
def test_the_rule_that_knows_the_future_is_beladys(ties):
    rng = np.random.default_rng(0)
    for _ in range(200):
        T, n = 30, int(rng.integers(2, 6))
        modes, t = rng.integers(-1, 4, T), int(rng.integers(n, T - 1))
        held = [0, *sorted(rng.choice(np.arange(1, t), n - 1, replace=False).tolist())] if t > n else list(range(n))
        clip = Clip(torch.zeros(T, 3, 1, 1), torch.zeros(T, 1, 1), "", torch.tensor(modes)[:, None])
        frames = torch.tensor([held])
        a = belady([clip], ties)(Request(frames, frames > 0, t, t, None, None))
        dropped, wanted = frames[a > .5].item(), needed_last(modes, held, t, ties)
        ranks = [rank_of(modes, held, t, f, ties) for f in (dropped, wanted)]
        assert a.sum() == 1 and (dropped == wanted or ranks[0] == ranks[1])


def rank_of(modes, held, t, f, ties):
    "How dispensable a frame is; equals may go in any order."
    if modes[f] < 0:
        return 2, 0
    if modes[f] == modes[t] or sum(modes[g] == modes[f] for g in held) > 1:
        return 1, t - f if ties == "oldest" else f - t
    return 0, next((u - t for u in range(t + 1, len(modes)) if modes[u] == modes[f]), len(modes))


def test_other_ties_are_refused(clips):
    refused("ties: expected oldest or newest, found 'first'", belady, clips, "first")


def test_changes_of_the_policy_last_as_long_as_the_test(model, clips):
    before = model.bank.policy
    held = frame_scores(model, clips, "reservoir", 3, latest="held")
    assert model.bank.policy is before and not torch.equal(held, frame_scores(model, clips, "reservoir", 3))
    noisy = [frame_scores(model, clips, "learned", 3, seed, noise="always") for seed in (0, 1)]
    assert not torch.equal(*noisy)
    assert torch.equal(noisy[0], frame_scores(model, clips, "learned", 3, 0, noise="always"))


def test_only_the_first_frames_of_the_same_clips():
    c = ChameleonEval(clips=2, clip=CLIP)
    for whole, part in zip(held_out_clips(c), held_out_clips(replace(c, upto=4))):
        assert part.frames.shape[0] == 4 and torch.equal(part.frames, whole.frames[:4]) and len(part.modes) == 4


def test_clips_are_made_once_for_all_rows_of_a_study():
    c = ChameleonEval(clips=2, clip=CLIP)
    clips = shared_clips(c)
    assert shared_clips(replace(c, policy="oldest", slots=2, seed=9, weights="other")) is clips
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(clips, held_out_clips(c)))
    assert len(shared_clips(replace(c, clips=1))) == 1


# ---------------------------------------------------------------- real video
def write_videos(folder, clips):
    "Synthetic clips as folders of files; the first one has a single object."
    videos = []
    for clip, merge in zip(clips, (True, False), strict=True):
        for t in range(7):
            write_mask(folder / clip.name / "masks" / f"{t}.png", clip.masks[t])
            Image.fromarray(to_pixels(clip.frames[t])).save(folder / clip.name / f"{t}.png")
        videos.append(VideoFolder(folder / clip.name, folder / clip.name / "masks", merge))
    return videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    clips = chameleon_batch((7, 8), ChameleonConfig(frames=7, objects=2))
    return write_videos(tmp_path_factory.mktemp("videos"), clips)


MADE = VideoEval("tiny", "vos-tiny", "synthetic", slots=3)


def run_videos(tests, videos, out):
    "Measure rows on real video with `vos-tiny`: name -> test."
    rows = count_videos([Row(name, "vos-tiny", test) for name, test in tests.items()], videos)
    return run(rows, [0], out, "runs", partial(measure_videos, videos=videos), progress=False)


def mean_iou(found, true, i=1):
    "J of object `i` by counting, first and last frame left out."
    ious = []
    for a, b in zip(found[1:-1].numpy() == i, true[1:-1].numpy() == i, strict=True):
        ious.append((a & b).sum() / (a | b).sum() if (a | b).any() else 1.)
    return np.mean(ious)


def test_real_video_is_streamed_and_scored(videos, model):
    clips = [v.name for v in videos]
    for policy, slots in (("oldest", 3), (UNBOUNDED, math.inf)):
        record = evaluate_videos(replace(MADE, policy=policy), videos, model)
        assert record.name == policy and set(record.clips["J"]) == {clips[0], f"{clips[1]}/1", f"{clips[1]}/2"}
        assert set(record.clips["F"]) == set(record.clips["J"]) and record.config["videos"] == 2
        for m in "JF":
            assert record.metrics[m] == pytest.approx(sum(record.clips[m].values()) / 3)
        assert record.metrics["J_visible"] == pytest.approx(sum(record.clips["J_visible"].values()) / 3)
        assert record.metrics["JF"] == pytest.approx((record.metrics["J"] + record.metrics["F"]) / 2)
        rule = "oldest" if policy == UNBOUNDED else policy
        found, true = follow_video(VideoSegmenter(model, rule, slots, "cpu"), videos[1])
        for i in (1, 2):
            assert record.clips["J"][f"{clips[1]}/{i}"] == pytest.approx(mean_iou(found, true, i))


def test_rows_on_real_video_are_measured_once(videos, tmp_path):
    tests = {p: replace(MADE, policy=p) for p in ("oldest", "unbounded")}
    rows = run_videos(tests, videos, tmp_path)
    assert [r.name for r in rows] == ["oldest", "unbounded"]
    before = (tmp_path / "oldest-s0.json").read_bytes()
    assert run_videos(tests, videos, tmp_path) == [] and (tmp_path / "oldest-s0.json").read_bytes() == before
    fewer, = run_videos({"oldest": tests["oldest"]}, videos[:1], tmp_path)                   # other videos
    assert fewer.config["videos"] == 1 and (tmp_path / "oldest-s0.json").read_bytes() != before


# ---------------------------------------------------------------- how frames are viewed
def test_several_views_are_measured_and_noted_as_a_config(videos, model):
    mirror = TimeConfig(make_views(flip=True))
    one = evaluate_videos(MADE, videos, model)
    two = evaluate_videos(replace(MADE, test_time=mirror), videos, model)
    assert one.config["test_time"] is None and two.config == one.config | {"test_time": {
        "views": [[1., False], [1., True]], "max_distance": None, "hard": None, "longest": None}}
    segmenter = VideoSegmenter(model, "learned", 3, "cpu", test_time=mirror)
    assert two.clips["J"][videos[0].name] == pytest.approx(mean_iou(*follow_video(segmenter, videos[0])))
    assert two.metrics != one.metrics
    assert not any(word in str(two.config) for word in ("Segmenter", "class"))               # no name of a class


def test_another_way_to_view_frames_is_another_row(videos, tmp_path):
    views = {name: {"row": replace(MADE, test_time=how)} for name, how in TEST_TIME_ROWS.items()}
    first = run_videos(views["mirror"], videos, tmp_path)
    assert len(first) == 1 and run_videos(views["mirror"], videos, tmp_path) == []           # the same question
    second, = run_videos(views["two-sizes"], videos, tmp_path)                               # and another one
    assert [v[0] for v in second.config["test_time"]["views"]] == [1., 1., 1.3, 1.3]
    third, = run_videos(views["one-look"], videos, tmp_path)
    plain = evaluate_videos(MADE, videos)
    assert third.clips == plain.clips and second.clips != plain.clips


def test_published_memories_are_policies_of_a_test(videos):
    model = network(similarity="l2", shared_keys=True)
    c = replace(MADE, slots=2)
    stm, two = (evaluate_videos(replace(c, policy=p), videos, model) for p in ("stm", "stm_first_last"))
    assert [r.config["policy"] for r in (stm, two)] == ["stm", "stm_first_last"] == [r.name for r in (stm, two)]
    queue = evaluate_videos(replace(c, policy="first_last"), videos, model)
    assert two.clips == queue.clips                                # first and previous frame: a memory both can be
    segmenter = video_segmenter(replace(c, policy="stm"), model)
    follow_video(segmenter, videos[0])
    assert segmenter.memory[0].frames == (0, 5, 6)
    refused("'aot'", evaluate_videos, replace(c, policy="aot"), videos, model)


# ---------------------------------------------------------------- prediction
def test_records_keep_their_words_for_slots():
    for stored, told in (("default", None), (None, math.inf), (0, 0), (5, 5)):
        assert PredictionEval(slots=stored).own_slots == told
