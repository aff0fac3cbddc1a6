"""Diagnosis: replayed decisions against the bank's and the network's own, hits and regret against counting."""
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from helpers import network
from refusals import refused
from stremn.core import make_generator
from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.data.clips import Clip, one_hot_objects
from stremn.experiments.diagnose import (
    DIAGNOSED, KEY, PLAIN_KEY, PairTable, agreement, cached_templates, diagnose_clip, diagnose_source,
    diagnosis_report, diagnosis_rows, diagnosis_table, draw_diagnosis, eviction_costs, known, measure_diagnosis,
    modes_known, regret, return_hits, returns, save_timelines, shown_before, simulate, true_modes)
from stremn.experiments.grid import run, up_to_date
from stremn.experiments.measure import (
    BELADY, ORACLES, UNBOUNDED, ChameleonEval, evaluate_chameleon, held_out_clips, policy_for)
from stremn.experiments.trace import trace
from stremn.memory.bank import UpdatePolicy
from stremn.memory.coverage import all_matches, weighted_pixels
from stremn.memory.rules import RULES, all_rules, pick
from stremn.models.hub import load
from stremn.results import Record, load_records

CLIP = ChameleonConfig(frames=24, size=32, modes=3, stay=(1, 3), fade=1, hide=1, lookalikes=1)
STORED = Path(__file__).resolve().parent.parent / "nbs" / "results" / "records" / "diagnosis"
RULE_NAMES = list(all_rules())
ROLES = [{}, {"latest": "held"}, {"pinned": 0}, {"every": 2}, {"latest": "held", "every": 3}]


@pytest.fixture(scope="module")
def cache(model, clips):
    return cached_templates(model, clips)


# ---------------------------------------------------------------- templates and tables
@pytest.mark.parametrize("weighted", [False, True])
def test_a_pair_table_holds_what_all_frames_together_give(weighted):
    g = make_generator(0)
    maps, weights = torch.randn(2, 6, 5, 3, 4, generator=g), torch.rand(2, 6, 3, 4, generator=g)
    weights[1, 2] = 0
    table = PairTable(maps, weights if weighted else None)
    whole = all_matches(weighted_pixels(maps, weights if weighted else None))              # (2,6,6,12)
    for _ in range(20):
        clip = torch.randint(2, (3,), generator=g)
        frames = torch.stack([torch.randperm(6, generator=g)[:4] for _ in range(3)])
        want = torch.stack([whole[c][f][:, f] for c, f in zip(clip, frames)])
        torch.testing.assert_close(table(clip, frames), want)
    assert table.used == 2 * 6 + 2 * 2 * 15                        # every pair once, both ways


def test_templates_are_those_of_a_network_that_is_told_the_truth(model, clips, cache):
    "Frame by frame through the network's own step, with known masks."
    for i, clip in enumerate(clips[:2]):
        masks = one_hot_objects(clip.masks, clip.ids[:1])
        for t in (0, 5, 23):
            memory, = model.step((), clip.frames[None, t], t, masks[None, t],
                                 policy=model.bank.policy.but("coverage_object"))[1]
            for name in ("keys", "updates", "masks"):
                torch.testing.assert_close(getattr(cache, name)[i, t], getattr(memory, name)[0, 0])
    again = cached_templates(model, clips, chunk=7)
    torch.testing.assert_close(again.keys, cache.keys)
    torch.testing.assert_close(again.masks, cache.masks)


def test_templates_of_a_frame_that_does_not_fit_the_grid(model):
    clip = chameleon(3, replace(CLIP, size=30))
    cache = cached_templates(model, [clip])
    memory, = model.step((), clip.frames[None, 4], 4, one_hot_objects(clip.masks, [1])[None, 4])[1]
    torch.testing.assert_close(cache.keys[0, 4], memory.keys[0, 0])
    assert cache.masks.shape[-2:] == cache.keys.shape[-2:]


# ---------------------------------------------------------------- replay
def by_the_bank(cache, policy, generator=None):
    "(N,T,K) frames held when the bank itself is given the templates."
    bank, rows, memory, held = cache.model.bank, torch.arange(len(cache.clips)), None, []
    with torch.no_grad():
        for t in range(cache.keys.shape[1]):
            memory = bank.write(memory, cache.template(rows, t), t, None, generator, policy)
            held.append(memory.frames)
    K = max(h.shape[1] for h in held)
    return torch.stack([torch.nn.functional.pad(h, (0, K - h.shape[1]), value=-1) for h in held], 1)


@pytest.mark.parametrize("roles", ROLES, ids=str)
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_replay_is_what_the_bank_does(model, cache, rule, roles):
    policy = policy_for(model, rule, 4, **roles)
    want = by_the_bank(cache, policy, make_generator(3))
    found = simulate(cache, rule, 4, seed=3, **roles)
    assert torch.equal(found[:, :, :want.shape[2]], want) and (found[:, :, want.shape[2]:] == -1).all()


@pytest.mark.parametrize("rule", ["oldest", "learned", "diversity", "coverage_object", "lfu"])
def test_a_replay_is_what_a_network_does_that_is_told_the_truth(model, clips, cache, rule):
    policy, found = policy_for(model, rule, 3), simulate(cache, rule, 3)
    frames = torch.stack([c.frames for c in clips])
    masks = torch.stack([one_hot_objects(c.masks, c.ids[:1]) for c in clips])              # (5,T,1,H,W)
    memories = ()
    with torch.no_grad():
        for t in range(CLIP.frames):
            memories = model.step(memories, frames[:, t], t, masks[:, t], policy=policy)[1]
            assert torch.equal(found[:, t, :memories[0].slots], memories[0].frames)


@pytest.mark.parametrize("rule", ["random", "reservoir", "oldest", UNBOUNDED])
def test_rules_that_look_at_nothing_hold_what_they_hold_in_a_trace(model, clips, cache, rule):
    "The same draws, clip by clip and batch by batch."
    assert torch.equal(simulate(cache, rule, 4, seed=5, batch=2), trace(model, clips, rule, 4, seed=5, batch=2).frames)


def test_own_rules_and_noise(model, cache):
    def by_hand(r): return pick(r.frames % 3, r.candidates)
    assert torch.equal(simulate(cache, by_hand, 4), by_the_bank(cache, model.bank.policy.but(by_hand, 4)))
    quiet, loud = (simulate(cache, "learned", 4, noise=n) for n in ("never", "always"))
    assert not torch.equal(quiet, loud) and not model.training
    assert torch.equal(loud, by_the_bank(cache, policy_for(model, "learned", 4, noise="always"), make_generator(0)))


def test_slots_of_the_network_and_none_to_choose_from(model, cache):
    assert simulate(cache, "oldest").shape[2] == model.bank.config.slots
    assert (simulate(cache, "newest", 1) == 0).all()               # the pinned slot alone
    assert torch.equal(simulate(cache, "newest", 2)[:, 1:, 1], torch.arange(1, 24).expand(5, -1))


# ---------------------------------------------------------------- hits and regret, by counting
def random_story(rng, T):
    "Modes of a target that comes, goes and changes."
    modes, m = [], 0
    while len(modes) < T:
        m = rng.choice([-1, 0, 1, 2])
        modes += [m] * rng.randint(1, 4)
    return [max(modes[0], 0), *modes[1:T]]


def random_history(rng, T, K, pinned, latest, every):
    "Frames held by a memory that chooses at random, and now and then discards."
    held, out = [], []
    for t in range(T):
        free = [k for k in range(pinned, len(held)) if latest == "competes" or held[k] != max(held)]
        if len(held) < K and (latest == "held" or t % every == 0):
            if latest == "held" and len(held) > pinned and max(held) % every:
                held[held.index(max(held))] = t
            else:
                held.append(t)
        elif latest == "competes":
            if t % every == 0 and free and rng.random() < .8:
                held[rng.choice(free)] = t
        elif len(held) > pinned:
            newest = held.index(max(held))
            if max(held) % every == 0 and free and rng.random() < .8:
                held[rng.choice(free)] = held[newest]
            held[newest] = t
        out.append(held + [-1] * (K - len(held)))
    return out


def counted_regret(history, modes, pinned, latest, every):
    "(paid, regret) at every step, by counting over the script."
    T, paid, sorry = len(modes), [], []
    for t in range(T):
        old = [f for f in history[t - 1] if f >= 0] if t else []
        new = [f for f in history[t] if f >= 0]
        gone = [f for f in [*old, t] if f not in new]
        if len(new) > len(old) or not gone:
            paid.append(0)
            sorry.append(0)
            continue

        def cost(x, t=t, old=old):
            if modes[x] < 0 or modes[x] in [modes[f] for f in [*old, t] if f != x]:
                return 0
            vain = 0
            for s in range(t + 1, T):
                if modes[s] == modes[x]:
                    vain += 1
                    if latest == "held" or s % every == 0:
                        break
            return vain
        passing = max(old) % every if latest == "held" else t % every
        slots = [f for k, f in enumerate(history[t - 1]) if k >= pinned and f >= 0]
        options = set() if passing else {f for f in slots if latest == "competes" or f != max(old)}
        paid.append(cost(gone[0]))
        sorry.append(paid[-1] - min(cost(x) for x in options | {gone[0]}))
    return paid, sorry


@pytest.mark.parametrize("latest", ["competes", "held"])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("pinned", [0, 1, 2])
def test_costs_and_regret_against_counting(latest, every, pinned):
    rng, seen = random.Random(every + 10 * pinned), 0
    roles = UpdatePolicy("oldest", 3, pinned=pinned, latest=latest, every=every)
    for K in (3, 3, 4, 5) * 3:
        modes = random_story(rng, 30)
        history = random_history(rng, 30, K, pinned, latest, every)
        frames, script = torch.tensor([history]), torch.tensor([modes])
        paid, sorry = counted_regret(history, modes, pinned, latest, every)
        costs = eviction_costs(frames, script, roles)
        assert costs.paid[0].tolist() == paid and costs.regret[0].tolist() == sorry
        assert torch.equal(regret(frames, script, roles), costs.regret) and min(sorry) >= 0
        seen += sum(sorry)
    assert seen > 0


@pytest.mark.parametrize("seed", range(8))
def test_hits_and_modes_known_against_counting(seed):
    rng = random.Random(seed)
    stories = [random_story(rng, 25) for _ in range(3)]
    histories = [random_history(rng, 25, 4, 1, "competes", 1) for _ in range(3)]
    frames, modes = torch.tensor(histories), torch.tensor(stories)
    for i, (history, story) in enumerate(zip(histories, stories)):
        back, hit, could, did = 0, 0, 0, 0
        for t in range(1, 25):
            knows = story[t] in [story[f] for f in history[t - 1] if f >= 0]
            if story[t] < 0 or story[t] not in story[:t]:
                continue
            could, did = could + 1, did + knows
            if story[t - 1] == -1:
                back, hit = back + 1, hit + knows
        for found, (part, whole) in ((return_hits, (hit, back)), (modes_known, (did, could))):
            share = float(found(frames, modes)[i])
            assert share == pytest.approx(part / whole) if whole else share != share


@pytest.mark.parametrize("latest", ["competes", "held"])
def test_costs_add_up_to_the_frames_that_look_in_vain(cache, latest):
    "Every frame whose mode was shown and is not held is charged to one decision."
    modes, some = true_modes(cache.clips), 0
    for rule in (*RULE_NAMES, BELADY):
        held = simulate(cache, rule, 4, latest=latest)
        costs = eviction_costs(held, modes, UpdatePolicy(latest=latest))
        vain = shown_before(modes) & ~known(held, modes)
        assert torch.equal(costs.paid.sum(1).long(), vain.sum(1))
        some += int(vain.sum())
    assert some > 0


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_nobody_has_less_to_regret_than_the_oracle(cache, slots):
    modes = true_modes(cache.clips)
    lost = {rule: regret(simulate(cache, rule, slots), modes).sum() for rule in (*RULE_NAMES, BELADY)}
    assert lost[BELADY] == 0 and max(lost.values()) > 0
    best = modes_known(simulate(cache, BELADY, slots), modes).nanmean()
    assert all(modes_known(simulate(cache, r, slots), modes).nanmean() <= best for r in RULE_NAMES)


def test_every_oracle_of_a_measurement_can_be_replayed(cache):
    "Which of two twins goes costs nothing, and is another choice."
    modes, held = true_modes(cache.clips), {name: simulate(cache, name, 3) for name in ORACLES}
    assert all(regret(h, modes).sum() == 0 for h in held.values())
    assert not torch.equal(held[BELADY], held["oracle_newest"])


def test_a_memory_with_room_regrets_nothing(cache):
    modes, held = true_modes(cache.clips), simulate(cache, UNBOUNDED)
    assert regret(held, modes).sum() == 0 and (eviction_costs(held, modes).gone == -1).all()
    assert (return_hits(held, modes)[returns(modes).any(1)] == 1).all() and torch.equal(
        known(held, modes), shown_before(modes))


# ---------------------------------------------------------------- one clip
@pytest.fixture(scope="module")
def found(model, clips):
    return diagnose_clip(clips[1], model, ("oldest", "newest", "reservoir", BELADY), 3)


def test_the_report_says_what_was_counted(found):
    lines, modes = diagnosis_report(found).splitlines(), found.clip.modes[None, :, 0]
    assert max(map(len, lines)) <= 120 and KEY in lines
    start = lines[7 if lines[6] == "" else 8].index("0")
    line = next(x for x in lines if x.startswith("target"))[start:]
    assert line == "".join("." if m < 0 else "ABC"[m] for m in modes[0].tolist())
    for policy, held in found.held.items():
        row, marks = (x for x in lines if x.startswith(f"{policy} "))
        marks = marks[start:].ljust(len(line))
        knew, back = known(held[None], modes)[0], returns(modes)[0]
        sorry = regret(held[None], modes)[0]
        assert f"{int((knew & back).sum())} of {int(back.sum())}" in row
        assert re.split(r"  +", row)[3] == str(int(sorry.sum()))
        assert row.endswith("  " + ", ".join(map(str, sorted(held[-1].tolist()))))
        costly = [int(x.split("step ")[1].split(":")[0]) for x in lines if x.startswith(f"{policy}, step")]
        assert costly == [t for t, m in enumerate(marks) if m == "!"] == sorry.nonzero()[:, 0].tolist()
        for t, m in enumerate(marks):
            assert m in "!" if sorry[t] else (m == ("+" if knew[t] else "x")) if back[t] else m in " -"
    assert any(x.startswith("newest, step") for x in lines) and not any(x.startswith("oracle, step") for x in lines)


def test_a_costly_decision_is_explained(model):
    clip = chameleon(1_000_029)
    lines = diagnosis_report(diagnose_clip(clip, model, ["oldest"], 4)).splitlines()
    assert lines[-3] == ("oldest, step 23: frame 20 (B) goes, frame 44 will look for it in vain; "
                         "frame 22 (C) would have cost 0")


def test_long_clips_are_folded(model):
    clip = chameleon(1, replace(CLIP, frames=130, size=16))
    lines = diagnosis_report(diagnose_clip(clip, model, ["oldest"], 3)).splitlines()
    assert sum(x.startswith("target") for x in lines) == 2 and any(x.split() == ["frame", "100", "110", "120"]
                                                                    for x in lines)
    assert max(map(len, lines)) <= 120


def test_without_modes_the_timeline_is_left(model, clips):
    clip = Clip(clips[0].frames, 5 * clips[0].masks, "real")
    d = diagnose_clip(clip, model, ["oldest"], 3)
    lines = diagnosis_report(d).splitlines()
    shown = "".join("o" if m >= 0 else "." for m in clips[0].modes[:, 0].tolist())
    assert lines[-1] == PLAIN_KEY and lines[-3].endswith(" " + "12" * 10 + "1") and lines[-4].endswith(shown)
    assert "regret" not in lines[2] and lines[3].endswith("0, 22, 23")
    hidden = [sum(shown[f] == "." for f in h if f >= 0) for h in d.held["oldest"].tolist()]
    assert f"  {sum(hidden) / len(hidden):.1f}  " in lines[3]
    assert len(draw_diagnosis(d, "oldest").axes) == 1


def test_figures_mark_costly_decisions_and_returns(found, tmp_path):
    files = save_timelines(found, tmp_path / "a" / "b")
    assert [f.name for f in files] == [f"timeline-{p}.png" for p in found.held] and all(f.is_file() for f in files)
    ax = draw_diagnosis(found, "newest").axes[0]
    rings, = (x for x in ax.lines if x.get_marker() == "o")
    costs = found.costs["newest"]
    steps = costs.regret[0].nonzero()[:, 0].tolist()
    assert len(steps) > 0 and list(rings.get_xdata()) == steps
    gone = [set(found.held["newest"][t - 1].tolist()) - set(found.held["newest"][t].tolist()) for t in steps]
    assert [{int(y)} for y in rings.get_ydata()] == gone
    dashed = [x.get_xdata()[0] for x in ax.lines if x.get_linestyle() == "--"]
    assert dashed == returns(found.clip.modes[None, :, 0])[0].nonzero()[:, 0].tolist()


def test_bad_input(model, clips):
    bare = [Clip(c.frames, c.masks, c.name) for c in clips[:2]]
    refused("modes: expected synthetic clips", simulate, cached_templates(model, bare), BELADY)
    refused(["policy: expected one of", "'newst'"], simulate, cached_templates(model, bare), "newst")
    refused("expected a clip or more", cached_templates, model, [])
    refused("expected an object", diagnose_clip, bare[0]._replace(masks=0 * bare[0].masks), model)
    half = bare[0].masks.clone()
    half[3] = -1
    refused("found none for frame 3", diagnose_clip, bare[0]._replace(masks=half), model)
    refused("policies: expected one or more", diagnose_clip, clips[0], model, ())
    refused("slots: expected 1 or more, found 0", diagnose_source, slots=0)
    refused("policy: expected one of", diagnose_source, policies=["best"])


# ---------------------------------------------------------------- the study
def test_a_record_holds_both_sides_and_is_recognised(tmp_path, monkeypatch):
    model = network(slots=4)
    c = ChameleonEval(clips=3, clip=CLIP, slots=3)
    rows = [replace(r, note=r.note | {"fingerprint": "x"}) for r in diagnosis_rows(c, ["random", BELADY])]
    made = run(rows, [0], tmp_path, "runs", measure_diagnosis, lambda row, seed, runs: model, progress=False)
    for row, r in zip(rows, made):
        plain, _ = evaluate_chameleon(row.test, model)
        assert r.metrics["J"] == plain.metrics["J"] and r.clips["J_visible"] == plain.clips["J_visible"]
        assert up_to_date(Record.load(tmp_path / f"{row.name}-s0.json"), row, 0)
        assert set(r.metrics) > {"return_hits", "modes_known", "regret", "cpu_policy", "cpu_templates"}
    clips = held_out_clips(c)
    held = simulate(cached_templates(model, clips), "random", 3)
    want = regret(held, true_modes(clips)).sum(1)
    assert made[0].clips["regret"] == {x.name: float(v) for x, v in zip(clips, want)}
    assert made[0].metrics["regret"] == pytest.approx(float(want.mean())) and made[1].metrics["regret"] == 0
    order = [line.split("|")[1].strip() for line in diagnosis_table(made).splitlines()[2:]]
    assert order == [r.name for r in sorted(made, key=lambda r: -r.metrics["J"])]


def test_agreement_is_the_rank_correlation():
    g = random.Random(0)
    records = [Record(f"r{i}", {"J": g.random(), "x": g.choice([.1, .2, .3])}, {}, 0, 0.) for i in range(9)]
    want = spearmanr([r.metrics["J"] for r in records], [r.metrics["x"] for r in records]).statistic
    assert agreement(records, "x") == pytest.approx(want)


def test_what_the_stored_records_show():
    "Modes known ranks all policies as J does; return hits do so less well, because of one rule."
    records = load_records(STORED)
    assert {r.name for r in records} == set(DIAGNOSED) and len(records) >= 12
    assert set(RULES) < set(DIAGNOSED) and all(len(r.clips["J"]) == 40 for r in records)
    assert agreement(records, "modes_known") >= .9
    hits = [agreement([r for r in records if r.name != without], "return_hits") for without in ("", "reservoir")]
    assert hits[0] < hits[1] < .9
    assert {r.name for r in records if r.metrics["regret"] == 0} == {BELADY, "first_last"}   # one of them has no choice


def test_the_stored_diagnosis_comes_again():
    records, names = {r.name: r for r in load_records(STORED)}, [f"chameleon-{1_000_000 + i}" for i in range(10)]
    clips = held_out_clips(ChameleonEval(clips=10))
    cache, modes = cached_templates(load("vos-tiny"), clips), true_modes(clips)
    for rule in ("random", "diversity_object"):
        found = regret(simulate(cache, rule, 4), modes).sum(1).tolist()
        assert found == [records[rule].clips["regret"][n] for n in names]
