"""Contracts of the VOS model: random sizes, objects against per-object loops, precision, determinism, stable names."""
from dataclasses import replace

import pytest
import torch

from stremn.core import StremnError, make_generator
from stremn.memory.bank import Decision
from stremn.memory.rules import RULES
from stremn.memory.update import Memory, Template
from stremn.models.vos import (
    VOSConfig, VOSModel, aggregate, choose_without_padding, mask_planes, object_rows, objects_per_memory)
from stremn.core import at_least_float32

SMALL = VOSConfig(widths=(5, 6), decoder_width=5, key_gain=6., bank=replace(
    VOSConfig().bank, memory_channels=6, query_channels=6, key_channels=4, value_channels=5, update_channels=3))
STAGES = ["stem.", "stages.0.conv1.", "stages.0.conv2.", "stages.1.1.", "stages.1.2.conv1.", "stages.1.2.conv2."]
PARTS = ([f"{e}_encoder.{s}" for e in ("query", "memory") for s in STAGES]
         + [f"bank.{h}." for h in ("query_key", "query_value", "memory_value", "update_key")]
         + [f"decoder.{s}." for s in ("enter.0", "enter.1.conv1", "enter.1.conv2", "refine.0.skip",
                                      "refine.0.merge.conv1", "refine.0.merge.conv2", "leave")])


def network(seed=0, double=True, bank=None, **changes):
    "A small network in evaluation mode."
    torch.manual_seed(seed)
    config = replace(SMALL, **changes)
    model = VOSModel(replace(config, bank=replace(config.bank, **(bank or {})))).eval()
    return model.double() if double else model


def clip(V=1, T=7, O=2, H=12, W=16, seed=0, dtype=torch.float64):
    "Frames (V,T,3,H,W) and masks (V,O,H,W) that do not overlap."
    g = make_generator(seed)
    frames = torch.rand(V, T, 3, H, W, generator=g, dtype=dtype)
    labels = torch.randint(O + 1, (V, H, W), generator=g)
    return frames, torch.stack([labels == o + 1 for o in range(O)], 1).to(dtype)


@torch.no_grad()
def loop(model, frames, masks, valid=None, generator=None):
    "Logits of frames 1, ... by step, and the memories after each frame."
    out, history, memories = [], [], ()
    for t, frame in enumerate(frames.unbind(1)):
        logits, memories = model.step(memories, frame, t, masks if t == 0 else None, valid, generator)
        out.append(logits)
        history.append(memories)
    return torch.stack(out[1:], 1), history


# ---- names that files rely on --------------------------------------------------------------------------------------

def test_state_dict_keys_are_stable():
    want = {p + n for p in PARTS for n in ("weight", "bias")} | {"bank.beta"}
    assert set(VOSModel().state_dict()) == want
    apart = set(network(bank={"shared_keys": False}).state_dict())
    assert apart == want | {"bank.memory_key.weight", "bank.memory_key.bias"}
    blind = set(network(skips=False).state_dict())
    assert blind == want - {"decoder.refine.0.skip.weight", "decoder.refine.0.skip.bias"}


def test_key_gain_changes_only_the_start_of_the_key_heads():
    plain, large = (network(key_gain=g, bank={"shared_keys": False}).state_dict() for g in (None, 6.))
    assert list(plain) == list(large)
    for gain in (1., 6.):
        for head in ("query_key", "memory_key"):
            w = network(key_gain=gain, bank={"shared_keys": False}).state_dict()[f"bank.{head}.weight"].flatten(1)
            torch.testing.assert_close(w @ w.T, gain**2 * torch.eye(len(w), dtype=w.dtype), atol=1e-4, rtol=0)


# ---- aggregation ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("O", [1, 2, 5])
def test_aggregate_is_normalised_odds(O):
    p = torch.rand(3, O, 4, 5, generator=make_generator(O), dtype=torch.float64)
    p[0, 0, 0], p[1, -1, 1] = 0., 1.
    all_p = torch.cat([(1 - p).prod(1, keepdim=True), p], 1).clamp(1e-7, 1 - 1e-7)
    odds = all_p / (1 - all_p)
    torch.testing.assert_close(aggregate(p).softmax(1), odds / odds.sum(1, keepdim=True))
    single = aggregate(p.float()).softmax(1).double()
    torch.testing.assert_close(single, odds / odds.sum(1, keepdim=True), atol=1e-4, rtol=0)


def test_aggregate_keeps_precision_and_gradient():
    p = torch.rand(1, 2, 2, 3, generator=make_generator(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(aggregate, p)
    assert [aggregate(p.to(d)).dtype for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)] == [
        torch.float32, torch.float32, torch.float32, torch.float64]
    assert aggregate(torch.tensor([0., 1.], dtype=torch.float16).view(1, 2, 1, 1)).isfinite().all()
    assert at_least_float32(p) is p


def test_an_invalid_object_takes_nothing():
    p = torch.rand(2, 3, 4, 4, generator=make_generator(1), dtype=torch.float64)
    with_padding = aggregate(p * torch.tensor([1., 1., 0.])[:, None, None]).softmax(1)
    torch.testing.assert_close(with_padding[:, :3], aggregate(p[:, :2]).softmax(1), atol=1e-6, rtol=0)


# ---- planes and rows -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("V, sizes", [(1, [1]), (2, [3]), (3, [2, 1]), (2, [1, 1, 2])])
def test_planes_equal_a_loop(V, sizes):
    O = sum(sizes)
    masks = torch.rand(V, O, 3, 4, generator=make_generator(0))
    objects, got = iter(range(O)), mask_planes(masks, sizes)
    for size, planes in zip(sizes, got, strict=True):
        mine = [next(objects) for _ in range(size)]
        others = lambda v, o: sum((masks[v, i] for i in range(O) if i != o), torch.zeros(3, 4)).clamp(max=1)
        want = [torch.stack([masks[v, o], others(v, o)]) for v in range(V) for o in mine]
        torch.testing.assert_close(planes, torch.stack(want))


def test_rows_and_counts():
    assert object_rows(3, 2).tolist() == [0, 0, 1, 1, 2, 2] and object_rows(1, 0).tolist() == []
    memory = Memory(*(torch.zeros(6, 1, 1, 1, 1) for _ in range(3)), torch.zeros(6, 1).long(), 1)
    assert objects_per_memory((memory, memory), 3) == [2, 2] and objects_per_memory((), 4) == []
    with pytest.raises(StremnError, match="rows for 4 videos, found \\[6\\]"):
        objects_per_memory((memory,), 4)


# ---- the whole model -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("H, W", [(1, 1), (2, 3), (4, 4), (5, 7), (13, 9), (3, 33)])
@pytest.mark.parametrize("widths", [(6,), (5, 6), (3, 4, 6)])
def test_every_size_works(H, W, widths):
    model = network(widths=widths, double=False)
    frames, masks = clip(2, 6, 2, H, W, dtype=torch.float32)
    out, history = loop(model, frames, masks)
    assert out.shape == (2, 5, 3, H, W) and out.isfinite().all()
    torch.testing.assert_close(out.softmax(2).sum(2), torch.ones(2, 5, H, W))
    assert all(m.slots <= 4 for memories in history for m in memories)


def test_forward_is_a_loop_of_steps_for_random_shapes():
    for seed in range(6):
        g = make_generator(seed)
        ranges = (1, 4), (2, 8), (1, 4), (4, 19), (4, 19)
        V, T, O, H, W = (int(torch.randint(a, b, (), generator=g)) for a, b in ranges)
        model = network(seed, double=False).train(seed % 2 == 0)
        frames, masks = clip(V, T, O, H, W, seed, torch.float32)
        labels = (masks * torch.arange(1, O + 1)[:, None, None]).sum(1).long()
        with torch.no_grad():
            whole = model(frames, labels, torch.ones(V, O, dtype=torch.bool), make_generator(1))
        assert torch.equal(whole, loop(model, frames, masks, generator=make_generator(1))[0])


@pytest.mark.parametrize("V, O", [(1, 1), (1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("bank", [{}, {"shared_keys": False, "similarity": "dot"}, {"per_object": True, "top_k": 5}])
def test_all_at_once_equals_object_by_object(V, O, bank):
    "What each object's own row says, written down with one row at a time and its frame's other objects passed along."
    model = network(bank=bank)
    frames, masks = clip(V, 3, O)
    with torch.no_grad():
        _, memories = model.step((), frames[:, 0], 0, masks)
        logits, view = model.segment(memories, frames[:, 1])
        for v in range(V):
            for o in range(O):
                x, others = frames[v:v + 1, 0], (masks[v].sum(0) - masks[v, o]).clamp(0, 1)
                first = model.query_encoder(x)[-1]
                five = torch.cat([x, masks[v:v + 1, o:o + 1], others[None, None]], 1)
                template = model.bank.template(model.memory_encoder(five)[-1], first)
                memory = model.bank.commit(None, template, 0, Decision(None, None))
                *fine, coarse = model.query_encoder(frames[v:v + 1, 1])
                alone = model.decoder(model.bank.read(memory, coarse), fine).sigmoid()
                torch.testing.assert_close(logits[v, o + 1].sigmoid(), alone[0].clamp(1e-7, 1 - 1e-7))


@pytest.mark.parametrize("policy", ["learned", "most_similar", "oldest"])
def test_objects_and_videos_may_be_listed_in_any_order(policy):
    model = network(bank={"policy": policy})
    frames, masks = clip(3, 9, 3)
    out, history = loop(model, frames, masks)
    videos, objects = [2, 0, 1], [1, 2, 0]
    moved, past = loop(model, frames[videos], masks[videos][:, objects])
    torch.testing.assert_close(moved, out[videos][:, :, [0, *(o + 1 for o in objects)]])
    rows = torch.arange(9).view(3, 3)[videos][:, objects].flatten()
    assert torch.equal(past[-1][0].frames, history[-1][0].frames[rows])


def test_a_video_is_the_same_alone_and_in_a_batch():
    model = network()
    frames, masks = clip(3, 9, 2)
    whole = loop(model, frames, masks)[0]
    for v in range(3):
        torch.testing.assert_close(loop(model, frames[v:v + 1], masks[v:v + 1])[0], whole[v:v + 1])


# ---- padding objects -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("policy", [*RULES])
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(policy, training):
    for seed in range(3):
        model = network(seed, bank={"policy": policy}).train(training)
        frames, masks = clip(1, 10, 2, seed=seed)
        junk = torch.cat([masks, torch.rand(1, 2, 12, 16, dtype=masks.dtype)], 1)
        valid = torch.tensor([[True, True, False, False]])
        a, past = loop(model, frames, masks, generator=make_generator(seed))
        b, padded = loop(model, frames, junk, valid, make_generator(seed))
        torch.testing.assert_close(a.softmax(2), b.softmax(2)[:, :, :3], atol=1e-5, rtol=0)
        assert torch.equal(past[-1][0].frames, padded[-1][0].frames[:2])


@pytest.mark.parametrize("valid", [
    [[True, False, False], [True, True, True]], [[False, True, False], [True, False, True]],
    [[False, False, False], [True, True, False]], [[True, True, True], [True, True, True]]])
@pytest.mark.parametrize("per_object", [False, True])
def test_only_real_objects_vote(valid, per_object):
    "Each video decides by the mean score of its real objects, whatever its padding holds; padding follows."
    valid, moved = torch.tensor(valid), 0
    bank = network(bank={"per_object": per_object, "shared_keys": False}).bank
    for seed in range(20):
        maps = torch.randn(5, 6, 6, 3, 3, generator=make_generator(seed), dtype=torch.float64)
        made, group = [bank.template(x) for x in maps], object_rows(2, 3)
        memory = None
        for t in range(4):
            memory = bank.commit(memory, made[t], t, Decision(None, None))
        assert choose_without_padding(bank, None, made[0], 0, group, valid) == Decision(None, None)
        got = choose_without_padding(bank, memory, made[4], 4, group, valid)
        everybody = bank.choose(memory, made[4], 4, group)
        moved += not torch.equal(got.a, everybody.a)
        for v in range(2):
            real = [o for o in range(3) if valid[v, o]] or [0, 1, 2]
            rows = [3 * v + o for o in real]
            small, new = Memory(*(x[rows] for x in memory[:4]), memory.seen), Template(*(x[rows] for x in made[4][:3]))
            only = bank.choose(small, new, 4, torch.zeros(len(rows)).long())
            assert torch.equal(got.a[rows], only.a)
            torch.testing.assert_close(got.scores[rows], only.scores)
            for o in range(3):
                if not valid[v, o] and valid[v].any():
                    assert torch.equal(got.a[3 * v + o], got.a[rows[0]])
    everybody_votes = bool((valid | ~valid.any(1, keepdim=True)).all())
    assert per_object or bool(moved) != everybody_votes # otherwise the test could not fail


# ---- late objects --------------------------------------------------------------------------------------------------

def test_late_objects_open_memories_of_their_own():
    model = network()
    frames, masks = clip(2, 10, 3)
    memories, seen = (), []
    with torch.no_grad():
        for t in range(10):
            count = 1 + (t >= 3) + (t >= 6)
            logits, view = model.segment(memories, frames[:, t])
            known = masks[:, :1] if logits is None else logits.softmax(1)[:, 1:]
            before = memories
            known = torch.cat([known, masks[:, known.shape[1]:count]], 1)
            memories, decisions = model.memorize(memories, view, known, t)
            assert [len(m.frames) for m in memories] == [2] * count == [2] * len(decisions)
            seen.append([m.frames[0].min().item() for m in memories])
            if 0 < t < 4:
                assert torch.equal(memories[0].values[:, :t], before[0].values)
            assert logits is None or logits.shape[1] == len(before) + 1
    assert seen[-1] == [0, 3, 6] and [m.slots for m in memories] == [4, 4, 4]


def test_valid_may_name_objects_that_enter_now():
    model = network()
    frames, masks = clip(1, 3, 3)
    valid = torch.tensor([[True, False, True]])
    with torch.no_grad():
        _, memories = model.step((), frames[:, 0], 0, masks[:, :2], valid[:, :2])
        logits, memories = model.step(memories, frames[:, 1], 1, masks, valid)
        assert logits.shape[1] == 3 and len(memories) == 2
        assert model.step(memories, frames[:, 2], 2, None, valid)[0].shape[1] == 4


# ---- gradients, noise, precision, size -----------------------------------------------------------------------------

def test_every_weight_learns_once_the_memory_is_full():
    model = network(bank={"shared_keys": False, "learn_beta": True}).train()
    frames, masks = clip(2, 8, 2)
    labels = (masks * torch.tensor([1, 2])[:, None, None]).sum(1).long()
    out = model(frames, labels, torch.ones(2, 2, dtype=torch.bool), make_generator(0))
    out.softmax(2)[:, :, 1].pow(2).sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still


@pytest.mark.parametrize("T, heard", [(4, False), (5, False), (6, True)])
def test_the_update_head_hears_of_an_eviction_that_is_read(T, heard):
    model = network().train()
    frames, masks = clip(1, T, 1)
    out = model(frames, masks[:, 0].long(), torch.ones(1, 1, dtype=torch.bool), make_generator(0))
    out.softmax(2)[:, :, 1].sum().backward()
    grad = model.bank.update_key.weight.grad
    assert (grad is not None and bool(grad.any())) == heard


def test_a_generator_decides_in_training_and_nothing_in_evaluation():
    frames, masks = clip(1, 14, 1)
    for training in (True, False):
        model = network().train(training)
        held = [loop(model, frames, masks, generator=make_generator(s))[1][-1][0].frames.tolist()
                for s in (0, 0, 1, 2, 3)]
        assert held[0] == held[1] and (len({str(h) for h in held}) > 1) == training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("auto", [False, True])
def test_half_precision_is_finite_and_near(dtype, auto):
    model = network(double=False)
    frames, masks = clip(1, 8, 2, dtype=torch.float32)
    want = loop(model, frames, masks)[0].softmax(2)
    if not auto:
        model, frames = model.to(dtype), frames.to(dtype)
    with torch.autocast("cpu", dtype, enabled=auto):
        got = loop(model, frames, masks)[0]
    assert got.dtype == torch.float32 and got.isfinite().all()
    assert (got.softmax(2) - want).abs().max() < .05


@pytest.mark.parametrize("slots", [1, 3, None])
def test_memory_grows_to_its_slots_and_no_further(slots):
    model = network(double=False, bank={"slots": slots})
    frames, masks = clip(1, 12, 2, dtype=torch.float32)
    numbers = [sum(x.numel() for x in memories[0][:3]) for memories in loop(model, frames, masks)[1]]
    one = 2 * 3 * 4 * (4 + 5 + 3)
    assert numbers == [min(t, slots or t) * one for t in range(1, 13)]


def test_nothing_given_is_changed():
    model = network()
    frames, masks = clip(1, 8, 2)
    history = loop(model, frames, masks)[1]
    copies = [[x.clone() for x in memories[0][:4]] for memories in history]
    given = masks.clone()
    with torch.no_grad():
        model.step(history[-1], frames[:, 0], 99, masks)
    assert torch.equal(given, masks)
    assert all(torch.equal(a, b) for memories, copy in zip(history, copies) for a, b in zip(memories[0][:4], copy))


# ---- errors --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, says", [
    (lambda m, f, k, s: m.step((), f, 0), "the first frame needs masks"),
    (lambda m, f, k, s: m.step((), f[0], 0, k), "frame: expected \\(V,3,H,W\\)"),
    (lambda m, f, k, s: m.step((), f[:, :2], 0, k), "frame: expected \\(V,3,H,W\\)"),
    (lambda m, f, k, s: m.step((), (f * 255).byte(), 0, k), "torch.uint8"),
    (lambda m, f, k, s: m.step((), f, 0, k[..., 1:]), "masks: expected"),
    (lambda m, f, k, s: m.step((), f, 0, k[0]), "masks: expected"),
    (lambda m, f, k, s: m.step((), f, 0, k[:, :0]), "at least 1 objects, found 0"),
    (lambda m, f, k, s: m.step((), f, 0, k.repeat(2, 1, 1, 1)), "masks: expected 1 videos"),
    (lambda m, f, k, s: m.step(s, f, 1, k[:, :1]), "at least 2 objects, found 1"),
    (lambda m, f, k, s: m.step(s, f.repeat(3, 1, 1, 1), 1), "rows for 3 videos, found \\[2\\]"),
    (lambda m, f, k, s: m(f[:, None], k[:, 0].long(), torch.ones(1, 2).bool()), "at least 2, found 1"),
    (lambda m, f, k, s: VOSConfig(widths=()), "at least one stage"),
    (lambda m, f, k, s: replace(SMALL, widths=(5, 7)), "bank.memory_channels: expected 7"),
    (lambda m, f, k, s: replace(SMALL, bank=replace(SMALL.bank, query_channels=9)), "bank.query_channels: expected 6")])
def test_users_errors_are_answered_in_one_line(call, says):
    model = network()
    frames, masks = clip(1, 1, 2)
    start = model.step((), frames[:, 0], 0, masks)[1]
    with pytest.raises(StremnError, match=says) as e:
        call(model, frames[:, 0], masks, start)
    assert "\n" not in str(e.value)
