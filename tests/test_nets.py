"""Contracts of blocks, encoders and decoders: every size, independence of rows, and the parts' own arithmetic."""
import itertools

import pytest
import torch
import torch.nn.functional as F

from stremn.core import StremnError, make_generator
from stremn.nets.blocks import Refine, ResBlock, pad_to, unpad
from stremn.nets.decoders import MaskDecoder
from stremn.nets.efficientnet import LiteEncoder, LiteMemoryEncoder
from stremn.nets.encoders import TinyEncoder
from stremn.nets.resnet import ResNetEncoder


def noise(*shape, seed=0, dtype=torch.float32):
    "Reproducible normal numbers."
    return torch.randn(*shape, generator=make_generator(seed), dtype=dtype)


# ---- padding -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("multiple", [1, 2, 3, 4, 8, 16])
def test_padding_is_undone_centred_and_least(multiple):
    for h, w in itertools.product((1, 2, 3, 5, 7, 8, 15, 16, 17, 31), repeat=2):
        x = noise(2, 3, h, w)
        padded, (left, right, top, bottom) = pad_to(x, multiple)
        assert torch.equal(unpad(padded, (left, right, top, bottom)), x)
        assert padded.shape[-2:] == (-(-h // multiple) * multiple, -(-w // multiple) * multiple)
        assert 0 <= right - left <= 1 and 0 <= bottom - top <= 1
        assert padded.abs().sum().isclose(x.abs().sum())


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 5, 7), (2, 2, 3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.float16])
def test_padding_takes_any_rank_and_type(shape, dtype):
    x = torch.ones(shape, dtype=dtype)
    padded, pads = pad_to(x, 4)
    assert padded.dtype == dtype and padded.shape == (*shape[:-2], 8, 8) and torch.equal(unpad(padded, pads), x)


def test_padding_carries_the_gradient_of_what_is_kept():
    x = noise(1, 5, 6).requires_grad_()
    unpad(*pad_to(x, 4)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("multiple", [0, -4])
def test_a_multiple_is_positive(multiple):
    with pytest.raises(StremnError, match="multiple"):
        pad_to(noise(4, 4), multiple)


# ---- blocks --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("inp, out", [(3, 3), (3, 5), (5, 3), (1, 1)])
def test_a_block_is_its_formula(inp, out):
    block, x = ResBlock(inp, out).double(), noise(2, inp, 6, 5, dtype=torch.float64)
    conv = lambda layer, y: F.conv2d(y, layer.weight, layer.bias, padding=1)
    short = x if inp == out else conv(block.fit, x)
    torch.testing.assert_close(block(x), short + conv(block.conv2, conv(block.conv1, x.clamp(min=0)).clamp(min=0)))
    assert isinstance(block.fit, torch.nn.Identity) == (inp == out)


@pytest.mark.parametrize("inp, skip, out", [(4, 3, 4), (4, 3, 6), (4, 0, 6), (4, 0, 4)])
def test_refine_doubles_any_size(inp, skip, out):
    torch.manual_seed(0)
    refine = Refine(inp, skip, out)
    for h, w in ((1, 1), (2, 5), (7, 3)):
        x, s = noise(2, inp, h, w), noise(2, skip, 2 * h, 2 * w) if skip else None
        assert refine(x, s).shape == (2, out, 2 * h, 2 * w)
    assert (refine.skip is None) == (skip == 0)


def test_refine_adds_a_linear_function_of_the_skip():
    torch.manual_seed(0)
    refine = Refine(3, 2, 4).double()
    refine.merge = torch.nn.Identity()
    x, a, b = noise(1, 3, 3, 4, dtype=torch.float64), *noise(2, 1, 2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(refine(x, a) + refine(x, b), refine(x, a + b) + refine(x, 0 * a))
    torch.testing.assert_close(refine(x, a) - refine(0 * x, a), refine(x, b) - refine(0 * x, b))


def test_stms_refinement_digests_the_skip_first():
    torch.manual_seed(0)
    light, full = Refine(4, 3, 4).double(), Refine(4, 3, 4, block=True).double()
    x, skip = noise(2, 4, 3, 5, dtype=torch.float64), noise(2, 3, 6, 10, dtype=torch.float64)
    light.load_state_dict({k.replace("skip.0.", "skip."): v for k, v in full.state_dict().items() if ".1." not in k})
    double = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(full(x, skip), full.merge(double + full.skip[1](full.skip[0](skip))))
    full.skip[1].conv2.weight.data.zero_(), full.skip[1].conv2.bias.data.zero_()
    torch.testing.assert_close(full(x, skip), light(x, skip))               # a silent block leaves the light one
    assert Refine(4, 0, 4, block=True).skip is None


# ---- encoders ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("widths", [(4,), (4, 6), (3, 5, 7), (2, 2, 2, 2)])
@pytest.mark.parametrize("planes", [0, 2, 5])
def test_maps_halve_stage_by_stage(widths, planes):
    net, stride = TinyEncoder(widths, planes), 2**len(widths)
    for h, w in ((stride, stride), (2 * stride, 3 * stride)):
        maps = net(torch.rand(2, 3 + planes, h, w))
        want = [(2, c, h // 2**(i + 1), w // 2**(i + 1)) for i, c in enumerate(widths)]
        assert [tuple(m.shape) for m in maps] == want


def test_widths_may_be_a_list_but_not_empty():
    assert len(TinyEncoder([4, 5])(torch.rand(1, 3, 8, 8))) == 2
    with pytest.raises(StremnError, match="at least one stage"):
        TinyEncoder(())


@pytest.mark.parametrize("make", [lambda: TinyEncoder((4, 6), 2), lambda: MaskDecoder(5, (4,), 6)])
def test_rows_do_not_mix(make):
    torch.manual_seed(0)
    net = make().double().eval()
    encoder = isinstance(net, TinyEncoder)
    x, skip = noise(4, 5, 8, 8, dtype=torch.float64), noise(4, 4, 16, 16, dtype=torch.float64)
    call = lambda rows: net(x[rows])[-1] if encoder else net(x[rows], [skip[rows]])
    whole = call([0, 1, 2, 3])
    for rows in ([2], [3, 0], [1, 1, 2]):
        torch.testing.assert_close(call(rows), whole[rows])


# ---- decoders ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("skips", [(), (4,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("use", [True, False])
def test_a_decoder_ends_at_full_resolution(skips, use):
    torch.manual_seed(0)
    net, n = MaskDecoder(6, skips, 5, use), len(skips)
    for h, w in ((1, 1), (3, 2)):
        maps = [noise(2, c, h * 2**(n - i), w * 2**(n - i)) for i, c in enumerate(skips)]
        out = net(noise(2, 6, h, w), maps)
        assert out.shape == (2, h * 2**(n + 1), w * 2**(n + 1))
        if not use:
            assert torch.equal(out, net(noise(2, 6, h, w), [m + 1 for m in maps]))
    assert any("skip" in name for name, _ in net.named_parameters()) == (use and n > 0)


@pytest.mark.parametrize("finest", [1, 2, 4])
@pytest.mark.parametrize("use", [True, False])
def test_stms_decoder_has_two_logits_and_ends_anywhere(finest, use):
    torch.manual_seed(0)
    net = MaskDecoder(6, (3, 5), 4, use, stm=True, finest=finest).double()
    x, maps = noise(2, 6, 2, 3, dtype=torch.float64), [noise(2, c, 2 * s, 3 * s, dtype=torch.float64)
                                                       for c, s in ((3, 4), (5, 2))]
    y = net.enter(x)
    for step, skip in zip(net.refine, maps[::-1]):
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        y = step.merge(y + step.skip(skip) if use else y)
    two = F.interpolate(net.leave(F.relu(y)), scale_factor=finest, mode="bilinear", align_corners=False)
    assert two.shape == (2, 2, 8 * finest, 12 * finest)
    torch.testing.assert_close(net(x, maps).sigmoid(), two.softmax(1)[:, 1])
    one = MaskDecoder(6, (3, 5), 4, use)
    assert (len(one.leave.weight), len(net.leave.weight)) == (1, 2) and one.finest == 2


@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_decoder_wants_its_number_of_skips(given):
    with pytest.raises(StremnError, match=f"expected 2 maps, finest first, found {given}"):
        MaskDecoder(6, (3, 4), 5)(noise(1, 6, 2, 2), [noise(1, 3, 8, 8)] * given)


def test_every_weight_of_encoder_and_decoder_learns():
    torch.manual_seed(0)
    encoder, decoder = TinyEncoder((6, 8), 2), MaskDecoder(8, (6,), 6)
    fine, coarse = encoder(torch.rand(2, 5, 16, 16))
    decoder(coarse, [fine]).pow(2).sum().backward()
    still = [n for net in (encoder, decoder) for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still


# ---- what an encoder says about its maps ---------------------------------------------------------------------------

ENCODERS = {"one stage": (lambda: TinyEncoder((8,)), lambda: TinyEncoder((8,), 2)),
            "three stages": (lambda: TinyEncoder((4, 6, 8)), lambda: TinyEncoder((4, 6, 8), 2)),
            "resnet18": (lambda: ResNetEncoder("resnet18"), lambda: ResNetEncoder("resnet18", planes=2)),
            "lite0": (lambda: LiteEncoder(8), lambda: LiteMemoryEncoder(8, (4, 6, 8)))}


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_every_encoder_tells_channels_and_reduction_of_its_maps(name):
    query, memory = (make().eval() for make in ENCODERS[name])
    for multiples in ((1, 1), (2, 3)):
        h, w = (n * query.pad_multiple for n in multiples)
        frame = torch.rand(1, 3, h, w, generator=make_generator(0))
        maps = query(frame)
        answers = memory(torch.cat([frame, frame[:, :2]], 1), maps[-1])
        for encoder, found in ((query, maps), (memory, answers)):
            assert [tuple(m.shape[1:]) for m in found] == [(c, h // r, w // r) for c, r in encoder.feature_info]
    assert query.pad_multiple == memory.pad_multiple and query.feature_info[-1] == memory.feature_info[-1]
    assert query.pad_multiple == {"one stage": 2, "three stages": 8}.get(name, 16)


@pytest.mark.parametrize("name", ["one stage", "resnet18"])
@torch.no_grad()
def test_memory_encoders_without_use_for_the_query_map_ignore_it(name):
    memory = ENCODERS[name][1]().eval()
    x = noise(1, 5, 32, 32)
    for plain, given in zip(memory(x), memory(x, noise(1, 8, 2, 2, seed=1)), strict=True):
        assert torch.equal(plain, given)
