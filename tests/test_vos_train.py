"""Real pictures as a curriculum: what is drawn, what is learned from what, and a run that is stopped and goes on."""
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.io import savemat

import stremn
from stremn import cli
from stremn.vos import train as vos_train
from stremn.core import StremnError, make_generator, seed_everything
from stremn.data.augment import PasteConfig, paste_object
from stremn.vos.train import (
    ChameleonPhase, ChameleonTask, ChameleonTraining, VideoPhase, VideoSampler, VideoTask, VideoTraining, dry_run,
    own_recipes, paper_recipes, scale_keys, shortened_recipe, small_recipes, tiny_recipes, train_recipes,
    training_videos, with_options,
)
from stremn.data.catalog import find_dataset
from stremn.data.clips import Clip, collate
from stremn.data.chameleon import ChameleonConfig, chameleon_batch
from stremn.data.vos import VideoFolder
from stremn.images import write_mask
from stremn.experiments.measure import VideoEval, evaluate_videos
from stremn.losses import segmentation_loss
from stremn.memory.bank import BankConfig, UpdatePolicy
from stremn.memory.read import query_and_keys
from stremn.memory.rules import RULES
from stremn.memory.update import append
from stremn.models.hub import load
from stremn.models.presets import small_vos
from stremn.models.vos import VOSConfig, VOSModel
from stremn.train.loop import FitConfig, Recipe, fit
from stremn.train.checkpoint import read_log
from helpers import TINY_VOS, box_polygon, make_coco, make_stills, make_youtube
from refusals import refused

NAMES = ("bear", "dog-agility", "swing")


def write_frame(path, frame):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame.mul(255).byte().permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "DAVIS 2016 in its official tree, shrunken, and a folder of stills."
    root = tmp_path_factory.mktemp("data")
    clips = chameleon_batch(range(5), ChameleonConfig(frames=8, objects=2))
    for name, clip in zip(NAMES, clips):
        for t in range(8):
            write_frame(root/"davis2016/JPEGImages/240p"/name/f"{t:05}.jpg", clip.frames[t])
            write_mask(root/"davis2016/Annotations/240p"/name/f"{t:05}.png", clip.masks[t].clamp(max=1))
    (root/"davis2016/ImageSets/2016").mkdir(parents=True)
    (root/"davis2016/ImageSets/2016/train.txt").write_text("\n".join(NAMES)+"\n")
    for i, clip in enumerate(clips):
        write_frame(root/f"Shapes/images/{i}.jpg", clip.frames[0])
        write_mask(root/f"Shapes/masks/{i}.png", clip.masks[0])
    return root


def training(**changes):
    stages = (VideoPhase(2, 2, 2, 32, .5, 1), VideoPhase(2, 1, 4, 32, 0., 1, (1,)))
    fields = dict(model=TINY_VOS, stages=stages, stills=("shapes",), imagenet=False, slots=(3,))
    return VideoTraining(**fields | changes)


def test_batches_repeat_and_hold_what_the_stage_asks_for(root):
    task = VideoTask(training(), root)
    for step, (V, T) in {0: (2, 2), 1: (2, 2), 2: (1, 4), 3: (1, 4)}.items():
        a, b = task.batch(step, 0, 7), VideoTask(training(), root).batch(step, 0, 7)
        assert all(torch.equal(x, y) for x, y in zip(a, b))
        assert a.frames.shape == (V, T, 3, 32, 32) and 0 <= a.frames.min() and a.frames.max() <= 1
        assert a.valid[:, 0].all() and all((labels[0] == 1).any() for labels in a.labels)
        assert not torch.equal(a.frames, task.batch(step, 1, 7).frames)
        assert not torch.equal(a.frames, task.batch(step, 0, 8).frames)


def test_held_sequences_are_never_opened(root):
    task = VideoTask(training(held=("dog-agility",), stages=(VideoPhase(300, 1, 2, 16, 0.),)), root)
    for step in range(60):
        task.batch(step, 0, 0)
    assert {task.videos.videos[v].name for v, _ in task.videos.kept} == {"bear", "swing"}
    kept = training_videos(root, "davis2016-240p", only=("dog-agility",))
    assert [v.name for v in kept] == ["dog-agility"]


def own_clips(root, lengths):
    "A folder of a person's own, 64x48: two objects in each video."
    for i, (name, frames) in enumerate(lengths.items()):
        clip = chameleon_batch([i], ChameleonConfig(frames=frames, objects=2))[0]
        for t in range(frames):
            write_frame(root/name/"frames"/f"{t:03}.png", clip.frames[t, :, :48])
            write_mask(root/name/"masks"/f"{t:03}.png", clip.masks[t, :48])
    return root


def test_a_folder_of_ones_own_never_trains_on_what_it_holds_out(tmp_path):
    root = own_clips(tmp_path, {"a": 6, "b": 8, "c": 7, "d": 6})
    for held in (["a"], ["b", "d"]):
        (recipe,) = own_recipes(held, "vos-tiny")
        task = VideoTask(shortened_recipe([with_options(recipe, 32, 1)], 60)[0].training, root)
        for step in range(60):
            task.batch(step, 0, 0)
        assert {task.videos.videos[v].name for v, _ in task.videos.kept} == set("abcd")-set(held)
    assert task.config.model == load("vos-tiny").config and task.config.held == ("b", "d")


def test_a_run_on_ones_own_goes_on_where_it_stopped(tmp_path):
    root = own_clips(tmp_path/"clips", {"a": 6, "b": 6})
    (recipe,) = shortened_recipe([with_options(own_recipes(["a"], None)[0], 32, 1, False, {"save_every": 1})], 3)
    recipe = replace(recipe, training=replace(recipe.training, model=TINY_VOS))
    fit(VideoTask(recipe.training, root), recipe.fit, tmp_path/"stopped", "cpu", stop_at=1, progress=False)
    paths = [train_recipes([recipe], root, tmp_path/name, "cpu", progress=False) for name in ("stopped", "whole")]
    stopped, whole = (load(path).state_dict() for path in paths)
    assert all(torch.equal(stopped[k], whole[k]) for k in whole)
    assert paths[0] == tmp_path/"stopped/model.safetensors" and len(read_log(tmp_path/"stopped")["loss"]) == 3


def test_weights_of_another_network_are_no_start(root):
    refused(["weights that segment", "prediction-tiny"], own_recipes, (), "prediction-tiny")
    refused(["start", "VOSModel"], VideoTask(training(), root, "vos-tiny").build)


def test_the_share_of_stills_is_the_share_of_batches(root):
    task = VideoTask(training(stages=(VideoPhase(2000, 1, 2, 16, .3),)), root)
    share = sum(task.draw(s, 0)["stills"] for s in range(2000))/2000
    assert abs(share-.3) < 5*(.3*.7/2000)**.5


def test_a_clip_of_a_video_is_one_of_its_stretches(root):
    video = training_videos(root, "davis2016-240p", only=("bear",))[0]
    plain = replace(training().change, flip=0., zoom=(1., 1.), stretch=1., brightness=0., contrast=0., saturation=0.,
                    grey=0., frame_turn=0., frame_shear=0., frame_brightness=0., frame_contrast=0., frame_saturation=0.)
    clip = VideoSampler([video], plain).sample(make_generator(3), 3, 64, 1, 2)
    whole = torch.stack([f for _, f, _ in video])
    index = [int((whole-f).abs().mean((1, 2, 3)).argmin()) for f in clip.frames]
    steps = {b-a for a, b in zip(index, index[1:])}
    assert steps <= {1, 2, 3} or steps <= {-1, -2, -3}
    assert (clip.frames-whole[index]).abs().max() < 2/255
    assert torch.equal(clip.masks, torch.stack([video.mask(i) for i in index]))


def test_backbone_weights_have_a_rate_of_their_own(root):
    task = VideoTask(training(model=small_vos(), backbone=.25), root)
    network = VOSModel(small_vos())
    for name, weight in network.query_encoder.named_parameters():
        weight.requires_grad_(".depthwise." not in name)
    rest, trunk = task.groups(network)
    assert trunk["scale"] == .25 and "scale" not in rest
    ids = [id(p) for p in rest["params"]+trunk["params"]]
    assert len(set(ids)) == len(ids) and set(ids) == {id(p) for p in network.parameters() if p.requires_grad}
    assert {id(network.query_encoder.stem.weight)} <= {id(p) for p in trunk["params"]}
    assert id(network.query_encoder.near.weight) in {id(p) for p in rest["params"]}


def test_two_recipes_train_stop_go_on_and_segment(root, tmp_path):
    recipes = (Recipe("stills", training(stages=(VideoPhase(3, 2, 2, 32),), videos=()),
                      FitConfig(lr=1e-3, save_every=1)),
               Recipe("videos", training(stages=(VideoPhase(3, 2, 3, 32, 0.),), stills=()),
                      FitConfig(lr=1e-4, save_every=1)))
    done = train_recipes(recipes, root, tmp_path/"a", "cpu", progress=False)
    assert len(read_log(tmp_path/"a/stills")["loss"]) == len(read_log(tmp_path/"a/videos")["loss"]) == 3
    card = stremn.load(done).card
    assert card["config"]["task"]["videos"] == ["davis2016-240p"]
    assert card["config"]["start"]["task"]["stills"] == ["shapes"]

    class Stop(Exception):
        pass

    def stopping(step, *rest, sample=VideoTask.batch):
        if step == 1:
            raise Stop
        return sample(*rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        real = VideoTask.batch
        patch.setattr(VideoTask, "batch", lambda self, step, rank, seed: stopping(step if self.stills is None else 0,
                                                                                 self, step, rank, seed, sample=real))
        train_recipes(recipes, root, tmp_path/"b", "cpu", progress=False)
    assert not (tmp_path/"b/videos/model.safetensors").exists()
    again = train_recipes(recipes, root, tmp_path/"b", "cpu", progress=False)
    same = [torch.equal(a, b) for a, b in zip(stremn.load(done).state_dict().values(),
                                              stremn.load(again).state_dict().values())]
    assert all(same)
    videos = training_videos(root, "davis2016-240p")
    record = evaluate_videos(VideoEval("small", str(again), "a made tree", slots=3), videos)
    assert set(record.clips["J"]) == set(NAMES) and all(0 <= v <= 1 for v in record.clips["J"].values())


def test_the_papers_numbers():
    stills, videos = paper_recipes()
    assert stills.fit.lr == 1e-4 and stills.fit.decay_from == 1. and videos.fit.lr == 1e-5 and videos.fit.floor == .01
    assert {s.size for p in (stills, videos) for s in p.training.stages} == {384}
    assert [s.frames for s in stills.training.stages] == [5] and {s.frames for s in videos.training.stages} == {10}
    assert [s.max_skip for s in videos.training.stages] == [0, 5, 10, 15, 20, 25]
    assert stills.training.stills == ("coco", "ecssd", "sbd", "msra10k", "hku-is")
    assert videos.training.videos == ("davis2017", "youtube2018") and stills.training.model.encoder == "resnet50"
    assert small_recipes()[0].training.model == small_vos()


def test_what_is_missing_is_named(root, tmp_path):
    with pytest.raises(StremnError, match="expected coco stills in it, found none; stremn data"):
        find_dataset(root, "coco", "stills")
    with pytest.raises(StremnError, match="expected one of davis2016-240p, davis2017, youtube2018, own, found 'kitti'"):
        training_videos(root, "kitti")
    with pytest.raises(StremnError, match="expected YouTube-VOS 2018 train in it, found none"):
        training_videos(root, "youtube2018")
    with pytest.raises(StremnError, match="nowhere: expected"):
        find_dataset(tmp_path/"nowhere", "shapes", "stills")
    empty = VideoFolder(root/"davis2016/JPEGImages/240p/bear")
    with pytest.raises(StremnError, match="expected an object to follow, found none"):
        VideoSampler([empty]).sample(make_generator(0), 2, 16)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    "What the paper trains on, in official trees, two of each."
    root = tmp_path_factory.mktemp("official")
    for layout, name in {"ecssd": "ECSSD", "msra10k": "MSRA10K", "hku-is": "HKU-IS"}.items():
        make_stills(root / name, layout)
    (root / "coco").mkdir()
    make_coco(root / "coco", [{"image_id": k, "iscrowd": 0, "area": 400., "segmentation": [box_polygon(4, 4, 20, 20)]}
                              for k in (7, 40)])
    for k in (1, 2):
        sbd = root / "benchmark_RELEASE/dataset"
        write_frame(sbd / f"img/{k}.jpg", torch.rand(3, 32, 40))
        (sbd / "inst").mkdir(exist_ok=True)
        labels = torch.zeros(32, 40, dtype=torch.uint8)
        labels[8:24, 8:30] = 1
        savemat(sbd / f"inst/{k}.mat", {"GTinst": {"Segmentation": labels.numpy()}})
    make_youtube(root / "YouTube-VOS/2018", "train", {"a": {1: 0, 7: 5}, "b": {1: 0}}, last=50)
    clips = chameleon_batch((1, 2), ChameleonConfig(frames=11, objects=2))
    for name, clip in zip(("bear", "dogs"), clips, strict=True):
        for t in range(11):
            write_frame(root / "DAVIS/JPEGImages/480p" / name / f"{t:05}.jpg", clip.frames[t])
            write_mask(root / "DAVIS/Annotations/480p" / name / f"{t:05}.png", clip.masks[t])
    (root / "DAVIS/ImageSets/2017").mkdir(parents=True)
    (root / "DAVIS/ImageSets/2017/train.txt").write_text("bear\ndogs\n")
    return root


def test_the_papers_protocol_from_the_command_line(official, tmp_path, monkeypatch, capsys):
    "Both stages on all seven data sets, a smaller network; stopped between them, it goes on; the weights segment."
    def parts():
        return tuple(replace(p, training=replace(p.training, model=TINY_VOS)) for p in paper_recipes())
    monkeypatch.setitem(vos_train.PROTOCOLS, "paper", parts)
    words = ["train", "vos", "--protocol", "paper", "--data", str(official), "--out", str(tmp_path / "run"), "--quiet",
             "--device", "cpu", "--random-start", "--steps", "3", "--size", "24", "--batch", "1", "--save-every", "1"]
    real = vos_train.VideoTask.batch

    def stops(self, step, rank, seed):
        if self.config.videos and step == 2:
            raise KeyboardInterrupt
        return real(self, step, rank, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vos_train.VideoTask, "batch", stops)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            cli.main(words)
    assert (tmp_path / "run/stills/model.safetensors").is_file()
    assert not (tmp_path / "run/videos/model.safetensors").exists()
    with suppress(SystemExit):
        cli.main(words)
    assert "went on after step" in capsys.readouterr().out
    weights = tmp_path / "run/videos/model.safetensors"
    video = training_videos(official, "davis2017", only=("dogs",))
    record = evaluate_videos(VideoEval("paper", str(weights), "a made tree", slots=3), video)
    assert set(record.clips["J"]) == {"dogs/1", "dogs/2"}
    alone = [*words, "--out", str(tmp_path / "alone"), "--parts", "videos", "--steps", "1"]       # one for each gap
    cli.main([*alone, "--start", str(tmp_path / "run/stills/model.safetensors")])   # the second stage by itself
    assert [p.name for p in (tmp_path / "alone").iterdir()] == ["videos"]
    for a, b in zip(*(stremn.load(w).parameters() for w in (weights, tmp_path / "alone/videos/model.safetensors"))):
        assert torch.equal(a, b)


# ---- pasted objects ------------------------------------------------------------------------------------------------

def plain_clips(T=3, S=40):
    "Black behind, and a white square on grey to come in front."
    behind = Clip(torch.zeros(T, 3, S, S), torch.zeros(T, S, S, dtype=torch.long))
    masks = torch.zeros(T, S, S, dtype=torch.long)
    masks[:, 12:28, 12:28] = 2
    frames = torch.full((T, 3, S, S), .5)
    return behind, Clip(frames.where(masks[:, None] == 0, torch.ones(())), masks)


@pytest.mark.parametrize("seed", range(8))
def test_pasted_pixels_and_labels_agree(seed):
    behind, over = plain_clips()
    behind.masks[:, :5] = 1
    new = paste_object(behind, over, make_generator(seed))
    shown = new.masks == 2                                     # one more than the largest label behind
    assert new.frames[shown[:, None].expand(-1, 3, -1, -1)].min() > .37
    assert new.frames[:, 0][new.masks != 2].max() < .38        # less than half of a pixel that kept its label is new
    assert torch.equal(new.masks[~shown], behind.masks[~shown])
    one = paste_object(behind, over, make_generator(seed))
    assert torch.equal(one.frames, new.frames) and torch.equal(one.masks, new.masks)
    sizes = shown.flatten(1).sum(1)
    assert (sizes == sizes[0]).all() and sizes[0] <= (1.25 * 16)**2


def test_objects_in_front_grow_shrink_and_vanish():
    behind, over = plain_clips(T=5)
    sizes = [(paste_object(behind, over, make_generator(seed), PasteConfig(grow=2.5)).masks > 0).flatten(1).sum(1)
             for seed in range(8)]
    assert all((s.diff() >= 0).all() or (s.diff() <= 0).all() for s in sizes)   # one way, all through the clip
    assert any(s[-1] > 1.5 * s[0] for s in sizes) and any(s[0] > 1.5 * s[-1] for s in sizes)
    ends = set()
    for seed in range(12):
        new = paste_object(behind, over, make_generator(seed), PasteConfig(vanish=1.))
        shown = (new.masks > 0).flatten(1).any(1)
        assert shown[0] and not shown[-1] and (shown.int().diff() <= 0).all()   # seen first, gone for good
        assert new.frames[~shown].max() == 0                                    # and not a pixel of it is left
        ends.add(int(shown.sum()))
    assert ends == {1, 2, 3, 4}
    for bad, found in (("size", (.5, .2)), ("grow", .5), ("vanish", 1.5)):
        refused(f"{bad}: expected", PasteConfig, **{bad: found})


def test_soft_keys_scale_the_logits_by_the_square():
    for shared in (True, False):
        bank = replace(small_vos().bank, shared_keys=shared)
        one, two = (VOSModel(small_vos(bank=bank)) for _ in range(2))
        two.load_state_dict(one.state_dict())
        scale_keys(two, .5)
        x = torch.randn(1, 128, 4, 4)
        torch.testing.assert_close(two.bank.query_key(x), .5 * one.bank.query_key(x))
        memories = [append(None, m.bank.template(x.flip(-1), x.flip(-1)), 0) for m in (one, two)]
        logits = []
        for m, memory in zip((one, two), memories):
            q, k = query_and_keys(m.bank.query_key(x), memory, "l2", None)
            logits.append(q @ k.mT)
        a, b = (x - x.mean(-1, keepdim=True) for x in logits)               # softmax does not see the mean
        torch.testing.assert_close(b, .25 * a, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("soften, keys, want", [(1., None, 1.), (.1, None, .1), (1., .2, .2), (.1, 1., 1.)])
def test_every_weight_learns_once_and_soft_keys_slowly(root, soften, keys, want):
    task = VideoTask(training(soften=soften, keys=keys), root)
    network = task.build()
    groups = task.groups(network)
    learned = [id(p) for group in groups for p in group["params"]]
    assert sorted(learned) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    rates = {id(p): group.get("scale", 1.) for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in network.bank.query_key.parameters()} == {want}
    assert {rates[id(p)] for p in network.decoder.parameters()} == {1.}


def test_a_stopped_run_is_not_softened_twice(root, tmp_path):
    task, how = VideoTask(training(soften=.1), root), FitConfig(save_every=1)
    straight = stremn.load(vos_train.fit(task, how, tmp_path / "a", "cpu", progress=False))
    vos_train.fit(task, how, tmp_path / "b", "cpu", 2, progress=False)
    stopped = stremn.load(vos_train.fit(task, how, tmp_path / "b", "cpu", progress=False))
    for a, b in zip(straight.parameters(), stopped.parameters()):
        assert torch.equal(a, b)


def test_frames_nobody_annotated_stay_so():
    behind, over = plain_clips()
    behind.masks[1], over.masks[2] = -1, -1
    new = paste_object(behind, over, make_generator(0))
    assert (new.masks[1:] == -1).all() and (new.masks[0] >= 0).all()


def test_without_pasting_nothing_changes_and_with_it_objects_come(root):
    videos = VideoSampler(training_videos(root, "davis2016-240p"))
    a = videos.sample(make_generator(3), 3, 32, 3, 1)
    b = videos.sample(make_generator(3), 3, 32, 3, 1, 0.)
    assert torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks)
    counts = [int(videos.sample(make_generator(s), 3, 32, 3, 1, 1.).masks[0].max()) for s in range(12)]
    alone = [int(videos.sample(make_generator(s), 3, 32, 3, 1).masks[0].max()) for s in range(12)]
    assert max(alone) == 1 and max(counts) == 3 and sum(counts) > 1.5 * sum(alone)
    assert all(int(videos.sample(make_generator(s), 3, 32, 1, 1, 1.).masks[0].max()) == 1 for s in range(4))


# ---- Chameleon clips -----------------------------------------------------------------------------------------------

CLIP = ChameleonConfig(frames=5, size=16, stay=(1, 1), fade=1, hide=1, vanish=.7)


def chameleons() -> ChameleonTask:
    "Six steps in two phases; every policy can be drawn, and two or three slots overflow in five frames."
    stages = (ChameleonPhase(2, 2, replace(CLIP, frames=3)), ChameleonPhase(4, 2, CLIP))
    return ChameleonTask(ChameleonTraining(model=TINY_VOS, stages=stages, slots=(2, 3)))


def test_what_is_drawn_depends_on_seed_and_step_alone():
    t, c = ChameleonTask(), ChameleonTraining()
    draws = [t.draw(s, 0) for s in range(t.steps)]
    assert draws == [ChameleonTask().draw(s, 0) for s in range(t.steps)] != [t.draw(s, 1) for s in range(t.steps)]
    for field, choices in dict(modes=c.modes, objects=c.objects, slots=c.slots, policy=c.policies).items():
        for value in set(choices):                                                     # 5 standard errors: 1 in 10^6
            p = choices.count(value) / len(choices)
            found, error = np.mean([d[field] == value for d in draws]), (p * (1 - p) / t.steps) ** .5
            assert abs(found - p) <= 5 * error, (field, value, found)


def test_batches_differ_between_steps_ranks_and_seeds_and_repeat():
    t = chameleons()
    keys = [(s, r, seed) for s in (0, 1, 3) for r in (0, 1) for seed in (0, 1)]
    batches = [t.batch(*k) for k in keys]
    for k, b in zip(keys, batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(b, chameleons().batch(*k), strict=True))
        assert b.frames.shape[:2] == (2, 3 if k[0] < 2 else 5) and b.valid.shape[1] == t.draw(k[0], k[2])["objects"]
    sums = [float(b.frames.double().sum()) for b in batches]
    assert len(set(sums)) == len(sums)


def test_the_tiny_protocol_teaches_the_choice():
    "Its last stage reads several replacements of every bounded memory, and meets every rule of Table 1."
    c = ChameleonTraining()
    bounded = [k for k in c.slots if k < 20]
    assert min(c.stages[-1].clip.frames - 1 - k for k in bounded) >= 3
    assert set(c.policies) == set(RULES) - {"lfu", "ucb", "diversity"}
    assert max(c.slots) >= c.stages[-1].clip.frames                                    # and one memory never fills


@pytest.mark.parametrize("slots", [3, 4])
def test_update_key_learns_only_from_choices_that_are_read(slots):
    "The reading note on short clips: no gradient until a clip has K + 2 frames (with K = 2 and one pinned, never)."
    for frames in (slots + 1, slots + 2):
        seed_everything(0)
        net = VOSModel(TINY_VOS)
        policy = net.bank.policy.but(rule="learned", slots=slots)
        b = collate(chameleon_batch([[0, 1], [0, 2]], replace(CLIP, frames=frames)), 1)
        segmentation_loss(net(b.frames, b.labels[:, 0], b.valid, make_generator(0), policy), b.labels[:, 1:]).backward()
        grad = net.bank.update_key.weight.grad
        assert (grad is not None and float(grad.norm()) > 0) == (frames == slots + 2)


def test_a_run_may_begin_with_the_weights_of_another_but_not_with_its_score_scale(tmp_path):
    small = VOSConfig(widths=(4, 8), decoder_width=8, bank=BankConfig(
        memory_channels=8, query_channels=8, key_channels=4, value_channels=4, update_channels=4, slots=2,
        shared_keys=True))
    tiny = ChameleonTraining(model=small, stages=(ChameleonPhase(1, 1, ChameleonConfig(frames=3, size=16)),))
    first = fit(ChameleonTask(tiny), FitConfig(), tmp_path / "first", "cpu", progress=False)
    scaled = replace(tiny, model=replace(small, bank=replace(small.bank, beta=10., learn_beta=True)))
    task = ChameleonTask(scaled, first)
    begun, before = task.build().state_dict(), load(first).state_dict()
    assert begun["bank.beta"] == 10. and before["bank.beta"] == 1.
    assert all(torch.equal(v, before[k]) for k, v in begun.items() if k != "bank.beta")
    second = fit(task, FitConfig(), tmp_path / "second", "cpu", progress=False)
    assert load(second).card["config"]["start"]["task"]["model"]["bank"]["beta"] == 1.


# ---- policies and recipes ------------------------------------------------------------------------------------------

def test_each_step_hands_its_policy_to_the_network_and_leaves_the_banks_own_alone(monkeypatch):
    task = chameleons()
    network, used = task.build(), []
    own, write = network.bank.policy, type(network.bank).choose

    def choose(bank, memory, template, t, group=None, generator=None, policy=None):
        used.append(policy)
        return write(bank, memory, template, t, group, generator, policy)

    monkeypatch.setattr(type(network.bank), "choose", choose)
    for step in range(task.steps):
        used.clear()
        drawn = task.draw(step, 0)
        task.loss(network, network, task.batch(step, 0, 0), step, 0, make_generator(step))
        assert used and set(used) == {own.but(rule=drawn["policy"], slots=drawn["slots"])}
    assert network.bank.policy is own == UpdatePolicy.from_config(TINY_VOS.bank)


def test_recipes_of_a_protocol_go_on_from_one_another():
    for recipes in (tiny_recipes(), small_recipes(), paper_recipes()):
        names = [r.name for r in recipes]
        assert [r.start for r in recipes] == [None, *names[:-1]] and len(set(names)) == len(names)
        assert all(r.steps == sum(s.steps for s in r.training.stages) for r in recipes)


def test_a_task_without_data_can_be_built_and_measured(tmp_path):
    task = VideoTask(training(), root=None)
    assert task.steps == 4 and task.stills is None and task.videos is None
    recipe = Recipe("mine", training(stages=(VideoPhase(300, 2, 3, 32), VideoPhase(100, 1, 4, 32))), FitConfig())
    last, first = dry_run(recipe, "cpu"), dry_run(recipe, "cpu", 0)
    assert last.name == "dry-mine" and last.config["steps"] == 400
    assert last.metrics["whole"] == 400 * last.metrics["seconds"]
    assert [s["steps"] for s in last.config["training"]["stages"]] == [100, 100]
    assert first.metrics["operations"] > last.metrics["operations"] > 0
    refused("dry run: expected the protocol small or paper, found tiny", dry_run, tiny_recipes()[0])
