"""Contracts of the baseline memories: what STM keeps, STCN's best few, GC's matrix against loops; streams, training."""
import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import TINY_VOS
from stremn.core import StremnError, make_generator
from stremn.data.chameleon import ChameleonConfig
from stremn.data.clips import Clip
from stremn.experiments.measure import ChameleonEval, frame_scores, held_out_clips
from stremn.memory.bank import BankConfig, MemoryBank, UpdatePolicy
from stremn.memory.read import read
from stremn.memory.update import Memory
from stremn.models.hub import load
from stremn.models.vos import VOSConfig, VOSModel
from stremn.models.vos_baselines import (
    BASELINE_MEMORIES, GlobalContextBank, KeepAllBank, STMBank, baseline_config, context, distribute, held_frames,
    stays, with_bank, with_baseline_memory,
)
from stremn.train.loop import FitConfig, fit
from stremn.vos.stream import VideoSegmenter
from stremn.vos.train import ChameleonPhase, ChameleonTask, ChameleonTraining

TOY = BankConfig(memory_channels=6, query_channels=5, key_channels=4, value_channels=3, update_channels=2, slots=3)
TINY = replace(TINY_VOS, test_side=None)
GAMMAS = (None, 1, 2, 5, 7)


def randn(*shape, seed=0):
    "Normal numbers in double precision."
    return torch.randn(*shape, generator=make_generator(seed), dtype=torch.double)


def network(config=TINY, seed=0):
    "A network in double precision with random weights."
    torch.manual_seed(seed)
    return VOSModel(config).double().eval()


def video(T=8, O=1, seed=0):
    "Frames, labels of the first with all objects there, and nobody padded."
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    for i in range(O): labels[0, 2:9, 1 + 5 * i:5 + 5 * i] = i + 1
    frames = torch.rand(1, T, 3, 16, 16, generator=make_generator(seed)).double()
    return frames, labels, torch.ones(1, O, dtype=torch.bool)


# ---- what stays ----------------------------------------------------------------------------------------------------

def schedule(T, gamma, previous, first):
    "Walk through the video as STM's own program does: a list that stays, and one that is there for a frame."
    kept, guest = [first], []
    for t in range(first + 1, T):
        if gamma is not None and t % gamma == 0: kept, guest = [*kept, t], []
        else: guest = [t] if previous else []
    return kept + guest


@pytest.mark.parametrize("gamma, previous, first", [*itertools.product(GAMMAS, (True, False), (0, 3, 5))])
def test_memory_holds_what_the_walk_says(gamma, previous, first):
    for T in range(first + 1, 30): assert held_frames(T, gamma, previous, first) == schedule(T, gamma, previous, first)
    bank, memory = STMBank(TOY, gamma, previous).double(), None
    x, q = randn(29, 2, 6, 2, 2), randn(29, 2, 5, 2, 2, seed=1)
    with torch.no_grad():
        for t in range(first, 29):
            memory = bank.write(memory, bank.template(x[t], q[t]), t)
            want = schedule(t + 1, gamma, previous, first)
            assert memory.frames.tolist() == [want] * 2 and memory.seen == t - first + 1
            assert memory.updates.shape[2] == 0
            torch.testing.assert_close(memory.values, torch.stack([bank.memory_value(x[i]) for i in want], 1))
            torch.testing.assert_close(memory.keys, torch.stack([bank.memory_key(x[i]) for i in want], 1))


def test_lists_by_hand():
    assert [held_frames(T) for T in (1, 2, 5, 6, 7, 11, 12)] == [
        [0], [0, 1], [0, 4], [0, 5], [0, 5, 6], [0, 5, 10], [0, 5, 10, 11]]
    assert held_frames(23, None) == [0, 22] and held_frames(23, None, False) == [0]
    assert held_frames(23, 5, False) == [0, 5, 10, 15, 20] and held_frames(23, 5, first=7) == [7, 10, 15, 20, 22]
    assert stays(0, 5) and stays(10, 5) and not stays(9, 5) and not stays(0, None)


# ---- equal to ours where they coincide -----------------------------------------------------------------------------

def streamed(network, clip):
    "What a network says without gradients."
    with torch.no_grad():
        return network(*clip)


@pytest.mark.parametrize("latest, shared, O", [*itertools.product(("competes", "held"), (True, False), (1, 2))])
def test_first_and_previous_is_rule_first_last(latest, shared, O):
    model, clip = network(replace(TINY, bank=replace(TINY.bank, shared_keys=shared))), video(9, O)
    with torch.no_grad(): ours = model(*clip, policy=UpdatePolicy("first_last", 5, latest=latest))
    assert torch.equal(ours, streamed(with_baseline_memory(model, "stm_first_last"), clip))


def test_every_frame_is_a_memory_without_bound():
    model, clip = network(), video(9, 2)
    with torch.no_grad(): ours = model(*clip, policy=UpdatePolicy("oldest", torch.inf))
    for previous in (True, False):
        assert torch.equal(ours, streamed(with_baseline_memory(model, "stm", gamma=1, previous=previous), clip))
    assert not torch.allclose(ours, streamed(with_baseline_memory(model, "stm"), clip), atol=1e-4)
    short = [x[:, :3] if i == 0 else x for i, x in enumerate(clip)]             # frames 1 and 2 have seen all there is
    assert torch.equal(ours[:, :2], streamed(with_baseline_memory(model, "stm"), short))


def test_stcn_with_all_places_and_previous_is_stm():
    model, clip = network(), video(9)
    with torch.no_grad():
        stm = with_baseline_memory(model, "stm")(*clip)
        assert torch.equal(stm, with_baseline_memory(model, "stcn", top_k=None, previous=True)(*clip))
        torch.testing.assert_close(stm, with_baseline_memory(model, "stcn", top_k=10**6, previous=True)(*clip))
        assert not torch.equal(stm, with_baseline_memory(model, "stcn", top_k=2, previous=True)(*clip))


@pytest.mark.parametrize("k", [1, 4, 20])
def test_best_few_equal_loops(k):
    keys, values, query = randn(2, 3, 4, 2, 4), randn(2, 3, 5, 2, 4, seed=1), randn(2, 4, 3, 2, seed=2)
    got = read(query, Memory(keys, values, keys[:, :, :0], torch.arange(3).expand(2, -1), 3), "l2", k)
    for b, r, c in itertools.product(range(2), range(3), range(2)):
        stored = [(keys[b, n, :, y, x], values[b, n, :, y, x]) for n in range(3) for y in range(2) for x in range(4)]
        near = sorted(stored, key=lambda kv: float((kv[0] - query[b, :, r, c]).pow(2).sum()))[:k]
        weight = torch.stack([torch.exp(-(key - query[b, :, r, c]).pow(2).sum() / 2) for key, _ in near])
        want = sum(w * v for w, (_, v) in zip(weight, near)) / weight.sum()
        torch.testing.assert_close(got[b, :, r, c], want, atol=1e-12, rtol=1e-12)


# ---- global context ------------------------------------------------------------------------------------------------

def gc_loops(query, keys, values, softmax):
    "(B,Dk,h,w), (B,n,Dk,H,W), (B,n,Dv,H,W): outer products of softmaxed keys and values, their mean, the product."
    B, n, Dk, H, W = keys.shape
    out = torch.zeros(B, values.shape[2], *query.shape[2:], dtype=torch.double)
    for b in range(B):
        G = torch.zeros(Dk, values.shape[2], dtype=torch.double)
        for t, k in itertools.product(range(n), range(Dk)):
            weight = {(r, c): torch.exp(keys[b, t, k, r, c]) for r in range(H) for c in range(W)}
            for (r, c), w in weight.items(): G[k] += w / sum(weight.values()) * values[b, t, :, r, c] / n
        for r, c in itertools.product(range(query.shape[2]), range(query.shape[3])):
            q = query[b, :, r, c]
            if softmax: q = q.exp() / q.exp().sum()
            out[b, :, r, c] = sum(q[k] * G[k] for k in range(Dk))
    return out


@pytest.mark.parametrize("shared, softmax", [*itertools.product((True, False), (True, False))])
def test_gc_equals_loops(shared, softmax):
    torch.manual_seed(0)
    bank, group = GlobalContextBank(TOY, softmax, shared_keys=shared).double(), torch.tensor([0, 0, 1])
    x, q, asks, memory = randn(4, 3, 6, 2, 3), randn(4, 2, 5, 2, 3, seed=1), randn(2, 5, 3, 2, seed=2), None
    with torch.no_grad():
        for t in range(4): memory = bank.write(memory, bank.template(x[t], q[t], group), t, group)
        keys = [bank.query_key(q[t])[group] if shared else bank.memory_key(x[t]) for t in range(4)]
        values, query = torch.stack([bank.memory_value(x[t]) for t in range(4)], 1), bank.query_key(asks)[group]
        got = bank.read(memory, asks, group)
        torch.testing.assert_close(got[:, :3], gc_loops(query, torch.stack(keys, 1), values, softmax))
        torch.testing.assert_close(got[:, 3:], bank.query_value(asks)[group])
    assert memory.seen == 4 and memory.frames.tolist() == [[3]] * 3 and memory.values.shape == (3, 1, 3, 4, 1)


def test_gc_has_constant_size_no_order_and_low_rank():
    torch.manual_seed(0)
    bank, x = GlobalContextBank(TOY).double(), randn(7, 2, 6, 3, 3)
    def after(order):
        memory = None
        for t, i in enumerate(order): memory = bank.write(memory, bank.template(x[i]), t)
        return memory
    with torch.no_grad(): one, all7, back = after([0]), after(range(7)), after(reversed(range(7)))
    assert one.values.shape == all7.values.shape
    torch.testing.assert_close(all7.values, back.values)
    keys, values = randn(1, 4, 5, 5), torch.eye(25, dtype=torch.double).reshape(1, 25, 5, 5)
    table = distribute(randn(1, 4, 5, 5, seed=2), context(keys, values))[0].flatten(1)     # values name places
    assert torch.linalg.matrix_rank(table) == 4
    torch.testing.assert_close(context(keys, values).sum(1), torch.ones(1, 4, dtype=torch.double))   # shares sum to one


def test_gc_with_a_channel_for_each_place_is_a_copy():
    eye = 50 * torch.eye(6, dtype=torch.double).reshape(1, 6, 2, 3)              # softmax of each channel: one place
    values = randn(1, 5, 2, 3)
    torch.testing.assert_close(context(eye, values), values.flatten(2))
    torch.testing.assert_close(distribute(eye / 50, context(eye, values)), values)
    torch.testing.assert_close(distribute(eye, context(eye, values), softmax=True), values)


def test_gc_gradients():
    key, value, query = randn(1, 2, 2, 2), randn(1, 3, 2, 2, seed=1), randn(1, 2, 1, 2, seed=2)
    for softmax in (True, False):
        assert torch.autograd.gradcheck(lambda k, v, q, s=softmax: distribute(q, context(k, v), s),
                                        [x.clone().requires_grad_() for x in (key, value, query)])


def flops(f):
    "Operations that PyTorch counts."
    with FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()


def test_operations_of_a_read():
    N, Dk, Dv, n = 25, 4, 6, 3
    keys, values, query = randn(1, n, Dk, 5, 5), randn(1, n, Dv, 5, 5, seed=1), randn(1, Dk, 5, 5, seed=2)
    memory = Memory(keys, values, keys[:, :, :0], torch.arange(n)[None], n)
    assert flops(lambda: read(query, memory)) == 2 * n * N**2 * (Dk + Dv)       # attention on n frames
    assert flops(lambda: distribute(query, context(keys[:, 0], values[:, 0]))) == 2 * 2 * N * Dk * Dv


# ---- views ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BASELINE_MEMORIES)
def test_a_baseline_memory_shares_all_weights_and_changes_nothing(name):
    model = network()
    before, state = dict(vars(model.bank)), copy.deepcopy(model.state_dict())
    other = with_baseline_memory(model, name)
    assert type(other.bank) is BASELINE_MEMORIES[name].bank and isinstance(other.bank, KeepAllBank)
    assert type(model.bank) is MemoryBank
    assert vars(model.bank) == before and model.bank.config == TINY.bank
    assert [*other.state_dict()] == [*state] and all(a is b for a, b in zip(other.parameters(), model.parameters()))
    with torch.no_grad():
        other(*video(7, 2))
        other.bank.beta.add_(1)
    assert torch.equal(model.bank.beta, state["bank.beta"] + 1)                # train one, and the other has learned it
    clone = copy.deepcopy(other)                                                # and one that stands alone
    assert type(clone.bank) is BASELINE_MEMORIES[name].bank and next(clone.parameters()) is not next(model.parameters())


def test_one_baseline_memory_after_another_and_presets():
    model = network()
    again = with_baseline_memory(with_baseline_memory(model, "stcn"), "stm")
    assert again.bank.config.top_k is None                                     # a preset leaves nothing behind
    stcn = with_baseline_memory(model, "stcn").bank
    assert (stcn.config.top_k, stcn.gamma, stcn.previous) == (20, 5, False)
    dot = with_baseline_memory(model, "stm", similarity="dot", gamma=3).bank
    assert dot.config == replace(TINY.bank, similarity="dot")
    assert with_baseline_memory(model, "gc", softmax=True).bank.softmax
    assert not with_baseline_memory(model, "gc").bank.softmax
    assert baseline_config("stcn", VOSConfig()).bank.shared_keys and baseline_config("gc") == VOSConfig()
    bank = MemoryBank(TOY)
    assert STMBank.from_bank(bank, gamma=3).gamma == 3
    assert GlobalContextBank.from_bank(bank, softmax=False).memory_key is bank.memory_key
    assert with_bank(model, STMBank.from_bank(model.bank)).bank.previous and bank.apply(lambda m: m) is bank
    for name in BASELINE_MEMORIES: assert with_baseline_memory(model, name).bank.apply(lambda m: None) is not None


# ---- what runs a network runs these --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BASELINE_MEMORIES)
def test_streams_with_objects_that_come_and_go(name):
    model, (frames, labels, _) = network().float(), video(9, 2)
    late = torch.where(labels == 2, 2, 0)[0]
    segmenter = VideoSegmenter(with_baseline_memory(model, name))
    for t, x in enumerate(frames[0].float()):
        given = {0: torch.where(labels == 1, 1, 0)[0], 3: late}.get(t)
        out = segmenter.step(x, given)
        if t == 6: segmenter.remove(1)
    assert out.shape == (16, 16) and set(out.unique().tolist()) <= {0, 2}
    held = segmenter.memory[0]
    p = BASELINE_MEMORIES[name]
    if p.bank is STMBank:
        assert list(held.frames) == held_frames(9, **p.options, first=3) and held.last == 8
    else:
        assert held.frames == (8,)
    assert ("discarded" in held.why) == (name == "stcn")


@pytest.mark.parametrize("name", BASELINE_MEMORIES)
def test_scores_and_padding(name):
    model, (frames, labels, _) = network().float(), video(5)
    clip = Clip(frames[0].float(), labels.expand(5, -1, -1), "synthetic")
    scores = frame_scores(with_baseline_memory(model, name), [clip, clip], "oldest", None)
    assert scores.shape == (2, 3) and torch.equal(scores[0], scores[1])
    alone, padded = with_baseline_memory(network(), name), torch.tensor([[True, False]])
    with torch.no_grad():
        one, two = alone(*video(6)), alone(*video(6)[:2], padded)
    torch.testing.assert_close(two.softmax(2)[:, :, 1], one.softmax(2)[:, :, 1], atol=1e-6, rtol=1e-6)


class BaselineTask(ChameleonTask):
    "Train with a baseline memory as any other network."
    memory = "gc"
    def build(self): return with_baseline_memory(super().build(), self.memory)


@pytest.mark.parametrize("name", ["gc", "stm"])
def test_fit_trains_with_a_baseline_memory_and_the_weights_load(name, tmp_path):
    clip = ChameleonConfig(size=32, frames=3)
    stages = (ChameleonPhase(1, 1, clip), ChameleonPhase(2, 1, replace(clip, frames=4)))
    task = BaselineTask(ChameleonTraining(model=TINY, stages=stages))
    task.memory = name
    path = fit(task, FitConfig(warmup=1, save_every=10), tmp_path, device="cpu", progress=False)
    torch.manual_seed(0)
    trained, fresh = load(path), task.build()
    assert type(trained.bank) is MemoryBank
    assert type(with_baseline_memory(trained, name).bank) is BASELINE_MEMORIES[name].bank
    moved = {k for k, v in trained.state_dict().items() if not torch.equal(v, fresh.state_dict()[k])}
    assert {"bank.query_key.weight", "bank.memory_value.weight", "bank.query_value.weight"} <= moved
    assert not any(k.startswith("bank.update_key") for k in moved)              # it is not used


def test_gc_learns_one_clip():
    model, (frames, labels, valid) = with_baseline_memory(VOSModel(TINY), "gc"), video(3)
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1: torch.nn.init.orthogonal_(p)
    frames = torch.where(labels[:, None, None] > 0, .9, .3) * torch.ones_like(frames)
    optimiser, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 5e-3), []
    for _ in range(30):
        logits = model(frames.float(), labels, valid).flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, labels.expand(2, -1, -1)))
        optimiser.zero_grad()
        losses[-1].backward()
        assert torch.isfinite(model.bank.query_key.weight.grad).all() and model.bank.update_key.weight.grad is None
        optimiser.step()
    assert losses[-1] < .5 * losses[0]


def test_trained_weights_need_the_previous_frame_and_gc_its_own_training():
    tiny, clips = load("vos-tiny"), held_out_clips(ChameleonEval(clips=2, upto=24))
    models = {name: with_baseline_memory(tiny, name) for name in BASELINE_MEMORIES}
    models["stcn, previous kept"] = with_baseline_memory(tiny, "stcn", previous=True)
    scores = {name: float(frame_scores(model, clips, "oldest", None).mean()) for name, model in models.items()}
    assert min(scores, key=scores.get) == "gc"
    assert scores["stcn, previous kept"] > scores["stcn"] + .2


# ---- errors --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, message", [
    (lambda m: with_baseline_memory(m, "xmem"),
     "memory: expected one of stm, stm_first_last, stcn, gc, found 'xmem'"),
    (lambda m: baseline_config("xmem"), "memory: expected one of stm, stm_first_last, stcn, gc"),
    (lambda m: with_baseline_memory(m, "gc", gamma=3), "gc: expected changes of softmax, found gamma"),
    (lambda m: with_baseline_memory(m, "stm", slots=3),
     "stm: expected changes of gamma, previous, top_k, similarity, found slots"),
    (lambda m: with_baseline_memory(m, "gc", top_k=20), "gc: expected changes of softmax, found top_k"),
    (lambda m: with_baseline_memory(m, "stm", gamma=0), "gamma: expected 1 or more, or None, found 0"),
    (lambda m: with_baseline_memory(m, "stm", similarity="cosine"),
     "similarity: expected one of dot, l2, found 'cosine'"),
    (lambda m: with_baseline_memory(network(replace(TINY, bank=replace(TINY.bank, shared_keys=False))), "stcn"),
     "stcn: expected weights trained with shared_keys=True, found False; see baseline_config"),
    (lambda m: STMBank.from_bank(m.bank, gamma=-1), "gamma: expected 1 or more, or None, found -1"),
    (lambda m: STMBank(TOY, 0), "gamma: expected 1 or more, or None, found 0"),
    (lambda m: GlobalContextBank(TOY, shared_keys=True).template(torch.zeros(1, 6, 2, 2)), "comes from query_features"),
    (lambda m: held_frames(0), "expected 0 <= first < T, found T=0 and first=0"),
    (lambda m: held_frames(3, first=3), "found T=3 and first=3"),
])
def test_errors_say_what_was_expected(wrong, message):
    with pytest.raises(StremnError) as e: wrong(network())
    assert message in str(e.value)
