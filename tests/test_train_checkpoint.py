"""Checkpoints and logs: what goes in comes out, what is no checkpoint is refused, what was cut off is dropped."""
import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from torch import nn

from stremn.train.checkpoint import (
    Log, RunFiles, checkpoint_weights, load_checkpoint, read_log, save_checkpoint, steps_taken,
)

CONFIG = {"lr": .1}


def trained(seed):
    "A network and its optimiser after three steps."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimiser = torch.optim.AdamW(net.parameters())
    for _ in range(3):
        optimiser.zero_grad()
        net(torch.rand(5, 3)).square().sum().backward()
        optimiser.step()
    return net, optimiser


def moments(optimiser):
    return {(i, k): v for i, state in optimiser.state_dict()["state"].items() for k, v in state.items()}


def test_weights_and_moments_come_back_to_the_bit(tmp_path):
    path = RunFiles(tmp_path).checkpoint
    (net, optimiser), (other, others) = trained(0), trained(1)
    save_checkpoint(path, net, optimiser, 3, CONFIG)
    assert steps_taken(tmp_path) == 3 and load_checkpoint(path, other, others, CONFIG) == 3
    for k, v in net.state_dict().items():
        assert torch.equal(v, other.state_dict()[k]) and torch.equal(v, checkpoint_weights(path)[k])
    assert checkpoint_weights(path).keys() == net.state_dict().keys()       # nothing of the optimiser
    a, b = moments(optimiser), moments(others)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = RunFiles(tmp_path).checkpoint
    save_checkpoint(path, *trained(0), 3, CONFIG)
    before = path.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("stremn.train.checkpoint.save_file", full)
    refused(("last.safetensors", "expected to write a checkpoint", "no space left"),
            save_checkpoint, path, *trained(1), 4, CONFIG)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path):
    path = RunFiles(tmp_path).checkpoint
    net, optimiser = trained(0)
    save_checkpoint(path, net, optimiser, 3, {k: 1 for k in "abcde"})
    refused(("a: 1, now 2; b: 1, now 2; c: 1, now 2; ...", "another folder"),
            load_checkpoint, path, net, optimiser, {k: 2 for k in "abcde"})


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    path = RunFiles(tmp_path).checkpoint
    path.write_bytes(content)
    refused(("last.safetensors", "expected a checkpoint of stremn train"), load_checkpoint, path, *trained(0), CONFIG)
    refused("last.safetensors", steps_taken, tmp_path)


def test_other_tensors_are_refused(tmp_path):
    path = RunFiles(tmp_path).checkpoint
    save_file({"x": torch.zeros(1)}, path)
    refused(("last.safetensors", "expected a checkpoint of stremn train"), load_checkpoint, path, *trained(0), CONFIG)


def test_a_log_has_each_step_once(tmp_path):
    refused("log.jsonl", read_log, tmp_path)
    files = RunFiles(tmp_path)
    files.log.write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(tmp_path) == {"step": [0, 1], "loss": [3., 2.]}
    log = Log(files.log, 1)
    log(step=1, loss=2.5, policy="oldest")
    log.close()
    assert read_log(tmp_path) == {"step": [0, 1], "loss": [3., 2.5]}        # columns of the first step
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"] and steps_taken(tmp_path) == 0


def test_the_names_of_a_runs_files_are_those_of_old_runs(tmp_path):
    files = RunFiles(str(tmp_path))
    names = {"checkpoint": "last.safetensors", "weights": "model.safetensors", "averaged": "averaged.safetensors",
             "card": "card.json", "log": "log.jsonl"}
    assert {k: getattr(files, k) for k in names} == {k: tmp_path / v for k, v in names.items()}
    for step in (12, 7):
        files.snapshot(step).touch()
    assert [p.name for p in files.snapshots()] == ["step-000007.safetensors", "step-000012.safetensors"]
