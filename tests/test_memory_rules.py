"""Contracts of the rules: each equals a simulation in plain Python, the random ones in law; masks, order, draws."""
import itertools
import math
import random as stdlib_random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from stremn.core import StremnError, make_generator
from stremn.memory.rules import (
    RULES, Request, Rule, find_rule, first_last, most_similar, pick, random_slot, reservoir, uniform)
from stremn.memory.update import Template, append, update_usage, write

FALSE_ALARM = 1e-6 # of every statistical test below, over seeds
DETERMINISTIC = ("oldest", "newest", "first_last", "most_similar")


def request(frames, candidates=None, t=None, offered=None, scores=None, **options) -> Request:
    "A request with one score table for both similarities."
    frames = torch.as_tensor(frames)
    candidates = torch.ones_like(frames, dtype=torch.bool) if candidates is None else candidates
    scores = torch.zeros(frames.shape) if scores is None else scores
    t = int(frames.max()) + 1 if t is None else t
    return Request(frames, candidates, t, t + 1 if offered is None else offered, lambda: scores, lambda: scores,
                   **options)


def replay(rule, T, n, pinned, V=1, looks=None, **options):
    "(T-n+1,V,n) frames held once the memory is full."
    rule = find_rule(rule)
    frames = torch.arange(n).repeat(V, 1)
    free = (torch.arange(n) >= pinned).expand(V, n)
    history = [frames]
    for t in range(n, T):
        scores = torch.zeros(V, n) if looks is None else looks[frames] @ looks[t]
        a = rule.select(request(frames, free, t, t + 1 - pinned, scores, **options))
        frames = torch.where(a > .5, t, frames)
        history.append(frames)
    return torch.stack(history)


def by_hand(name, T, n, pinned, looks):
    "The same with a Python list, one frame after the other."
    box = list(range(n))
    yield list(box)
    for t in range(n, T):
        free = range(pinned, n)
        if name == "oldest":
            i = min(free, key=lambda i: box[i])
        elif name in ("newest", "first_last"):
            i = max(free, key=lambda i: box[i])
        else:
            i = max(free, key=lambda i: float(looks[box[i]] @ looks[t]))
        box[i] = t
        yield list(box)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_equals_a_simulation_by_hand(name):
    gen = stdlib_random.Random(0)
    for seed in range(25):
        n = gen.randint(1, 8)
        pinned, T = gen.randint(0, n - 1), gen.randint(n, 70)
        looks = torch.randn(T, 5, generator=make_generator(seed))
        got = replay(RULES[name], T, n, pinned, looks=looks)[:, 0].tolist()
        assert got == list(by_hand(name, T, n, pinned, looks)), (n, pinned, T)


def test_learned_without_noise_is_the_most_similar_rule():
    for seed in range(10):
        looks = torch.randn(50, 5, generator=make_generator(seed))
        assert torch.equal(replay(RULES["learned"], 50, 5, 1, looks=looks), replay(most_similar, 50, 5, 1, looks=looks))


def test_reservoir_keeps_every_subset_equally_often():
    "The whole law, not only how often one frame is kept: 15 subsets of 2 out of 6 frames, chi-square."
    V, T, n = 30_000, 7, 3
    held = replay(reservoir, T, n, 1, V, generator=make_generator(11))[-1, :, 1:].sort(-1).values
    subsets = {s: i for i, s in enumerate(itertools.combinations(range(1, T), n - 1))}
    counts = [0] * len(subsets)
    for s in map(tuple, held.tolist()):
        counts[subsets[s]] += 1
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


@pytest.mark.parametrize("pinned", [0, 1, 2])
def test_reservoir_equals_k_uniform_among_all_previous(pinned):
    V, T, n = 10_000, 25, 6
    held = replay(reservoir, T, n, pinned, V, generator=make_generator(pinned))[-1, :, pinned:]
    counts, p = torch.bincount(held.flatten(), minlength=T)[pinned:].tolist(), (n - pinned) / (T - pinned)
    worst = min(stats.binomtest(c, V, p).pvalue for c in counts)
    assert worst > FALSE_ALARM / len(counts)


def test_that_law_can_fail():
    "The same test refuses random dropping, and a reservoir that counts one frame too few."
    def miscounted(r): return reservoir(r._replace(offered=r.offered - 1))
    V, T, n = 10_000, 25, 6
    for rule in (random_slot, miscounted):
        held = replay(rule, T, n, 1, V, generator=make_generator(0))[-1, :, 1:]
        counts = torch.bincount(held.flatten(), minlength=T)[1:].tolist()
        assert min(stats.binomtest(c, V, (n - 1) / (T - 1)).pvalue for c in counts) < FALSE_ALARM / len(counts)


def test_random_forgets_geometrically():
    V, T, n = 10_000, 30, 5
    held = replay(random_slot, T, n, 1, V, generator=make_generator(2))[-1, :, 1:]
    counts = torch.bincount(held.flatten(), minlength=T)
    pvalues = [stats.binomtest(int(counts[f]), V, (3 / 4) ** (T - 1 - f)).pvalue for f in range(n, T - 1)]
    assert min(pvalues) > FALSE_ALARM / len(pvalues) and counts[T - 1] == V


def test_noisy_choice_follows_the_softmax_of_the_candidates():
    V, scores = 20_000, torch.tensor([3., .5, -.2, .9, .1])
    free = torch.tensor([False, True, True, True, False]).expand(V, 5)
    r = request(torch.arange(5).expand(V, 5), free, scores=scores.expand(V, 5), noise=True, generator=make_generator(3))
    counts = RULES["learned"].select(r).sum(0)[1:4]
    assert counts.sum() == V and stats.chisquare(counts, V * scores[1:4].softmax(0)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("name", RULES)
def test_never_touches_a_protected_slot(name):
    g = make_generator(4)
    for n in (1, 2, 5, 9):
        free = torch.rand(400, n, generator=g) < .4
        free[torch.arange(400), torch.randint(n, (400,), generator=g)] = True
        frames, scores = torch.rand(400, n, generator=g).argsort(-1), 100 * torch.randn(400, n, generator=g)
        gram = torch.randn(400, n + 1, n + 1, generator=g)
        a = RULES[name].select(request(frames, free, n, 3 * n, scores, noise=True, generator=g,
                                usage=torch.rand(400, n, 3, generator=g), pairs=lambda gram=gram: gram @ gram.mT))
        assert a.shape == (400, n) and set(a.unique().tolist()) <= {0., 1.}
        assert not a[~free].any() and set(a.sum(-1).tolist()) <= ({0., 1.} if name == "reservoir" else {1.})


@pytest.mark.parametrize("name", [*DETERMINISTIC, "learned"])
def test_order_of_slots_and_of_rows_does_not_matter(name):
    g = make_generator(5)
    frames, scores = torch.rand(50, 6, generator=g).argsort(-1), torch.randn(50, 6, generator=g)
    free = torch.rand(50, 6, generator=g) < .6
    free[:, 3] = True
    a = RULES[name].select(request(frames, free, scores=scores))
    slots, rows = torch.randperm(6, generator=g), torch.randperm(50, generator=g)
    b = RULES[name].select(request(frames[rows][:, slots], free[rows][:, slots], scores=scores[rows][:, slots]))
    assert torch.equal(a[rows][:, slots], b)


@pytest.mark.parametrize("name", ["random", "reservoir", "learned"])
def test_all_randomness_comes_from_the_generator(name):
    def draw(generator, seed=0):
        r = request(torch.arange(6).expand(100, 6), offered=9, noise=True, generator=generator)
        return RULES[name].select(r)
    state = torch.get_rng_state()
    assert torch.equal(draw(make_generator(1)), draw(make_generator(1)))
    assert not torch.equal(draw(make_generator(1)), draw(make_generator(2)))
    assert torch.equal(torch.get_rng_state(), state)
    draw(None)
    assert not torch.equal(torch.get_rng_state(), state)


def test_blind_rules_never_compare_pictures():
    def forbidden(): raise AssertionError("a blind rule compared pictures")
    for name in ("oldest", "newest", "random", "reservoir", "first_last"):
        RULES[name].select(request([[0, 3, 1]])._replace(learned=forbidden, appearance=forbidden))


def test_learned_gradient_reaches_candidates_only():
    scores = torch.randn(4, 5, requires_grad=True)
    free = torch.tensor([False, True, True, True, False]).expand(4, 5)
    a = RULES["learned"].select(request(torch.arange(5).expand(4, 5), free, scores=scores))
    (a * torch.randn(4, 5)).sum().backward()
    assert scores.grad[:, 1:4].abs().min() > 0 and not scores.grad[:, [0, 4]].any()


@pytest.mark.parametrize("dtype",
                         [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32])
def test_pick_in_every_number_type(dtype):
    merit = torch.tensor([[9, 1, 3, 2], [9, 4, 4, 1]]).to(dtype)
    free = torch.tensor([[False, True, True, True]]).expand(2, 4)
    assert pick(merit, free).argmax(-1).tolist() == [2, 1]


def test_pick_extremes():
    free = torch.tensor([[False, True, True]])
    assert pick(torch.tensor([[0., -torch.inf, -torch.inf]]), free).tolist() == [[0., 1., 0.]]
    assert pick(torch.tensor([[True, False, True]]), free).tolist() == [[0., 0., 1.]]
    assert pick(torch.tensor([[0, 2**40, 2**40 + 1]]), free).tolist() == [[0., 0., 1.]]


def test_uniform_is_uniform_and_shaped():
    u = uniform(request([[0, 1]], generator=make_generator(0)), (5000,))
    assert u.shape == (5000,) and u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > FALSE_ALARM


def test_names_and_refusals():
    assert list(RULES)[:7] == ["oldest", "newest", "random", "reservoir", "first_last", "most_similar", "learned"]
    assert find_rule(pick) == Rule(pick) and all(find_rule(name) is rule for name, rule in RULES.items())
    assert all(find_rule(rule) is rule for rule in RULES.values())
    for wrong in ("fifo", "", None, 3, ["oldest"]):
        with pytest.raises(StremnError, match="expected one of oldest, newest") as caught:
            find_rule(wrong)
        assert "\n" not in str(caught.value) and repr(wrong) in str(caught.value)


def test_counting_rules_by_hand():
    g = make_generator(8)
    for _ in range(50):
        frames, usage = torch.randperm(30, generator=g)[None, :5], torch.rand(1, 5, 3, generator=g)
        free = torch.tensor([[False, True, True, True, True]])
        r = request(frames, free, 31, usage=usage)
        age = [31 - f for f in frames[0].tolist()]
        rate = [(usage[0, i, 0].item() / age[i], i) for i in range(1, 5)]
        assert RULES["lfu"].select(r).argmax().item() == min(rate)[1]
    for name in ("lfu", "ucb"):
        with pytest.raises(StremnError, match="expected the tallies of attention"):
            RULES[name].select(request(frames, free, 31))


def test_diversity_leaves_the_largest_volume_of_all_replacements():
    g = make_generator(9)
    for n in (2, 3, 6):
        x = torch.nn.functional.normalize(torch.randn(20, n + 1, 8, generator=g), dim=-1).double()
        gram, free = x @ x.mT, torch.arange(n).expand(20, n) > 0
        a = RULES["diversity"].select(request(torch.arange(n).expand(20, n), free, pairs=lambda gram=gram: gram))
        for row in range(20):
            volume = {i: np.linalg.det(np.delete(np.delete(gram[row].numpy(), i, 0), i, 1)) for i in range(1, n)}
            assert a[row].argmax().item() == max(volume, key=volume.get)


def test_a_rule_that_is_wrapped_behaves_as_before():
    "The capacity and the tallies belong to the record, not to the function: wrapping the function loses neither."
    for name, rule in RULES.items():
        wrapped = replace(rule, select=lambda r, rule=rule: rule.select(r))
        assert (wrapped.capacity, wrapped.needs_usage) == (rule.capacity, rule.needs_usage), name
    with pytest.raises(TypeError):
        RULES["first_last"](None)                                            # a record is not a function to wrap
    assert find_rule(first_last).capacity is None                            # the bare function is rule B


def rmem(attention, n):
    "Frames kept by RMem's own bookkeeping (dictionaries, counted once a memory update), after each frame."
    held, mean, times = [0], {}, {}
    for t in range(1, len(attention)):
        share = {f: attention[t][f] / sum(attention[t][g] for g in held) for f in held}
        if len(held) == n:
            mean = {f: .2 * mean[f] + .8 * s if f in mean else s for f, s in share.items()}
            times = {f: times.get(f, 0) + 1 for f in [*held, t]}
            counts = {f: len(held) if f == held[0] else times[f] for f in held}
            keep = {f: mean[f] + 1.5 * math.sqrt(math.log(sum(counts.values())) / (counts[f] + 8)) for f in held[1:]}
            held.remove(min(keep, key=keep.get))
        held.append(t)
        yield set(held)


@pytest.mark.parametrize("n, pinned", [(2, 1), (4, 1), (4, 0), (7, 1)])
def test_ucb_is_the_rule_of_rmem(n, pinned):
    for seed in range(10):
        attention = torch.rand(60, 60, generator=make_generator(seed)).double() ** 3
        memory = append(None, Template(*torch.zeros(3, 1, 1, 1, 1)), 0)
        for t, kept in enumerate(rmem(attention.tolist(), n), 1):
            full = memory.slots == n
            share = attention[t][memory.frames]
            usage = update_usage(memory.usage, share / share.sum(-1, keepdim=True), full)
            memory, new = memory._replace(usage=usage), Template(*torch.zeros(3, 1, 1, 1, 1))
            free = (torch.arange(memory.slots) >= pinned)[None]
            memory = write(memory, new, t, RULES["ucb"].select(request(memory.frames, free, t, usage=usage))) if full \
                else append(memory, new, t)
            assert set(memory.frames[0].tolist()) == kept, (seed, t)
