"What a computation costs: turns, peak bytes, and a dry run on noise of any task."
import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from stremn.train.loop import FitConfig, Recipe, Task
from stremn.train.profile import NoiseTask, dry_steps, peak_bytes, process_peak_bytes, take_turns, threads


def test_works_take_turns_and_the_threads_are_set_back():
    before, order = torch.get_num_threads(), []
    with threads(1):
        took = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4 and [len(v) for v in took.values()] == [3, 3]
    assert torch.get_num_threads() == before


def test_peak_of_known_allocations():
    def f():
        a = torch.ones(250_000)
        for _ in range(3):
            b = torch.cat([a, a])
            del b
        return a

    assert 3e6 <= peak_bytes(f) < 3.01e6 and peak_bytes(lambda: 0) == 0


def test_the_peak_of_a_call_is_not_that_of_the_process():
    before = process_peak_bytes(torch.device("cpu"))
    assert before > 2**25 and peak_bytes(lambda: torch.ones(250)) < 2**13
    assert process_peak_bytes(torch.device("cpu")) >= before                 # it never falls


# ---- dry runs ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Phase:
    steps: int = 70


@dataclass(frozen=True)
class Lines:
    width: int = 3
    stages: tuple = (Phase(), Phase(30))


class Line(Task):
    "Its data cannot be read."
    name, config, steps = "line", Lines(), 100
    origin = {"task": "another"}

    def build(self):
        return nn.Linear(self.config.width, 1)

    def groups(self, network):
        return [{"params": [network.weight], "scale": .5}, {"params": [network.bias], "scale": 0.}]

    def batch(self, step, rank, seed):
        pytest.fail("the data were asked for")

    def loss(self, model, network, batch, step, seed, generator):
        assert isinstance(network, nn.Linear)
        return model(batch).square().mean(), {"shape": list(batch.shape)}


def noise(seed):
    return torch.rand(8, 3, generator=torch.Generator().manual_seed(seed))


def test_noise_wraps_a_task_and_changes_nothing_but_the_batch():
    task = NoiseTask(Line(), noise)
    assert (task.name, task.config, task.steps) == ("line", Lines(), 100)
    net = task.build()
    assert [g["scale"] for g in task.groups(net)] == [.5, 0.]
    assert torch.equal(task.batch(0, 0, 7), noise(7)) and torch.equal(task.batch(5, 1, 7), noise(7))
    assert task.loss(net, net, noise(7), 0, 7, None)[1] == {"shape": [8, 3]}


def test_a_dry_run_counts_times_and_says_what_the_whole_would_take():
    recipe = Recipe("line", Lines(), FitConfig(seed=4))
    record = dry_steps(NoiseTask(Line(), noise), recipe, "dry-line", {"protocol": "mine"}, "cpu")
    assert record.name == "dry-line" and record.seed == 4
    assert record.metrics["operations"] == 2 * 8 * 3                         # forward, and the gradient of the weights
    assert record.metrics["whole"] == 100 * record.metrics["seconds"] and math.isfinite(record.metrics["loss"])
    assert record.config["steps"] == 100 and record.config["protocol"] == "mine"
    assert record.config["training"] == json.loads('{"width": 3, "stages": [{"steps": 70}, {"steps": 30}]}')
    again = dry_steps(NoiseTask(Line(), noise), recipe, "dry-line", {}, "cpu")
    assert again.metrics["loss"] == record.metrics["loss"]
