"The leaderboard: rules are compared on common clips, ties are marked, and costs are those of the memory that is held."

import pytest
import torch
from refusals import refused

from stremn import cli
from stremn.data.chameleon import chameleon
from stremn.experiments.leaderboard import LEADERS, chosen, decision_cost, leader_rows, leaderboard, measure_rule
from stremn.experiments.measure import ChameleonEval
from stremn.experiments.vos import HOLDERS
from stremn.memory.rules import all_rules
from stremn.models.hub import load
from stremn.results import Record
from stremn.vos.stream import VideoSegmenter


def keep(root, study, name, scores, seed=0, **metrics):
    "Store a record with J of some clips."
    each = {f"clip-{i}": s for i, s in enumerate(scores)}
    metrics = metrics or {"J": sum(scores) / len(scores)}
    Record(name, metrics, {}, seed, 1.0, clips={"J": each} if scores else {}).save(root / study)


def row(text, name):
    "The cells of a rule."
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {name} |")]
    return [x.strip() for x in line.strip("|").split("|")]


def test_rules_are_compared_on_the_clips_that_all_have(tmp_path):
    keep(tmp_path, "forgetting-60", "oldest", [0.2, 0.4, 0.9, 0.9])
    keep(tmp_path, "forgetting-60", "oldest", [0.0, 0.0, 0.0, 0.0], seed=1)      # another network does not count
    keep(tmp_path, "zoo-60", "cutie", [0.5, 0.6])
    text = leaderboard(tmp_path)
    assert row(text, "oldest")[1] == "0.300" and row(text, "cutie")[1] == "**0.550**"
    assert "J, 60 frames (2 clips)" in text and "J, 300 frames (0 clips)" in text
    assert row(text, "oldest")[2:] == ["–"] * 5
    assert text.index("| cutie |") < text.index("| oldest |")


def test_what_the_best_does_not_beat_is_bold_and_an_oracle_never_is(tmp_path):
    best = [0.5, 0.6, 0.7, 0.8] * 5
    keep(tmp_path, "forgetting-300", "diversity", best)
    keep(tmp_path, "forgetting-300", "coverage", [s - d for s, d in zip(best, [0.1, -0.1, 0.11, -0.1] * 5)])
    keep(tmp_path, "forgetting-300", "oldest", [s - 0.1 for s in best])
    keep(tmp_path, "forgetting-300", "oracle", [s + 0.1 for s in best])
    text = leaderboard(tmp_path)
    bold = {name for name in ("diversity", "coverage", "oldest", "oracle") if "*" in row(text, name)[2]}
    assert bold == {"diversity", "coverage"}
    assert row(text, "oracle")[2] == "0.750"


def test_costs_are_shown_beside(tmp_path):
    keep(tmp_path, "decisions", "lru", [], return_hits=0.756, bytes=458_784, microseconds=1234.5)
    assert row(leaderboard(tmp_path), "lru")[1:] == ["–", "–", "–", "0.76", "459", "1,234"]


def test_an_empty_folder_names_the_way_out(tmp_path):
    refused(f"{tmp_path}: expected records of rules, found none; stremn leaderboard --run measures them",
            leaderboard, tmp_path)


def test_every_rule_is_a_row_and_holders_hold():
    rows = leader_rows()
    assert len(rows) == len({r.name for r in rows}) == len(LEADERS)
    own = {"coverage_gated"}                               # needs update keys of its own, with a gate
    assert set(LEADERS) >= {n for n in all_rules() if ":" not in n} - own
    assert {r.name for r in rows if r.test.latest == "held"} == set(HOLDERS)


@pytest.mark.parametrize("policy", ["oldest", "xmem", "coverage", "coverage_object", "unbounded"])
def test_bytes_are_those_of_a_stream(policy):
    model, clip = load("vos-tiny"), chameleon(7)
    seconds, held = decision_cost(model, clip, policy, 4, rounds=1)
    rule = "oldest" if policy == "unbounded" else policy
    stream = VideoSegmenter(model, rule, slots=1000 if policy == "unbounded" else 4, device="cpu")
    for t, frame in enumerate(clip.frames[:-1]):
        stream.step(frame, (clip.masks[0] == 1).long() if t == 0 else None)
    assert held == sum(x.nbytes for x in stream.state.memories[0][0] if isinstance(x, torch.Tensor))
    assert seconds > 0


def test_a_rule_is_measured_as_the_diagnosis_says():
    c = ChameleonEval(clips=2, first=3_000_000)
    (row,) = leader_rows(["oldest"], c)
    record = measure_rule(row, 0, load("vos-tiny"))
    assert set(record.clips) == {"return_hits", "modes_known", "regret"}
    assert record.metrics["bytes"] == 4 * (4 * 256 * 112 + 8) and record.metrics["microseconds"] > 0
    refused("rounds: expected 1 or more, found 0", decision_cost, load("vos-tiny"), chameleon(7), "oldest", 4, 0)


def test_the_command_prints_it(tmp_path, capsys):
    keep(tmp_path, "zoo-60", "lru", [0.5, 0.6])
    assert cli.main(["leaderboard", "--out", str(tmp_path)]) in (None, 0)
    assert "| lru | **0.550** |" in capsys.readouterr().out


def test_the_default_is_good_enough_on_video_and_best_on_long_clips(tmp_path):
    video = {"oldest": (0.90, 0.91), "learned": (0.88, 0.9049), "diversity": (0.91, 0.90),
             "coverage_object": (0.88, 0.906), "diversity_object": (0.88, 0.904)}
    clips = {"oldest": (0.4, 0.3), "learned": (0.9, 0.9), "diversity": (0.5, 0.4),
             "coverage_object": (0.6, 0.65), "diversity_object": (0.8, 0.8)}
    for study, metric, scores in (("choice-video", "JF", video), ("choice-clips", "J", clips)):
        for rule, both in scores.items():
            for n, value in zip((1, 5), both):
                keep(tmp_path, study, f"{rule}-every{n}", [], **{metric: value})
    assert chosen(tmp_path) == {"vos-small": ("coverage_object", 5), "vos-tiny": ("coverage_object", 5)}
    (tmp_path / "choice-clips" / "oldest-every5-s0.json").unlink()
    assert chosen(tmp_path) == {}
