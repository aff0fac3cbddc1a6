"The runner: what counts as stored, what is measured, in which order; every record in the repository is recognised."
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch import nn

from stremn.config import to_json
from stremn.experiments import diagnose, leaderboard, prediction, trace, vos
from stremn.experiments.grid import Row, check_weights, missing, run, up_to_date
from stremn.models.hub import load
from stremn.results import Record, load_records, stored_record
from stremn.train.loop import FitConfig, Recipe
from refusals import refused

RECORDS = Path(__file__).resolve().parent.parent / "nbs" / "results" / "records"
WITHOUT_ROWS = {"complexity", "davis-tiny", "dry-run", "kept-timelines", "looks-tiny", "real-held",
                "real-parts-davis", "real-parts-multi"}  # measured by hand, or before there were rows


@dataclass(frozen=True)
class Count:
    "A test that needs no network."
    weights: str = ""
    seed: int = 0
    factor: int = 1
    protocol: str = "tiny"


@dataclass(frozen=True)
class Task:
    "What a recipe may teach."
    steps: int = 3


HOW = FitConfig(lr=.1)
THERE, LEARNS = Row("there", "file", Count()), Row("learns", "mine", Count(), Recipe("mine", Task(), HOW))


def training(seed=0, **fit):
    "How weights of `LEARNS` were made, as a record has it."
    return {"training": to_json({"task": Task(), "fit": replace(HOW, seed=seed, **fit)})}


def measure(row, seed, model):
    test = row.at(seed)
    return Record(row.name, {"n": float(test.factor + seed)}, to_json(test) | training(seed), seed, 0.)


class Networks:
    "Hands out networks, and remembers for whom."
    def __init__(self):
        self.asked = []

    def __call__(self, row, seed, runs):
        self.asked.append((row.name, seed, str(runs)))
        return nn.Identity()


def rows_of(study, records):
    "The rows that the records of a study should be of; None for a study without rows."
    if study in vos.STUDIES:
        return vos.STUDIES[study]
    if study in prediction.STUDIES:
        return prediction.STUDIES[study]
    if study in vos.VIDEO_STUDIES:                        # as many videos as there were
        return vos.count_videos(vos.VIDEO_STUDIES[study], range(records[0].config["videos"]))
    if study == "real-ingredients":
        return vos.ingredient_rows(vos.ingredients())
    if study == "diagnosis":
        return diagnose.diagnosis_rows()
    if study == "decisions":
        return leaderboard.leader_rows()
    return trace.kept_rows("vos-tiny") if study == "kept-tiny" else None


STUDIES = sorted(p.name for p in RECORDS.iterdir())


# ---------------------------------------------------------------- the records of this repository
@pytest.mark.parametrize("study", STUDIES)
def test_every_stored_record_is_recognised(study):
    records = load_records(RECORDS / study)
    rows = rows_of(study, records)
    assert (rows is None) == (study in WITHOUT_ROWS)
    by = {row.name: row for row in rows or ()}
    for r in records if rows else ():
        row = by[r.name]
        if study == "kept-tiny" and r.seed:               # these weights are not shipped: their bytes are noted
            row = replace(row, weights=f"mixed-s{r.seed}", note=row.note | {"fingerprint": r.config["fingerprint"]})
        assert up_to_date(r, row, r.seed), f"{study}/{r.name}, seed {r.seed}: measure it again"
        assert not up_to_date(r, row, r.seed + 1)


def test_hardly_any_record_is_without_rows():
    counts = {study: len(load_records(RECORDS / study)) for study in STUDIES}
    assert set(counts) >= WITHOUT_ROWS and sum(n for study, n in counts.items() if study in WITHOUT_ROWS) == 40
    assert sum(counts.values()) > 500


def test_shipped_weights_that_were_made_anew_make_their_numbers_old():
    row = next(r for r in prediction.STUDIES["t5-shipped"] if r.weights == "prediction-tiny")
    record = stored_record(RECORDS / "t5-shipped", row.name, 0)
    card = load("prediction-tiny").card
    assert up_to_date(record, row, 0) and record.config["trained_seconds"] == card["seconds"]
    for key, value in (("trained_seconds", 1.), ("averaged", [1, 2]), ("training", {})):
        assert not up_to_date(replace(record, config=record.config | {key: value}), row, 0), key


# ---------------------------------------------------------------- what counts
def test_a_record_of_this_very_test_counts_and_no_other():
    record = measure(THERE, 3, None)
    assert up_to_date(record, THERE, 3) and not up_to_date(None, THERE, 3) and not up_to_date(record, THERE, 0)
    assert not up_to_date(record, replace(THERE, test=Count(factor=2)), 3)
    assert not up_to_date(record, replace(THERE, weights="other"), 3)
    assert up_to_date(record, replace(THERE, weights="folder/file.safetensors"), 3)
    assert not up_to_date(record, replace(THERE, note={"study": "s"}), 3)
    assert up_to_date(replace(record, config=record.config | {"study": "s"}), replace(THERE, note={"study": "s"}), 3)


def test_a_field_that_is_newer_than_the_record_had_its_default():
    record = measure(THERE, 0, None)
    older = replace(record, config={k: v for k, v in record.config.items() if k != "factor"})
    assert up_to_date(older, THERE, 0) and not up_to_date(older, replace(THERE, test=Count(factor=2)), 0)


def test_weights_of_another_recipe_do_not_count():
    record = measure(LEARNS, 1, None)
    def other(**fit):
        return replace(LEARNS, recipe=Recipe("mine", Task(), replace(HOW, **fit)))
    assert up_to_date(record, LEARNS, 1)
    assert up_to_date(record, other(save_every=9, workers=2), 1)      # no weight depends on them
    assert not up_to_date(record, other(lr=.2), 1)
    assert not up_to_date(record, replace(LEARNS, recipe=Recipe("mine", Task(4), HOW)), 1)
    assert not up_to_date(replace(record, config=to_json(LEARNS.at(1))), LEARNS, 1)       # nobody knows
    assert not up_to_date(replace(record, config=record.config | training(0)), LEARNS, 1)  # another seed's weights


def test_a_fingerprint_stands_for_all_weights():
    row = replace(LEARNS, note={"fingerprint": "abc"})
    record = measure(row, 0, None)
    marked = replace(record, config=to_json(row.at(0)) | {"fingerprint": "abc"})
    assert up_to_date(marked, row, 0) and not up_to_date(marked, replace(row, note={"fingerprint": "abd"}), 0)


def test_weights_that_another_recipe_has_made_are_refused():
    network = nn.Identity()
    network.card = {"config": training(0)["training"]}
    assert check_weights(network, LEARNS.recipe, "here") is network
    refused(["here: expected weights of today's mine", "another training"], check_weights, network,
            LEARNS.recipe_at(1), "here")


# ---------------------------------------------------------------- running
def test_what_is_stored_is_skipped_and_the_rest_is_measured_in_order(tmp_path):
    rows, out = [THERE, LEARNS], tmp_path / "out"
    networks = Networks()
    done = run(rows, (2, 5), out, "runs", measure, networks, progress=False)
    assert [(r.name, r.seed) for r in done] == [("there", 2), ("learns", 2), ("learns", 5)]    # one seed without recipe
    assert networks.asked == [("there", 2, "runs"), ("learns", 2, "runs"), ("learns", 5, "runs")]
    assert stored_record(out, "learns", 5) == done[-1]
    assert run(rows, (2, 5), out, "runs", measure, networks, progress=False) == [] and len(networks.asked) == 3
    changed = [replace(THERE, test=Count(factor=7)), LEARNS]
    again = run(changed, (2, 5), out, "runs", measure, networks, progress=False)
    assert [(r.name, r.metrics["n"]) for r in again] == [("there", 9.)]
    assert len(run(changed, (2, 5), out, "runs", measure, networks, again=True, progress=False)) == 3


def test_a_run_that_was_stopped_goes_on(tmp_path):
    def breaks(row, seed, model):
        if seed == 1:
            raise KeyboardInterrupt
        return measure(row, seed, model)
    with pytest.raises(KeyboardInterrupt):
        run([LEARNS], range(3), tmp_path, "runs", breaks, Networks(), progress=False)
    assert [s for _, s in missing([LEARNS], range(3), tmp_path)] == [1, 2]
    assert [r.seed for r in run([LEARNS], range(3), tmp_path, "runs", measure, Networks(), progress=False)] == [1, 2]


def test_neighbours_with_equal_weights_share_a_network(tmp_path):
    rows = [replace(LEARNS, name=n, test=Count(factor=i)) for i, n in enumerate("abc")]
    rows.append(replace(rows[0], name="d", recipe=Recipe("mine", Task(4), HOW)))
    networks = Networks()
    run(rows, [0], tmp_path, "runs", measure, networks, progress=False)
    assert [name for name, *_ in networks.asked] == ["a", "d"]


def test_the_note_of_a_row_goes_into_its_record(tmp_path):
    record, = run([replace(THERE, note={"study": "s"})], [0], tmp_path, "runs", measure, Networks(), progress=False)
    assert record.config["study"] == "s" and stored_record(tmp_path, "there", 0) == record


def test_weights_that_are_not_there_are_refused(tmp_path):
    refused("'file'", run, [THERE], [0], tmp_path, "runs", measure, progress=False)
    assert not list(tmp_path.iterdir())
