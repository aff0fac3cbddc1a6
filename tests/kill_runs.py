"""Kill a run at random moments, go on, and compare: python tests/kill_runs.py TIMES [SEED].

A run is a process of its own that is ended by SIGKILL, up to three times before it may finish.
"""
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)                                   # a process with more must not be forked

from stremn.data.chameleon import ChameleonConfig, chameleon  # noqa: E402
from stremn.models.hub import load  # noqa: E402
from stremn.vos import files  # noqa: E402
from stremn.vos.resume import RUN, Checkpoints  # noqa: E402
from stremn.vos.stream import VideoSegmenter  # noqa: E402

FRAMES = 30


def child(model, clip, out, policy) -> int:
    "Segment in a process of its own; its number."
    pid = os.fork()
    if pid: return pid
    try:
        files.Checkpoints = partial(Checkpoints, frames=3)  # often enough for a short clip
        stream = ((f"{t:05d}", frame, None) for t, frame in enumerate(clip.frames))
        segmenter = VideoSegmenter(model, policy, seed=3)
        files.segment_video(segmenter, stream, clip.masks[0], out, resume=True, progress=False)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def wait(pid) -> int:
    "The exit status; -9 after SIGKILL."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def pictures(out) -> dict[str, bytes]:
    "What a person gets."
    return {p.name: p.read_bytes() for p in sorted(out.iterdir())}


def main(times: int, seed: int = 0) -> None:
    "Raise where a resumed run differs; say how often a run was killed."
    draw, kills, held = random.Random(seed), 0, 0
    model, clip = load("vos-tiny"), chameleon(1_000_003, ChameleonConfig(frames=FRAMES))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        whole, took = {}, {}
        for policy in ("diversity_object", "random"):
            began = time.perf_counter()
            assert wait(child(model, clip, root / policy, policy)) == 0
            took[policy], whole[policy] = time.perf_counter() - began, pictures(root / policy)
        for i in range(times):
            policy = draw.choice(sorted(whole))
            out = root / f"run{i}"
            for _ in range(draw.randint(1, 3)):
                pid = child(model, clip, out, policy)
                time.sleep(draw.uniform(0, took[policy]))
                os.kill(pid, signal.SIGKILL)
                if wait(pid) == 0: break                   # it was faster
                kills += 1
                held += (out / RUN).exists()
            if pictures_differ := not out.exists() or (out / RUN).exists() or len(pictures(out)) < FRAMES + 1:
                assert wait(child(model, clip, out, policy)) == 0
            assert pictures(out) == whole[policy], (i, policy, pictures_differ)
            assert not any(p.name.startswith(".") for p in out.rglob("*"))
    print(f"{times} runs killed {kills} times ({held} times with something to go on from), all bit-equal")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
