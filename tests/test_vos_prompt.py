"First masks from boxes and clicks, and masks for later frames on the command line."
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from stremn import cli
from stremn.core import StremnError
from stremn.images import read_mask
from stremn.metrics.vos import jaccard
from stremn.vos import prompt
from stremn.vos.prompt import first_mask, mask_from_box, mask_from_points

H, W = 120, 160


def picture(*shapes):
    "Rectangles (rows, columns, colour) on a noisy ground, and a label map with ids in their order."
    pixels = np.random.default_rng(0).integers(60, 120, (H, W, 3), dtype=np.uint8)
    labels = np.zeros((H, W), np.int64)
    for i, (rows, columns, colour) in enumerate(shapes):
        pixels[rows, columns], labels[rows, columns] = colour, i + 1
    return pixels, torch.from_numpy(labels)


RED = (slice(40, 80), slice(50, 90), (200, 40, 40))
BLUE = (slice(20, 60), slice(110, 140), (40, 40, 220))


def J(found, true):
    return float(jaccard(found[None], true[None]))


@pytest.mark.parametrize("form", ["array", "tensor", "picture"])
def test_a_box_gives_what_is_in_it(form):
    pixels, labels = picture(RED, BLUE)
    frame = {"array": pixels, "tensor": torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
             "picture": Image.fromarray(pixels)}[form]
    found = mask_from_box(frame, (45, 35, 50, 50))
    assert J(found, labels == 1) > .97 and not found[:, 100:].any()


def test_clicks_give_the_pieces_they_hit():
    pixels, labels = picture(RED, BLUE)
    assert J(mask_from_points(pixels, [(70, 60)]), labels == 1) > .95
    both = mask_from_points(pixels, [(70, 60), (125, 40)])
    assert J(both, labels > 0) > .95


def test_two_calls_give_one_answer():
    pixels, _ = picture(RED)
    assert torch.equal(mask_from_box(pixels, (45, 35, 50, 50)), mask_from_box(pixels, (45, 35, 50, 50)))


def test_a_box_around_nothing_becomes_an_ellipse():
    "A flat picture has nothing to cut: the largest ellipse covers pi/4 of the box."
    found = mask_from_box(np.full((H, W, 3), 90, np.uint8), (20, 30, 60, 40))
    assert float(found.float().sum()) == pytest.approx(np.pi / 4 * 60 * 40, rel=.02) and not found[:30].any()


def test_the_whole_frame_may_be_a_box():
    pixels, _ = picture(RED)
    assert mask_from_box(pixels, (0, 0, W, H)).any()


def test_boxes_and_points_become_ids_and_the_network_keeps_them():
    pixels, labels = picture(RED, BLUE)
    for look in (True, False):
        found = first_mask("vos-tiny", pixels, [(45, 35, 50, 50)], [(125, 40)], look)
        assert found.unique().tolist() == [0, 1, 2] and found.dtype == torch.long
        assert J(found == 1, labels == 1) > .8 and J(found == 2, labels == 2) > .8


@pytest.mark.parametrize("box", [(-1, 0, 9, 9), (0, 0, W + 1, 9), (0, H - 5, 9, 9), (5, 5, 0, 9), (5, 5, 9, 1)])
def test_a_box_outside_the_frame_is_refused(box):
    with pytest.raises(StremnError, match="box: expected X Y WIDTH HEIGHT inside the frame of 160x120, found"):
        mask_from_box(picture(RED)[0], box)


@pytest.mark.parametrize("point", [(-1, 0), (W, 0), (0, H)])
def test_a_click_outside_the_frame_is_refused(point):
    with pytest.raises(StremnError, match="point: expected X from 0 to 159 and Y from 0 to 119, found"):
        mask_from_points(picture(RED)[0], [point])


def test_nothing_asked_and_nothing_found_are_refused(monkeypatch):
    with pytest.raises(StremnError, match="expected a box or a point, found neither"):
        first_mask("vos-tiny", picture(RED)[0])
    monkeypatch.setattr(prompt, "cut", lambda pixels, guess, rounds=5: np.zeros(guess.shape, bool))
    with pytest.raises(StremnError, match="object 1: expected something in its box or under its points, found nothing"):
        first_mask("vos-tiny", picture(RED)[0], points=[(70, 60)])


def test_without_opencv_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(StremnError, match=r"found none: pip install 'stremn\[prompt\]'"):
        mask_from_box(picture(RED)[0], (45, 35, 50, 50))


# ---- on the command line -------------------------------------------------------------------------------------------

@pytest.fixture
def work(tmp_path, monkeypatch):
    "A red square that moves to the right, ten frames, and a blue one from frame 4 on."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    for t in range(10):
        red = (RED[0], slice(50 + 2 * t, 90 + 2 * t), RED[2])
        pixels, labels = picture(red, *[BLUE] * (t >= 4))
        Image.fromarray(pixels).save(f"clip/{t:03d}.png")
        Image.fromarray((labels == 1).numpy().astype(np.uint8) * 255).save(f"red{t}.png")
        Image.fromarray((labels == 2).numpy().astype(np.uint8) * 2).save(f"blue{t}.png")
    return tmp_path


def stremn(capsys, *words):
    status = 0
    try: cli.main([str(w) for w in words])
    except SystemExit as stop: status = stop.code
    said = capsys.readouterr()
    return status, said.out.splitlines(), [line for line in said.err.splitlines() if line.startswith("stremn")]


def segment(capsys, *words):
    return stremn(capsys, "segment", "clip", "--weights", "vos-tiny", "--device", "cpu", "--quiet", *words)


def test_a_mask_is_made_looked_at_and_used(work, capsys):
    line = ["mask", "clip", "--box", 45, 35, 50, 50, "--out", "m.png", "--look", "look.png", "--weights", "vos-tiny"]
    status, out, err = stremn(capsys, *line)
    assert (status, err) == (0, []) and out[0].startswith("objects 1 (") and out[0].endswith("in m.png")
    assert J(read_mask("m.png") == 1, read_mask("red0.png") == 1) > .8 and Image.open("look.png").size == (W, H)
    status, _, err = stremn(capsys, *line)
    assert status == 2 and "m.png: expected a new file, found one (--overwrite" in err[0]
    assert segment(capsys, "--mask", "m.png", "--out", "o")[0] == 0
    assert segment(capsys, "--box", 45, 35, 50, 50, "--out", "p")[0] == 0
    assert all((work / f"o/{t:03d}.png").read_bytes() == (work / f"p/{t:03d}.png").read_bytes() for t in range(10))


def test_a_mask_of_a_later_frame_and_of_a_picture(work, capsys):
    line = ["mask", "--box", 65, 35, 50, 50, "--weights", "vos-tiny", "--out"]
    assert stremn(capsys, *line, "a.png", "clip", "--start", 9)[0] == 0
    assert stremn(capsys, *line, "b.png", "clip/009.png")[0] == 0
    assert torch.equal(read_mask("a.png"), read_mask("b.png"))


def test_objects_start_at_any_frame(work, capsys):
    status, out, _ = segment(capsys, "--mask", "red0.png", "--mask", "4:blue4.png", "--out", "o")
    assert status == 0 and out[0] == "10 masks in o, objects 1, 2"
    assert read_mask("o/003.png").unique().tolist() == [0, 1]
    assert J(read_mask("o/004.png") == 2, read_mask("blue4.png") == 2) == 1 and (read_mask("o/009.png") == 2).any()


def test_a_later_start_keeps_the_names_and_counts_as_the_video_does(work, capsys):
    status, out, _ = segment(capsys, "--mask", "red4.png", "--start", 4, "--out", "o", "--policy", "oldest")
    assert status == 0 and out[0] == "6 masks in o, objects 1" and not (work / "o/003.png").exists()
    assert "frames 4, 8, 9, 7; frame 9 replaced frame 6" in out[1]
    status, again, _ = segment(capsys, "--mask", "4:red4.png", "--out", "p", "--policy", "oldest")
    assert status == 0 and again[1] == out[1]
    assert read_mask("p/003.png").unique().tolist() == [0]
    assert all((work / f"o/{t:03d}.png").read_bytes() == (work / f"p/{t:03d}.png").read_bytes() for t in range(4, 10))


@pytest.mark.parametrize("words, line", [
    ([], "--mask: expected a mask to start from, found none; --box X Y W H or --point X Y makes one"),
    (["--box", 1, 2, 3], "--box: expected X Y WIDTH HEIGHT for each object, 4 numbers each, found 3"),
    (["--point", 1], "--point: expected X Y for each click, 2 numbers each, found 1"),
    (["--box", 45, 35, 500, 50], "box: expected X Y WIDTH HEIGHT inside the frame of 160x120, found 45 35 500 50"),
    (["--mask", "red0.png", "--point", 70, 60], "--mask: expected a mask of the first frame, or boxes and points"),
    (["--mask", "red0.png", "--mask", "0:blue4.png"], "--mask: expected one for frame 0, found red0.png and blue4.png"),
    (["--mask", "2:red2.png", "--start", 4], "--mask 2:red2.png: expected a frame from --start 4 on, found 2"),
    (["--mask", "99:red2.png"], "frame 99: expected one below 10 in clip, found none"),
    (["--mask", "red0.png", "--start", 10], "start: expected a frame from 0 to 9, found 10"),
    (["--mask", "red0.png", "--start", -1], "start: expected a frame from 0 to 9, found -1"),
    (["--mask", "3:nowhere.png"], "nowhere.png: expected a mask, found no such file")])
def test_what_cannot_be_meant_is_one_line(work, capsys, words, line):
    status, out, err = segment(capsys, *words, "--out", "o")
    assert (status, out, len(err)) == (2, [], 1) and line in err[0], err
    assert not (work / "o").exists()


def test_a_file_whose_name_looks_like_a_frame_number(work, capsys):
    (work / "3:red.png").write_bytes((work / "red0.png").read_bytes())
    assert segment(capsys, "--mask", "3:red.png", "--out", "o")[0] == 0
    assert read_mask("o/000.png").any()
