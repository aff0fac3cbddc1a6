"""The inventory of data sets: every one of the paper is recognised, counted, and given a use."""
import shlex

import numpy as np
from PIL import Image

from helpers import make_davis, make_kth, make_video_folder, make_youtube, write_digits, write_picture
from refusals import refused
from stremn.cli import data_command
from stremn.data.catalog import OFFICIAL, PREDICTION_SETS, DataUse, describe_data, describe_prediction, find_dataset
from stremn.data.prediction import KTH_ABSENT, KTH_ACTIONS, find_tree, find_trees, kth_videos, training_entries


def command(row):
    "What `stremn data` says can be run on a row."
    return data_command(row.use) if row.use else ""


def test_describe_data_counts_against_the_official_numbers(tmp_path):
    make_davis(tmp_path / "a" / "DAVIS", ["bear", "cows"])
    make_davis(tmp_path / "a" / "DAVIS", ["bear"], res="Full-Resolution")
    (tmp_path / "a" / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "a" / "DAVIS" / "ImageSets" / "2017" / "train.txt").write_text("bear\ncows\nboat\n")
    for split in ("train", "valid"):
        tree = tmp_path / "yt" / split
        make_video_folder(tree / "JPEGImages" / "x", tree / "Annotations" / "x", n=1)
        (tree / "meta.json").write_text("{}")
    make_video_folder(tmp_path / "mine" / "JPEGImages" / "x", tmp_path / "mine" / "Annotations" / "x", n=1)
    rows = describe_data(tmp_path)
    found = {(r.dataset, r.split, r.resolution): (r.where, r.found, r.expected, r.complete) for r in rows if r.found}
    assert found == {("DAVIS 2017", "train", "480p"): ("a/DAVIS", 2, 60, False),
                     ("DAVIS 2017", "train", "Full-Resolution"): ("a/DAVIS", 1, 60, False),
                     ("YouTube-VOS 2018", "train", ""): ("yt/train", 1, 3471, False),
                     ("YouTube-VOS 2018", "valid", ""): ("yt/valid", 1, 474, False),
                     ("mine", "all", ""): ("mine", 1, None, True)}
    absent = {(r.dataset, r.split): r.expected for r in rows if not r.found}
    assert absent == {key: n for key, n in OFFICIAL.items() if key not in {k[:2] for k in found}}
    assert all(r.source.startswith("https://") for r in rows if r.expected)
    refused("no such folder", describe_data, tmp_path / "nowhere")


def test_the_command_fits_what_is_there(tmp_path):
    root = tmp_path / "my data"
    make_davis(root / "DAVIS", ["bear", "cows"])
    make_davis(root / "DAVIS", ["bear"], res="240p")
    (root / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    (root / "DAVIS" / "ImageSets" / "2017" / "val.txt").write_text("bear\ncows\n")
    (root / "DAVIS" / "ImageSets" / "2017" / "test-dev.txt").write_text("bear\nboat\n")
    (root / "DAVIS" / "ImageSets" / "2016").mkdir()
    (root / "DAVIS" / "ImageSets" / "2016" / "train.txt").write_text("bear\n")
    start = f"stremn evaluate '{root / 'DAVIS'}' --pred masks --segment --weights vos-small"
    train = f"stremn train vos --protocol small --data '{root}' --out run"
    said = {(r.dataset, r.split, r.resolution): command(r) for r in describe_data(root) if r.found}
    assert said == {("DAVIS 2017", "val", "480p"): start,
                    ("DAVIS 2017", "val", "240p"): start + " --resolution 240p --allow-missing",
                    ("DAVIS 2017", "test-dev", "480p"): start + " --split test-dev --allow-missing",
                    ("DAVIS 2017", "test-dev", "240p"): start + " --split test-dev --resolution 240p --allow-missing",
                    ("DAVIS 2016", "train", "480p"): "", ("DAVIS 2016", "train", "240p"): train}


def make_stills(images, masks, n, suffix=".png"):
    for i in range(n):
        write_picture(images / f"{i}.jpg", i)
        masks.mkdir(parents=True, exist_ok=True)
        (masks / f"{i}{suffix}").write_bytes(b"")


def test_every_data_set_of_the_paper_is_recognised(tmp_path):
    make_youtube(tmp_path / "YouTube" / "2018", "valid", {"a": {1: 0}}, last=5, all_frames="valid_all_frames")
    make_youtube(tmp_path / "YouTube" / "2019", "train", {"a": {1: 0}, "b": {1: 0}}, last=5)
    make_stills(tmp_path / "coco" / "train2017", tmp_path / "none", 3)
    (tmp_path / "coco" / "annotations").mkdir()
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").write_text("{}")
    make_stills(tmp_path / "s" / "ECSSD" / "images", tmp_path / "s" / "ECSSD" / "ground_truth_mask", 2)
    make_stills(
        tmp_path / "benchmark_RELEASE" / "dataset" / "img",
        tmp_path / "benchmark_RELEASE" / "dataset" / "inst",
        4,
        ".mat",
    )
    make_stills(tmp_path / "MSRA10K_Imgs_GT" / "Imgs", tmp_path / "MSRA10K_Imgs_GT" / "Imgs", 5)
    make_stills(tmp_path / "HKU-IS" / "imgs", tmp_path / "HKU-IS" / "gt", 6)
    make_stills(tmp_path / "mine" / "images", tmp_path / "mine" / "masks", 7)
    (tmp_path / "mine" / "masks" / "0.png").unlink()
    rows = {(r.dataset, r.split): r for r in describe_data(tmp_path)}
    assert {k: r.found for k, r in rows.items() if r.found} == {
        ("YouTube-VOS 2018", "valid"): 1,
        ("YouTube-VOS 2018", "valid_all_frames"): 1,
        ("YouTube-VOS 2019", "train"): 2,
        ("COCO", "stills"): 3,
        ("ECSSD", "stills"): 2,
        ("SBD", "stills"): 4,
        ("MSRA10K", "stills"): 5,
        ("HKU-IS", "stills"): 6,
        ("mine", "stills"): 6,
    }
    assert (
        {k for k in rows if k[0] != "mine"} == set(OFFICIAL)
        and rows["mine", "stills"].complete
        and not rows["COCO", "stills"].complete
    )
    assert (
        command(rows["YouTube-VOS 2018", "valid"])
        == f"stremn evaluate {tmp_path / 'YouTube' / '2018'} --pred masks --segment --weights vos-small --year 2018 "
        "--split valid --zip masks.zip"
    )
    assert command(rows["YouTube-VOS 2018", "valid_all_frames"]).endswith("--split valid --all-frames --zip masks.zip")
    assert "--protocol small" in command(rows["ECSSD", "stills"])
    assert (
        command(rows["HKU-IS", "stills"]) == f"stremn train vos --protocol paper --data {tmp_path} --out run"
        and not rows["mine", "stills"].use
    )
    assert not rows["DAVIS 2017", "val"].use and rows["DAVIS 2017", "val"].source.startswith("https://")


def test_the_year_follows_from_the_path_or_from_507_videos(tmp_path):
    for i in range(507):
        (tmp_path / "yt" / "valid" / "JPEGImages" / str(i)).mkdir(parents=True)
        (tmp_path / "yt" / "valid" / "Annotations" / str(i)).mkdir(parents=True)
    (tmp_path / "yt" / "valid" / "meta.json").write_text("{}")
    write_picture(tmp_path / "yt" / "valid" / "JPEGImages" / "0" / "0.jpg")
    make_youtube(tmp_path / "yt", "train", {"a": {1: 0}}, last=5, all_frames="all_frames/train_all_frames")
    found = {(r.dataset, r.split): r.complete for r in describe_data(tmp_path) if r.found}
    assert found == {
        ("YouTube-VOS 2019", "valid"): True,
        ("YouTube-VOS 2019", "train"): False,
        ("YouTube-VOS 2019", "train_all_frames"): True,
    }


def test_a_use_is_data_and_a_command_can_be_pasted_into_a_shell(tmp_path):
    make_davis(tmp_path / "DAVIS", ["bear"], res="half size")
    (tmp_path / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "DAVIS" / "ImageSets" / "2017" / "val.txt").write_text("bear\n")
    row = describe_data(tmp_path)[0]
    assert row.use == DataUse("evaluate", tmp_path / "DAVIS", {"resolution": "half size"})
    assert shlex.split(command(row))[-2:] == ["--resolution", "half size"]


def test_a_data_set_is_found_however_deep_it_lies(tmp_path):
    make_davis(tmp_path / "a" / "b" / "DAVIS", ["bear"])
    (tmp_path / "a" / "b" / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "a" / "b" / "DAVIS" / "ImageSets" / "2017" / "val.txt").write_text("bear\n")
    rows = describe_data(tmp_path)
    assert find_dataset(tmp_path, "davis 2017", "val") == tmp_path / "a" / "b" / "DAVIS"
    assert find_dataset(tmp_path, "DAVIS 2017", "val", "480p", rows) == tmp_path / "a" / "b" / "DAVIS"
    refused("expected DAVIS 2017 val 240p in it, found none", find_dataset, tmp_path, "DAVIS 2017", "val", "240p", rows)
    refused("expected COCO stills in it, found none", find_dataset, tmp_path, "COCO", "stills", rows=rows)


# ---------------------------------------------------------------- prediction
def test_training_is_offered_where_it_would_not_refuse(tmp_path):
    root = tmp_path / "all of it"
    names = [(a, f"person{p:02}_{a}_d{d}") for p in range(1, 26) for a in KTH_ACTIONS for d in range(1, 5)]
    for action, name in names:
        if name != KTH_ABSENT:
            (root / "kth" / action / f"{name}_uncomp").mkdir(parents=True)
            (root / "kth" / action / f"{name}_uncomp" / "image_0001.jpg").touch()

    def commands(dataset="KTH"):
        return {r.split: shlex.split(command(r)) for r in describe_prediction(root) if r.dataset == dataset}
    train = ["stremn", "train", "prediction", "--protocol", "kth", "--data", str(root / "kth"), "--out", "run"]
    assert commands() == {"train": train, "test": []} and len(kth_videos(train[6])) == 599
    video = root / "kth" / "boxing" / "person25_boxing_d4_uncomp"                  # of the test: training refuses, too
    video.rename(tmp_path / "away")
    assert commands() == {"train": [], "test": []}
    refused("expected KTH's 599 videos, found 598", kth_videos, root)
    video.with_suffix(".avi").touch()                                              # a video, and no list of frames
    assert commands() == {"train": [], "test": []}
    refused("expected KTH's 00sequences.txt", kth_videos, root)
    (root / "kth" / "sequences").mkdir()
    (root / "kth" / "sequences" / "00sequences.txt").write_text("person25_boxing_d4 frames 1-2")
    assert commands() == {"train": train, "test": []}


def test_training_on_moving_mnist_needs_its_digits_only(tmp_path, monkeypatch):
    np.save(tmp_path / "mnist_test_seq.npy", np.zeros((20, 4, 64, 64), np.uint8))
    monkeypatch.setitem(PREDICTION_SETS, ("Moving MNIST", "test"), (4, "mmnist"))
    monkeypatch.setitem(PREDICTION_SETS, ("Moving MNIST", "train"), (5, "mmnist"))
    assert not any(r.use for r in describe_prediction(tmp_path))                  # nothing to learn from
    for part in ("b", "a"):
        (tmp_path / part).mkdir()
        write_digits(tmp_path / part / "train-images-idx3-ubyte")
    row = next(r for r in describe_prediction(tmp_path) if r.dataset == "Moving MNIST" and r.split == "train")
    assert (row.where, row.found) == (".", 5)                                      # the readers look below it, too
    assert command(row) == f"stremn train prediction --protocol mmnist --data {shlex.quote(str(tmp_path))} --out run"
    assert len(training_entries(shlex.split(command(row))[6], "mmnist", limit=1)[0]) == 1
    monkeypatch.setitem(PREDICTION_SETS, ("Moving MNIST", "train"), (6, "mmnist"))
    assert not any(r.use for r in describe_prediction(tmp_path))                  # five of six


def test_the_nearest_of_equal_trees_is_named(tmp_path):
    for where in ("a/deep", "b", "c"):
        make_kth(tmp_path / where, {(1, "boxing"): 5})
    row = next(r for r in describe_prediction(tmp_path) if r.found)
    assert row.where == "b" and find_tree(tmp_path, "KTH") == tmp_path / "b"
    make_kth(tmp_path / "c", {(1, "boxing"): 5, (2, "boxing"): 5})
    row = next(r for r in describe_prediction(tmp_path) if r.found)
    assert (row.where, row.found) == ("c", 2)                                      # the fullest


def test_what_is_there_to_predict_is_counted(tmp_path):
    make_kth(tmp_path / "a" / "kth", {(1, "boxing"): 5, (16, "walking"): 5, (25, "boxing"): 5})
    (tmp_path / "b.v1").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b.v1" / "S11_Walking.58860488_000001.jpg")
    write_digits(tmp_path / "train-images-idx3-ubyte.gz")
    rows = {(r.dataset, r.split): r for r in describe_prediction(tmp_path)}
    assert rows["KTH", "train"].found == 2                       # what lies next to a file of digits is found too
    assert (rows["Moving MNIST", "train"].found, rows["Moving MNIST", "train"].where) == (5, ".")
    assert not any(r.use for r in rows.values())                 # nothing is complete: training would refuse
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    rows = {(r.dataset, r.split): r for r in describe_prediction(tmp_path)}
    assert {k: (r.found, r.expected) for k, r in rows.items()} == {
        ("KTH", "train"): (2, 383), ("KTH", "test"): (1, 216), ("Human3.6M", "test"): (1, 16),
        ("Human3.6M", "train"): (0, 40), ("Moving MNIST", "train"): (0, 60_000), ("Moving MNIST", "test"): (0, 10_000)}
    assert rows["KTH", "train"].where == "a/kth" and not rows["KTH", "train"].complete
    assert rows["Human3.6M", "train"].use is None and rows["Human3.6M", "train"].source
    assert dict(find_trees(tmp_path))["Human3.6M"] == tmp_path / "b.v1"
    refused("no such folder", describe_prediction, tmp_path / "nowhere")


# ---------------------------------------------------------------- real data
def test_the_development_folder_is_described(data_root):
    found = {(r.dataset, r.split): r.found for r in describe_data(data_root) if r.found}
    assert (
        found["DAVIS 2016", "train"] == 30 and found["ECSSD", "stills"] == 1000 and found["pennfudan", "stills"] == 170
    )
