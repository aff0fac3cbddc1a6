"Training of update keys: stored clips, targets, losses and the task."
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stremn.core import StremnError, make_generator
from stremn.data.chameleon import ChameleonConfig, chameleon_batch
from stremn.experiments.measure import belady
from stremn.memory.coverage import coverage, weighted_pixels, all_matches, apply_gate
from stremn.memory.rules import Comparison, Matching, Request
from stremn.memory.update import append
from stremn.models.hub import load
from stremn.models.vos import VOSModel
from stremn.train.loop import FitConfig, fit
from stremn.vos import forgetting
from stremn.vos.forgetting import (
    METHODS, SCALES, ForgettingPhase, ForgettingTask, ForgettingTraining, good_choices, store_clips, whiten,
)

SHORT = ChameleonConfig(frames=14, stay=(1, 2), vanish=.6)
SMALL = dict(stages=(ForgettingPhase(steps=4, batch=3),), pool=5, clip=SHORT, looks=3, later=2)


@pytest.fixture(scope="module")
def stored():
    return store_clips(load("vos-tiny"), chameleon_batch([[65, i, 0] for i in range(5)], SHORT))


def small(rule="coverage_gated", method="counterfactual", **changes):
    return ForgettingTask(ForgettingTraining(rule, method, **(SMALL | changes)), "vos-tiny")


def lesson(task, noise=0.):
    network = task.build().eval()
    draw = task.batch(0, 0, 0)
    policy = network.bank.policy.but(task.config.rule, draw.slots)
    return forgetting.Lesson(network, task.pool(), draw, policy, noise, make_generator(0))


def test_stored_templates_are_what_the_network_stores(stored):
    model = load("vos-tiny")
    clips = chameleon_batch([[65, i, 0] for i in range(5)], SHORT)
    policy = model.bank.policy.but("coverage_object", slots=float("inf"))
    for n in (0, 3):
        memories = ()
        for t in range(4):
            masks = (clips[n].masks[t] == 1).float()[None, None]
            with torch.no_grad():
                _, encoded = model.segment(memories, clips[n].frames[t][None])
                memories, _ = model.memorize(memories, encoded, masks, t, policy=policy)
        m = memories[0]
        for found, kept in ((stored.keys, m.keys), (stored.values, m.values), (stored.masks, m.masks)):
            torch.testing.assert_close(found[n, :4], kept[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.bank.update_key(stored.features[n, :4]), m.updates[0], rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing(stored):
    again = store_clips(load("vos-tiny"), chameleon_batch([[65, 1, 0]], SHORT), chunk=3)
    torch.testing.assert_close(again.features[0], stored.features[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_good_choices_hold_what_belady_picks_and_are_all_equally_good(seed):
    "What Bélády's rule picks is good; by loops, so is everything that is as good."
    g = make_generator(seed)
    T, n, t = 30, 4, int(torch.randint(6, 25, (), generator=g))
    modes = torch.randint(-1, 4, (T,), generator=g)
    frames = torch.randperm(t, generator=g)[:n].sort().values
    free = torch.tensor([False, True, True, True])
    good = good_choices(modes[None], frames[None], t, free[None])[0]
    clip = chameleon_batch([[1, 0, 0]], replace(SHORT, frames=T))[0]._replace(modes=modes[:, None])
    none = lambda: torch.zeros(1, n)
    pick = belady([clip])(Request(frames[None], free[None], t, t, none, none))[0]
    assert good[pick.argmax()]
    harm = []
    for i in range(n):
        m = int(modes[frames[i]])
        others = [int(modes[f]) for j, f in enumerate(frames.tolist()) if j != i] + [int(modes[t])]
        if m < 0 or m in others: harm.append(0)
        else: harm.append(1 / next((s - t for s in range(t + 1, T) if int(modes[s]) == m), T))
    least = min(h for h, f in zip(harm, free.tolist()) if f)
    assert good.tolist() == [f and h == least for h, f in zip(harm, free.tolist())]


def test_losses_after_equal_a_memory_made_by_hand():
    x = lesson(small())
    c = next(c for c in forgetting.choices_made(x))
    found = forgetting.losses_after(x, c)
    assert found[:, 0].isinf().all()                       # the first frame is pinned
    for v in range(len(found)):
        clip = int(x.draw.clip[v])
        for i in range(1, found.shape[1]):
            held = c.memory.frames[v].tolist()
            held[i] = c.t
            memory = None
            for s in held: memory = append(memory, x.template(s, x.update_keys().detach()).rows([v]), s)
            wrong = 0.
            for s in c.later.tolist():
                with torch.no_grad():
                    logits = x.network.segment((memory,), x.stored.frames[clip, s][None])[0]
                wrong += float(F.cross_entropy(logits, x.stored.labels[clip, s][None])) / len(c.later)
            assert float(found[v, i]) == pytest.approx(wrong, abs=1e-5)


@pytest.mark.parametrize("rule", SCALES)
def test_scores_of_a_decision_are_those_the_bank_would_ask_for(rule):
    "The scores with a gradient are the same as those that the roll-out chose by."
    x = lesson(small(rule, slots=(3,)))
    for c in forgetting.choices_made(x):
        policy = x.policy
        chosen = x.network.bank.choose(c.memory, c.template, c.t, policy=policy).a
        assert torch.equal(chosen.argmax(1), c.scores.argmax(1))
        assert c.scores.requires_grad


def test_only_writes_before_a_frame_that_looks_have_a_gradient():
    task = small("learned", "straight", slots=(3,))
    x = lesson(task)
    features = x.stored.features.clone().requires_grad_()
    x = x._replace(stored=x.stored._replace(features=features), draw=x.draw._replace(looks=torch.tensor([7])))
    forgetting.straight_loss(x).backward()
    moved = features.grad[x.draw.clip].flatten(2).any(2).any(0)
    assert moved[:7].any() and not moved[7:].any()


def test_noise_is_measured_in_the_spread_of_the_scores():
    "The same scores, a thousand times larger, are explored equally."
    def picks(scale):
        scores = scale * torch.tensor([[9., .1, .2, .4]]).expand(500, -1)
        free = torch.tensor([[False, True, True, True]]).expand(500, -1)
        r = Request(torch.zeros(500, 4).long(), free, 9, 9, lambda: scores, lambda: scores, generator=make_generator(0))
        return forgetting.exploring_rule("learned", 1.).select(r).argmax(1).bincount(minlength=4)
    few, many = picks(1e-3), picks(1.)
    assert torch.equal(few, many) and few[0] == 0 and few[3] > few[2] > few[1] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_update_keys_alone_and_goes_on_bit_equal(tmp_path, method):
    config = FitConfig(lr=1e-2, warmup=1, save_every=2)
    whole = fit(small(method=method), config, tmp_path / "whole", "cpu", progress=False)
    assert fit(small(method=method), config, tmp_path / "parts", "cpu", stop_at=2, progress=False) is None
    parts = fit(small(method=method), config, tmp_path / "parts", "cpu", progress=False)
    first, last, other = load("vos-tiny"), load(whole), load(parts)
    start = small(method=method).build().state_dict()
    for name, value in last.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
        own = name.startswith(("bank.update_key", "bank.beta"))
        if not own: assert torch.equal(value, first.state_dict()[name])
        elif "weight" in name: assert not torch.equal(value, start[name])
    assert last.bank.policy.rule == "coverage_gated" and last.config.bank.update_channels == 33


def test_whitening_needs_targets(stored):
    hidden = stored._replace(masks=torch.zeros_like(stored.masks))
    with pytest.raises(StremnError, match="target pixels: expected over 64, found 0"):
        whiten(nn.Conv2d(64, 33, 3, padding=1), hidden, 32)


@pytest.mark.parametrize("change, message", [
    (dict(rule="oldest"), "rule: expected learned, coverage_gated, found 'oldest'"),
    (dict(method="guess"), "method: expected straight, counterfactual, imitation, found 'guess'"),
    (dict(begin="zero"), "begin: expected whitened, random, found 'zero'")])
def test_unknown_words_are_refused(change, message):
    with pytest.raises(StremnError, match=message): ForgettingTraining(**change)


def test_a_run_needs_a_tiny_network_to_go_on_from():
    with pytest.raises(StremnError, match="start: expected weights to go on from, found None"): ForgettingTask()
    with pytest.raises(Exception, match="start|size mismatch"):
        ForgettingTask(ForgettingTraining(), "vos-small").build()


def test_a_gate_multiplies_the_weights_of_both_sides():
    "Coverage with a gate, by loops in float64."
    g = make_generator(3)
    maps, masks = torch.randn(1, 4, 6, 3, 3, generator=g).double(), torch.rand(1, 4, 3, 3, generator=g).double()
    inside, weights = apply_gate(maps, masks)
    pixels = weighted_pixels(inside, weights)
    c = Comparison(all_matches(pixels), None, True, weights.flatten(2))
    found = coverage(c, on_object=True, normalise=False)[0]
    unit = F.normalize(maps[0, :, :-1].flatten(2), dim=1)
    w = (masks[0] * maps[0, :, -1].sigmoid()).flatten(1)
    for i in range(4):
        lost = 0.
        for p in range(9):
            pairs = [(j, q) for j in range(4) if j != i for q in range(9)]
            best = max(float(unit[i, :, p] @ unit[j, :, q] * w[i, p] * w[j, q]) for j, q in pairs)
            lost += float(w[i, p]) - best
        assert float(found[i]) == pytest.approx(-lost / 9, abs=1e-6)


def test_a_gate_needs_weights():
    with pytest.raises(StremnError, match="gated: expected weighted=True with it, found weighted=False"):
        Matching("update", gated=True)


def test_a_network_with_a_gate_is_replayed_as_the_network_decides():
    from stremn.experiments.diagnose import cached_templates, simulate
    network = VOSModel(ForgettingTraining("coverage_gated").model).eval()
    clips = chameleon_batch([[65, i, 0] for i in range(2)], SHORT)
    held = simulate(cached_templates(network, clips), "coverage_gated", 4)
    for n, clip in enumerate(clips):
        memories = ()
        for t in range(len(clip.frames)):
            masks = (clip.masks[t] == 1).float()[None, None]
            with torch.no_grad():
                _, encoded = network.segment(memories, clip.frames[t][None])
                policy = network.bank.policy.but("coverage_gated", slots=4)
                memories, _ = network.memorize(memories, encoded, masks, t, policy=policy)
        assert memories[0].frames[0].tolist() == held[n, -1].tolist()
