"""Contracts of the network that recalls pixels: compared with loops, causal, equal in streams, every weight learns."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers import TINY_PREDICTION_BANK
from random_video import depends_on_the_past_only, video
from stremn.config import from_json, to_json
from stremn.core import StremnError, make_generator
from stremn.memory.read import affinity
from stremn.memory.rules import RULES
from stremn.memory.update import Memory
from stremn.models.hub import kind_of, load, save_weights
from stremn.models.prediction import PredictionConfig, PredictionModel, stack_recent
from stremn.models.recall import GAIN, START, RecallConfig, RecallModel, paint, warped
from stremn.prediction.stream import VideoPredictor

BANK = replace(TINY_PREDICTION_BANK, locality=.5)
SMALL = RecallConfig(widths=(4, 6), strides=(2, 2), groups=2, bank=BANK)


def network(seed=0, double=True, bank=None, awake=True, **changes):
    "A small network in evaluation mode; awake: its last layer says something of shares and flow."
    torch.manual_seed(seed)
    model = RecallModel(replace(SMALL, bank=replace(BANK, **(bank or {})), **changes)).eval()
    if awake:
        torch.nn.init.normal_(model.leave.weight, std=.05)
    return model.double() if double else model


def cubic(x, a=-.75):
    "Keys' kernel, as PyTorch has it."
    x = x.abs()
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def fetched(frame, flow):
    "`warped` pixel by pixel: sixteen neighbours, those outside repeat the border."
    V, C, H, W = frame.shape
    out = torch.zeros_like(frame)
    for v in range(V):
        for r in range(H):
            for c in range(W):
                x, y = c + flow[v, 0, r, c], r + flow[v, 1, r, c]
                for i in range(int(y.floor()) - 1, int(y.floor()) + 3):
                    for j in range(int(x.floor()) - 1, int(x.floor()) + 3):
                        w = cubic(y - i) * cubic(x - j)
                        out[v, :, r, c] += w * frame[v, :, min(max(i, 0), H - 1), min(max(j, 0), W - 1)]
    return out


def hand(m, frames, future, K):
    "The whole network as a loop over single videos and a list of frames: the oldest goes. Predictions only."
    b, c, s, whole = m.bank, m.config, m.config.multiple, []
    for one in frames:
        seen, slots, out = [f[None] for f in one], [], []
        for t in range(len(one) - 1 + future):
            x, last = m.encoder(stack_recent(seen[:t + 1], c.stack)), seen[t]
            key, own, read, recalled = b.query_key(x), b.query_value(x), torch.zeros_like(b.query_value(x)), last
            if slots:
                keys, values = (torch.stack([slot[i] for slot in slots], 1) for i in (0, 1))
                memory = Memory(keys, values, keys, torch.zeros(1, len(slots), dtype=torch.long), 0)
                weight = affinity(key, memory, c.bank.similarity, locality=c.bank.locality)[0]       # (P,M)
                read = (weight @ values[0].movedim(1, 0).flatten(1).T).T.view_as(own)
                recalled = torch.zeros_like(last)
                for p, row in enumerate(weight):
                    i, j = s * (p // x.shape[-1]), s * (p % x.shape[-1])
                    for q, w in enumerate(row):
                        frame, place = slots[q // len(weight)][2], q % len(weight)
                        k, n = s * (place // x.shape[-1]), s * (place % x.shape[-1])
                        recalled[..., i:i + s, j:j + s] += w * frame[..., k:k + s, n:n + s]
            raw = m.leave(m.decoder(torch.cat([read, own], 1)))
            C = c.channels
            share = (GAIN * raw[:, C:C + 3] + torch.tensor(START, dtype=raw.dtype)[:, None, None]).softmax(1)
            three = fetched(last, GAIN * raw[:, C + 3:]), recalled, raw[:, :C].sigmoid()
            out.append(sum(share[:, i:i + 1] * x for i, x in enumerate(three)).clamp(0, 1))
            if t >= len(one) - 1:
                seen.append(out[-1])
            slots = [*slots, (key, b.memory_value(x), last)][-K:]
        whole.append(torch.cat(out[len(one) - 1:]))
    return torch.stack(whole)


@pytest.mark.parametrize("channels, bank", [
    (1, {}), (3, {"similarity": "dot"}), (1, {"locality": 0.}), (1, {"slots": 1})])
@torch.no_grad()
def test_forward_equals_the_hand_loop(channels, bank):
    model, frames = network(1, bank={"policy": "oldest", **bank}, channels=channels), video(2, 5, channels)
    want = hand(model, frames, 4, model.config.bank.slots)
    assert (want - frames[:, -1:]).abs().max() > .1
    torch.testing.assert_close(model(frames, 4), want)


@torch.no_grad()
def test_warped_fetches_sixteen_neighbours():
    frame, flow = video(2, 1, 3)[:, 0], 3 * torch.randn(2, 2, 8, 12, generator=make_generator(3), dtype=torch.float64)
    torch.testing.assert_close(warped(frame, flow), fetched(frame, flow))
    assert torch.equal(warped(frame, torch.zeros_like(flow)).round(decimals=9), frame.round(decimals=9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_frames_stay_in_range(dtype):
    g = make_generator(1)
    last, recalled = (torch.rand(3, 2, 5, 7, generator=g).round() for _ in range(2))
    for size in (0., 1., 1e3):
        painted = paint((size * torch.randn(3, 7, 5, 7, generator=g)).to(dtype), last, recalled)
        assert painted.frame.shape == last.shape and painted.frame.dtype in (torch.float32, torch.float64)
        assert ((painted.frame >= 0) & (painted.frame <= 1)).all() and painted.pictures.shape == (3, 3, 2, 5, 7)
        torch.testing.assert_close(painted.shares.sum(1), torch.ones_like(painted.shares[:, 0]))


@torch.no_grad()
def test_what_is_recalled_is_a_mean_of_what_was_stored():
    model, frames = network(2), video(1, 6)
    memory = None
    for t in range(5):
        memory = model.step(memory, stack_recent(frames[:, :t + 1].unbind(1)), t)[1]
        assert memory.values.shape[2] == 5 + 16 and memory.slots == min(t + 1, 3)
        kept = F.pixel_shuffle(memory.values[0, :, 5:], 4)
        assert torch.equal(kept, frames[0, memory.frames[0]])              # whole frames, to the last bit
    far = network(2, bank={"locality": 500.})
    shown = far.picture(memory, far.encoder(stack_recent(frames.unbind(1))), frames[:, -1]).pictures[0, 1]
    assert ((shown >= kept.amin(0) - 1e-9) & (shown <= kept.amax(0) + 1e-9)).all()   # cell by cell, from its own place


@torch.no_grad()
def test_without_memory_the_newest_frame_is_recalled():
    model, frames, other = network(3, memory=False), video(1, 8), video(1, 8, seed=1)
    other[:, 5:] = frames[:, 5:]
    assert torch.equal(model(frames, 4), model(other, 4))
    assert torch.equal(model.picture(None, model.encoder(stack_recent(frames.unbind(1))), frames[:, -1]).pictures[:, 1],
                       frames[:, -1])
    asleep = network(3, awake=False, memory=False)
    asleep.leave.bias.data[1 + 2] = -100.                                   # nothing is drawn
    torch.testing.assert_close(asleep(frames, 3), frames[:, -1:].expand(-1, 3, -1, -1, -1))
    same = network(3)                                                       # the same weights, with a memory
    assert not torch.equal(same(frames, 4), same(other, 4))
    assert torch.equal(same(frames, 4, policy=same.bank.policy.but(slots=0)), model(frames, 4))


def test_answers_depend_on_the_past_only():
    depends_on_the_past_only(network(4))


@pytest.mark.parametrize("awake", [False, True])
def test_every_weight_learns_from_the_first_step_on(awake):
    model, frames = network(5, bank={"slots": 2, "noise": "never"}, awake=awake), video(2, 8).requires_grad_()
    (model(frames[:, :5], 3) - .3).square().sum().backward()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in weights.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert (frames.grad.abs().flatten(2).sum((0, 2)) > 0).tolist() == [True] * 5 + [False] * 3


def test_gradient_agrees_with_finite_differences():
    model, frames = network(6, bank={"slots": 8}), video(1, 3, H=4, W=4)
    assert torch.autograd.gradcheck(lambda f: model(f, 2), (frames.clamp(.1, .9).requires_grad_(),), atol=1e-4)


@pytest.mark.parametrize("policy", sorted(RULES))
@torch.no_grad()
def test_a_stream_says_what_a_clip_says(policy):
    model, frames = network(7, double=False), video(1, 7, dtype=torch.float32)
    watcher = VideoPredictor(model, policy, 2, seed=5)
    for f in frames[0]:
        watcher.observe(f)
        watcher.predict(2)                                                        # asking changes nothing
    whole = model(frames, 5, generator=make_generator(5), policy=model.bank.policy.but(policy, 2))[0]
    assert torch.allclose(watcher.predict(5), whole, atol=1e-5)


def test_autocast():
    model, frames = network(8, double=False), video(2, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(frames, 3)
    assert out.dtype == torch.float32 and (out - model(frames, 3)).abs().max() < .1
    out.mean().backward()


@torch.no_grad()
def test_long_roll_outs_stay_frames():
    out = network(9)(video(2, 4), 200)
    assert out.shape[1] == 200 and out.isfinite().all() and out.min() >= 0 and out.max() <= 1


def test_configs_and_weights_survive_files(tmp_path):
    for config in (RecallConfig(), replace(SMALL, channels=3, memory=False)):
        assert from_json(RecallConfig, to_json(config)) == config and kind_of(config) == "recall"
    model, frames = network(double=False), video(dtype=torch.float32)
    again = load(save_weights(model, tmp_path / "r.safetensors", {"note": "untrained"}, "recall"))
    with torch.no_grad():
        assert type(again) is RecallModel and torch.equal(model(frames, 3), again(frames, 3))
    for task in ("prediction", "vos", "nothing"):
        with pytest.raises(StremnError, match=f"task: expected recall for a RecallConfig, found '{task}'"):
            save_weights(model, tmp_path / "no.safetensors", {}, task)
    assert not (tmp_path / "no.safetensors").exists()
    for output in ("blend", "sigmoid"):
        with pytest.raises(StremnError, match="output: expected one of recall"):
            replace(SMALL, output=output)
    with pytest.raises(StremnError, match="output: expected one of sigmoid, clamp, blend, found 'recall'"):
        PredictionConfig(output="recall")


def test_four_more_numbers_a_pixel_than_the_network_without_pixels():
    more = RecallModel(), PredictionModel()
    count = [sum(p.numel() for p in m.parameters()) for m in more]
    assert count[0] - count[1] == 4 * (more[0].leave.in_channels * 3 * 3 + 1)
