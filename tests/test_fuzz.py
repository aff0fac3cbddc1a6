"""Generated bad inputs: each works, or is refused in one line; nothing else comes out of the package.

`STREMN_FUZZ=100000 pytest tests/test_fuzz.py` draws that many inputs; the default is what a test run can afford.
"""
import copy
import io
import json
import os
import re
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from fractions import Fraction
from pathlib import Path
from struct import pack, unpack
from zlib import crc32

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import network
from stremn import cli
from stremn.config import from_json, to_json
from stremn.core import StremnError
from stremn.data.catalog import describe_data
from stremn.data.damaged import open_damaged
from stremn.data.stills import StillFolder, _coco_outlines
from stremn.data.video import open_source
from stremn.data.vos import DAVIS
from stremn.data.youtube import YouTubeVOS, read_meta
from stremn.images import as_frame, as_labels, image_size, read_frame, read_mask
from stremn.models.hub import load, save_weights
from stremn.models.prediction import PredictionConfig
from stremn.models.vos import VOSConfig
from stremn.results import Record
from stremn.train.checkpoint import RunFiles, load_checkpoint, read_log, save_checkpoint
from stremn.train.loop import FitConfig
from stremn.vos.evaluate import evaluate_folders
from stremn.vos.stream import VideoSegmenter

TOTAL = int(os.environ.get("STREMN_FUZZ", "2400"))
SHARES = {"pictures": .25, "videos": .1, "weights": .1, "memories": .1, "checkpoints": .1, "json": .15, "trees": .1,
          "arrays": .05, "command lines": .05}


def inputs(kind):
    "Settings of one test: its share of all inputs, the same ones in each run."
    count = max(1, round(TOTAL * SHARES[kind]))
    return settings(max_examples=count, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


def works_or_says(call, *args):
    "Call; a StremnError of one line is an answer, and any other error is a failure."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: return call(*args)
        except StremnError as error: assert 0 < len(str(error)) < 2000, error


edits = st.lists(st.tuples(st.sampled_from(["flip", "set", "cut", "drop", "twice", "zero", "end"]), st.floats(0, 1),
                           st.booleans(), st.binary(min_size=1, max_size=12)), max_size=5)


def edited(data, changes):
    "A damaged copy; half of the places are near the beginning, where headers are."
    data = bytearray(data)
    for kind, place, early, new in changes:
        at = int(place**(4 if early else 1) * max(len(data) - 1, 0))
        n = len(new)
        if kind == "flip" and data: data[at] ^= new[0] or 1
        if kind == "set": data[at:at + n] = new
        if kind == "cut": del data[at:]
        if kind == "drop": del data[at:at + n]
        if kind == "twice": data[at:at] = data[at:at + 8 * n]
        if kind == "zero": data[at:at + n] = bytes(n)
        if kind == "end": data += new * 3
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def pictures():
    "Small pictures of many kinds: name -> bytes."
    random = np.random.default_rng(0)
    shape = np.zeros((24, 32), np.uint8)
    shape[6:18, 8:20] = 1
    colours = random.integers(0, 256, (24, 32, 3), np.uint8)
    palette = Image.fromarray(shape, "P")
    palette.putpalette([0, 0, 0, 128, 0, 0] + [7] * 30)
    alpha = Image.fromarray(np.dstack([colours, shape * 255]))
    notes = Image.Exif()
    notes[0x0112] = 6
    found = {}
    for ending, image, more in [
            ("p.png", palette, {}), ("l.png", Image.fromarray(shape * 255), {}), ("a.png", alpha, {}),
            ("16.png", Image.fromarray(shape.astype(np.uint16) * 3000), {}), ("c.png", Image.fromarray(colours), {}),
            ("turned.jpg", Image.fromarray(colours), {"exif": notes}), ("m.jpg", Image.fromarray(shape * 255), {}),
            ("g.gif", palette, {}), ("b.bmp", palette, {}), ("t.tif", Image.fromarray(colours), {}),
            ("w.webp", alpha, {}), ("x.pgm", Image.fromarray(shape * 255), {})]:
        out = io.BytesIO()
        image.save(out, {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(ending[-3:], ending.split(".")[1]), **more)
        found[ending] = out.getvalue()
    return found


PICTURES = pictures()


def mended(data):
    "A PNG whose checksums are right again, so that a reader looks at what they protect."
    data, at = bytearray(data), 8
    while at + 12 <= len(data):
        size, = unpack(">I", data[at:at + 4])
        if at + 12 + size > len(data): break
        data[at + 8 + size:at + 12 + size] = pack(">I", crc32(data[at + 4:at + 8 + size]))
        at += 12 + size
    return bytes(data)


@inputs("pictures")
@given(name=st.sampled_from(sorted(PICTURES)), changes=edits, mend=st.booleans(),
       foreign=st.none() | st.binary(max_size=80))
def test_pictures(folder, name, changes, mend, foreign):
    path = folder / name
    data = edited(PICTURES[name], changes) if foreign is None else foreign
    path.write_bytes(mended(data) if mend and name.endswith("png") else data)
    size = works_or_says(image_size, path)
    for read in (read_frame, read_mask):
        found = works_or_says(read, path)
        assert found is None or size is None or tuple(found.shape[-2:]) == size


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    "Small videos of several kinds: name -> bytes."
    random = np.random.default_rng(0)
    where = tmp_path_factory.mktemp("videos")
    for name, codec, kind in [("a.mp4", "libx264", "yuv420p"), ("b.mkv", "libx264", "yuv420p"),
                              ("c.avi", "mjpeg", "yuvj420p"), ("d.gif", "gif", "rgb8"),
                              ("e.webm", "libvpx", "yuv420p")]:
        with av.open(str(where / name), "w") as box:
            stream = box.add_stream(codec, rate=Fraction(25))
            stream.width, stream.height, stream.pix_fmt = 32, 16, kind
            for _ in range(6):
                box.mux(stream.encode(av.VideoFrame.from_ndarray(random.integers(0, 256, (16, 32, 3), np.uint8))))
            box.mux(stream.encode(None))
    return {p.name: p.read_bytes() for p in sorted(where.iterdir())}


@inputs("videos")
@given(kind=st.integers(0, 4), changes=edits, foreign=st.none() | st.binary(max_size=80))
def test_videos(folder, videos, kind, changes, foreign):
    name = sorted(videos)[kind]
    path = folder / name
    path.write_bytes(edited(videos[name], changes) if foreign is None else foreign)
    def names(open_it):
        video = open_it(path)
        return [n for _, (n, *_) in zip(range(50), video)]
    strict, around = works_or_says(names, open_source), works_or_says(names, open_damaged)
    if strict is not None and not changes: assert strict == around


texts = st.text(max_size=8) | st.sampled_from(["", "NaN", "../x", "vos", "learned", "1"])
leaves = st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | texts
anything = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3), max_leaves=6)
swaps = st.lists(st.tuples(st.integers(0, 200), st.sampled_from(["put", "drop", "add"]), anything), min_size=1,
                 max_size=3)


def places_in(value):
    "Every (holder, key) of nested JSON."
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places_in(value[key])]]


def swapped(value, changes):
    "JSON with some of its values replaced, dropped or added."
    value = copy.deepcopy(value)
    for which, how, new in changes:
        places = places_in(value)
        if not places: return new
        (holder, key), new = places[which % len(places)], copy.deepcopy(new)
        if how == "put": holder[key] = new
        elif how == "drop": del holder[key]
        elif isinstance(holder, dict): holder[str(new)[:6]] = new
        else: holder.append(new)
    return value


class Files:
    "A small network: its weights and a memory that it made as bytes, and itself."
    def __init__(self, weights, memory, model): self.weights, self.memory, self.model = weights, memory, model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    where = tmp_path_factory.mktemp("files")
    model = network()
    weights = save_weights(model, where / "w.safetensors", {"steps": 3})
    segmenter = VideoSegmenter(model)
    mask = torch.zeros(24, 32, dtype=torch.int64)
    mask[5:15, 5:20] = 1
    for t in range(3): segmenter.step(torch.rand(3, 24, 32), mask if t == 0 else None)
    return Files(weights.read_bytes(), segmenter.save(where / "m.memory").read_bytes(), model)


headers = st.none() | swaps | st.integers(0, 2**64 - 1)


def damaged(data, changes, header):
    "A safetensors file with another header: some of its JSON swapped, or a wrong length in front."
    if isinstance(header, int): data = pack("<Q", header) + data[8:]
    if isinstance(header, list):
        size, = unpack("<Q", data[:8])
        text = json.dumps(swapped(json.loads(data[8:8 + size]), header)).encode()
        data = pack("<Q", len(text)) + text + data[8 + size:]
    return edited(data, changes)


@inputs("weights")
@given(changes=edits, header=headers)
def test_weights(folder, files, changes, header):
    path = folder / "w.safetensors"
    path.write_bytes(damaged(files.weights, changes, header))
    works_or_says(load, path)


@inputs("memories")
@given(changes=edits, header=headers)
def test_memories(folder, files, changes, header):
    path = folder / "m.memory"
    path.write_bytes(damaged(files.memory, changes, header))
    segmenter = works_or_says(VideoSegmenter.load, path, files.model)
    if segmenter is not None: works_or_says(segmenter.step, torch.rand(3, 24, 32))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A checkpoint as bytes, the network and optimiser that it fills, and the config of its run."
    layer = torch.nn.Linear(2, 3)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    config = {"fit": to_json(FitConfig(), "fit")}
    path = tmp_path_factory.mktemp("run") / "last.safetensors"
    save_checkpoint(path, layer, optimiser, 1, config)
    return path.read_bytes(), layer, optimiser, config


@inputs("checkpoints")
@given(changes=edits, header=headers, log=edits)
def test_checkpoints(folder, run, changes, header, log):
    files = RunFiles(folder / "run")
    files.checkpoint.parent.mkdir(exist_ok=True)
    files.checkpoint.write_bytes(damaged(run[0], changes, header))
    assert works_or_says(load_checkpoint, files.checkpoint, *run[1:]) in (None, 1)
    files.log.write_bytes(edited(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n', log))
    works_or_says(read_log, files.folder)


RECORD = to_json(Record("row", {"J": .5}, {"protocol": "tiny", "fit": {"steps": 3}}, seed=0, seconds=1.,
                        clips={"J": {"a": .5, "b": .5}}), "record")
COCO = {"images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"iscrowd": 0, "image_id": 1, "area": 9., "segmentation": [[0, 0, 3, 0, 3, 3]]}]}
META = {"videos": {"v": {"objects": {"1": {"category": "cat", "frames": ["00000", "00005"]}}}}}
READERS = {"record": (RECORD, Record.load), "meta": (META, read_meta), "coco": (COCO, _coco_outlines)}


@inputs("json")
@given(which=st.sampled_from(["record", "meta", "coco"]), deep=st.integers(0, 20), changes=swaps | st.just([]),
       bytewise=edits, mark=st.booleans())
def test_json(folder, which, deep, changes, bytewise, mark):
    for kind in (VOSConfig, PredictionConfig, FitConfig):
        works_or_says(from_json, kind, swapped(to_json(kind(), "config"), changes))
    path = folder / f"{which}.json"
    whole, read = READERS[which]
    text = json.dumps(swapped(whole, changes)).encode()
    if not deep: text = b"[" * 100_000                                         # deeper than Python's stack
    path.write_bytes(b"\xef\xbb\xbf" * mark + edited(text, bytewise))
    found = works_or_says(read, path)
    if deep and not (changes or bytewise): assert found is not None                     # a byte-order mark is no fault


NAMES = ["00000.jpg", "00001.jpg", "00001.JPG", "00002.png", "2.png", "-1.png", "1.5.png", "①.jpg", "._00000.jpg",
         "b.heic", "00003.jpg.part", "mask.png", "notes.txt", "meta.json", "val.txt", "a b.png", "x.gif",
         "dir.png", "Thumbs.db"]
FOLDERS = ["", "JPEGImages/480p/dog", "Annotations/480p/dog", "Annotations/480p/cat", "ImageSets/2016",
           "ImageSets/2017", "train/JPEGImages/v", "train/Annotations/v", "valid/JPEGImages/v", "DUTS", "img", "②",
           "ECSSD/images"]
CONTENTS = [b"", b"text\n", b"\xef\xbb\xbfdog\n", b"dog\ncat\n", b"{}", json.dumps(META).encode(), PICTURES["p.png"],
            PICTURES["turned.jpg"], PICTURES["g.gif"], PICTURES["t.tif"][:50], "folder", "link"]


@inputs("trees")
@given(tree=st.dictionaries(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)), st.sampled_from(CONTENTS),
                            max_size=12))
def test_trees(folder, tree):
    root = folder / "tree"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for (place, name), content in tree.items():
        path = root / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "folder": path.mkdir()
        elif content == "link": path.symlink_to("/nowhere/at/all")
        else: path.write_bytes(content)
    before = sorted(root.rglob("*"))
    for place in {place for place, _ in tree} | {""}:
        for open_it in (open_source, open_damaged): works_or_says(lambda o=open_it, p=root / place: list(o(p)))
    for read in (lambda: [list(v) for v in DAVIS(root, 2017)], lambda: [list(v) for v in DAVIS(root, 2016)],
                 lambda: [list(v) for v in YouTubeVOS(root, "train")], lambda: list(YouTubeVOS(root, "valid")),
                 lambda: describe_data(root), lambda: len(StillFolder(root)),
                 lambda: evaluate_folders(root / "Annotations/480p", root / "Annotations/480p", progress=False)):
        works_or_says(read)
    assert sorted(root.rglob("*")) == before                                   # reading writes nothing


shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
kinds = st.sampled_from(["uint8", "int64", "float32", "float64", "bool", "complex64", "int8", "float16"])
values = st.sampled_from([0, 1, -1, 2, 255, 256, .5, float("nan"), float("inf"), 1e30])


@inputs("arrays")
@given(shape=shapes | st.sampled_from([(3, 24, 32), (24, 32), (24, 32, 3), (24, 32, 4), (1, 24, 32)]), kind=kinds,
       value=values, tensor=st.booleans(), other=st.none() | anything)
def test_arrays(files, shape, kind, value, tensor, other):
    with np.errstate(all="ignore"): array = np.full(shape, value).astype(kind)
    thing = torch.from_numpy(array) if tensor else array
    if other is not None: thing = other
    works_or_says(as_frame, thing)
    labels = works_or_says(as_labels, thing, (24, 32))
    assert labels is None or labels.shape == (24, 32)
    segmenter = VideoSegmenter(files.model)
    works_or_says(segmenter.step, torch.rand(3, 24, 32), thing)
    works_or_says(segmenter.step, thing)


WORDS = ["segment", "mask", "check-mask", "evaluate", "predict", "data", "models", "table", "train", "vos", "--help"]
SLOW = {"train", "vos", "table"}                                               # may work for hours when they are right
VALUES = ["", "0", "-1", "1", "3", "1e9", "nan", "x", "a/b", "../x", "frames", "m.png", "clip.mp4", "①", "9" * 30,
          "1,2", "%s", "--", "5:m.png", "oldest", "vos-tiny", "os:system", "w.safetensors", "bad\udcff.png", "a\nb",
          "out", "{}"]


@pytest.fixture(scope="module")
def options():
    "All options that the commands' own help names, but those that would do hours of work."
    found = set()
    for word in WORDS[:8]:
        text = io.StringIO()
        with redirect_stdout(text), pytest.raises(SystemExit): cli.main([word, "--help"])
        found |= set(re.findall(r"--[a-z][a-z-]+", text.getvalue()))
    return sorted(found - {"--run", "--camera"})


@inputs("command lines")
@given(data=st.data())
def test_command_lines(folder, options, data):
    where = folder / "work"
    where.mkdir(exist_ok=True)
    (where / "m.png").write_bytes(PICTURES["p.png"])
    (where / "w.safetensors").write_bytes(b"\xff" * 40)
    first = data.draw(st.sampled_from(WORDS))
    rest = data.draw(st.lists(st.sampled_from(options) | st.sampled_from(VALUES), max_size=7))
    words = [first, *rest] + ["--nosuch"] * (first in SLOW)
    here, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    os.chdir(where)
    try:
        with redirect_stdout(out), redirect_stderr(err): cli.main(words)
        status = 0
    except SystemExit as end: status = end.code
    finally: os.chdir(here)
    lines = err.getvalue().splitlines()
    assert status in (0, 2), (words, status, lines)
    if status == 2: assert len(lines) == 1 and lines[0].startswith("stremn: error: "), (words, lines)
