"Equal time for every network, rows that know what was measured, films and made clips through one door."
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refusals import refused
from stremn.experiments import prediction as contest
from stremn.experiments import measure
from stremn.prediction import train as forecasting
from stremn.experiments.prediction import EQUAL_TIME, NETWORKS, CONTESTS, Network, Row, is_measured, recipe_of, trained_network, run_contest
from stremn.prediction.train import RECIPES, dry_run, prediction_task
from stremn.data.prediction import PREDICTION_DATA
from stremn.data.walkers import WalkersConfig
from stremn.experiments.measure import PredictionEval
from stremn.prediction.train import PredictionPhase, PredictionTraining
from stremn.memory.bank import BankConfig
from stremn.models.prediction import PredictionConfig, PredictionModel
from stremn.models.recall import RecallConfig
from stremn.models.prediction_baselines import ConvLSTM, ConvLSTMConfig, SimVP
from stremn.results import load_records
from stremn.train.loop import FitConfig, Recipe

BANK = BankConfig(memory_channels=12, query_channels=12, key_channels=8, value_channels=12, update_channels=8,
                  slots=3, pinned=0, similarity="l2", shared_keys=True)
NET = PredictionConfig(widths=(8, 12), strides=(2, 2), groups=4, bank=BANK)
PIXELS = RecallConfig(widths=(8, 12), strides=(2, 2), groups=4, bank=replace(BANK, locality=1.))
CLIP = WalkersConfig(size=16, aspect=1., scenarios=("outdoor",))
FAST = FitConfig(lr=1e-3, warmup=1, save_every=1)
RESULTS = Path(__file__).resolve().parent.parent / "nbs/results/records"


@pytest.fixture
def little(monkeypatch):
    "The tiny protocol, a thousand times smaller."
    training = PredictionTraining(NET, observed=4, stages=(PredictionPhase(2, 1, 2),), slots=(3,), clip=CLIP)
    monkeypatch.setitem(EQUAL_TIME, "tiny", Recipe("tiny", training, FAST))
    small = {"prediction": NET, "prediction-without": replace(NET, memory=False), "recall": PIXELS}
    for name, model in small.items():
        monkeypatch.setitem(NETWORKS, name, replace(NETWORKS[name], model=model))
    monkeypatch.setitem(NETWORKS, "convlstm", Network(ConvLSTMConfig(hidden=4, layers=1), 2.))
    test = PredictionEval(observed=4, future=3, clips=3, metrics=("mse", "ssim"), clip=CLIP)
    rows = [Row(n, n, test) for n in ("copy", "median", "prediction", "prediction-without", "recall", "convlstm")]
    rows += [Row("K0", test=replace(test, slots=0)), Row("oldest", test=replace(test, policy="oldest"))]
    monkeypatch.setitem(CONTESTS, "t5-tiny", tuple(rows))
    return test


@pytest.mark.parametrize("lessons", [RECIPES, EQUAL_TIME])
@pytest.mark.parametrize("protocol", ["tiny", "small"])
@pytest.mark.parametrize("name", NETWORKS)
def test_everybody_gets_the_same_but_the_steps(lessons, protocol, name):
    ours, theirs = (recipe_of(n, protocol, 3, lessons) for n in (None, name))
    assert ours.training == lessons[protocol].training
    assert theirs.fit == ours.fit and theirs.fit.seed == 3
    same = replace(theirs.training, model=ours.training.model, stages=ours.training.stages)
    assert same == ours.training
    total, mine = (sum(s.steps for s in x.training.stages) for x in (theirs, ours))
    assert total == pytest.approx(NETWORKS[name].pace * mine, rel=.01)
    assert theirs.training.model.channels == ours.training.model.channels
    assert getattr(theirs.training.model, "memory", None) in ((False,) if "without" in name else (True, None))


@pytest.mark.parametrize("name", ["tiny", "small", "kth", "h36m", "mmnist"])
def test_protocols_say_what_the_films_say(name):
    c = RECIPES[name].training
    assert c.protocol == name
    if name in PREDICTION_DATA:
        p = PREDICTION_DATA[name]
        assert (c.observed, c.model.channels) == (p.observed, p.channels)
        assert name == "small" or c.stages[-1].future == p.learned


def test_equal_weights():
    sizes = {}
    for name in NETWORKS:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in prediction_task(recipe_of(name).training).build().parameters())
    assert max(sizes.values()) < 1.1 * min(sizes.values()), sizes


def test_a_contest_is_measured_once(little, tmp_path):
    made = run_contest("t5-tiny", tmp_path / "out", tmp_path / "runs", seeds=(0, 1), device="cpu", progress=False)
    assert len(made) == 2 + 2 * 6                                     # "copy" and "median" once
    assert {r.config["study"] for r in made} == {"t5-tiny"}
    assert all(is_measured("t5-tiny", e, 0, tmp_path / "out") for e in CONTESTS["t5-tiny"])
    by = {(r.name, r.seed): r for r in made}
    assert by["prediction", 0].metrics != by["prediction", 1].metrics
    assert by["prediction", 0].metrics != by["K0", 0].metrics
    assert by["prediction", 0].config["training"]["task"]["stages"] == [{"steps": 2, "batch": 1, "future": 2}]
    assert by["convlstm", 0].config["training"]["task"]["stages"] == [{"steps": 4, "batch": 1, "future": 2}]
    assert set(by["copy", 0].clips["ssim"]) == set(by["oldest", 1].clips["ssim"])
    assert len(by["copy", 0].clips["mse"]) == 3
    again = run_contest("t5-tiny", tmp_path / "out", tmp_path / "runs", seeds=(0, 1), device="cpu", progress=False)
    assert again == []
    entry = replace(CONTESTS["t5-tiny"][0], test=replace(little, future=2))
    assert not is_measured("t5-tiny", entry, 0, tmp_path / "out")     # another test


def test_trained_once_found_afterwards(little, tmp_path, monkeypatch):
    first = trained_network("convlstm", 0, tmp_path, device="cpu", progress=False)
    monkeypatch.setattr(contest, "fit_averaged", lambda *a: pytest.fail("trained again"))
    again = trained_network("convlstm", 0, tmp_path, device="cpu", progress=False)
    assert isinstance(again, ConvLSTM) and not again.training
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_other_weights_and_records_do_not_pass(little, tmp_path, monkeypatch):
    run = (tmp_path / "out", tmp_path / "runs")
    run_contest("t5-tiny", *run, seeds=(0,), only=("convlstm",), device="cpu", progress=False)
    entry = next(e for e in CONTESTS["t5-tiny"] if e.name == "convlstm")
    assert is_measured("t5-tiny", entry, 0, run[0])
    monkeypatch.setitem(EQUAL_TIME, "tiny", replace(EQUAL_TIME["tiny"], fit=replace(FAST, save_every=9)))
    assert is_measured("t5-tiny", entry, 0, run[0])                   # how often it is saved changes nothing
    monkeypatch.setitem(EQUAL_TIME, "tiny", replace(EQUAL_TIME["tiny"], fit=replace(FAST, lr=.1)))
    assert not is_measured("t5-tiny", entry, 0, run[0])
    refused("expected weights of today's convlstm", trained_network, "convlstm", 0, run[1], device="cpu", progress=False)
    task = prediction_task(recipe_of("convlstm").training)
    (run[1] / "tiny-convlstm-s0/last.safetensors").unlink()
    refused("found snapshots alone", forecasting.fit_averaged, task, FAST, run[1] / "tiny-convlstm-s0", progress=False)


def test_windows_of_one_film_count_as_one(little):
    frames = torch.rand(4, 7, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model = PredictionModel(NET).eval()
    record, scores = measure.measure_prediction(little, model, clips=(frames, ["a", "b", "a", "a"]))
    each = scores["mse"].per_clip
    assert record.clips["mse"]["a"] == pytest.approx(float(each[[0, 2, 3]].mean()))
    assert record.clips["mse"]["b"] == pytest.approx(float(each[1]))
    assert record.metrics["mse"] == pytest.approx((record.clips["mse"]["a"] + record.clips["mse"]["b"]) / 2)


@pytest.mark.parametrize("name", ["prediction", "convlstm"])
def test_a_dry_run_counts_operations(little, name):
    lesson = recipe_of(name, lessons=EQUAL_TIME)
    record = dry_run(lesson, "cpu")
    double = dry_run(replace(lesson, training=replace(
        lesson.training, stages=(replace(lesson.training.stages[0], batch=2),))), "cpu")
    assert double.metrics["operations"] == pytest.approx(2 * record.metrics["operations"], rel=.02)
    assert record.metrics["whole"] == record.config["steps"] * record.metrics["seconds"]
    assert record.config["size"] == 16 and record.metrics["bytes"] > 2**20


@pytest.mark.parametrize("study", CONTESTS)
def test_stored_rows_are_of_the_network_they_name(study):
    rows = {e.name: e.network for e in CONTESTS[study]}
    for r in load_records(RESULTS / study):
        assert r.config["weights"] == rows[r.name], f"{study}/{r.name}, seed {r.seed}: measure it again"


def test_refusals(tmp_path):
    refused("network: expected one of", recipe_of, "transformer")
    refused("protocol: expected one of", recipe_of, "simvp", "huge")
    refused("unknown study 't9'", run_contest, "t9", tmp_path)
    for protocol in ("kth", "h36m", "mmnist"):
        for name in ("simvp", "recall", "recall-without"):
            refused(f"at the size of {protocol}, found {name}", recipe_of, name, protocol)
        assert not recipe_of("prediction-without", protocol).training.model.memory
    refused("found no clips", measure.measure_prediction, PredictionEval(protocol="kth", weights="copy"))
    assert isinstance(prediction_task(recipe_of("simvp", "tiny").training).build(), SimVP)
    assert not list(Path(tmp_path).iterdir())
