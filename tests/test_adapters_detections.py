"""Masks for other tools: COCO's run lengths to the letter, boxes, and detections of supervision."""
import json
import sys

import numpy as np
import pytest
import torch

from helpers import stremn_main
from refusals import refused
from stremn.adapters import areas_and_boxes, coco_instances, from_rle, to_detections, to_rle
from stremn.adapters.detections import from_text, run_lengths, to_text
from stremn.core import make_generator
from stremn.images import write_mask


def label_map(seed, size, ids=(1, 2, 7), smooth=9):
    "Blobs of labels, some of them unlabelled (-1)."
    coarse = torch.randint(len(ids) + 2, (max(1, size[0] // smooth), max(1, size[1] // smooth)),
                           generator=make_generator(seed))
    table = torch.tensor([0, -1, *ids])
    return torch.nn.functional.interpolate(table[coarse][None, None].float(), size)[0, 0].long()


CASES = [label_map(0, (48, 64)), label_map(1, (3, 5), smooth=1), label_map(2, (120, 7)), label_map(3, (480, 854)),
         label_map(4, (33, 31), smooth=1), torch.ones(4, 6, dtype=torch.long), torch.full((1, 1), 254)]


def test_what_pycocotools_writes():
    "Its strings, for a box in the middle, a first pixel, a whole picture, and runs that grow and shrink."
    box = torch.zeros(48, 64, dtype=torch.long)
    box[10:30, 20:40] = 3
    slope = torch.ones(300, 12).triu(-150)*5
    assert to_rle(box) == {3: {"size": [48, 64], "counts": "Zn0d0l00000000000000000000000000000000000000fS1"}}
    assert to_rle(torch.tensor([[9, 0], [0, 9]])) == {9: {"size": [2, 2], "counts": "0120"}}
    assert to_rle(torch.ones(480, 854)) == {1: {"size": [480, 854], "counts": "0PZ`<"}}
    assert to_rle(slope) == {5: {"size": [300, 12], "counts": "0g4e41O1O1O1O1O1O1O1O1O1O1O"}}
    assert to_rle(torch.zeros(4, 4)) == {}


@pytest.mark.parametrize("labels", CASES, ids=lambda x: "x".join(map(str, x.shape)))
def test_it_is_pycocotools_to_the_letter(labels):
    coco = pytest.importorskip("pycocotools.mask")
    assert to_rle(labels).keys() == areas_and_boxes(labels).keys() == set(labels[labels > 0].tolist())
    for i, rle in to_rle(labels).items():
        theirs = coco.encode(np.asfortranarray((labels == i).numpy().astype(np.uint8)))
        assert theirs["size"] == rle["size"] and theirs["counts"].decode() == rle["counts"]
        assert areas_and_boxes(labels)[i] == {"area": coco.area(theirs), "bbox": coco.toBbox(theirs).tolist()}
        assert torch.equal(from_rle({i: theirs}), labels.where(labels == i, 0))


@pytest.mark.parametrize("labels", CASES, ids=lambda x: "x".join(map(str, x.shape)))
def test_there_and_back_through_json(labels):
    assert torch.equal(from_rle(json.loads(json.dumps(to_rle(labels)))), labels.clamp(min=0))
    assert to_rle(labels.numpy()) == to_rle(labels)


@pytest.mark.parametrize("numbers", [[5], [0, 4], [1, 2, 3, 2**30, 7, 1, 2**31, 15, 16, 17, 31, 32, 33]])
def test_every_length_has_a_text(numbers):
    assert from_text(to_text(np.array(numbers))) == numbers


def test_runs_areas_and_boxes_by_hand():
    labels = torch.tensor([[0, 4, 4], [-1, 4, 2]])
    assert run_lengths((labels == 4).numpy()).tolist() == [2, 3, 1]
    assert areas_and_boxes(labels) == {2: {"area": 1, "bbox": [2, 1, 1, 1]}, 4: {"area": 3, "bbox": [1, 0, 2, 2]}}


@pytest.mark.parametrize("masks, message", [
    ({}, "masks: expected one size, found none"),
    ({1: {"size": [2, 2], "counts": "22"}, 2: {"size": [3, 2], "counts": "6"}}, "one size, found [(2, 2), (3, 2)]"),
    ({1: {"size": [2, 3], "counts": "22"}}, "object 1: expected counts of 2x3 pixels, found 4 in '22'"),
    ({1: {"size": [2, 2], "counts": ""}}, "object 1: expected counts of 2x2 pixels, found 0"),
    ({1: {"size": [1, 1], "counts": "5O"}}, "object 1: expected counts of 1x1 pixels")])
def test_counts_that_do_not_fit_are_refused(masks, message):
    refused(message, from_rle, masks)


def test_detections_of_supervision():
    supervision = pytest.importorskip("supervision")
    labels = torch.zeros(6, 8, dtype=torch.long)
    labels[1:3, 2:5], labels[4:, 6:] = 7, 2
    found = to_detections(labels)
    assert isinstance(found, supervision.Detections) and found.tracker_id.tolist() == [2, 7]
    assert found.xyxy.tolist() == [[6, 4, 7, 5], [2, 1, 4, 2]] and found.mask.sum((1, 2)).tolist() == [4, 6]
    assert len(to_detections(torch.zeros(4, 4))) == 0


def test_without_supervision_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    refused("to_detections: expected the package supervision, found none: pip install 'supervision'",
            to_detections, torch.ones(2, 2))


def test_a_folder_of_masks_as_coco_instances(tmp_path):
    refused("found none", coco_instances, tmp_path)
    for t, labels in enumerate((CASES[0], torch.zeros(48, 64, dtype=torch.long), CASES[0].flip(1))):
        write_mask(tmp_path / f"{t}.png", labels.clamp(min=0))
    found = json.loads(json.dumps(coco_instances(tmp_path)))
    assert [(i["id"], i["file_name"], i["height"], i["width"]) for i in found["images"]] == [
        (t + 1, f"{t}.png", 48, 64) for t in range(3)]
    assert [c["id"] for c in found["categories"]] == [1, 2, 7]
    assert [a["id"] for a in found["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert {a["image_id"] for a in found["annotations"]} == {1, 3}             # the second frame is empty
    first = {a["track_id"]: a["segmentation"] for a in found["annotations"] if a["image_id"] == 1}
    assert torch.equal(from_rle(first), CASES[0].clamp(min=0))
    for a in found["annotations"]:
        labels = CASES[0] if a["image_id"] == 1 else CASES[0].flip(1)
        assert a["area"] == int((labels == a["category_id"]).sum()) and a["iscrowd"] == 0
        y, x = torch.nonzero(labels == a["category_id"], as_tuple=True)
        assert a["bbox"] == [int(x.min()), int(y.min()), int(x.max() - x.min()) + 1, int(y.max() - y.min()) + 1]


def test_segment_writes_them_when_asked_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "frames").mkdir()
    for t in range(2): write_mask(f"frames/{t}.png", CASES[0].clamp(min=0))
    write_mask("mask.png", (CASES[0] == 7).long())
    words = ["segment", "frames", "--mask", "mask.png", "--out", "o", "--weights", "vos-tiny", "--quiet", "--rle"]
    assert stremn_main(capsys, *words)[::2] == (0, [])
    assert json.loads((tmp_path / "o" / "masks.json").read_text()) == coco_instances(tmp_path / "o")
