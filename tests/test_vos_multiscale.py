"""Test-time options and errands: one branch is the stream, mirrors are symmetric, far pieces go, archives are whole."""

import json
import os
import zipfile
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stremn.data.clips import one_hot_objects
from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.data.vos import DAVIS, VideoFolder
from stremn.images import PALETTE, read_mask, resize_frame, to_pixels, write_mask
from stremn.data.youtube import YouTubeVOS
from stremn.vos.stream import VideoSegmenter
from stremn.vos.files import segment_video
from stremn.memory.bank import BankConfig
from stremn.memory.rules import RULES
from stremn.models.vos import VOSConfig, VOSModel
from stremn.vos.multiscale import MULTI_SCALE,TestView,MultiScaleSegmenter,average,view_size,make_views,multi_scale,connected_components,remove_distant_components
from stremn.vos.files import Patient,ArchiveMask,segment_dataset,given_masks,write_zip,zip_masks
from refusals import refused

ndimage = pytest.importorskip("scipy.ndimage")
BANK = BankConfig(
    memory_channels=12, query_channels=12, key_channels=6, value_channels=8, update_channels=6, slots=3,
    similarity="l2", shared_keys=True,
)  # fmt: skip
SMALL = VOSConfig(widths=(8, 12), decoder_width=8, bank=BANK)


def network(seed=0, **changes):
    "A small untrained network in evaluation mode."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VOSModel(replace(SMALL, **changes)).eval()


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def clip():
    return chameleon(5, ChameleonConfig(frames=9, size=32, objects=2, modes=2, stay=(2, 3), fade=1))


def follow(segmenter, clip, masks=None):
    "Labels (T,H,W)."
    masks = {0: clip.masks[0]} if masks is None else masks
    return torch.stack([segmenter.step(f, masks.get(t)) for t, f in enumerate(clip.frames)])


LATE = {0: 1, 4: 2}


def late_masks(clip):
    return {t: torch.where(clip.masks[t] == i, i, 0) for t, i in LATE.items()}


# ---------------------------------------------------------------- one branch
@pytest.mark.parametrize("policy", RULES)
def test_one_branch_is_the_stream_exactly(model, clip, policy):
    masks = late_masks(clip)
    a, b = VideoSegmenter(model, policy, seed=4), MultiScaleSegmenter(model, policy=policy, seed=4)
    assert (
        torch.equal(follow(a, clip, masks), follow(b, clip, masks)) and a.memory == b.memory and a.objects == b.objects
    )
    for m, n in zip(a.state.memories, b.state.memories):
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(m, n))


@pytest.mark.parametrize("side", [20, 24, 200, None])
def test_one_branch_is_the_stream_at_any_test_size(clip, side):
    model = network(test_side=side)
    assert torch.equal(follow(VideoSegmenter(model), clip), follow(MultiScaleSegmenter(model, far=10_000.0), clip))


def test_objects_leave_every_branch(model, clip):
    s, plain = MultiScaleSegmenter(model, (1.0, 1.2), flip=True), MultiScaleSegmenter(model)
    for t, frame in enumerate(clip.frames):
        for x in (s, plain):
            x.step(frame, clip.masks[0] if t == 0 else None)
            if t == 3:
                x.remove(1)
        if t >= 3:
            assert all(state.objects == [2] for state in s.states) and s.objects == plain.objects == [2]
    s.remove(2)
    assert s.step(clip.frames[0]).max() == 0 and s.objects == [] and s.memory == []
    assert s.step(clip.frames[1], clip.masks[1]).equal(clip.masks[1].clamp(min=0))
    refused("expected one of [1, 2]", s.remove, 7)
    s.reset()
    assert s.state.t == 0 and s.previous is None
    refused("frame 0: expected a mask", s.step, clip.frames[0])


def test_an_error_leaves_everything_as_it_was(model, clip):
    s = multi_scale(model, scales=(1.0, 1.5))
    s.step(clip.frames[0], clip.masks[0])
    before, previous = s.states, s.previous
    refused("expected 32 x 32", s.step, clip.frames[1][:, :16])
    refused("values in [0,1]", s.step, clip.frames[1] + 7)
    assert s.states is before and s.previous is previous


# ---------------------------------------------------------------- branches
def test_branches_and_their_sizes():
    assert make_views((1, 1.5), True) == (TestView(1.0), TestView(1.0, True), TestView(1.5), TestView(1.5, True))
    assert len(make_views(MULTI_SCALE, True)) == 8 and make_views() == (TestView(),)
    assert view_size((480, 854), 1.15, 480) == (552, 982) and view_size((480, 854), 1.0, 480, 800) == (450, 800)
    assert view_size((1080, 1920), 1.0, 480) == (480, 853) and view_size((30, 20), 1.5) == (45, 30)
    assert view_size((1280, 720), 1.3, None, 800) == (1040, 585) and view_size((1, 1), 0.1) == (1, 1)
    for scales in ((), (1.0, 1.0), (0.0,), (-1.0, 1.0)):
        refused("scales: expected different positive numbers", make_views, scales)
    refused("far: expected", MultiScaleSegmenter, network(), far=0)
    refused("longest: expected", MultiScaleSegmenter, network(), longest=-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_average_is_the_mean_in_any_order(seed):
    rng = torch.Generator().manual_seed(seed)
    looks = make_views((1.0, 1.3, 0.7), flip=True)
    probs = [torch.randn(4, round(10 * b.scale), round(14 * b.scale), generator=rng).softmax(0) for b in looks]
    planes = []
    for p, b in zip(probs, looks):
        full = F.interpolate(p[None].double(), (20, 28), mode="bilinear", align_corners=False)[0].numpy()
        planes.append(full[:, :, ::-1] if b.flip else full)
    np.testing.assert_allclose(average(probs, looks, (20, 28)).numpy(), np.mean(planes, 0), atol=2e-7)
    swapped = [probs[k ^ 1] for k in range(6)]
    other = [replace_flip(b) for b in (looks[k ^ 1] for k in range(6))]
    mirror = average(swapped, other, (20, 28)).flip(-1)
    assert torch.equal(mirror, average(probs, looks, (20, 28)))


def replace_flip(b):
    return b._replace(flip=not b.flip)


def cfbi(model, clip, masks, scales):
    "CFBI's multi-scale testing with the model's own two calls: an independent loop, every branch a list entry."
    memories, out, known = [() for _ in range(2 * len(scales))], [], []
    for t, frame in enumerate(clip.frames):
        looks, total = [], 0
        for k in range(2 * len(scales)):
            h, w = (round(x * scales[k // 2]) for x in frame.shape[-2:])
            x = frame if (h, w) == tuple(frame.shape[-2:]) else resize_frame(frame, (h, w))
            x = torch.flip(x, [-1]) if k % 2 else x
            logits, view = model.segment(memories[k], x[None])
            looks.append((x, view))
            if logits is not None:
                full = F.interpolate(logits.softmax(1), frame.shape[-2:], mode="bilinear", align_corners=False)[0]
                total = total + (torch.flip(full, [-1]) if k % 2 else full).double()
        labels = torch.zeros(frame.shape[-2:], dtype=torch.long)
        if known:
            labels = torch.tensor([0, *known])[total.argmax(0)]
        if t in masks:
            new = [i for i in masks[t].unique().tolist() if i > 0]
            known += new
            labels = torch.where(masks[t] > 0, masks[t], labels)
        for k, (x, view) in enumerate(looks):
            planes = F.interpolate(one_hot_objects(labels, known)[None], x.shape[-2:], mode="area")
            planes = torch.flip(planes, [-1]) if k % 2 else planes
            memories[k], _ = model.memorize(memories[k], view, planes, t)
        out.append(labels)
    return torch.stack(out)


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.25), (0.75, 1.5)])
@torch.no_grad()
def test_many_branches_against_a_loop(clip, scales):
    model, masks = network(seed=1), late_masks(clip)
    got, want = follow(multi_scale(model, scales=scales), clip, masks), cfbi(model, clip, masks, scales)
    assert (got != want).float().mean() < 1e-3 and len(got.unique()) == 3


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.3, 1.5)])
def test_the_mirror_image_of_a_video_has_the_mirror_image_as_its_answer(clip, scales, hard):
    model = network(seed=2)
    turned = clip._replace(frames=clip.frames.flip(-1), masks=clip.masks.flip(-1))
    a = follow(multi_scale(model, scales=scales, hard=hard, far=6), clip, late_masks(clip))
    b = follow(multi_scale(model, scales=scales, hard=hard, far=6), turned, late_masks(turned))
    assert torch.equal(a, b.flip(-1))
    alone = [follow(MultiScaleSegmenter(model, scales), c, late_masks(c)) for c in (clip, turned)]
    assert not torch.equal(alone[0], alone[1].flip(-1))


def test_every_branch_keeps_its_own_memory(model, clip):
    s = multi_scale(model, scales=(1.0, 1.5), policy="oldest")
    follow(s, clip)
    sizes = [tuple(state.memories[0].keys.shape[-2:]) for state in s.states]
    assert sizes == [(8, 8), (8, 8), (12, 12), (12, 12)] and {len(state.memories) for state in s.states} == {1}
    assert {state.held[0].frames for state in s.states} == {s.memory[0].frames} and s.state.t == len(clip.frames)


def test_labels_or_probabilities_go_back(model, clip):
    soft, hard = MultiScaleSegmenter(model, hard=False), MultiScaleSegmenter(model, hard=True)
    assert not soft.looking.feeds_back_labels and hard.looking.feeds_back_labels
    assert multi_scale(model).looking.feeds_back_labels and not MultiScaleSegmenter(model).looking.feeds_back_labels
    a, b = (s.state.memories[0].values for s in (soft, hard) if follow(s, clip) is not None)
    assert not torch.equal(a, b)


# ---------------------------------------------------------------- pieces
@pytest.mark.parametrize("seed", range(30))
def test_pieces_against_scipy(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((rng.integers(1, 40), rng.integers(1, 40))) < rng.choice([0.1, 0.3, 0.5, 0.8])
    want, n = ndimage.label(mask, np.ones((3, 3)))
    got = connected_components(torch.from_numpy(mask)).numpy()
    assert got.max(initial=0) == n and len({*zip(got.flatten().tolist(), want.flatten().tolist())}) == n + (~mask).any()
    assert sorted({v: i for i, v in reversed(list(enumerate(got.flatten().tolist()))) if v}) == list(range(1, n + 1))


def far_by_hand(labels, previous, reach, keep=()):
    "Piece by piece and pixel by pixel: the larger of the row and the column distance to the old mask."
    out = labels.clone().numpy()
    for i in set(labels.flatten().tolist()) - {0, *keep}:
        old = np.argwhere(previous.numpy() == i)
        number, n = ndimage.label(labels.numpy() == i, np.ones((3, 3)))
        far = []
        for k in range(1, n + 1):
            mine = np.argwhere(number == k)
            if len(old) and np.abs(mine[:, None] - old[None]).max(-1).min() > reach:
                far.append(k)
        if len(far) < n:
            out[np.isin(number, far) & (number > 0)] = 0
    return torch.from_numpy(out)


@pytest.mark.parametrize("seed", range(20))
def test_far_pieces_against_loops(seed):
    rng = np.random.default_rng(seed)
    labels, previous = (torch.from_numpy(rng.choice([0, 1, 4], (18, 23), p=[0.94, 0.03, 0.03])) for _ in range(2))
    if seed % 4 == 0:
        previous[:, 8:] = 0
    for reach in (1, 2, 5):
        assert torch.equal(remove_distant_components(labels, previous, reach), far_by_hand(labels, previous, reach))
        assert torch.equal(remove_distant_components(labels, previous, reach, [4]), far_by_hand(labels, previous, reach, [4]))
    assert torch.equal(remove_distant_components(labels, previous, 40), labels)
    share = 2.5 / np.hypot(18, 23)
    assert torch.equal(remove_distant_components(labels, previous, share), far_by_hand(labels, previous, 3))


class Scripted(VOSModel):
    "A network that answers what it is told and notes what it is asked to remember."

    def play(self, answers):
        self.answers, self.kept = [None, *answers], []
        return self

    def segment(self, memories, frame, valid=None):
        _, view = super().segment(memories, frame, valid)
        answer = self.answers.pop(0)
        if answer is None:
            return None, view
        return (one_hot_objects(answer, range(3))[None] * 0.8 + 0.1).log(), view

    def memorize(self, memories, view, masks, t, generator=None, valid=None):
        self.kept.append(masks[0])
        return super().memorize(memories, view, masks, t, generator, valid)


def test_a_far_piece_is_neither_answered_nor_remembered():
    start = torch.zeros(32, 32, dtype=torch.long)
    start[4:10, 4:10], start[20:26, 4:10] = 1, 2
    ghost = start.clone()
    ghost[28:31, 28:31] = 1
    for hard in (False, True):
        model = Scripted(SMALL).eval().play([ghost, ghost])
        s = MultiScaleSegmenter(model, far=5, hard=hard)
        frame = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(s.step(frame, start), start)
        assert torch.equal(s.step(frame), start)
        there = model.kept[1][:, 28:31, 28:31]
        assert there[0].abs().max() == 0 and (model.kept[1][0, 4:10, 4:10] > 0.5).all()
        assert torch.equal(s.step(frame, torch.where(ghost == 1, 1, 0)), ghost)  # a given mask is left alone
        model.play([ghost, ghost])
        off = MultiScaleSegmenter(model, hard=hard)
        off.step(frame, start)
        assert torch.equal(off.step(frame), ghost)


# ---------------------------------------------------------------- whole splits
def write_frames(folder, clip):
    folder.mkdir(parents=True)
    for t, frame in enumerate(clip.frames):
        Image.fromarray(to_pixels(frame)).save(folder / f"{t:05d}.jpg", quality=95)


@pytest.fixture
def davis(tmp_path, clip):
    for name in ("x", "y"):
        write_frames(tmp_path / "DAVIS" / "JPEGImages" / "480p" / name, clip)
        write_mask(tmp_path / "DAVIS" / "Annotations" / "480p" / name / "00000.png", clip.masks[0])
    (tmp_path / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "DAVIS" / "ImageSets" / "2017" / "test-dev.txt").write_text("x\ny\n")
    return DAVIS(tmp_path / "DAVIS", 2017, "test-dev")


@pytest.fixture
def youtube(tmp_path, clip):
    "Object 2 first, at frame 3; object 1 at frame 6; every third frame is asked for."
    root, enters = tmp_path / "yt", {2: 3, 1: 6}
    write_frames(root / "valid_all_frames" / "JPEGImages" / "v", clip)
    for i, e in enters.items():
        write_mask(root / "valid" / "Annotations" / "v" / f"{e:05d}.png", torch.where(clip.masks[e] == i, i, 0))
    objects = {str(i): {"frames": [f"{t:05d}" for t in range(e, 9, 3)]} for i, e in enters.items()}
    (root / "valid" / "meta.json").write_text(json.dumps({"videos": {"v": {"objects": objects}}}))
    return YouTubeVOS(root, all_frames=True)


def test_a_video_that_begins_with_nothing_known(model, clip):
    s = Patient(VideoSegmenter(model))
    assert s.step(clip.frames[0]).equal(torch.zeros(32, 32, dtype=torch.long)) and s.objects == [] and s.memory == []
    s.step(to_pixels(clip.frames[1]))
    later = [s.step(clip.frames[2], clip.masks[2]), s.step(clip.frames[3])]
    fresh = VideoSegmenter(model)
    assert torch.equal(later[0], fresh.step(clip.frames[2], clip.masks[2])) and torch.equal(
        later[1], fresh.step(clip.frames[3])
    )
    assert s.objects == fresh.objects and s.memory == fresh.memory
    refused("frame 0: expected a mask", VideoSegmenter(model).step, clip.frames[0])


@pytest.mark.parametrize("make", [VideoSegmenter, lambda m: multi_scale(m, scales=(1.0, 1.5), far=0.5)])
def test_a_split_is_walked_through(model, youtube, davis, tmp_path, make):
    done = segment_dataset(lambda: make(model), youtube, tmp_path / "out", progress=False)
    maps = [read_mask(tmp_path / "out" / "v" / f"{t:05d}.png") for t in range(9)]
    assert done["v"].frames == 9 and done["v"].objects == [2, 1]
    assert [set(m.unique().tolist()) <= ids for m, ids in zip(maps, [{0}] * 3 + [{0, 2}] * 3 + [{0, 1, 2}] * 3)] == [
        True
    ] * 9
    for name, given in youtube["v"].given.items():
        assert torch.equal(maps[int(name)][given > 0], given[given > 0])
    again = segment_dataset(lambda: make(model), youtube, tmp_path / "out", progress=False)
    assert again == {} and not list((tmp_path / "out").glob("*/overlay.mp4"))
    (tmp_path / "d" / "x").mkdir(parents=True)
    assert list(segment_dataset(lambda: make(model), davis, tmp_path / "d", progress=False)) == ["y"]
    (tmp_path / "file").write_text("")
    refused("found a file", segment_dataset, lambda: make(model), davis, tmp_path / "file")


def test_what_is_given(davis, youtube, tmp_path):
    assert {k: m.unique().tolist() for k, m in given_masks(youtube["v"]).items()} == {
        "00003": [0, 2],
        "00006": [0, 1],
    }
    assert {k: m.unique().tolist() for k, m in given_masks(davis["x"]).items()} == {"00000": [0, 1, 2]}
    write_mask(tmp_path / "DAVIS" / "Annotations" / "480p" / "x" / "00000.png", torch.zeros(32, 32).long())
    refused("only background", given_masks, davis["x"])
    refused("found none", given_masks, VideoFolder(tmp_path / "DAVIS" / "JPEGImages" / "480p" / "x"))


def test_segment_video_takes_a_multi_scale_segmenter(model, clip, tmp_path):
    write_frames(tmp_path / "f", clip)
    done = segment_video(
        multi_scale(model, scales=(1.0,)), VideoFolder(tmp_path / "f"), clip.masks[0], tmp_path / "m", progress=False
    )
    assert done.frames == 9 and (tmp_path / "m" / "overlay.mp4").is_file() and done.memory[0].last == 8


# ---------------------------------------------------------------- archives
def unpacked(path):
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
        return {n: Image.open(BytesIO(z.read(n))) for n in z.namelist()}


def test_the_davis_archive(model, davis, tmp_path):
    segment_dataset(lambda: VideoSegmenter(model), davis, tmp_path / "m", progress=False)
    grey = Image.fromarray(np.asarray(Image.open(tmp_path / "m" / "x" / "00003.png")))  # no palette: another tool's
    grey.save(tmp_path / "m" / "x" / "00003.png")
    images = unpacked(zip_masks(tmp_path / "m", davis, tmp_path / "a" / "test-dev.zip"))
    assert list(images) == [f"{n}/{t:05d}.png" for n in "xy" for t in range(9)]
    for name, image in images.items():
        assert image.mode == "P" and image.getpalette()[:768] == PALETTE.ravel().tolist()
        assert (np.asarray(image) == read_mask(tmp_path / "m" / name).numpy()).all()
    first = (tmp_path / "a" / "test-dev.zip").read_bytes()
    assert zip_masks(tmp_path / "m", davis, tmp_path / "a" / "test-dev.zip").read_bytes() == first
    assert os.listdir(tmp_path / "a") == ["test-dev.zip"]


def test_the_youtube_archive(model, youtube, tmp_path):
    segment_dataset(lambda: VideoSegmenter(model), youtube, tmp_path / "m", progress=False)
    images = unpacked(zip_masks(tmp_path / "m", youtube, tmp_path / "y.zip"))
    assert list(images) == ["Annotations/v/00003.png", "Annotations/v/00006.png"]
    for name, image in images.items():
        assert image.mode == "P" and (np.asarray(image) == read_mask(tmp_path / "m" / "v" / name[-9:]).numpy()).all()
    write_mask(tmp_path / "m" / "v" / "00004.png", torch.full((32, 32), 99))  # nobody asks for it
    zip_masks(tmp_path / "m", youtube, tmp_path / "y.zip")
    write_mask(tmp_path / "m" / "v" / "00003.png", torch.full((32, 32), 1))  # object 1 comes at frame 6
    refused(
        ["00003.png", "expected no objects but 2", "found 1"], zip_masks, tmp_path / "m", youtube, tmp_path / "z.zip"
    )
    assert sorted(p.name for p in tmp_path.glob("*.zip")) == ["y.zip"]


def test_wrong_archives_are_refused_and_leave_nothing(model, davis, tmp_path):
    segment_dataset(lambda: VideoSegmenter(model), davis, tmp_path / "m", progress=False)
    out, mask = tmp_path / "out.zip", tmp_path / "m" / "y" / "00008.png"
    good = zip_masks(tmp_path / "m", davis, out).read_bytes()
    labels = read_mask(mask)
    for change, match in (
        (lambda: write_mask(mask, labels[:, :16]), ["00008.png", "expected a mask of 32x32", "found 16x32"]),
        (lambda: write_mask(mask, labels + 5), ["00008.png", "expected no objects but 1, 2"]),
        (lambda: write_mask(mask, torch.full_like(labels, -1)), ["00008.png", "found -1"]),
        (mask.unlink, ["expected 9 masks", "none for 00008"]),
        (lambda: (tmp_path / "m" / "y").rename(tmp_path / "n"), ["folder with the masks of y"]),
    ):
        change()
        refused(match, zip_masks, tmp_path / "m", davis, out)
        assert out.read_bytes() == good and not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]
    refused("ending in .zip", zip_masks, tmp_path / "m", davis, tmp_path / "out.tar")
    refused("found none", write_zip, tmp_path / "empty.zip", [])
    refused("absent: y", zip_masks, tmp_path / "m", missing(davis), out)
    wanted = ArchiveMask("../../etc.png", tmp_path / "nowhere.png", (1, 1), frozenset())
    refused("nowhere.png", write_zip, tmp_path / "empty.zip", [wanted])
    assert not (tmp_path / "empty.zip").exists()


def missing(davis):
    davis.missing = ["y"]
    return davis


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_the_answer_comes_back_to_the_cpu(clip):
    masks = late_masks(clip)
    here = follow(multi_scale(network(), far=0.2), clip, masks)
    there = follow(multi_scale(network(), far=0.2, device="cuda"), clip, masks)
    assert there.device.type == "cpu" and (here != there).float().mean() < 0.01
