"""Studies: recipes, rows, records that are re-measured to the same value, and what is skipped."""
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stremn.results import Record
from stremn.experiments.measure import ChameleonEval
from stremn.memory.fusion import FusionConfig
from stremn.experiments.vos import ALONE, BUDGET, RECIPES, SEEDS, SLOT_BYTES, STUDIES, FusionTraining, Recipe, Row, is_there, measure_row, network_of, over_time, run_study, weights_of
from stremn.vos.train import ChameleonTraining, ChameleonPhase
from stremn.train.loop import FitConfig
from refusals import refused

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results" / "records"
CLIP = replace(ALONE.stages[0].clip, frames=5, size=16)
STAGE = ChameleonPhase(2, 1, CLIP)


@pytest.fixture
def small(monkeypatch):
    "Recipes that train in a second, and a study of two rows."
    tiny, fit = ChameleonTraining(stages=(STAGE,), slots=(2,), policies=("oldest",)), FitConfig(save_every=1)
    fused = FusionTraining(stages=(STAGE,), slots=(2,), policies=("oldest",), fusion=FusionConfig())
    monkeypatch.setattr("stremn.experiments.vos.RECIPES", {"base": Recipe(tiny, fit), "alone": Recipe(tiny, fit, "base"),
                                                   "fused": Recipe(fused, fit, "base")})
    test = ChameleonEval(policy="oldest", slots=2, clips=2, clip=CLIP)
    rows = (Row("alone", "alone", test), Row("with", "fused", test), Row("removed", "fused", test, False))
    monkeypatch.setattr("stremn.experiments.vos.STUDIES", {"s": rows})


def test_every_row_has_a_recipe_and_a_name_of_its_own():
    for study, rows in STUDIES.items():
        assert len({row.name for row in rows}) == len(rows) > 1, study
        assert {row.recipe for row in rows} <= RECIPES.keys()
    assert all(r.start is None or r.start in RECIPES for r in RECIPES.values())
    assert len(SEEDS) == 5 and BUDGET // SLOT_BYTES > 100


def test_the_base_never_drops_a_frame_and_knows_no_rule():
    base = RECIPES["base"].training
    assert all(max(base.slots) >= s.clip.frames for s in base.stages)
    alone = {name: r for name, r in RECIPES.items() if name.startswith("only-")}
    assert len({repr(replace(r.training, policies=(), model=base.model)) for r in alone.values()}) == 1


def test_one_slot_is_as_large_as_the_budget_assumes():
    model = network_of("mixed", 0, "runs")
    x = torch.rand(1, 3, 64, 64)
    memories = model.step((), x, 0, torch.ones(1, 1, 64, 64))[1]
    held = sum(t.nbytes for t in (memories[0].keys, memories[0].values, memories[0].updates))
    assert held == SLOT_BYTES


def test_weights_are_trained_once_and_start_where_they_should(small, tmp_path):
    path = weights_of("alone", 1, tmp_path, progress=False)
    assert path == tmp_path / "alone-s1" / "model.safetensors" and (tmp_path / "base-s1" / "model.safetensors").exists()
    stamp = path.stat().st_mtime_ns
    assert weights_of("alone", 1, tmp_path, progress=False).stat().st_mtime_ns == stamp
    card = network_of("alone", 1, tmp_path, progress=False).card["config"]
    assert card["fit"]["seed"] == 1 and card["start"]["task"]["policies"] == ["oldest"]
    refused("unknown recipe", weights_of, "nobody", 0, tmp_path)


def test_a_study_is_resumed_and_says_how_its_weights_were_made(small, tmp_path):
    first = run_study("s", tmp_path / "out", tmp_path / "runs", [0], ["alone"], progress=False)
    rest = run_study("s", tmp_path / "out", tmp_path / "runs", [0], progress=False)
    assert [r.name for r in first] == ["alone"] and [r.name for r in rest] == ["with", "removed"]
    assert rest[0].config["training"]["task"]["fusion"]["target"] == "least_similar"
    assert (rest[0].config["fusing"], rest[1].config["fusing"]) == (True, False)
    assert run_study("s", tmp_path / "out", tmp_path / "runs", [0], progress=False) == []
    again = run_study("s", tmp_path / "again", tmp_path / "runs", [0], progress=False)
    assert [r.metrics for r in again] == [r.metrics for r in first + rest]
    refused("unknown study", run_study, "t3", tmp_path)


def test_a_record_of_another_test_does_not_count(small, tmp_path):
    from stremn.experiments import vos as studies
    row = studies.STUDIES["s"][0]
    record = run_study("s", tmp_path, tmp_path / "runs", [0], ["alone"], progress=False)[0]
    assert is_there("s", row, 0, tmp_path) and not is_there("s", row, 1, tmp_path)
    replace(record, config=record.config | {"slots": 7}).save(tmp_path / "s")
    assert not is_there("s", row, 0, tmp_path)


def test_stretches_of_a_long_video():
    parts = over_time(torch.arange(12.).view(2, 6), ["a", "b"], width=4)
    assert parts == {"J@0001": {"a": 1.5, "b": 7.5}, "J@0005": {"a": 4.5, "b": 10.5}}


@pytest.mark.parametrize(("study", "row"), [("t1-swapped", "first_last"), ("t2-slots", "learned-K02")])
def test_a_stored_number_is_measured_again(study, row):
    "One cheap record of each table that the shipped weights can measure."
    stored = Record.load(RESULTS / study / f"{row}-s0.json")
    wanted = next(r for r in STUDIES[study] if r.name == row)
    assert is_there(study, wanted, 0, RESULTS)
    found = measure_row(study, wanted, 0, network_of("mixed", 0, "runs"))
    assert found.config == stored.config and re.fullmatch(r"[0-9a-f]{8}", found.config_id)
    assert found.clips["J"] == pytest.approx(stored.clips["J"], abs=2e-3)     # other threads, other rounding
    assert found.metrics["J"] == pytest.approx(stored.metrics["J"], abs=5e-4)


def test_a_fusion_network_is_trained_and_measured_again(one_thread, tmp_path):
    """Weights behind Table 6 do not ship; four steps from the shipped ones do, with the module and without.

    The mean gate has all digits of the arithmetic: where it is equal, so is J. Elsewhere two pixels may flip.
    """
    found = {r.name: r for r in run_study("t6-smoke", tmp_path, tmp_path / "runs", [0], progress=False)}
    stored = {name: Record.load(RESULTS / "t6-smoke" / f"{name}-s0.json") for name in ("with", "removed")}
    assert all(is_there("t6-smoke", row, 0, RESULTS) for row in STUDIES["t6-smoke"])
    gate, before = found["with"].clips["open"]["0000"], stored["with"].clips["open"]["0000"]
    assert gate == pytest.approx(before, abs=1e-4) and found.keys() == stored.keys()
    for name, record in found.items():
        assert record.clips["J"] == pytest.approx(stored[name].clips["J"], abs=1e-9 if gate == before else 2e-3), name
    assert found["with"].metrics["J"] != found["removed"].metrics["J"]
