"""Contracts of weights files: what is saved comes back, what is wrong is refused in a line, nothing is half-written."""
import dataclasses
import json
import os
import pickle
import stat
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stremn.config import _restore, from_json, to_json
from stremn.core import StremnError, make_generator
from stremn.experiments.leaderboard import chosen
from stremn.memory.bank import BankConfig
from stremn.models import hub
from stremn.models.hub import DEFAULT_POLICIES, available, find_weights, load, push_to_hub, read_file, save_weights
from stremn.models.vos import VOSConfig, VOSModel

CONFIG = VOSConfig(widths=(4, 6), decoder_width=4, bank=replace(
    VOSConfig().bank, memory_channels=6, query_channels=6, key_channels=3, value_channels=4, update_channels=3))


@pytest.fixture
def saved(tmp_path):
    "A small network and its file."
    torch.manual_seed(0)
    model = VOSModel(CONFIG).eval()
    return model, save_weights(model, tmp_path / "mine.safetensors", {"J": .5, "clips": ["a", "b"]})


def message(f):
    "The one line a user reads."
    with pytest.raises(StremnError) as e:
        f()
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- configs -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Inner:
    scale: float = 1.
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    must: int
    pair: tuple[int, str] = (1, "a")
    many: tuple[Inner, ...] = ()
    inner: Inner = field(default_factory=Inner)
    maybe: int | None = None
    flag: bool = False


@pytest.mark.parametrize("value", [
    Outer(3), Outer(3, (4, "z"), (Inner(2., "x"), Inner()), Inner(5, "y"), 7, True), VOSConfig(), CONFIG, BankConfig(),
    BankConfig(slots=None, top_k=5, learn_beta=True), replace(VOSConfig(), key_gain=None, test_side=None, skips=False)])
def test_configs_round_trip_through_json(value):
    again = from_json(type(value), json.loads(json.dumps(to_json(value))))
    assert again == value and hash(again) == hash(value)


def test_every_field_survives_a_change():
    "Change each field of both configs in turn: a field that json or from_plain loses would come back as its default."
    other = {int: lambda v: v + 1, float: lambda v: v + .5, bool: lambda v: not v, type(None): lambda v: 3}
    words = {"policy": "oldest", "latest": "held", "similarity": "l2", "noise": "never"}
    for f in dataclasses.fields(BankConfig):
        old = getattr(BankConfig(), f.name)
        changed = replace(BankConfig(), **{f.name: words.get(f.name) or other[type(old)](old)})
        assert changed != BankConfig() and from_json(BankConfig, json.loads(json.dumps(to_json(changed)))) == changed


@pytest.mark.parametrize("data, says", [
    ({}, "found no must"), ([], "found list"), ({"must": 1, "other": 2}, "found unknown ['other']"),
    ({"must": "1"}, "config.must: expected int, found '1'"), ({"must": True}, "config.must: expected int"),
    ({"must": 1.5}, "config.must: expected int"), ({"must": None}, "config.must: expected int"),
    ({"must": 1, "pair": [1]}, "config.pair: expected 2 values, found 1"),
    ({"must": 1, "pair": "ab"}, "config.pair: expected a list"),
    ({"must": 1, "many": [{}, {"scale": "x"}]}, "config.many[1].scale: expected float"),
    ({"must": 1, "inner": 3}, "config.inner: expected the fields of Inner"),
    ({"must": 1, "flag": 1}, "config.flag: expected bool"), ({"must": 1, "maybe": "x"}, "config.maybe: expected int")])
def test_wrong_data_is_refused_by_its_place(data, says):
    assert says in message(lambda: from_json(Outer, data))


def test_whole_numbers_may_stand_for_floats():
    assert from_json(Inner, {"scale": 2}).scale == 2


# ---- files ---------------------------------------------------------------------------------------------------------

def test_a_network_comes_back(saved):
    model, path = saved
    again = load(path)
    assert again.config == CONFIG and again.card == {"J": .5, "clips": ["a", "b"]} and not again.training
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    frames, first = torch.rand(2, 7, 3, 13, 11, generator=make_generator(0)), torch.ones(2, 13, 11).long()
    with torch.no_grad():
        a, b = (m(frames, first, torch.ones(2, 2).bool()) for m in (model, again))
    assert torch.equal(a, b)


def test_saving_twice_and_over_an_old_file(saved):
    model, path = saved
    with torch.no_grad():
        model.bank.beta.fill_(2.)
    save_weights(model, path, {"J": .7})
    assert load(path).bank.beta == 2 and load(path).card == {"J": .7}
    assert [p.name for p in path.parent.iterdir()] == ["mine.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="rights as on Unix")
def test_others_may_read_what_the_umask_lets_them(saved):
    model, path = saved
    old = os.umask(0o022)
    try:
        assert stat.S_IMODE(save_weights(model, path, {}).stat().st_mode) == 0o644
    finally:
        os.umask(old)


@pytest.mark.parametrize("card", [{"x": object()}, {"f": lambda: 0}])
def test_a_bad_card_leaves_nothing_behind(saved, card):
    model, path = saved
    before = path.read_bytes()
    assert "expected plain data" in message(lambda: save_weights(model, path, card))
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()
    def full(*a):
        raise OSError("no space left on device")
    monkeypatch.setattr("stremn.core.os.replace", full)
    with pytest.raises(OSError):
        save_weights(model, path, {"J": 1.})
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_loading_leaves_the_global_random_state_alone(saved):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    load(saved[1])
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_in_other_precisions_load_as_float32(saved, tmp_path, dtype):
    tensors, about = read_file(saved[1], "weights")
    save_file({k: v.to(dtype) for k, v in tensors.items()}, tmp_path / "other.safetensors", metadata=about)
    again = load(tmp_path / "other.safetensors")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for a, b in zip(again.state_dict().values(), saved[0].state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


# ---- what is wrong -------------------------------------------------------------------------------------------------

def wrong_files(path, tensors, about):
    "name -> (tensors, header, what the message says)"
    some = dict(list(tensors.items())[:-1])
    return {
        "no header": (tensors, None, "found a safetensors file of something else"),
        "another task": (tensors, {**about, "task": "poetry"}, "found a safetensors file of something else"),
        "another size": (tensors, {**about, "config": json.dumps(to_json(VOSConfig()))}, "the weights of its config"),
        "a weight missing": (some, about, "Missing key"),
        "a weight too many": ({**tensors, "extra": torch.zeros(1)}, about, "Unexpected key"),
        "no config": (tensors, {k: v for k, v in about.items() if k != "config"}, "expected a config in JSON"),
        "broken config": (tensors, {**about, "config": "{"}, "expected a config in JSON"),
        "unknown field": (tensors, {**about, "config": '{"depth": 3}'}, "found unknown ['depth']"),
        "no card": (tensors, {k: v for k, v in about.items() if k != "card"}, "expected a card in JSON")}


@pytest.mark.parametrize("kind", wrong_files(None, {"a": None}, {}))
def test_a_wrong_file_is_named(saved, tmp_path, kind):
    tensors, header, says = wrong_files(tmp_path, *read_file(saved[1], "weights"))[kind]
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path, metadata=header)
    found = message(lambda: load(path))
    assert says in found and str(path) in found


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, pickle.dumps({"a": 1}), b"\x10" + b"\0" * 7 + b"{}"])
def test_anything_else_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    found = message(lambda: load(path))
    assert str(path) in found and "expected weights saved by stremn" in found


def test_a_truncated_file_is_refused_at_every_length(saved, tmp_path):
    whole, path = saved[1].read_bytes(), tmp_path / "cut.safetensors"
    for share in (0, .001, .01, .1, .5, .9, .999):
        path.write_bytes(whole[:int(share * len(whole))])
        assert str(path) in message(lambda: load(path))


def test_a_pickle_runs_no_code(tmp_path):
    path, mark = tmp_path / "bomb.safetensors", tmp_path / "mark"
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(mark),)
    path.write_bytes(pickle.dumps({"w": Bomb()}))
    message(lambda: load(path))
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists() # the bomb was armed


def test_unknown_names_and_devices(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "FOLDER", tmp_path / "none")
    assert available() == [] and "or one of none" in message(lambda: load("vos-huge"))
    monkeypatch.setattr(hub, "FOLDER", tmp_path)
    assert available() == ["mine"] and find_weights("mine") == saved[1] and load("mine").config == CONFIG
    expected = "expected a .safetensors file, hf:owner/name or one of mine, found 'vos-huge'"
    assert expected in message(lambda: load("vos-huge"))
    message(lambda: load(tmp_path))
    assert "device" in message(lambda: load("mine", device="abacus"))
    assert "ends in .safetensors" in message(lambda: save_weights(saved[0], tmp_path / "x.pt", {}))


def test_shipped_weights_load_and_say_where_they_come_from():
    for name in available():
        model = load(name)
        assert isinstance(model.card, dict) and model.card and all(p.isfinite().all() for p in model.parameters())
        with safe_open(hub.FOLDER / f"{name}.safetensors", "pt") as f:
            assert f.metadata()["task"] in hub.TASKS


@pytest.mark.parametrize("name", ["vos-tiny", "vos-small"])
def test_a_shipped_network_has_a_default_and_keeps_the_paper_s_rule(name, tmp_path):
    model = load(name)
    rule, every = DEFAULT_POLICIES[name]
    assert model.default_policy == replace(model.bank.policy, rule=rule, every=every)
    assert model.bank.policy.rule == "learned" and model.bank.policy.every == 1
    copy = load(save_weights(model, tmp_path / f"{name}.safetensors", model.card))
    assert copy.default_policy is None and copy.bank.policy == model.bank.policy


def test_the_defaults_are_those_that_the_criterion_chose():
    root = Path(__file__).resolve().parents[1] / "nbs" / "results" / "records"
    assert chosen(root) == DEFAULT_POLICIES


def test_a_field_of_several_types_takes_the_first_that_fits(tmp_path):
    for width in (24, (24, 16)):
        config = VOSConfig(widths=(8, 12), decoder_width=width, bank=BankConfig(
            memory_channels=12, query_channels=12, key_channels=8, value_channels=8, update_channels=8))
        path = save_weights(VOSModel(config), tmp_path / "net.safetensors", {})
        assert load(path).config == config
    assert _restore(int | tuple[int, ...] | None, None, "x") is None
    with pytest.raises(StremnError, match="x"):
        _restore(int | tuple[int, ...], "wide", "x")


# ---- the Hugging Face hub ------------------------------------------------------------------------------------------

@pytest.fixture
def repositories(tmp_path, monkeypatch):
    "A hub in a folder, in the place of `huggingface_hub`'s two functions."
    huggingface_hub = pytest.importorskip("huggingface_hub")
    root, asked = tmp_path / "hub", []

    def hf_hub_download(repo_id, filename):
        if not (root / repo_id / filename).is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo_id}\nin the cache")
        return str(root / repo_id / filename)

    class HfApi:
        def create_repo(self, repo_id, *, private, exist_ok):
            if repo_id.startswith("other/"):
                raise PermissionError("403 Forbidden:\nyou are not other")
            asked.append((repo_id, private, exist_ok))
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return f"https://huggingface.co/{repo_id}"

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
            (root / repo_id / path_in_repo).write_bytes(Path(path_or_fileobj).read_bytes())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return root, asked


def test_to_the_hub_and_back(saved, repositories):
    model, path = saved
    root, asked = repositories
    assert push_to_hub(load(path), "me/cats") == "https://huggingface.co/me/cats"
    assert push_to_hub(model, "me/cats", {"J": 1}, private=True) == "https://huggingface.co/me/cats"
    assert asked == [("me/cats", False, True), ("me/cats", True, True)]
    push_to_hub(load(path), "me/dogs")
    assert [p.name for p in (root / "me/dogs").iterdir()] == ["model.safetensors"]
    dogs, cats = load("hf:me/dogs"), load("hf:me/cats")
    assert dogs.card == load(path).card and cats.card == {"J": 1} and dogs.config == model.config
    assert all(torch.equal(a, dogs.state_dict()[k]) for k, a in model.state_dict().items())


def test_a_predictor_keeps_its_task(repositories):
    push_to_hub(load("prediction-tiny"), "me/next")
    assert type(load("hf:me/next")) is type(load("prediction-tiny"))


def test_what_the_hub_refuses_is_a_line(saved, repositories):
    assert "hf:me/none: expected a repository with model.safetensors" in message(lambda: load("hf:me/none"))
    assert "LocalEntryNotFoundError: no me/none in the cache" in message(lambda: load("hf:me/none"))
    assert "PermissionError: 403 Forbidden: you are not other" in message(lambda: push_to_hub(saved[0], "other/x"))


def test_offline_and_wrong_names_with_the_real_package(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "hf:me/none: expected a repository" in message(lambda: load("hf:me/none"))
    assert "hf:a/b/c: expected a repository" in message(lambda: load("hf:a/b/c"))
    assert "hf:: expected a repository" in message(lambda: load("hf:"))


def test_a_file_in_the_cache_needs_no_network(saved, monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache/models--me--cats"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("a" * 40)
    (place / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (place / "snapshots" / ("a" * 40) / "model.safetensors").write_bytes(saved[1].read_bytes())
    assert load("hf:me/cats").config == CONFIG


def test_without_huggingface_hub_the_way_out_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for f in (lambda: load("hf:me/cats"), lambda: push_to_hub(saved[0], "me/cats")):
        assert "expected the package huggingface_hub, found none: pip install 'stremn[hub]'" in message(f)
