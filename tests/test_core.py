"""Contracts of stremn.core: one-line errors, seeds, devices, precision, and files that are whole or absent."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from stremn.core import (
    StremnError, at_least_float32, atomic_write, check, check_apart, check_name, check_output_folder, device_name,
    fill_folder, free_threads, make_generator, named, pick_device, read_text, seed_everything,
)
from refusals import refused


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


def test_half_precision_becomes_float32_and_nothing_else_changes():
    kinds = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32,
             torch.float64: torch.float64}
    for given, expected in kinds.items():
        x = torch.arange(4.).to(given)
        assert at_least_float32(x).dtype == expected and torch.equal(at_least_float32(x).to(given), x)
    x = torch.zeros(2, dtype=torch.float64)
    assert at_least_float32(x) is x, "nothing is copied where nothing changes"


# ---- names and texts -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "/x", "", ".", "..", ".x", "x\0", "x\n", "CON", "nul.0",
                                  "com1", "x" * 221, "帧" * 80, "\ud800", None, 7, b"x"])
def test_a_name_that_cannot_name_a_file_is_refused(name):
    refused("camera: expected names that can name files, found ", check_name, name, "camera")


@pytest.mark.parametrize("name", ["00000", "-1", "1.05", "x" * 220, "帧", "12:30:05", "console", "a b", "x\u202fy", "…"])
def test_other_names_are_taken(name):
    check_name(name, "camera")


def test_frames_have_different_names():
    frames = [("a", 1), ("b", 2), ("a", 3)]
    assert list(named(frames[:2], "camera")) == frames[:2]
    refused("camera, frame a: expected frames of different names, found this one twice",
            lambda: list(named(frames, "camera")))


def test_lists_are_read_with_a_byte_order_mark_and_without(tmp_path):
    file = tmp_path / "val.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes("dogs\r\n帧\r\n".encode(encoding))
        assert read_text(file).split() == ["dogs", "帧"]
    for encoding in ("utf-16", "latin-1"):
        file.write_bytes("café\n".encode(encoding))
        refused(["val.txt: expected text in UTF-8", "save it as UTF-8"], read_text, file)


# ---- files and folders ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sync", [True, False])
def test_a_file_appears_whole_and_leaves_nothing_beside_it(tmp_path, sync):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path, sync) as hidden:
        assert hidden.parent == tmp_path and hidden.name.startswith(".") and not hidden.exists()
        hidden.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]
    with atomic_write(str(path), sync) as hidden:
        hidden.write_bytes(b"text paths, too")
    assert path.read_text() == "text paths, too"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError, OSError])
def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path, stop):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(stop), atomic_write(path) as hidden:
        hidden.write_text("half")
        raise stop
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_failing_rename_or_an_absent_file_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass                                                    # nothing was written

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as hidden:
        hidden.write_text("new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]   # the outer block ends last


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("sync"), sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    with atomic_write(tmp_path / "a") as hidden:
        hidden.write_text("x")
    with atomic_write(tmp_path / "b", sync=False) as hidden:
        hidden.write_text("x")
    assert order == ["sync", "rename", "rename"]


def test_a_written_file_has_the_usual_rights(tmp_path):
    (tmp_path / "plain").write_text("x")
    with atomic_write(tmp_path / "atomic") as hidden:
        hidden.write_text("x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_filled_and_never_replaced(tmp_path):
    "A folder that is a mount point, or has rights of its own, cannot be renamed: the same one stays, with its files."
    out = tmp_path / "masks"
    with fill_folder(out) as part:
        (part / "0.png").touch()
        assert [p for p in os.listdir(out) if not p.startswith(".")] == []
    out.chmod(0o700)
    (out / "thesis.tex").touch()
    (out / "notes").mkdir()
    before = out.stat()
    with pytest.raises(KeyboardInterrupt), fill_folder(out) as part:
        (part / "1.png").touch()
        raise KeyboardInterrupt
    assert sorted(os.listdir(out)) == ["0.png", "notes", "thesis.tex"]
    with fill_folder(out) as part:
        (part / "2.png").touch()
        (out / "meanwhile.txt").touch()
    assert sorted(os.listdir(out)) == ["2.png", "meanwhile.txt", "notes", "thesis.tex"]
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
    assert os.listdir(tmp_path) == ["masks"]
    (tmp_path / "file").touch()
    with pytest.raises(StremnError, match="expected a folder that can be made"), fill_folder(tmp_path / "file" / "x"):
        pass
    with pytest.raises(KeyboardInterrupt), fill_folder(tmp_path / "fresh"): raise KeyboardInterrupt
    assert not (tmp_path / "fresh").exists()


def test_a_result_is_not_put_over_an_earlier_one(tmp_path):
    out = tmp_path / "out"
    check_output_folder(out, overwrite=False)
    out.mkdir()
    (out / "thesis.tex").touch()
    check_output_folder(out, overwrite=False)
    (out / "0.png").touch()
    (out / "overlay.mp4").touch()
    with pytest.raises(StremnError, match="found 0.png .--overwrite replaces PNGs and overlay.mp4"):
        check_output_folder(out, False)
    check_output_folder(out, overwrite=True)
    with pytest.raises(StremnError, match="found a file"): check_output_folder(out / "0.png", True)


def test_what_is_read_is_never_replaced(tmp_path):
    frames = tmp_path / "out" / "frames"
    frames.mkdir(parents=True)
    for out in (frames, frames.parent, frames / ".." / "frames"):
        with pytest.raises(StremnError, match="expected another folder than that of the source"):
            check_apart(out, frames, "source")
        with pytest.raises(StremnError, match="expected another folder"): check_output_folder(out, True, frames)
    check_apart(tmp_path / "other", frames, "source")
    check_apart(frames / "inside", Path(frames), "source")


# ---- threads ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def machine(monkeypatch):
    "Four cores of two logical CPUs each; what is busy is a dictionary to change."
    from stremn import core
    busy = dict.fromkeys(range(8), 0.)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(core.os, "sched_getaffinity", lambda pid: set(busy), raising=False)
    monkeypatch.setattr(core, "_physical_cores", lambda cpus: [[c for c in cpus if c // 2 == k] for k in range(4)
                                                               if any(c // 2 == k for c in cpus)])
    monkeypatch.setattr(core, "_busy_shares", lambda seconds: busy)
    monkeypatch.setattr(core, "_cpu_quota", lambda: float("inf"))
    return busy


def test_a_thread_for_each_core_that_others_leave_free(machine, monkeypatch):
    assert free_threads() == 4                                       # not eight: two threads of a core share it
    machine[3] = 1.
    assert free_threads() == 3                                       # its sibling is no free core
    machine.update({2: 1., 4: .1, 6: .1})
    assert free_threads() == 3                                       # a little of everything is no core
    machine.update({4: .5, 6: .5})
    assert free_threads() == 2
    for cpu in machine:
        machine[cpu] = 1.
    assert free_threads() == 1                                       # never less
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert free_threads() == 7                                       # who says a number gets it
    for odd in ("", "0", "many", "-2"):
        monkeypatch.setenv("OMP_NUM_THREADS", odd)
        assert free_threads() == 1


def test_threads_keep_to_the_affinity_mask_and_to_a_containers_share(machine, monkeypatch):
    from stremn import core
    for cpu in (0, 1, 6, 7):
        del machine[cpu]
    assert free_threads() == 2
    monkeypatch.setattr(core, "_cpu_quota", lambda: 1.5)
    assert free_threads() == 1
    monkeypatch.setattr(core, "_cpu_quota", lambda: .5)
    assert free_threads() == 1


def test_clocks_tell_who_is_busy(monkeypatch):
    from stremn import core
    readings = iter([{0: (100, 50), 1: (100, 90)}, {0: (200, 50), 1: (200, 165), 2: (5, 5)}])
    monkeypatch.setattr(core, "_cpu_clocks", lambda: next(readings))
    assert core._busy_shares(0.) == {0: 1., 1: .25}
    monkeypatch.setattr(core, "_cpu_clocks", dict)
    assert core._busy_shares(9.) == {}                               # and nobody waits for clocks that are not there


def test_this_machine_has_threads_to_give(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= free_threads(.01) <= (os.cpu_count() or 1)
