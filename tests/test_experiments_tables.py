"Tables: their studies, what is measured for them, and the bytes that the command prints."
from dataclasses import replace
from pathlib import Path

import pytest

from stremn import cli
from stremn.experiments import tables
from stremn.experiments.measure import ChameleonEval
from stremn.experiments.tables import TABLES, Study, print_table, run_missing, run_study, stored_records, table_text
from stremn.experiments.vos import STUDIES
from stremn.results import Record, load_records
from refusals import refused

SNAPSHOTS = Path(__file__).resolve().parent / "snapshots"
RECORDS = Path(__file__).resolve().parent.parent / "nbs" / "results" / "records"


def without_ucb(text):
    "All lines but those of the rule that is measured anew since it is that of RMem's authors."
    return [line for line in text.splitlines(keepends=True) if not line.startswith("| ucb |")]


@pytest.mark.parametrize("name", ["1", "2", "3", "5", "6"])
def test_a_table_is_printed_as_ever_to_the_byte(name, capsys):
    """The numbers of the records, their intervals and their order: a change here is a change of results.

    The snapshots were taken before the package was rearranged; since then only the rows of `ucb` were measured again.
    """
    cli.main(["table", name])
    now, then = capsys.readouterr().out, (SNAPSHOTS / f"table{name}.txt").read_text(encoding="utf-8")
    assert without_ucb(now) == without_ucb(then)


def test_every_study_is_in_one_table_and_has_its_reference():
    assert list(TABLES) == ["1", "2", "3", "5", "6", "long", "forgetting", "zoo", "choice", "training"]
    names = [study.name for studies in TABLES.values() for study in studies]
    assert len(set(names)) == len(names) and "t6-smoke" not in names          # which tests the machinery
    for studies in TABLES.values():
        for study in studies:
            assert study.reference in [row.name for row in study.rows], study.name
            if not (RECORDS / study.name).is_dir():                           # not measured yet
                continue
            for record in load_records(RECORDS / study.name)[:3]:
                assert study.metric in record.clips


def test_records_are_those_of_this_copy():
    assert stored_records() == RECORDS


def test_seeds_beyond_the_wanted_ones_are_left_out(tmp_path):
    for seed in range(3):
        for name, j in (("learned", .7), ("oldest", .6)):
            clips = {"J": {"a": j + seed, "b": j - seed}}
            Record(name, {"J": j}, {"protocol": "tiny"}, seed, 1., clips).save(tmp_path / "long")
    text = table_text("long", tmp_path, 2)
    assert text.startswith("\nlong\n\n**J**") and "| learned | 0.700 |" in text
    assert "| 2 | 3 |" in table_text("long", tmp_path, 3) and "| 2 | 2 |" in text      # clips, seeds


def test_a_study_is_run_as_its_tests_ask(tmp_path):
    "A cheap row of Table 2 and of Table 5; what is stored is not measured again."
    row = next(r for r in STUDIES["t2-slots"] if r.name == "learned-K02")
    cheap = replace(row, test=replace(row.test, clips=2))
    done = run_study(Study("t2-slots", (cheap,)), tmp_path, seeds=[0], progress=False)
    assert [r.name for r in done] == ["learned-K02"] and isinstance(cheap.test, ChameleonEval)
    assert run_study(Study("t2-slots", (cheap,)), tmp_path, seeds=[0], progress=False) == []
    copy = next(r for r in tables.prediction.STUDIES["t5-tiny"] if r.name == "copy")
    copy = replace(copy, test=replace(copy.test, clips=2))
    assert len(run_study(Study("t5-tiny", (copy,)), tmp_path, seeds=range(5), progress=False)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t2-slots", "t5-tiny"]


def test_what_is_missing_is_measured_study_by_study(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tables, "run_study", lambda study, *how: asked.append((study.name, *how)) or [study.name])
    assert run_missing("1", tmp_path, "r", "d", range(2), False) == ["t1-swapped", "t1-retrained"]
    assert asked[0] == ("t1-swapped", tmp_path, "r", "d", range(2), False)


def test_a_table_without_records_or_videos_is_refused(tmp_path):
    refused(["t2-slots: expected records, found none", "--run"], print_table, "2", tmp_path)
    known = ", ".join(TABLES)
    refused(f"table: expected one of {known}, found '4'", table_text, "4", tmp_path)
    refused("davis2016 or DAVIS", run_missing, "3", tmp_path, "runs", tmp_path)
