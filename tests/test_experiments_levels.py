"Memories on the levels: what is printed is what was measured, and rules of one's own are taken by name."

import pytest

from stremn import cli
from stremn.core import StremnError
from stremn.data.levels import LEVELS, level_clips
from stremn.experiments.levels import BENCH_POLICIES, bench_levels, enter_policy
from stremn.experiments.measure import ORACLES, ChameleonEval, evaluate_chameleon
from stremn.memory.rules import RULES, ZOO, all_rules, find_rule
from stremn.models.hub import load
from stremn.results import load_records


def test_the_table_holds_the_records_and_they_are_measured_once(rule_file):
    bench = dict(policies=["oldest", "my_rules:mine"], levels=["easy"], clips=2, slots=3, out="kept", progress=False)
    report = bench_levels(**bench)
    records = {r.name: r for r in load_records("kept")}
    assert sorted(records) == ["easy-my_rules.mine", "easy-oldest"]
    test = ChameleonEval(policy="oldest", slots=3, clips=2, first=LEVELS["easy"].first, clip=LEVELS["easy"].config)
    clips = level_clips("easy", 2)
    want = evaluate_chameleon(test, load("vos-tiny"), clips)[0]
    assert records["easy-oldest"].metrics == want.metrics and records["easy-oldest"].clips == want.clips
    assert records["easy-oldest"].config["hashes"] == list(LEVELS["easy"].hashes[:2])
    newest = evaluate_chameleon(ChameleonEval(policy="newest", slots=3, clips=2), load("vos-tiny"), clips)[0]
    assert records["easy-my_rules.mine"].metrics == newest.metrics != want.metrics
    for name, r in (("oldest", want), ("my_rules:mine", newest)):
        assert f"| {name} | {r.metrics['J']:.3f} | {r.metrics['J_visible']:.3f} |" in report
    assert "easy: 2 of 2 clips are as published" in report and "3 slots" in report
    again = bench_levels(**bench)
    after = {r.name: r for r in load_records("kept")}
    assert again == report and after["easy-oldest"] == records["easy-oldest"]           # not measured again
    assert after["easy-my_rules.mine"].seconds != records["easy-my_rules.mine"].seconds  # the file may have changed


def test_more_clips_than_published_are_said(rule_file):
    report = bench_levels(policies=["unbounded"], levels=["easy"], clips=9, progress=False)
    assert "easy: 8 of 8 clips are as published, 1 are new" in report and not list(rule_file.glob("*.json"))


@pytest.mark.parametrize("name, message", [
    ("best", "policy: expected one of oldest"), ("my_rules:other", "expected module:function, found my_rules:other"),
    ("nowhere:mine", "found nowhere:mine"),
    ("my_rules:number", "expected a Rule or a function of a Request in my_rules"),
    (":", "module:function")])
def test_unknown_policies_are_refused(rule_file, name, message):
    with pytest.raises(StremnError, match=message):
        enter_policy(name)
    assert name not in ZOO


def test_known_policies_are_entered_as_they_are(rule_file):
    for name in (*BENCH_POLICIES, *ORACLES, *all_rules()):
        before = dict(ZOO)
        enter_policy(name)
        assert ZOO == before
    enter_policy("my_rules:mine")
    assert find_rule("my_rules:mine").select.__name__ == "mine" and "my_rules:mine" not in RULES


def test_nothing_to_measure_is_refused():
    for words in ({"policies": []}, {"levels": []}):
        with pytest.raises(StremnError, match="expected a policy and a level or more"):
            bench_levels(**words)
    with pytest.raises(StremnError, match="level: expected one of"):
        bench_levels(levels=["extreme"])


def test_the_command_measures_what_the_library_does():
    command = cli.parse(["bench", "memory"])
    assert command.policy == BENCH_POLICIES and command.levels == tuple(LEVELS) and command.clips == 8
