"""Losses of masks and of frames against loops in float64; gradcheck, half precision, padding, ignored pixels."""
import math

import pytest
import torch
import torch.nn.functional as F

from stremn.core import StremnError
from stremn.losses import (bootstrap_fraction, bootstrapped_cross_entropy, dice_loss, gradient_loss, index_maps,
                           pixel_cross_entropy, prediction_loss, scale_invariant_gradient, segmentation_loss,
                           shrinkage_loss)


def loss_by_loops(logits, labels, dice=0., fraction=1., present=None, reduction="mean"):
    "segmentation_loss frame by frame and pixel by pixel, in float64, without any vectorised reduction."
    V, T, C, H, W = logits.shape
    frames, per_video = [], []
    for v in range(V):
        real = [0] + [o for o in range(1, C) if present is None or present[v, o - 1]]
        total = 0.
        for t in range(T):
            terms, soft = [], {o: [0., 0.] for o in real[1:]}
            for y in range(H):
                for x in range(W):
                    label = int(labels[v, t, y, x])
                    if label < 0:
                        continue
                    z = {o: float(logits[v, t, o, y, x]) for o in real}
                    top = max(z.values())
                    odds = {o: math.exp(a - top) for o, a in z.items()}
                    p = {o: a / sum(odds.values()) for o, a in odds.items()}
                    terms.append(-math.log(p[label]))
                    for o in real[1:]:
                        soft[o][0] += p[o] * (label == o)
                        soft[o][1] += p[o] + (label == o)
            if not terms:
                continue
            keep = max(1, int(len(terms) * fraction)) if fraction < 1 else len(terms)
            loss = sum(sorted(terms, reverse=True)[:keep]) / keep
            if soft:
                loss += dice * sum(1 - (2 * a + 1) / (b + 1) for a, b in soft.values()) / len(soft)
            frames.append(loss)
            total += loss
        per_video.append(total)
    return sum(frames) / len(frames) if reduction == "mean" else sum(per_video) / V


def batch(seed, V=2, T=3, O=3, H=4, W=5, low=-1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(V, T, O + 1, H, W, generator=g, dtype=dtype),
            torch.randint(low, O + 1, (V, T, H, W), generator=g))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dice,fraction", [(0., 1.), (1., 1.), (0., .25), (.5, .15)])
def test_the_loss_equals_loops_in_float64(dice, fraction, reduction):
    for seed in range(5):
        z, y = batch(seed, V=1 + seed % 3, T=1 + seed % 2, O=1 + seed % 4)
        kw = dict(dice=dice, fraction=fraction, reduction=reduction)
        assert segmentation_loss(z, y, **kw).item() == pytest.approx(loss_by_loops(z, y, **kw), abs=1e-10)


def test_plain_loss_is_torchs_cross_entropy():
    z, y = batch(0, low=0)
    assert torch.allclose(segmentation_loss(z, y), F.cross_entropy(z.flatten(0, 1), y.flatten(0, 1)), atol=1e-12)


@pytest.mark.parametrize("dice,fraction", [(0., 1.), (1., 1.), (.5, .3)])
def test_gradients_are_right(dice, fraction):
    z, y = batch(3, H=3, W=3)
    assert torch.autograd.gradcheck(lambda a: segmentation_loss(a, y, dice=dice, fraction=fraction), z.requires_grad_())


def test_gradient_is_probability_minus_truth():
    z, y = batch(4, low=0)
    z.requires_grad_()
    segmentation_loss(z, y).backward()
    want = (z.detach().softmax(2) - F.one_hot(y, 4).movedim(-1, 2)) / y.numel()
    assert torch.allclose(z.grad, want, atol=1e-12)


@pytest.mark.parametrize("dice,fraction", [(0., 1.), (1., 1.), (1., .2)])
def test_padding_changes_neither_value_nor_gradient(dice, fraction):
    z, y = batch(5, O=2)
    y[1][y[1] == 2] = 0                                                        # the second video has one object
    present = torch.tensor([[True, True, False], [True, False, False]])
    wide = torch.cat([z, 50 * torch.randn(2, 3, 1, 4, 5).double()], 2).requires_grad_()
    wide.data[1, :, 2] = 77.
    value = segmentation_loss(wide, y, dice=dice, fraction=fraction, present=present)
    assert value.item() == pytest.approx(loss_by_loops(wide.detach(), y, dice, fraction, present), abs=1e-10)
    value.backward()
    assert wide.grad.isfinite().all() and wide.grad[:, :, 3].abs().max() == 0 and wide.grad[1, :, 2].abs().max() == 0
    assert wide.grad[:, :, :2].abs().sum() > 0
    with pytest.raises(StremnError, match="padding"):
        segmentation_loss(wide, torch.full_like(y, 3), present=present)


def test_a_video_of_padding_only():
    z, y = batch(6, O=1)
    present = torch.tensor([[True], [False]])
    y[1] = 0
    z.requires_grad_()
    value = segmentation_loss(z, y, dice=1., present=present)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all() and z.grad[1].abs().max() == 0


def test_ignored_pixels_have_no_say():
    z, y = batch(7)
    z.requires_grad_()
    for kw in (dict(), dict(dice=1.), dict(fraction=.3, dice=1.)):
        grad, = torch.autograd.grad(segmentation_loss(z, y, **kw), z)
        assert grad.movedim(2, -1)[y < 0].abs().max() == 0
        other = torch.where((y < 0)[:, :, None], 100., z)
        want = segmentation_loss(z, y, **kw).item()
        assert segmentation_loss(other, y, **kw).item() == pytest.approx(want, abs=1e-12)


def test_frames_without_labels_do_not_count():
    z, y = batch(8)
    y[0, 1] = -1
    for kw in (dict(), dict(dice=1., fraction=.5)):
        assert segmentation_loss(z, y, **kw).item() == pytest.approx(loss_by_loops(z, y, **kw), abs=1e-10)
    nothing = segmentation_loss(z.requires_grad_(), torch.full_like(y, -1), dice=1., fraction=.5)
    nothing.backward()
    assert nothing.item() == 0 and z.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    z, y = batch(9, V=1, T=1, O=2, H=300, W=400, dtype=torch.float32)
    for kw in (dict(), dict(dice=1.), dict(dice=1., fraction=.15)):
        half = z.to(dtype).requires_grad_()
        value = segmentation_loss(half, y, **kw)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(segmentation_loss(half.detach().double(), y, **kw).item(), rel=1e-4)
        (value * 2**12).backward()
        assert half.grad.isfinite().all() and half.grad.abs().max() > 0
    huge = torch.zeros(1, 1, 2, 8, 8, dtype=dtype)
    huge[:, :, 0], huge[:, :, 1] = 3e4, -3e4
    assert segmentation_loss(huge, torch.ones(1, 1, 8, 8).long(), dice=1.).isfinite()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = segmentation_loss(z.double(), y, dice=1.).item()
        assert segmentation_loss(z, y, dice=1.).item() == pytest.approx(want, rel=1e-4)


def test_bootstrapped_keeps_the_hardest():
    z, y = batch(10, V=3, T=1, H=10, W=10)
    z, y = z[:, 0], y[:, 0]
    loss, counts = pixel_cross_entropy(z, y)
    last = None
    for fraction in (.01, .15, .5, .99, 1.):
        got, any_ = bootstrapped_cross_entropy(z, y, fraction)
        for v in range(3):
            n = int(counts[v].sum())
            keep = max(1, math.floor(n * fraction))
            want = loss[v][counts[v]].sort(descending=True).values[:keep].mean().item()
            assert got[v].item() == pytest.approx(want, abs=1e-12)
        assert any_.all() and (last is None or (got <= last + 1e-12).all())
        last = got
    grad, = torch.autograd.grad(bootstrapped_cross_entropy(z.requires_grad_(), y, .15)[0].sum(), z)
    assert ((grad.abs().sum(1) > 0).sum((1, 2)) == (counts.sum((1, 2)) * .15).floor()).all()


def test_the_share_of_pixels_falls_to_its_final_value():
    values = [bootstrap_fraction(s) for s in range(0, 90_000, 1000)]
    assert values[0] == 1 and values[20] == 1 and values[-1] == .15
    assert bootstrap_fraction(45_000) == pytest.approx(.575)
    assert all(a >= b for a, b in zip(values, values[1:]))
    assert bootstrap_fraction(5, start=5, end=5) == .15
    with pytest.raises(StremnError):
        bootstrap_fraction(0, start=9, end=5)


def test_dice_is_its_definition():
    g = torch.Generator().manual_seed(0)
    m, t = torch.rand(2, 3, 6, 7, generator=g), torch.rand(2, 3, 6, 7, generator=g) < .4
    loss = dice_loss(m, t)
    assert loss.shape == (2, 3) and (loss >= 0).all() and (loss <= 1).all()
    assert torch.allclose(dice_loss(t.float(), t), torch.zeros(2, 3)) and dice_loss(~t, t).min() > .9
    assert dice_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)).item() == 0
    inside = torch.rand(2, 6, 7, generator=g) < .7
    cut = dice_loss(torch.where(inside[:, None], m, 0.), t & inside[:, None])
    assert torch.allclose(dice_loss(m, t, inside), cut)
    assert torch.autograd.gradcheck(lambda a: dice_loss(a, t), m.double().requires_grad_())
    big = torch.ones(1, 1, 480, 854, dtype=torch.float16)
    assert dice_loss(big, big).item() == 0


def test_one_hot_equals_index():
    z, y = batch(11)
    z, y = z[:, 0], y[:, 0]
    one_hot = torch.stack([y == o for o in range(4)], 1)
    for form in (one_hot, one_hot.float(), one_hot.long()):
        assert torch.equal(index_maps(form, z), y)
        assert torch.equal(pixel_cross_entropy(z, form)[0], pixel_cross_entropy(z, y)[0])
    assert torch.equal(index_maps(y.to(torch.int16), z), y)


@pytest.mark.parametrize("make,words", [
    (lambda z, y: dict(labels=y + 4), "labels: expected values between -1 and 3, found"),
    (lambda z, y: dict(labels=y - 9), "labels: expected values between -1 and 3, found"),
    (lambda z, y: dict(labels=y.float()), "labels: expected index maps of an integer type, found torch.float32"),
    (lambda z, y: dict(labels=y[..., :-1]), "logits and labels: expected"),
    (lambda z, y: dict(logits=z[:, 0]), "logits and labels: expected"),
    (lambda z, y: dict(logits=z[:, :, :1], labels=y * 0), "logits: expected .* with at least one object, found"),
    (lambda z, y: dict(fraction=0.), "fraction: expected"),
    (lambda z, y: dict(fraction=1.5), "fraction: expected"),
    (lambda z, y: dict(dice=-1.), "dice: expected"),
    (lambda z, y: dict(reduction="none"), "reduction: expected"),
    (lambda z, y: dict(present=torch.ones(2, 4, dtype=torch.bool)), "present: expected shape"),
    (lambda z, y: dict(logits=z[:, :0], labels=y[:, :0]), "logits: expected at least one predicted frame, found"),
])
def test_arguments_that_do_not_fit_are_refused(make, words):
    z, y = batch(12)
    with pytest.raises(StremnError, match=words):
        segmentation_loss(**(dict(logits=z, labels=y) | make(z, y)))


@pytest.mark.parametrize("dice", [0., 1.])
def test_no_label_is_read_back_from_an_accelerator(dice):
    "On torch's meta device tensors have no values, so reading one would fail."
    z, y = torch.empty(2, 3, 4, 8, 8, device="meta"), torch.empty(2, 3, 8, 8, dtype=torch.int64, device="meta")
    present = torch.empty(2, 3, dtype=torch.bool, device="meta")
    assert segmentation_loss(z, y, dice, present=present).shape == ()
    with pytest.raises(StremnError, match="labels: expected present objects, found one that is padding"):
        segmentation_loss(z.new_zeros(1, 1, 3, 8, 8, device="cpu"), torch.full((1, 1, 8, 8), 2), dice,
                          present=torch.tensor([[True, False]]))


# ---- losses of predicted frames ------------------------------------------------------------------------------------

def two_frames(seed, *shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g, dtype=dtype), torch.rand(shape, generator=g, dtype=dtype)


def shrinkage_by_loops(pred, true, power, a, c, label_weight):
    "Value by value, from the definition."
    total = 0.
    for p, y in zip(pred.flatten().tolist(), true.flatten().tolist()):
        l = abs(p - y)
        total += l**power / (1 + math.exp(a * (c - l))) * (math.exp(y) if label_weight else 1.)
    return total / pred.numel()


def gradient_by_loops(pred, true, steps, eps, smooth):
    "Frame by frame, pixel by pixel, from the definition; outside the border a pixel is its own neighbour."
    pred, true = (f.reshape(-1, *f.shape[-2:]) for f in (pred, true))
    H, W = pred.shape[-2:]
    total = 0.
    for h in steps:
        for p, t in zip(pred.tolist(), true.tolist()):
            for r in range(H):
                for c in range(W):
                    square = 0.
                    for dr, dc in ((0, h), (h, 0)):
                        if r + dr < H and c + dc < W:
                            pairs = [(f[r][c], f[r + dr][c + dc]) for f in (p, t)]
                            g = [(v - u) / (abs(v) + abs(u) + eps) for u, v in pairs]
                            square += (g[0] - g[1])**2
                    total += math.sqrt(square + smooth)
    return total / pred.numel()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("a,c,label_weight", [(10., .2, False), (10., .2, True), (3., .5, False), (0., 0., False),
                                              (50., .01, True)])
def test_shrinkage_equals_its_definition(power, a, c, label_weight):
    for seed, shape in enumerate([(2, 3, 1, 4, 5), (7,), (3, 3, 3)]):
        p, t = two_frames(seed, *shape)
        got = shrinkage_loss(p, t, power, a, c, label_weight).item()
        assert got == pytest.approx(shrinkage_by_loops(p, t, power, a, c, label_weight), rel=1e-12)


def test_shrinkage_is_symmetric_bounded_and_differentiable():
    p, t = two_frames(1, 2, 2, 1, 6, 6)
    assert shrinkage_loss(t, t, 1).item() == shrinkage_loss(t, t, 2).item() == 0
    assert shrinkage_loss(p, t, 1, a=0.).item() == pytest.approx(F.l1_loss(p, t).item() / 2)
    assert shrinkage_loss(p, t, 2, a=0.).item() == pytest.approx(F.mse_loss(p, t).item() / 2)
    assert shrinkage_loss(p, t, 2).item() == pytest.approx(shrinkage_loss(t, p, 2).item())
    assert shrinkage_loss(p, t, 2).item() < F.mse_loss(p, t).item()
    for power in (1, 2):                                                          # the gradient, in closed form
        l = torch.linspace(.01, 1, 50, dtype=torch.float64).requires_grad_()
        got, = torch.autograd.grad(shrinkage_loss(l, torch.zeros_like(l), power) * 50, l)
        s = torch.sigmoid(10 * (l - .2))
        assert torch.allclose(got, l**(power - 1) * s * (power + 10 * l * (1 - s)), atol=1e-12)
        assert torch.autograd.gradcheck(lambda x, g=power: shrinkage_loss(x, t, g), p.clone().requires_grad_())
    wild = torch.tensor([-1e4, 1e4, 300.]).requires_grad_()                       # no overflow far away
    value = shrinkage_loss(wild, torch.zeros(3), 1, a=1e3)
    value.backward()
    assert value.isfinite() and wild.grad.isfinite().all()


@pytest.mark.parametrize("steps,eps,smooth", [((1, 2, 4, 8, 16), 1e-2, 1e-5), ((1,), 1e-3, 1e-5), ((3, 7), .1, 1e-2)])
def test_gradient_loss_equals_its_definition(steps, eps, smooth):
    for seed, shape in enumerate([(2, 2, 3, 5, 6), (9, 4), (1, 18, 17)]):
        p, t = two_frames(seed, *shape)
        p = p * 1.4 - .2                                                          # negative values happen
        want = gradient_by_loops(p, t, steps, eps, smooth)
        assert gradient_loss(p, t, steps, eps, smooth).item() == pytest.approx(want, rel=1e-12)


def test_gradient_loss_compares_contrasts():
    p, t = two_frames(2, 2, 1, 20, 20)
    assert gradient_loss(t, t).item() == pytest.approx(5 * math.sqrt(1e-5), rel=1e-9)
    g = scale_invariant_gradient(p, 3)
    assert g.shape == (2, 1, 2, 20, 20) and g.abs().max() < 1
    assert g[..., 0, :, -3:].abs().max() == 0 and g[..., 1, -3:, :].abs().max() == 0 and (g[..., 0, :, :-3] != 0).all()
    assert torch.equal(scale_invariant_gradient(p, 20), torch.zeros(2, 1, 2, 20, 20).double())
    bright, dark = (scale_invariant_gradient(k * (p + 1), 2, eps=1e-6) for k in (.5, .05))
    assert torch.allclose(bright, dark, atol=1e-4)                                # contrast does not know the light
    assert gradient_loss(p + .3, p).item() > gradient_loss(p, p).item()
    x, y = p[..., :6, :6].clone().requires_grad_(), t[..., :6, :6]
    assert torch.autograd.gradcheck(lambda v: gradient_loss(v, y, (1, 2)), x)
    black = torch.zeros(1, 1, 8, 8).requires_grad_()                              # the darkest corner of the formula
    gradient_loss(black, torch.zeros(1, 1, 8, 8)).backward()
    assert black.grad.isfinite().all()


@pytest.mark.parametrize("weights", [dict(), dict(l1=.5, l2=2., gradient=.1), dict(gradient=0.), dict(l1=0., l2=0.),
                                     dict(a=5., c=.1, label_weight=True)])
def test_prediction_loss_is_the_sum(weights):
    p, t = two_frames(3, 2, 2, 1, 7, 8)
    w = dict(l1=1., l2=1., gradient=1., a=10., c=.2, label_weight=False) | weights
    want = sum(w[f"l{g}"] * shrinkage_by_loops(p, t, g, w["a"], w["c"], w["label_weight"]) for g in (1, 2))
    want += w["gradient"] * gradient_by_loops(p, t, (1, 2, 4, 8, 16), 1e-2, 1e-5)
    assert prediction_loss(p, t, **weights).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frame_losses_in_half_precision(dtype):
    p, t = two_frames(4, 1, 2, 1, 32, 32, dtype=torch.float32)
    half = p.to(dtype).requires_grad_()
    value = prediction_loss(half, t)
    value.backward()
    assert value.dtype == torch.float32 and half.grad.isfinite().all() and half.grad.abs().max() > 0
    assert value.item() == pytest.approx(prediction_loss(p.to(dtype).double(), t.double()).item(), rel=1e-4)


@pytest.mark.parametrize("call,words", [
    (lambda p, t: shrinkage_loss(p, t[..., 1:]), "frames: expected two stacks of one shape"),
    (lambda p, t: shrinkage_loss(p, t, 3), "power: expected 1 or 2"),
    (lambda p, t: shrinkage_loss(p, t, a=-1.), "a and c: expected"),
    (lambda p, t: gradient_loss(p, t[:1]), "frames: expected two stacks of one shape"),
    (lambda p, t: gradient_loss(p[0, 0, 0, 0], t[0, 0, 0, 0]), "H,W"),
    (lambda p, t: gradient_loss(p, t, ()), "steps: expected"),
    (lambda p, t: gradient_loss(p, t, (0,)), "step: expected"),
    (lambda p, t: gradient_loss(p, t, eps=0.), "eps: expected"),
    (lambda p, t: gradient_loss(p, t, smooth=0.), "smooth: expected"),
    (lambda p, t: prediction_loss(p, t, l1=-1.), "weights: expected"),
    (lambda p, t: prediction_loss(p, t, 0., 0., 0.), "weights: expected")])
def test_frames_that_do_not_fit_are_refused(call, words):
    with pytest.raises(StremnError, match=words):
        call(*two_frames(5, 2, 2, 1, 6, 6))
