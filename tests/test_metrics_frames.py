"Frame metrics against scikit-image, torchvision's AlexNet and each program's procedure retold in numpy, in float64."
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from stremn.core import StremnError
from stremn.data.walkers import TEST_PEOPLE, WalkersConfig, walkers_batch
from stremn.metrics import frames as module
from stremn.metrics.frames import (CONVENTIONS, LPIPS, METRICS, TABLE_5, FrameScore, as_bytes, download_lpips,
                                   frame_error, load_lpips, lpips_of, psnr, score_frames, ssim, table_5_cells)
from stremn.paper import TABLES


def clips(seed, N=2, T=3, C=1, H=16, W=18, over=.15, dtype=torch.float32):
    "True frames with some structure, whole bytes; predictions that are blurred, noisy and overshoot."
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, H), torch.linspace(0, 1, W), indexing="ij")
    phase = 6 * torch.rand(N, T, C, 1, 1, generator=g)
    true = .5 + .4 * torch.sin(9 * x + 5 * y + phase) + .1 * torch.rand(N, T, C, H, W, generator=g)
    true = (true.clamp(0, 1) * 255).round() / 255
    pred = (true + over * torch.randn(N, T, C, H, W, generator=g))
    return pred.to(dtype), true.to(dtype)


@pytest.fixture(scope="module")
def random_net():
    torch.manual_seed(0)
    net = LPIPS()
    for i in range(5):
        getattr(net, f"lin{i}").weight.abs_()
    return net


# ---- each metric ---------------------------------------------------------------------------------------------------

def test_frame_error_and_psnr_equal_loops():
    for seed, C in ((0, 1), (1, 3)):
        p, t = clips(seed, C=C, dtype=torch.float64)
        for n in range(2):
            for k in range(3):
                a, b = p[n, k].flatten().tolist(), t[n, k].flatten().tolist()
                square, absolute = sum((u - v)**2 for u, v in zip(a, b)), sum(abs(u - v) for u, v in zip(a, b))
                assert frame_error(p, t)[n, k].item() == pytest.approx(square, rel=1e-12)
                assert frame_error(p, t, 1)[n, k].item() == pytest.approx(absolute, rel=1e-12)
                assert psnr(p, t)[n, k].item() == pytest.approx(-10 * math.log10(square / len(a)), rel=1e-12)
                assert psnr(255 * p, 255 * t, 255.)[n, k].item() == pytest.approx(psnr(p, t)[n, k].item(), rel=1e-12)
    assert psnr(t, t).isinf().all() and frame_error(t, t).abs().max() == 0


def test_bytes_are_those_of_numpy():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(10000, generator=g)
    for v in (x, torch.arange(256) / 255, torch.tensor([0., 1., .9999999, 1e-9])):
        assert np.array_equal(as_bytes(v).numpy(), np.uint8(v.numpy() * 255).astype(np.float32))
    assert torch.equal(as_bytes(torch.arange(256) / 255), torch.arange(256.))
    assert as_bytes(torch.tensor([-3., 7.])).tolist() == [0, 255]


@pytest.mark.parametrize("shape", [(7, 7), (9, 30), (16, 16)])
@pytest.mark.parametrize("data_range", [1., 2., 255.])
def test_ssim_is_that_of_scikit_image(shape, data_range):
    skimage = pytest.importorskip("skimage.metrics")
    for seed, C in ((0, 1), (1, 3)):
        p, t = clips(seed, C=C, H=shape[0], W=shape[1], dtype=torch.float64)
        got = ssim(p, t, data_range)
        for n in range(2):
            for k in range(3):
                want = skimage.structural_similarity(p[n, k].numpy(), t[n, k].numpy(), data_range=data_range,
                                                     channel_axis=0)
                assert got[n, k].item() == pytest.approx(want, abs=1e-12)


def test_ssim_is_one_for_equal_frames_and_blind_to_order():
    p, t = clips(3, H=20, W=20)
    assert ssim(t, t).numpy() == pytest.approx(1.) and torch.allclose(ssim(p, t), ssim(t, p))
    assert torch.allclose(ssim(p, t), ssim(p.flip(-1).transpose(-1, -2), t.flip(-1).transpose(-1, -2)))
    assert torch.allclose(ssim(255 * p, 255 * t, 255.), ssim(p, t, 1.), atol=1e-9)
    values = [ssim(p, t, R).mean().item() for R in (.5, 1., 2., 4.)]
    assert values == sorted(values)                                                # the free gain of a wrong range
    many = torch.cat([p] * 200).flatten(0, 1)                                      # more frames than one chunk
    assert torch.allclose(ssim(many, torch.cat([t] * 200).flatten(0, 1)), ssim(p, t).flatten().repeat(200), atol=1e-12)


# ---- LPIPS ---------------------------------------------------------------------------------------------------------

@cache
def torchvision_features():
    "AlexNet's convolutions; building all of AlexNet takes a while, so once is enough."
    return pytest.importorskip("torchvision.models").alexnet(weights=None).features.double().eval()


def lpips_by_hand(state, a, b):
    "LPIPS in float64 through torchvision's AlexNet and its own taps."
    net = torchvision_features()
    convolutions = {k.removeprefix("features."): v.double() for k, v in state.items() if k.startswith("features.")}
    net.load_state_dict(convolutions)
    out, k = torch.zeros(len(a), dtype=torch.float64), 0
    with torch.no_grad():
        x, y = (((v.double().expand(-1, 3, -1, -1) - torch.tensor([-.030, -.088, -.188]).double()[:, None, None])
                 / torch.tensor([.458, .448, .450]).double()[:, None, None]) for v in (a, b))
        for layer in net[:12]:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.ReLU):
                u, v = (z / (z.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
                out += ((u - v)**2 * state[f"lin{k}.weight"].double()[0]).sum(1).mean((1, 2))
                k += 1
    assert k == 5
    return out


@pytest.mark.parametrize("C,H,W", [(1, 64, 64), (3, 47, 80), (1, 31, 31)])
def test_lpips_is_alexnet_of_torchvision_by_hand(random_net, C, H, W):
    p, t = clips(4, N=1, C=C, H=H, W=W)
    state = random_net.state_dict()
    for span, f in (("01", lambda v: v), ("pm1", lambda v: 2 * v - 1)):
        want = lpips_by_hand(state, f(p[0]), f(t[0]))
        torch.testing.assert_close(lpips_of(p, t, random_net, span)[0].double(), want, rtol=1e-4, atol=1e-6)
    assert lpips_of(t, t, random_net).abs().max() == 0
    assert torch.equal(lpips_of(p, t, random_net, chunk=2), lpips_of(p, t, random_net, chunk=3)) or \
        torch.allclose(lpips_of(p, t, random_net, chunk=2), lpips_of(p, t, random_net, chunk=3), rtol=1e-5)
    assert not any(q.requires_grad for q in random_net.parameters()) and not random_net.training
    x = p[0].clone().requires_grad_()
    random_net(x, t[0]).sum().backward()                                           # a loss as well, if wanted
    assert x.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def published(data_root):
    path = data_root / "weights" / "lpips_alexnet.safetensors"
    if not path.is_file():
        pytest.skip(f"no LPIPS weights at {path}")
    return path


def test_the_published_weights_give_the_same_distances(published, monkeypatch):
    monkeypatch.setenv("STREMN_LPIPS", str(published))
    net = load_lpips()
    state = load_file(published)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items()) and len(state) == 15
    assert all((state[f"lin{i}.weight"] >= 0).all() for i in range(5))
    p, t = clips(5, N=1, C=3, H=64, W=64)
    p = p.clamp(0, 1)
    want = lpips_by_hand(state, 2 * p[0] - 1, 2 * t[0] - 1)
    torch.testing.assert_close(lpips_of(p, t, net)[0].double(), want, rtol=1e-4, atol=1e-5)
    here, there = (score_frames(p, t, c, ["lpips"])["lpips"].mean for c in ("correct", "predrnn"))
    assert here > 0 and there > 0 and abs(here - there) > 1e-3                     # nearer or farther, but not the same


def test_the_numbers_that_the_notebook_states(published):
    "LPIPS of two predictions of equal squared error: blurred, and shifted by a pixel."
    config = WalkersConfig(people=TEST_PEOPLE, actions=("waving",), scenarios=("outdoor",), noise=0., frames=20)
    true = torch.stack([c.frames for c in walkers_batch(range(4), config)])
    padded = torch.nn.functional.pad(true.flatten(0, 1), (3, 3, 3, 3), mode="replicate")
    blurred = torch.nn.functional.avg_pool2d(padded, 7, 1).view_as(true)
    shifted = torch.cat([true[..., :1], true[..., :-1]], -1)
    net = load_lpips(published)
    for wrong, want in ((blurred, (.311, .318)), (shifted, (.025, .030))):
        share = (12. / frame_error(wrong, true)).sqrt().float()[..., None, None, None]
        pred = true + share * (wrong - true)
        found = [score_frames(pred, true, c, ["lpips"], net)["lpips"].mean for c in ("predrnn", "openstl")]
        assert found == pytest.approx(want, abs=6e-4)


def test_weights_come_from_an_argument_a_variable_or_a_download(random_net, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file(random_net.state_dict(), path)
    monkeypatch.delenv("STREMN_LPIPS", raising=False)

    def no_network(*args, **kwargs):
        raise OSError("no network\nat all")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(StremnError, match="STREMN_LPIPS.*download.*no network at all") as e:
        load_lpips()
    assert "\n" not in str(e.value)
    p, t = clips(0, H=32, W=32)
    with pytest.raises(StremnError, match="STREMN_LPIPS"):
        score_frames(p, t, metrics=["lpips"])
    assert "lpips" not in score_frames(p, t)
    a = score_frames(p, t, lpips=path)["lpips"].values
    monkeypatch.setenv("STREMN_LPIPS", str(path))
    assert torch.equal(a, score_frames(p, t, metrics=["lpips"])["lpips"].values)
    assert torch.equal(a, score_frames(p, t, lpips=random_net)["lpips"].values)
    monkeypatch.setenv("STREMN_LPIPS", str(tmp_path / "none"))
    with pytest.raises(StremnError, match="none: expected LPIPS weights .* no such file"):
        load_lpips()
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(StremnError, match="text: expected LPIPS weights"):
        load_lpips(tmp_path / "text")
    state = dict(random_net.state_dict())
    for change in ({"lin4.weight": torch.zeros(1, 9, 1, 1)}, {"extra": torch.zeros(1)}):
        save_file(state | change, tmp_path / "odd")
        with pytest.raises(StremnError, match=next(iter(change))):
            load_lpips(tmp_path / "odd")
    del state["features.3.bias"]
    save_file(state, tmp_path / "odd")
    with pytest.raises(StremnError, match="features.3.bias"):
        load_lpips(tmp_path / "odd")


def test_a_download_gives_the_same_network(random_net, monkeypatch):
    "The two published files, in their own names, become the same network."
    monkeypatch.delenv("STREMN_LPIPS", raising=False)
    state, asked = random_net.state_dict(), []

    def fake(url, weights_only=None, **kwargs):
        asked.append(url)
        assert weights_only is True                                                # tensors only: no pickled code
        if "alexnet" in url:
            return {k: v for k, v in state.items() if "features." in k} | {"classifier.1.weight": torch.zeros(2)}
        return {f"lin{i}.model.1.weight": state[f"lin{i}.weight"] for i in range(5)}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fake)
    assert set(download_lpips()) == set(state)
    net = load_lpips()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and set(asked) == set(module.LPIPS_FILES)


# ---- each convention, retold ---------------------------------------------------------------------------------------

def retold(name, p, t, state):
    "What the program of that name does with one predicted and one true frame (C,H,W), in numpy and float64."
    skimage = pytest.importorskip("skimage.metrics")
    raw, x = p.double().numpy(), t.double().numpy()
    clipped = np.minimum(np.maximum(raw, 0), 1)
    byte_p = np.uint8(np.minimum(np.maximum(p.numpy(), 0), 1) * 255).astype(np.float64)    # its arrays are float32
    byte_x = np.uint8(t.numpy() * 255).astype(np.float64)

    def similarity(a, b, R):
        return np.mean([skimage.structural_similarity(u, v, data_range=R) for u, v in zip(a, b)])
    decibel_bytes = 20 * np.log10(255) - 10 * np.log10(np.mean((byte_p - byte_x)**2))
    decibel = -10 * np.log10(np.mean((clipped - x)**2))
    pair = torch.from_numpy(clipped)[None], torch.from_numpy(x)[None]
    wide = [2 * v - 1 for v in pair]
    return {
        "correct": lambda: dict(mse=np.sum((clipped - x)**2), mae=np.sum(np.abs(clipped - x)), psnr=decibel,
                                ssim=similarity(clipped, x, 1.), lpips=lpips_by_hand(state, *wide).item()),
        "predrnn": lambda: dict(mse=np.sum((clipped - x)**2), psnr=decibel_bytes, ssim=similarity(byte_p, byte_x, 255.),
                                lpips=lpips_by_hand(state, *pair).item()),
        "mim": lambda: dict(mse=np.sum((clipped - x)**2), mae=np.sum(np.abs(raw - x)), psnr=decibel_bytes,
                            ssim=similarity(clipped, x, 2.)),
        "openstl": lambda: dict(mse=np.sum((raw - x)**2), mae=np.sum(np.abs(raw - x)), psnr=decibel,
                                ssim=similarity(clipped, x, 2.), lpips=lpips_by_hand(state, *wide).item()),
    }[name]()


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_each_convention_is_its_program_in_numpy(name, C, random_net):
    p, t = clips(7, N=2, T=2, C=C, H=33, W=40)
    got = score_frames(p, t, name, lpips=random_net)
    assert ((p < 0) | (p > 1)).any()
    for n in range(2):
        for k in range(2):
            want = retold(name, p[n, k], t[n, k], random_net.state_dict())
            assert set(want) == set(got)
            for m, v in want.items():
                assert got[m].values[n, k].item() == pytest.approx(v, rel=2e-5, abs=1e-6), (m, n, k)


def test_conventions_differ_where_they_should(random_net):
    p, t = clips(8, H=40, W=40)
    s = {name: {m: v.mean for m, v in score_frames(p, t, name, lpips=random_net).items()} for name in CONVENTIONS}
    assert s["correct"]["mse"] == s["mim"]["mse"] < s["openstl"]["mse"]
    assert s["correct"]["mae"] < s["mim"]["mae"] == s["openstl"]["mae"]
    assert s["correct"]["ssim"] < s["mim"]["ssim"] == s["openstl"]["ssim"]
    assert abs(s["predrnn"]["ssim"] - s["correct"]["ssim"]) < .01
    assert abs(s["predrnn"]["psnr"] - s["correct"]["psnr"]) < .2
    assert "mae" not in s["predrnn"] and "lpips" not in s["mim"]
    inside = p.clamp(0, 1)
    a, b = (score_frames(inside, t, c)["mse"].mean for c in ("correct", "openstl"))
    assert a == b


# ---- the whole -----------------------------------------------------------------------------------------------------

def test_scores_have_means_over_clips_and_frames():
    p, t = clips(9, N=3, T=4)
    for m, s in score_frames(p, t).items():
        assert isinstance(s, FrameScore) and m in METRICS
        assert s.values.shape == (3, 4) and s.values.dtype == torch.float64
        assert s.mean == pytest.approx(s.values.mean().item())
        assert s.per_frame.shape == (4,) and s.per_clip.shape == (3,)
        assert s.per_frame[1].item() == pytest.approx(s.values[:, 1].mean().item())
        assert s.per_clip[2].item() == pytest.approx(s.values[2].mean().item())
    one = {m: s.values for m, s in score_frames(p, t).items()}
    parts = [score_frames(p[i:i + 1], t[i:i + 1]) for i in range(3)]
    assert all(torch.allclose(torch.cat([q[m].values for q in parts]), v, atol=1e-9) for m, v in one.items())
    assert list(score_frames(p, t, metrics=["ssim", "mse"])) == ["ssim", "mse"]
    assert score_frames(p.numpy(), t.numpy())["mse"].mean == pytest.approx(one["mse"].mean().item())
    assert score_frames(p.requires_grad_(), t)["mse"].values.requires_grad is False


def test_single_and_half_precision_score_alike():
    p, t = clips(10)
    wide, half = score_frames(p.double(), t.double()), score_frames(p.half(), t.half())
    for m, s in score_frames(p, t).items():
        assert s.mean == pytest.approx(wide[m].mean, rel=1e-5) and s.mean == pytest.approx(half[m].mean, rel=.02)


def test_the_columns_of_table_5(random_net):
    columns = TABLES["t5"].columns
    assert set(TABLE_5) == set(columns)
    p, t = clips(11, H=32, W=32)
    human, kth = table_5_cells(p, t, "h36m"), table_5_cells(p, t, "kth", random_net)
    assert list(human) == ["h36m_mse", "h36m_mae", "h36m_ssim"] and list(kth) == ["kth_psnr", "kth_ssim", "kth_lpips"]
    mim = score_frames(p, t, "mim")
    assert human["h36m_mse"] == pytest.approx(mim["mse"].mean / 10)
    assert human["h36m_mae"] == pytest.approx(mim["mae"].mean / 100)
    assert "/10" in columns["h36m_mse"].label and "/100" in columns["h36m_mae"].label
    assert list(table_5_cells(p, t, "kth")) == ["kth_psnr", "kth_ssim"]
    with pytest.raises(StremnError, match="kth"):
        table_5_cells(p, t, "ucf")


@pytest.mark.parametrize("change,words", [
    (lambda p, t: dict(pred=p[0]), "pred: expected frames of shape"),
    (lambda p, t: dict(true=t[..., :-1]), "expected the shape of true"),
    (lambda p, t: dict(pred=(p * 255).byte()), "pred: expected floats"),
    (lambda p, t: dict(true=t * 255), "true: expected values in"),
    (lambda p, t: dict(true=t * 2 - 1), "true: expected values in"),
    (lambda p, t: dict(pred=torch.where(p > .5, math.nan, p)), "pred: expected finite"),
    (lambda p, t: dict(pred=p[:0], true=t[:0]), "pred: expected frames"),
    (lambda p, t: dict(convention="simvp"), "simvp"),
    (lambda p, t: dict(metrics=["fvd"]), "fvd"),
    (lambda p, t: dict(convention="predrnn", metrics=["mae"]), "mae"),
    (lambda p, t: dict(convention="mim", metrics=["lpips"]), "lpips"),
    (lambda p, t: dict(pred=p[..., :5, :], true=t[..., :5, :]), "7 x 7"),
    (lambda p, t: dict(metrics=["lpips"], lpips=LPIPS(), pred=p[..., :16, :16], true=t[..., :16, :16]), "31 x 31"),
    (lambda p, t: dict(metrics=["lpips"], lpips="nowhere.safetensors"), "nowhere.safetensors"),
])
def test_what_cannot_be_scored_is_refused(change, words):
    p, t = clips(12, H=20, W=20)
    with pytest.raises(StremnError, match=words) as e:
        score_frames(**(dict(pred=p, true=t) | change(p, t)))
    assert "\n" not in str(e.value)
