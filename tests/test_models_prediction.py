"""Contracts of the prediction network: compared with loops, causal, every weight learns."""
import math
from dataclasses import replace

import pytest
import torch

from helpers import TINY_PREDICTION, TINY_PREDICTION_BANK
from random_video import depends_on_the_past_only, video
from stremn.config import from_json, to_json
from stremn.core import StremnError, make_generator
from stremn.memory.read import affinity, pixels
from stremn.memory.rules import RULES
from stremn.memory.similarity import best_match_similarity
from stremn.memory.update import Memory
from stremn.models.hub import load, save_weights
from stremn.models.prediction import (
    OUTPUTS, PredictionConfig, PredictionModel, block, check_frames, check_range, frame_from_output, scheduled_sampling,
    stack_recent)
from stremn.models.presets import paper_prediction



def network(seed=0, double=True, bank=None, **changes):
    "A small network in evaluation mode."
    torch.manual_seed(seed)
    config = replace(TINY_PREDICTION, bank=replace(TINY_PREDICTION_BANK, **(bank or {})), **changes)
    model = PredictionModel(config).eval()
    return model.double() if double else model


def hand(m, frames, future, K, truth=None, insert_first=False):
    "Sec. 4.2 as a loop over single videos: a list of slots, no bank. All predictions, warm-up included."
    b, c, whole = m.bank, m.config, []
    for v in range(len(frames)):
        seen, slots, out = [f[None] for f in frames[v]], [], []
        for t in range(frames.shape[1] - 1 + future):
            x = m.encoder(torch.cat([seen[max(0, t - c.stack + 1 + i)] for i in range(c.stack)], 1))
            key = b.query_key(x)
            new = (key if c.bank.shared_keys else b.memory_key(x), b.memory_value(x), b.update_key(x))
            held = slots + [new] if insert_first else slots
            read, own = torch.zeros_like(b.query_value(x)), b.query_value(x)
            if held:
                keys, values = (torch.stack([s[i] for s in held], 1) for i in (0, 1))
                memory = Memory(keys, values, keys, torch.zeros(1, len(held), dtype=torch.long), 0)
                weight = affinity(key, memory, c.bank.similarity)
                read = (weight @ pixels(values)).transpose(1, 2).view_as(own)
            raw = m.leave(m.decoder(torch.cat([read, own], 1)))
            out.append(frame_from_output(raw, seen[t], c.output))
            if t >= frames.shape[1] - 1:
                seen.append(out[-1] if truth is None else truth[v:v + 1, t + 1 - frames.shape[1]])
            if len(slots) == K:
                scores = best_match_similarity(new[2], torch.stack([s[2] for s in slots], 1))[0]
                scores[:c.bank.pinned] = -torch.inf
                slots[int(scores.argmax())] = new
            else:
                slots.append(new)
        whole.append(torch.cat(out))
    return torch.stack(whole)


# ---- names that files rely on --------------------------------------------------------------------------------------

def test_state_dict_keys_are_stable():
    parts = [f"{p}.{i}.{j}." for p in ("encoder", "decoder") for i in range(6) for j in (0, 1, 3, 4)]
    heads = [f"bank.{h}." for h in ("query_key", "query_value", "memory_value", "update_key")]
    want = {p + n for p in (*parts, *heads, "leave.") for n in ("weight", "bias")} | {"bank.beta"}
    assert set(PredictionModel().state_dict()) == want
    apart = PredictionModel(replace(PredictionConfig(), bank=replace(PredictionConfig().bank, shared_keys=False)))
    assert set(apart.state_dict()) == want | {"bank.memory_key.weight", "bank.memory_key.bias"}
    assert sum(p.numel() for p in PredictionModel().parameters()) < 500_000


def test_configs_survive_json_and_files(tmp_path):
    clamped = replace(TINY_PREDICTION, output="clamp", memory=False)
    for config in (PredictionConfig(), paper_prediction(channels=3), clamped):
        assert from_json(PredictionConfig, to_json(config)) == config
    model = network(double=False)
    again = load(save_weights(model, tmp_path / "p.safetensors", {"note": "untrained"}, "prediction"))
    frames = video(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(frames, 3), again(frames, 3)) and again.config == model.config


def test_paper_size():
    with torch.device("meta"):
        model = PredictionModel(paper_prediction(channels=3))
        assert model.encoder(torch.rand(1, 9, 128, 128)).shape == (1, 512, 16, 16)
        assert model.leave(model.decoder(torch.rand(1, 1024, 16, 16))).shape == (1, 3, 128, 128)
    assert len(model.encoder) == len(model.decoder) == 6 and model.config.bank.slots == 5


@pytest.mark.parametrize("changes, message", [
    (dict(strides=(2,)), "strides: expected 2"), (dict(widths=(), strides=()), "strides: expected 1"),
    (dict(output="tanh"), "output: expected one of"), (dict(stack=0), "stack: expected 1 or more"),
    (dict(channels=0), "channels: expected 1 or more"), (dict(strides=(2, 0)), "widths, strides"),
    (dict(widths=(4, 8)), "bank.memory_channels: expected 8"), (dict(groups=0), "groups: expected 1")])
def test_config_errors(changes, message):
    with pytest.raises(StremnError, match=message):
        replace(TINY_PREDICTION, **changes)


# ---- pieces --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_stacks_end_in_the_newest_frame_and_repeat_the_first(n):
    frames = [torch.full((2, 1, 1, 1), float(t)) for t in range(7)]
    for t in range(7):
        got = stack_recent(frames[:t + 1], n)[0].flatten().tolist()
        assert got == [max(0, t - n + 1 + i) for i in range(n)]


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("out", [1, 5, 6, 16])
def test_blocks_scale_exactly(stride, out):
    x = torch.randn(2, 3, 12, 24)
    assert block(3, out, stride)(x).shape == (2, out, 12 // stride, 24 // stride)
    assert block(3, out, stride, True)(x).shape == (2, out, 12 * stride, 24 * stride)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("output", OUTPUTS)
def test_frames_stay_in_range(output, dtype):
    g = make_generator(1)
    last = torch.rand(3, 2, 5, 7, generator=g).round()
    for size in (0., 1., 1e4):
        raw = (size * torch.randn(3, 2 + (output == "blend"), 5, 7, generator=g)).to(dtype)
        frame = frame_from_output(raw, last, output)
        assert frame.shape == last.shape and frame.dtype in (torch.float32, torch.float64)
        assert ((frame >= 0) & (frame <= 1)).all()


def test_bad_frames_are_refused():
    good = video(2, 4, dtype=torch.float32)
    check_frames(good, 1, 4, 4)
    bad = {"floats": good[0], "found list": [1], "uint8": (255 * good).byte(),
           "1 channels": good.expand(-1, -1, 3, -1, -1), "at least 4": good[:, :3],
           "multiples of 4": good[..., :6], "to inf": good.masked_fill(good > .9, torch.inf),
           "found nan": good.masked_fill(good > .9, torch.nan), "numbers in": good - .5, "floats .V": good[:, :, :, :0]}
    for message, frames in bad.items():
        with pytest.raises(StremnError, match=message) as e:
            check_frames(frames, 1, 4, 4)
            check_range(frames)
        assert "\n" not in str(e.value)


# ---- the whole against loops ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("bank", [{}, {"slots": 1}, {"slots": 2, "pinned": 1},
                                  {"similarity": "dot", "shared_keys": False}])
@torch.no_grad()
def test_forward_equals_the_hand_loop(output, bank):
    model, frames = network(1, bank=bank, output=output), video(2, 5)
    want = hand(model, frames, 4, model.config.bank.slots)
    torch.testing.assert_close(model(frames, 4, warm_up=True), want)
    torch.testing.assert_close(model(frames, 4), want[:, 4:])


@pytest.mark.parametrize("stack, channels", [(1, 1), (2, 3), (4, 1)])
@torch.no_grad()
def test_any_stack_and_channels(stack, channels):
    model, frames = network(2, stack=stack, channels=channels), video(2, 3, channels)
    torch.testing.assert_close(model(frames, 5), hand(model, frames, 5, 3)[:, 2:])


@torch.no_grad()
def test_the_read_comes_before_the_insert():
    model, frames = network(3), video(1, 6)
    ours = model(frames, 2)
    torch.testing.assert_close(ours, hand(model, frames, 2, 3)[:, 5:])
    assert (ours - hand(model, frames, 2, 3, insert_first=True)[:, 5:]).abs().max() > 1e-6
    calls = []
    predict, memorize = model.predict_next, model.memorize
    model.predict_next = lambda *a: (calls.append("read"), predict(*a))[1]
    model.memorize = lambda *a: (calls.append("insert"), memorize(*a))[1]
    model(frames, 2)
    assert calls == ["insert"] * 5 + ["read", "insert"] * 2


@torch.no_grad()
def test_forward_is_a_loop_of_step():
    model, frames = network(4), video(2, 4)
    seen, memory, out = list(frames.unbind(1)), None, []
    for t in range(4 + 5 - 1):
        answer, memory = model.step(memory, stack_recent(seen[:t + 1], 3), t)
        out.append(answer)
        if t >= 3:
            seen.append(answer)
    assert torch.equal(model(frames, 5, warm_up=True), torch.stack(out, 1))


def stepwise(m, frames, future, generator=None):
    "`step` after `step`: answers for frames 1 to M-1+N."
    seen, memory, out = list(frames.unbind(1)), None, []
    for t in range(frames.shape[1] - 1 + future):
        answer, memory = m.step(memory, stack_recent(seen[:t + 1], m.config.stack), t, generator)
        out.append(answer)
        if t >= frames.shape[1] - 1:
            seen.append(answer)
    return torch.stack(out, 1)


@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("M", [1, 2, 6])
def test_frames_encoded_at_once_give_the_numbers_of_steps(M, output, memory, warm_up):
    for double, near in ((True, 1e-10), (False, 1e-5)):
        m = network(5, double, output=output, memory=memory).train()                   # with noise in the choice
        frames, first = video(2, M, seed=M, dtype=torch.float64 if double else torch.float32), 0 if warm_up else M - 1
        wanted = stepwise(m, frames, 4, make_generator(1))[:, first:]
        found = m(frames, 4, generator=make_generator(1), warm_up=warm_up)
        assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=near, rtol=0)
        learned = [p for p in m.parameters() if p.requires_grad]
        slopes = [torch.autograd.grad(x.square().mean(), learned, allow_unused=True) for x in (found, wanted)]
        for a, b in zip(*slopes):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=near, rtol=1e-4))


@torch.no_grad()
def test_videos_of_a_batch_do_not_meet():
    model, frames = network(5), video(3, 6)
    whole = model(frames, 3)
    for v in range(3):
        torch.testing.assert_close(model(frames[v:v + 1], 3)[0], whole[v])


# ---- time ----------------------------------------------------------------------------------------------------------

def test_answers_depend_on_the_past_only():
    depends_on_the_past_only(network(6))


@torch.no_grad()
def test_scheduled_sampling():
    model, frames = network(7), video(6, 10)
    ask = lambda p, seed=0: model(frames[:, :4], 6, frames[:, 4:], p, make_generator(seed))   # noqa: E731
    own, forced = model(frames[:, :4], 6), hand(model, frames[:, :4], 6, 3, frames[:, 4:])[:, 3:]
    assert torch.equal(ask(0.), own)
    torch.testing.assert_close(ask(1.), forced)
    half = ask(.5)
    assert torch.equal(half, ask(.5)) and not torch.equal(half, ask(.5, 1))
    assert torch.equal(half[:, 0], own[:, 0])                                     # nothing was fed yet
    second = [(torch.equal(h, o), torch.allclose(h, f)) for h, o, f in zip(half[:, 1], own[:, 1], forced[:, 1])]
    assert all(a != b for a, b in second) and len(set(second)) == 2               # each video draws for itself
    fed = scheduled_sampling(torch.zeros(4000, 1, 1, 1), torch.ones(4000, 1, 1, 1), .3, make_generator(0)).mean()
    assert abs(fed - .3) < .03


def test_gradients_reach_every_weight_and_through_every_answer():
    model = network(8, bank={"slots": 2, "noise": "never"})
    frames = video(2, 8).requires_grad_()
    model(frames[:, :5], 3).sum().backward()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in weights.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert (frames.grad.abs().flatten(2).sum((0, 2)) > 0).tolist() == [True] * 5 + [False] * 3


def test_gradient_agrees_with_finite_differences():
    model, frames = network(9, bank={"slots": 8}, widths=(4, 6)), video(1, 3, H=4, W=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: model(f, 2), (frames.detach().clamp(.1, .9).requires_grad_(),), atol=1e-4)


# ---- memory --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_memory_stops_growing_and_long_roll_outs_stay_frames():
    model, frames = network(10), video(2, 4)
    recent, memory = list(frames.unbind(1)), None
    for t in range(60):
        answer, memory = model.step(memory, stack_recent(recent[-3:], 3), t)
        recent = [*recent[-2:], answer]
        assert memory.slots == min(t + 1, 3) and memory.frames.max() == t
    out = model(frames, 300)
    assert out.shape[1] == 300 and out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    unbounded = model.bank.policy.but(slots=math.inf)
    for t in range(5):
        memory = model.step(memory, stack_recent(recent, 3), 60 + t, policy=unbounded)[1]
    assert memory.slots == 8


@torch.no_grad()
def test_without_memory_only_the_stack_counts():
    model, frames, other = network(11, memory=False), video(1, 8), video(1, 8, seed=1)
    other[:, 5:] = frames[:, 5:]
    assert torch.equal(model(frames, 4), model(other, 4))
    assert torch.equal(model(frames, 4), model(frames[:, 5:], 4))
    assert model.step(None, stack_recent(frames.unbind(1)), 7)[1] is None
    nothing = model.bank.policy.but(slots=0)
    same = network(11)                                                            # the same weights, with a memory
    assert not torch.equal(same(frames, 4), same(other, 4))
    assert torch.equal(same(frames, 4, policy=nothing), model(frames, 4))


@pytest.mark.parametrize("policy", sorted(RULES))
@torch.no_grad()
def test_every_policy_runs_and_is_deterministic(policy):
    model, frames = network(12), video(2, 9)
    policy = model.bank.policy.but(policy)
    a, b = (model(frames, 4, generator=make_generator(3), policy=policy) for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all()


def test_noise_only_in_training():
    model, frames = network(13, bank={"slots": 2}), video(1, 12)
    with torch.no_grad():
        assert torch.equal(model(frames, 3, generator=make_generator(0)), model(frames, 3, generator=make_generator(1)))
        model.train()
        drawn = torch.cat([model(frames, 3, generator=make_generator(s)) for s in range(8)])
    assert len({tuple(d.flatten().tolist()) for d in drawn}) > 1


@pytest.mark.parametrize("output", OUTPUTS)
def test_autocast(output):
    model, frames = network(14, double=False, output=output), video(2, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(frames, 3)
    assert out.dtype == torch.float32 and (out - model(frames, 3)).abs().max() < .1
    out.mean().backward()


@pytest.mark.parametrize("args, message", [
    ((0,), "future: expected 1"), ((2.,), "future: expected 1"), ((2, None, .5), "truth: expected the true frames"),
    ((2, None, 2.), "sampling: expected a chance"), ((2, video(1, 3), .5), "truth: expected .1, 2, 1, 8, 12."),
    ((2, video(1, 2) * 2, .5), "truth: expected numbers in")])
def test_forward_errors(args, message):
    with pytest.raises(StremnError, match=message):
        network()(video(), *args)
