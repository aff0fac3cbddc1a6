"""Contracts of stremn.results: records that survive the disk or are refused, intervals against loops and formulas,
pairs by name, protocols that do not mix."""
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stremn import results
from stremn.core import StremnError, device_name
from stremn.paper import TABLES
from stremn.results import (
    T95, VERDICTS, Record, bootstrap_interval, clip_scores, compare, crossed_interval, load_records, paired_difference,
    aligned, policy_table, row_difference, score_matrix, verdict,
)


# ---- records ---------------------------------------------------------------------------------------------------------


def one_line(exc):
    "The message of a StremnError is a single line."
    assert "\n" not in str(exc.value)
    return str(exc.value)


def full_record(**changes):
    "A record with nothing machine-dependent in it."
    config = {"protocol":"tiny", "net":{"size":(3,4), "root":Path("a")/"b"}}
    base = dict(name="learned", metrics={"J":74.8,"F":81.75}, config=config, seed=3,
                seconds=1.5, clips={"J":{"a":1.,"b":2}}, device="cpu", versions={"torch":"0"}, commit="unknown")
    return Record(**{**base, **changes})


def test_record_is_frozen_and_normalised():
    r = full_record()
    assert r.config=={"protocol":"tiny", "net":{"size":[3,4],"root":"a/b"}} and r.protocol=="tiny"
    assert full_record(config={}).protocol=="unknown"
    with pytest.raises(dataclasses.FrozenInstanceError): r.seed = 4
    mine = {"protocol":"tiny"}
    r = full_record(config=mine)
    mine["protocol"] = "paper"
    assert r.protocol=="tiny", "a record must not change with the caller's dictionary"


def test_config_id_follows_meaning():
    assert full_record().config_id==full_record(config={"net":{"root":"a/b","size":[3,4]}, "protocol":"tiny"}).config_id
    ids = {full_record(config={"protocol":"tiny", "k":k}).config_id for k in range(200)}
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
    r = full_record(config=config, metrics=metrics, seed=seed)
    path = r.save(tmp_path/"new"/"folder")
    assert path.name==f"learned-s{seed}.json"
    assert Record.load(path)==r and Record.load(str(path)).config_id==r.config_id
    assert [p for p in path.parent.iterdir() if p.suffix!=".json"]==[]


def test_saving_twice_gives_the_same_bytes(tmp_path):
    first = full_record().save(tmp_path).read_bytes()
    assert full_record().save(tmp_path).read_bytes()==first and first.endswith(b"}\n")


@pytest.mark.parametrize("changes,place", [
    ({"metrics":{"J":float("nan")}}, "metrics.J is nan"),
    ({"metrics":{"J":np.float32("inf")}}, "metrics.J is inf"),
    ({"config":{"a":[1,{"b":-np.inf}]}}, "config.a.1.b is -inf"),
    ({"clips":{"J":{"x":float("nan")}}}, "clips.J.x is nan"),
    ({"seconds":float("nan")}, "seconds is nan")])
def test_no_number_no_file(tmp_path, changes, place):
    old = full_record().save(tmp_path).read_bytes()
    with pytest.raises(StremnError) as e: full_record(**changes).save(tmp_path)
    assert place in one_line(e) and "learned-s3.json" in str(e.value)
    assert [p.name for p in tmp_path.iterdir()]==["learned-s3.json"] and (tmp_path/"learned-s3.json").read_bytes()==old


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    old = full_record().save(tmp_path).read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(results.os, "replace", full)
    with pytest.raises(StremnError, match="No space left"): full_record(seconds=99).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()]==["learned-s3.json"] and (tmp_path/"learned-s3.json").read_bytes()==old


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path/"file").write_text("x")
    with pytest.raises(StremnError) as e: full_record().save(tmp_path/"file")
    assert "learned-s3.json" in one_line(e)


@pytest.mark.parametrize("changes", [
    {"name":"../up"}, {"name":""}, {"name":".hidden"}, {"name":"a b"}, {"seed":1.5}, {"seed":True}, {"seconds":-1},
    {"metrics":{"J":"good"}}, {"metrics":{"J":True}}, {"metrics":[1]}, {"clips":{"J":[1.]}}, {"config":None}])
def test_a_record_is_checked_when_it_is_made(changes):
    with pytest.raises(StremnError) as e: full_record(**changes)
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
    good = full_record().save(tmp_path).read_text()
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
    text = full_record()._repr_markdown_()
    origin = ("`learned` seed 3", "tiny", full_record().config_id, "`unknown`", "torch 0")
    for part in ("J **74.8**", "F **81.75**", *origin):
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



def test_a_forgotten_device_is_the_cpu_and_never_a_guess(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Something")
    assert device_name()=="NVIDIA Something"
    assert Record("a", {}, {}, 0, 0).device==device_name("cpu")!="NVIDIA Something"


# ---- intervals and tables --------------------------------------------------------------------------------------------


def record(name="learned", seed=0, protocol="tiny", clips=None, **metrics):
    "A record that takes its mean from its clips."
    scores = {"J":clips} if clips else {}
    metrics = metrics or {"J":float(np.mean(list(clips.values())))}
    return Record(name, metrics, {"protocol":protocol}, seed, 1., scores, device="cpu", versions={}, commit="unknown")


def cells(table, row):
    "The cells of the one line of a Markdown table that starts with `row`."
    found = [l for l in table.splitlines() if l.startswith(f"| {row} |")]
    assert len(found)==1, (row, table)
    return [c.strip() for c in found[0].strip("|").split("|")]


@pytest.mark.parametrize("n,draws,level", [(1,50,.95), (2,333,.9), (17,400,.95), (60,250,.5)])
def test_interval_equals_loops(n, draws, level):
    x = np.random.default_rng(n).normal(size=n)
    rng,means = np.random.default_rng(9),[]
    for _ in range(draws): means.append(float(np.mean([x[i] for i in rng.integers(0, n, n)])))
    means.sort()
    def cut(q):
        at = q*(draws-1)
        low = int(at)
        return means[low]+(at-low)*(means[min(low+1, draws-1)]-means[low])
    mean,lo,hi = bootstrap_interval(x, draws, seed=9, level=level)
    assert np.allclose([mean,lo,hi], [x.mean(),min(cut((1-level)/2), x.mean()),max(cut((1+level)/2), x.mean())])


def test_blocks_do_not_change_the_answer():
    x = np.random.default_rng(0).normal(size=3000)          # large enough to be drawn in several blocks
    mean,lo,hi = bootstrap_interval(x, draws=2000)
    index = np.random.default_rng(0).integers(0, 3000, (2000,3000))
    assert np.allclose([lo,hi], np.quantile(x[index].mean(1), [.025,.975]))


def test_deterministic_in_the_seed_and_silent_about_the_global_one():
    x = np.random.default_rng(1).normal(size=20)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    assert bootstrap_interval(x, 500)==bootstrap_interval(x, 500)!=bootstrap_interval(x, 500, seed=1)
    assert (np.random.get_state()[1]==before).all()


def test_normal_approximation_and_scaling():
    x = np.random.default_rng(2).normal(3, 2, 500)
    mean,lo,hi = bootstrap_interval(x)
    half = 1.96*x.std()/500**.5
    assert abs(lo-(mean-half))<.05*half and abs(hi-(mean+half))<.05*half
    assert np.allclose(bootstrap_interval(10*x+1), 10*np.array(bootstrap_interval(x))+1)
    assert bootstrap_interval([.5]*7)==(.5,.5,.5)
    wide = bootstrap_interval(x, level=.99)
    assert wide.lo<lo<hi<wide.hi


def test_coverage():
    "600 intervals of 40 skewed scores each: near 95 % hold the truth (standard error 0.9 %), half intervals near 50 %."
    rng = np.random.default_rng(0)
    samples = rng.beta(6, 3, (600, 40))
    for level,low,high in ((.95,.915,.975), (.5,.43,.56)):
        held = [lo<=2/3<=hi for t,x in enumerate(samples) for _,lo,hi in [bootstrap_interval(x, 600, t, level)]]
        assert low<np.mean(held)<high, (level, np.mean(held))


@pytest.mark.parametrize("values", [[], [[1.,2.]], [1.,float("nan")], [1.,float("inf")]])
def test_bad_values(values):
    with pytest.raises(StremnError, match="^values: expected"): bootstrap_interval(values)
    for bad in (dict(draws=0), dict(level=0), dict(level=1.)):
        with pytest.raises(StremnError): bootstrap_interval([1.,2.], **bad)


def test_pairs_are_made_by_name():
    rng = np.random.default_rng(5)
    a = {f"c{i}":v for i,v in enumerate(rng.normal(size=12))}
    b = {k:v-.5 for k,v in a.items()}
    shuffled = {k:b[k] for k in rng.permutation(list(b))}
    assert paired_difference(a, shuffled)==paired_difference(a, b)
    assert np.allclose(paired_difference(a, b), .5)
    assert np.allclose(paired_difference(list(a.values()), list(b.values())), .5)
    for one,two in ((a,{**b, "extra":1.}), (a,{}), (a,list(b.values())), ([1.,2.],[1.])):
        with pytest.raises(StremnError, match="^paired difference: expected") as e: paired_difference(one, two)
        assert "\n" not in str(e.value)


def test_pairing_cancels_difficulty():
    rng = np.random.default_rng(6)
    a = rng.uniform(0, 1, 40)
    d = paired_difference(a+.01+rng.normal(0, .002, 40), a)
    own = bootstrap_interval(a)
    assert d.lo>0 and (d.hi-d.lo)<.05*(own.hi-own.lo)


@pytest.mark.parametrize("interval,threshold,word", [
    ((.2,.1,.3),0,"reproduced"), ((.2,0.,.3),0,"undecided"), ((0.,-.1,.1),0,"undecided"),
    ((-.2,-.3,-.1),0,"not reproduced"), ((-.1,-.3,0.),0,"not reproduced"), ((.2,.1,.3),.15,"undecided"),
    ((.2,.1,.3),.3,"not reproduced"), (None,0,"not run")])
def test_verdicts(interval, threshold, word):
    assert verdict(interval, threshold)==word and word in VERDICTS


def test_a_reversed_interval_is_refused():
    with pytest.raises(StremnError): verdict((0,1,-1))


def test_load_records(tmp_path):
    made = [record("oldest", s, clips={"a":.1*s,"b":.2}) for s in range(3)]
    for i,r in enumerate(made): r.save(tmp_path/f"t{i}")
    (tmp_path/".oldest-s9.json.0123.tmp").write_text("{")
    (tmp_path/".half.json").write_text("{")
    (tmp_path/"readme.txt").write_text("not a record")
    assert load_records(tmp_path)==made and load_records(str(tmp_path))==made
    (tmp_path/"t1"/"broken.json").write_text("{}")
    with pytest.raises(StremnError, match="broken.json"): load_records(tmp_path)
    with pytest.raises(StremnError, match="nowhere"): load_records(tmp_path/"nowhere")
    with pytest.raises(StremnError, match="a file"): load_records(tmp_path/"readme.txt")
    (tmp_path/"empty").mkdir()
    assert load_records(tmp_path/"empty")==[]


def test_clip_scores_average_over_seeds():
    runs = [record(seed=s, clips={"b":s+.0,"a":2.*s}) for s in (0,1,2)]
    assert clip_scores(runs, "J")=={"a":2.,"b":1.} and list(clip_scores(runs, "J"))==["a","b"]
    with pytest.raises(StremnError, match="seed 4"): clip_scores([*runs, record(seed=4, clips={"a":1.})], "J")
    with pytest.raises(StremnError, match="'F'"): clip_scores(runs, "F")
    with pytest.raises(StremnError): clip_scores([], "J")


def policies(protocol="tiny"):
    "Three policies, 30 clips; the gains are clear."
    rng = np.random.default_rng(7)
    level = {f"c{i}":v for i,v in enumerate(rng.uniform(.3, .9, 30))}
    return [record(name, seed, protocol, {k: v+gain+rng.normal(0, .005) for k,v in level.items()})
            for name,gain in {"oldest":0., "learned":.05, "newest":-.05}.items() for seed in (0,1)]


def test_policy_table_numbers():
    records = policies()
    text = policy_table(records, rows=["oldest","learned","newest","random"])
    groups = {n:[r for r in records if r.name==n] for n in ("oldest","learned","newest")}
    for name,word in {"learned":"yes","newest":"no"}.items():
        own,gap = crossed_interval(score_matrix(groups[name], "J")),row_difference(groups[name], groups["oldest"])
        expected = [f"{own.mean:.3f}",f"[{own.lo:.3f}, {own.hi:.3f}]","30","2",f"{gap.mean:+.3f}"]
        assert cells(text, name)==[name,*expected,f"[{gap.lo:+.3f}, {gap.hi:+.3f}]",word]
    assert cells(text, "oldest")[5:]==["","","reference"] and cells(text, "random")==["random"]+[""]*6+["not run"]
    assert "`tiny`" in text and "not comparable with the paper" in text
    order = [l.split("|")[1].strip() for l in policy_table(records).splitlines() if l.startswith("|")][2:]
    assert order==["learned","oldest","newest"]
    assert len({l.count("|") for l in text.splitlines() if l.startswith("|")})==1


def test_policy_table_beside_the_paper():
    text = policy_table(policies(), printed={"learned":"74.8", "first":"1"})
    assert cells(text, "learned")[:2]==["learned", "74.8"] and cells(text, "oldest")[1]==""
    for name in ("learned", "newest"):
        assert cells(text, name)[2:]==cells(policy_table(policies()), name)[1:]


def test_aligned_columns():
    text = "**J** of `a`\n\n| row | mean | word |\n|:--|--:|:--|\n| a | 1.5 | yes |\n| longer | 10.25 |  |\nend"
    assert aligned(text).splitlines()==["J of a", "", "row      mean  word", "a         1.5  yes", "longer  10.25",
                                        "end"]
    assert aligned("no table | here")=="no table | here"


def test_policy_table_does_not_depend_on_the_order_of_records_or_clips():
    records = policies()
    turned = [Record(**{**vars(r), "clips":{"J":dict(reversed(r.clips["J"].items()))}}) for r in reversed(records)]
    assert policy_table(turned)==policy_table(records)


def test_policy_table_refuses_mixtures():
    for bad in (policies()+policies("small"), policies("paper"), [], policies()+policies()):
        with pytest.raises(StremnError) as e: policy_table(bad)
        assert "\n" not in str(e.value)
    assert cells(policy_table(policies(), reference="nobody"), "learned")[-1]=="not run"


def test_compare_keeps_smaller_protocols_out():
    ours = [record("oldest", JF=76.61, protocol="tiny"), record("newest", JF=76.62, protocol="small"),
            record("random", JF=76.63, protocol="unheard")]
    table = compare(TABLES["t1"], ours, "JF")
    assert not any(n in table for n in ("76.6","76.61","76.62","76.63"))
    assert cells(table, "(A) Remove oldest")[-1]=="not run (protocol `tiny` only)"
    assert cells(table, "(Ours) Learned")==["(Ours) Learned","78.3"]+[""]*5+["not run"]
    assert len([l for l in table.splitlines() if l.startswith("|")])==2+7


def test_compare_verdicts():
    t = TABLES["t1"]
    def learned(values, **kw):
        runs = [record(seed=i, protocol="paper", JF=v) for i,v in enumerate(values)]
        return cells(compare(t, runs, "JF", **kw), "(Ours) Learned")
    assert learned([78.3])==["(Ours) Learned","78.3","78.3","","no interval","1","+0.0","undecided"]
    assert learned([78.2,78.3,78.4,78.25,78.35])[-1]=="reproduced"
    assert learned([77.5]*4+[77.6])[-1]=="not reproduced"
    assert learned([77.0,78.0,79.0,78.5,78.5])[-1]=="undecided"
    assert learned([.782,.783,.784,.7825,.7835], scale=100)[-1]=="reproduced"
    half = T95[0]*np.std([77,78,79,78.5,78.5], ddof=1)/5**.5
    assert learned([77.0,78.0,79.0,78.5,78.5])[3]==f"[{78.2-half:.1f}, {78.2+half:.1f}]"


def test_students_factors():
    stats = pytest.importorskip("scipy.stats")
    assert np.allclose(T95, stats.t.ppf(.975, np.arange(4, 4+len(T95))), atol=6e-4)


def test_compare_uses_clips_and_the_columns_digits():
    clips = {f"c{i}":v for i,v in enumerate(np.random.default_rng(8).normal(74.8, .3, 50))}
    line = cells(compare(TABLES["t1"], [record(protocol="paper", clips=clips)], "J"), "(Ours) Learned")
    own = bootstrap_interval([clips[k] for k in sorted(clips)])
    assert line[3:5]==[f"[{own.lo:.1f}, {own.hi:.1f}]","clips"] and line[-1]=="reproduced"
    text = compare(TABLES["t5"], [record("stremn", protocol="paper", kth_ssim=.8312)], "kth_ssim", tol=.01)
    assert cells(text, "STReMN")[1:3]==["0.834","0.831"] and cells(text, "MIM [51]")[1]=="–"
    text = compare(TABLES["t5"], [record("mim", protocol="paper", kth_ssim=.8)], "kth_ssim", tol=.01)
    assert cells(text, "MIM [51]")[-1]=="nothing printed"
    with pytest.raises(StremnError, match="tol"): compare(TABLES["t5"], [], "kth_ssim")
    with pytest.raises(StremnError, match="column"): compare(TABLES["t1"], [], "SSIM")
    with pytest.raises(StremnError, match="words"): compare(TABLES["t3"], [], "backbone")


@pytest.mark.parametrize("key", TABLES)
def test_every_table_can_be_compared(key):
    t = TABLES[key]
    for metric,column in t.columns.items():
        if column.better:
            lines = [l for l in compare(t, [], metric, tol=1.).splitlines() if l.startswith("|")]
            assert len(lines)==2+len(t.rows) and all(l.count("|")==9 for l in lines)
            assert all("not run" in l for l in lines[2:])
            assert len({l.split("|")[1] for l in lines[2:]})==len(t.rows), "rows must be told apart"


def test_crossed_bootstrap_equals_drawing_rows_and_columns():
    rng = np.random.default_rng(3)
    x = rng.normal(.6, .1, (1,25))+rng.normal(0, .03, (5,1))+rng.normal(0, .02, (5,25))
    means = [x[rng.integers(0, 5, 5)][:,rng.integers(0, 25, 25)].mean() for _ in range(20_000)]
    found = crossed_interval(x, 20_000)
    assert found.mean==pytest.approx(x.mean()) and np.allclose(found[1:], np.quantile(means, [.025,.975]), atol=.002)
    assert found.hi-found.lo>bootstrap_interval(x.mean(0)).hi-bootstrap_interval(x.mean(0)).lo  # the runs disagree
    assert crossed_interval(x[:1])==bootstrap_interval(x[0])
    for bad in (x[0], np.full((2,3), np.nan), np.empty((0,3))):
        with pytest.raises(StremnError): crossed_interval(bad)


def test_row_difference_is_paired_by_seed_and_clip():
    records = policies()
    a,b = ([r for r in records if r.name==n] for n in ("learned","oldest"))
    gap = row_difference(a, b)
    assert gap==row_difference(a[::-1], b) and abs(gap.mean-.05)<.01 and gap.lo>.04
    with pytest.raises(StremnError, match="same seeds"): row_difference(a[:1], b)
    other = [record("oldest", r.seed, "tiny", {"x":.5}) for r in b]
    with pytest.raises(StremnError, match="same clips"): row_difference(a, other)


def test_a_policy_table_of_a_half_done_study_compares_the_seeds_that_both_have():
    def record(name, seed, j):
        return Record(name, {"J": j}, {"protocol": "tiny"}, seed, 1., clips={"J": {"a": j, "b": j + .1}})
    records = [record("oldest", s, .5 + s / 10) for s in (0, 1)] + [record("learned", s, .6 + s / 10) for s in (1, 2)]
    line = next(x for x in policy_table(records).splitlines() if x.startswith("| learned"))
    assert "+0.100 | [+0.100, +0.100]" in line
