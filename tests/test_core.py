"""Contracts of stremn.core: seeds, devices, one-line errors, and records that survive the disk or are refused."""
import dataclasses,enum,json,os,subprocess,sys
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck,given,settings,strategies as st
from stremn import results
from stremn.results import Record
from stremn.core import StremnError,check,device_name,make_generator,pick_device,seed_everything
from stremn.config import to_json


@dataclass(frozen=True)
class Inner:
    "A config inside a config."
    size:tuple = (3,4)
    root:Path = Path("a")/"b"


class Mode(enum.Enum):
    "An enum in a config."
    FAST = "fast"


def record(**changes):
    "A record with nothing machine-dependent in it."
    base = dict(name="learned", metrics={"J":74.8,"F":81.75}, config={"protocol":"tiny", "net":Inner()}, seed=3,
                seconds=1.5, clips={"J":{"a":1.,"b":2}}, device="cpu", versions={"torch":"0"}, commit="unknown")
    return Record(**{**base, **changes})


def one_line(exc):
    "The message of a StremnError is a single line."
    assert "\n" not in str(exc.value)
    return str(exc.value)


def test_error_is_a_value_error():
    assert issubclass(StremnError, ValueError)
    check(True, "unused")
    with pytest.raises(StremnError, match="^box: expected 1, found 2$"): check(False, "box: expected 1, found 2")


def test_generators_deal_equal_cards_and_leave_the_global_source_alone():
    before = torch.get_rng_state()
    a,b,c = (torch.rand(50, generator=make_generator(s)) for s in (5, np.int64(5), 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", [1.5, "1", None, True, 2**64, -2**63-1])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(StremnError, match="^seed: expected"): make_generator(seed)
    with pytest.raises(StremnError, match="^seed: expected"): seed_everything(seed)


@pytest.mark.parametrize("seed", [0, 17, 2**40, -3])
def test_seed_everything_covers_three_sources(seed):
    import random
    def draw():
        seed_everything(seed)
        return random.random(),np.random.rand(),torch.rand(()).item()
    assert draw()==draw()


def test_devices(monkeypatch):
    assert pick_device("cpu")==torch.device("cpu")==pick_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device().type=="cpu"
    for name in ("cuda","cuda:0","gpu","","mps","cuda:x","cpu:0"):
        with pytest.raises(StremnError) as e: pick_device(name)
        assert repr(name) in one_line(e)
    assert device_name().startswith("cpu ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device()==torch.device("cuda") and pick_device("cuda:1")==torch.device("cuda:1")
    with pytest.raises(StremnError, match="found 2"): pick_device("cuda:2")


def test_plain_is_json_and_deterministic():
    found = to_json({"d":Inner(), "t":(1,(2,)), "s":{"b","a","c"}, "m":Mode.FAST, "n":np.float32(.5), "a":np.arange(3),
                   "x":torch.ones(2), "z":torch.tensor(4), "k":{1:2}, "dt":torch.float16, "dev":torch.device("cpu"),
                   "b":True, "none":None})
    assert found=={"d":{"size":[3,4],"root":"a/b"}, "t":[1,[2]], "s":["a","b","c"], "m":"fast", "n":.5, "a":[0,1,2],
                   "x":[1.,1.], "z":4, "k":{"1":2}, "dt":"torch.float16", "dev":"cpu", "b":True, "none":None}
    assert json.loads(json.dumps(found))==found and to_json(found)==found
    assert found["b"] is True


@pytest.mark.parametrize("bad", [object(), lambda: 0, {1:0,"1":0}, b"bytes", {"a":[{"b":object()}]}])
def test_plain_refuses_what_json_cannot_hold(bad):
    with pytest.raises(StremnError, match="^config"): to_json(bad, "config")


def test_record_is_frozen_and_normalised():
    r = record()
    assert r.config=={"protocol":"tiny", "net":{"size":[3,4],"root":"a/b"}} and r.protocol=="tiny"
    assert record(config={}).protocol=="unknown"
    with pytest.raises(dataclasses.FrozenInstanceError): r.seed = 4
    mine = {"protocol":"tiny"}
    r = record(config=mine)
    mine["protocol"] = "paper"
    assert r.protocol=="tiny", "a record must not change with the caller's dictionary"


def test_config_id_follows_meaning():
    assert record().config_id==record(config={"net":{"root":"a/b","size":[3,4]}, "protocol":"tiny"}).config_id
    ids = {record(config={"protocol":"tiny", "k":k}).config_id for k in range(200)}
    assert len(ids)==200 and all(len(i)==8 and int(i, 16)>=0 for i in ids)


def test_config_id_is_the_same_in_another_process():
    code = "from stremn.results import Record; print(Record('a',{},{'s':{'x','y','z'},'t':(1,2)},0,0).config_id)"
    env = {**os.environ, "PYTHONHASHSEED":"123"}
    there = subprocess.run([sys.executable,"-c",code], capture_output=True, text=True, env=env, check=True)
    assert there.stdout.strip()==Record("a", {}, {"s":{"x","y","z"},"t":(1,2)}, 0, 0).config_id


FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSONISH = st.recursive(st.none()|st.booleans()|st.integers(-2**60, 2**60)|FINITE|st.text(max_size=8),
                       lambda c: st.lists(c, max_size=3)|st.dictionaries(st.text(max_size=5), c, max_size=3),
                       max_leaves=8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=st.dictionaries(st.text(max_size=5), JSONISH, max_size=4),
       metrics=st.dictionaries(st.text(max_size=5), FINITE, max_size=3), seed=st.integers(0, 2**31))
def test_what_is_saved_is_what_is_loaded(tmp_path, config, metrics, seed):
    r = record(config=config, metrics=metrics, seed=seed)
    path = r.save(tmp_path/"new"/"folder")
    assert path.name==f"learned-s{seed}.json"
    assert Record.load(path)==r and Record.load(str(path)).config_id==r.config_id
    assert [p for p in path.parent.iterdir() if p.suffix!=".json"]==[]


def test_saving_twice_gives_the_same_bytes(tmp_path):
    first = record().save(tmp_path).read_bytes()
    assert record().save(tmp_path).read_bytes()==first and first.endswith(b"}\n")


@pytest.mark.parametrize("changes,place", [
    ({"metrics":{"J":float("nan")}}, "metrics.J is nan"),
    ({"metrics":{"J":np.float32("inf")}}, "metrics.J is inf"),
    ({"config":{"a":[1,{"b":-np.inf}]}}, "config.a.1.b is -inf"),
    ({"clips":{"J":{"x":float("nan")}}}, "clips.J.x is nan"),
    ({"seconds":float("nan")}, "seconds is nan")])
def test_no_number_no_file(tmp_path, changes, place):
    old = record().save(tmp_path).read_bytes()
    with pytest.raises(StremnError) as e: record(**changes).save(tmp_path)
    assert place in one_line(e) and "learned-s3.json" in str(e.value)
    assert [p.name for p in tmp_path.iterdir()]==["learned-s3.json"] and (tmp_path/"learned-s3.json").read_bytes()==old


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    old = record().save(tmp_path).read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(results.os, "replace", full)
    with pytest.raises(StremnError, match="No space left"): record(seconds=99).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()]==["learned-s3.json"] and (tmp_path/"learned-s3.json").read_bytes()==old


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path/"file").write_text("x")
    with pytest.raises(StremnError) as e: record().save(tmp_path/"file")
    assert "learned-s3.json" in one_line(e)


@pytest.mark.parametrize("changes", [
    {"name":"../up"}, {"name":""}, {"name":".hidden"}, {"name":"a b"}, {"seed":1.5}, {"seed":True}, {"seconds":-1},
    {"metrics":{"J":"good"}}, {"metrics":{"J":True}}, {"metrics":[1]}, {"clips":{"J":[1.]}}, {"config":None}])
def test_a_record_is_checked_when_it_is_made(changes):
    with pytest.raises(StremnError) as e: record(**changes)
    one_line(e)


def broken_files():
    "How a record file goes wrong: name, edit of the good text."
    return {"half": lambda s: s[:80], "empty": lambda s: "", "list": lambda s: "[1]",
            "nan": lambda s: s.replace("74.8", "NaN"), "metric": lambda s: s.replace("74.8", '"74.8"'),
            "field": lambda s: s.replace('"seed": 3', '"sead": 3'),
            "kind": lambda s: s.replace('"seed": 3', '"seed": "3"'),
            "negative": lambda s: s.replace('"seconds": 1.5', '"seconds": -1.5')}


@pytest.mark.parametrize("how", broken_files())
def test_a_damaged_file_is_named(tmp_path, how):
    good = record().save(tmp_path).read_text()
    bad = broken_files()[how](good)
    assert bad!=good
    path = tmp_path/f"{how}.json"
    path.write_text(bad)
    with pytest.raises(StremnError) as e: Record.load(path)
    assert str(path) in one_line(e)


def test_absent_binary_and_folder_are_named(tmp_path):
    (tmp_path/"b.json").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.json","b.json","."):
        with pytest.raises(StremnError) as e: Record.load(tmp_path/name)
        assert str(tmp_path) in one_line(e)


def test_markdown_names_the_origin():
    text = record()._repr_markdown_()
    for part in ("J **74.8**", "F **81.75**", "`learned` seed 3", "tiny", record().config_id, "`unknown`", "torch 0"):
        assert part in text


def git(root, *args):
    "Git in `root`, away from the user's settings."
    who = ["-c","user.name=t","-c","user.email=t@t","-c","commit.gpgsign=false"]
    done = subprocess.run(["git","-C",str(root),*who,*args], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def checkout(root, lib="stremn"):
    "A git checkout with a package and a settings file."
    (root/"stremn").mkdir(parents=True)
    (root/"stremn"/"core.py").write_text("x = 1\n")
    (root/"settings.ini").write_text(f"[DEFAULT]\nlib_name = {lib}\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "one")
    return root


def test_commit_of_the_project_and_of_nobody_else(tmp_path, monkeypatch):
    ours,other = checkout(tmp_path/"ours"),checkout(tmp_path/"other", lib="thesis")
    head = git(ours, "rev-parse", "HEAD")
    monkeypatch.chdir(other)
    assert results._commit(ours/"stremn")==head[:12], "standing in another repository must not matter"
    assert results._commit(other/"stremn")=="unknown", "a copy inside another project's repository is not our checkout"
    monkeypatch.setenv("GIT_DIR", str(other/".git"))
    assert results._commit(ours/"stremn")==head[:12], "GIT_DIR of a hook must not matter"
    (ours/"notes.txt").write_text("untracked, outside the package")
    assert results._commit(ours/"stremn")==head[:12]
    (ours/"stremn"/"core.py").write_text("x = 2\n")
    assert results._commit(ours/"stremn")==head[:12]+"+dirty"


def test_an_installed_package_has_no_commit(tmp_path):
    venv = checkout(tmp_path/"project")/".venv"/"lib"/"site-packages"/"stremn"
    venv.mkdir(parents=True)
    assert results._commit(venv)=="unknown"


def test_no_git_no_commit(tmp_path, monkeypatch):
    ours = checkout(tmp_path/"ours")
    monkeypatch.setenv("PATH", "")
    assert results._commit(ours/"stremn")=="unknown"


def test_versions():
    found = Record("a", {}, {}, 0, 0).versions
    assert set(found)=={"python","stremn","torch"} and found["torch"]==str(torch.__version__)
