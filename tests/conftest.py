"""Shared fixtures: real data, a small network, synthetic clips; one thread per process, for tests side by side."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="module")
def one_thread():
    "For bits that are compared with what one thread made: on some machines the order of a sum follows the threads."
    from stremn.train.profile import threads
    with threads(1):
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    "Folder of real clips (`STREMN_DATA`, default ../shared/data); the test is skipped where it is absent."
    root = Path(os.environ.get("STREMN_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not root.is_dir():
        pytest.skip(f"no real data at STREMN_DATA={root}")
    return root


@pytest.fixture(scope="module")
def model():
    "The tiny untrained network of `helpers.network`."
    from helpers import network
    return network()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    "Weights file of a small network: what it draws is nonsense, what it writes must be right."
    from helpers import TINY_VOS

    from stremn.models.hub import save_weights
    from stremn.models.vos import VOSModel
    torch.manual_seed(0)
    return save_weights(VOSModel(TINY_VOS), tmp_path_factory.mktemp("weights") / "random.safetensors", {"steps": 0})


@pytest.fixture
def rule_file(tmp_path, monkeypatch):
    "A folder to stand in, with the rules of `helpers.own_rules` in a file; the search path stays as it is."
    from helpers import own_rules
    monkeypatch.chdir(tmp_path)
    paths = list(sys.path)
    with own_rules(tmp_path):
        yield tmp_path
        assert sys.path == paths


@pytest.fixture(scope="module")
def clips(request):
    "Five Chameleon clips of the test module's own `CLIP`."
    from stremn.data.chameleon import chameleon_batch
    return chameleon_batch(range(5), request.module.CLIP)
