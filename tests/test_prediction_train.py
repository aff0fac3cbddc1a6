"""Contracts of prediction training: equal clips for every network, losses by hand, runs that go on, scores by clip."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stremn.prediction import train as prediction_train
from stremn.results import Record
from stremn.core import StremnError, make_generator
from stremn.data.walkers import TEST_PEOPLE, WalkersConfig
from stremn.prediction.train import (
    CHOOSING, RECIPES, FrameBatch, PredictionPhase, PredictionTask, PredictionTraining, average_weights, choosing_clips,
    dry_run, fit_averaged, prediction_task, snapshot_steps, windows,
)
from stremn.experiments.measure import PredictionEval, measure_prediction
from stremn.models.hub import kind_of
from stremn.prediction.stream import predict_clips
from stremn.losses import prediction_loss
from stremn.memory.bank import BankConfig
from stremn.metrics.frames import score_frames
from stremn.models.hub import TASKS, load
from stremn.models.prediction import PredictionConfig
from stremn.models.prediction_baselines import ConvLSTMConfig, CopyLast, PredRNNConfig, SimVPConfig
from stremn.models.vos import VOSConfig
from stremn.train.loop import FitConfig, Recipe, fit
from stremn.train.checkpoint import read_log

BANK = BankConfig(memory_channels=6, query_channels=6, key_channels=4, value_channels=4, update_channels=4, slots=2,
                  pinned=0, similarity="l2", shared_keys=True)
MODELS = {"prediction": PredictionConfig(widths=(4, 6), strides=(2, 2), groups=2, bank=BANK),
          "convlstm": ConvLSTMConfig(hidden=4, layers=2, kernel=3),
          "predrnn": PredRNNConfig(hidden=4, layers=2, kernel=3),
          "simvp": SimVPConfig(observed=3, hidden=4, width=8, groups=2, kernels=(1, 3), strides=(1, 2))}
CLIP = WalkersConfig(size=16, people=(1, 2, 3))
TINY = PredictionTraining(model=MODELS["prediction"], observed=3, clip=CLIP, slots=(1, 2),
                          policies=("learned", "oldest"),
                          stages=(PredictionPhase(2, 2, 2), PredictionPhase(2, 1, 4)))
FAST = FitConfig(lr=1e-3, warmup=1, weight_decay=0., save_every=2)
TEST = PredictionEval(observed=3, future=3, clips=5, clip=replace(CLIP, people=TEST_PEOPLE))


def task(name="prediction", **changes):
    return PredictionTask(replace(TINY, **dict(model=MODELS[name]) | changes))


# ---- what is learned -----------------------------------------------------------------------------------------------

def test_batches_follow_from_seed_step_and_rank_and_not_from_the_network():
    for step, shape in {0: (2, 5, 1, 16, 16), 1: (2, 5, 1, 16, 16), 2: (1, 7, 1, 16, 16)}.items():
        same = [task(name).batch(step, 0, 3).frames for name in MODELS]
        assert same[0].shape == shape and all(torch.equal(same[0], x) for x in same[1:])
        assert not torch.equal(same[0], task().batch(step, 1, 3).frames)
        assert not torch.equal(same[0], task().batch(step, 0, 4).frames)
    assert not torch.equal(task().batch(0, 0, 3).frames, task().batch(1, 0, 3).frames)


def test_nobody_learns_from_the_people_who_choose_or_test():
    people = set(PredictionTraining().clip.people)
    assert not people & set(CHOOSING) and not people & set(TEST_PEOPLE) and len(people) == 14
    assert set(PredictionEval().clip.people) == set(TEST_PEOPLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_windows_of_videos(dtype):
    g = make_generator(0)
    videos = [torch.rand(n, 3, 4, 6, generator=g) for n in (5, 9)]
    videos = [(255 * f).to(torch.uint8) if dtype == torch.uint8 else f for f in videos]
    job = PredictionTask(replace(TINY, model=replace(MODELS["prediction"], channels=3)), videos)
    frames = job.batch(0, 0, 1).frames
    assert frames.dtype == torch.float32 and frames.shape == (2, 5, 3, 4, 6) and 0 <= frames.min() <= frames.max() <= 1
    assert torch.equal(frames, job.batch(0, 0, 1).frames)
    long = job.batch(2, 0, 1).frames                                              # only the second is long enough
    whole = videos[1].float() / (255 if dtype == torch.uint8 else 1)
    assert any(torch.equal(long[0], whole[i:i + 7]) for i in range(3))
    with pytest.raises(StremnError, match="videos: expected one of at least 10 frames, found 9"):
        windows(videos, 10, 1, np.random.default_rng(0))
    with pytest.raises(StremnError, match="choosing: expected videos"):
        choosing_clips(job, 3)
    assert choosing_clips(PredictionTask(job.config, videos, videos), 3).shape == (3, 7, 3, 4, 6)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("warm_up", [True, False])
def test_the_loss_is_that_of_what_was_predicted(name, warm_up):
    job = task(name, warm_up=warm_up, l1=.5, l2=2., gradient=.25, sampling=(0., 0.), slots=(2,), policies=("oldest",))
    torch.manual_seed(0)
    network = job.build().eval()
    batch = job.batch(0, 0, 0)
    loss, numbers = job.loss(network, network, batch, 0, 0, make_generator(0))
    early = {"warm_up": True} if warm_up and name != "simvp" else {}
    if name == "prediction":
        early["policy"] = network.bank.policy.but(rule="oldest", slots=2)
    out = network(batch.frames[:, :3], 2, **early)
    assert out.shape[1] == (4 if "warm_up" in early else 2)
    want = prediction_loss(out, batch.frames[:, -out.shape[1]:], .5, 2., .25)
    torch.testing.assert_close(loss, want)
    psnr = score_frames(out[:, -2:].detach(), batch.frames[:, 3:], metrics=["psnr"])["psnr"].mean
    assert numbers["psnr"] == pytest.approx(psnr, abs=1e-4)


def test_sampling_and_draws():
    job = task(sampling=(.8, .2))
    assert [job.sampling(s) for s in (0, 3)] == pytest.approx([.8, .2])
    network, used = job.build(), set()
    own, write = network.bank.policy, network.bank.write

    def watched(memory, template, t, group=None, generator=None, policy=None):
        used.add((policy.rule, policy.slots))
        return write(memory, template, t, group, generator, policy)

    network.bank.write = watched
    for step in range(40):
        job.loss(network, network, FrameBatch(torch.rand(1, 5, 1, 16, 16)), step, 0, make_generator(0))
    assert used == {(p, k) for p in ("learned", "oldest") for k in (1, 2)} and network.bank.policy is own


@pytest.mark.parametrize("changes, message", [
    (dict(stages=()), "stages: expected at least one"), (dict(slots=()), "slots: expected at least one"),
    (dict(observed=0), "observed, stages: expected 1"), (dict(sampling=(1., -.1)), "sampling: expected chances"),
    (dict(stages=(PredictionPhase(1, 1, 0),)), "expected 1 or more")])
def test_config_errors(changes, message):
    with pytest.raises(StremnError, match=message):
        replace(TINY, **changes)


def test_kinds():
    assert {kind_of(c): TASKS[kind_of(c)][0] for c in MODELS.values()} == {k: type(c) for k, c in MODELS.items()}
    for config in (VOSConfig(), BANK, None):
        with pytest.raises(StremnError, match="model: expected the config of a predicting network"):
            kind_of(config)


def test_videos_are_read_by_the_protocol(tmp_path, monkeypatch):
    asked = []

    def videos(root, p, split="train"):
        asked.append((p.name, p.size, split))
        return [torch.zeros(40, 1, p.size, p.size, dtype=torch.uint8)], ["video"]

    monkeypatch.setattr(prediction_train, "training_entries", videos)
    job = prediction_task(RECIPES["small"].training, tmp_path, 32)
    assert asked == [("small", 32, "train"), ("small", 32, "choose")]
    assert job.batch(0, 0, 0).frames.shape == (8, 11, 1, 32, 32) and job.config.clip.size == 32
    assert prediction_task(RECIPES["tiny"].training, size=32).batch(0, 0, 0).frames.shape[-1] == 32


def test_a_dry_run_is_of_the_last_phase_and_reads_no_video(monkeypatch):
    monkeypatch.setattr(prediction_train, "training_entries", lambda *a: pytest.fail("the videos were read"))
    recipe = Recipe("small", replace(TINY, protocol="small"), FAST)
    record = dry_run(recipe, "cpu", 16)
    assert record.name == "dry-small" and record.config["steps"] == 4 and record.config["size"] == 16
    assert record.metrics["whole"] == 4 * record.metrics["seconds"] and record.metrics["operations"] > 0
    short = dry_run(replace(recipe, training=replace(recipe.training, stages=TINY.stages[:1])), "cpu", 16)
    assert short.metrics["operations"] != record.metrics["operations"]


# ---- runs ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_network_is_trained_and_goes_on_where_it_stopped(name, tmp_path):
    whole = load(fit(task(name), FAST, tmp_path/"whole", "cpu", progress=False))
    assert fit(task(name), FAST, tmp_path/"parts", "cpu", 3, progress=False) is None
    parts = load(fit(task(name), FAST, tmp_path/"parts", "cpu", progress=False))
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    assert parts.card["task"] == name and parts.config == MODELS[name]
    log = read_log(tmp_path/"parts")
    assert len(log["loss"]) == 4 and all(p > 0 for p in log["psnr"])


def test_clips_vary_at_random_and_repeat():
    videos = [torch.rand(9, 1, 8, 8, generator=make_generator(i)) * .4 + .3 for i in range(3)]
    plain, other = (PredictionTask(replace(task().config, vary=v), videos) for v in (0., .4))
    a, b = plain.batch(0, 0, 0).frames, other.batch(0, 0, 0).frames
    assert torch.equal(b, other.batch(0, 0, 0).frames) and not torch.equal(a, b)
    clips, rng = torch.rand(64, 3, 1, 4, 4, generator=make_generator(0)) * .2 + .4, np.random.default_rng(0)
    new = prediction_train.varied(clips, .4, rng)
    assert new.shape == clips.shape and 0 <= new.min() and new.max() <= 1
    mirrored = 0
    for x, y in zip(clips, new):                            # a line through each pixel's old number, mirrored or not
        fits = [np.corrcoef(z.flatten(), y.flatten())[0, 1] for z in (x, x.flip(-1))]
        assert max(fits) == pytest.approx(1, abs=1e-3)
        mirrored += fits[1] > fits[0]
        assert .59 < y.std() / x.std() < 1.41 and abs(y.mean() - x.mean()) < .21
    assert 20 < mirrored < 44


def test_the_average_is_of_the_best(tmp_path):
    path = fit_averaged(task(), FAST, tmp_path, 2, 1, 3, "cpu", False)
    model = load(path)
    scores = {int(k): v for k, v in model.card["snapshots"].items()}
    assert sorted(scores) == [3, 4] and model.card["averaged"] == [max(scores, key=scores.get)]
    best = load(tmp_path / f"step-{model.card['averaged'][0]:06}.safetensors")
    assert all(torch.equal(v, best.state_dict()[k]) for k, v in model.state_dict().items())
    both = load(fit_averaged(task(), FAST, tmp_path, 2, 2, 3, "cpu", False))      # nothing is trained again
    pair = [load(tmp_path / f"step-{s:06}.safetensors").state_dict() for s in (3, 4)]
    for k, v in both.state_dict().items():
        torch.testing.assert_close(v, (pair[0][k] + pair[1][k]) / 2)
    with pytest.raises(StremnError, match="keep: expected 1 to 2"):
        fit_averaged(task(), FAST, tmp_path, 2, 3, 3, "cpu", False)
    with pytest.raises(StremnError, match="networks: expected at least one"):
        average_weights([])


def test_a_greedy_average_is_never_worse_than_the_best(monkeypatch):
    networks = [TASKS["prediction"][1](MODELS["prediction"]).eval() for _ in range(3)]
    for network, ssim in zip(networks, (.5, .4, .3)):
        network.card = {"ssim": ssim}
    for means, chosen in (((.6, .7), [0, 1, 2]), ((.4, .5), [0, 2]), ((.49, .49), [0])):
        found = iter(means)
        monkeypatch.setattr(prediction_train, "ssim_on", lambda *a, found=found: next(found))
        assert prediction_train.worth_averaging(networks, torch.zeros(1), 1) == [networks[i] for i in chosen]


def test_snapshots_are_taken_over_the_last_half():
    assert snapshot_steps(80, 8) == [45, 50, 55, 60, 65, 70, 75, 80]
    assert snapshot_steps(4, 2) == [3, 4] and snapshot_steps(3, 8) == [1, 2, 3] and snapshot_steps(1, 2) == [1]


def test_snapshots_of_another_pace_are_refused(tmp_path):
    fit(task(), FAST, tmp_path, "cpu", progress=False)
    with pytest.raises(StremnError, match="expected a run of at most 3 steps, found 4"):
        fit_averaged(task(), FAST, tmp_path, 2, 1, 3, "cpu", False)


# ---- scores --------------------------------------------------------------------------------------------------------

def test_records_hold_a_score_for_every_clip(tmp_path):
    record, scores = measure_prediction(replace(TEST, weights="copy"))
    assert set(record.metrics) == {"mse", "mae", "psnr", "ssim"} and record.config["protocol"] == "tiny"
    for m, mean in record.metrics.items():
        assert len(record.clips[m]) == 5 and sum(record.clips[m].values()) / 5 == pytest.approx(mean)
        assert scores[m].values.shape == (5, 3)
    assert Record.load(record.save(tmp_path)) == record and record.config["parameters"] == 0
    again = measure_prediction(replace(TEST, weights="copy"))[0]
    assert again.metrics == record.metrics and again.clips == record.clips
    assert measure_prediction(replace(TEST, weights="velocity"), name="v")[0].name == "v"


def test_policy_and_slots_are_swapped_for_the_measurement_only():
    torch.manual_seed(1)
    model = task().build().train()
    frames = torch.rand(3, 6, 1, 16, 16, generator=make_generator(2))
    own = predict_clips(model, frames, 4)
    assert torch.equal(own, predict_clips(model, frames, 4, batch=2)) or torch.allclose(own, predict_clips(
        model, frames, 4, batch=2), atol=1e-6)
    without, unbounded = (predict_clips(model, frames, 4, slots=k) for k in (0, math.inf))
    assert not torch.allclose(own, without) and not torch.allclose(own, unbounded)
    policy = model.bank.policy
    assert model.training and (policy.rule, policy.slots) == ("learned", 2)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(without, model(frames, 4, policy=policy.but(slots=0)), atol=1e-6, rtol=0)
    assert torch.equal(predict_clips(CopyLast(), frames, 2), frames[:, -1:].expand(-1, 2, -1, -1, -1))
    for options in (dict(policy="oldest"), dict(slots=3)):
        with pytest.raises(StremnError, match="policy, slots: expected none for CopyLast"):
            predict_clips(CopyLast(), frames, 2, **options)


def test_a_network_that_was_made_without_memory_stays_so():
    torch.manual_seed(2)
    model = task(model=replace(MODELS["prediction"], memory=False)).build()
    frames = torch.rand(2, 6, 1, 16, 16, generator=make_generator(3))
    assert torch.equal(predict_clips(model, frames, 3), predict_clips(model, frames, 3, slots=0))
