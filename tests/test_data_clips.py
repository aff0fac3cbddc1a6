"Contracts of `stremn.data.clips`: planes and batches against pixel loops, the sampler against its exact law."
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from stremn.core import StremnError, make_generator
from stremn.data.clips import Batch, Clip, collate, one_hot_objects, sample_indices, skip_curriculum


def clip(seed, ids, T=3, H=4, W=5, unknown=()):
    "A clip of random labels out of `ids` and 0; every id occurs."
    rng = np.random.default_rng(seed)
    masks = rng.choice([0, *ids], (T, H, W))
    masks[0].flat[:len(ids)] = ids
    masks[list(unknown)] = -1
    frames = torch.from_numpy(rng.random((T, 3, H, W), dtype=np.float32))
    return Clip(frames, torch.from_numpy(masks).long(), f"clip {seed}")


def test_ids_leave_out_background_and_unknown():
    assert clip(0, [9, 2, 200], unknown=[2]).ids == [2, 9, 200]
    assert clip(0, []).ids == [] and clip(0, [3], T=1, unknown=[0]).ids == []


@pytest.mark.parametrize("seed", range(10))
def test_planes_equal_a_pixel_loop(seed):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(-1, 5, tuple(rng.integers(1, 4, rng.integers(2, 5)))))
    ids = rng.permutation(6)[:rng.integers(0, 5)].tolist()
    planes = one_hot_objects(labels, ids)
    assert planes.shape == (*labels.shape[:-2], len(ids), *labels.shape[-2:]) and planes.dtype == torch.float32
    for at in np.ndindex(*planes.shape):
        *lead, o, y, x = at
        assert planes[at] == float(labels[(*lead, y, x)] == ids[o])


def test_planes_refuse_a_row_of_labels():
    with pytest.raises(StremnError, match=r"expected shape \(\.\.\.,H,W\), found \(4,\)"):
        one_hot_objects(torch.zeros(4, dtype=torch.long), [1])


@pytest.mark.parametrize("objects", [None, 1, 2, 5])
def test_a_batch_is_a_pixel_loop_over_clips(objects):
    clips = [clip(0, [7, 3, 200]), clip(1, [2], unknown=[1]), clip(2, []), clip(3, [1, 2])]
    before = [c.masks.clone() for c in clips]
    batch = collate(clips, objects)
    O = objects or 3
    assert batch.valid.shape == (4, O)
    for v, c in enumerate(clips):
        kept = c.ids[:O]
        assert batch.valid[v].tolist() == [o < len(kept) for o in range(O)]
        assert torch.equal(batch.frames[v], c.frames)
        for at in np.ndindex(*c.masks.shape):
            i = int(c.masks[at])
            want = -1 if i < 0 else kept.index(i) + 1 if i in kept else 0
            assert batch.labels[v][at] == want
    assert all(torch.equal(a, c.masks) for a, c in zip(before, clips))


def test_a_batch_without_objects_keeps_one_empty_place():
    assert collate([clip(0, [])]).valid.tolist() == [[False]]


def test_to_keeps_everything():
    batch = collate([clip(0, [1])])
    assert isinstance(batch.to("cpu"), Batch) and all(torch.equal(a, b) for a, b in zip(batch, batch.to("cpu")))


@pytest.mark.parametrize("clips, objects, message", [
    ([], None, "expected at least one"), ([clip(0, [1])], 0, "objects: expected 1 or more, found 0"),
    ([clip(0, [1]), clip(1, [1], T=2)], None, "'clip 1': expected 3 frames"),
    ([clip(0, [1]), clip(1, [1], W=6)], None, "of 4 x 5 as in clip 'clip 0'"),
    ([clip(0, [1])._replace(masks=torch.zeros(3, 4, 4, dtype=torch.long))], None, "found")])
def test_clips_that_do_not_fit_are_refused(clips, objects, message):
    with pytest.raises(StremnError) as error:
        collate(clips, objects)
    assert message in str(error.value) and "\n" not in str(error.value)


def law(total, length, max_skip):
    "Clip -> exact probability. Gaps in turn, each uniform over what leaves room for the rest; then the start."
    table = Counter()

    def walk(steps, p):
        rest = length - 1 - len(steps)
        if rest == 0:
            starts = total - sum(steps)
            for s in range(starts):
                table[tuple(s + sum(steps[:i]) for i in range(length))] += p / starts
            return
        fits = [d for d in range(1, max_skip + 2) if sum(steps) + d + (rest - 1) <= total - 1]
        for d in fits:
            walk([*steps, d], p / len(fits))

    walk([], Fraction(1))
    assert sum(table.values()) == 1
    return table


CASES = [(n, k, s) for n in range(1, 6) for k in range(1, n + 1) for s in range(4)]


def test_the_sampler_follows_its_law_in_every_small_case():
    "False alarm: 60 tables of at most 20 clips, beyond 6 standard deviations; a fixed seed makes it never or always."
    g, draws, worst = make_generator(0), 1500, 0.
    for case in CASES:
        p = law(*case)
        count = Counter(tuple(sample_indices(*case, g)) for _ in range(draws))
        assert count.keys() <= p.keys(), (case, count.keys() - p.keys())
        for c, q in p.items():
            if q < 1:
                worst = max(worst, abs(count[c] - draws * float(q)) / (draws * float(q * (1 - q))) ** .5)
            else:
                assert count[c] == draws
    assert 1 < worst < 6


@pytest.mark.parametrize("seed", range(20))
def test_long_videos_keep_the_limits_and_reach_them(seed):
    rng = np.random.default_rng(seed)
    length, skip = int(rng.integers(2, 12)), int(rng.integers(0, 26))
    total = length + int(rng.integers(0, 400))
    g, seen = make_generator(seed), set()
    for _ in range(50):
        index = sample_indices(total, length, skip, g)
        steps = np.diff(index)
        assert len(index) == length and 0 <= index[0] and index[-1] < total
        assert steps.min() >= 1 and steps.max() <= skip + 1
        seen.add(tuple(index))
    assert len(seen) > 1 or total == length


def test_one_seed_one_clip_and_the_global_state_is_left_alone():
    state = torch.random.get_rng_state()
    a, b = (sample_indices(100, 5, 9, make_generator(3), reverse=True) for _ in range(2))
    assert a == b and torch.equal(state, torch.random.get_rng_state())


def test_reverse_is_the_same_law_half_of_the_time_backwards():
    g = make_generator(1)
    rows = [sample_indices(30, 4, 3, g, reverse=True) for _ in range(600)]
    back = [r for r in rows if r[0] > r[-1]]
    assert abs(len(back) - 300) < 6 * 600 ** .5 / 2
    assert all(list(np.sign(np.diff(r))) in ([1] * 3, [-1] * 3) for r in rows)


@pytest.mark.parametrize("args, message", [
    ((4, 5), "video: expected at least 5 frames, found 4"), ((4, 0), "length: expected 1 or more frames, found 0"),
    ((4, 2, -1), "max_skip: expected 0 or more frames, found -1")])
def test_impossible_clips_are_refused(args, message):
    with pytest.raises(StremnError) as error:
        sample_indices(*args)
    assert str(error.value) == message


def test_the_skip_curriculum_climbs_and_stops():
    want = [min(25, 5 * (e // 20)) for e in range(300)]
    assert [skip_curriculum(e) for e in range(300)] == want and want[119] == 25 and want[19] == 0
    assert skip_curriculum(7, step=1, every=3, most=9) == 2
    for bad in ({"epoch": -1}, {"epoch": 0, "every": 0}, {"epoch": 0, "step": -1}, {"epoch": 0, "most": -1}):
        with pytest.raises(StremnError):
            skip_curriculum(**bad)
