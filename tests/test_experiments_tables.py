"Tables: their studies, what is measured for them, and the bytes that the command prints."
from dataclasses import replace
from pathlib import Path

import pytest

from stremn import cli
from stremn.core import StremnError
from stremn.experiments import tables
from stremn.experiments.measure import ChameleonEval
from stremn.experiments.tables import (
    PRINTED, TABLES, Study, print_table, run_missing, run_study, stored_records, table_text, table_view,
)
from stremn.experiments.vos import STUDIES
from stremn.paper import TABLES as PAPER
from stremn.results import VERDICTS, Record, load_records
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
    cli.main(["table", name, "--markdown"])
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


@pytest.mark.parametrize(("table", "row", "printed"), [
    ("1", "learned", "74.8"), ("1", "reservoir", "73.7"), ("2", "learned-K06", "78.3"), ("2", "learned-K03", "76.3"),
    ("3", "learned", "83.7"), ("3", "stcn", "85.4"), ("5", "prediction", "0.834"), ("5", "predrnn", "0.839"),
    ("6", "least_with", "76.7"), ("6", "least_removed", "–")])
def test_the_paper_stands_beside_what_was_measured(table, row, printed):
    "The second column is the paper's, the third is ours, as Markdown has it; verdicts stand below."
    lines = table_view(table, RECORDS).splitlines()
    found = next(x.split() for x in lines if x.split()[:2] == [row, printed])
    ours = next(x.split(" | ")[1] for x in table_text(table, RECORDS).splitlines() if x.startswith(f"| {row} |"))
    assert found[2] == ours
    assert sum("not comparable one by one" in x for x in lines) >= 1 and max(map(len, lines)) <= 175
    assert not any("|" in x or "`" in x or "**" in x for x in lines)
    below = lines[lines.index("claims, from the records of all seeds"):]
    assert {x[:16].strip() for x in below} <= {"", "claims, from the", *VERDICTS} and len(below) > 2


def test_a_row_that_the_paper_lacks_has_no_number_of_the_paper():
    lines = table_view("1", RECORDS).splitlines()
    head = next(x for x in lines if x.startswith("row "))
    line = next(x for x in lines if x.startswith("oracle "))
    end = head.index("paper") + len("paper")
    assert line[len("oracle"):end].strip() == "" and line[end:].split()[0] == "0.790"
    assert "paper:" not in table_view("long", RECORDS)


def test_what_is_beside_the_paper_is_a_row_of_both():
    for study, (key, column, names) in PRINTED.items():
        rows = {row.name for studies in TABLES.values() for s in studies if s.name == study for row in s.rows}
        assert set(names) & rows, study
        assert column in PAPER[key].columns and set(names.values()) <= set(PAPER[key].rows), study


def test_records_that_did_not_come_along_are_looked_for_in_the_source(tmp_path):
    "An installed copy has none; a checkout has some, and those of a study that nobody ran have to be measured."
    refused(["t2-slots: expected records, found none", "source", "--out nbs/results/records", "--run"],
            print_table, "2", tmp_path / "nowhere")
    with pytest.raises(StremnError) as e:
        print_table("2", tmp_path)
    assert str(e.value).endswith("found none; measure them with --run")


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
