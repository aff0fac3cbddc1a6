"Contracts of the zoo: each rule equals its source's bookkeeping in plain Python; all keep the memory's laws."
import itertools
import math
import random as stdlib_random
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from scipy import stats

from stremn.core import StremnError, make_generator
from stremn.memory.bank import BankConfig, UpdatePolicy
from stremn.memory.coverage import quality
from stremn.memory.rules import RULES, ZOO, Comparison, Request, Rule, all_rules, find_rule, import_rule
from stremn.memory.update import update_usage
from stremn.memory.zoo import (
    about_rule, area_change, asked_at, asking, cutie, dam4sam, effective_quality, gap, half, idle, in_turn, last_use,
    looks_at, lrb, lru, qdmn, readmem, recency, rule_table, s4lru, sam3, sam2long, samurai, stride, surest,
    volume)
from stremn.vos.stream import VideoSegmenter
from helpers import network
from refusals import refused

NEW = torch.tensor([[[0., -1., 0.]]]) # Tallies of a template that nobody has read
MINE = ("cutie", "stride", "frozen", "spaced", "even", "xmem", "h2o", "lru", "clock", "s4lru", "lrb", "readmem",
        "leverage", "keydiff", "adjacent", "random_half", "sam3", "samurai", "sam2long", "qdmn", "dam4sam")


def one_hot_hits(T, seed):
    "(T,T) attention of each frame: one older frame, drawn when it is known which are stored, has it all."
    return np.random.default_rng(seed).random((T, T))


def cells(quality_of, area_of=None, P=16):
    "(T,2,P) masks with a given quality and area in cells."
    area_of = [4] * len(quality_of) if area_of is None else area_of
    p = torch.zeros(len(quality_of), P, dtype=torch.float64)
    for t, area in enumerate(area_of):
        p[t, :area] = 1
    return torch.stack([p, p * torch.tensor(quality_of, dtype=torch.float64)[:, None]], 1)


def play(rule, T, n, pinned=1, hits=None, likeness=None, masks=None, seed=0):
    "Frames held after each frame, and the frame that was used at each (None: none), as the bank would do it."
    select, g = find_rule(rule).select, make_generator(seed)
    frames, usage, log = [0], NEW, []
    for t in range(1, T):
        full, held, used = len(frames) == n, list(frames), None
        if hits is not None:
            used = max(held, key=lambda f: hits[t][f])
            share = torch.tensor([[float(f == used) for f in held]])
            usage = update_usage(usage, share, full)
        if not full:
            frames.append(t)
            usage = torch.cat([usage, NEW], 1)
        else:
            at = [*frames, t]
            asked = Request(
                torch.tensor([frames]), torch.arange(n)[None] >= pinned, t, t + 1 - pinned, None,
                None if likeness is None else lambda t=t, held=held: likeness[t, held][None],
                generator=g, usage=None if hits is None else usage,
                pairs=None if likeness is None else lambda at=at: likeness[at][:, at][None],
                compare=None if masks is None else lambda f, at=at: f(Comparison(None, masks[at][None])))
            a = select(asked)
            assert a.shape == (1, n) and a.sum() in (0, 1) and not a[0, :pinned].any()
            if a.any():
                slot = a.argmax().item()
                frames[slot], usage = t, usage.clone()
                usage[0, slot] = torch.tensor([0., -1., 1.])
        log.append((list(frames), used))
    return log


def held(log):
    "Sets of frames, one a step."
    return [set(frames) for frames, _ in log]


def cosines(T, seed, dim=6):
    "(T,T) cosines of random vectors, alike in pieces of time."
    g = np.random.default_rng(seed)
    x = np.repeat(g.normal(size=(T // 4 + 1, dim)), 4, 0)[:T] + .4 * g.normal(size=(T, dim))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return torch.from_numpy(x @ x.T)


SIZES = [(2, 1), (4, 1), (5, 0), (7, 2)]


# ---------------------------------------------------------------- who asks
def test_the_newest_slot_asks_where_it_is_held():
    frames = torch.tensor([[0, 9, 4, 7]] * 2)
    r = Request(frames, torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]).bool(), 12, 12, None, None)
    assert asking(r).tolist() == [[4], [1]] and asked_at(r).tolist() == [[12], [9]] and gap(r).tolist() == [[3], [2]]
    assert recency(r)[0].tolist() == [3, 0, 2, 1] and recency(r)[1, 2:].tolist() == [1, 0]
    assert half(r).tolist() == [[1], [1]]
    assert stride(r).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]                 # too soon: replaced, or turned away
    assert stride(r, every=2).tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]
    assert cutie(r).sum() == 0 and cutie(r, every=3).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]


def test_groups_go_in_turn():
    r = Request(torch.tensor([[0, 3, 8, 5]]), torch.tensor([[False, True, True, True]]), 9, 9, None, None)

    def goes(*groups): return in_turn(r, *(torch.tensor([g]).bool() for g in groups)).argmax().item()
    assert (goes(), goes([1, 0, 1, 1]), goes([1, 0, 0, 0]), goes([1, 0, 0, 0], [0, 0, 1, 0])) == (1, 3, 1, 2)
    assert goes([0, 0, 1, 0], [0, 1, 0, 1]) == 2


# ---------------------------------------------------------------- time
@pytest.mark.parametrize("n, pinned", SIZES)
def test_cutie_is_a_queue_that_takes_every_fifth_frame(n, pinned):
    queue, last, sets = deque(range(min(n, pinned))), n - 1, held(play("cutie", 60, n, pinned))
    first, queue = list(range(pinned)), deque(range(pinned, n), maxlen=n - pinned)
    for t in range(n, 60):
        if t - last >= 5:
            queue.append(t)
            last = t
        assert sets[t - 1] == {*first, *queue}


@pytest.mark.parametrize("n, pinned", [(4, 1), (5, 0), (7, 2)])
def test_stride_holds_the_frame_before_and_every_fifth(n, pinned):
    sets = held(play("stride", 90, n, pinned))
    for t in range(60, 90):
        others = sorted(sets[t - 1] - set(range(pinned)) - {t})
        assert t in sets[t - 1] and all(b - a == 5 for a, b in itertools.pairwise(others))
        assert 1 <= t - others[-1] <= 5


@pytest.mark.parametrize("name", ["spaced", "even"])
def test_rules_of_room_by_hand(name):
    "On its scale the most crowded one goes, and the past stays covered."
    def scale(age): return math.log(age) if name == "spaced" else age
    for T in range(9, 60):
        before, after = (held(play(name, t, 8, 0))[-1] for t in (T - 1, T))
        age = sorted(T - 1 - f for f in before)
        newcomer = 1 if name == "spaced" else 0
        room = {b: math.inf if c is None else scale(c) - (scale(a) if a else 0)
                for a, b, c in zip([newcomer, *age], age, [*age[1:], None])}
        assert room[T - 1 - (before - after).pop()] == pytest.approx(min(room.values())), T
    ages = sorted(400 - f for f in held(play(name, 400, 8, 0))[-1])
    assert ages[0] == 1 and ages[-1] == 400
    if name == "spaced":
        assert all(1 < b / a < 10 for a, b in itertools.pairwise(ages))
    else:
        assert max(b - a for a, b in itertools.pairwise(ages)) <= 128        # powers of two: at most twice the mean


def test_frozen_stays():
    assert held(play("frozen", 40, 5))[-1] == set(range(5))


# ---------------------------------------------------------------- usage: one frame is used at each step
@pytest.mark.parametrize("n, pinned", SIZES)
def test_lru_is_lru(n, pinned):
    for seed in range(6):
        T = 45
        hits = one_hot_hits(T, seed)
        log, queue = play("lru", T, n, pinned, hits), OrderedDict.fromkeys(range(n))
        for t in range(n, T):                                                # uses before it was full are not known
            queue.move_to_end(log[t - 1][1])
            gone = next(f for f in queue if f >= pinned)
            del queue[gone]
            queue[t] = None
            assert set(queue) == set(log[t - 1][0]), (seed, t)


def uses_of(log, t, n):
    "(frame -> total uses, frame -> last use or arrival) of what was held before frame t, its own use included."
    before = log[t - 2][0]
    total = {f: sum(used == f for _, used in log[f:t]) for f in before}
    last = {f: max([f, *(u for u in range(max(f, n - 1) + 1, t + 1) if log[u - 1][1] == f)]) for f in before}
    return total, last


WINDOW = 6 # Frames, of LRB: short, so that both of its cases come


@pytest.mark.parametrize("name", ["xmem", "h2o", "clock", "lrb"])
@pytest.mark.parametrize("n, pinned", SIZES)
def test_rules_of_use_by_hand(name, n, pinned):
    rule = Rule(lambda r: lrb(r, WINDOW), needs_usage=True) if name == "lrb" else name
    for seed in range(4):
        T = 40
        log = play(rule, T, n, pinned, one_hot_hits(T, seed))
        for t in range(n, T):
            total, last = uses_of(log, t, n)
            free = sorted(f for f in log[t - 2][0] if f >= pinned)
            older = free[:len(free) - len(free) // 2]
            wait = {f: max((t - f) / max(total[f], 1e-9), min(t - last[f], t - f)) for f in free}
            if name == "xmem":
                wanted = {f: total[f] / (t - f) for f in older}
            elif name == "h2o":
                wanted = {f: total[f] for f in older}
            elif name == "clock":                                            # of n shares, the newest weighs .8
                mean = {f: running_mean(log, f, t, n) for f in free}
                idle_ones = [f for f in free if mean[f] * n < 1]
                wanted = {(idle_ones or free)[0]: 0}
            else:
                beyond = [f for f in free if wait[f] >= WINDOW]
                wanted = {f: last[f] for f in beyond} or {f: -wait[f] for f in free}
            dropped = (set(log[t - 2][0]) - set(log[t - 1][0])).pop()
            assert dropped in wanted and wanted[dropped] == pytest.approx(min(wanted.values())), (seed, t)


def running_mean(log, f, t, n):
    "Mean of the attention a slot has drawn while the memory was full."
    mean = None
    for u in range(max(f + 1, n), t + 1):
        hit = float(log[u - 1][1] == f)
        mean = hit if mean is None else .2 * mean + .8 * hit
    return mean


@pytest.mark.parametrize("n, pinned", SIZES)
def test_the_clock_of_the_tallies_is_exact(n, pinned):
    for seed in range(4):
        seen = []

        def watch(r, seen=seen):
            seen.append((r.t, r.frames[0].tolist(), idle(r)[0].tolist(), last_use(r)[0].tolist()))
            return lru(r)
        log = play(Rule(watch, needs_usage=True), 40, n, pinned, one_hot_hits(40, seed))
        for t, frames, waited, use in seen:
            _, last = uses_of(log, t, n)
            assert waited == [t - last[f] for f in frames], (seed, t)
            assert sorted(frames, key=lambda f: use[frames.index(f)]) == \
                sorted(frames, key=lambda f: (last[f], last[f] == f))        # who arrives comes after who is used


def by_queues(hits, last, free, segments):
    "The victim of segmented queues whose levels are known, with lists."
    places = math.ceil(len(free) / segments)
    queues = [[f for f in free if min(hits[f], segments - 1) == s] for s in range(segments)]
    for s in range(segments - 1, 0, -1):
        queues[s].sort(key=lambda f: (last[f], last[f] == f))
        while len(queues[s]) > places:
            queues[s - 1].append(queues[s].pop(0))
    lowest = next(q for q in queues if q)
    return min(lowest, key=lambda f: (last[f], last[f] == f))


@pytest.mark.parametrize("n, pinned", SIZES)
@pytest.mark.parametrize("segments", [2, 4])
def test_s4lru_passes_down_what_does_not_fit(n, pinned, segments):
    def rule(r): return s4lru(r, segments)
    for seed in range(4):
        log = play(Rule(rule, needs_usage=True), 40, n, pinned, one_hot_hits(40, seed))
        for t in range(n, 40):
            total, last = uses_of(log, t, n)
            free = [f for f in log[t - 2][0] if f >= pinned]
            assert set(log[t - 2][0]) - set(log[t - 1][0]) == {by_queues(total, last, free, segments)}, (seed, t)


def test_rules_of_use_say_what_they_need():
    r = Request(torch.tensor([[0, 1]]), torch.tensor([[False, True]]), 2, 2, None, None)
    for name in ("xmem", "h2o", "lru", "clock", "s4lru", "lrb"):
        with pytest.raises(StremnError, match="expected the tallies of attention"):
            find_rule(name).select(r)
    for name in ("readmem", "leverage", "keydiff", "adjacent"):
        with pytest.raises(StremnError, match="pairs: expected"):
            find_rule(name).select(r)
    for name in ("sam3", "samurai", "sam2long", "qdmn", "dam4sam"):
        with pytest.raises(StremnError, match="compare: expected"):
            find_rule(name).select(r)


# ---------------------------------------------------------------- appearance
@pytest.mark.parametrize("n, pinned", SIZES)
def test_readmem_takes_a_frame_only_if_the_determinant_grows(n, pinned):
    "The source's bookkeeping: a matrix from which rows are deleted, and to which a row is appended."
    refused = 0
    for seed in range(5):
        S = cosines(50, seed, dim=12)
        sets, memory = held(play("readmem", 50, n, pinned, likeness=S)), list(range(n))
        S = S.numpy()
        for t in range(n, 50):
            now, found = abs(np.linalg.det(S[np.ix_(memory, memory)])), {}
            for i in memory[pinned:]:
                others = [f for f in memory if f != i] + [t]
                found[i] = abs(np.linalg.det(S[np.ix_(others, others)]))
            best = max(found, key=found.get)
            if S[min(memory), t] > .5 and now <= found[best]:
                memory = [f for f in memory if f != best] + [t]
            else:
                refused += 1
            assert sets[t - 1] == set(memory), (seed, t)
    assert 0 < refused < 5 * (50 - n)


def test_readmem_does_not_count_a_held_frame_twice():
    S = cosines(30, 3, dim=12)
    frames = [0, 12, 5, 9]                                                   # 12 is held: it asks for a place
    at = [*frames, 12]
    r = Request(torch.tensor([frames]), torch.tensor([[False, False, True, True]]), 13, 13, None, None,
                pairs=lambda: S[at][:, at][None])
    N = S.numpy()
    volumes = {i: abs(np.linalg.det(N[np.ix_(k, k)])) for i in (2, 3)
               for k in [[0, *(f for f in (5, 9) if f != frames[i]), 12]]}
    now = abs(np.linalg.det(N[np.ix_([0, 5, 9], [0, 5, 9])]))
    best = max(volumes, key=volumes.get)
    a = readmem(r, least=-1)
    assert a.sum() == float(volumes[best] >= now) and (not a.any() or a.argmax() == best)
    assert volumes[2] > 1e-4 and volumes[3] > 1e-4


def test_volume_is_a_determinant_of_part_of_the_matrix():
    S = torch.randn(2, 5, 5, dtype=torch.float64, generator=make_generator(0))
    keep = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 1]]).bool()
    for row in range(2):
        some = S[row][keep[row]][:, keep[row]]
        assert volume(S, keep)[row].item() == pytest.approx(some.det().abs().item())


@pytest.mark.parametrize("name", ["leverage", "keydiff", "adjacent"])
def test_rules_of_appearance_by_hand(name):
    for seed in range(5):
        n, pinned, S = 5, 1, cosines(40, seed)
        sets, N = held(play(name, 40, n, pinned, likeness=S)), S.numpy()
        for t in range(n, 40):
            at = [*sorted(sets[t - 2]), t]
            G = N[np.ix_(at, at)]
            if name == "leverage":
                values, vectors = np.linalg.eigh(G)
                merit = -(vectors**2 * (values / (values + .1))).sum(1)
            elif name == "keydiff":
                merit = [sum(row) / (n + 1) for row in G]
            else:
                merit = [G[i, i + 1] for i in range(n)]
            best = max(range(pinned, n), key=lambda i: merit[i])
            assert sets[t - 2] - sets[t - 1] == {at[best]}, (seed, t)


def test_random_half_draws_among_the_likely_half_evenly():
    V, scores = 20_000, torch.tensor([9., .3, .9, .1, .5, .7])
    free = torch.tensor([False, True, True, True, True, True]).expand(V, 6)
    r = Request(torch.arange(6).expand(V, 6), free, 6, 6, None, lambda: scores.expand(V, 6),
                generator=make_generator(0))
    counts = find_rule("random_half").select(r).sum(0)
    assert not counts[[0, 1, 3]].any() and stats.chisquare(counts[[2, 4, 5]]).pvalue > 1e-6


# ---------------------------------------------------------------- quality and the object
def test_surest_and_the_score_of_sam3():
    p = torch.tensor([[[.5, .2, 0.], [.9, .8, .7], [.01, .01, .02]]])
    square = torch.tensor([[[.5, .02, 0.], [.81, .64, .49], [1e-4, 1e-4, 4e-4]]])
    c = Comparison(None, torch.stack([p, square], 2))
    assert torch.allclose(surest(c), torch.tensor([[1., .9, .02]]), atol=1e-6)
    iou = [.52 / .7, 1.94 / 2.4, 6e-4 / .04]
    assert torch.allclose(quality(c), torch.tensor([iou]), atol=1e-6)
    assert torch.allclose(effective_quality(c), torch.tensor([[iou[0], .8 * iou[1], 0.]]), atol=1e-6)


FILTERS = {"sam3": lambda q: max(2 * q - 1, 0) * q > .01, "samurai": lambda q: q > .5 and q > .5,
           "sam2long": lambda q: q > .1 and q > .5}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("n", [3, 4, 7])
def test_filters_hold_what_a_walk_back_through_the_whole_video_finds(name, n):
    "The source keeps every output and walks back; what the bounded memory holds is the same."
    for seed in range(6):
        g = stdlib_random.Random(seed)
        quality_of = [1.] + [g.choice([.05, .3, .49, .502, .52, .7, 1.]) for _ in range(59)]
        sets = held(play(name, 60, n, masks=cells(quality_of)))
        for t in range(n, 60):
            valid = []
            for i in range(t, 0, -1):
                if FILTERS[name](quality_of[i]):
                    valid.insert(0, i)
                if len(valid) >= n - 1:
                    break
            if t not in valid:
                valid.append(t)
            wanted = {0, *valid[-(n - 1):]}
            assert wanted <= sets[t - 1], (seed, t)                          # free slots may still hold what failed
            if len(wanted) == n:
                assert wanted == sets[t - 1]


def test_the_filters_differ_where_their_thresholds_do():
    frames, masks = torch.tensor([[0, 1, 2, 3]]), cells([1., 1., .502, 1., 1.])[None]
    r = Request(frames, frames > 0, 4, 4, None, None, compare=lambda f: f(Comparison(None, masks)))
    assert (sam3(r).argmax(), samurai(r).argmax(), sam2long(r).argmax()) == (2, 1, 1)
    masks[0, 3, 1, 1:4] = .1                                                 # one sure cell among unsure ones: q .325
    masks[0, 2] = masks[0, 1]
    assert (sam3(r).argmax(), samurai(r).argmax(), sam2long(r).argmax()) == (1, 3, 1)


@pytest.mark.parametrize("n", [3, 5])
def test_qdmn_is_the_bookkeeping_of_its_code(n):
    "Memory numbers and scores in a list and a dictionary; every frame is good enough, so both count strides alike."
    for seed in range(5):
        g = np.random.default_rng(seed)
        score_of = [1., *g.uniform(.81, 1., 200).tolist()]
        sets = held(play(lambda r: qdmn(r, every=1), 200, n, masks=cells(score_of)))
        memory = list(range(1, n))
        for t in range(n, 200):
            worth = {m: np.exp(-abs(t - m)) + score_of[m] for m in memory}
            memory.remove(min(worth, key=worth.get))
            memory.append(t)
            assert sets[t - 1] == {0, *memory}, (seed, t)


def test_qdmn_turns_bad_frames_and_early_frames_away():
    g = np.random.default_rng(0)
    score_of = g.uniform(.5, 1., 80).tolist()
    score_of[0] = .9
    sets, memory, last = held(play("qdmn", 80, 4, masks=cells(score_of))), [1, 2, 3], 3
    for t in range(4, 80):
        if t - last >= 5 and score_of[t] / .9 > .8:
            worth = {m: math.exp(-(t - m) / 5) + score_of[m] / .9 for m in memory}
            memory.remove(min(worth, key=worth.get))
            memory.append(t)
            last = t
        assert sets[t - 1] == {0, *memory}, t
    assert 3 < len(set().union(*sets) - {0, 1, 2, 3}) < 15                   # some entered, some were refused


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_dam4sam_is_two_lists(n):
    "Recent templates and anchors as lists of their own; every frame shows the object."
    promoted = 0
    for seed in range(5):
        g = stdlib_random.Random(seed)
        quality_of = [1.] + [g.choice([.7, .85, 1.]) for _ in range(149)]
        area_of = [8] + [g.choice([7, 8, 9, 12]) for _ in range(149)]
        sets = held(play("dam4sam", 150, n, masks=cells(quality_of, area_of)))
        anchors, recent = list(range(1, 1 + (n - 1) // 2)), list(range(1 + (n - 1) // 2, n))
        for t in range(n, 150):
            everything = [0, *anchors, *recent]
            usual = np.median([area_of[f] for f in [*everything, t]])
            before = sorted(everything)[-2]
            if recent[-1] - before < 5:
                recent.pop()
            else:
                leaves = recent.pop(0)
                if quality_of[leaves] > .8 and abs(area_of[leaves] / usual - 1) <= .2 and anchors:
                    anchors = [*anchors[1:], leaves]
                    promoted += 1
            recent.append(t)
            assert sets[t - 1] == {0, *anchors, *recent}, (seed, t)
    assert promoted > 0


def test_dam4sam_drops_empty_frames_first():
    frames = torch.tensor([[0, 20, 30, 40, 50]])
    masks = cells([1., 1., 1., .3, 1., 1.])[None]
    r = Request(frames, frames > 0, 55, 55, None, None, compare=lambda f: f(Comparison(None, masks)))
    assert dam4sam(r).argmax() == 3
    masks[:] = cells([1.] * 6)
    assert dam4sam(r).argmax() == 1                                          # 40 is good and becomes an anchor
    masks[0, 3, 1] *= .7
    assert dam4sam(r).argmax() == 3                                          # it is not
    masks[:] = cells([1.] * 6, [8, 8, 8, 12, 8, 8])
    assert dam4sam(r).argmax() == 3                                          # it is too large
    change = area_change(Comparison(None, cells([1., 1., .3, 1., 1.], [9, 8, 1, 6, 4])[None]))
    assert torch.allclose(change, torch.tensor([[2., 1, -6, -1, -3]]).abs().double() / 7)  # the median of 9, 8, 6 and 4
    assert area_change(Comparison(None, cells([.1] * 3)[None])).isinf().all()             # nobody shows the object


# ---------------------------------------------------------------- all of them
def small_video(seed=0, T=8):
    "Two videos with two objects each."
    g = make_generator(seed)
    masks = torch.zeros(2, 2, 16, 16)
    masks[:, 0, 2:7, 2:7], masks[:, 1, 8:15, 6:12] = 1, 1
    return torch.rand(2, T, 3, 16, 16, generator=g), masks


def run(model, policy, seed=0, T=8):
    "(T,4,n) frames held by each object after each frame, as lists."
    frames, masks = small_video(T=T)
    memories, held, g = (), [], make_generator(seed)
    with torch.no_grad():
        for t in range(T):
            _, memories = model.step(memories, frames[:, t], t, masks if t == 0 else None, None, g, policy)
            held.append(memories[0].frames.tolist())
    return held


@pytest.fixture(scope="module")
def model():
    "A tiny untrained network."
    return network(key_channels=4, update_channels=4)


@pytest.mark.parametrize("name", all_rules())
def test_every_rule_keeps_the_laws_of_the_memory(model, name):
    "One-hot or nothing, candidates only, the first frame stays, the same again, one or many decisions, few candidates."
    choices, rule = [], find_rule(name)

    def watch(r):
        a = rule.select(r)
        assert a.shape == r.frames.shape and not a[~r.candidates].any()
        assert set(a.sum(-1).tolist()) <= {0., 1.} and set(a.flatten().tolist()) <= {0., 1.}
        choices.append(len(a))
        return a
    watched = Rule(watch, rule.capacity, rule.needs_usage, rule.needs_masks, rule.matching)
    for slots, latest, per_object in ((3, "competes", True), (3, "held", False), (2, "competes", False),
                                      (4, "held", True)):
        policy = UpdatePolicy(watched, slots, latest=latest, per_object=per_object)
        held = run(model, policy)
        for frames in held:
            for mine in frames:
                assert mine[0] == 0 and len(set(mine)) == len(mine) <= slots
            if not per_object:
                assert frames[0] == frames[1] and frames[2] == frames[3]
        asked = latest == "competes" or policy.capacity > 2                  # of two slots one is pinned, one is held
        assert set(choices) == ({4 if per_object else 2} if asked else set()) and held[-1] != held[0]
        if (slots, latest) == (3, "competes"):
            assert run(model, policy) == held
        choices.clear()


def test_there_are_enough_and_each_says_where_it_comes_from():
    assert len(all_rules()) >= 30 and set(MINE) <= set(ZOO) and not set(MINE) & set(RULES)
    table = rule_table().splitlines()
    assert len(table) == 2 + len(all_rules())
    for name in all_rules():
        what, source = about_rule(name)
        row = next(line for line in table if line.startswith(f"| `{name}` |"))
        assert what and source and "\n" not in what + source and what in row and source in row
    for name in MINE:
        doc = find_rule(name).select.__doc__
        assert "Source: " in doc and ("Left out: " in doc), name
    assert about_rule("coverage_object")[0].endswith("(on_object=True, normalise=False)")


def test_what_a_rule_looks_at_is_found_by_trying():
    assert looks_at("oldest") == ["time"] and looks_at("frozen") == [] and looks_at("ucb") == ["usage"]
    assert looks_at("lfu") == ["time", "usage"] and looks_at("random") == ["chance"]
    assert looks_at("most_similar") == looks_at("coverage") == ["appearance"]
    assert looks_at("coverage_object") == ["appearance", "object"]
    assert looks_at("dam4sam") == ["time", "object", "quality"]
    assert looks_at("qdmn") == looks_at("sam3") == ["time", "quality"]
    assert looks_at("random_half") == ["appearance", "chance"]
    assert looks_at(Rule(lru, needs_usage=True)) == looks_at("lru") == ["time", "usage"]


# ---------------------------------------------------------------- rules from a file
def test_a_rule_from_a_file_is_known_by_its_whole_name(rule_file):
    for name in ("my_rules:mine", "my_rules:record"):
        with pytest.raises(StremnError, match="policy: expected one of"):
            find_rule(name)                                                  # a name alone imports nothing
        assert import_rule(name) is find_rule(name) is all_rules()[name]
    assert find_rule("my_rules:mine").select.__name__ == "mine" and find_rule("my_rules:record").needs_usage
    assert UpdatePolicy("my_rules:mine").capacity == 6 and looks_at("my_rules:mine") == ["time"]


@pytest.mark.parametrize("name, message", [
    ("my_rules:other", "no attribute 'other'"), ("nowhere:mine", "No module named 'nowhere'"), (":", "module:function"),
    ("my_rules:number", "a Rule or a function of a Request in my_rules, found number = 3"), ("my_rules:", "attribute"),
    ("my_rules:two", "a Rule or a function of a Request in my_rules, found two"), (":mine", "module:function"),
    (".my_rules:mine", "module:function"), ("oldest", "module:function"), ("my_late_rules:mine", "ZeroDivisionError"),
    ("my_bad_rules:mine", "my_bad_rules.py, line 1")])
def test_a_rule_that_is_not_there_is_refused(rule_file, name, message):
    for said in (import_rule, UpdatePolicy().but) if ":" in name else (import_rule,):
        refused(["policy: expected", message], said, name)
    assert name not in ZOO


def test_a_rule_that_returns_something_else_is_named(rule_file):
    segmenter = VideoSegmenter("vos-tiny", "my_rules:number_of_a_slot", slots=3)
    frame, mask = torch.rand(3, 32, 32, generator=make_generator(0)), torch.ones(32, 32, dtype=torch.long)
    for t in range(3):
        segmenter.step(frame, mask if t == 0 else None)
    refused("policy: expected (1, 3) (V,n) from my_rules:number_of_a_slot, found (1,)", segmenter.step, frame)


def test_what_a_person_says_is_imported_and_a_name_in_a_file_is_not(rule_file):
    name = "my_rules:mine"
    refused(f"import_rule('{name}') makes it known", find_rule, name)
    refused(f"import_rule('{name}') makes it known", UpdatePolicy, name)
    refused(f"import_rule('{name}') makes it known", BankConfig, policy=name)
    assert VideoSegmenter("vos-tiny", name).policy.rule == name and find_rule(name).select.__name__ == "mine"
