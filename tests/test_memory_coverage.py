"""Contracts of coverage: equal to loops, in pieces as at once, with a gradient, for several objects."""
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stremn.core import StremnError, make_generator
from stremn.memory.bank import MemoryBank, UpdatePolicy, compare_frames
from stremn.memory.coverage import (
    all_matches, coverage, coverage_rule, match_both_ways, mean_matches, quality, volumes, weighted_pixels)
from stremn.memory.rules import RULES, ZOO, Comparison, Matching, Request, Rule, all_rules, find_rule
from stremn.memory.similarity import best_match_similarity
from stremn.models.vos import VOSModel

SHAPE = dict(memory_channels=6, query_channels=6, key_channels=4, value_channels=5, update_channels=3, slots=4)


def maps(B, n, C=3, H=3, W=4, seed=0, dtype=torch.float32):
    "Frames with a blank pixel each, and masks that are empty in the second frame."
    g = make_generator(seed)
    x = torch.randn(B, n, C, H, W, generator=g).to(dtype)
    x[:, :, :, 0, 0] = 0
    p = torch.rand(B, n, H, W, generator=g).to(dtype)
    if n > 1:
        p[:, 1] = 0
    return x, p


def by_loops(x, p, on_object, weighted, normalise):
    "The formula read aloud, in float64, one pixel after the other."
    x, p = x.double().numpy(), p.double().numpy()
    B, n, C, H, W = x.shape
    x = x.reshape(B, n, C, -1)
    w = p.reshape(B, n, -1) if on_object else np.ones((B, n, H * W))
    out = np.zeros((B, n))

    def cosine(a, b):
        size = np.linalg.norm(a) * np.linalg.norm(b)
        return 0. if size < 1e-12 else float(a @ b) / size
    for b, i in itertools.product(range(B), range(n)):
        gained = 0.
        for r in range(H * W):
            best = max(cosine(x[b, i, :, r], x[b, j, :, q]) * (p.reshape(B, n, -1)[b, j, q] if weighted else 1.)
                       for j in range(n) if j != i for q in range(H * W))
            gained += w[b, i, r] * best
        total = w[b, i].sum()
        out[b, i] = gained / max(total, 1e-6) if normalise else (gained - total) / (H * W)
    return torch.from_numpy(out)


def compared(x, p, weighted=False):
    "A comparison of all frames."
    return Comparison(all_matches(weighted_pixels(x, p if weighted else None)), torch.stack([p, p * p], 2).flatten(3),
                      weighted)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("pixels", ["all", "object", "both"])
@pytest.mark.parametrize("n", [2, 4])
def test_coverage_equals_loops(n, pixels, normalise):
    x, p = maps(2, n, seed=n)
    on_object, weighted = pixels != "all", pixels == "both"
    got = coverage(compared(x, p, weighted), on_object, normalise).double()
    want = by_loops(x, p, on_object, weighted, normalise)
    assert torch.allclose(got, want, atol=1e-5), (got - want).abs().max()
    if on_object:
        assert (got[:, 1] == 0).all()                     # nothing is lost with a frame that shows no object
    if normalise:
        assert got.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("chunk", [1, 5, 12, None])
def test_both_directions_are_equation_1_both_ways_in_pieces_as_at_once(chunk):
    x, _ = maps(2, 4, seed=1)
    pixels = weighted_pixels(x)
    there, back = match_both_ways(pixels[:, 0], pixels[:, 1:], chunk)
    assert torch.allclose(there.mean(2), best_match_similarity(x[:, 0], x[:, 1:]), atol=1e-6)
    for i in range(3):
        assert torch.allclose(back[:, i].mean(1), best_match_similarity(x[:, 1 + i], x[:, :1])[:, 0], atol=1e-6)
    with pytest.raises(StremnError, match="equal B and C"):
        match_both_ways(pixels[:, 0, :2], pixels)


def test_a_newcomer_costs_no_more_products_than_equation_1():
    x, _ = maps(1, 6, C=8, H=5, W=5)
    pixels = weighted_pixels(x)
    known = all_matches(pixels[:, :5])
    with FlopCounterMode(display=False) as ours:
        extended = all_matches(pixels, known)
    with FlopCounterMode(display=False) as paper:
        best_match_similarity(x[:, 5], x[:, :5])
    assert 0 < ours.get_total_flops() <= paper.get_total_flops()
    assert torch.allclose(extended, all_matches(pixels), atol=1e-6) and extended.shape == (1, 6, 6, 25)


def test_the_gradient_is_that_of_finite_differences():
    x, p = maps(1, 3, C=2, H=2, W=2, seed=3, dtype=torch.float64)
    x = (x + .1).requires_grad_()
    p = (p + .2).requires_grad_()
    for normalise in (True, False):
        def score(x, p, normalise=normalise):
            matches = all_matches(weighted_pixels(x, p))
            return coverage(Comparison(matches, torch.stack([p, p * p], 2).flatten(3), True), True, normalise)
        assert torch.autograd.gradcheck(score, (x, p), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_compared_in_single_precision(dtype):
    x, p = maps(1, 4, C=16, seed=4)
    x, p = (300 * x).to(dtype), p.to(dtype)               # squares overflow in half precision
    got = coverage(compared(x, p, True), True)
    want = coverage(compared(x.float(), p.float(), True), True)
    assert got.dtype == torch.float32 and torch.allclose(got, want, atol=2e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = all_matches(weighted_pixels(x.float()))
    assert torch.equal(inside, all_matches(weighted_pixels(x.float())))


def test_twins_go_and_what_is_unlike_stays():
    "Slot 1 doubles slot 0, which Eq. 1 cannot see: the newcomer is like neither."
    x, p = maps(1, 4, C=8, seed=5)
    x[:, 1] = x[:, 0]
    p = torch.ones_like(p)
    score = coverage(compared(x, p))
    assert score[0, 0] > .9 and score[0, 1] > .9 and score[0, 2:].max() < .9
    eq1 = best_match_similarity(x[:, 3], x[:, :3])[0]
    assert eq1.max() < .9
    assert volumes(compared(x, p)).argmax().item() in (0, 1)
    assert torch.allclose(mean_matches(compared(x, p)).diagonal(dim1=1, dim2=2), torch.ones(1, 4))


def test_quality_is_the_mean_of_p_weighed_with_itself():
    sure, unsure, none = torch.zeros(8, 8), torch.zeros(8, 8), torch.full((8, 8), .01)
    sure[:2, :4], unsure[2:6] = 1., .4
    p = torch.stack([sure, unsure, none])[None]
    cells = torch.nn.functional.adaptive_avg_pool2d(torch.stack([p, p * p], 2).flatten(0, 1), (2, 2))
    got = quality(Comparison(None, cells.unflatten(0, (1, 3)).flatten(3)))
    assert torch.allclose(got, torch.tensor([[1., .4, .01]]), atol=1e-5)   # pooling has lost nothing


class Recorder:
    "A rule that keeps what it was shown, and answers as another one does."
    def __init__(self, rule):
        self.rule, self.seen = find_rule(rule), []

    def __call__(self, r):
        r.compare(lambda c: self.seen.append(c) or torch.zeros(len(c.masks if c.matches is None else c.matches), 1))
        return self.rule.select(r)


@pytest.mark.parametrize("latest", ["competes", "held"])
@pytest.mark.parametrize("matching", [Matching(), Matching("update"), Matching(weighted=True)])
def test_what_is_kept_equals_a_fresh_comparison_after_every_write(matching, latest):
    bank = MemoryBank(**SHAPE).eval()
    recorder = Recorder("random")
    rule = Rule(recorder, needs_masks=True, matching=matching)
    policy = UpdatePolicy(rule, 4, latest=latest)
    g, memory = make_generator(0), None
    with torch.no_grad():
        for t in range(12):
            mask = torch.rand(2, 2, 5, 5, generator=g)
            template = bank.template(torch.randn(2, 6, 5, 5, generator=g))._replace(mask=mask)
            if memory is not None:
                fresh = compare_frames(memory._replace(matches=None, matching=None), template, rule)
            memory = bank.write(memory, template, t, generator=g, policy=policy)
            if memory.slots == 4 and t > 4:
                assert torch.allclose(recorder.seen[-1].matches, fresh.matches, atol=1e-6)
                assert torch.equal(recorder.seen[-1].masks, fresh.masks)
    assert memory.matching == matching and memory.matches.shape == (2, 4, 4, 25) and len(recorder.seen) > 5


def test_another_way_of_comparing_starts_afresh():
    bank = MemoryBank(**SHAPE).eval()
    memory = None
    with torch.no_grad():
        for t in range(10):
            template = bank.template(torch.randn(1, 6, 4, 4, generator=make_generator(t)))
            keys = "read" if t % 2 else "update"
            memory = bank.write(memory, template, t, policy=UpdatePolicy(coverage_rule(keys), 4))
            maps = memory.keys if keys == "read" else memory.updates
            if memory.matches is not None:
                assert torch.allclose(memory.matches, all_matches(weighted_pixels(maps)), atol=1e-6)
                assert memory.matching.keys == keys
    plain = bank.write(memory, template, 11, policy=UpdatePolicy("oldest", 4))
    assert plain.matches is None and plain.matching is None


@pytest.mark.parametrize("name", sorted(n for n in all_rules() if find_rule(n).needs_masks or find_rule(n).matching))
@pytest.mark.parametrize("per_object", [True, False])
def test_rules_that_compare_follow_a_network_with_several_objects(name, per_object):
    "Constant shapes, the first frame stays, objects of a video agree unless they decide alone; the same bits again."
    torch.manual_seed(0)
    model = VOSModel().eval()
    policy = model.bank.policy.but(name, 3, per_object=per_object)
    g = make_generator(1)
    frames, masks = torch.rand(2, 9, 3, 32, 32, generator=g), torch.zeros(2, 2, 32, 32)
    masks[:, 0, 4:12, 4:12], masks[:, 1, 16:30, 10:24] = 1, 1
    ends = []
    for _ in range(2):
        memories = ()
        with torch.no_grad():
            for t in range(9):
                known = masks if t == 0 else None
                _, memories = model.step(memories, frames[:, t], t, known, None, make_generator(t), policy)
        ends.append(memories[0])
    memory = ends[0]
    assert memory.slots == 3 and (memory.frames[:, 0] == 0).all() and torch.equal(memory.frames, ends[1].frames)
    if not per_object:
        assert torch.equal(memory.frames[0], memory.frames[1]) and torch.equal(memory.frames[2], memory.frames[3])
    if find_rule(name).needs_masks:
        assert memory.masks.shape[:3] == (4, 3, 2) and torch.equal(memory.masks, ends[1].masks)
        assert torch.allclose(memory.masks[0, 0, 0].mean(), masks[0, 0].mean())


def test_the_learned_form_sends_a_gradient_to_the_update_keys():
    torch.manual_seed(0)
    model = VOSModel().train()
    policy = model.bank.policy.but("coverage_learned", 3, noise="never")
    frames, first = torch.rand(1, 7, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long)
    first[:, 8:24, 8:24] = 1
    model(frames, first, torch.ones(1, 1, dtype=torch.bool), policy=policy).pow(2).mean().backward()
    assert model.bank.update_key.weight.grad.abs().sum() > 0


def test_a_rule_that_looks_at_the_object_says_what_it_misses():
    bank = MemoryBank(**SHAPE).eval()
    template = bank.template(torch.randn(1, 6, 4, 4))
    memory = bank.write(None, template, 0)
    with pytest.raises(StremnError, match="this rule is for segmentation"):
        bank.write(memory, template, 1, policy=UpdatePolicy("coverage_object", 4))
    request = Request(torch.arange(3)[None], torch.ones(1, 3).bool(), 3, 3, None, None)
    for name in ("coverage", "coverage_object", "diversity_object"):
        with pytest.raises(StremnError, match="compare: expected"):
            find_rule(name).select(request)
    for score in (coverage, mean_matches):
        with pytest.raises(StremnError, match="matches: expected"):
            score(Comparison(None, None))
        with pytest.raises(StremnError, match="masks: expected"):
            score(Comparison(torch.zeros(1, 3, 3, 4), None), True)
    with pytest.raises(StremnError, match="masks: expected"):
        quality(Comparison(None, None))
    with pytest.raises(StremnError, match="pixels: expected"):
        coverage_rule(pixels="some")
    with pytest.raises(StremnError, match="keys: expected"):
        Matching("value")


def test_names_are_known_and_unique():
    assert not set(RULES) & set(ZOO) and {"coverage", "coverage_object", "diversity_object"} <= set(all_rules())
    with pytest.raises(StremnError, match="coverage_object"):
        find_rule("coverge")


def test_weighted_matches_bring_the_masks_with_them():
    "A rule that asks for weighted matches need not ask for masks as well."
    for matching, masks, want in ((None, False, False), (None, True, True), (Matching(), False, False),
                                  (Matching(weighted=True), False, True)):
        assert Rule(find_rule("oldest").select, needs_masks=masks, matching=matching).sees_masks == want
    torch.manual_seed(0)
    model = VOSModel().eval()
    coverage_object = find_rule("coverage_object")
    frames, first = torch.rand(1, 7, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long)
    first[:, 8:24, 8:24] = 1
    valid = torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        found = [model(frames, first, valid, policy=model.bank.policy.but(rule, 3))
                 for rule in (coverage_object, replace(coverage_object, needs_masks=False))]
    assert torch.equal(*found)
