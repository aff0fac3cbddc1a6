"The benchmark: a whole frame is network plus memory, records come again, verdicts are computed."
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stremn.config import from_json
from stremn.experiments.benchmark import (COSTS, QUICK, CostEval, bench, claims, draw_costs, feature_grid, flatten,
                                          measure_costs, measured_crossing, needed_bytes, nested, network_work,
                                          passes_one, series, sizes_in, speedups)
from stremn.experiments.cost import (METHODS, Sizes, count_flops, filled, held_bytes, linear_slots, sizes_of,
                                     step_flops, steps, with_linear_memory)
from stremn.memory.bank import MemoryBank
from stremn.models.hub import load
from stremn.models.presets import paper_vos
from stremn.models.vos import VOSModel
from stremn.results import Record, load_records
from stremn.train.profile import peak_bytes
from helpers import UNEQUAL_BANK
from refusals import refused

STORED = Path(__file__).resolve().parent.parent / "nbs" / "results" / "records" / "complexity"
RECORDS = {r.name: r for r in load_records(STORED)} if STORED.is_dir() else {}


@pytest.mark.parametrize("name", ["vos-tiny", "vos-small"])
@pytest.mark.parametrize("size", [(50, 70), (64, 64)])
def test_the_whole_network_is_network_plus_memory(name, size):
    "`vos-small` is padded to a multiple of 16 and has features at stride 8: these are two numbers."
    model = load(name)
    work, grid = network_work(model, size, 2)
    s = sizes_of(replace(model.bank.config, slots=5), grid[0] * grid[1], 2)
    policy = model.bank.policy.but(slots=5)
    for net, method in ((model, "ours"), (with_linear_memory(model), "stm")):
        n = linear_slots(31) if method == "stm" else 5
        memory = filled(net.bank, list(range(31 - n, 31)), grid, 2, method != "stm")
        whole = count_flops(lambda net=net, m=memory: net.step((m,), torch.rand(1, 3, *size), 31, policy=policy))
        assert whole == count_flops(work) + step_flops(s, method, 31)


@pytest.mark.parametrize(("name", "grid"), [("vos-tiny", (13, 18)), ("vos-small", (8, 10))])
def test_the_grid_is_that_of_the_features(name, grid):
    model = load(name)
    assert feature_grid(model, (50, 70)) == grid
    memory = model.step((), torch.rand(1, 3, 50, 70), 0, torch.ones(1, 1, 50, 70))[1][0]
    assert memory.keys.shape[-2:] == grid


def test_numbers_are_flat_in_a_record_and_nested_outside():
    numbers = {"stm": {"seconds": {10: .5, 200: .7}}, "rest": {"flops": 3}, "wall": {"over": {"cpu": 1.}}}
    flat = flatten(numbers)
    assert flat == {"stm.seconds.10": .5, "stm.seconds.200": .7, "rest.flops": 3, "wall.over.cpu": 1.}
    assert nested(flat) == numbers
    assert flatten({"a": {"s": {1: [2., 3.]}}}) == {"a.s.1": {"round-00": 2., "round-01": 3.}}
    for record in RECORDS.values():
        assert flatten(nested(record.metrics)) == record.metrics


def test_the_papers_network_has_the_sizes_assumed():
    with torch.device("meta"):
        model = VOSModel(paper_vos())
    assert sizes_of(model.bank.config, 30 * 54) == Sizes() and model.feature_stride == 16


@pytest.mark.parametrize("config", [UNEQUAL_BANK, replace(UNEQUAL_BANK, shared_keys=True, similarity="l2")])
@pytest.mark.parametrize("T", [20, 120])
def test_read_bytes_lead_the_peak(config, T):
    s = sizes_of(config, 400)
    for method, (work, held) in steps(MemoryBank(config).eval(), (20, 20), T).items():
        if method != "reencode":
            needed = needed_bytes(s, method, T)
            assert .9 < needed / (held + peak_bytes(work)) < 1.05


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(.1, 10), min_size=1, max_size=8))
def test_passes_one(ratios):
    T = [10 * (i + 1) for i in range(len(ratios))]
    t = passes_one(T, ratios)
    if max(ratios) <= 1:
        assert t == math.inf
    else:
        i = next(i for i, r in enumerate(ratios) if r > 1)
        assert (t == T[0]) if i == 0 else T[i - 1] <= t <= T[i]


def test_intervals_hold_the_truth():
    inside = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rounds = {f"{m}.seconds.{T}": {str(i): v * math.exp(.1 * rng.normal()) for i in range(9)}
                  for T in (10, 30, 50, 70) for m, v in (("stm", T), ("ours", 40))}
        r = Record("made", {k: float(np.median([*v.values()])) for k, v in rounds.items()}, {}, 0, 0., rounds)
        x = measured_crossing(r, draws=300)
        inside += x.lo <= 40 <= x.hi
    assert inside >= 34


@pytest.fixture(scope="module")
def quick():
    return replace(QUICK, size=(32, 32), frames=(10, 60), rounds=2, few=1)


def test_a_record_says_everything_and_comes_again(quick, tmp_path):
    a, b = measure_costs(quick, False), measure_costs(quick, False)
    a.save(tmp_path)
    assert Record.load(tmp_path / "tiny-cpu-s0.json") == a and sizes_in(a).pixels == 64
    for key, value in a.metrics.items():
        if "seconds" not in key and "load" not in key and "wall" not in key:
            assert b.metrics[key] == value, key
    assert {k.split(".")[0] for k in a.metrics} == {*METHODS, "rest", "load", "wall"}
    assert len(a.clips["stm.seconds.60"]) == 2 and draw_costs(a).axes[0].get_xscale() == "log"


def test_what_does_not_fit_is_left_out_and_said(quick):
    s = Sizes()
    assert needed_bytes(s, "stm", 2000) > COSTS["paper"].budget >= needed_bytes(s, "stm", 1000)
    r = measure_costs(replace(quick, budget=900_000), False)
    assert 60 not in series(r, "stm", "peak") and 60 in series(r, "ours", "peak")
    text = speedups([r])
    assert "budget 0.0009 GB" in text and "tiny-cuda" in text and "not run" in text


def test_bench_quick(tmp_path):
    report = bench(tmp_path / "out", quick=True, progress=False)
    assert report.is_file() and (tmp_path / "out" / "tiny-cpu.png").stat().st_size > 5000
    assert "From which frame on" in report.read_text() and len(load_records(tmp_path / "out" / "records")) == 1


def test_verdicts_are_computed():
    def rows(stm, ours):
        rounds = {f"{m}.seconds.{T}": {"0": v(T)} for T in (10, 40, 100) for m, v in
                  (("stm", stm), ("ours", ours), ("rule", ours), ("reencode", ours))}
        numbers = {k: v["0"] for k, v in rounds.items()}
        numbers |= {k.replace("seconds", "peak"): v for k, v in numbers.items()}
        r = Record("made", numbers, CostEval(), 0, 0., rounds)
        return [line for line in claims([r], ["made", "other"]).splitlines() if "seconds" in line or "other" in line]

    early, late, never = (rows(lambda T: T, lambda T, c=c: c) for c in (20., 80., 1e9))
    assert all("reproduced |" in x and "not" not in x for x in early[:-1]) and early[-1].endswith("not run |")
    assert all("| 80 |" in x and x.endswith("not reproduced |") for x in late[:-1])
    assert all("after 100" in x and x.endswith("not reproduced |") for x in never[:-1])


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_stored_records_come_again(name):
    record = RECORDS[name]
    s, gamma = sizes_in(record), record.config["gamma"]
    for m in METHODS:
        assert all(v == step_flops(s, m, T, gamma) for T, v in series(record, m, "flops").items())
        assert all(v == held_bytes(s, m, T, gamma) for T, v in series(record, m, "held").items())
    if record.name == "tiny-cpu" and record.versions["torch"] == torch.__version__:
        c = from_json(CostEval, record.config)
        again = measure_costs(replace(c, frames=(10, 60), rounds=1, few=1), False)
        for key, value in again.metrics.items():
            if ".peak" in key or ".flops" in key:
                assert record.metrics[key] == value, key


def test_what_cannot_be_measured_is_refused(tmp_path):
    refused("frames: expected one or more, each at least slots=6", CostEval, frames=(3,))
    refused("rounds", CostEval, rounds=0)
    refused("networks: expected some of tiny, paper, found huge", bench, tmp_path, networks=["huge"])
    refused("expected a folder to make, found a file", bench, __file__, quick=True)
