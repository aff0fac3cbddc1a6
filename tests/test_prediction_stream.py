"""Contracts of the stream: it says what whole clips say, only reads the network, and refuses in one line."""
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from helpers import TINY_PREDICTION, TINY_PREDICTION_BANK
from random_video import video
from refusals import refused
from stremn.core import StremnError, make_generator
from stremn.memory.bank import UpdatePolicy
from stremn.memory.rules import RULES, Rule, oldest
from stremn.models.prediction import PredictionModel, stack_recent
from stremn.models.prediction_baselines import (
    ConstantVelocity, ConvLSTM, ConvLSTMConfig, CopyLast, PredRNN, PredRNNConfig, SimVP, SimVPConfig)
from stremn.prediction.stream import VideoPredictor, find_predictor, predict_clips



def network(seed=0, bank=None, **changes):
    "A small network in evaluation mode."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bank = replace(TINY_PREDICTION_BANK, **(bank or {}))
        return PredictionModel(replace(TINY_PREDICTION, bank=bank, **changes)).eval()


def observed(model, frames, *args, **options):
    "A stream that has seen all these frames (T,C,H,W)."
    predictor = VideoPredictor(model, *args, **options)
    for frame in frames:
        predictor.observe(frame)
    return predictor


def slots_of(memory):
    "Frames in the slots of a memory."
    return [] if memory is None else memory.frames[0].tolist()


def with_history(model, frames, future, *args, **options):
    "Predicted frames, and the frames in the slots after each step but the first."
    predictor = VideoPredictor(model, *args, **options)
    rows = [slots_of(predictor.observe(frame).memory) for frame in frames][1:]
    steps = list(predictor.rollout(future))
    return torch.stack([frame for frame, _ in steps]), rows + [slots_of(memory) for _, memory in steps]


# ---- the same numbers as whole clips -------------------------------------------------------------------------------

@pytest.mark.parametrize("policy", ["learned", "random", "reservoir", "first_last", "ucb"])
@pytest.mark.parametrize("M", [1, 2, 7])
@torch.no_grad()
def test_a_stream_says_what_a_clip_says(policy, M):
    model, frames = network(15), video(1, M, dtype=torch.float32)
    watcher = VideoPredictor(model, policy, 2, seed=5)
    for f in frames[0]:
        watcher.observe(f)
        watcher.predict(2)                                                        # asking changes nothing
    whole = model(frames, 5, generator=make_generator(5), policy=UpdatePolicy(policy, 2, pinned=0))[0]
    assert torch.allclose(watcher.predict(5), whole, atol=1e-5)
    assert watcher.t == M and max(watcher.stored_frames, default=-1) <= M - 2


@pytest.mark.parametrize("policy", RULES)
@pytest.mark.parametrize("slots", [1, 3, math.inf])
def test_a_roll_out_gives_the_numbers_of_whole_clips_and_the_memory_after_each_step(policy, slots):
    m, clip = network(output="sigmoid"), torch.rand(1, 5, 1, 8, 12, generator=make_generator(1))
    m.train()
    found, rows = with_history(m, clip[0], 6, policy, slots, seed=7)
    assert m.training and m.bank.policy == UpdatePolicy.from_config(TINY_PREDICTION_BANK)
    assert torch.allclose(found, predict_clips(m, clip, 6, policy, slots, 7)[0], atol=1e-6)
    most = 2 if policy == "first_last" else 10                  # that rule throws frames away before the slots are full
    assert len(rows) == 10 and max(map(len, rows)) == min(slots, most) and not found.requires_grad
    for t, row in enumerate(rows):
        assert len(row) <= t + 1 and max(row, default=-1) <= t and len(set(row)) == len(row)
    if slots == math.inf and policy != "first_last":
        assert rows[-1] == list(range(10))
    if policy == "oldest" and slots == 3:
        assert sorted(rows[-1]) == [7, 8, 9]


def test_a_roll_out_is_a_loop_of_steps():
    model, frames = network(18), video(1, 5, dtype=torch.float32)
    predictor = observed(model, frames[0])
    recent, memory = list(frames.unbind(1)), predictor.memory
    for t, (frame, after) in enumerate(predictor.rollout(4), 4):
        with torch.no_grad():
            answer, memory = model.step(memory, stack_recent(recent), t)
        assert torch.equal(frame, answer[0]) and torch.equal(after.keys, memory.keys)
        assert torch.equal(after.frames, memory.frames) and frame.shape == (1, 8, 12)
        recent.append(answer)


def test_a_roll_out_changes_nothing_even_when_it_is_left_half_done_or_overtaken():
    model, frames = network(19), video(1, 8, dtype=torch.float32)[0]
    predictor, other = observed(model, frames[:5], "random", 2), observed(model, frames[:5], "random", 2)
    whole = predictor.predict(4)
    steps = predictor.rollout(4)
    first = next(steps)[0]
    predictor.observe(frames[5])                                # the roll-out goes on from what it began with
    assert torch.equal(torch.stack([first, *(frame for frame, _ in steps)]), whole)
    other.observe(frames[5])
    assert torch.equal(predictor.predict(3), other.predict(3)) and predictor.stored_frames == other.stored_frames
    with torch.enable_grad():
        assert not any(frame.requires_grad for frame, _ in predictor.rollout(2)) and torch.is_grad_enabled()


def test_without_memory_the_slots_stay_empty():
    clip = torch.rand(4, 1, 8, 8, generator=make_generator(2))
    for predictor in (observed(network(), clip, slots=0), observed(network(memory=False), clip),
                      observed(network(memory=False), clip, UpdatePolicy("oldest", 5, pinned=0))):
        assert predictor.policy.slots == 0 and predictor.stored_frames == []
        assert [memory for _, memory in predictor.rollout(3)] == [None] * 3
    refused("slots: expected 0 for a network without a memory, found 4", VideoPredictor, network(memory=False), None, 4)


# ---- policies ------------------------------------------------------------------------------------------------------

def test_a_policy_may_be_a_name_a_rule_a_function_or_a_value():
    model, frames = network(20), video(1, 9, dtype=torch.float32)[0]
    ways = ["oldest", RULES["oldest"], Rule(oldest), oldest, UpdatePolicy("oldest", 3, pinned=0)]
    found = [observed(model, frames, way) for way in ways]
    assert all(torch.equal(found[0].predict(3), p.predict(3)) and p.stored_frames == [5, 6, 7] for p in found)
    assert VideoPredictor(model).policy == UpdatePolicy.from_config(TINY_PREDICTION_BANK).but(noise="never")
    assert VideoPredictor(model, UpdatePolicy("newest", 6, pinned=2), 4).policy.slots == 4
    assert VideoPredictor(model, slots=math.inf).policy.capacity == math.inf


def test_noise_is_drawn_in_use_only_where_the_policy_says_always():
    model, frames = network(21, bank={"slots": 2}).train(), video(1, 12, dtype=torch.float32)[0]
    quiet = [observed(model, frames, seed=s).predict(2) for s in range(6)]
    assert all(torch.equal(quiet[0], q) for q in quiet)
    always = UpdatePolicy("learned", 2, pinned=0, noise="always")
    assert len({tuple(observed(model, frames, always, seed=s).stored_frames) for s in range(12)}) > 1


# ---- one network, many streams -------------------------------------------------------------------------------------

def test_a_stream_leaves_the_network_as_it_was():
    model = network(16).train()
    state, policy = {k: v.clone() for k, v in model.state_dict().items()}, model.bank.policy
    watcher = observed(model, video(1, 4, dtype=torch.float32)[0], "random", 1)
    assert not watcher.predict(2).requires_grad
    assert all(m.training for m in model.modules()) and model.bank.policy is policy
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    watcher.reset()
    assert watcher.t == 0 and watcher.stored_frames == [] and watcher.recent == []


def test_streams_in_several_threads_share_a_network_and_say_what_each_says_alone():
    model, frames = network(22).train(), video(4, 20, H=16, W=16, dtype=torch.float32)
    ways = [("oldest", 1), ("random", 3), ("learned", math.inf), (None, 0)]

    def run(i):
        predictor, out = VideoPredictor(model, *ways[i], seed=i), []
        for frame in frames[i]:
            out.append(predictor.observe(frame).predict(2))
        return torch.stack(out), predictor.stored_frames
    alone = [run(i) for i in range(4)]
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(run, range(4)))
        for (a, stored_a), (b, stored_b) in zip(alone, together):
            assert torch.equal(a, b) and stored_a == stored_b


# ---- refusals ------------------------------------------------------------------------------------------------------

def test_stream_errors_leave_everything_as_it_was():
    model, frames = network(17), video(1, 4, dtype=torch.float32)[0]
    watcher = VideoPredictor(model)
    with pytest.raises(StremnError, match="at least one observed frame"):
        watcher.predict()
    with pytest.raises(StremnError, match="at least one observed frame"):
        watcher.rollout()
    for f in frames:
        watcher.observe(f)
    before = watcher.predict(2)
    for bad, message in ((frames, "expected .1,H,W."), (frames[0, :, :4], "frame 4: expected .1, 8, 12. as before"),
                         (frames[0] * torch.nan, "found nan"), (frames[0].expand(3, -1, -1), "1 channels"),
                         ("frame.png", "frame: expected"), (frames[0].double().round().long(), "floats"),
                         (255 * frames[0], "frame: expected numbers in .0,1.")):
        with pytest.raises(StremnError, match=message):
            watcher.observe(bad)
    assert torch.equal(watcher.predict(2), before) and watcher.t == 4
    for bad in (0, -1, 1.5, None):
        with pytest.raises(StremnError, match="future: expected 1 or more"):
            watcher.predict(bad)
    for slots in (-1, True, 1.5, "all", "default"):
        with pytest.raises(StremnError, match="slots: expected a whole number"):
            VideoPredictor(model, slots=slots)
    with pytest.raises(StremnError, match="policy: expected one of .*, found 'best'"):
        VideoPredictor(model, "best")
    for other in (CopyLast(), ConvLSTM(ConvLSTMConfig(hidden=2, layers=1)), torch.nn.Linear(2, 2)):
        refused("model: expected a network with slots", VideoPredictor, other)


# ---- clips ---------------------------------------------------------------------------------------------------------

def test_policy_and_slots_are_for_one_call_only():
    torch.manual_seed(1)
    model = network(1).train()
    frames = torch.rand(3, 6, 1, 16, 16, generator=make_generator(2))
    own = predict_clips(model, frames, 4)
    assert torch.allclose(own, predict_clips(model, frames, 4, batch=2), atol=1e-6)
    without, unbounded = (predict_clips(model, frames, 4, slots=k) for k in (0, math.inf))
    assert not torch.allclose(own, without) and not torch.allclose(own, unbounded)
    assert model.training and model.bank.policy == UpdatePolicy.from_config(TINY_PREDICTION_BANK)
    with torch.no_grad():
        found = model(frames, 4, policy=model.bank.policy.but(slots=0))
    torch.testing.assert_close(without, found, atol=1e-6, rtol=0)


def test_networks_without_slots_take_no_policy():
    clip = torch.rand(2, 4, 1, 8, 8, generator=make_generator(2))
    small = {"hidden": 3, "layers": 2, "patch": 2, "kernel": 3}
    for other in (ConvLSTM(ConvLSTMConfig(**small)), PredRNN(PredRNNConfig(**small)), CopyLast(), ConstantVelocity(),
                  SimVP(SimVPConfig(observed=4, hidden=4, width=8, groups=2))):
        found = predict_clips(other, clip, 3)
        with torch.no_grad():
            assert torch.equal(found, other(clip, 3))
        for options in ({"policy": "oldest"}, {"slots": 3}, {"slots": 0}):
            refused("policy, slots: expected none for ", predict_clips, other, clip, 3, **options)
    refused("policy", predict_clips, network(), clip, 3, "no such rule")
    refused("slots", predict_clips, network(), clip, 3, None, -1)
    refused("at least one clip", predict_clips, network(), clip[:0], 3)


def test_predictors_are_found_by_name_as_files_or_as_they_are():
    model = network()
    assert find_predictor(model) is model
    assert isinstance(find_predictor("copy"), CopyLast) and isinstance(find_predictor("velocity"), ConstantVelocity)
    refused("found 'no-such-weights'", find_predictor, "no-such-weights")
