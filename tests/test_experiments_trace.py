"""What the memory keeps: traces against streams, distances against loops, correlations against scipy, records."""
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from stremn.config import to_json
from stremn.data.chameleon import ChameleonConfig
from stremn.data.clips import Clip
from stremn.experiments.grid import run
from stremn.experiments.measure import UNBOUNDED, ChameleonEval, frame_scores
from stremn.experiments.trace import (
    CELLS, Trace, at_decisions, auc_pairs, distance_histogram, distances, distinct_modes, entering_slots,
    eviction_targets, expected_distances, fingerprint, held_modes, histories, iou_matrix, kept_measures, kept_rows,
    logged_rule, measure_kept_frames, measure_kept_row, replay, score_follows, spearman, timeline_record, trace,
    trace_video)
from stremn.memory.rules import RULES, Request
from stremn.memory.similarity import best_match_similarity
from stremn.models.hub import save_weights
from stremn.results import Record
from stremn.vos.stream import VideoSegmenter
from helpers import network
from refusals import refused

CLIP = ChameleonConfig(frames=12, size=32, modes=3, stay=(1, 2), fade=1, lookalikes=1)


@pytest.fixture(scope="module")
def learned(model, clips):
    return trace(model, clips, "learned", 4)


def same(a, b, atol=1e-5):
    "Two traces hold the same numbers."
    assert a.names == b.names
    for name, x, y in zip(Trace._fields[1:], a[1:], b[1:]):
        torch.testing.assert_close(x, y, equal_nan=True, atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------- the trace
@pytest.mark.parametrize("policy", RULES)
def test_a_trace_is_what_the_stream_did(model, clips, policy):
    "Frames, masks' scores, decisions: a watched batch, a watched stream and an unwatched stream agree."
    batch = trace(model, clips[:2], policy, 3, seed=7, batch=1)
    for i, clip in enumerate(clips[:2]):
        row = Trace((clip.name,), *(x[i:i + 1] for x in batch[1:]))
        same(row, trace_video(model, clip, policy, 3, seed=7 + i))
        plain = VideoSegmenter(model, policy, 3, "cpu", 7 + i)
        for t, frame in enumerate(clip.frames):
            plain.step(frame, None if t else clip.masks[0])
            report = plain.memory[0]
            assert [f for f in row.frames[0, t].tolist() if f >= 0] == list(report.frames)
            slot = int(row.slot[0, t])
            assert report.evicted == (None if slot < 0 else int(row.frames[0, t - 1, slot]))
            if policy == "learned" and report.scores is not None:
                scores = [-np.inf if s != s else s for s in row.learned[0, t].tolist()]
                assert np.allclose(scores, report.scores, atol=1e-6)


@pytest.mark.parametrize("policy", [*RULES, UNBOUNDED])
def test_watching_changes_nothing(model, clips, policy):
    some = clips[:3]
    tr = trace(model, some, policy, 3, seed=2, batch=2)
    assert torch.equal(tr.scores, frame_scores(model, some, policy, 3, seed=2, batch=2))
    bare = trace(model, some, policy, 3, seed=2, batch=2, weigh=False)
    assert torch.equal(tr.frames, bare.frames) and torch.equal(tr.slot, bare.slot)
    assert bare.learned.isnan().all() and bare.looks.isnan().all()
    assert (model.bank.policy.rule, model.bank.policy.slots) == ("learned", 3) and not model.training


def test_shapes_and_bookkeeping(learned, clips):
    N, T, K = learned.frames.shape
    assert (N, T, K) == (5, 12, 4) and learned.names == tuple(c.name for c in clips)
    assert (learned.frames[:, :, 0] == 0).all()                                        # the first frame is pinned
    assert (learned.frames.amax(2) == torch.arange(T)).all()                           # the new frame always enters
    decided = learned.asks >= 0
    assert (decided == (torch.arange(T) >= K)).all() and (learned.asks[decided] == torch.arange(K, T).repeat(N)).all()
    assert learned.learned[:, K:, 1:].isfinite().all() and learned.learned[:, :, 0].isnan().all()
    assert torch.equal(learned.slot[:, K:], learned.learned[:, K:].nan_to_num(-9).argmax(2))
    assert torch.equal(learned.modes, torch.stack([c.modes[:, 0] for c in clips]))


def test_similarity_at_the_end_is_that_of_the_memory(model, clips, learned):
    s = VideoSegmenter(model, "learned", 4, "cpu")
    for t, frame in enumerate(clips[3].frames):
        s.step(frame, None if t else clips[3].masks[0])
    keys = s.state.memories[0][0].keys
    for i in range(4):
        for j in range(4):
            wanted = float(best_match_similarity(keys[:, i], keys[:, j:j + 1]))
            found = float(learned.alike[3, i, j])
            assert found != found if i == j else abs(found - wanted) < 1e-5


def test_held_role_the_previous_latest_asks(clips):
    model = network(latest="held")
    tr = trace(model, clips[:2], "learned", 4)
    decided = tr.asks >= 0
    assert (tr.asks[decided] == torch.arange(4, 12).repeat(2) - 1).all()
    same(tr, trace(model, clips[:2], "learned", 4, batch=1))


def test_video_of_another_size_and_other_ids(model, clips):
    "Object 3 in a stream is the first object; a wide frame is no trouble."
    c = clips[0]
    wide = Clip(torch.cat([c.frames, c.frames.flip(3)], 3), torch.cat([3 * c.masks, 0 * c.masks], 2), "wide")
    tr = trace_video(model, wide, "oldest", 3)
    assert sorted(tr.frames[0, -1].tolist()) == [0, 10, 11]
    assert (tr.modes == -2).all() and "distinct" not in kept_measures(tr)
    assert set(score_follows(tr)) == set(score_follows(trace(model, clips, "oldest", 3)))


def test_iou_matrix_against_counting():
    masks = torch.rand(2, 5, 6, 7, generator=torch.Generator().manual_seed(0)) > .6
    masks[0, 1], masks[0, 2] = False, False
    found = iou_matrix(masks)
    for v in range(2):
        for a in range(5):
            for b in range(5):
                both, either = (masks[v, a] & masks[v, b]).sum(), (masks[v, a] | masks[v, b]).sum()
                assert abs(float(found[v, a, b]) - (float(both / either) if either else 1.)) < 1e-6


def test_bad_input(model, clips, learned):
    refused("expected a clip or more", trace, model, [])
    refused("at least 3 frames", trace, model, [Clip(clips[0].frames[:2], clips[0].masks[:2])])
    refused(["policy: expected one of", "'newst'"], trace, model, clips, "newst")
    refused("an object", trace_video, model, Clip(clips[0].frames, 0 * clips[0].masks))
    refused("queries: expected", distances, learned.frames, "some")
    refused("policy: expected", expected_distances, "learned", 10, 3)
    refused("slots: expected 2", expected_distances, "random", 10, 1)
    refused("expected numbers from -1 to 1", replay, [0, 2], 2)


# ---------------------------------------------------------------- distances
def made_history(seed, T, K):
    "A memory that picks victims at random, discards now and then, and pins slot 0."
    rng, held, out = np.random.default_rng(seed), [-1] * K, []
    for t in range(T):
        if t < K:
            held[t] = t
        elif K > 1 and rng.random() < .8:
            held[rng.integers(1, K)] = t
        out.append(list(held))
    return torch.tensor(out)


def by_hand(frames, queries):
    "The sentence of Sec. 4.3 as loops."
    T, K = frames.shape
    d = [0] * T
    size = sum(f >= 0 for f in frames[-1].tolist())
    for q in range(1, T):
        held = [f for f in frames[q - 1].tolist() if f >= 0]
        if queries == "last" and q != T - 1 or queries == "full" and len(held) < size:
            continue
        for f in held:
            if f != 0 and f != q - 1:
                d[q - f] += 1
    return d


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 6), st.sampled_from(["all", "full", "last"]))
def test_distances_against_loops(seed, T, K, queries):
    frames = torch.stack([made_history(seed + i, T, min(K, T)) for i in range(3)])
    d = distances(frames, queries)
    assert [row.tolist() for row in d] == [by_hand(f, queries) for f in frames]
    if queries == "all":                                                               # a survival function
        assert (d[:, 2:].diff(dim=1) <= 0).all()
    h = distance_histogram(frames, queries)
    each = [np.array(by_hand(f, queries)) for f in frames]
    each = [x / x.sum() for x in each if x.sum()]
    assert np.allclose(h, np.mean(each, 0) if each else 0)
    assert abs(float(h.sum()) - bool(each)) < 1e-9


def without_pictures(policy, N, T, K):
    "Frames held by N memories under a rule that looks at nothing."
    frames, g, out = torch.zeros(N, 1, dtype=torch.long), torch.Generator().manual_seed(1), []
    for t in range(T):
        if 0 < t < K:
            frames = torch.cat([frames, torch.full((N, 1), t)], 1)
        if t >= K:
            a = RULES[policy].select(Request(frames=frames, candidates=frames > 0, t=t, offered=t, learned=None,
                                             appearance=None, generator=g))
            frames = torch.where(a > .5, t, frames)
        out.append(torch.nn.functional.pad(frames, (0, K - frames.shape[1]), value=-1))
    return torch.stack(out, 1)


@pytest.mark.parametrize("policy", ["oldest", "random", "reservoir"])
@pytest.mark.parametrize("K", [2, 3, 6])
def test_laws_of_rules_that_look_at_nothing(policy, K):
    N, T = 3000, 25
    d = distances(without_pictures(policy, N, T, K)).double()
    law, spread = expected_distances(policy, T, K), d.std(0) / N**.5
    rare = (law / N).sqrt() + 1 / N                                                    # where hardly any was counted
    assert ((d.mean(0) - law).abs() <= 5 * torch.maximum(spread, rare)).all(), d.mean(0) - law
    if policy == "oldest":
        assert torch.equal(d[0], law)


def test_the_network_under_the_queue_obeys_the_law_exactly(model, clips):
    for K in (2, 3, 5):
        d = distances(trace(model, clips, "oldest", K, weigh=False).frames)
        assert torch.equal(d.double(), expected_distances("oldest", 12, K).expand(5, -1))


# ---------------------------------------------------------------- modes and measures
def test_measures_against_loops(learned, clips):
    m = kept_measures(learned, (2, 4, 8))
    assert set(m) == {"J", "reach", "d02-03", "d04-07", "d08+", "distinct", "distinct_mean", "hidden_mean", "seen",
                      "alike"}
    for i, clip in enumerate(clips):
        modes = clip.modes[:, 0].tolist()
        held = [[modes[f] if f >= 0 else None for f in row] for row in learned.frames[i].tolist()]
        count = [len({x for x in row if x is not None and x >= 0}) for row in held]
        assert distinct_modes(learned)[i].tolist() == count and m["distinct"][i] == count[-1]
        assert abs(m["distinct_mean"][i] - fmean(count[4:])) < 1e-9
        assert abs(m["hidden_mean"][i] - fmean(row.count(-1) for row in held[4:])) < 1e-9
        assert m["seen"][i] == len(set(modes) - {-1})
        d = by_hand(learned.frames[i], "all")
        assert abs(m["reach"][i] - sum(t * n for t, n in enumerate(d)) / sum(d)) < 1e-6
        assert abs(m["d04-07"][i] - sum(d[4:8]) / sum(d)) < 1e-6 and abs(m["d08+"][i] - sum(d[8:]) / sum(d)) < 1e-6
        pairs = [float(learned.alike[i, a, b]) for a in range(4) for b in range(4) if a != b]
        assert abs(m["alike"][i] - fmean(pairs)) < 1e-6
    early = held_modes(learned)[:, 0]
    assert (early[:, 1:] == -3).all() and torch.equal(early[:, 0], learned.modes[:, 0])


# ---------------------------------------------------------------- what the score follows
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_spearman_against_scipy(seed, n):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4, (5, n)).astype(float), rng.integers(0, 4, (5, n)).astype(float)
    x[rng.random((5, n)) < .2] = np.nan
    found = spearman(torch.tensor(x), torch.tensor(y)).numpy()
    for a, b, r in zip(x, y, found):
        a, b = a[~np.isnan(a)], b[~np.isnan(a)]
        if len(a) < 2 or len(set(a)) < 2 or len(set(b)) < 2:
            assert r != r
        else:
            assert abs(r - np.corrcoef(rankdata(a), rankdata(b))[0, 1]) < 1e-9
            assert abs(r - spearmanr(a, b).statistic) < 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_auc_pairs_against_loops(seed, n):
    rng = np.random.default_rng(seed)
    s, yes = rng.integers(0, 4, n).astype(float), rng.random(n) < .5
    s[rng.random(n) < .2] = np.nan
    won = [float(s[i] > s[j]) + .5 * (s[i] == s[j]) for i in range(n) for j in range(n)
           if yes[i] and not yes[j] and s[i] == s[i] and s[j] == s[j]]
    w, pairs = auc_pairs(torch.tensor(s), torch.tensor(yes))
    assert float(w) == sum(won) and int(pairs) == len(won)


def nan_close(a, b):
    return a != a and b != b or abs(a - b) < 1e-6


def test_follows_and_victims_against_loops(learned, clips):
    found, gone = score_follows(learned), eviction_targets(learned)
    for i, clip in enumerate(clips):
        mode, rho, within, won, went = clip.modes[:, 0].tolist(), [], [], [], []
        for t in range(4, 12):
            old = learned.frames[i, t - 1].tolist()
            s, looks = (x[i, t].tolist() for x in (learned.learned, learned.looks))
            rho.append(spearmanr(s[1:], [t - f for f in old[1:]]).statistic)
            match = [k for k in (1, 2, 3) if mode[t] >= 0 and mode[old[k]] == mode[t]]
            if len(match) > 1:
                within.append(spearmanr([s[k] for k in match], [looks[k] for k in match]).statistic)
            if mode[t] >= 0:
                won += [s[a] > s[b] for a in match for b in (1, 2, 3) if mode[old[b]] != mode[t]]
            k = int(learned.slot[i, t])
            went.append((old[k] == max(old[1:]), old[k] == min(old[1:]), looks[k] == max(looks[1:]), k in match))
        assert nan_close(found["age"][i], np.nanmean(rho))
        assert nan_close(found["looks_same_mode"][i], np.nanmean(within) if within else float("nan"))
        assert nan_close(found["mode"][i], fmean(won) if won else float("nan"))
        for name, share in zip(("newest", "oldest", "most_similar", "same_mode"), np.mean(went, 0)):
            assert nan_close(gone[f"goes_{name}"][i], share), name


def test_known_answers(model, clips):
    "Rule F is perfectly correlated with looks; the queue always deletes the oldest; age ranks against itself."
    f = trace(model, clips, "most_similar", 4)
    assert np.allclose(eviction_targets(f)["goes_most_similar"], 1)
    assert np.allclose(score_follows(f._replace(learned=f.looks))["looks"], 1)
    age, overlap, _ = at_decisions(f)
    assert np.allclose(score_follows(f._replace(learned=age.float().masked_fill(f.looks.isnan(), torch.nan)))["age"], 1)
    assert ((overlap >= 0) & (overlap <= 1) | overlap.isnan()).all() and (age[~age.isnan()] > 0).all()
    assert np.allclose(eviction_targets(trace(model, clips, "oldest", 4))["goes_oldest"], 1)
    assert np.allclose(eviction_targets(trace(model, clips, "newest", 4))["goes_newest"], 1)


def test_watched_answers_first_and_asks_once():
    calls = []
    one = torch.tensor([[0, 4, 7]])
    ask = Request(frames=one, candidates=one > 0, t=8, offered=8, learned=lambda: calls.append("l") or torch.rand(1, 3),
                  appearance=lambda: calls.append("a") or torch.rand(1, 3))
    log = []
    logged_rule(RULES["learned"], log).select(ask)
    assert calls == ["l", "a"] and len(log) == 1 and log[0].t == 8 and log[0].asks.tolist() == [8]
    logged_rule("oldest", log, weigh=False).select(ask)
    assert calls == ["l", "a"] and log[1].slot.tolist() == [1]
    logged_rule(lambda r: torch.zeros(1, 3), log, weigh=False, held=True).select(ask)
    assert log[2].slot.tolist() == [-1] and log[2].asks.tolist() == [7]
    for name, rule in RULES.items():                                                  # what a rule needs stays with it
        logged = logged_rule(name, log)
        assert (logged.capacity, logged.needs_usage) == (rule.capacity, rule.needs_usage)


# ---------------------------------------------------------------- records
def test_histories_round_trip(model, clips, tmp_path):
    traces = {p: trace(model, clips, p, 3, weigh=False) for p in RULES}
    record = timeline_record(clips[1].name, traces, {"protocol": "tiny"})
    back = histories(Record.load(record.save(tmp_path)))
    assert list(back) == sorted(RULES)
    for policy, h in back.items():
        assert torch.equal(h, traces[policy].frames[1])
        assert torch.equal(replay(entering_slots(h), 3), h)
    held = trace(network(latest="held"), clips[:1], "learned", 4, weigh=False).frames[0]
    refused("expected a history", entering_slots, held)


def test_the_study_goes_on_where_it_stopped(model, tmp_path):
    small = ChameleonEval(clips=3, clip=replace(CLIP, frames=9))
    file, out = save_weights(model, tmp_path / "w.safetensors", {}), tmp_path / "out"
    cells = [("learned", 3), ("oldest", 3), ("first_last", 3)]
    def kept(n):
        rows = kept_rows(str(file), small, cells[:n])
        return run(rows, [4], out, "runs", measure_kept_row, progress=False)
    first = kept(2)
    assert [r.name for r in first] == ["learned-K3", "oldest-K3"] and {r.seed for r in first} == {4}
    assert "looks" in first[0].clips and "looks" not in first[1].clips and first[0].config["weights"] == "w"
    assert first[0].config["study"] == "kept" and first[0].config["batch"] == 10
    assert str(tmp_path) not in (out / "learned-K3-s4.json").read_text()
    stamps = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert [r.name for r in kept(3)] == ["first_last-K3"] and kept(3) == []
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items()) and len(list(out.iterdir())) == 3
    save_weights(model, file, {"other": 1})                                            # other bytes: measured again
    again, = kept(1)
    assert again.config["fingerprint"] == fingerprint(str(file)) != first[0].config["fingerprint"]
    assert again.metrics == first[0].metrics


def test_a_cell_holds_what_the_trace_says(model, clips):
    c = ChameleonEval(clips=5, policy="learned", slots=3, clip=CLIP)
    record = measure_kept_frames(model, c, clips)
    tr = trace(model, clips, "learned", 3, c.seed)
    assert record.config == to_json(c) and record.protocol == "tiny"
    assert abs(record.metrics["J"] - float(tr.scores.mean())) < 1e-4
    h = distance_histogram(tr.frames)
    assert all(abs(record.metrics[f"d{t:03d}"] - float(h[t])) < 1e-6 for t in range(2, 12))
    assert abs(sum(record.metrics[f"d{t:03d}"] for t in range(2, 12)) - 1) < 1e-5
    assert list(record.clips["J"]) == [x.name for x in clips]


def test_cells_cover_figure_5_and_every_rule():
    assert {k for p, k in CELLS if p == "learned"} == {3, 4, 5, 6, 7}
    assert {p for p, k in CELLS if k == 4} == set(RULES) and len(set(CELLS)) == len(CELLS)
