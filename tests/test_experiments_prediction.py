"Studies of prediction: equal time for every network, rows that know what was measured, windows of one video."
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from stremn.data.prediction import PREDICTION_DATA
from stremn.data.walkers import WalkersConfig
from stremn.experiments import measure, prediction
from stremn.experiments.grid import Row, run, up_to_date
from stremn.experiments.measure import PredictionEval
from stremn.experiments.prediction import (
    EQUAL_TIME, NETWORKS, STUDIES, Network, measure_predictor, recipe_of, trained_network)
from stremn.memory.bank import BankConfig
from stremn.models.prediction import PredictionConfig, PredictionModel
from stremn.models.prediction_baselines import ConvLSTM, ConvLSTMConfig, SimVP
from stremn.models.recall import RecallConfig
from stremn.prediction.train import (
    RECIPES, PredictionPhase, PredictionTraining, dry_run, fit_averaged, prediction_task)
from stremn.results import load_records, stored_record
from stremn.train.loop import FitConfig, Recipe
from refusals import refused

BANK = BankConfig(memory_channels=12, query_channels=12, key_channels=8, value_channels=12, update_channels=8,
                  slots=3, pinned=0, similarity="l2", shared_keys=True)
NET = PredictionConfig(widths=(8, 12), strides=(2, 2), groups=4, bank=BANK)
PIXELS = RecallConfig(widths=(8, 12), strides=(2, 2), groups=4, bank=replace(BANK, locality=1.))
CLIP = WalkersConfig(size=16, aspect=1., scenarios=("outdoor",))
FAST = FitConfig(lr=1e-3, warmup=1, save_every=1)
RESULTS = Path(__file__).resolve().parent.parent / "nbs/results/records"

# The tiny protocol, a thousand times smaller
TRAINING = PredictionTraining(NET, observed=4, stages=(PredictionPhase(2, 1, 2),), slots=(3,), clip=CLIP)
LITTLE = {"tiny": Recipe("tiny", TRAINING, FAST)}
SMALL = NETWORKS | {"prediction": Network(NET), "prediction-without": Network(replace(NET, memory=False), 1.15),
                    "recall": Network(PIXELS), "convlstm": Network(ConvLSTMConfig(hidden=4, layers=1), 2.)}
TEST = PredictionEval(observed=4, future=3, clips=3, metrics=("mse", "ssim"), clip=CLIP)


def little_row(name, weights=None, recipes=LITTLE, **changes):
    "A row of the small contest."
    weights = weights or name
    recipe = recipe_of(weights, "tiny", recipes=recipes, networks=SMALL) if weights in SMALL else None
    return Row(name, weights, replace(TEST, **changes), recipe, {"study": "t5-tiny"})


def little_rows():
    learned = ("prediction", "prediction-without", "recall", "convlstm")
    return [*(little_row(n) for n in ("copy", "median", *learned)), little_row("K0", "prediction", slots=0),
            little_row("oldest", "prediction", policy="oldest")]


little_network = partial(trained_network, device="cpu", progress=False)


def run_little(rows, tmp_path, seeds=(0, 1)):
    return run(rows, seeds, tmp_path / "out", tmp_path / "runs", measure_predictor, little_network, progress=False)


@pytest.mark.parametrize("recipes", [RECIPES, EQUAL_TIME])
@pytest.mark.parametrize("protocol", ["tiny", "small"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gets_the_same_but_the_steps(recipes, protocol, name):
    ours, theirs = (recipe_of(n, protocol, 3, recipes) for n in (None, name))
    assert ours.training == recipes[protocol].training
    assert theirs.fit == ours.fit and theirs.fit.seed == 3
    same = replace(theirs.training, model=ours.training.model, stages=ours.training.stages)
    assert same == ours.training
    total, mine = (sum(s.steps for s in x.training.stages) for x in (theirs, ours))
    assert total == pytest.approx(NETWORKS[name].pace * mine, rel=.01)
    assert theirs.training.model.channels == ours.training.model.channels
    assert getattr(theirs.training.model, "memory", None) in ((False,) if "without" in name else (True, None))


@pytest.mark.parametrize("name", ["tiny", "small", "kth", "h36m", "mmnist"])
def test_protocols_say_what_the_data_say(name):
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


def test_a_contest_is_measured_once(tmp_path):
    rows = little_rows()
    made = run_little(rows, tmp_path)
    assert len(made) == 2 + 2 * 6                                     # "copy" and "median" once
    assert {r.config["study"] for r in made} == {"t5-tiny"}
    assert all(up_to_date(stored_record(tmp_path / "out", row.name, 0), row, 0) for row in rows)
    by = {(r.name, r.seed): r for r in made}
    assert by["prediction", 0].metrics != by["prediction", 1].metrics
    assert by["prediction", 0].metrics != by["K0", 0].metrics
    assert by["prediction", 0].config["training"]["task"]["stages"] == [{"steps": 2, "batch": 1, "future": 2}]
    assert by["convlstm", 0].config["training"]["task"]["stages"] == [{"steps": 4, "batch": 1, "future": 2}]
    assert set(by["copy", 0].clips["ssim"]) == set(by["oldest", 1].clips["ssim"])
    assert len(by["copy", 0].clips["mse"]) == 3
    assert run_little(rows, tmp_path) == []
    other = replace(rows[0], test=replace(TEST, future=2))
    assert not up_to_date(by["copy", 0], other, 0)                    # another test


def test_trained_once_found_afterwards(tmp_path, monkeypatch):
    row = little_row("convlstm")
    first = little_network(row, 0, tmp_path)
    monkeypatch.setattr(prediction, "fit_averaged", lambda *a: pytest.fail("trained again"))
    again = little_network(row, 0, tmp_path)
    assert isinstance(again, ConvLSTM) and not again.training
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_other_weights_and_records_do_not_pass(tmp_path):
    row = little_row("convlstm")
    record, = run_little([row], tmp_path, (0,))
    assert up_to_date(record, row, 0)
    def other(**fit):
        return little_row("convlstm", recipes={"tiny": replace(LITTLE["tiny"], fit=replace(FAST, **fit))})
    assert up_to_date(record, other(save_every=9), 0)                 # how often it is saved changes nothing
    assert not up_to_date(record, other(lr=.1), 0)
    refused("expected weights of today's tiny-convlstm", little_network, other(lr=.1), 0, tmp_path / "runs")
    task = prediction_task(row.recipe.training)
    (tmp_path / "runs/tiny-convlstm-s0/last.safetensors").unlink()
    refused("found snapshots alone", fit_averaged, task, FAST, tmp_path / "runs/tiny-convlstm-s0", progress=False)


def test_windows_of_one_video_count_as_one():
    frames = torch.rand(4, 7, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model = PredictionModel(NET).eval()
    record, scores = measure.measure_prediction(TEST, model, clips=(frames, ["a", "b", "a", "a"]))
    each = scores["mse"].per_clip
    assert record.clips["mse"]["a"] == pytest.approx(float(each[[0, 2, 3]].mean()))
    assert record.clips["mse"]["b"] == pytest.approx(float(each[1]))
    assert record.metrics["mse"] == pytest.approx((record.clips["mse"]["a"] + record.clips["mse"]["b"]) / 2)


@pytest.mark.parametrize("name", ["prediction", "convlstm"])
def test_a_dry_run_counts_operations(name):
    recipe = recipe_of(name, recipes=LITTLE, networks=SMALL)
    record = dry_run(recipe, "cpu")
    double = dry_run(replace(recipe, training=replace(
        recipe.training, stages=(replace(recipe.training.stages[0], batch=2),))), "cpu")
    assert double.metrics["operations"] == pytest.approx(2 * record.metrics["operations"], rel=.02)
    assert record.metrics["whole"] == record.config["steps"] * record.metrics["seconds"]
    assert record.config["size"] == 16 and record.metrics["bytes"] > 2**20


@pytest.mark.parametrize("study", STUDIES)
def test_stored_rows_are_of_the_network_they_name(study):
    rows = {row.name: row.weights for row in STUDIES[study]}
    for r in load_records(RESULTS / study):
        assert r.config["weights"] == rows[r.name], f"{study}/{r.name}, seed {r.seed}: measure it again"


@pytest.mark.parametrize("study", STUDIES)
def test_rows_that_learn_have_the_recipe_of_their_protocol(study):
    for row in STUDIES[study]:
        learns = row.weights in NETWORKS
        assert (row.recipe is None) != learns and row.note == {"study": study}
        assert not learns or row.recipe == recipe_of(row.weights, row.test.protocol, recipes=EQUAL_TIME)


def test_what_cannot_learn_or_be_measured_is_refused(tmp_path):
    refused("network: expected one of", recipe_of, "transformer")
    refused("protocol: expected one of", recipe_of, "simvp", "huge")
    for protocol in ("kth", "h36m", "mmnist"):
        for name in ("simvp", "recall", "recall-without"):
            refused(f"at the size of {protocol}, found {name}", recipe_of, name, protocol)
        assert not recipe_of("prediction-without", protocol).training.model.memory
    refused("found no clips", measure.measure_prediction, PredictionEval(protocol="kth", weights="copy"))
    assert isinstance(prediction_task(recipe_of("simvp", "tiny").training).build(), SimVP)
    assert not list(Path(tmp_path).iterdir())
