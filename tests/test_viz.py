"""Pictures say what the arrays say: colours and masks by pixel, life-lines by another route, errors in one line."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from stremn import viz
from stremn.core import StremnError
from stremn.images import PALETTE


# ---- colours and overlays --------------------------------------------------------------------------------------

def overlay_in_loops(frame, labels, alpha, contour):
    """The definition, one pixel at a time, in exact arithmetic (`frame` uint8, `alpha` a multiple of 1/8)."""
    _, H, W = frame.shape
    out = np.zeros((H, W, 3), int)
    for y in range(H):
        for x in range(W):
            label, value = int(labels[y, x]), [int(v) for v in frame[:, y, x]]
            if label > 0:
                colour = [int(c) for c in PALETTE[label]]
                value = [round(v - alpha*v + alpha*c) for v, c in zip(value, colour, strict=True)]
                near = [labels[j, i] for j, i in ((y-1, x), (y+1, x), (y, x-1), (y, x+1)) if 0 <= j < H and 0 <= i < W]
                if contour and any(int(n) != label for n in near):
                    value = [min(255, 2*c) for c in colour]
            out[y, x] = value
    return out


@pytest.mark.parametrize("H,W", [(1, 1), (1, 9), (9, 1), (7, 5), (31, 4), (32, 4), (33, 4), (65, 6), (97, 3)])
@pytest.mark.parametrize("alpha", [0., .125, .5, 1.])
def test_overlay_equals_loops(H, W, alpha):
    gen = np.random.default_rng(H*100 + W)
    frame = gen.integers(0, 256, (3, H, W), dtype=np.uint8)
    labels = gen.choice([-1, 0, 0, 1, 2, 255], (H, W)).repeat(2, 0)[:H]
    for contour in (True, False):
        out = viz.overlay(frame, labels, alpha, contour)
        assert out.dtype == np.uint8 and out.shape == (H, W, 3)
        assert (out == overlay_in_loops(frame, labels, alpha, contour)).all()


def test_line_is_drawn_where_objects_meet_across_a_band_of_rows():
    labels = np.ones((70, 3), int)
    labels[32:] = 2
    red = viz.overlay(np.zeros((3, 70, 3), np.uint8), labels)
    assert np.flatnonzero((red.max(-1) == 255).all(1)).tolist() == [31, 32]


def test_overlay_takes_tensors_floats_grey_and_views():
    gen = torch.Generator().manual_seed(0)
    byte = torch.randint(0, 256, (3, 40, 20), generator=gen, dtype=torch.uint8)
    labels = torch.zeros(40, 20, dtype=torch.long)
    labels[5:35, 5:15] = 3
    want = viz.overlay(byte, labels)
    assert (viz.overlay(byte.float()/255, labels) == want).all()
    assert (viz.overlay(byte.double()/255, labels.to(torch.int32)) == want).all()
    assert (viz.overlay((byte.float()/255).requires_grad_(), labels) == want).all()
    assert (viz.overlay(byte.mT.contiguous().mT, labels.mT.contiguous().mT) == want).all()
    grey = viz.overlay(byte[:1], labels)
    assert (grey == viz.overlay(byte[:1].expand(3, -1, -1), labels)).all()
    assert (viz.overlay(byte, labels == 3) == viz.overlay(byte, (labels == 3).long())).all()
    half = viz.overlay(torch.full((3, 4, 4), .5, dtype=torch.bfloat16), torch.zeros(4, 4, dtype=torch.long))
    assert (half == 128).all()


def test_overlay_leaves_its_arguments_and_cuts_overshoot():
    frame, labels = torch.full((3, 4, 4), 1.3), torch.zeros(4, 4, dtype=torch.long)
    frame[:, 0], labels[2:] = -.2, 1
    before = frame.clone(), labels.clone()
    out = viz.overlay(frame, labels, contour=False)
    assert torch.equal(frame, before[0]) and torch.equal(labels, before[1])
    assert (out[0] == 0).all() and (out[1] == 255).all()


@pytest.mark.parametrize("call,words", [
    (lambda f, m: viz.overlay(f*255, m), r"frame: expected floats in \[0,1\], found values up to 255"),
    (lambda f, m: viz.overlay(f*torch.nan, m), "found values up to nan"),
    (lambda f, m: viz.overlay(f.long(), m), "float in .* or uint8, found int64"),
    (lambda f, m: viz.overlay(f[0], m), r"frame: expected shape \(3,H,W\), found \(4, 6\)"),
    (lambda f, m: viz.overlay(f, m.T), r"labels: expected label maps of shape \(4, 6\), found \(6, 4\)"),
    (lambda f, m: viz.overlay(f, m.float()), "labels: expected integer labels, found float32"),
    (lambda f, m: viz.overlay(f, m+256), "labels: expected labels from -1 to 255, found 256 to 256"),
    (lambda f, m: viz.overlay(f, m, alpha=2), "alpha: .* found 2"),
    (lambda f, m: viz.strips({}), "rows: expected at least one"),
    (lambda f, m: viz.strip(f), r"expected shape \(T,3,H,W\), found \(3, 4, 6\)"),
    (lambda f, m: viz.strip(f[None], m), "labels of '': expected label maps"),
    (lambda f, m: viz.strip(f[None], titles=["a", "b"]), "titles: expected 1, one a frame, found 2"),
    (lambda f, m: viz.strip(f[None], every=0), "every, ncols: expected 1 or more"),
    (lambda f, m: viz.strips({"a": (f[None], None), "b": (f[None].expand(2, -1, -1, -1), None)}),
     "clips of one length"),
    (lambda f, m: viz.match_maps(f, f, (0, 0)), r"slots: expected shape \(K,3,h,w\), found \(3, 4, 6\)"),
    (lambda f, m: viz.match_maps(f, f[None], (4, 0)), r"pixel: expected \(y,x\) inside 4 x 6, found \(4, 0\)"),
    (lambda f, m: viz.match_maps(f, f[None], (0, 0), ["a", "b"]), "names: expected 1, one a slot, found 2"),
    (lambda f, m: viz.slot_strip(f[None], [0, 1]), "frames: expected 1 integers"),
    (lambda f, m: viz.slot_strip(f[None], [0], scores=[.1, .2]), r"scores: expected shape \(1,\), found \(2,\)"),
    (lambda f, m: viz.slot_strip(f[None], [0], chosen=1), "chosen: expected a slot from 0 to 0, found 1"),
    (lambda f, m: viz.lives([0, 1]), r"history: expected integers of shape \(T,K\)"),
    (lambda f, m: viz.lives([[.5]]), "found float64"),
    (lambda f, m: viz.lives([[-2]]), "found -2"),
    (lambda f, m: viz.timeline([[0, 1, 2], [-1, 1, 2]]), "found frame 1 in row 0; is it transposed"),
    (lambda f, m: viz.timeline([[0]], by="age"), "by: expected 'frame' or 'slot', found 'age'"),
    (lambda f, m: viz.timeline([[0]], pinned=3), "pinned: expected a slot from 0 to 0 or None, found 3"),
    (lambda f, m: viz.survivors({}), "at least one policy"),
    (lambda f, m: viz.survivors({"a": [[0]], "b": [[0], [0]]}), "streams of one length"),
    (lambda f, m: viz.survivors({"a": [[7]]}), "history of 'a'"),
    (lambda f, m: viz.age_histogram({"a": []}), "ages of 'a': expected at least one"),
    (lambda f, m: viz.age_histogram({"a": [-3]}), "expected 0 or more, found -3"),
    (lambda f, m: viz.age_histogram({"a": [3]}, bins=[2, 1]), "rising edges"),
    (lambda f, m: viz.bars({"a": (1., 2., 3.)}), "row 'a': expected .mean, lo, hi. with lo <= mean <= hi"),
    (lambda f, m: viz.curve({"a": ([1, 2], [1])}), "curve 'a': expected x and y of one length"),
])
def test_errors_are_one_line_that_says_what_was_found(call, words):
    with pytest.raises(StremnError, match=words) as e:
        call(torch.ones(3, 4, 6), torch.zeros(4, 6, dtype=torch.long))
    assert "\n" not in str(e.value)


def test_works_without_matplotlib():
    code = """
import sys
import stremn.viz as viz
assert "matplotlib" not in sys.modules, "importing viz loads matplotlib"
sys.modules["matplotlib"] = None
sys.modules["matplotlib.pyplot"] = None
import numpy as np
from stremn.core import StremnError
assert viz.overlay(np.zeros((3,2,2)), np.ones((2,2), int)).shape==(2,2,3)
assert len(viz.lives([[0]]))==1
try: viz.timeline([[0]])
except StremnError as e: assert "pip install 'stremn[notebooks]'" in str(e), e
else: raise SystemExit("drew a figure without matplotlib")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- figures ---------------------------------------------------------------------------------------------------

@pytest.fixture
def plt():
    "pyplot, and a check that no figure was left open."
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    plt.close("all")
    yield plt
    assert plt.get_fignums() == []


def random_history(T, K, seed):
    "Fill, then replace a random slot, or none."
    gen = np.random.default_rng(seed)
    slots, rows = np.full(K, -1), []
    for t in range(T):
        k = t if t < K else int(gen.integers(0, K+1))
        if k < K:
            slots[k] = t
        rows.append(slots.copy())
    return np.array(rows)


def segments(ax):
    return [s for c in ax.collections for s in c.get_segments()]


@pytest.mark.parametrize("seed", range(20))
def test_lives_rebuild_the_history(seed):
    gen = np.random.default_rng(seed)
    T, K = int(gen.integers(1, 40)), int(gen.integers(1, 7))
    history = random_history(T, K, seed)
    lives, rebuilt = viz.lives(history), np.full((T, K), -1)
    for life in lives:
        assert (rebuilt[life.start:life.end+1, life.slot] == -1).all(), "two lives in one slot at one time"
        rebuilt[life.start:life.end+1, life.slot] = life.frame
    assert (rebuilt == history).all()
    assert [life.start for life in lives] == sorted(life.start for life in lives)
    entries = sum(history[t, k] >= 0 and (t == 0 or history[t-1, k] != history[t, k]) for t in range(T)
                  for k in range(K))
    assert len(lives) == entries


def test_lives_of_a_frame_that_leaves_changes_slot_and_returns():
    history = torch.tensor([[0, -1], [0, 1], [1, -1], [0, -1]])
    assert viz.lives(history) == [(0, 0, 0, 1), (1, 1, 1, 1), (0, 1, 2, 2), (0, 0, 3, 3)]
    assert viz.lives([[-1, -1]]) == []


@pytest.mark.parametrize("seed", range(3))
def test_timeline_draws_each_life_once(plt, seed):
    history = random_history(30, 4, seed)
    entries = {(t, k) for t in range(30) for k in range(4)
               if history[t, k] >= 0 and (t == 0 or history[t-1, k] != history[t, k])}
    ax, = viz.timeline(history).axes
    lines = segments(ax)
    assert sorted((s[0][0], s[0][1]) for s in lines) == sorted((t, history[t, k]) for t, k in entries)
    assert sum(s[1][0]-s[0][0] for s in lines) == (history >= 0).sum(), "a line is as long as its frame was held"
    crosses = sum(len(line.get_xdata()) for line in ax.lines if line.get_marker() == "x")
    assert crosses == len(entries) - (history[-1] >= 0).sum()
    assert sorted(int(t.get_text()) for t in ax.texts) == sorted(history[-1][history[-1] >= 0].tolist())
    rows, = viz.timeline(history, by="slot").axes
    assert len(rows.patches) == len(entries)
    assert sum(p.get_width() for p in rows.patches) == (history >= 0).sum()


def test_pinned_slot_stands_out(plt):
    history = random_history(20, 3, 0)
    widths = {c.get_label(): c.get_linewidth()[0] for c in viz.timeline(history).axes[0].collections}
    assert widths["slot 0 (pinned)"] > max(w for name, w in widths.items() if name != "slot 0 (pinned)")
    plain = {c.get_label(): c.get_linewidth()[0] for c in viz.timeline(history, pinned=None).axes[0].collections}
    assert set(plain) == {"slot 0", "slot 1", "slot 2"} and len(set(plain.values())) == 1


def test_timeline_names_do_not_overlap(plt):
    history = np.array([[min(t, k) if t < k else t-(6-k) for k in range(1, 7)] for t in range(50)]).clip(0)
    fig = viz.timeline(history)
    fig.draw_without_rendering()
    heights = sorted(t.get_window_extent().y0 for t in fig.axes[0].texts)
    assert len(heights) == 6 and min(np.diff(heights)) > 9


def test_survivors_marks_what_is_held_at_the_end_and_how_long_the_rest_was(plt):
    histories = {f"policy {s}": random_history(50, 5, s) for s in range(3)}
    histories["empty"] = np.full((50, 2), -1)
    ax = viz.survivors(histories).axes[0]
    pale, tall = ax.collections[::2], ax.collections[1::2]
    for row, (history, light, strong) in enumerate(zip(histories.values(), pale, tall, strict=True)):
        held = {f: (history == f).any(1).sum() for f in range(50) if (history == f).any()}
        assert sorted(s[0][0] for s in strong.get_segments()) == sorted(set(history[-1].tolist()) - {-1})
        heights = {int(s[0][0]): abs(s[1][1]-s[0][1]) for s in light.get_segments()}
        assert heights.keys() == held.keys()
        for f, height in heights.items():
            assert height == pytest.approx(.7*held[f]/(50-f))
        assert all(abs(s[:, 1]-row).max() < .5
                   for s in light.get_segments() + strong.get_segments()), "stays in its row"
    assert [t.get_text() for t in ax.get_yticklabels()] == list(histories)


@pytest.mark.parametrize("T,every,ncols,rows", [(1, 1, 10, 1), (10, 1, 4, 1), (7, 2, 10, 2), (11, 3, 2, 3)])
def test_strips_have_one_axes_for_each_frame_of_each_row(plt, T, every, ncols, rows):
    gen = torch.Generator().manual_seed(0)
    clips = {f"row {i}": (torch.rand(T, 3, 8, 12, generator=gen), torch.randint(-1, 3, (T, 8, 12), generator=gen))
             for i in range(rows)}
    fig = viz.strips(clips, every=every, ncols=ncols)
    shown = list(range(0, T, every))
    assert len(fig.axes) == rows*len(shown)
    seen = [ax.images[0].get_array() for ax in fig.axes]
    want = [viz.overlay(f[t], m[t]) for band in range(0, len(shown), ncols)
            for f, m in clips.values() for t in shown[band:band+ncols]]
    assert all((a == b).all() for a, b in zip(seen, want, strict=True))
    assert [ax.get_title() for ax in fig.axes if ax.get_title()] == [f"frame {t}" for t in shown]
    names = [ax.get_ylabel() for ax in fig.axes if ax.get_ylabel()]
    assert names == list(clips)*-(-len(shown)//ncols)


def test_strip_of_bare_frames_shows_the_frames(plt):
    frames = torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    fig = viz.strip(frames, titles=["a", "b", "c"])
    assert [ax.get_title() for ax in fig.axes] == ["a", "b", "c"]
    assert (fig.axes[1].images[0].get_array()[..., 0] == (frames[1, 0]*255).round().numpy()).all()


def test_match_maps_are_cosines_with_a_cross_on_the_best(plt):
    gen = torch.Generator().manual_seed(1)
    new, slots = torch.randn(5, 4, 6, generator=gen), torch.randn(9, 5, 3, 7, generator=gen)
    slots[2, :, 1, 5] = 4*new[:, 2, 3]
    slots[3] = 0
    fig = viz.match_maps(new, slots, (2, 3))
    assert len(fig.axes) == 1+9+1
    for k, ax in enumerate(fig.axes[1:10]):
        shown = ax.images[0].get_array()
        for y in range(3):
            for x in range(7):
                a, b = new[:, 2, 3].double(), slots[k, :, y, x].double()
                want = 0 if k == 3 else (a@b/(a.norm()*b.norm())).item()
                assert shown[y, x] == pytest.approx(want, abs=1e-5)
        (x,), (y,) = ax.lines[0].get_data()
        assert shown[y, x] == shown.max()
        assert ax.images[0].get_clim() == (-1, 1)
    assert fig.axes[3].get_title() == "slot 2\nbest 1.00" and fig.axes[3].lines[0].get_data() == ([5], [1])


def test_slot_strip_says_what_the_arrays_say(plt):
    gen = torch.Generator().manual_seed(0)
    images, labels = torch.rand(4, 3, 6, 8, generator=gen), torch.randint(0, 3, (4, 6, 8), generator=gen)
    fig = viz.slot_strip(images, torch.tensor([0, 12, 7, -1]), [np.inf, .25, -.5, np.nan], chosen=2, labels=labels)
    titles, notes = [ax.get_title() for ax in fig.axes], [ax.get_xlabel() for ax in fig.axes]
    assert titles == ["slot 0\nframe 0", "slot 1\nframe 12", "slot 2\nframe 7", "slot 3\nempty"]
    assert notes == ["does not compete", "score 0.250", "score -0.500\nto be replaced", ""]
    assert [ax.spines["top"].get_visible() for ax in fig.axes] == [False, False, True, False]
    assert (fig.axes[1].images[0].get_array() == viz.overlay(images[1], labels[1])).all()
    assert len(viz.slot_strip(images.repeat(5, 1, 1, 1), range(20)).axes) == 20


@pytest.mark.parametrize("bins", [1, 3, 20, 500, [0, 5, 30, 200]])
def test_age_shares_are_percentages_of_all_templates(plt, bins):
    gen = np.random.default_rng(0)
    sets = {"short": gen.integers(0, 30, 200), "long": gen.integers(20, 150, 77)}
    ax = viz.age_histogram(sets, bins).axes[0]
    for line, ages in zip(ax.lines, sets.values(), strict=True):
        assert line.get_ydata().sum() == pytest.approx(100)
        if bins == 500:  # one bin a frame
            assert dict(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True)) == pytest.approx(
                {float(f): 100*float((ages == f).mean()) for f in line.get_xdata()})
        if np.ndim(bins) == 0:
            assert len(line.get_ydata()) <= bins


def test_bars_keep_rows_nobody_ran_and_write_numbers_out(plt):
    fig = viz.bars({"a": (71.25, 70., 72.), "b": None, "c": (3., 2., 4.5)}, "J (%)", reference=50)
    fig.draw_without_rendering()
    ax = fig.axes[0]
    right, = ax.child_axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in right.get_yticklabels()] == ["71.2  [70.0, 72.0]", "not run", "3.0  [2.0, 4.5]"]
    spans = [line.get_xdata() for line in ax.lines if line.get_marker() == "None" and line.get_linestyle() == "-"]
    assert [list(s) for s in spans] == [[70, 72], [2, 4.5]]
    viz.bars({"a": None}).draw_without_rendering()


def test_curves_can_be_told_apart(plt):
    fig = viz.curve({f"run {i}": (torch.arange(4), torch.rand(4)) for i in range(14)}, log=True)
    looks = {(line.get_color(), line.get_linestyle()) for line in fig.axes[0].lines}
    assert len(looks) == 14 and fig.axes[0].get_yscale() == "log"
