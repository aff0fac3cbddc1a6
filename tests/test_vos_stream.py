"""Streams: one code path with training, objects that come and go, true sentences, threads, errors without a trace."""
import math
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stremn.core import make_generator
from stremn.data.clips import collate, one_hot_objects
from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.data.vos import VideoFolder
from stremn.images import PALETTE, as_frame, as_labels
from stremn.memory.bank import UpdatePolicy
from stremn.memory.rules import RULES, Rule, newest, pick
from stremn.models.hub import load
from stremn.models.vos import VOSConfig, VOSModel
from stremn.models.vos_baselines import with_baseline_memory
from stremn.vos.multiscale import multi_scale
from stremn.vos.multiscale import TestTimeConfig as TimeConfig
from stremn.vos.state import MemoryReport, describe_change
from stremn.vos.stream import (
    VideoSegmenter, equal_widths_pay, label_map, merge_given_masks)
from helpers import TINY_BANK, network
from refusals import refused


@pytest.fixture(scope="module")
def clip():
    return chameleon(5, ChameleonConfig(frames=14, size=32, objects=2, modes=2, stay=(2, 3), fade=1))


def follow(segmenter, clip, masks=None):
    "Labels (T,H,W) and the memory after each frame."
    masks = {0: clip.masks[0]} if masks is None else masks
    out = [(segmenter.step(f, masks.get(t)), segmenter.memory) for t, f in enumerate(clip.frames)]
    return torch.stack([labels for labels, _ in out]), [memory for _, memory in out]


# ---------------------------------------------------------------- one code path
@torch.no_grad()
def train_and_stream_alike(model, batch, generator, fast):
    "Logits (T-1,O+1,H,W) of frames 1, ... by the model's two calls, with the faster read or without."
    masks = one_hot_objects(batch.labels[:, 0], range(1, batch.valid.shape[1] + 1))
    memories, out = (), []
    for t, frame in enumerate(batch.frames.unbind(1)):
        logits, encoded = model.segment(memories, frame, batch.valid, equal_widths=fast)
        known = masks if logits is None else logits.softmax(1)[:, 1:]
        memories, _ = model.memorize(memories, encoded, known, t, generator, batch.valid)
        out.append(logits)
    return torch.cat(out[1:])


@pytest.mark.parametrize("per_object", [False, True])
@pytest.mark.parametrize("policy", RULES)
def test_streaming_equals_the_training_forward_pass(clip, policy, per_object):
    model = network(policy=policy, per_object=per_object)
    batch = collate([clip])
    with torch.no_grad():
        trained = model(batch.frames, batch.labels[:, 0], batch.valid, make_generator(3))
    logits = train_and_stream_alike(model, batch, make_generator(3), True)              # streaming takes a faster read
    torch.testing.assert_close(logits[:3], trained[0, :3], atol=1e-3, rtol=0.)          # equal but for rounding, ...
    labels, _ = follow(VideoSegmenter(model, seed=3), clip)
    assert (labels[0] == clip.masks[0]).all()
    assert (labels[1:] == logits.argmax(1)).all()                                       # ... and with it to the bit
    assert len(labels[1:].unique()) > 1                                                 # something was segmented


def spy(segment, widths, *args, equal_widths=False):
    "Notes which read is asked for."
    widths.append(equal_widths)
    return segment(*args, equal_widths=equal_widths)


def test_the_fast_read_is_taken_where_it_pays(clip):
    for channels, pays in ((8, True), (17, False)):
        model, widths = network(value_channels=channels), []
        model.segment = partial(spy, model.segment, widths)
        assert equal_widths_pay(model) is pays
        VideoSegmenter(model).step(clip.frames[0], clip.masks[0])
        assert widths == [pays]


def test_the_slots_of_a_stream_are_those_it_was_given(clip):
    for slots, wanted in ((1, 1), (2, 2), (5, 5), (math.inf, 14), (None, 3)):
        _, told = follow(VideoSegmenter(network(), slots=slots), clip)
        assert len(told[-1][0].frames) == wanted and told[-1][0].frames[0] == 0


# ---------------------------------------------------------------- what comes in
def test_every_form_of_a_frame_is_the_same_frame():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    wanted = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    picture = Image.fromarray(pixels)
    flipped = np.ascontiguousarray(pixels[:, ::-1])[:, ::-1]                            # negative stride
    forms = [pixels, picture, picture.convert("RGBA"), wanted, wanted.double(), wanted.numpy().transpose(1, 2, 0),
             torch.from_numpy(pixels).permute(2, 0, 1), flipped, wanted.clone().requires_grad_()]
    for form in forms:
        got = as_frame(form)
        assert got.dtype == torch.float32 and not got.requires_grad and torch.allclose(got, wanted, atol=1e-6)
    assert as_frame(picture.convert("L")).shape == (3, 7, 9)
    assert as_frame(wanted + 5e-4).max() <= 1  # a resize may overshoot a little


@pytest.mark.parametrize("bad, said", [
    (torch.zeros(1, 4, 4), "(1, 4, 4)"), (torch.zeros(3, 0, 4), "(3, 0, 4)"), (torch.zeros(2, 3, 4, 4), "(2, 3, 4, 4)"),
    (torch.full((3, 2, 2), 255.), "255 to 255"), (torch.full((3, 2, 2), torch.nan), "nan"),
    (torch.full((3, 2, 2), -torch.inf), "-inf"), (torch.zeros(3, 2, 2).long(), "int64"),
    (np.zeros((4, 4), np.uint8), "(4, 4)"), (np.zeros((4, 4, 4), np.uint8), "(4, 4, 4)"), ("frame.png", "str")])
def test_what_is_no_frame_is_refused(bad, said):
    refused(["frame: expected", said], as_frame, bad)


def test_masks_come_as_tensors_arrays_and_pictures():
    wanted = torch.tensor([[0, 1], [254, -1]])
    palette = Image.fromarray(np.array([[0, 1], [254, 255]], np.uint8)).convert("P")
    palette.putpalette(PALETTE.ravel().tolist())
    for mask in (wanted, wanted.int(), wanted.numpy(), wanted.to(torch.int16)):
        assert torch.equal(as_labels(mask, (2, 2)), wanted)
    assert torch.equal(as_labels(palette, (2, 2)), wanted)
    assert as_labels(np.array([[True, False]]), (1, 2)).tolist() == [[1, 0]]
    refused("1x2 (width x height), found 2x2", as_labels, wanted, (2, 1))
    refused("float32", as_labels, wanted.float(), (2, 2))
    refused("(1, 2, 2)", as_labels, wanted[None], (2, 2))


def test_a_stream_takes_masks_in_every_form(model, tmp_path):
    "Paths, colours, and white on black as an array: the same answers."
    frames, wanted = torch.rand(2, 3, 24, 32), torch.zeros(24, 32, dtype=torch.long)
    wanted[4:16, 6:20] = 1
    white = 255 * wanted.numpy().astype(np.uint8)
    Image.fromarray(white).save(tmp_path / "m.png")
    before = VideoSegmenter(model)
    answers = [before.step(frames[0], wanted), before.step(frames[1])]
    assert torch.equal(answers[0], wanted)
    for mask in (tmp_path / "m.png", str(tmp_path / "m.png"), white, white[..., None].repeat(3, 2), wanted > 0):
        got = list(VideoSegmenter(model).track(frames, {0: mask}))
        assert all(map(torch.equal, got, answers))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 33), (31, 47), (130, 97), (97, 201)])
def test_any_size_in_the_same_size_out(model, size):
    mask = torch.zeros(size, dtype=torch.long)
    mask[:size[0] // 2 + 1, :size[1] // 2 + 1] = 254
    segmenter = VideoSegmenter(model)
    assert torch.equal(segmenter.step(torch.rand(3, *size), mask), mask)
    out = segmenter.step(torch.rand(3, *size))
    assert out.shape == size and out.dtype == torch.int64 and set(out.unique().tolist()) <= {0, 254}


def test_large_frames_are_shrunk_and_answered_at_full_size():
    model, side = network(), 32
    model.config = replace(model.config, test_side=side)
    seen, look = [], model.segment
    model.segment = lambda memories, frame, **how: seen.append(tuple(frame.shape)) or look(memories, frame, **how)
    segmenter = VideoSegmenter(model)
    mask = torch.zeros(64, 96, dtype=torch.long)
    mask[10:40, 20:60] = 1
    for t in range(2):
        out = segmenter.step(torch.rand(3, 64, 96), mask if t == 0 else None)
    assert seen == [(1, 3, 32, 48)] * 2 and out.shape == (64, 96)
    model.config = replace(model.config, test_side=None)
    VideoSegmenter(model).step(torch.rand(3, 64, 96), mask)
    assert seen[-1] == (1, 3, 64, 96)


def test_a_network_in_half_precision_streams(clip):
    labels, _ = follow(VideoSegmenter(network().bfloat16()), clip)
    assert labels.dtype == torch.int64 and labels.shape == clip.masks.shape


# ---------------------------------------------------------------- what is given
def test_given_masks_land_in_the_row_of_their_object():
    labels = torch.tensor([[1, 2, 3, 0]])
    known = one_hot_objects(labels, [1, 2, 3])
    prob = torch.full((2, 1, 4), .5)  # objects 3 and 1 are followed, in this order
    out = merge_given_masks(prob, known, [1, 2, 0])                                           # 2 is new
    assert out[:, 0].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    out = merge_given_masks(prob, known[1:2], [2])
    assert out[:, 0].tolist() == [[.5, 0, .5, .5]] * 2 + [[0, 1, 0, 0]]


def test_an_old_object_given_together_with_a_new_one_of_smaller_id(clip):
    "Object 5 is followed; at frame 2 a mask names 5 and 3: each must go where it belongs."
    remembered = []
    first, second = torch.where(clip.masks[0] == 1, 5, 0), torch.tensor([0, 3, 5])[clip.masks[2].clamp(min=0)]
    assert set(second.unique().tolist()) == {0, 3, 5}
    model = network()
    remember = model.memorize
    model.memorize = lambda m, view, masks, *a, **k: remembered.append(masks) or remember(m, view, masks, *a, **k)
    segmenter = VideoSegmenter(model)
    follow(segmenter, clip._replace(frames=clip.frames[:3]), {0: first, 2: second})
    assert segmenter.objects == [5, 3]
    assert torch.equal(remembered[-1][0], one_hot_objects(second, [5, 3]))


def test_a_late_object_overwrites_the_prediction_and_has_a_memory_of_its_own(clip):
    masks = {0: torch.where(clip.masks[0] == 1, 1, 0), 6: torch.where(clip.masks[0] == 2, 9, 0)}
    labels, told = follow(VideoSegmenter(network()), clip, masks)
    alone, _ = follow(VideoSegmenter(network()), clip, {0: masks[0]})
    assert torch.equal(labels[:6], alone[:6])
    assert torch.equal(labels[6], torch.where(masks[6] > 0, 9, alone[6]))               # elsewhere the prediction stays
    assert [[h.objects for h in m] for m in told[5:7]] == [[(1,)], [(1,), (9,)]]
    assert told[6][1].frames == (6,) and told[-1][1].frames[0] == 6 and told[-1][0].frames[0] == 0


def test_a_correction_replaces_the_whole_object(clip):
    given = torch.zeros_like(clip.masks[0])
    given[2:6, 2:6] = 1
    labels, told = follow(VideoSegmenter(network()), clip, {0: clip.masks[0], 4: given})
    assert torch.equal(labels[4] == 1, given == 1)
    assert [h.objects for h in told[-1]] == [(1, 2)]                                    # nobody new


def test_minus_one_and_zero_say_nothing():
    prob = torch.tensor([[[.1, .1, .9]], [[.9, .9, .1]]])
    out = label_map(prob, [4], torch.tensor([[-1, 8, -1]]), [8], (1, 3))
    assert out.tolist() == [[4, 8, 0]]
    segmenter = VideoSegmenter(network())
    first = torch.full((8, 8), -1)
    first[:4] = 3
    again, frames = VideoSegmenter(network()), torch.rand(2, 3, 8, 8)
    for s in (segmenter, again):
        assert s.step(frames[0], first).unique().tolist() == [0, 3]
    # an empty mask changes nothing
    assert torch.equal(segmenter.step(frames[1], torch.zeros(8, 8).long()), again.step(frames[1]))
    assert segmenter.objects == [3]


# ---------------------------------------------------------------- objects that leave
def test_removing_leaves_the_others_alone(clip):
    "Two objects that entered apart: without the first, the second has exactly the memory it had."
    masks = {0: torch.where(clip.masks[0] == 1, 1, 0), 3: torch.where(clip.masks[3] == 2, 2, 0)}
    segmenter = VideoSegmenter(network())
    for t in range(8):
        segmenter.step(clip.frames[t], masks.get(t))
    second = segmenter.state.memories[0][1]
    segmenter.remove(1)
    assert segmenter.objects == [2] and [h.objects for h in segmenter.memory] == [(2,)]
    assert segmenter.state.memories[0][0].keys.equal(second.keys) and segmenter.state.memories[0][0].seen == second.seen
    assert set(segmenter.step(clip.frames[8]).unique().tolist()) <= {0, 2}
    refused(["object 1", "[2]"], segmenter.remove, 1)


def test_removing_one_of_a_group_keeps_the_rows_of_the_rest(clip):
    segmenter = VideoSegmenter(network())
    three = clip.masks[0].clone()
    three[:3, :3] = 7
    segmenter.step(clip.frames[0], three)
    segmenter.step(clip.frames[1])
    values = segmenter.state.memories[0][0].values
    segmenter.remove(2)
    assert segmenter.objects == [1, 7] and segmenter.memory[0].objects == (1, 7)
    assert segmenter.state.memories[0][0].values.equal(values[[0, 2]])
    assert 2 not in segmenter.step(clip.frames[2])


@pytest.mark.parametrize("policy", ["lfu", "ucb"])
def test_removing_keeps_how_often_the_others_were_used(clip, policy):
    "The tallies of attention stay with their rows, as keys and values do."
    segmenter = VideoSegmenter(network(), policy)
    for t in range(5):
        segmenter.step(clip.frames[t], clip.masks[0] if t == 0 else None)
    before = segmenter.state.memories[0][0].usage
    segmenter.remove(1)
    assert before.ndim == 3 and torch.equal(segmenter.state.memories[0][0].usage, before[1:])
    segmenter.step(clip.frames[5])
    assert segmenter.state.memories[0][0].usage[:, 0, 0].gt(before[1:, 0, 0]).all()     # counted on, not anew


def test_with_all_removed_everything_is_background_until_a_mask_comes(clip):
    segmenter = VideoSegmenter(network())
    segmenter.step(clip.frames[0], clip.masks[0])
    for i in (1, 2):
        segmenter.remove(i)
    assert segmenter.objects == [] and segmenter.memory == []
    assert segmenter.step(clip.frames[1]).eq(0).all()
    segmenter.step(clip.frames[2], clip.masks[2])
    assert segmenter.objects == [1, 2] and segmenter.memory[0].frames == (2,)
    segmenter.step(clip.frames[3])
    assert segmenter.memory[0].frames == (2, 3)


# ---------------------------------------------------------------- true sentences
def replay(told):
    "The slots after each frame, rebuilt from the reports alone: what they say must be what happened."
    slots = []
    for h in told:
        if h.slot is None:
            assert h.last not in h.frames and h.why == f"frame {h.last} was discarded"
        elif h.evicted is None:
            assert h.slot == len(slots) and "free slot" in h.why
            slots.append(h.last)
        else:
            assert f"frame {h.last}" in h.why and f"frame {h.evicted}" in h.why and f"slot {h.slot}" in h.why
            place = slots.index(h.evicted)
            if h.moved is not None:
                assert slots[h.slot] == h.moved and place != h.slot and f"frame {h.moved}" in h.why
                slots[place] = h.moved
            else:
                assert place == h.slot
            slots[h.slot] = h.last
        assert tuple(slots) == h.frames
        if h.scores and h.slot is not None and h.evicted is not None and "most similar" in h.why:
            freed = h.slot if h.moved is None else h.frames.index(h.moved)
            assert h.scores[freed] == max(h.scores) and f"{h.scores[freed]:.3f}" in h.why
    return slots


def least_similar(request):
    "Looks at the learned scores and does the opposite."
    return pick(-request.learned(), request.candidates)


@pytest.mark.parametrize("latest", ["competes", "held"])
@pytest.mark.parametrize("per_object", [False, True])
@pytest.mark.parametrize("policy", [*RULES, least_similar])
def test_what_the_memory_says_is_what_happened(clip, policy, per_object, latest):
    model = network(per_object=per_object, latest=latest)
    _, told = follow(VideoSegmenter(model, policy, 4), clip)
    assert [h.objects for h in told[-1]] == ([(1,), (2,)] if per_object else [(1, 2)])
    for i in range(len(told[0])):
        replay([entries[i] for entries in told])
    last = told[-1][0]
    assert ("most similar" in last.why) == (policy == "learned")
    if policy in ("learned", least_similar):
        assert last.scores[0] == -torch.inf and "similarity" in last.why                # slot 0 is pinned
    if policy == "reservoir" and latest == "competes":
        assert any(h[0].slot is None for h in told)


def test_scores_are_those_of_the_bank(clip):
    "One row for shared decisions (mean over objects), the object's own otherwise."
    for per_object in (False, True):
        model, made = network(per_object=per_object), []
        choose = model.bank.choose
        model.bank.choose = lambda *a, choose=choose, made=made, **k: made.append(choose(*a, **k)) or made[-1]
        _, told = follow(VideoSegmenter(model, "learned"), clip)
        scores = made[-1].scores
        wanted = scores if per_object else scores.mean(0, keepdim=True)
        for h, row in zip(told[-1], wanted):
            assert h.scores[1:] == pytest.approx(row[1:].tolist()) and h.scores[0] == -torch.inf


def test_explain_by_hand():
    assert describe_change((1,), 0, [], [0], None).why == "frame 0 took the free slot 0"
    assert describe_change((1,), 3, [0, 1, 2], [0, 3, 2], torch.tensor([-torch.inf, .5, .25])).why == \
        "frame 3 replaced frame 1 in slot 1 (the most similar candidate, similarity 0.500)"
    assert describe_change((1,), 3, [0, 1, 2], [0, 1, 3], torch.tensor([-torch.inf, .5, .25])).why == \
        "frame 3 replaced frame 2 in slot 2 (similarity 0.250)"
    assert describe_change((1,), 3, [0, 1, 2], [0, 1, 2], None).why == "frame 3 was discarded"
    assert describe_change((1,), 3, [0, 1, 2], [0, 2, 3], torch.tensor([-torch.inf, .5, -torch.inf])) == \
        MemoryReport((1,), (0, 2, 3), 3, 2, 1, 2, (-torch.inf, .5, -torch.inf))


# ---------------------------------------------------------------- many streams, one network
def test_two_streams_share_a_network(clip):
    model = network()
    apart = [follow(VideoSegmenter(model, p, k, seed=1), clip) for p, k in (("oldest", 3), ("random", 4))]
    both = [VideoSegmenter(model, p, k, seed=1) for p, k in (("oldest", 3), ("random", 4))]
    for t, frame in enumerate(clip.frames):
        for (labels, told), segmenter in zip(apart, both):
            assert torch.equal(segmenter.step(frame, clip.masks[0] if t == 0 else None), labels[t])
            assert segmenter.memory == told[t]
    assert model.bank.policy == UpdatePolicy.from_config(model.config.bank)             # nothing was written to it


def test_two_threads_share_a_network(clip):
    "Streams with different policies side by side give the bits they give alone, and the network stays as it was."
    model = network(noise="train").train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    options = [dict(policy="oldest", slots=2), dict(policy=UpdatePolicy("random", 4, latest="held"), seed=5)]
    alone = [follow(VideoSegmenter(model, **o), clip) for o in options]
    for _ in range(5):
        segmenters = [VideoSegmenter(model, **o) for o in options]
        with ThreadPoolExecutor(2) as pool:
            found = [*pool.map(follow, segmenters, [clip] * 2)]
        for (labels, told), (wanted, reports) in zip(found, alone, strict=True):
            assert torch.equal(labels, wanted) and told == reports
    assert model.training and model.bank.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_network_in_training_stays_in_training_and_streams_the_same_bits(clip):
    model = network(noise="train").train()
    model.decoder.eval()                                                                # a part that is frozen
    labels, told = follow(VideoSegmenter(model), clip)
    assert model.training and model.bank.training and not model.decoder.training
    again, reports = follow(VideoSegmenter(model.eval()), clip)
    assert torch.equal(labels, again) and told == reports


@pytest.mark.parametrize("encoder, norm, widths", [
    ("resnet18", "frozen", (64, 128, 256)), ("resnet18", "group", (64, 128, 256)), ("lite0", "group", (16, 24, 128))])
def test_every_encoder_streams_the_same_bits_in_training_and_evaluation_mode(clip, encoder, norm, widths):
    bank = replace(TINY_BANK, memory_channels=widths[-1], query_channels=widths[-1], slots=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VOSModel(VOSConfig(widths=widths, encoder=encoder, norm=norm, decoder_width=8, bank=bank))
    short = clip._replace(frames=clip.frames[:4])
    found = [follow(VideoSegmenter(m), short) for m in (model.train(), model.eval())]
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_the_noise_of_training_is_off_unless_it_is_wanted():
    assert VideoSegmenter(network(noise="train")).policy.noise == "never"
    assert VideoSegmenter(network(noise="always")).policy.noise == "always"
    assert VideoSegmenter(network(), UpdatePolicy(noise="always")).policy.noise == "always"


def test_a_policy_is_a_name_a_rule_a_function_or_a_whole_policy(clip):
    model = network(latest="held", per_object=True)
    own = model.bank.policy
    assert VideoSegmenter(model).policy == replace(own, noise="never")
    for policy in ("newest", RULES["newest"], Rule(newest), newest, own.but("newest"), UpdatePolicy("newest", 2)):
        segmenter = VideoSegmenter(model, policy, 4)
        assert isinstance(segmenter.policy, UpdatePolicy) and segmenter.policy.slots == 4
        assert segmenter.policy.latest == ("competes" if policy == UpdatePolicy("newest", 2) else "held")
        if segmenter.policy.latest == "held":
            assert [m[0].frames for m in follow(segmenter, clip)[1]] == [
                m[0].frames for m in follow(VideoSegmenter(model, "newest", 4), clip)[1]]


def test_the_seed_decides_and_reset_starts_again(model, clip):
    def frames(seed, segmenter=None):
        torch.rand(7)  # the global generator does not matter
        return [h[0].frames for h in follow(segmenter or VideoSegmenter(model, "random", seed=seed), clip)[1]]
    assert frames(1) == frames(1) != frames(2)
    segmenter = VideoSegmenter(model, "random", seed=1)
    assert frames(1) == frames(0, segmenter)
    segmenter.reset()
    assert segmenter.objects == [] and frames(1) == frames(0, segmenter)


@pytest.mark.parametrize("options, said", [
    ({"slots": 0}, "from 1 on"), ({"slots": -2}, "found -2"), ({"slots": "four"}, "'four'"), ({"slots": 2.5}, "2.5"),
    ({"slots": True}, "True"), ({"policy": "newst"}, "found 'newst'"), ({"policy": ""}, "found ''"),
    ({"device": "tpu"}, "'tpu'"), ({"model": "vos-giant"}, "vos-giant"), ({"seed": "x"}, "seed"),
    ({"model": "prediction-tiny"}, "a network that segments, found prediction-tiny")])
def test_options_that_make_no_sense_are_refused(model, options, said):
    refused(said, lambda: VideoSegmenter(**{"model": model, **options}))


# ---------------------------------------------------------------- errors change nothing
def test_an_error_leaves_the_stream_as_it_was(clip):
    plain, _ = follow(VideoSegmenter(network()), clip)
    model = network()
    segmenter, out = VideoSegmenter(model), []
    bad = [((clip.frames[0][:, :20],), "frame 5: expected 32 x 32 (height x width) as before, found 20 x 32"),
           ((clip.frames[0] * torch.nan,), "nan"), ((clip.frames[5], clip.masks[5][:8]), "32x32"),
           ((clip.frames[5], clip.masks[5].float()), "whole numbers")]
    for t, frame in enumerate(clip.frames):
        if t == 5:
            state = segmenter.state
            for args, said in bad:
                refused(said, segmenter.step, *args)
            remember, model.memorize = model.memorize, None                             # the network itself breaks
            with pytest.raises(TypeError):
                segmenter.step(frame, torch.full((32, 32), 9))
            model.memorize = remember
            assert segmenter.state is state
        out.append(segmenter.step(frame, clip.masks[0] if t == 0 else None))
    assert torch.equal(torch.stack(out), plain)


def test_the_first_frame_needs_an_object(model, clip):
    segmenter = VideoSegmenter(model)
    refused("found no mask", segmenter.step, clip.frames[0])
    refused("found an empty one", segmenter.step, clip.frames[0], torch.zeros(32, 32).long())
    refused("found an empty one", segmenter.step, clip.frames[0], torch.full((32, 32), -1))
    segmenter.step(clip.frames[0][:, :16], clip.masks[0][:16].clamp(min=1))  # the size is not fixed by a refusal


# ---------------------------------------------------------------- whole videos
def test_tracking_is_a_step_for_each_frame(clip):
    masks = {0: torch.where(clip.masks[0] == 1, 1, 0), 6: torch.where(clip.masks[6] == 2, 9, 0)}
    labels, told = follow(VideoSegmenter(network()), clip, masks)
    segmenter = VideoSegmenter(network())
    assert torch.equal(torch.stack([*segmenter.track(clip.frames, masks)]), labels) and segmenter.memory == told[-1]
    alone = [*VideoSegmenter(network()).track(iter(clip.frames), clip.masks[0])]        # one mask: that of frame 0
    assert torch.equal(torch.stack(alone), follow(VideoSegmenter(network()), clip)[0])


def test_tracking_is_lazy_and_goes_on_from_where_the_stream_is(clip):
    pulled = []

    def frames():
        for t in range(5):
            pulled.append(t)
            yield clip.frames[t]
    segmenter = VideoSegmenter(network())
    found = segmenter.track(frames(), {0: clip.masks[0]})
    assert pulled == [] and segmenter.state.t == 0
    first = next(found)
    assert pulled == [0] and torch.equal(first, clip.masks[0])
    rest = [*found, *segmenter.track(clip.frames[5:])]
    assert torch.equal(torch.stack([first, *rest]), follow(VideoSegmenter(network()), clip)[0])


def test_before_the_first_mask_everything_is_background_and_forgotten(clip):
    segmenter, fresh = VideoSegmenter(network()), VideoSegmenter(network())
    found = [*segmenter.track(clip.frames[:5], {2: clip.masks[2]})]
    assert all(torch.equal(x, torch.zeros(32, 32).long()) for x in found[:2])
    assert torch.equal(torch.stack(found[2:]), torch.stack([*fresh.track(clip.frames[2:5], clip.masks[2])]))
    assert segmenter.memory == fresh.memory and segmenter.memory[0].frames == (0, 1, 2)
    prob = next(VideoSegmenter(network()).track(clip.frames[:5], {2: clip.masks[2]}, return_prob=True))
    assert torch.equal(prob, torch.ones(1, 32, 32))
    refused("frame: expected", next, VideoSegmenter(network()).track(["a.png"], {2: clip.masks[2]}))


def test_a_mask_for_a_frame_that_never_comes_is_named(clip):
    masks = {0: clip.masks[0], 3: clip.masks[3], 20: clip.masks[3]}
    found = VideoSegmenter(network()).track(clip.frames[:5], masks)
    assert len([next(found) for _ in range(5)]) == 5
    refused("none called 20", next, found)
    assert set(masks) == {0, 3, 20}                                                     # the caller's own stays whole
    refused("masks: expected one to start from", next, VideoSegmenter(network()).track(clip.frames))
    refused("found an empty one", next, VideoSegmenter(network()).track(clip.frames, clip.masks[0] * 0))


def test_frames_with_names_are_tracked_by_name_or_by_index(tmp_path, clip):
    for t in range(4):
        (tmp_path / "frames").mkdir(exist_ok=True)
        pixels = (clip.frames[t].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"frames/{t:05d}.png")
    video = VideoFolder(tmp_path / "frames")
    found = [torch.stack([*VideoSegmenter(network()).track(video, {0: clip.masks[0], key: clip.masks[2]})])
             for key in (2, "00002")]
    assert torch.equal(*found) and torch.equal(found[0][2] > 0, clip.masks[2] > 0)


# ---------------------------------------------------------------- probabilities, and the end
@pytest.mark.parametrize("test_time", [None, multi_scale((1., 1.3), max_distance=3), TimeConfig(max_distance=3)])
def test_probabilities_have_the_label_map_as_their_arg_max(clip, test_time):
    "Also where a mask enters, where one corrects, and where components were removed."
    fix = torch.zeros_like(clip.masks[0])
    fix[2:6, 2:6] = 1
    masks = {0: torch.where(clip.masks[0] == 1, 1, 0), 3: torch.where(clip.masks[3] == 2, 9, 0), 5: fix}
    model = network()
    plain, soft = (VideoSegmenter(model, test_time=test_time) for _ in range(2))
    for t, frame in enumerate(clip.frames):
        labels = plain.step(frame, masks.get(t))
        prob = soft.step(frame, masks.get(t), return_prob=True)
        assert prob.shape == (1 + len(soft.objects), 32, 32) and prob.dtype == torch.float32
        torch.testing.assert_close(prob.sum(0), torch.ones(32, 32), atol=1e-5, rtol=0.)
        assert torch.equal(torch.tensor([0, *soft.objects])[prob.max(0).indices], labels)
        if t in masks:
            assert prob[:, masks[t] > 0].unique().tolist() == [0., 1.]
    assert plain.memory == soft.memory


def test_probabilities_are_those_of_the_network(clip):
    model = network()
    segmenter = VideoSegmenter(model)
    segmenter.step(clip.frames[0], clip.masks[0])
    with torch.no_grad():
        logits, _ = model.segment(segmenter.state.memories[0], clip.frames[1][None], equal_widths=True)
    assert torch.equal(segmenter.step(clip.frames[1], return_prob=True), logits.softmax(1)[0])
    assert torch.equal(VideoSegmenter(model).step(clip.frames[0], clip.masks[0], return_prob=True),
                       torch.stack([clip.masks[0] == i for i in range(3)]).float())


def test_the_last_frame_is_segmented_and_not_memorized(clip):
    plain, ended = VideoSegmenter(network()), VideoSegmenter(network())
    for s in (plain, ended):
        s.step(clip.frames[0], clip.masks[0])
    before = ended.state
    assert torch.equal(ended.step(clip.frames[1], end=True), plain.step(clip.frames[1]))
    assert ended.state.memories is before.memories and ended.memory == list(before.reports) and ended.state.t == 2
    new = torch.where(clip.masks[2] == 1, 7, 0)
    labels = ended.step(clip.frames[2], new, end=True)
    assert torch.equal(labels == 7, new == 7) and ended.objects == [1, 2]               # seen, but not followed
    assert ended.step(clip.frames[3], new, end=True, return_prob=True).shape == (4, 32, 32)


def test_the_answer_belongs_to_the_caller(clip):
    "Scribbling on the returned labels changes nothing that the stream remembers."
    found = []
    for scribble in (False, True):
        segmenter, labels = VideoSegmenter(network(), test_time=TimeConfig(max_distance=2)), []
        for x in segmenter.track(clip.frames, clip.masks[0]):
            labels.append(x.clone())
            if scribble:
                x.fill_(1)
        found.append(torch.stack(labels))
    assert torch.equal(*found)


# ---------------------------------------------------------------- constant memory
def test_the_state_does_not_grow(model, clip):
    def elements(s):
        return sum(x.numel() for m in s.state.memories[0] for x in m[:4])
    sizes = {}
    for slots in (3, math.inf):
        segmenter = VideoSegmenter(model, "oldest", slots)
        sizes[slots] = []
        for t in range(40):
            segmenter.step(clip.frames[t % 14], clip.masks[0] if t == 0 else None)
            sizes[slots].append(elements(segmenter))
    one = sizes[3][0]
    assert sizes[3] == [one * min(t + 1, 3) for t in range(40)]
    assert sizes[math.inf] == [one * (t + 1) for t in range(40)]                            # the measure can tell


LONG = """
    import resource, sys
    from dataclasses import replace
    import torch
    from stremn.vos.files import segment_video
    from helpers import network
    from stremn.vos.stream import VideoSegmenter
    out, frames, kept, peaks = sys.argv[1], int(sys.argv[2]), [], []
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    def source():
        g = torch.Generator().manual_seed(0)
        for t in range(frames):
            if t == frames//10: peaks.append(peak())
            frame = torch.rand(3, 64, 64, generator=g)
            if sys.argv[3] == "leak": kept.append(frame)
            yield f"{t:05d}", frame, None
    torch.set_num_threads(1)
    model = network()
    model.config = replace(model.config, test_side=16)
    mask = torch.zeros(64, 64).long()
    mask[20:40, 20:40] = 1
    segment_video(VideoSegmenter(model, "learned", 3), source(), mask, out, progress=False)
    print(peaks[0], peak())
"""


def peaks(folder, frames, how="tidy"):
    "Peak memory of a process in kB, after a tenth of the frames and at the end; masks and overlay written on the way."
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LONG), folder / "out", str(frames), how],
                          cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((folder / "out").glob("*.png"))) == frames
    return map(int, done.stdout.split())


LONG_TOO = pytest.mark.skipif(not os.environ.get("STREMN_LONG"), reason="a minute; set STREMN_LONG=1")


@pytest.mark.skipif(sys.platform == "win32", reason="resource is not there")
@pytest.mark.parametrize("frames", [1500, pytest.param(5000, marks=LONG_TOO)])
def test_ten_times_the_frames_need_no_more_memory(tmp_path, frames):
    early, late = peaks(tmp_path, frames)
    assert late <= 1.05 * early, (early, late)
    assert late - early < 12 * frames, (early, late)                                    # kB: a quarter of a frame each


@pytest.mark.skipif(not os.environ.get("STREMN_LONG"), reason="a minute; set STREMN_LONG=1")
def test_the_measure_of_memory_can_tell(tmp_path):
    "A source that keeps its own frames is caught."
    early, late = peaks(tmp_path, 1500, "leak")
    assert late > 1.05 * early and late - early > 12 * 1500, (early, late)


# ---------------------------------------------------------------- weights that are shipped
def test_the_default_is_the_shipped_network_for_real_video(clip):
    segmenter = VideoSegmenter(device="cpu")
    assert torch.equal(segmenter.step(clip.frames[0], clip.masks[0]), clip.masks[0])
    assert segmenter.policy.slots == segmenter.model.config.bank.slots
    assert segmenter.model.config == load("vos-small").config


def test_a_network_that_is_handed_over_stays_where_it_is_unless_a_device_is_named():
    model = network()
    assert VideoSegmenter(model).device == VideoSegmenter(model, device="cpu").device == torch.device("cpu")


# ---- the default policy --------------------------------------------------------------------------------------------

def test_the_default_counts_only_where_nobody_says_how_to_forget():
    tiny = load("vos-tiny")
    default, own = replace(tiny.default_policy, noise="never"), replace(tiny.bank.policy, noise="never")
    assert default != own
    assert VideoSegmenter(tiny).policy == VideoSegmenter("vos-tiny").policy == default
    assert VideoSegmenter(tiny, slots=3).policy == replace(default, slots=3)
    assert VideoSegmenter(tiny, "oldest").policy == replace(own, rule="oldest")
    assert VideoSegmenter(tiny, own).policy == own
    assert VideoSegmenter(network()).policy.rule == network().bank.policy.rule


def test_another_bank_forgets_in_its_own_way():
    tiny = load("vos-tiny")
    for name in ("stm", "stcn"):
        stream = VideoSegmenter(with_baseline_memory(tiny, name))
        assert stream.policy == replace(stream.model.bank.policy, noise="never")
    assert tiny.default_policy is not None
