"A memory that a person may hold on to: pins, corrections, forgetting, freezing, and files."
import json
import math
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from stremn.core import StremnError
from stremn.data.chameleon import ChameleonConfig, chameleon
from stremn.memory.bank import UpdatePolicy, evictable_slots
from stremn.memory.rules import ZOO, all_rules, find_rule, import_rule
from stremn.models.hub import load
from stremn.vos import state as states
from stremn.vos.multiscale import TestTimeConfig, make_views
from stremn.vos.stream import VideoSegmenter

CLIP = chameleon(1_000_003, ChameleonConfig(frames=40))


@pytest.fixture(scope="module")
def tiny():
    return load("vos-tiny")


def run(s, begin, end, masks=None):
    "Steps through frames of the clip; `masks` by frame."
    return [s.step(CLIP.frames[t], (masks or {}).get(t)) for t in range(begin, end)]


def started(model="vos-tiny", frames=12, masks=(0,), **options):
    s = VideoSegmenter(model, **({"slots": 4} | options))
    run(s, 0, frames, {t: CLIP.masks[t] for t in masks})
    return s


# ---- pins ----------------------------------------------------------------------------------------------------------

NAMED = [(n, "competes") for n in all_rules() if ":" not in n and n != "coverage_gated"]


@pytest.mark.parametrize("rule, latest", [*NAMED, *((n, "held") for n in ("oldest", "reservoir", "readmem", "cutie"))])
def test_a_corrected_frame_stays_under_every_rule(tiny, rule, latest):
    "Whatever the rule thinks of it: also where the rule would discard the frame, or the stride pass it by."
    policy = UpdatePolicy(rule, slots=4, latest=latest, every=3)
    s = VideoSegmenter(tiny, policy)
    run(s, 0, 16, {0: CLIP.masks[0], 4: CLIP.masks[4]})
    if find_rule(rule).capacity is None:
        assert s.state.kept == (4,) and 4 in s.memory[0].frames and 0 in s.memory[0].frames
    else:
        assert s.state.kept == ()                              # two slots have no room for it


def test_without_pins_nothing_changes(tiny):
    "The policy of a bank that keeps no frame decides as ever; so does one that keeps a frame it does not hold."
    frames = torch.tensor([[0, 4, 7, 2]])
    assert evictable_slots(frames).tolist() == [[False, True, True, True]]
    assert evictable_slots(frames, keep=frozenset({9})).tolist() == [[False, True, True, True]]
    assert evictable_slots(frames, keep=frozenset({4, 2})).tolist() == [[False, False, True, False]]


def test_the_oldest_correction_gives_way_with_a_word(tiny):
    s = started(tiny, 4)
    run(s, 4, 6, {4: CLIP.masks[4], 5: CLIP.masks[5]})
    assert s.state.kept == (4, 5)
    with pytest.warns(UserWarning, match="frame 4 is no longer kept: of 4 slots, 2 can keep a frame besides the first"):
        run(s, 6, 7, {6: CLIP.masks[6]})
    assert s.state.kept == (5, 6)
    run(s, 7, 20)
    assert {0, 5, 6} < set(s.memory[0].frames) and len(s.memory[0].frames) == 4


def test_with_two_slots_nothing_can_be_kept_and_the_correction_is_still_used(tiny):
    s = started(tiny, 4, slots=2)
    with pytest.warns(UserWarning, match="frame 4 is no longer kept: of 2 slots, 0 can keep"):
        run(s, 4, 5, {4: CLIP.masks[4]})
    assert s.memory[0].frames == (0, 4) and s.state.kept == ()


def test_a_memory_that_never_forgets_keeps_any_number(tiny):
    s = started(tiny, 10, masks=range(10), slots=math.inf)
    assert s.state.kept == tuple(range(1, 10))


def test_a_new_object_is_no_correction(tiny):
    two = torch.where(CLIP.masks[5] == 1, 0, 0)
    two[:9, :9] = 2
    s = started(tiny, 5)
    s.step(CLIP.frames[5], two)
    assert s.state.kept == () and s.objects == [1, 2]


def test_the_last_frame_of_a_stream_is_not_kept(tiny):
    s = started(tiny, 5)
    s.step(CLIP.frames[5], CLIP.masks[5], end=True)
    assert s.state.kept == ()


def test_pin_and_unpin(tiny):
    s = started(tiny, 8)
    frame = s.memory[0].frames[2]
    s.pin(frame)
    run(s, 8, 25)
    assert frame in s.memory[0].frames
    s.unpin(frame)
    assert s.state.kept == ()
    with pytest.raises(StremnError, match=f"frame {frame}: expected a pinned one, found none pinned"):
        s.unpin(frame)
    with pytest.raises(StremnError, match="frame 99: expected one that the memory holds"):
        s.pin(99)


# ---- forget, freeze, absent ----------------------------------------------------------------------------------------

def test_a_forgotten_frame_is_in_no_slot_and_the_rest_answers_as_a_memory_without_it(tiny):
    "Forgetting the newest of three frames gives the memory that had never seen it."
    policy = UpdatePolicy("oldest", slots=8)
    s, before = started(tiny, 3, policy=policy), started(tiny, 2, policy=policy)
    s.forget(2)
    assert s.memory[0].frames == (0, 1) == before.memory[0].frames
    a, b = (x.model.segment(x.state.memories[0], CLIP.frames[3][None])[0] for x in (s, before))
    assert torch.equal(a, b)
    with pytest.raises(StremnError, match="frame 2: expected one that the memory holds"):
        s.forget(2)
    s.forget(1)
    with pytest.raises(StremnError, match="frame 0: expected another frame beside it"):
        s.forget(0)


@pytest.mark.parametrize("rule", ["coverage_object", "ucb", "diversity_object"])
def test_what_a_memory_knows_besides_goes_with_a_forgotten_frame(tiny, rule):
    "Matches, masks and tallies keep to their frames: the stream goes on as if the bank compared anew."
    s = started(tiny, 12, policy=rule)
    s.forget(s.memory[0].frames[1])
    m = s.state.memories[0][0]
    assert all(x is None or x.shape[1] == 3 for x in (m.usage, m.masks, m.matches))
    other = started(tiny, 12, policy=rule)
    other.state = s.state._replace(memories=((m._replace(matches=None, matching=None),),))
    assert all(torch.equal(a, b) for a, b in zip(run(s, 12, 20), run(other, 12, 20)))


def test_a_frozen_memory_stores_nothing_and_takes_frames_of_any_size(tiny):
    s = started(tiny)
    held = s.memory[0].frames
    s.freeze()
    for scale in (1, 1.5, .75):
        frame = torch.nn.functional.interpolate(CLIP.frames[12:13], scale_factor=scale)[0]
        assert s.step(frame).shape == frame.shape[1:]
    assert s.memory[0].frames == held
    with pytest.raises(StremnError, match="mask: expected none while the memory is frozen"):
        s.step(CLIP.frames[12], CLIP.masks[12])
    s.freeze(False)
    run(s, 12, 14)
    assert 16 in s.memory[0].frames                            # twelve, three and one before it
    with pytest.raises(StremnError, match="freeze: expected an object in memory, found none"):
        VideoSegmenter(tiny).freeze()


def test_an_absent_object_is_nowhere_and_is_remembered_as_absent(tiny):
    s, other = (started(tiny, 6, policy=UpdatePolicy("oldest", slots=8)) for _ in range(2))
    prob = s.step(CLIP.frames[6], absent=[1], return_prob=True)
    assert (other.step(CLIP.frames[6]) == 1).any()             # the network would have found it
    assert float(prob[1].max()) == 0 and torch.equal(prob[0], torch.ones_like(prob[0]))
    kept = s.state.memories[0][0]
    assert kept.frames[0, -1] == 6 and not torch.equal(kept.values[0, -1], other.state.memories[0][0].values[0, -1])
    assert s.state.kept == ()


@pytest.mark.parametrize("absent, mask", [([2], None), ([1], CLIP.masks[6])])
def test_what_cannot_be_absent_is_refused(tiny, absent, mask):
    s = started(tiny, 6)
    before = s.state
    with pytest.raises(StremnError, match=r"absent: expected some of \[1\] that the mask does not show"):
        s.step(CLIP.frames[6], mask, absent=absent)
    assert s.state is before


# ---- files ---------------------------------------------------------------------------------------------------------

VIEWS = TestTimeConfig(make_views(flip=True), .3)


@pytest.mark.parametrize("options", [
    {}, {"policy": "random"}, {"policy": "reservoir"}, {"policy": "ucb"}, {"policy": "coverage_object"},
    {"policy": UpdatePolicy("oldest", slots=3, latest="held", every=2)}, {"test_time": VIEWS}, {"slots": math.inf}],
    ids=["default", "random", "reservoir", "ucb", "coverage", "held", "views", "unbounded"])
def test_a_loaded_stream_goes_on_bit_equal(tmp_path, options):
    s = started("vos-tiny", 12, masks=(0, 5), **options)
    other = VideoSegmenter.load(s.save(tmp_path / "a.memory", note="mine"))
    assert json.dumps(other.memory) == json.dumps(s.memory) and other.policy == s.policy
    assert other.state.kept == s.state.kept and other.objects == s.objects
    for t in range(12, 18):
        assert torch.equal(s.step(CLIP.frames[t]), other.step(CLIP.frames[t]))
        assert s.memory == other.memory
    for a, b in zip(s.state.memories, other.state.memories):
        assert all(torch.equal(x.keys, y.keys) and torch.equal(x.frames, y.frames) for x, y in zip(a, b))
    assert s.save(tmp_path / "b.memory").read_bytes() == other.save(tmp_path / "c.memory").read_bytes()


def test_a_memory_of_a_network_in_half_precision(tmp_path, tiny):
    model = load("vos-tiny").bfloat16()
    s = started(model, 6)
    other = VideoSegmenter.load(s.save(tmp_path / "a.memory"), model)
    assert other.state.memories[0][0].keys.dtype == torch.bfloat16
    assert torch.equal(s.step(CLIP.frames[6]), other.step(CLIP.frames[6]))


def test_a_memory_needs_its_own_network(tmp_path, tiny):
    file = started(tiny, 3).save(tmp_path / "a.memory")
    with pytest.raises(StremnError, match="expected model=, the network that this memory was made with"):
        VideoSegmenter.load(file)
    assert VideoSegmenter.load(file, tiny).objects == [1] and VideoSegmenter.load(file, "vos-tiny").objects == [1]
    with pytest.raises(StremnError, match="expected the weights that this memory was made with"):
        VideoSegmenter.load(file, "vos-small")


def test_a_rule_without_a_name_is_not_saved(tmp_path, tiny):
    own = find_rule("oldest")
    s = started(tiny, 3, policy=own)
    with pytest.raises(StremnError, match="expected a rule with a name"):
        s.save(tmp_path / "a.memory")
    assert not list(tmp_path.iterdir())


def test_a_rule_of_ones_own_is_named_and_goes_on_once_it_is_imported(rule_file, tiny):
    s = started(tiny, 9, policy="my_rules:mine")
    file = s.save(rule_file / "a.memory")
    assert header_of(file)["state"]["policy"]["rule"] == "my_rules:mine"
    del ZOO["my_rules:mine"]
    with pytest.raises(StremnError, match=r"import_rule\('my_rules:mine'\) makes it known"):
        VideoSegmenter.load(file, tiny)
    import_rule("my_rules:mine")
    other = VideoSegmenter.load(file, tiny)
    assert all(map(torch.equal, run(other, 9, 14), run(s, 9, 14))) and other.policy == s.policy


def header_of(file):
    with safe_open(file, "pt") as f: return json.loads(f.metadata()[states.FIELD])


def changed(file, path, state=None, signed=True, **plain):
    "The same tensors with another header, which is signed anew."
    tensors, state = load_file(file), header_of(file)["state"] | plain if state is None else state
    found = states.digest(tensors, state) if signed else "0"
    save_file(tensors, path, {states.FIELD: json.dumps({"state": state, "digest": found})})
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny):
    return started("vos-tiny", 6).save(tmp_path_factory.mktemp("good") / "good.memory")


@pytest.mark.parametrize("spoil, message", [
    (lambda f, p: p, "no such file|found"),
    (lambda f, p: p.write_bytes(b"") and p or p, "expected a memory saved by stremn"),
    (lambda f, p: p.write_bytes(f.read_bytes()[:-9]) and p, "expected a memory saved by stremn"),
    (lambda f, p: p.write_bytes(save({"x": torch.zeros(2)})) and p, "found a safetensors file of something else"),
    (lambda f, p: p.write_bytes(b"\xff" * 7 + b"\x7f" + b"{}" * 50) and p, "expected a memory saved by stremn"),
    (lambda f, p: save_file(load_file(f), p, {states.FIELD: "[" * 9_000}) or p, "found a header that is none"),
    (lambda f, p: changed(f, p, {}), "found a header that is none"),
    (lambda f, p: changed(f, p, {"version": 1, "seen": 3}), "found a header that is none"),
    (lambda f, p: changed(f, p, signed=False), "expected it as it was written, found it changed since"),
    (lambda f, p: changed(f, p, version=2), "a newer stremn reads it"),
    (lambda f, p: changed(f, p, policy={"rule": "oldest"}), "policy: expected"),
    (lambda f, p: changed(f, p, about={}), "expected network, seed, test_time, weights"),
], ids=["missing", "empty", "cut", "foreign", "huge-header", "deep", "no-fields", "odd-fields", "tampered", "newer",
        "policy", "about"])
def test_a_spoiled_file_is_refused_in_one_line(good, tmp_path, spoil, message):
    path = spoil(good, tmp_path / "x.memory")
    with pytest.raises(StremnError, match=message) as error: VideoSegmenter.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) or "policy" in str(error.value)


@pytest.mark.parametrize("seed", range(24))
def test_no_flipped_bit_goes_unnoticed(good, tmp_path, seed):
    "Anywhere in the file: header, tensors, digest."
    g = torch.Generator().manual_seed(seed)
    spoiled = bytearray(good.read_bytes())
    at = int(torch.randint(len(spoiled) if seed % 2 else 2000, (), generator=g))
    spoiled[at] ^= 1 << int(torch.randint(8, (), generator=g))
    path = tmp_path / "x.memory"
    path.write_bytes(spoiled)
    with pytest.raises(StremnError): VideoSegmenter.load(path)


def test_a_rule_of_an_unknown_name_is_refused(good, tmp_path):
    policy = header_of(good)["state"]["policy"] | {"rule": "os:system"}
    with pytest.raises(StremnError, match="policy: expected one of"):
        VideoSegmenter.load(changed(good, tmp_path / "x.memory", policy=policy))
    assert "os:system" not in ZOO


def test_corrections_warn_nobody_where_there_is_room(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started(tiny, 8, masks=(0, 3, 6))
