"""Random video, and what every network that predicts must keep to."""
import torch

from stremn.core import make_generator


def video(V=1, T=8, C=1, H=8, W=12, seed=0, dtype=torch.float64):
    "Random frames in [0,1]."
    return torch.rand(V, T, C, H, W, generator=make_generator(seed), dtype=dtype)


@torch.no_grad()
def depends_on_the_past_only(model):
    "Change all frames from t on: answers up to t stay, the next one does not."
    frames = video(1, 10)
    ask = lambda f: model(f[:, :3], 7, f[:, 3:], 1., warm_up=True)                # noqa: E731, answers for frames 1..9
    before = ask(frames)
    for t in range(1, 10):
        other = frames.clone()
        other[:, t:] = video(1, 10, seed=t)[:, t:]
        same = (ask(other) == before).flatten(2).all(-1)[0].tolist()
        assert same[:t] == [True] * t and (t == 9 or not same[t])
