"""Contracts of the prediction baselines: cells against loops in float64, causality, one call for all."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from random_video import video
from stremn.config import from_json, to_json
from stremn.core import StremnError, make_generator
from stremn.models.hub import TASKS, load, save_weights
from stremn.models.prediction import OUTPUTS, PredictionModel
from stremn.models.prediction_baselines import (
    BASELINES, ConstantVelocity, ConvLSTM, ConvLSTMCell, ConvLSTMConfig, CopyLast, Inception, MedianOfSeen, PredRNN,
    PredRNNConfig, SimVP, SimVPConfig, STLSTMCell, correlate_phase, global_shift, translate)

SMALL = {"convlstm": lambda **c: ConvLSTM(ConvLSTMConfig(**dict(hidden=3, layers=2, kernel=3, patch=2) | c)),
         "predrnn": lambda **c: PredRNN(PredRNNConfig(**dict(hidden=3, layers=2, kernel=3, patch=2) | c)),
         "simvp": lambda **c: SimVP(SimVPConfig(**dict(observed=4, hidden=4, width=8, groups=2, kernels=(1, 3),
                                                       strides=(1, 2)) | c))}
LEARNED = sorted(SMALL)


def network(name, seed=0, **changes):
    "A small network in evaluation mode, in float64."
    torch.manual_seed(seed)
    return SMALL[name](**changes).double().eval()


def kernels(conv, n):
    "The convolutions that one convolution holds: (weight, bias) of n channels each."
    bias = torch.zeros(conv.out_channels, dtype=torch.float64) if conv.bias is None else conv.bias
    return list(zip(conv.weight.split(n), bias.split(n)))


def convolve(kernel, x):
    "By unfolding: no convolution of torch's."
    weight, bias = kernel
    k = weight.shape[-1]
    columns = F.unfold(x, k, padding=k // 2)
    return (weight.flatten(1) @ columns + bias[:, None]).unflatten(-1, x.shape[2:])


# ---- without weights -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("H, W", [(5, 6), (8, 8), (7, 12)])
def test_every_circular_shift_is_found(H, W):
    a = torch.rand(2, 3, H, W, generator=make_generator(H), dtype=torch.float64)
    for dy in range(-(H // 2), (H + 1) // 2):
        for dx in range(-(W // 2), (W + 1) // 2):
            b = a.roll((dy, dx), (2, 3))
            r = correlate_phase(a, b)
            assert global_shift(a, b).tolist() == [[dy, dx]] * 2
            torch.testing.assert_close(r.amax((1, 2)), torch.ones(2, dtype=torch.float64))
            torch.testing.assert_close(r.abs().sum((1, 2)), torch.ones(2, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("M", [1, 2, 5, 10])
def test_the_median_is_numpys(M):
    frames = video(2, M, 3)
    out = MedianOfSeen()(frames, 3)
    assert out.shape == (2, 3, 3, 8, 12) and torch.equal(out[:, 0], out[:, 2])
    np.testing.assert_allclose(out[:, 0], np.median(frames.numpy(), 1), rtol=0, atol=1e-15)


def test_flat_pictures_do_not_move():
    flat = torch.full((1, 1, 8, 8), .5)
    assert global_shift(flat, flat).tolist() == [[0, 0]] and correlate_phase(flat, flat).isfinite().all()
    black = torch.zeros(1, 4, 1, 8, 8)
    assert torch.equal(ConstantVelocity()(black, 2), black[:, :2])


def test_a_translated_frame_repeats_the_border():
    x = torch.rand(3, 2, 5, 7, generator=make_generator(0))
    shift = torch.tensor([[2, -3], [0, 0], [-9, 9]])
    out = translate(x, shift)
    for v in range(3):
        for r in range(5):
            for c in range(7):
                y, z = (min(max(i - int(s), 0), n - 1) for i, s, n in zip((r, c), shift[v], (5, 7)))
                assert torch.equal(out[v, :, r, c], x[v, :, y, z])


def test_constant_velocity_carries_on_and_copy_does_not():
    world = torch.rand(1, 1, 8, 60, generator=make_generator(1))
    pan = torch.stack([world[..., 2 * t:2 * t + 16] for t in range(8)], 1)
    out = ConstantVelocity()(pan[:, :3], 4)
    for n in range(4):
        torch.testing.assert_close(out[:, n, ..., :16 - 2 * (n + 1)], pan[:, 3 + n, ..., :16 - 2 * (n + 1)])
    assert torch.equal(CopyLast()(pan[:, :3], 4), pan[:, 2:3].expand(-1, 4, -1, -1, -1))
    apart = torch.stack([pan[0, :3], pan[0, :3].flip(-1)])                      # each video by itself
    torch.testing.assert_close(ConstantVelocity()(apart, 2)[1], out[0, :2].flip(-1))


# ---- cells against equations ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("inp, hidden, kernel", [(1, 2, 1), (3, 2, 3), (2, 4, 5)])
def test_conv_lstm_equations(inp, hidden, kernel):
    torch.manual_seed(inp)
    cell = ConvLSTMCell(inp, hidden, kernel).double()
    torch.nn.init.normal_(cell.peep)
    x, h, c = (torch.randn(2, n, 5, 4, dtype=torch.float64) for n in (inp, hidden, hidden))
    i, f, g, o = (convolve(k, torch.cat([x, h], 1)) for k in kernels(cell.gates, hidden))
    wi, wf, wo = cell.peep
    new = torch.sigmoid(f + wf * c) * c + torch.sigmoid(i + wi * c) * torch.tanh(g)
    shown = torch.sigmoid(o + wo * new) * torch.tanh(new)
    for ours, expected in zip(cell(x, h, c), (shown, new)):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("inp, hidden, kernel", [(1, 2, 1), (3, 2, 3), (2, 4, 5)])
def test_st_lstm_equations(inp, hidden, kernel):
    torch.manual_seed(inp)
    cell = STLSTMCell(inp, hidden, kernel).double()
    x, h, c, m = (torch.randn(2, n, 5, 4, dtype=torch.float64) for n in (inp, hidden, hidden, hidden))
    X, Hs, Ms = ([convolve(k, y) for k in kernels(conv, hidden)]
                 for conv, y in ((cell.of_x, x), (cell.of_h, h), (cell.of_m, m)))
    c1 = torch.sigmoid(X[1] + Hs[1]) * c + torch.sigmoid(X[0] + Hs[0]) * torch.tanh(X[2] + Hs[2])
    m1 = torch.sigmoid(X[4] + Ms[1]) * m + torch.sigmoid(X[3] + Ms[0]) * torch.tanh(X[5] + Ms[2])
    W, nil = cell.of_cm.weight, torch.zeros(hidden, dtype=torch.float64)
    o = torch.sigmoid(X[6] + Hs[3] + convolve((W[:, :hidden], nil), c1) + convolve((W[:, hidden:], nil), m1))
    shown = o * torch.tanh(convolve((cell.show.weight, nil), torch.cat([c1, m1], 1)))
    for ours, expected in zip(cell(x, h, c, m), (shown, c1, m1)):
        torch.testing.assert_close(ours, expected)


def test_inception_is_a_sum_of_branches():
    torch.manual_seed(0)
    block = Inception(6, 8, 4, (1, 3, 5), 2).double()
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    entered = block.enter(x)
    want = torch.zeros(2, 8, 7, 9, dtype=torch.float64)
    for conv, norm, act in block.branches:
        halves = [convolve(k, e) for k, e in zip(kernels(conv, 4), entered.split(2, 1))]
        want = want + act(norm(torch.cat(halves, 1)))
    torch.testing.assert_close(block(x), want)


# ---- whole networks ------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_zigzag_by_hand():
    model, frames = network("predrnn", layers=3), video(1, 4)
    zero = torch.zeros(1, 3, 4, 6, dtype=torch.float64)
    h, c, m, out = [zero] * 3, [zero] * 3, zero, []
    for frame in frames.unbind(1):
        x = F.pixel_unshuffle(6 * (frame - .5), 2)
        for i, cell in enumerate(model.cells):
            h[i], c[i], m = cell(x, h[i], c[i], m)
            x = h[i]
        raw = F.pixel_shuffle(model.leave(x), 2)
        gate = (raw[:, 1:] - 3).sigmoid()
        out.append(gate * raw[:, :1].sigmoid() + (1 - gate) * frame)
    torch.testing.assert_close(model(frames, 1, warm_up=True), torch.stack(out, 1))


@pytest.mark.parametrize("name", ["convlstm", "predrnn"])
@torch.no_grad()
def test_forward_is_a_loop_of_step(name):
    model, frames = network(name), video(2, 4)
    state, out = None, []
    for t in range(8):
        answer, state = model.step(state, frames[:, t] if t < 4 else out[-1])
        out.append(answer)
    assert torch.equal(model(frames, 5, warm_up=True), torch.stack(out, 1))
    assert torch.equal(model(frames, 5), torch.stack(out[3:], 1))


@torch.no_grad()
def test_simvp_goes_on_from_its_answers():
    model, frames = network("simvp"), video(2, 6)
    first = model.ahead(frames[:, 2:])
    second = model.ahead(first)
    torch.testing.assert_close(model(frames, 7), torch.cat([first, second[:, :3]], 1))
    torch.testing.assert_close(model(frames, 2), first[:, :2])
    truth = video(2, 8, seed=1)
    torch.testing.assert_close(model(frames, 8, truth, 1.)[:, 4:], model.ahead(truth[:, :4]))


@pytest.mark.parametrize("name", LEARNED)
def test_every_weight_learns_and_gradients_cross_time(name):
    model, frames = network(name), video(2, 6).requires_grad_()
    if name == "convlstm":
        for cell in model.cells:
            torch.nn.init.normal_(cell.peep)
    model(frames, 3).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    seen = 4 if name == "simvp" else 6
    assert (frames.grad.abs().flatten(2).sum((0, 2))[-seen:] > 0).all()


@pytest.mark.parametrize("name", LEARNED)
@torch.no_grad()
def test_causality_and_sampling(name):
    model, frames = network(name), video(5, 12)
    ask = lambda p, truth=frames[:, 6:], seed=0: model(frames[:, :6], 6, truth, p, make_generator(seed))  # noqa: E731
    own = ask(0.)
    assert torch.equal(own, model(frames[:, :6], 6))
    for t in range(6):
        other = frames[:, 6:].clone()
        other[:, t:] = video(5, 12, seed=9)[:, 6 + t:]
        assert torch.equal(ask(1., other)[:, :t + 1], ask(1.)[:, :t + 1])
    half = ask(.5)
    assert torch.equal(half, ask(.5)) and not torch.equal(half, ask(.5, seed=1)) and torch.equal(half[:, 0], own[:, 0])


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", LEARNED)
@torch.no_grad()
def test_one_call_for_all(name, channels, output):
    model, frames = network(name, channels=channels, output=output), video(2, 5, channels)
    out = model(frames, 6)
    assert out.shape == (2, 6, channels, 8, 12) and out.min() >= 0 and out.max() <= 1
    for v in range(2):
        torch.testing.assert_close(model(frames[v:v + 1], 6)[0], out[v])


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_bad_input_is_one_line(name):
    model = BASELINES[name]() if name not in SMALL else network(name)
    frames = video(1, 4)
    cases = [((frames[0], 2), "frames: expected floats"), ((frames, 0), "future: expected 1"),
             ((frames - 1, 2), "numbers in"), ((frames.masked_fill(frames > .5, torch.nan), 2), "found nan"),
             ((frames, 2, None, .5), "truth: expected the true frames"), ((frames, 2, frames, .5), "truth: expected")]
    if name in SMALL:
        cases += [((frames.expand(-1, -1, 3, -1, -1), 2), "1 channels"), ((frames[..., :11], 2), "multiples of 2")]
    if name in ("simvp", "velocity"):
        cases.append(((frames[:, :1], 2), "expected at least"))
    for args, message in cases:
        with pytest.raises(StremnError, match=message) as e:
            model(*args)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["memory", *BASELINES])
@torch.no_grad()
def test_every_config_says_what_its_network_asks_of_frames(name):
    model = PredictionModel() if name == "memory" else BASELINES[name]()
    need = model.config
    stored = {"channels", "multiple", "min_frames"} & to_json(need).keys()
    assert stored == {"channels"} or name in ("copy", "median", "velocity")  # fields on disk stay as they are
    side = 2 * need.multiple
    enough = torch.rand(1, need.min_frames, need.channels, side, side, generator=make_generator(0))
    assert model(enough, 2).shape == (1, 2, need.channels, side, side)
    if need.min_frames > 1:
        with pytest.raises(StremnError, match=f"expected at least {need.min_frames}, found {need.min_frames - 1}"):
            model(enough[:, 1:], 2)
    if need.multiple > 1:
        with pytest.raises(StremnError, match=f"multiples of {need.multiple}"):
            model(enough[..., 1:], 2)


@pytest.mark.parametrize("make, message", [
    (lambda: ConvLSTMConfig(kernel=4), "kernel: expected"), (lambda: PredRNNConfig(hidden=0), "hidden: expected"),
    (lambda: ConvLSTMConfig(output="none"), "output: expected"), (lambda: SimVPConfig(groups=9), "width: expected"),
    (lambda: SimVPConfig(kernels=(2,)), "kernels: expected"), (lambda: SimVPConfig(strides=(2, 2)), "strides:"),
    (lambda: SimVPConfig(output=""), "output: expected one of")])
def test_config_errors(make, message):
    with pytest.raises(StremnError, match=message):
        make()


def test_equal_numbers_of_weights():
    counts = [sum(p.numel() for p in make().parameters()) for make in (PredictionModel, ConvLSTM, PredRNN, SimVP)]
    assert counts[0] == min(counts) and max(counts) < 1.06 * min(counts)


@pytest.mark.parametrize("name", LEARNED)
def test_files(name, tmp_path):
    model = SMALL[name]().eval()
    assert TASKS[name] == (type(model.config), type(model))
    assert from_json(type(model.config), to_json(model.config)) == model.config
    again = load(save_weights(model, tmp_path / "b.safetensors", {"note": "untrained"}, name))
    frames = video(1, 4, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(frames, 3), model(frames, 3))
