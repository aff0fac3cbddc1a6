"""Contracts of stremn.config: plain JSON data there and back, and what differs between two configs."""
import dataclasses
import enum
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from refusals import refused
from stremn.config import config_diff, from_json, to_json, with_new_defaults
from stremn.core import StremnError


@dataclass(frozen=True)
class Inner:
    "A config inside a config."
    size:tuple = (3,4)
    root:Path = Path("a")/"b"


class Mode(enum.Enum):
    "An enum in a config."
    FAST = "fast"


def test_to_json_gives_plain_data_and_always_the_same():
    found = to_json({"d":Inner(), "t":(1,(2,)), "s":{"b","a","c"}, "m":Mode.FAST, "n":np.float32(.5), "a":np.arange(3),
                   "x":torch.ones(2), "z":torch.tensor(4), "k":{1:2}, "dt":torch.float16, "dev":torch.device("cpu"),
                   "b":True, "none":None})
    assert found=={"d":{"size":[3,4],"root":"a/b"}, "t":[1,[2]], "s":["a","b","c"], "m":"fast", "n":.5, "a":[0,1,2],
                   "x":[1.,1.], "z":4, "k":{"1":2}, "dt":"torch.float16", "dev":"cpu", "b":True, "none":None}
    assert json.loads(json.dumps(found))==found and to_json(found)==found
    assert found["b"] is True


@pytest.mark.parametrize("bad", [object(), lambda: 0, {1:0,"1":0}, b"bytes", {"a":[{"b":object()}]}])
def test_to_json_refuses_what_json_cannot_hold(bad):
    with pytest.raises(StremnError, match="^config"): to_json(bad, "config")


@dataclass(frozen=True)
class Net:
    "A config with another one inside, and a field without a default."
    name:str
    inner:Inner = Inner()
    widths:tuple[int,...] = (24,64)
    slots:int|None = 6
    made:list = dataclasses.field(default_factory=list)


def test_a_config_comes_back_equal_and_hashable():
    net = Net("a", widths=(8,), slots=None)
    again = from_json(Net, json.loads(json.dumps(to_json(net))))
    assert again.widths==(8,) and again.slots is None and again.name=="a" and isinstance(again.inner, Inner)
    assert hash(again.widths)==hash((8,)), "a list in place of the tuple could not be hashed"


def test_what_does_not_fit_is_refused_by_its_place():
    refused("expected all fields of Net, found no name", from_json, Net, {})
    refused("expected fields of Net, found unknown ['width']", from_json, Net, {"name":"a", "width":3})
    refused("config.widths: expected a list, found 24", from_json, Net, {"name":"a", "widths":24})
    refused("config.widths[1]: expected int, found 'b'", from_json, Net, {"name":"a", "widths":[1,"b"]})
    refused("card.slots: expected int, found 'six'", from_json, Net, {"name":"a", "slots":"six"}, "card")


def test_stored_configs_get_the_fields_that_are_newer():
    old = {"name":"a", "inner":{"root":"x"}, "gone":1}
    whole = with_new_defaults(old, Net("b"))
    assert whole=={"name":"a", "inner":{"root":"x", "size":[3,4]}, "gone":1, "widths":[24,64], "slots":6, "made":[]}
    assert with_new_defaults({"task":old}, {"task":Net("b")})=={"task":whole}
    assert with_new_defaults([{"root":"x"}], (Inner(),))==[{"root":"x", "size":[3,4]}]
    assert "name" not in with_new_defaults({}, Net("b")), "a field without a default cannot be filled in"


def test_differences_are_named_and_free_fields_are_not():
    a = {"fit":{"lr":1., "workers":1, "save_every":5}, "task":{"x":[1,2]}}
    assert config_diff(a, json.loads(json.dumps(a)))==[]
    b = {"fit":{"lr":2., "workers":8, "save_every":9}, "task":{"x":[1,3], "z":None, "y":1}}
    assert config_diff(a, b)==["fit.lr: 1.0, now 2.0", "task.x[1]: 2, now 3", "task.y: null, now 1"]


def test_config_needs_no_network():
    code = ("import sys, stremn.config\n"
            "assert not [m for m in sys.modules if m.startswith(('stremn.models', 'stremn.nets'))]")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
