"Shared by several test modules: pictures, folders and small configs."
import gzip
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stremn import cli
from stremn.core import make_generator
from stremn.data.augment import AugmentConfig
from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.data.video import VideoWriter
from stremn.images import to_pixels, write_mask
from stremn.memory.bank import BankConfig
from stremn.memory.rules import ZOO, all_rules
from stremn.models.prediction import PredictionConfig
from stremn.models.vos import VOSConfig, VOSModel

TINY_BANK = BankConfig(memory_channels=12, query_channels=12, key_channels=8, value_channels=8, update_channels=8,
                       slots=3, similarity="l2", shared_keys=True)
TINY_VOS = VOSConfig(widths=(8, 12), decoder_width=8, bank=TINY_BANK)
TINY_PREDICTION_BANK = BankConfig(memory_channels=6, query_channels=6, key_channels=4, value_channels=5,
                                  update_channels=3, slots=3, pinned=0, similarity="l2", shared_keys=True)
TINY_PREDICTION = PredictionConfig(widths=(4, 6), strides=(2, 2), groups=2, bank=TINY_PREDICTION_BANK)
UNEQUAL_BANK = BankConfig(memory_channels=6, query_channels=7, key_channels=4, value_channels=5, update_channels=3,
                          slots=4)                                    # no two numbers of channels are the same
NO_COLOUR_CHANGE = AugmentConfig(brightness=0, contrast=0, saturation=0, hue=0, grey=0,
                                 frame_brightness=0, frame_contrast=0, frame_saturation=0)


def network(seed=0, **changes):
    "A tiny untrained network in evaluation mode; `changes` are fields of its config or of its bank's."
    bank = {name: value for name, value in changes.items() if hasattr(TINY_BANK, name)}
    others = {name: value for name, value in changes.items() if name not in bank}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VOSModel(replace(TINY_VOS, **{"bank": replace(TINY_BANK, **bank)} | others)).eval()


def boxes_picture(seed=0, size=(24, 36)):
    "Smooth random colours (3,H,W), and labels (H,W) with two boxes."
    low = torch.rand(1, 3, 5, 6, generator=make_generator(seed))
    h, w = size
    labels = torch.zeros(size, dtype=torch.long)
    labels[h // 4:h // 2, w // 6:w // 2] = 1
    labels[h // 2:h * 3 // 4, w // 2:w * 5 // 6] = 2
    return F.interpolate(low, size, mode="bilinear")[0], labels


def frame_pixels(seed=0, size=(12, 16)):
    "Random pixels (H,W,3) uint8."
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_picture(path, seed=0, size=(12, 16)):
    "Random pixels in a file; missing folders are made."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame_pixels(seed, size)).save(path)


def label_map(t=0, size=(12, 16), ids=(1, 2)):
    "Labels (H,W) uint8: a box for each id, which moves with t."
    out = np.zeros(size, np.uint8)
    for k, i in enumerate(ids):
        out[1 + k * 4:4 + k * 4, 2 + t % 4:8 + t % 4] = i
    return out


def make_video_folder(frames, masks=None, n=3, ids=(1, 2), masked=None):
    "A folder of n frames and, perhaps, one of label maps, for the frames in `masked` only."
    frames.mkdir(parents=True)
    if masks:
        masks.mkdir(parents=True)
    for t in range(n):
        Image.fromarray(frame_pixels(t)).save(frames / f"{t:05d}.jpg")
        if masks and (masked is None or t in masked):
            write_mask(masks / f"{t:05d}.png", torch.from_numpy(label_map(t, ids=ids)).long())


def make_davis(root, names, res="480p", **kwargs):
    "The frames and masks of a DAVIS tree, without its lists."
    for name in names:
        make_video_folder(root / "JPEGImages" / res / name, root / "Annotations" / res / name, **kwargs)


def object_strips(t, entries, size=(12, 16)):
    "Labels (H,W): a strip of two rows for each object of `entries`, from the frame it enters on."
    out = torch.zeros(size, dtype=torch.long)
    for k, (i, e) in enumerate(sorted(entries.items())):
        if t >= e:
            out[2 * k:2 * k + 2, t % 5:t % 5 + 6] = i
    return out


def make_youtube(root, split, videos, last=20, kinds=None, all_frames=None):
    "A YouTube-VOS tree of `videos`, name to {object id: frame it enters}; masks show new objects only but in training."
    meta = {}
    for name, entries in videos.items():
        for t in range(last + 1):
            if all_frames:
                write_picture(root / all_frames / "JPEGImages" / name / f"{t:05d}.jpg", t)
            if t % 5:
                continue
            write_picture(root / split / "JPEGImages" / name / f"{t:05d}.jpg", t)
            labels = object_strips(t, entries if split == "train" else {i: e for i, e in entries.items() if e == t})
            if split == "train" or labels.any():
                write_mask(root / split / "Annotations" / name / f"{t:05d}.png", labels)
        objects = {str(i): {"frames": [f"{t:05d}" for t in range(e, last + 1, 5)]} for i, e in entries.items()}
        for i, entry in objects.items():
            entry |= {"category": kinds[int(i)]} if kinds else {}
        meta[name] = {"objects": objects}
    (root / split / "meta.json").write_text(json.dumps({"videos": meta}))


def shade(t):
    "Brightness of synthetic frame `t`, from 0 on: the frame's number can be read off its pixels."
    return 2 * t + 20


def write_avi(path, n, size=(120, 160), codec="ffv1"):
    "An avi of `n` even grey frames, without loss."
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as box:
        stream = box.add_stream(codec, rate=25, width=size[1], height=size[0], pix_fmt="bgr0")
        for t in range(n):
            pixels = np.full((*size, 3), shade(t), np.uint8)
            box.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")))
        box.mux(stream.encode())
    return path


def write_mp4(path, n):
    "An mp4 of `n` even grey frames, 64 x 48."
    with VideoWriter(path, 25, (48, 64), quality=1) as out:
        for t in range(n):
            out.write(torch.full((3, 48, 64), shade(t) / 255))
    return path


def make_kth(root, lengths, listed=None):
    "KTH's tree: {(person, action): frames}, and the ranges of its sequence file."
    lines = []
    for (person, action), n in lengths.items():
        name = f"person{person:02}_{action}_d1"
        write_avi(root / action / f"{name}_uncomp.avi", n)
        lines.append(f"{name}\t\tframes\t{(listed or {}).get((person, action), f'1-{n}')}")
    (root / "00sequences.txt").write_text("\n".join(["A list", "", *lines, "person13_handclapping_d3 *missing*"]))
    return root


def write_digits(path, n=5, pack=True):
    "`n` random pictures in MNIST's format, packed with gzip or not."
    digits = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    raw = np.array([0x803, n, 28, 28], ">i4").tobytes() + digits.tobytes()
    path.write_bytes(gzip.compress(raw) if pack else raw)
    return digits


def label_video(seed, T=7, H=48, W=60, objects=3):
    "Random label maps (T,H,W) in which every object is present in every frame; needs scipy."
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((objects + 1, T, H, W)), (0, 1, 3, 3))
    return field.argmax(0)


def vos_benchmark(pred, truth, drop_ends=True):
    "Per-object J and F of vos-benchmark's own evaluator."
    Evaluator = pytest.importorskip("vos_benchmark.evaluator").Evaluator
    evaluator = Evaluator()
    pairs = list(zip(np.asarray(pred), np.asarray(truth)))
    for p, t in pairs[1:-1] if drop_ends else pairs:
        evaluator.feed_frame(p, t)
    return tuple({int(k): float(v) / 100 for k, v in x.items()} for x in evaluator.conclude())


# ---------------------------------------------------------------- stills
STILL_SIZE = (24, 36)


def save_pixels(path, pixels):
    "Pixels (H,W) or (H,W,3) in a file; missing folders are made."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def saliency_mask(levels=(0, 255)):
    "One object in a mask of two levels or more."
    out = np.full(STILL_SIZE, levels[0], np.uint8)
    out[6:18, 8:28] = levels[-1]
    if len(levels) > 2:
        out[6, 8:28] = levels[1]
    return out


def people_mask():
    "Two objects, numbered."
    out = np.zeros(STILL_SIZE, np.uint8)
    out[4:20, 4:12], out[4:20, 20:28] = 1, 2
    return out


STILL_LAYOUTS = {"ecssd": ("images/{}.jpg", "ground_truth_mask/{}.png", saliency_mask),
                 "hku-is": ("imgs/{}.png", "gt/{}.png", saliency_mask),
                 "msra10k": ("MSRA10K_Imgs_GT/Imgs/{}.jpg", "MSRA10K_Imgs_GT/Imgs/{}.png", saliency_mask),
                 "pennfudan": ("PNGImages/{}.png", "PedMasks/{}_mask.png", people_mask),
                 "folders": ("images/{}.jpg", "masks/{}.png", people_mask)}


def make_stills(root, layout, names=("2", "10")):
    "Random pictures and their masks in an official tree."
    image, mask, draw = STILL_LAYOUTS[layout]
    for k, name in enumerate(names):
        write_picture(root / image.format(name), k, STILL_SIZE)
        save_pixels(root / mask.format(name), draw())


def box_polygon(x, y, w, h):
    "A box as COCO writes polygons."
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def make_coco(root, annotations, pictures=(7, 40), split="train2017"):
    "COCO's tree with two pictures listed, and those of `pictures` stored."
    for k in pictures:
        write_picture(root / split / f"{k:012d}.jpg", k, STILL_SIZE)
    (root / "annotations").mkdir(exist_ok=True)
    images = [{"id": k, "file_name": f"{k:012d}.jpg"} for k in (7, 40)]
    listed = json.dumps({"images": images, "annotations": annotations})
    (root / "annotations" / f"instances_{split}.json").write_text(listed)


# ---------------------------------------------------------------- the command line
def files_below(root):
    "Every file and folder below `root`, hidden ones too, with the bytes of the files."
    return {p.relative_to(root).as_posix(): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def stremn_main(capsys, *words):
    "Exit status, lines of stdout, lines of stderr."
    capsys.readouterr()
    try:
        cli.main([str(w) for w in words])
        status = 0
    except SystemExit as e:
        status = e.code
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()


def make_davis_2016(work):
    "A DAVIS 2016 tree of two synthetic sequences with one object each."
    root, lines = work / "DAVIS", []
    for n, name in enumerate(("one", "two")):
        clip = chameleon(n, ChameleonConfig(frames=5, size=48, modes=2))
        for t in range(5):
            frame, mask = (root / kind / "480p" / name / f"{t:05d}" for kind in ("JPEGImages", "Annotations"))
            frame.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(to_pixels(clip.frames[t])).save(frame.with_suffix(".jpg"))
            write_mask(mask.with_suffix(".png"), clip.masks[t])
            lines.append(f"/JPEGImages/480p/{name}/{t:05d}.jpg /Annotations/480p/{name}/{t:05d}.png\n")
    (root / "ImageSets" / "480p").mkdir(parents=True)
    (root / "ImageSets" / "480p" / "val.txt").write_text("".join(lines))
    return root


@contextmanager
def own_rules(folder: Path):
    "A file my_rules.py in a folder, with the rule `mine`, a record and what is no rule; afterwards nobody knows it."
    (folder / "my_rules.py").write_text(
        "from stremn.memory.rules import Rule, newest, lfu\ndef mine(r): return newest(r)\n"
        "record = Rule(lfu, needs_usage=True)\nnumber = 3\ndef two(a, b): return a\n"
        "def number_of_a_slot(r): return r.frames.argmin(1)\n")
    (folder / "my_bad_rules.py").write_text("def mine(r: return 1\n")
    (folder / "my_late_rules.py").write_text("1/0\n")
    all_rules()                                            # all that the package knows is known
    before = dict(ZOO)
    try:
        yield folder
    finally:
        ZOO.clear()
        ZOO.update(before)
        sys.modules.pop("my_rules", None)
