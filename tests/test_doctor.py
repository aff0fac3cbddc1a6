"The doctor: what is there is said as it is, and nothing that is broken ends in a traceback."
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

import stremn
from stremn import doctor

NAMES = ["stremn", "python", "torch", "torchvision", "numpy", "pillow", "av", "accelerate", "safetensors", "processor",
         "gpu", "memory", "disk", "weights", "mp4", "extras", "segmenting"]


def answers(text):
    "Name -> answer."
    return {line[:13].strip(): line[13:] for line in text.splitlines()}


def test_one_screen_of_what_is_there():
    text, works = doctor.report()
    found = answers(text)
    assert works and [n.split()[0] for n in found] == NAMES and len(text.splitlines()) <= 24
    assert found["torch"] == torch.__version__ and found["numpy"] == np.__version__
    assert found["stremn"].startswith(stremn.__version__) and found["python"].startswith(platform.python_version())
    assert [w.split()[0] for w in found["weights"].split(", ")] == stremn.available()
    assert found["mp4 with"] == "libx264" and found["segmenting"].startswith("works: 2 frames")


@pytest.mark.parametrize(("name", "raises", "line"), [
    ("encoder", LookupError("libx264; --no-video does without"), "mp4 with"),
    ("gpus", RuntimeError("driver\ntoo old"), "gpu"), ("free_memory", AttributeError("sysconf"), "memory"),
    ("free_disk", OSError(2, "no such folder"), "disk"), ("processor", OSError("no cpuinfo"), "processor"),
    ("extras", ModuleNotFoundError("x"), "extras"), ("own_version", ValueError(), "stremn")])
def test_what_is_broken_is_an_answer_of_one_line(monkeypatch, name, raises, line):
    def fail():
        raise raises
    monkeypatch.setattr(doctor, name, fail)
    text, works = doctor.report()
    assert works and answers(text)[line].startswith("missing: ") and len(text.splitlines()) == len(NAMES)


def test_without_a_decoder_or_weights_it_says_what_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr("stremn.models.hub.FOLDER", tmp_path)
    monkeypatch.setattr(doctor, "FOLDER", tmp_path)
    monkeypatch.setattr(doctor, "EXTRAS", {"one": ("torch",), "two": ("torch", "no_such_module")})
    text, works = doctor.report()
    found = answers(text)
    assert not works and found["segmenting"].startswith("does not work: missing: weights: expected")
    assert found["weights"].startswith("missing: no weights in")
    assert found["extras"] == "one, two (lacks no_such_module)"


def test_without_torch_there_is_no_traceback():
    "A fresh process in which PyTorch, numpy and PyAV cannot be imported."
    code = ("import sys\nclass Lacks:\n    def find_spec(self, name, *where):\n"
            "        if name in ('torch', 'numpy', 'av'): raise ImportError(f'no module {name}')\n"
            "sys.meta_path.insert(0, Lacks())\nfrom stremn import cli\ncli.main(['doctor'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    found = answers(done.stdout)
    assert (done.returncode, done.stderr) == (1, "") and len(found) == len(NAMES)
    assert all(found[n].startswith("missing: no module") for n in ("torch", "numpy", "av", "gpu"))
    assert found["segmenting"].startswith("does not work") and found["stremn"].startswith(stremn.__version__ + ", ")
    assert "vos-tiny" in found["weights"]


def test_gpus_are_named(monkeypatch):
    class Card:
        name, total_memory = "Model X", 24_000_000_000
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Card)
    assert doctor.gpus() == "Model X (24.0 GB), Model X (24.0 GB), without bf16"


def test_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: False)
    sizes = {"SC_AVPHYS_PAGES": 1000, "SC_PHYS_PAGES": 4000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(doctor.os, "sysconf", sizes.__getitem__)
    assert doctor.free_memory() == "4.1 MB free of 16.4 MB"


def test_sizes_have_units():
    sizes = {12: "12 bytes", 8_900: "8.9 kB", 1_470_000: "1.47 MB", 139e9: "139.0 GB", 2e12: "2,000.0 GB"}
    assert {n: doctor.size_text(n) for n in sizes} == sizes
