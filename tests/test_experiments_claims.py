"""Claims: four words from records, closest rivals, the report, what is refused."""
from dataclasses import replace
from pathlib import Path

import pytest

import stremn
from stremn.experiments.claims import (
    RIVALS, TABLE_CLAIMS, against_stored, all_claims, beats_all, claims_of, claims_table, difference, equal,
    memory_claims, reproduce, rows_of_study, table_claims, wider_claims)
from stremn.results import VERDICTS, Interval, Record
from refusals import refused

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results" / "records"


def made(name, values, seed=0, metric="J", **config):
    each = {f"clip-{i}": v for i, v in enumerate(values)}
    return Record(name, {metric: sum(values) / len(values)}, {"protocol": "tiny", **config}, seed, 1., {metric: each})


def test_nothing_measured_is_not_run(tmp_path):
    claims = all_claims(tmp_path)
    assert len(claims) >= 10 and {c.verdict for c in claims} == {"not run"} and all(c.interval is None for c in claims)
    assert claims_table(claims).count("**not run**") == len(claims)


def test_each_table_has_the_claims_of_its_page(tmp_path):
    said = {table: {c.says for c in claims_of(table, tmp_path)} for table in TABLE_CLAIMS}
    assert all("Table 1" in s for s in said["1"] | said["3"]) and all("Table 2" in s for s in said["2"])
    assert said["6"] == {"fusion may be removed without retraining (Table 6)", "fusion is unnecessary (App. B)"}
    assert {"predicts better than other memories (Sec. 5)", *said["1"]} == said["5"]
    assert said["long"] == {"learned forgetting helps in long video (Sec. 1)"} and len(said["forgetting"]) > 4
    assert claims_of("choice", tmp_path) == [] == claims_of("zoo", tmp_path)


@pytest.mark.parametrize(("gain", "word"), [(.05, "reproduced"), (-.05, "not reproduced")])
def test_learned_has_to_beat_each_rule(tmp_path, gain, word):
    level = [.5, .6, .7, .8]
    for seed in range(3):
        for rule in (*RIVALS, "reservoir_held"):
            made(rule, level, seed).save(tmp_path / "t1-swapped")
        made("learned", [v + gain for v in level], seed).save(tmp_path / "t1-swapped")
    assert table_claims(tmp_path)[0].verdict == word
    made("newest", [v + 2 * gain for v in level], 0).save(tmp_path / "t1-swapped")            # one rule, one seed
    assert beats_all(rows_of_study(tmp_path, "t1-swapped"), "learned")[2] == ("undecided" if gain > 0 else word)


def test_equal_needs_the_whole_interval_inside():
    assert equal(Interval(0., -.009, .009)) == "reproduced" and equal(None) == "not run"
    assert equal(Interval(0., -.02, .009)) == "undecided"
    assert equal(Interval(.03, .02, .04)) == equal(Interval(-.03, -.04, -.02)) == "not reproduced"


def test_rows_are_paired_by_seed_and_clip(tmp_path):
    rows = {"a": [made("a", [.5, .7], s) for s in (0, 1)], "b": [made("b", [.4, .6], s) for s in (0, 1)]}
    assert difference(rows, "a", "b") == pytest.approx((.1, .1, .1)) and difference(rows, "a", "nobody") is None


def test_a_study_that_is_half_done_compares_what_both_have():
    rows = {"a": [made("a", [.5, .7], seed) for seed in (0, 1, 2)], "c": [made("c", [.4, .6], 4)],
            "b": [made("b", [.4, .6], 0), made("b", [.1, .3], 2)]}
    assert difference(rows, "a", "b").mean == pytest.approx((.1 + .4) / 2) and difference(rows, "a", "c") is None


def test_long_video_and_kept_frames_are_read_from_their_studies(tmp_path):
    for seed in range(2):
        made("learned", [.7, .8], seed).save(tmp_path / "long")
        made("oldest", [.6, .7], seed).save(tmp_path / "long")
    by = {c.says: c.verdict for c in memory_claims(tmp_path)}
    assert [v for k, v in by.items() if "long" in k] == ["reproduced"] and set(by.values()) == {"reproduced", "not run"}


def test_prediction_has_to_beat_both_rivals(tmp_path):
    for seed in range(3):
        for name, level in (("convlstm", 26.), ("predrnn", 27.), ("prediction", 26.5)):
            made(name, [level, level + 1], seed, "psnr").save(tmp_path / "t5-tiny")
    real, rules, tiny, small = wider_claims(tmp_path)
    assert tiny.verdict == "not reproduced" and "predrnn" in tiny.tested and tiny.interval.mean == pytest.approx(-.5)
    assert small.verdict == real.verdict == rules.verdict == "not run"
    made("prediction", [9., 9.], 3, "psnr").save(tmp_path / "t5-tiny")                    # no rival has such a run
    assert wider_claims(tmp_path)[2].interval == tiny.interval


def test_prediction_asks_for_every_rule(tmp_path):
    for seed in range(2):
        for name, level in {**dict.fromkeys(RIVALS, 25.), "most_similar": 26., "learned": 26.5}.items():
            made(name, [level, level + 1], seed, "psnr").save(tmp_path / "t5-swapped")
    rules = wider_claims(tmp_path)[1]
    assert rules.verdict == "reproduced" and "most_similar" in rules.tested and "2 runs" in rules.tested
    assert rules.interval.mean == pytest.approx(.5)


def test_real_video_asks_for_every_rule(tmp_path):
    for rule in RIVALS:
        made(rule, [.7, .8], metric="JF").save(tmp_path / "real-davis")
    made("learned", [.75, .85], metric="JF").save(tmp_path / "real-davis")
    assert wider_claims(tmp_path)[0].verdict == "reproduced"
    next((tmp_path / "real-davis").glob("reservoir*")).unlink()
    assert wider_claims(tmp_path)[0].verdict == "not run"


def test_only_equal_tests_are_compared():
    now = [made("oldest", [.5, .6]), made("learned", [.6, .7])]
    then = [made("oldest", [.5, .5]), made("learned", [.6, .7], slots=6), made("oldest", [.1, .1], 1)]
    lines = against_stored(now, then)[-2:]
    assert lines == ["| oldest | 0.5000 | 0.5500 | +0.0500 |", "| learned | none with this config | 0.6500 |  |"]


def test_a_report_is_of_a_finished_run(tmp_path, monkeypatch):
    "A run that breaks leaves no report, not even that of the run before it."
    record = made("oldest", [.5, .6])
    def quick(rows, seeds, out, *options):
        return [replace(record, config={"protocol": "tiny", "study": out.name})]
    monkeypatch.setattr("stremn.experiments.claims.run", quick)
    report = reproduce(tmp_path / "a", RESULTS, ["oldest"], progress=False)
    assert "| oldest | 0.550 |" in report.read_text() and (tmp_path / "a" / "t1-swapped.png").stat().st_size > 1000
    monkeypatch.setattr("stremn.experiments.claims.draw", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        reproduce(tmp_path / "a", None, ["oldest"], progress=False)
    assert not report.exists()


def test_what_cannot_be_reproduced_is_refused_before_it_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused("found a file", reproduce, tmp_path / "file")
    refused(["rows: expected some of", "found nobody"], reproduce, tmp_path / "a", None, ["oldest", "nobody"])
    refused("found none", reproduce, tmp_path / "a", None, [])
    monkeypatch.setattr("stremn.experiments.claims.find_spec", lambda name: None)
    refused("matplotlib", reproduce, tmp_path / "b")


@pytest.mark.skipif(not stremn.available(), reason="no shipped weights")
def test_the_readme_prints_the_verdicts_of_the_records():
    claims = all_claims(RESULTS)
    assert {c.verdict for c in claims} <= set(VERDICTS)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in claims_table(claims).splitlines()[2:]:
        assert line.replace("](", "](nbs/") in text, f"stale: {line}"
    assert all((ROOT / "nbs" / c.page).is_file() for c in claims)
