"""A user's code, for the type checker in test_doors.py: it is checked and never run."""
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import stremn
from stremn.data import ChameleonConfig, Clip, chameleon_batch
from stremn.memory import (
    RULES, BankConfig, Decision, Memory, Request, Rule, Template, UpdatePolicy, append,
    best_match_similarity, find_rule, gumbel_select, write,
)
from stremn.metrics import jaccard
from stremn.models import PredictionModel, VOSConfig, VOSModel, with_baseline_memory
from stremn.train import FitConfig
from stremn.vos import MemoryReport, TestTimeConfig, evaluate_davis


def memory(features: Tensor) -> None:
    "The bank in a network of one's own."
    bank = stremn.MemoryBank(BankConfig(memory_channels=64, query_channels=64), slots=4)
    template = assert_type(bank.template(features), Template)
    queue = UpdatePolicy(rule="oldest", slots=math.inf)
    held = assert_type(bank.write(None, template, 0, policy=queue), Memory)
    assert_type(bank.read(held, features), Tensor)
    decision = assert_type(bank.choose(held, template, 1, policy=queue.but(slots=3)), Decision)
    assert_type(bank.commit(held, template, 1, decision), Memory)
    assert_type(append(held, template, 1), Memory)
    assert_type(write(held, template, 1, gumbel_select(best_match_similarity(template.update, held.updates))), Memory)
    assert_type(held.slots, int)


def rules(request: Request) -> None:
    "Rules by name, as records, of one's own."
    assert_type(find_rule("learned"), Rule)
    assert_type(RULES["oldest"].select(request), Tensor)

    def mine(r: Request) -> Tensor: return r.candidates.float()
    UpdatePolicy(rule=mine)
    UpdatePolicy(rule=Rule(mine, capacity=2))


def segment(frames: list[np.ndarray], first: Tensor, model: VOSModel) -> None:
    "Streaming."
    segmenter = stremn.VideoSegmenter(model, policy="oldest", slots=math.inf, device="cpu")
    stremn.VideoSegmenter()
    stremn.VideoSegmenter("vos-small", test_time=TestTimeConfig())
    assert_type(segmenter.step(frames[0], first), Tensor)
    assert_type(segmenter.step(frames[1], return_prob=True, end=True), Tensor)
    assert_type(segmenter.track(frames, masks={0: first}), Iterator[Tensor])
    assert_type(segmenter.memory, list[MemoryReport])
    assert_type(segmenter.policy, UpdatePolicy)
    assert_type(segmenter.objects, list[int])


def models(clip: Tensor, labels: Tensor, valid: Tensor) -> None:
    "Networks."
    assert_type(stremn.available(), list[str])
    assert_type(stremn.load("vos-tiny"), nn.Module)
    assert_type(VOSModel(VOSConfig()).feature_stride, int)
    assert_type(with_baseline_memory(VOSModel(), "stcn"), VOSModel)
    for frame, held in PredictionModel().rollout(None, [clip[:, 0]], 0, 3):
        assert_type(frame, Tensor)
        assert_type(held, Memory | None)
    predictor = stremn.VideoPredictor(PredictionModel(), slots=0)
    assert_type(predictor.predict(3), Tensor)
    FitConfig(lr=1e-3)


def numbers(folder: Path) -> None:
    "Data, metrics, records."
    clips = assert_type(chameleon_batch(range(3), ChameleonConfig()), list[Clip])
    assert_type(jaccard(clips[0].masks > 0, clips[0].masks > 0), Tensor)
    evaluate_davis(folder, folder, year=2016)
    record = stremn.Record("row", {"J": .8}, {"protocol": "tiny"}, 0, 1.)
    assert_type(record.save(folder), Path)


def errors() -> str:
    "What is refused."
    try:
        torch.manual_seed(0)
    except stremn.StremnError as error:
        return str(error)
    return ""
