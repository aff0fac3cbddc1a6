"Contracts of `stremn.data.chameleon`: seeds, stories, hues, and masks and colours against a loop over pixels."
import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stremn.core import StremnError
from stremn.config import to_json, with_new_defaults
from stremn.data.chameleon import (
    ChameleonConfig, chameleon, chameleon_batch, draw_cuts, draw_fates, draw_motion, draw_script, draw_story,
    paint_clips, paint_figure,
)

SMALL = ChameleonConfig(frames=14, size=17, modes=3, stay=(1, 3), fade=2, hide=1)
WORLDS = [SMALL, replace(SMALL, objects=2), replace(SMALL, lookalikes=0), replace(SMALL, modes=1, hide=2),
          replace(SMALL, fade=0, noise=0.), replace(SMALL, hide=0, vanish=1.), replace(SMALL, frames=1),
          ChameleonConfig(size=9), replace(SMALL, disappear=.6, reappear=.3, cuts=3, drift=.7)]


def same(a, b):
    return a.name == b.name and all(torch.equal(x, y) for x, y in zip((*a[:2], a.modes), (*b[:2], b.modes)))


@pytest.mark.parametrize("config", WORLDS)
def test_a_clip_does_not_know_its_company(config):
    seeds = [5, [1, 2, 3], 0, 2**40]
    batch = chameleon_batch(seeds, config)
    assert all(same(a, b) for a, b in zip(batch, reversed(chameleon_batch(seeds[::-1], config))))
    assert all(same(a, chameleon(s, config)) for a, s in zip(batch, seeds))
    assert not torch.equal(batch[0].frames, batch[2].frames)


@pytest.mark.parametrize("config", WORLDS)
def test_forms_and_ranges(config):
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    for c in chameleon_batch(range(3), config):
        T, S = config.frames, config.size
        assert c.frames.shape == (T, 3, S, S) and c.frames.dtype == torch.float32
        assert c.masks.shape == (T, S, S) and c.masks.dtype == torch.int64
        assert c.modes.shape == (T, config.objects) and c.modes.dtype == torch.int64
        assert 0 <= c.frames.min() and c.frames.max() <= 1 and 0 <= c.masks.min() and c.masks.max() <= config.objects
        assert -1 <= c.modes.min() and c.modes.max() < config.modes
    assert torch.equal(state[0], torch.random.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


def test_what_seed_7_1_has_always_shown():
    "If this fails, the generator changed: every network trained and every number measured on it is of another world."
    config = ChameleonConfig(frames=10, size=32, stay=(2, 2), fade=2, hide=1, modes=2, objects=2)
    c = chameleon([7, 1], config)
    assert c.modes.T.tolist() == [[0, 0, 0, 1, 1, 1, -1, 0, 0, -1]] * 2
    pooled = F.avg_pool2d(c.frames[[0, 4, 9]], 16).flatten(1)
    expected = torch.tensor([
        [.4984, .4521, .5306, .4720, .3565, .3881, .4756, .4538, .5663, .4479, .4151, .4581],
        [.2687, .4726, .5446, .4687, .4514, .3745, .4794, .4613, .5360, .3778, .4096, .4586],
        [.4217, .3661, .4568, .3355, .4173, .4596, .4542, .5241, .4263, .4466, .4715, .3687]])
    torch.testing.assert_close(pooled, expected, rtol=0, atol=2e-4)
    areas = torch.stack([(c.masks == o).flatten(1).sum(1) for o in (1, 2)])
    expected = torch.tensor([[60, 56, 52, 52, 51, 52, 0, 48, 48, 0], [73, 75, 78, 83, 86, 91, 0, 102, 99, 0]])
    assert (areas - expected).abs().max() <= 1                                   # a rim pixel may round the other way


def rim(f, t, side, phi):
    "Cosine and sine weights of the rim of one of the two appearances at frame t, as numbers."
    return [(a * math.cos(p), -a * math.sin(p)) for a, p in f.outline[f.appearance[t, side]]]


def pixel(f, t, i, j, size):
    "(distance to the rim, RGB) of figure f at one pixel, in double precision, from the definition."
    dy, dx = (i + .5) / size - f.centre[t, 0], (j + .5) / size - f.centre[t, 1]
    cos, sin = math.cos(f.angle[t]), math.sin(f.angle[t])
    y, x = (cos * dy - sin * dx) / f.radius[t], (sin * dy + cos * dx) / f.radius[t]
    phi, w = math.atan2(y, x), f.blend[t]
    a, b = rim(f, t, 0, phi), rim(f, t, 1, phi)
    edge = 1 + sum(((1 - w) * p[0] + w * q[0]) * math.cos(h * phi) + ((1 - w) * p[1] + w * q[1]) * math.sin(h * phi)
                   for h, p, q in zip((2, 3, 5), a, b))
    colour = np.zeros(3)
    for share, appearance in ((1 - w, f.appearance[t, 0]), (w, f.appearance[t, 1])):
        light = .5 + .5 * math.tanh(3 * math.sin(f.stripes[appearance, 0] * y + f.stripes[appearance, 1] * x))
        bright, dark = f.colours[appearance]
        colour += share * (dark + light * (bright - dark))
    return edge - math.hypot(y, x), colour


@pytest.mark.parametrize("seed", range(4))
def test_pixels_equal_a_loop_also_while_fading(seed):
    size, cast = 14, draw_script(seed, SMALL)[0]
    for f in (cast[0], cast[-1]):
        colour, inside = paint_figure([f], size)
        for t in range(SMALL.frames):
            for i in range(size):
                for j in range(size):
                    room, rgb = pixel(f, t, i, j, size)
                    if abs(room) > 1e-4:
                        assert bool(inside[0, t, i, j]) == (room > 0 and bool(f.visible[t]))
                    np.testing.assert_allclose(colour[0, t, :, i, j].numpy(), rgb, rtol=0, atol=1e-4)
    assert any(cast[-1].blend > 0)


def test_a_frame_is_what_its_mask_says():
    "Without noise, a target's pixels have its painted colours, and bare background is the same in all frames."
    config = replace(SMALL, objects=2, size=24, noise=0.)
    c, cast = chameleon(3, config), draw_script(3, config)[0]
    layers = [paint_figure([f], 24) for f in cast]
    for t in range(config.frames):
        for o, (f, (colour, inside)) in enumerate(zip(cast[2:], layers[2:]), 1):
            mine = c.masks[t] == o
            assert not (mine & ~inside[0, t]).any() and (bool(f.visible[t]) or not mine.any())
            torch.testing.assert_close(c.frames[t][:, mine], colour[0, t][:, mine])
        assert (c.masks[t][layers[3][1][0, t]] == 2).all()                       # the last one painted is on top
    bare = ~torch.stack([inside[0] for _, inside in layers]).any(0)              # (T,S,S)
    seen = torch.stack([torch.where(b, f, torch.nan) for f, b in zip(c.frames, bare)])
    spread = (seen.nan_to_num(-1).amax(0) - seen.nan_to_num(2).amin(0)).clamp(min=0)
    assert spread.max() == 0 and bare.any()


@pytest.mark.parametrize("objects, modes, hues", [(1, 4, 12), (2, 4, 12), (3, 3, 10), (1, 8, 9)])
def test_hues_are_dealt_once(objects, modes, hues):
    config = ChameleonConfig(frames=40, objects=objects, modes=modes, hues=hues, stay=(2, 3))
    for seed in range(40):
        cast, _ = draw_script(seed, config)
        bins = [{round(colorsys.rgb_to_hsv(*tone)[0] * hues) % hues for tone in f.colours.reshape(-1, 3)} for f in cast]
        targets = bins[config.lookalikes:]
        assert all(len(b) == modes for b in targets) and len(set().union(*targets)) == objects * modes
        assert not set().union(*targets) & set().union(*bins[:config.lookalikes])


@pytest.mark.parametrize("config", [c for c in WORLDS if c.hide])
def test_stories_keep_their_promises(config):
    for seed in range(60):
        modes, blend, visible, returns = draw_story(np.random.default_rng(seed), config)
        assert len(modes) == len(blend) == len(visible) == config.frames
        assert returns == [t for t in range(1, config.frames) if visible[t] and not visible[t - 1]]
        known = 1
        for t in range(config.frames):
            if blend[t] > 0:
                assert modes[t, 1] == (known if blend[t - 1] == 0 else known - 1) and modes[t, 0] < modes[t, 1]
            known = max(known, modes[t, 1] + 1)
        for t in returns:
            assert blend[t] == 0 and modes[t, 0] in set(modes[:t, 1])              # an appearance already met
            assert config.modes == 1 or modes[t, 0] != modes[t - 1, 1]             # and not the one just left
            assert not visible[t - config.hide:t].any() and (t == config.hide or visible[t - config.hide - 1])


def test_modes_masks_and_story_agree():
    for config in (ChameleonConfig(size=24), replace(SMALL, size=24, fade=3)):
        for seed, c in enumerate(chameleon_batch(range(8), config)):
            f = draw_script(seed, config)[0][-1]
            for t in range(config.frames):
                want = -1 if not f.visible[t] else f.appearance[t, int(f.blend[t] >= .5)]
                assert c.modes[t, 0] == want
            assert torch.equal(c.masks.flatten(1).any(1), c.modes[:, 0] >= 0)
            if seed == 0:                                                       # while it is hidden, the stage is empty
                assert all(not g.visible[~f.visible].any() for g in draw_script(seed, config)[0])


def test_more_noise_same_world():
    a, b = (chameleon(4, replace(SMALL, noise=n)) for n in (0., .1))
    assert torch.equal(a.masks, b.masks) and torch.equal(a.modes, b.modes)
    inner = (a.frames > .4) & (a.frames < .6)                                    # far from the clamp
    assert abs((b.frames - a.frames)[inner].std() - .1) < .01


def test_paths_stay_inside_and_jump_only_at_cuts():
    for seed in range(50):
        centre, angle, radius = draw_motion(np.random.default_rng(seed), 80, [20, 50])
        step = np.abs(np.diff(centre, axis=0)).max(1)
        assert centre.min() >= .17 and centre.max() <= .83 and (np.delete(step, [19, 49]) <= .03).all()
        assert .1 < radius.min() and radius.max() < .2 and np.ptp(np.diff(angle)) < 1e-9


def test_a_thousand_frames():
    c = chameleon(0, ChameleonConfig(frames=1000, size=8))
    seen = c.modes[:, 0] >= 0
    assert c.frames.shape == (1000, 3, 8, 8) and (seen[1:] & ~seen[:-1]).sum() > 80
    assert c.modes.unique().tolist() == [-1, 0, 1, 2, 3]


# ---------------------------------------------------------------- shares, shot cuts, drift
def test_a_share_of_targets_vanishes_and_a_share_returns():
    config = ChameleonConfig(size=8, disappear=.6, reappear=.25)
    T, tally = config.frames, {"returns": 0, "leaves": 0, "stays": 0}
    for seed in range(400):
        (fate,), cast = draw_fates(seed, config), draw_script(seed, config)[0]
        seen, scene = cast[-1].visible, cast[0].visible
        gone = np.flatnonzero(~seen)
        tally[fate] += 1
        if fate == "returns":
            assert seen[gone[0]:].any() and (scene == seen).all()
        elif fate == "leaves":
            assert T // 2 <= gone[0] <= T * 3 // 4 and not seen[gone[0]:].any()
            assert np.flatnonzero(~scene).tolist() == [gone[0], gone[0] + 1]        # the scene goes on without it
            assert cast[0].appearance[gone[0] - 1, 0] != cast[0].appearance[gone[0] + 2, 0]
        else:
            assert seen.all() and scene.all()
            assert (np.diff(cast[-1].appearance[:, 1]) < 0).any()                   # back to an earlier mode, in view
    for fate, share in {"returns": .25, "leaves": .35, "stays": .4}.items():
        assert abs(tally[fate] / 400 - share) < 4 * math.sqrt(share * (1 - share) / 400), tally


def test_a_target_that_returns_does_what_it_did_without_shares():
    some = replace(SMALL, disappear=.9, reappear=.8)
    for seed in range(20):
        if draw_fates(seed, some) == ["returns"]:
            assert same(chameleon(seed, some), chameleon(seed, SMALL))
    assert draw_fates(3, replace(SMALL, objects=2)) == ["returns"] * 2


def test_a_shot_cut_moves_everything_and_changes_nothing_else():
    config = replace(SMALL, frames=30, size=24, modes=1, disappear=0., reappear=0., cuts=3, noise=0., lookalikes=1)
    for seed in range(5):
        cuts, cast = draw_cuts(seed, config)[0], draw_script(seed, config)[0]
        clip, layers = chameleon(seed, config), [paint_figure([f], 24)[1][0] for f in cast]
        bare = ~(layers[0] | layers[1])
        still = [bool((a == b)[:, u & v].all()) for a, b, u, v in zip(clip.frames, clip.frames[1:], bare, bare[1:])]
        assert [t + 1 for t, s in enumerate(still) if not s] == cuts and len(cuts) == 3
        for f in cast:
            jumps = np.flatnonzero(np.abs(np.diff(f.centre, axis=0)).max(1) > .0301) + 1
            assert set(jumps) <= set(cuts) and len(jumps) >= 2 and (np.diff(f.appearance, axis=0) == 0).all()
            assert np.ptp(np.diff(f.angle)) < 1e-9


def test_drift_begins_at_nothing_and_keeps_the_hue():
    config = ChameleonConfig(size=24, noise=0., drift=1.)
    plain, half = (replace(config, drift=d) for d in (0., .5))
    for seed in range(5):
        a, b = chameleon(seed, plain), chameleon(seed, config)
        assert torch.equal(a.frames[0], b.frames[0]) and torch.equal(a.modes, b.modes)
        assert not torch.equal(a.masks[-15:], b.masks[-15:]) and not torch.equal(a.frames[1], b.frames[1])
        for f, g in zip(draw_script(seed, config)[0], draw_script(seed, half)[0]):
            for young, old in zip(f.colours, f.aged["colours"]):
                hue = [colorsys.rgb_to_hsv(*tones[0])[0] * config.hues for tones in (young, old)]
                assert round(hue[0]) % config.hues == round(hue[1]) % config.hues
            for name in ("colours", "stripes", "outline"):
                np.testing.assert_allclose(g.aged[name], (getattr(f, name) + f.aged[name]) / 2, atol=1e-12)
    f = draw_script(0, config)[0][-1]                                            # the last frame shows the aged ones
    fixed = f._replace(colours=f.aged["colours"], stripes=f.aged["stripes"], outline=f.aged["outline"], aged=None)
    for x, y in zip(paint_figure([f], 24), paint_figure([fixed], 24)):
        torch.testing.assert_close(x[0, -1], y[0, -1])


def test_double_precision_shows_the_same():
    for config in (WORLDS[0], WORLDS[-1]):
        for a, b in zip(chameleon_batch(range(3), config), paint_clips(range(3), config, torch.float64)):
            assert b.frames.dtype == torch.float64 and torch.equal(a.modes, b.modes)
            agree = a.masks == b.masks
            assert (~agree).float().mean() < 1e-4
            near = (a.frames - b.frames).abs().amax(1) < 1e-4
            assert (~near).float().mean() < 1e-3                                 # rims of look-alikes


def test_an_old_config_had_the_new_settings_off():
    stored = to_json(ChameleonConfig())
    for name in ("disappear", "reappear", "cuts", "drift"):
        del stored[name]
    found = with_new_defaults({"clip": stored}, {"clip": ChameleonConfig(drift=.5)})["clip"]
    assert found == to_json(ChameleonConfig())


@pytest.mark.parametrize("bad, message", [
    ({"frames": 0}, "frames: expected 1 or more, found 0"), ({"modes": 0}, "modes: expected 1 or more, found 0"),
    ({"objects": 0}, "objects"), ({"size": 0}, "size"),
    ({"lookalikes": -1}, "lookalikes: expected 0 or more, found -1"),
    ({"fade": -1}, "fade"), ({"hide": -2}, "hide"), ({"noise": -.1}, "noise"), ({"noise": math.nan}, "noise"),
    ({"vanish": 1.5}, "vanish: expected a chance from 0 to 1, found 1.5"), ({"vanish": -.5}, "vanish"),
    ({"stay": (8, 5)}, "stay"), ({"stay": (0, 5)}, "stay"), ({"stay": (5,)}, "stay"),
    ({"disappear": .4}, "reappear <= disappear <= 1, found 1.0 and 0.4"), ({"disappear": 1.1}, "reappear <= disappear"),
    ({"reappear": -.1}, "0 <= reappear"), ({"reappear": math.nan}, "0 <= reappear"),
    ({"cuts": 60}, "cuts: expected 0 to frames-1 = 59, found 60"), ({"cuts": -1}, "cuts"),
    ({"drift": 1.5}, "drift: expected a share from 0 to 1, found 1.5"), ({"drift": -.1}, "drift"),
    ({"objects": 3, "modes": 4}, "hues: expected 13 or more"), ({"hues": 4}, "found 4"),
    ({"lookalikes": 0, "hues": 3}, "hues: expected 4 or more")])
def test_impossible_worlds_are_refused(bad, message):
    with pytest.raises(StremnError) as error:
        ChameleonConfig(**bad)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_worlds_at_the_limit_are_not():
    short = {"frames": 5, "size": 8}
    for config in (ChameleonConfig(**short, objects=3, hues=12, lookalikes=0), ChameleonConfig(**short, hues=5),
                   ChameleonConfig(**short, stay=[1, 1])):
        assert len(chameleon_batch([0], config)) == 1
    assert ChameleonConfig(**to_json(ChameleonConfig())) is not None               # a saved config comes back
    with pytest.raises(StremnError, match="seeds: expected at least one"):
        chameleon_batch([])
