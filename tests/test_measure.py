"""The tiny protocol: frame scores against an independent loop, held-out clips, records, the report."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from stremn.core import Record, StremnError
from stremn.data.synthetic import ChameleonConfig, chameleon_batch
from stremn.infer import VideoSegmenter
from stremn.measure import (POLICIES, UNBOUNDED, TinyProtocol, against_stored, draw, frame_scores, held_out, measure,
                            reproduce, smooth, write_report)
from stremn.memory.rules import RULES
from stremn.models.hub import save_weights
from test_infer import network, refused

CLIP = ChameleonConfig(frames=10, size=32, modes=2, stay=(1, 2), fade=1, lookalikes=1)


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def clips():
    return chameleon_batch(range(5), CLIP)


def by_hand(model, clip, policy, slots, seed=0):
    "Stream one clip, count pixels; first and last frame left out."
    segmenter, out = VideoSegmenter(model, policy, slots, seed=seed), []
    for t, frame in enumerate(clip.frames):
        said = segmenter.step(frame, clip.masks[0] if t == 0 else None).numpy() == 1
        true = clip.masks[t].numpy() == 1
        out.append((said & true).sum() / (said | true).sum() if (said | true).any() else 1.)
    return out[1:-1]


# ---------------------------------------------------------------- scores
@pytest.mark.parametrize("policy", POLICIES)
def test_frame_scores_equal_an_independent_loop(model, clips, policy):
    "One clip a batch, so that lots are the stream's own; then side by side where no lots are drawn."
    rule, slots = ("oldest", None) if policy == UNBOUNDED else (policy, 3)
    wanted = np.array([by_hand(model, c, rule, slots, seed=7 + i) for i, c in enumerate(clips)])
    scores = frame_scores(model, clips, policy, 3, seed=7, batch=1)
    assert scores.shape == (5, 8) and scores.dtype == torch.float32
    assert np.allclose(scores, wanted, atol=1e-6) and wanted.std() > .01
    if policy not in ("random", "reservoir"):
        for batch in (2, 10):
            assert np.allclose(frame_scores(model, clips, policy, 3, batch=batch), wanted, atol=1e-6)


def test_policies_are_the_rules_and_the_unbounded_memory():
    assert POLICIES == (UNBOUNDED, *RULES) and UNBOUNDED not in RULES


def test_lots_depend_on_the_seed_alone(model, clips):
    def scores(seed):
        torch.rand(3)
        return frame_scores(model, clips, "random", 3, seed)
    assert torch.equal(scores(1), scores(1)) and not torch.equal(scores(1), scores(2))


def test_the_network_comes_back_as_it_was(clips):
    model = network(noise="train")
    plain = frame_scores(model, clips, "learned", 3)
    # in evaluation mode, whatever the mode was
    assert torch.equal(frame_scores(model.train(), clips, "learned", 3), plain)
    assert model.training and (model.bank.policy, model.bank.slots) == ("learned", 3)
    refused("unknown policy 'best'", frame_scores, model, clips, "best", 3)
    assert model.training and (model.bank.policy, model.bank.slots) == ("learned", 3)


def test_clips_that_cannot_be_scored_are_refused(model, clips):
    refused("found 0", frame_scores, model, [], "oldest", 3)
    short = [c._replace(frames=c.frames[:2], masks=c.masks[:2]) for c in clips]
    refused("at least 3 frames", frame_scores, model, short, "oldest", 3)
    refused("one shape", frame_scores, model, [clips[0], clips[1]._replace(frames=clips[1].frames[:5])], "oldest", 3)


# ---------------------------------------------------------------- the protocol
def test_clips_are_held_out_and_always_the_same():
    c = TinyProtocol(clips=3, clip=CLIP)
    a, b = held_out(c), held_out(replace(c, clips=2, policy="oldest"))
    assert [x.name for x in a] == [f"chameleon-{1_000_000 + i}" for i in range(3)]
    assert all(torch.equal(x.frames, y.frames) and torch.equal(x.masks, y.masks) for x, y in zip(a, b))


def test_no_training_clip_of_an_ordinary_run_is_a_test_clip():
    "NumPy pads short entropy with zeros: the number s is the list [s,0,0,0]. Runs below the first test seed are safe."
    def state(entropy):
        return tuple(np.random.SeedSequence(entropy).generate_state(4))
    first = TinyProtocol().first
    assert state(first) == state([first, 0, 0, 0])                                      # the trap is real
    test = {state(first + i) for i in range(TinyProtocol().clips)}
    train = {state([seed, step, 0, i]) for seed in range(4) for step in (0, 1, 99, 1500) for i in range(8)}
    assert len(test) == 40 and not test & train


def test_a_measurement_is_a_record_with_its_origin(model, clips, tmp_path):
    c = TinyProtocol(policy="newest", slots=2, clips=5, clip=CLIP, seed=3)
    record, scores = measure(c, model, clips)
    assert record.name == "newest" and record.protocol == "tiny" and record.seed == 3
    assert record.config["slots"] == 2 and record.config["clip"]["frames"] == 10 and record.seconds > 0
    assert record.metrics["J"] == pytest.approx(float(scores.mean()), abs=1e-6)
    assert record.clips["J"] == pytest.approx({x.name: float(s) for x, s in zip(clips, scores.mean(1))})
    assert record.device.startswith("cpu ")
    assert Record.load(record.save(tmp_path)) == record


# ---------------------------------------------------------------- report
def made(name, values, **config):
    each = {f"clip-{i}": v for i, v in enumerate(values)}
    c = {"protocol": "tiny", "clips": len(values), "slots": 4, "weights": "w", "clip": {"frames": 60}, **config}
    return Record(name, {"J": sum(values) / len(values)}, c, 0, 1., clips={"J": each})


def test_smooth_by_hand():
    assert smooth([1., 2., 3., 4.], 3) == ([2, 3], [2., 3.])
    assert smooth([5., 7.], 1) == ([1, 2], [5., 7.]) and smooth([1., 2.], 3) == ([], [])
    for bad in (0, 2, -1):
        refused("odd", smooth, [1., 2.], bad)


def test_the_report_says_what_was_found():
    records = [made(UNBOUNDED, [.8, .9]), made("oldest", [.5, .6]), made("learned", [.6, .7])]
    text = write_report(records, None, {"steps": 1550}, 12.)
    assert "worst bounded policy (oldest): +0.300 [+0.300, +0.300]" in text
    assert "1550 steps" in text and "2 held-out" in text and "stored" not in text
    for name in (UNBOUNDED, "oldest", "learned"):
        assert f"| {name} |" in text


def test_only_equal_configs_are_compared():
    now = [made("oldest", [.5, .6]), made("learned", [.6, .7])]
    then = [made("oldest", [.5, .5]), made("learned", [.6, .7], slots=6), made("newest", [.1, .1])]
    lines = against_stored(now, then)[-2:]
    assert lines == ["| oldest | 0.5000 | 0.5500 | +0.0500 |", "| learned | none with this config | 0.6500 |  |"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(network(), tmp_path_factory.mktemp("w") / "small.safetensors", {"steps": 0})


def test_reproducing_twice_gives_the_same_numbers(tmp_path, weights):
    c = TinyProtocol(weights=str(weights), clips=2, slots=2, clip=CLIP)
    first = reproduce(tmp_path / "a", tmp_path / "nowhere", c, progress=False)
    again = reproduce(tmp_path / "b", first.parent / "records", c, progress=False)
    assert sorted(p.name for p in again.parent.iterdir()) == ["over-time.png", "policies.png", "records", "report.md"]
    assert sorted(p.name for p in (again.parent / "records").iterdir()) == sorted(f"{p}-s0.json" for p in POLICIES)
    assert again.read_text().count("| +0.0000 |") == len(POLICIES) and "stored" not in first.read_text()


def test_a_report_is_of_a_finished_run(tmp_path, weights, monkeypatch):
    "A run that breaks leaves no report, not even that of the run before it."
    c = TinyProtocol(weights=str(weights), clips=1, slots=2, clip=replace(CLIP, frames=5))
    report = reproduce(tmp_path / "a", None, c, progress=False)
    assert report.exists()
    monkeypatch.setattr("stremn.measure.draw", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        reproduce(tmp_path / "a", None, c, progress=False)
    assert not report.exists()


def test_what_cannot_be_reproduced_is_refused_before_it_is_measured(tmp_path, weights, monkeypatch):
    refused("clips: expected 1 or more", reproduce, tmp_path / "a", None, TinyProtocol(clips=0))
    refused("vos-giant", reproduce, tmp_path / "a", None, TinyProtocol(weights="vos-giant"))
    (tmp_path / "file").write_text("")
    refused("found a file", reproduce, tmp_path / "file", None, TinyProtocol(weights=str(weights)))
    monkeypatch.setattr("stremn.measure.find_spec", lambda name: None)
    refused("matplotlib", reproduce, tmp_path / "a", None, TinyProtocol(weights=str(weights)))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_short_curves_can_be_drawn(tmp_path):
    draw(tmp_path, [made("oldest", [.5, .6])], {"oldest": [.5, .6, .7]})
    assert (tmp_path / "over-time.png").stat().st_size > 1000
    with pytest.raises(StremnError):
        draw(tmp_path, [made("oldest", [.5])], {"oldest": [.5] * 9}, window=2)
