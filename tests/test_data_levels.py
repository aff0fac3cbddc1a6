"The levels of Chameleon: the same clips on any processor, and statistics counted from masks."
import math
import os
import subprocess
import sys

import pytest
import torch

from stremn.core import StremnError
from stremn.data.chameleon import ChameleonConfig, chameleon_batch
from stremn.data.clips import Clip
from stremn.data.levels import (LEVELS, MOSE_V2, clip_hash, clip_statistics, level_clips, same_clips,
                                statistics_table)

HASHES = """
from stremn.data.levels import clip_hash, level_clips
import torch
print(torch.backends.cpu.get_cpu_capability(), *(clip_hash(level_clips(n, 1)[0]) for n in ("easy", "medium", "hard")))
"""


@pytest.fixture(scope="module")
def made():
    return {name: level_clips(name) for name in LEVELS}


@pytest.mark.parametrize("name", LEVELS)
def test_clips_are_the_published_ones(made, name):
    "If this fails, every number measured on the level is of other clips."
    assert len(LEVELS[name].hashes) == 8 and same_clips(name, made[name]) == (8, 8)
    assert clip_hash(level_clips(name, 1)[0]) == LEVELS[name].hashes[0]              # whatever its company
    for clip in made[name]:
        assert clip.frames.dtype == torch.float32
        assert torch.equal(clip.frames, (clip.frames * 255).round() / 255)


def test_simpler_instructions_of_the_processor_give_the_same_clips():
    done = subprocess.run([sys.executable, "-c", HASHES], capture_output=True, text=True,
                          env=os.environ | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"})
    kind, *hashes = done.stdout.split()
    assert kind == "DEFAULT" and hashes == [level.hashes[0] for level in LEVELS.values()], done.stderr


def test_a_hash_sees_a_pixel_a_mask_a_mode_and_not_the_last_bit(made):
    clip, known = made["easy"][0], LEVELS["easy"].hashes[0]
    assert clip_hash(clip._replace(name="other", frames=clip.frames.double() + 1e-6)) == known
    for field, place, step in (("frames", (3, 1, 5, 7), 1 / 255), ("masks", (9, 0, 0), 1), ("modes", (5, 0), 1)):
        changed = getattr(clip, field).clone()
        changed[place] += step if changed[place] < .5 else -step
        assert clip_hash(clip._replace(**{field: changed})) != known
    assert clip_hash(clip._replace(frames=clip.frames.reshape(40, 3, 32, 128))) != known
    assert same_clips("easy", [made["easy"][1], made["easy"][1]]) == (1, 2)


@pytest.mark.parametrize("name", LEVELS)
def test_the_knobs_are_what_happens(made, name):
    level, found = LEVELS[name], clip_statistics(made[name], LEVELS[name].config)
    assert abs(found.disappear - level.disappear) <= 1 / 16 and abs(found.reappear - level.reappear) <= 1 / 16
    assert (found.distractors, found.cuts, found.length) == (level.distractors, level.cuts, level.length)
    assert .04 < found.area < .1 and .7 < found.visible < 1


def test_levels_rise():
    for knob in ("length", "disappear", "reappear", "distractors", "cuts", "drift"):
        values = [getattr(LEVELS[name], knob) for name in ("easy", "medium", "hard")]
        assert values == sorted(set(values)), knob
    assert LEVELS["medium"].disappear == MOSE_V2.disappear and LEVELS["medium"].reappear == MOSE_V2.reappear
    assert LEVELS["hard"].distractors == round(MOSE_V2.distractors)


def strip(*rows):
    "A clip of one row of pixels a frame, from strings of object ids."
    masks = torch.tensor([[[int(x) for x in row]] for row in rows])
    return Clip(torch.zeros(len(rows), 3, 1, masks.shape[-1]), masks)


def test_statistics_by_hand():
    stays, leaves, returns = strip("1100", "1000"), strip("11", "00", "00"), strip("10", "00", "11", "00")
    late = strip("00", "01")                                                         # comes late, does not vanish
    assert clip_statistics([stays])[:2] == (0., 0.) and clip_statistics([late])[:2] == (0., 0.)
    assert clip_statistics([leaves])[:2] == (1., 0.) and clip_statistics([returns])[:2] == (1., 1.)
    all_four = clip_statistics([stays, leaves, returns, late])
    assert all_four[:2] == (.5, .25) and math.isnan(all_four.distractors) and math.isnan(all_four.cuts)
    assert all_four.area == pytest.approx((.375 + 1 + .75 + .5) / 4)
    assert all_four.visible == pytest.approx((1 + 1 / 3 + .5 + .5) / 4)
    assert all_four.length == pytest.approx((2 + 3 + 4 + 2) / 4)
    two = strip("1020", "0020", "1000")                                              # each object is a target
    assert clip_statistics([two])[:2] == (1., .5)


def test_statistics_of_several_targets_count_the_others_as_look_alikes():
    config = ChameleonConfig(frames=9, size=24, objects=2, cuts=2, lookalikes=3)
    found = clip_statistics(chameleon_batch(range(2), config), config)
    assert (found.distractors, found.cuts) == (4., 2.)


def test_the_table_prints_what_is_published_and_no_more(made):
    lines = statistics_table({"easy": clip_statistics(made["easy"])}).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| easy | 37.5% | 25.0% | – | – |") and lines[2].endswith("| 40 |")
    assert lines[3] == "| MOSEv2 (published) | 61.8% | 50.3% | 13.6 | – | – | – | – |"


def test_what_is_not_there_is_refused():
    for message, call in (("expected one of easy, medium, hard, found 'x'", lambda: level_clips("x")),
                          ("clips: expected 1 or more, found 0", lambda: level_clips("easy", 0)),
                          ("clips: expected at least one with an object", lambda: clip_statistics([strip("00")]))):
        with pytest.raises(StremnError, match=message):
            call()
