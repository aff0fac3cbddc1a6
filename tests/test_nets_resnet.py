"""Contracts of the paper-size parts: ResNet encoders, their weights, ASPP, STM's decoder, and the network they make."""
import hashlib
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stremn.core import StremnError, make_generator
from stremn.config import to_json
from stremn.memory.bank import BankConfig
from stremn.config import from_json
from stremn.models.hub import load, save_weights
from stremn.models.presets import STM_NAMES, load_backbones, load_stm, set_checkpointing
from stremn.models.presets import small_vos
from stremn.models.vos import VOSConfig, VOSModel
from stremn.models.presets import paper_vos
from stremn.nets import resnet
from stremn.nets.aspp import ASPP
from stremn.nets.blocks import group_norm
from stremn.nets.resnet import NORMS, SOURCES, WIDTHS, ResNetEncoder, imagenet_weights, load_backbone

BANK = BankConfig(memory_channels=256, query_channels=256, key_channels=8, value_channels=12, update_channels=8,
                  slots=3)
LIGHT = VOSConfig(encoder="resnet18", widths=WIDTHS["resnet18"], decoder_width=16, decoder="stm", aspp_rates=(2, 3),
                  key_gain=None, bank=BANK)
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


def frames(*shape, seed=0, dtype=torch.float32):
    "Reproducible pixels in [0,1]."
    return torch.rand(*shape, generator=make_generator(seed), dtype=dtype)


def published_names(kind, statistics):
    "Names of a published ImageNet ResNet, written out: torchvision's with statistics, timm's resnet50_gn without."
    norm = ["weight", "bias"] + (["running_mean", "running_var", "num_batches_tracked"] if statistics else [])
    names = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{n}" for n in norm}
    convs = 3 if kind == "resnet50" else 2
    for layer, blocks in enumerate(BLOCKS[kind], 1):
        for block in range(blocks):
            at = f"layer{layer}.{block}."
            names |= {f"{at}conv{i}.weight" for i in range(1, convs + 1)}
            names |= {f"{at}bn{i}.{n}" for i in range(1, convs + 1) for n in norm}
            if block == 0 and (layer > 1 or kind == "resnet50"):
                names |= {f"{at}downsample.0.weight"} | {f"{at}downsample.1.{n}" for n in norm}
    return names


def shaken(kind, norm_layer=nn.BatchNorm2d, seed=0):
    "A whole torchvision network with no weight or statistic at its default, in evaluation mode."
    torch.manual_seed(seed)
    net = getattr(torchvision.models, kind)(norm_layer=norm_layer).eval()
    with torch.no_grad():
        for name, x in net.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(.5, 2.)
            elif x.ndim == 1 and x.is_floating_point():
                x.add_(.2 * torch.randn_like(x))
    return net


def tapped(net, x):
    "Maps after the first three stages of a torchvision network, colours normalised beforehand."
    mean, std = (torch.tensor(v).to(x.dtype).view(1, 3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    y, maps = net.maxpool(net.relu(net.bn1(net.conv1((x - mean) / std)))), []
    for stage in (net.layer1, net.layer2, net.layer3):
        maps.append(y := stage(y))
    return maps


# ---- encoders ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("norm, layer", [("group", group_norm), ("frozen", nn.BatchNorm2d)])
@torch.no_grad()
def test_maps_are_torchvisions(kind, norm, layer):
    source, encoder = shaken(kind, layer).double(), ResNetEncoder(kind, norm=norm).double()
    unused = load_backbone(encoder, source.state_dict())
    assert {name.split(".")[0] for name in unused} == {"layer4", "fc"}
    x = frames(2, 3, 32, 48, dtype=torch.float64)
    for ours, theirs, c, s in zip(encoder.train()(x), tapped(source, x), WIDTHS[kind], (4, 8, 16), strict=True):
        assert ours.shape == (2, c, 32 // s, 48 // s)
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_rows_do_not_see_each_other(norm):
    torch.manual_seed(0)
    net, x = ResNetEncoder("resnet18", 2, norm).double().train(), frames(3, 5, 32, 32, dtype=torch.float64)
    for whole, alone in zip(net(x), net(x[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], alone, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_mask_planes_are_two_convolutions_of_their_own():
    torch.manual_seed(0)
    net, x = ResNetEncoder("resnet18", 2).double(), frames(2, 5, 32, 32, dtype=torch.float64)
    query = ResNetEncoder("resnet18").double()
    query.load_state_dict({k: v for k, v in net.state_dict().items() if k in query.state_dict()})
    clear = x.clone()
    clear[:, 3:] = 0
    assert all(torch.equal(a, b) for a, b in zip(net(clear), query(x[:, :3]), strict=True))
    together = nn.Conv2d(5, 64, 7, stride=2, padding=3, bias=False).double()
    together.weight.data = torch.cat([net.conv1.weight / net.std[None], net.conv1_m.weight, net.conv1_o.weight], 1)
    colours = torch.cat([x[:, :3] - net.mean, x[:, 3:]], 1)
    want = F.max_pool2d(F.relu(net.bn1(together(colours))), 3, 2, 1)
    torch.testing.assert_close(net.stem(x), want)


@pytest.mark.parametrize("planes", [0, 2])
@pytest.mark.parametrize("kind, norm", [(k, n) for k in WIDTHS for n in NORMS])
def test_names_are_torchvisions_and_two_more(kind, norm, planes):
    names = set(ResNetEncoder(kind, planes, norm).state_dict())
    known = {n for n in published_names(kind, norm == "frozen") if not n.startswith(("layer4", "fc"))}
    mine = {"conv1_m.weight", "conv1_o.weight"} if planes else set()
    assert names == {n for n in known if not n.endswith("num_batches_tracked")} | mine


def test_frozen_statistics_neither_move_nor_learn():
    net = ResNetEncoder("resnet18", norm="frozen").train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(frames(2, 3, 32, 32))[-1].square().mean().backward()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    learns = {n for n, p in net.named_parameters() if p.requires_grad}
    assert learns and not any("bn" in n or "downsample.1" in n for n in learns)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("planes", [0, 2])
def test_recomputing_changes_no_number(norm, planes):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = ResNetEncoder("resnet18", planes, norm, checkpointing).double()
        maps = net(frames(1, 3 + planes, 32, 32, dtype=torch.float64))
        sum(m.square().mean() for m in maps).backward()
        found.append([*maps, *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind, norm", [("resnet18", nn.BatchNorm2d), ("resnet50", group_norm)])
def test_weights_and_operations_are_the_published_ones(kind, norm):
    with torch.device("meta"):
        encoder, x = ResNetEncoder(kind), torch.empty(1, 3, 224, 224)
        whole = getattr(torchvision.models, kind)(norm_layer=norm)
    about = getattr(torchvision.models, f"ResNet{kind[6:]}_Weights").IMAGENET1K_V1.meta
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(encoder) + count(whole.layer4) + count(whole.fc) == about["num_params"]
    ops = []
    for f in (whole.eval(), encoder):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y = f(x)
        ops.append(counter.get_total_flops())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        whole.fc(whole.layer4(y[-1]).mean((2, 3)))
    assert ops[0] == ops[1] + counter.get_total_flops()
    assert abs(ops[0] / 2e9 - about["_ops"]) < .01


@pytest.mark.parametrize("arguments, message", [
    (dict(kind="resnet101"), "kind: expected one of resnet18, resnet50, found 'resnet101'"),
    (dict(norm="batch"), "norm: expected one of group, frozen, found 'batch'"),
    (dict(planes=5), "planes: expected one of 0, 2, found 5")])
def test_an_unknown_encoder_is_refused(arguments, message):
    with pytest.raises(StremnError, match=message):
        ResNetEncoder(**arguments)


@pytest.mark.parametrize("channels", [1, 5, 24, 32, 48, 64, 1024])
def test_group_norm_fits_any_width(channels):
    norm, x = group_norm(channels).double(), frames(2, channels, 3, 4, dtype=torch.float64)
    assert norm.num_groups <= 32 and channels % norm.num_groups == 0
    parts = x.unflatten(1, (norm.num_groups, -1))
    var, mean = torch.var_mean(parts, (2, 3, 4), correction=0, keepdim=True)
    torch.testing.assert_close(norm(x), ((parts - mean) / (var + norm.eps).sqrt()).flatten(1, 2))


# ---- weights -------------------------------------------------------------------------------------------------------

def test_the_names_timm_publishes():
    "161 names, and torchvision's shapes with group normalisation; compared once with timm 1.0.31's resnet50_gn."
    names = published_names("resnet50", False)
    shapes = {k: v.shape for k, v in torchvision.models.resnet50(norm_layer=group_norm).state_dict().items()}
    assert len(names) == 161 and set(shapes) == names
    tensors = {k: torch.randn(shapes[k]) for k in names}
    net = ResNetEncoder(planes=2)
    masks = net.conv1_m.weight.clone()
    unused = load_backbone(net, tensors)
    assert all(torch.equal(v, tensors[k]) for k, v in net.state_dict().items() if k in tensors)
    assert torch.equal(net.conv1_m.weight, masks)
    assert set(unused) == {n for n in names if n.startswith(("layer4", "fc"))}


def test_weights_of_another_kind_are_refused():
    group, batch = (shaken("resnet18", norm).state_dict() for norm in (group_norm, nn.BatchNorm2d))
    for norm, tensors, message in (
            ("group", batch, "expected weights trained with group normalisation .*, found batch"),
            ("frozen", group, "expected weights trained with batch normalisation .*, found group"),
            ("group", {k: v for k, v in group.items() if k != "layer2.0.conv1.weight"}, "found no layer2.0.conv1.w"),
            ("group", group | {"conv1.weight": torch.ones(64, 4, 7, 7)}, r"conv1.weight: expected shape \(64, 3, 7"),
            ("group", {}, "found no bn1.bias, bn1.weight, conv1.weight")):
        net = ResNetEncoder("resnet18", norm=norm)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(StremnError, match=message):
            load_backbone(net, tensors)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_imagenet_weights_are_checked_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save(shaken("resnet18").state_dict(), file := tmp_path / "net.pth")
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    file = file.rename(tmp_path / f"net-{digits}.pth")
    monkeypatch.setitem(SOURCES, ("resnet18", "frozen"), file.as_uri())
    net = ResNetEncoder("resnet18", norm="frozen")
    load_backbone(net, imagenet_weights("resnet18", "frozen"))
    assert torch.equal(net.conv1.weight, shaken("resnet18").conv1.weight)
    other = file.rename(tmp_path / "net-00000000.pth")
    monkeypatch.setitem(SOURCES, ("resnet18", "frozen"), other.as_uri())
    with pytest.raises(RuntimeError, match="hash"):
        imagenet_weights("resnet18", "frozen")
    with pytest.raises(StremnError, match="found resnet18 group"):
        imagenet_weights("resnet18", "group")
    asked = {}
    monkeypatch.setattr(resnet.torch.hub, "load_state_dict_from_url", lambda url, **how: asked.update(how, url=url))
    imagenet_weights()
    assert asked["weights_only"] and asked["check_hash"] and asked["url"].endswith("resnet50_gn_a1h2-8fe6c4d0.pth")


# ---- ASPP ----------------------------------------------------------------------------------------------------------

def branch(layer, x, rate):
    "Convolution with a large kernel that is mostly zero, group statistics, rectifier."
    conv, norm = layer[0], layer[1]
    kernel = conv.weight
    if kernel.shape[-1] == 3:
        large = kernel.new_zeros(*kernel.shape[:2], 2 * rate + 1, 2 * rate + 1)
        large[:, :, ::rate, ::rate] = kernel
        kernel = large
    z = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2).unflatten(1, (norm.num_groups, -1))
    var, mean = torch.var_mean(z, (2, 3, 4), correction=0, keepdim=True)
    z = ((z - mean) / (var + norm.eps).sqrt()).flatten(1, 2)
    return (z * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)


@pytest.mark.parametrize("rates", [(1,), (2, 3), (6, 12, 18)])
@pytest.mark.parametrize("size", [(1, 1), (4, 7), (13, 20)])
@torch.no_grad()
def test_aspp_is_its_branches(rates, size):
    torch.manual_seed(0)
    m, x = ASPP(6, 16, rates).double(), frames(2, 6, *size, dtype=torch.float64) - .5
    for p in m.parameters():
        p.add_(.1 * torch.randn_like(p))
    whole = branch(m.everywhere, x.mean((2, 3), keepdim=True), 1).expand(-1, -1, *size)
    parts = [branch(m.here, x, 1), *(branch(b, x, r) for b, r in zip(m.around, rates)), whole]
    torch.testing.assert_close(m(x), branch(m.merge, torch.cat(parts, 1), 1))
    torch.testing.assert_close(m(x)[:1], m(x[:1]))


@pytest.mark.parametrize("width", [8, 12, 32, 64, 256])
def test_the_pooled_branch_is_alive_at_every_width(width):
    torch.manual_seed(0)
    m = ASPP(4, width)
    a, b = m.everywhere(frames(2, 4, 1, 1) - .5)
    assert (a - b).abs().max() > 1e-3 and width // m.here[1].num_groups >= 4
    m(frames(1, 4, 5, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in m.parameters())


@pytest.mark.parametrize("rates", [(), (6, 0), (-1,)])
def test_rates_are_positive(rates):
    with pytest.raises(StremnError, match="rates: expected one or more positive numbers"):
        ASPP(4, 8, rates)


# ---- configs and files ---------------------------------------------------------------------------------------------

def test_a_config_from_before_the_new_fields():
    "A file written before they existed names none of them; it means the defaults, and the same network."
    new = {"encoder", "norm", "aspp_rates", "decoder"}
    data = {k: v for k, v in json.loads(json.dumps(to_json(VOSConfig()))).items() if k not in new}
    assert set(data) == {"widths", "decoder_width", "key_gain", "skips", "bank", "test_side"}
    assert from_json(VOSConfig, data) == VOSConfig()
    assert VOSModel(VOSConfig()).aspp is None


@pytest.mark.parametrize("config", [paper_vos(), paper_vos(norm="frozen", aspp_rates=(), skips=False), LIGHT])
def test_configs_go_there_and_back(config):
    assert from_json(VOSConfig, json.loads(json.dumps(to_json(config)))) == config


def test_the_papers_numbers():
    c = paper_vos()
    assert (c.bank.key_channels, c.bank.value_channels, c.bank.update_channels, c.bank.slots) == (128, 512, 128, 6)
    assert (c.bank.similarity, c.bank.shared_keys, c.bank.policy, c.bank.pinned) == ("dot", False, "learned", 1)
    assert (c.encoder, c.norm, c.widths, c.skips, c.decoder) == ("resnet50", "group", (256, 512, 1024), True, "stm")
    assert (c.aspp_rates, c.decoder_width, c.key_gain, c.test_side) == ((6, 12, 18), 256, None, 480)
    assert paper_vos(skips=False) == replace(c, skips=False)


@pytest.mark.parametrize("arguments, message", [
    (dict(encoder="vgg"), "encoder: expected one of tiny, lite0, resnet18, resnet50, timm:NAME, found 'vgg'"),
    (dict(norm="batch"), "norm: expected one of group, frozen"),
    (dict(decoder="heavy"), "decoder: expected one of light, stm"),
    (dict(encoder="resnet18"), r"widths: expected \(64, 128, 256\) with resnet18, found \(24, 64\)"),
    (dict(aspp_rates=(6, 0)), "rates: expected one or more positive numbers")])
def test_configs_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(StremnError, match=message):
        VOSModel(VOSConfig(**arguments))


@torch.no_grad()
def test_a_network_with_a_resnet_goes_through_a_file(tmp_path):
    torch.manual_seed(0)
    model = VOSModel(replace(LIGHT, norm="frozen")).eval()
    again = load(save_weights(model, tmp_path / "net.safetensors", {"data": "none"}))
    x, first = frames(1, 3, 3, 40, 24), torch.ones(1, 40, 24).long()
    assert again.config == model.config
    assert torch.equal(model(x, first, torch.ones(1, 1).bool()), again(x, first, torch.ones(1, 1).bool()))


# ---- the network ---------------------------------------------------------------------------------------------------

def test_parameter_counts():
    count = lambda config: sum(p.numel() for p in VOSModel(config).parameters())
    with torch.device("meta"):
        conv = lambda a, b: 9 * a * b + b
        block = 2 * conv(256, 256)
        decoder = conv(1024, 256) + conv(512, 256) + conv(256, 256) + 5 * block + conv(256, 2)
        stm = 2 * 8_543_296 + 2 * 49 * 64 + 2 * (conv(1024, 128) + conv(1024, 512)) + decoder
        assert stm == 38_925_570
        assert count(paper_vos(aspp_rates=())) == stm + conv(1024, 128) + 1
        aspp = 1024 * 256 * (2 + 27) + 5 * 256 * 256 + 6 * 2 * 256
        assert count(paper_vos()) == stm + conv(1024, 128) + 1 + aspp + conv(256, 256) - conv(1024, 256)
        skips = conv(512, 256) + conv(256, 256) + 2 * block
        assert count(paper_vos()) - count(paper_vos(skips=False)) == skips


def test_one_step_of_the_papers_network():
    torch.manual_seed(0)
    model, x = VOSModel(paper_vos()), frames(1, 3, 3, 64, 64)
    first = torch.zeros(1, 64, 64).long()
    first[:, 8:40, 8:40], first[:, 44:, 20:60] = 1, 2
    out = model(x, first, torch.ones(1, 2).bool())
    assert out.shape == (1, 2, 3, 64, 64) and out.isfinite().all()
    F.cross_entropy(out.flatten(0, 1), first.expand(2, -1, -1)).backward()
    silent = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert silent == {"bank.update_key.weight", "bank.update_key.bias"}
    before = model.decoder.leave.weight.detach().clone()
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-4).step()
    assert not torch.equal(model.decoder.leave.weight, before)


@pytest.mark.parametrize("changes", [
    {}, {"norm": "frozen"}, {"skips": False}, {"aspp_rates": ()}, {"decoder": "light"}])
@torch.no_grad()
def test_any_size_any_number_of_objects(changes):
    torch.manual_seed(0)
    model = VOSModel(replace(LIGHT, **changes)).double().eval()
    for h, w, objects in ((32, 48, 1), (37, 50, 3), (16, 16, 2)):
        x = frames(2, 5, 3, h, w, dtype=torch.float64)
        labels = torch.randint(objects + 1, (2, h, w), generator=make_generator(1))
        out = model(x, labels, torch.ones(2, objects).bool())
        assert out.shape == (2, 4, objects + 1, h, w) and out.isfinite().all()
        alone = model(x[1:], labels[1:], torch.ones(1, objects).bool())
        torch.testing.assert_close(out[1:], alone, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_objects_may_be_listed_in_any_order():
    torch.manual_seed(0)
    model, x = VOSModel(LIGHT).double().eval(), frames(1, 5, 3, 32, 32, dtype=torch.float64)
    labels = torch.randint(4, (1, 32, 32), generator=make_generator(1))
    order = torch.tensor([0, 3, 1, 2])                                     # label i becomes order[i]
    valid = torch.ones(1, 3).bool()
    a, b = model(x, labels, valid), model(x, order[labels], valid)
    torch.testing.assert_close(a, b[:, :, order], atol=1e-6, rtol=1e-6)


def test_recomputing_is_no_part_of_the_network():
    torch.manual_seed(0)
    model, x = VOSModel(LIGHT).double(), frames(1, 5, 3, 32, 32, dtype=torch.float64)
    labels, found = torch.randint(3, (1, 32, 32), generator=make_generator(1)), []
    for on in (False, True):
        model.zero_grad()
        out = set_checkpointing(model, on)(x, labels, torch.ones(1, 2).bool(), make_generator(2))
        out[:, :, 1].sum().backward()
        found.append([out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    assert set_checkpointing(VOSModel(VOSConfig())).config == VOSConfig()


def test_both_encoders_start_from_the_same_photographs():
    torch.manual_seed(0)
    model, source = VOSModel(LIGHT), shaken("resnet18", group_norm)
    unused = load_backbones(model, source.state_dict())
    assert {n.split(".")[0] for n in unused} == {"layer4", "fc"}
    for encoder in (model.query_encoder, model.memory_encoder):
        assert torch.equal(encoder.layer3[1].conv2.weight, source.layer3[1].conv2.weight)
    for config in (VOSConfig(), small_vos()):
        with pytest.raises(StremnError, match=f"expected a ResNet as encoder, found {config.encoder}"):
            load_backbones(VOSModel(config), source.state_dict())


def test_stms_names():
    "Every tensor of STM's, listed from its description, has one place; what is not STM's keeps its start."
    encoder = {n for n in published_names("resnet50", True) if not n.startswith(("layer4", "fc"))}
    names = {f"Encoder_{e}.{n.replace('layer1', 'res2').replace('layer2', 'res3').replace('layer3', 'res4')}"
             for e in "MQ" for n in encoder}
    names |= {f"Encoder_{e}.{n}" for e in "MQ" for n in ("mean", "std")}
    names |= {"Encoder_M.conv1_m.weight", "Encoder_M.conv1_o.weight"}
    layers = ["convFM", "ResMM.conv1", "ResMM.conv2", "pred2"]
    refine = ("convFS", "ResFS.conv1", "ResFS.conv2", "ResMM.conv1", "ResMM.conv2")
    layers += [f"RF{i}.{n}" for i in (2, 3) for n in refine]
    layers = [f"Decoder.{n}" for n in layers] + [f"KV_{e}_r4.{k}" for e in "MQ" for k in ("Key", "Value")]
    names |= {f"{n}.{p}" for n in layers for p in ("weight", "bias")}
    with torch.device("meta"):
        model = VOSModel(paper_vos(norm="frozen", aspp_rates=()))
    own = {k: v.shape for k, v in model.state_dict().items()}
    tensors = {}
    for name in names:
        to = name
        for a, b in STM_NAMES.items():
            to = to.replace(a, b)
        tensors[name] = torch.empty(own.get(to, ()), device="meta")
    assert load_stm(model, tensors) == ["bank.beta", "bank.update_key.bias", "bank.update_key.weight"]
    assert load_stm(model, {f"module.{k}": v for k, v in tensors.items()}) == load_stm(model, tensors)
    with pytest.raises(StremnError, match="expected all of STM's weights, found none for bank.memory_key.bias"):
        load_stm(model, {k: v for k, v in tensors.items() if k != "KV_M_r4.Key.bias"})
    with pytest.raises(StremnError, match="found Decoder.pred9.weight"):
        load_stm(model, {"Decoder.pred9.weight": torch.empty(1)})
    for changes in ({}, {"norm": "frozen"}, {"aspp_rates": ()}, {"norm": "frozen", "aspp_rates": (), "skips": False}):
        with torch.device("meta"), pytest.raises(StremnError, match="found another kind of network"):
            load_stm(VOSModel(paper_vos(**changes)), tensors)
