"""Training: the same weights wherever it is killed, one or two processes; what a run refuses; what it leaves behind."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_VOS
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from stremn.config import to_json
from stremn.core import make_generator, seed_everything
from stremn.data.chameleon import ChameleonConfig
from stremn.models.hub import load
from stremn.train import loop
from stremn.train.checkpoint import checkpoint_weights, read_log, steps_taken
from stremn.train.loop import (
    FitConfig, Recipe, Task, fit, learning_curve, learning_rate, phase_of, same_recipe, shorten,
)
from stremn.vos.train import ChameleonPhase, ChameleonTask, ChameleonTraining

CLIP = ChameleonConfig(frames=5, size=16, stay=(1, 1), fade=1, hide=1, vanish=.7)
STEPS = 6
FIT = FitConfig(warmup=2, save_every=2)


def task(**changes) -> ChameleonTask:
    "Six steps in two stages; every policy can be drawn, and two or three slots overflow in five frames."
    stages = (ChameleonPhase(2, 2, replace(CLIP, frames=3)), ChameleonPhase(STEPS - 2, 2, CLIP))
    return ChameleonTask(replace(ChameleonTraining(model=TINY_VOS, stages=stages, slots=(2, 3)), **changes))


def go(out, config=FIT, what=None, **kwargs):
    return fit(what or task(), config, out, "cpu", progress=False, **kwargs)


def same(a: Path, b: Path, name="model.safetensors") -> bool:
    a, b = load_file(a / name), load_file(b / name)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(out) -> list[dict]:
    "The log without the clock."
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (out / "log.jsonl").open()]


pytestmark = pytest.mark.usefixtures("one_thread")        # bits are compared with those of processes that have one


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread) -> Path:
    "One undisturbed run; tests copy it or compare with it."
    out = tmp_path_factory.mktemp("whole")
    assert go(out) == out / "model.safetensors"
    return out


# ---------------------------------------------------------------- killed and started again
@pytest.mark.parametrize("stops", [(1,), (2,), (3, 5), (5, 5, 3)])
def test_stopped_runs_end_with_the_same_bits(whole, tmp_path, stops):
    for k in stops:
        assert go(tmp_path, stop_at=k) is None
        assert steps_taken(tmp_path) == max(stops[:stops.index(k) + 1])
    go(tmp_path)
    assert same(whole, tmp_path) and same(whole, tmp_path, "last.safetensors") and rows(whole) == rows(tmp_path)


KILLED = '''
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_train_loop as t
from pathlib import Path
from stremn.train import checkpoint,loop

def die(): os.kill(os.getpid(), signal.SIGKILL)

class InStep(t.ChameleonTask):                                   # after the forward pass of step 3, log two lines ahead
    def loss(self, model, network, batch, step, seed, generator):
        out = super().loss(model, network, batch, step, seed, generator)
        return die() if step == 3 else out

def half_a_line(old):                                            # the file system kept half of the line of step 4
    def write(self, **numbers):
        if numbers["step"] == 4:
            self.file.write('{"step": 4, "lo'), self.file.flush(), die()
        old(self, **numbers)
    checkpoint.Log.__call__ = write

def after_log(old): loop.save_checkpoint = lambda path, model, optimiser, step, config: die() if step == 4 else \\
    old(path, model, optimiser, step, config)

def half_a_file(old):                                            # in the middle of writing the second checkpoint
    def save(tensors, path, metadata):
        if metadata["step"] != "4": return old(tensors, path, metadata)
        Path(path).write_bytes(b"half"), die()
    checkpoint.save_file = save

def before_weights(old): loop.save_weights = lambda *a: die()   # card written, weights not

plans = {"in-step": lambda: None, "half-a-line": lambda: half_a_line(checkpoint.Log.__call__),
         "after-log": lambda: after_log(loop.save_checkpoint), "half-a-file": lambda: half_a_file(checkpoint.save_file),
         "before-weights": lambda: before_weights(loop.save_weights)}
loop.Run(t.task(), t.FIT, Path(sys.argv[2]), "cpu")               # late imports once, not in each child
for name, plan in plans.items():
    child = os.fork()
    if child == 0:
        plan()
        t.go(Path(sys.argv[2]) / name, what=InStep(t.task().config) if name == "in-step" else None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
'''


def test_killed_runs_end_with_the_same_bits(whole, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, Path(__file__).parent, tmp_path], env=env,
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    taken = {"in-step": 2, "half-a-line": 4, "after-log": 2, "half-a-file": 2, "before-weights": STEPS}
    for name, steps in taken.items():
        out = tmp_path / name
        assert steps_taken(out) == steps and not (out / "model.safetensors").exists(), name
        assert go(out) == out / "model.safetensors"
        assert same(whole, out) and same(whole, out, "last.safetensors") and rows(whole) == rows(out), name
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir()), name


def test_the_comparison_can_fail(whole, tmp_path):
    "Without the optimiser's moments a run ends elsewhere, and so does one with another seed."
    go(tmp_path / "a", stop_at=3)
    last = tmp_path / "a" / "last.safetensors"
    about = {"step": "3", "config": json.dumps(to_json({"task": task().config, "fit": FIT, "processes": 1}))}
    save_file({k: v for k, v in load_file(last).items() if k.startswith("model.")}, last, metadata=about)
    go(tmp_path / "a")
    go(tmp_path / "b", replace(FIT, seed=1))
    assert not same(whole, tmp_path / "a") and not same(whole, tmp_path / "b")


def test_workers_and_checkpoints_may_change(whole, tmp_path):
    "Neither the processes that prepare batches nor the steps between checkpoints touch a weight."
    go(tmp_path, replace(FIT, save_every=4, workers=1), stop_at=3)
    go(tmp_path, replace(FIT, save_every=1))
    assert same(whole, tmp_path)


def test_a_finished_run_is_returned_as_it_is(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert go(out) == go(out, stop_at=2) == out / "model.safetensors"
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_what_a_run_leaves(whole):
    names = ["card.json", "last.safetensors", "log.jsonl", "model.safetensors"]
    assert sorted(p.name for p in whole.iterdir()) == names
    model, card, log = load(whole / "model.safetensors"), json.loads((whole / "card.json").read_text()), read_log(whole)
    assert model.card == card and card["steps"] == STEPS and card["config"]["fit"]["warmup"] == 2
    assert card["config"] == to_json({"task": task().config, "fit": FIT, "processes": 1})
    assert card["seconds"] == pytest.approx(sum(log["seconds"]), abs=.06)
    assert card["last_steps"] == {k: pytest.approx(np.mean(log[k])) for k in ("loss", "J")}
    assert log["step"] == list(range(STEPS)) and log["lr"] == [learning_rate(s, STEPS, FIT) for s in range(STEPS)]
    assert log["policy"] == [task().draw(s, 0)["policy"] for s in range(STEPS)]
    assert steps_taken(whole) == STEPS


# ---------------------------------------------------------------- refused
def test_another_config_is_refused(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    refused(("last.safetensors", "fit.seed: 0, now 1", "another folder"), lambda: go(out, replace(FIT, seed=1)))
    longer = task(stages=(ChameleonPhase(2, 2, replace(CLIP, frames=3)), ChameleonPhase(9, 2, CLIP)))
    refused("task.stages[1].steps: 4, now 9", lambda: go(out, what=longer))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_field_newer_than_the_weights_had_its_default():
    task, how = ChameleonTraining(), FitConfig()
    recipe = Recipe("mine", task, how)
    config = json.loads(json.dumps({"task": to_json(task), "fit": to_json(how)}))
    assert same_recipe(config, recipe)
    older = {**config, "task": {k: v for k, v in config["task"].items() if k != "dice"}}
    assert same_recipe(older, recipe)
    assert not same_recipe(older, replace(recipe, training=replace(task, dice=task.dice + 1)))
    deep = json.loads(json.dumps(config))
    for place, field in ((deep["task"]["model"]["bank"], "locality"), (deep["task"]["stages"][0]["clip"], "noise"),
                         (deep["fit"], "clip")):
        place.pop(field)                                                    # wherever the field is
    bank = replace(task.model.bank, locality=1.)
    other = replace(recipe, training=replace(task, model=replace(task.model, bank=bank)))
    assert same_recipe(deep, recipe) and not same_recipe(deep, other)
    deep["task"]["stages"][0].pop("steps")                                  # what has no default cannot be guessed
    assert not same_recipe(deep, recipe)
    assert not same_recipe({"task": config["task"]}, recipe)                 # how it learned is not known
    assert not same_recipe({"fit": config["fit"]}, recipe)                   # nor here what
    assert not same_recipe({**config, "task": {**config["task"], "gone": 1}}, recipe)


def test_a_run_older_than_a_field_goes_on(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "model.safetensors").unlink()
    with safe_open(out / "last.safetensors", "pt") as f:
        about = f.metadata()
    stored = json.loads(about["config"])
    stored["task"]["model"]["bank"].pop("locality"), stored["fit"].pop("clip")
    save_file(load_file(out / "last.safetensors"), out / "last.safetensors", about | {"config": json.dumps(stored)})
    assert go(out) == out / "model.safetensors" and same(whole, out)


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "last.safetensors").write_bytes(b"not a checkpoint")
    refused(("last.safetensors", "expected a checkpoint of stremn train"), lambda: go(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


def test_folders_and_devices_are_checked(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(("file", "expected a folder to write to"), lambda: go(tmp_path / "file"))
    refused("expected a folder to write to", lambda: go(tmp_path / "file" / "run"))
    refused(("device", "tpu"), lambda: fit(task(), FIT, tmp_path / "run", "tpu", progress=False))
    if not torch.cuda.is_available():
        refused("cuda", lambda: fit(task(), FIT, tmp_path / "run", "cuda", progress=False))
    refused(("fp16", "cpu"), lambda: go(tmp_path / "run", replace(FIT, precision="fp16")))
    assert (tmp_path / "file").read_text() == "mine"
    for name, value in {"seed": -1, "save_every": 0, "workers": -1, "precision": "half"}.items():
        refused((name, str(value)), lambda n=name, v=value: replace(FIT, **{n: v}))


def test_precision_may_change_between_runs_of_one_process(tmp_path):
    "Accelerate's global state is set anew: bf16 after full precision, and back, and both do what they say."
    short = task(stages=(ChameleonPhase(1, 2, CLIP),))
    for name, precision in (("a", "no"), ("b", "bf16"), ("c", "no")):
        go(tmp_path / name, replace(FIT, precision=precision), short)
    assert same(tmp_path / "a", tmp_path / "c") and not same(tmp_path / "a", tmp_path / "b")


# ---------------------------------------------------------------- not finite
class Broken(ChameleonTask):
    "From step 3 on the loss, or only its gradient, is not a number."
    gradient = False

    def loss(self, model, network, batch, step, seed, generator):
        loss, numbers = super().loss(model, network, batch, step, seed, generator)
        if step < 3:
            return loss, numbers
        root = torch.sqrt(next(network.parameters()).sum() * 0)                        # 0, with an infinite slope
        return (loss + root * 0 if self.gradient else loss * float("nan")), numbers


@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_not_finite_stops_before_a_weight_is_touched(whole, tmp_path, gradient):
    broken = Broken(task().config)
    broken.gradient = gradient
    run = loop.Run(broken, FIT, loop.open_folder(tmp_path), "cpu")
    what = "gradient" if gradient else "loss"
    refused(("step 3", what, "nan"), loop.take_steps, run, range(STEPS), False)
    go(tmp_path / "good", stop_at=3)
    good = checkpoint_weights(tmp_path / "good" / "last.safetensors")
    assert all(torch.equal(v, good[k]) for k, v in run.network.state_dict().items())
    assert steps_taken(tmp_path) == 2 and [r["step"] for r in rows(tmp_path)] == [0, 1, 2]
    go(tmp_path)                                                                       # the cause is repaired
    assert same(whole, tmp_path)


# ---------------------------------------------------------------- schedule and curriculum
def test_learning_rate():
    c = FitConfig()
    rates = np.array([learning_rate(s, 1000, c) for s in range(1001)])
    flat = round(1000 * c.decay_from)
    assert rates[:50] == pytest.approx(c.lr * np.arange(1, 51) / 50)
    assert (rates[50:flat + 1] == c.lr).all() and (np.diff(rates[flat:]) < 0).all() and 50 < flat < 1000
    assert rates[(flat + 1000) // 2] == pytest.approx(c.lr * (1 + c.floor) / 2)
    assert rates[1000] == pytest.approx(c.lr * c.floor)
    assert learning_rate(0, 1, replace(c, warmup=0, decay_from=1.)) == c.lr


def test_stages_and_shorten():
    clips = [replace(CLIP, frames=f) for f in (3, 6, 12)]
    config = task(stages=tuple(ChameleonPhase(n, 1, c) for n, c in zip((100, 250, 1200), clips, strict=True))).config
    t = ChameleonTask(config)
    assert t.steps == 1550
    found = [phase_of(t.config.stages, s).clip.frames for s in (0, 99, 100, 349, 350, 1549)]
    assert found == [3, 3, 6, 6, 12, 12]
    with pytest.raises(IndexError):
        phase_of(config.stages, 1550)
    assert shorten(config, None) is config and shorten(config, 1550) == config
    assert [s.steps for s in shorten(config, 155).stages] == [10, 25, 120]
    assert [s.steps for s in shorten(config, 1).stages] == [1, 1, 1]


# ---------------------------------------------------------------- two processes
TWO = '''
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_train_loop as t
from pathlib import Path
from safetensors.torch import save_file
from stremn.train import checkpoint,loop
out, rank = Path(sys.argv[2]), os.environ["RANK"]
run = loop.Run(t.task(), t.FIT, loop.open_folder(out / "ranks"), "cpu")
loop.take_steps(run, range(t.STEPS), False)
save_file(run.network.state_dict(), out / f"rank{rank}.safetensors")
assert t.go(out / "whole") == out / "whole" / "model.safetensors"
assert t.go(out / "stopped", stop_at=3) is None
assert t.go(out / "stopped") == out / "stopped" / "model.safetensors"
'''


def averaged(steps, ranks) -> dict:
    "The reference: one process that takes each rank's gradient in turn, averages, clips and updates."
    t = task()
    seed_everything(FIT.seed)
    net = t.build().train()
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=FIT.weight_decay)
    for step in range(steps):
        grads = []
        for rank in range(ranks):
            net.zero_grad(set_to_none=True)
            entropy = np.random.SeedSequence([FIT.seed, step, rank]).generate_state(1)[0]
            t.loss(net, net, t.batch(step, rank, FIT.seed), step, FIT.seed, make_generator(int(entropy)))[0].backward()
            grads.append([p.grad for p in net.parameters()])
        for p, each in zip(net.parameters(), zip(*grads, strict=True), strict=True):
            p.grad = None if each[0] is None else sum(g / ranks for g in each)
        torch.nn.utils.clip_grad_norm_(net.parameters(), FIT.clip)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, t.steps, FIT)
        optimiser.step()
    return net.state_dict()


def test_two_processes_train_as_one_with_their_averaged_gradients(whole, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    command += [Path(__file__).parent, tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{r}.safetensors") for r in (0, 1)]
    assert all(torch.equal(ranks[0][k], ranks[1][k]) for k in ranks[0])
    assert same(tmp_path / "whole", tmp_path / "stopped")
    assert same(tmp_path / "whole", tmp_path / "stopped", "last.safetensors")
    finished, one = load_file(tmp_path / "whole" / "model.safetensors"), load_file(whole / "model.safetensors")
    reference, alone = averaged(STEPS, 2), averaged(STEPS, 1)
    for k in finished:
        assert torch.equal(finished[k], ranks[0][k]), k
        assert torch.allclose(finished[k], reference[k], rtol=0, atol=1e-5), k
        assert torch.allclose(one[k], alone[k], rtol=0, atol=1e-6), k
    assert max(float((finished[k] - one[k]).abs().max()) for k in one) > 1e-3         # other batches, other weights
    assert [r["step"] for r in rows(tmp_path / "stopped")] == list(range(STEPS))
    refused("processes: 2, now 1", lambda: go(tmp_path / "whole"))


def test_the_curve_of_a_card_is_the_log_in_forty_means():
    log = {"loss": [float(i) for i in range(100)], "J": [.5] * 100, "seconds": [1.] * 100}
    c = learning_curve(log)
    assert len(c["step"]) == 40 and c["step"][-1] == 100 and set(c["J"]) == {.5}
    a, b = c["step"][6:8]
    assert c["loss"][7] == round(sum(range(a, b)) / (b - a), 4)
    assert learning_curve({"loss": [3., 1.]}) == {"step": [1, 2], "loss": [3., 1.]} and learning_curve({}) == {}


# ---------------------------------------------------------------- a task of one's own
@dataclass(frozen=True)
class LineConfig:
    steps: int = 4


class Line(Task):
    "The least that a task must say; weights and rates have defaults."
    name, config, steps = "line", LineConfig(), 4

    def build(self):
        net = nn.Linear(2, 1)
        net.config = self.config
        return net

    def batch(self, step, rank, seed):
        return torch.rand(8, 2, generator=make_generator(step))

    def loss(self, model, network, batch, step, seed, generator):
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean(), {}


class SlowBias(Line):
    def groups(self, network):
        return [{"params": [network.weight]}, {"params": [network.bias], "scale": 0.}]


def test_a_task_declares_all_that_the_loop_uses(tmp_path):
    assert Line().origin is None
    one = load_file(fit(Line(), FIT, tmp_path / "a", "cpu", progress=False))
    assert "start" not in json.loads((tmp_path / "a/card.json").read_text())["config"]
    slow = load_file(fit(SlowBias(), FIT, tmp_path / "b", "cpu", progress=False))
    seed_everything(FIT.seed)
    first = Line().build()
    assert torch.equal(slow["bias"], first.bias) and not torch.equal(one["bias"], first.bias)
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Task,), {"build": Line.build})()


def test_files_that_a_killed_run_left_half_written_are_removed(tmp_path):
    half = tmp_path / ".last.safetensors.7.0a1b2c3d.part"
    half.write_bytes(b"half")
    fit(Line(), FIT, tmp_path, "cpu", progress=False)
    assert not half.exists() and (tmp_path / "model.safetensors").is_file()
