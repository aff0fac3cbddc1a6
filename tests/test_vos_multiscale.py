"""Test-time options: one view is the plain stream, mirrors are symmetric, distant components go."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.data.clips import one_hot_objects
from stremn.images import resize_frame
from stremn.memory.rules import RULES
from stremn.models.vos import VOSModel
from stremn.vos.multiscale import MULTI_SCALE, average, connected_components, make_views, multi_scale, view_size
from stremn.vos.multiscale import TestTimeConfig as TimeConfig
from stremn.vos.multiscale import TestView as View
from stremn.vos.multiscale import remove_distant_components
from stremn.vos.stream import VideoSegmenter
from helpers import TINY_VOS, network
from refusals import refused

ndimage = pytest.importorskip("scipy.ndimage")


@pytest.fixture(scope="module")
def clip():
    return chameleon(5, ChameleonConfig(frames=9, size=32, objects=2, modes=2, stay=(2, 3), fade=1))


def follow(segmenter, clip, masks=None):
    "Labels (T,H,W)."
    return torch.stack([*segmenter.track(clip.frames, clip.masks[0] if masks is None else masks)])


def views(model, *scales, flip=False, policy=None, device="cpu", **options):
    "A segmenter of several views."
    how = TimeConfig(make_views(scales or (1.,), flip), **options)
    return VideoSegmenter(model, policy, device=device, test_time=how)


LATE = {0: 1, 4: 2}


def late_masks(clip):
    return {t: torch.where(clip.masks[t] == i, i, 0) for t, i in LATE.items()}


# ---------------------------------------------------------------- one view
@torch.no_grad()
def plainly(model, clip, masks):
    "One view with the model's own two calls, one object set after another; late masks win. Labels, and memories."
    memories, out, known = (), [], []
    for t, frame in enumerate(clip.frames):
        h, w = view_size(tuple(frame.shape[-2:]), 1., model.config.test_side)
        small = frame if (h, w) == tuple(frame.shape[-2:]) else resize_frame(frame, (h, w))
        logits, encoded = model.segment(memories, small[None], equal_widths=True)
        prob = None if logits is None else logits.softmax(1)[0]
        labels = torch.zeros(frame.shape[-2:], dtype=torch.long)
        if prob is not None:
            full = F.interpolate(prob[None], frame.shape[-2:], mode="bilinear", align_corners=False)[0]
            labels = torch.tensor([0, *known])[full.argmax(0)]
        rows = [] if prob is None else [*prob[1:]]
        if t in masks:                                                      # one new object at a time
            new, = (i for i in masks[t].unique().tolist() if i > 0)
            plane = F.interpolate((masks[t] == new).float()[None, None], (h, w), mode="area")[0, 0]
            rows = [p * (1 - plane) for p in rows] + [plane]
            labels, known = torch.where(masks[t] > 0, masks[t], labels), [*known, new]
        memories, _ = model.memorize(memories, encoded, torch.stack(rows)[None], t, torch.Generator().manual_seed(4))
        out.append(labels)
    return torch.stack(out), memories


@pytest.mark.parametrize("policy", [p for p in RULES if p not in ("random", "reservoir")])
def test_one_view_is_the_plain_loop_exactly(clip, policy):
    model, masks = network(policy=policy), late_masks(clip)
    segmenter = VideoSegmenter(model)
    labels, memories = plainly(model, clip, masks)
    assert torch.equal(follow(segmenter, clip, masks), labels) and segmenter.objects == [1, 2]
    for m, n in zip(segmenter.state.memories[0], memories, strict=True):
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(m, n))


@pytest.mark.parametrize("side", [20, 24, 200, None])
def test_one_view_is_the_plain_loop_at_any_test_size(clip, side):
    model, masks = network(test_side=side), late_masks(clip)
    labels, _ = plainly(model, clip, masks)
    assert torch.equal(follow(VideoSegmenter(model), clip, masks), labels)
    assert torch.equal(follow(views(model, max_distance=10_000.0), clip, masks), labels)


@pytest.mark.parametrize("policy", RULES)
def test_the_views_of_one_scale_and_one_seed_decide_alike(model, clip, policy):
    "Two equal views say what one says, and their memories hold the same frames."
    one = VideoSegmenter(model, policy, seed=4, test_time=TimeConfig(hard=True))
    two = VideoSegmenter(model, policy, seed=4, test_time=TimeConfig((View(), View())))
    assert torch.equal(follow(one, clip, late_masks(clip)), follow(two, clip, late_masks(clip)))
    assert one.memory == two.memory and one.objects == two.objects
    for a, b in zip(*two.state.memories):
        assert torch.equal(a.frames, b.frames) and torch.equal(a.values, b.values)


def test_objects_leave_every_view(model, clip):
    s, plain = views(model, 1.0, 1.2, flip=True), VideoSegmenter(model)
    for t, frame in enumerate(clip.frames):
        for x in (s, plain):
            x.step(frame, clip.masks[0] if t == 0 else None)
            if t == 3:
                x.remove(1)
        if t >= 3:
            assert [len(m.frames) for view in s.state.memories for m in view] == [1] * 4
            assert s.objects == plain.objects == [2]
    s.remove(2)
    assert s.step(clip.frames[0]).max() == 0 and s.objects == [] and s.memory == []
    assert s.step(clip.frames[1], clip.masks[1]).equal(clip.masks[1].clamp(min=0))
    refused("expected one of [1, 2]", s.remove, 7)
    s.reset()
    assert s.state.t == 0 and s.state.previous is None
    refused("frame 0: expected a mask", s.step, clip.frames[0])


def test_an_error_leaves_everything_as_it_was(model, clip):
    s = views(model, 1.0, 1.5, flip=True)
    s.step(clip.frames[0], clip.masks[0])
    before = s.state
    refused("expected 32 x 32", s.step, clip.frames[1][:, :16])
    refused("values in [0,1]", s.step, clip.frames[1] + 7)
    assert s.state is before


# ---------------------------------------------------------------- several views
def test_views_and_their_sizes():
    assert make_views((1, 1.5), True) == (View(1.0), View(1.0, True), View(1.5), View(1.5, True))
    assert len(make_views(MULTI_SCALE, True)) == 8 and make_views() == (View(),)
    assert multi_scale(longest=800) == TimeConfig(make_views(MULTI_SCALE, True), longest=800)
    assert view_size((480, 854), 1.15, 480) == (552, 982) and view_size((480, 854), 1.0, 480, 800) == (450, 800)
    assert view_size((1080, 1920), 1.0, 480) == (480, 853) and view_size((30, 20), 1.5) == (45, 30)
    assert view_size((1280, 720), 1.3, None, 800) == (1040, 585) and view_size((1, 1), 0.1) == (1, 1)
    for scales in ((), (1.0, 1.0), (0.0,), (-1.0, 1.0)):
        refused("scales: expected different positive numbers", make_views, scales)
    for bad in (0, -1., float("nan")):
        refused("max_distance: expected", TimeConfig, max_distance=bad)
    refused("longest: expected", TimeConfig, longest=-3)
    refused("views: expected at least one", TimeConfig, ())


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
    "CFBI's multi-scale testing with the model's own two calls: an independent loop, every view a list entry."
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
def test_many_views_against_a_loop(clip, scales):
    model, masks = network(seed=1), late_masks(clip)
    got, want = follow(views(model, *scales, flip=True), clip, masks), cfbi(model, clip, masks, scales)
    assert (got != want).float().mean() < 1e-3 and len(got.unique()) == 3


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.3, 1.5)])
def test_the_mirror_image_of_a_video_has_the_mirror_image_as_its_answer(clip, scales, hard):
    model = network(seed=2)
    turned = clip._replace(frames=clip.frames.flip(-1), masks=clip.masks.flip(-1))
    a = follow(views(model, *scales, flip=True, hard=hard, max_distance=6), clip, late_masks(clip))
    b = follow(views(model, *scales, flip=True, hard=hard, max_distance=6), turned, late_masks(turned))
    assert torch.equal(a, b.flip(-1))
    alone = [follow(views(model, *scales), c, late_masks(c)) for c in (clip, turned)]
    assert not torch.equal(alone[0], alone[1].flip(-1))


def test_every_view_keeps_its_own_memory(model, clip):
    s = views(model, 1.0, 1.5, flip=True, policy="oldest")
    follow(s, clip)
    sizes = [tuple(view[0].keys.shape[-2:]) for view in s.state.memories]
    assert sizes == [(8, 8), (8, 8), (12, 12), (12, 12)] and {len(view) for view in s.state.memories} == {1}
    frames = [tuple(view[0].frames[0].tolist()) for view in s.state.memories]
    assert set(frames) == {s.memory[0].frames} and s.state.t == len(clip.frames)


def test_labels_or_probabilities_go_back(model, clip):
    soft, hard = TimeConfig(hard=False), TimeConfig(hard=True)
    assert not soft.feeds_back_labels and hard.feeds_back_labels
    assert multi_scale().feeds_back_labels and not TimeConfig().feeds_back_labels
    segmenters = [VideoSegmenter(model, test_time=how) for how in (soft, hard)]
    a, b = (s.state.memories[0][0].values for s in segmenters if follow(s, clip) is not None)
    assert not torch.equal(a, b)


# ---------------------------------------------------------------- distant components
@pytest.mark.parametrize("seed", range(30))
def test_components_against_scipy(seed):
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
def test_distant_components_against_loops(seed):
    rng = np.random.default_rng(seed)
    labels, previous = (torch.from_numpy(rng.choice([0, 1, 4], (18, 23), p=[0.94, 0.03, 0.03])) for _ in range(2))
    if seed % 4 == 0:
        previous[:, 8:] = 0
    for reach in (1, 2, 5):
        assert torch.equal(remove_distant_components(labels, previous, reach), far_by_hand(labels, previous, reach))
        kept = remove_distant_components(labels, previous, reach, [4])
        assert torch.equal(kept, far_by_hand(labels, previous, reach, [4]))
    assert torch.equal(remove_distant_components(labels, previous, 40), labels)
    share = 2.5 / np.hypot(18, 23)
    assert torch.equal(remove_distant_components(labels, previous, share), far_by_hand(labels, previous, 3))


class Scripted(VOSModel):
    "A network that answers what it is told and notes what it is asked to remember."

    def play(self, answers):
        self.answers, self.kept = [None, *answers], []
        return self

    def segment(self, memories, frame, valid=None, equal_widths=False):
        _, view = super().segment(memories, frame, valid, equal_widths)
        answer = self.answers.pop(0)
        if answer is None:
            return None, view
        return (one_hot_objects(answer, range(3))[None] * 0.8 + 0.1).log(), view

    def memorize(self, memories, view, masks, *rest, **options):
        self.kept.append(masks[0])
        return super().memorize(memories, view, masks, *rest, **options)


def test_a_distant_component_is_neither_answered_nor_memorized():
    start = torch.zeros(32, 32, dtype=torch.long)
    start[4:10, 4:10], start[20:26, 4:10] = 1, 2
    ghost = start.clone()
    ghost[28:31, 28:31] = 1
    for hard in (False, True):
        model = Scripted(TINY_VOS).eval().play([ghost, ghost])
        s = views(model, max_distance=5, hard=hard)
        frame = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(s.step(frame, start), start)
        assert torch.equal(s.step(frame), start)
        there = model.kept[1][:, 28:31, 28:31]
        assert there[0].abs().max() == 0 and (model.kept[1][0, 4:10, 4:10] > 0.5).all()
        assert torch.equal(s.step(frame, torch.where(ghost == 1, 1, 0)), ghost)  # a given mask is left alone
        model.play([ghost, ghost])
        off = views(model, hard=hard)
        off.step(frame, start)
        assert torch.equal(off.step(frame), ghost)


# ---------------------------------------------------------------- on a GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_the_answer_comes_back_to_the_cpu(clip):
    masks = late_masks(clip)
    here = follow(views(network(), *MULTI_SCALE, flip=True, max_distance=0.2), clip, masks)
    there = follow(views(network(), *MULTI_SCALE, flip=True, max_distance=0.2, device="cuda"), clip, masks)
    assert there.device.type == "cpu" and (here != there).float().mean() < 0.01
