"Contracts of `stremn.memory.similarity`: Eq. 1 against numpy loops, gradients, precision, memory."
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stremn.core import StremnError
from stremn.memory.similarity import best_match_similarity, unit_vectors


def judge(new, slots):
    "Eq. 1 in float64 numpy, one pixel pair at a time; a zero pixel matches everything with 0."
    new, slots = new.double().numpy(), slots.double().numpy()
    B, K, C, P = *slots.shape[:3], new[0, 0].size
    scores = np.zeros((B, K))
    for b in range(B):
        for k in range(K):
            for p in new[b].reshape(C, -1).T:
                cosines = []
                for q in slots[b, k].reshape(C, -1).T:
                    norms = np.sqrt((p * p).sum()) * np.sqrt((q * q).sum())
                    cosines.append((p * q).sum() / norms if norms > 0 else 0.)
                scores[b, k] += max(cosines) / P
    return torch.from_numpy(scores)


def all_pairs(new, slots):
    "Eq. 1 with every pixel pair, left to autograd."
    p = torch.nn.functional.normalize(new.flatten(2), dim=1)
    q = torch.nn.functional.normalize(slots.flatten(3), dim=2)
    return torch.einsum("bcp,bkcq->bkpq", p, q).amax(-1).mean(-1)


def maps(B, K, C, H, W, seed, Hq=None, Wq=None, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, C, H, W, generator=g, dtype=dtype),
            torch.randn(B, K, C, Hq or H, Wq or W, generator=g, dtype=dtype))


def gradients(similarity, new, slots, seed=0):
    inputs = new.clone().requires_grad_(), slots.clone().requires_grad_()
    scores = similarity(*inputs)
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((scores * upstream).sum(), inputs)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_equal_the_loops(seed):
    rng = np.random.default_rng(seed)
    B, K, C, H, W = (int(rng.integers(1, top)) for top in (4, 5, 7, 5, 5))
    new, slots = maps(B, K, C, H, W, seed)
    new *= 10.**rng.integers(-3, 4)                                  # lengths must not matter
    if seed % 3 == 0:
        new[0, :, 0, 0] = 0
        slots[0, 0, :, -1, -1] = 0
    want = judge(new, slots)
    for chunk in (1, 3, H * W, 1000, None):
        torch.testing.assert_close(best_match_similarity(new, slots, chunk=chunk), want, rtol=0, atol=1e-12)


def test_slots_may_have_another_size():
    new, slots = maps(2, 3, 4, 2, 3, seed=0, Hq=4, Wq=2)
    torch.testing.assert_close(best_match_similarity(new, slots), judge(new, slots), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("chunk", [2, 7, None])
def test_gradients_equal_those_of_all_pairs(seed, chunk):
    new, slots = maps(2, 3, 5, 4, 3, seed)
    mine = gradients(lambda a, b: best_match_similarity(a, b, chunk=chunk), new, slots)
    for ours, theirs in zip(mine, gradients(all_pairs, new, slots)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradcheck_away_from_ties(seed):
    inputs = [x.requires_grad_() for x in maps(1, 2, 3, 2, 3, seed)]
    assert torch.autograd.gradcheck(lambda a, b: best_match_similarity(a, b, chunk=4), inputs)


def test_zero_pixels_are_finite_and_receive_no_gradient():
    new, slots = maps(1, 2, 4, 3, 3, seed=1, dtype=torch.float32)
    new[0, :, 1, 1] = 0
    slots[0, 1, :, 2, 0] = 0
    of_new, of_slots = gradients(best_match_similarity, new, slots)
    assert of_new.isfinite().all() and of_slots.isfinite().all()
    assert (of_new[0, :, 1, 1] == 0).all() and (of_slots[0, 1, :, 2, 0] == 0).all()
    assert of_new[0, :, 0, 0].abs().sum() > 0                        # the others do learn


def test_all_zero_maps_score_zero():
    new, slots = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 3, 2, 2)
    assert torch.equal(best_match_similarity(new, slots), torch.zeros(1, 2))
    for g in gradients(best_match_similarity, new, slots):
        assert torch.equal(g, torch.zeros_like(g))


def test_a_nan_is_not_hidden():
    new, slots = maps(1, 2, 3, 2, 2, seed=0)
    slots[0, 1, 0, 0, 0] = torch.nan
    scores = best_match_similarity(new, slots)
    assert scores[0, 0].isfinite() and scores[0, 1].isnan()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6),
                                              (torch.float16, 1e-4), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("scale", [1e-2, 1., 1e4])
def test_precision(dtype, tolerance, scale):
    new, slots = maps(2, 3, 64, 6, 6, seed=2)
    got = best_match_similarity((scale * new).to(dtype), (scale * slots).to(dtype))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), best_match_similarity(new, slots), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_finite_and_of_the_inputs_dtype(dtype):
    new, slots = maps(1, 2, 16, 4, 4, seed=3, dtype=torch.float32)
    exact = gradients(best_match_similarity, new, slots)
    for x, g, want in zip((new, slots), gradients(best_match_similarity, new.to(dtype), slots.to(dtype)), exact):
        assert g.dtype == dtype and g.isfinite().all() and g.shape == x.shape
        assert torch.nn.functional.cosine_similarity(g.float().flatten(), want.flatten(), 0) > .99


def test_autocast_does_not_round_the_scores():
    new, slots = maps(1, 3, 32, 5, 5, seed=4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = best_match_similarity(new, slots)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, best_match_similarity(new, slots), rtol=0, atol=1e-4)


def test_unit_has_length_one_in_every_direction_and_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for dim in (0, 1, -1):
            x = (1e3 * torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
            length = unit_vectors(x, dim).norm(dim=dim)
            torch.testing.assert_close(length, torch.ones_like(length), rtol=0, atol=1e-5)


def test_range_self_and_shift():
    new, slots = maps(3, 4, 5, 6, 6, seed=5)
    scores = best_match_similarity(new, slots)
    assert (scores.abs() <= 1 + 1e-12).all()
    for shift in ((0, 0), (1, 4), (3, 5)):
        moved = new.roll(shift, (-2, -1))[:, None]
        ones = torch.ones(3, 1, dtype=torch.float64)
        torch.testing.assert_close(best_match_similarity(new, moved), ones, rtol=0, atol=1e-12)
        torch.testing.assert_close(best_match_similarity(new, slots.roll(shift, (-2, -1))), scores, rtol=0, atol=1e-12)


def test_not_symmetric():
    new, _ = maps(1, 1, 8, 4, 4, seed=6)
    half = new.clone()
    half[..., 2:] = new[..., :2]
    assert best_match_similarity(half, new[:, None]).item() == pytest.approx(1)
    assert best_match_similarity(new, half[:, None]).item() < .95


def test_rows_and_slots_do_not_see_each_other():
    new, slots = maps(3, 4, 5, 3, 3, seed=7)
    whole = best_match_similarity(new, slots)
    for b in range(3):
        for k in range(4):
            alone = best_match_similarity(new[b:b + 1], slots[b:b + 1, k:k + 1])
            torch.testing.assert_close(alone[0, 0], whole[b, k], rtol=0, atol=1e-13)


def test_inputs_are_left_alone_and_calls_repeat():
    new, slots = maps(2, 3, 4, 5, 5, seed=8, dtype=torch.float32)
    before = new.clone(), slots.clone()
    first, second = best_match_similarity(new, slots), best_match_similarity(new, slots)
    assert torch.equal(first, second) and torch.equal(new, before[0]) and torch.equal(slots, before[1])


def test_non_contiguous_maps():
    new, slots = maps(2, 3, 4, 5, 6, seed=9)
    turned = best_match_similarity(new.transpose(2, 3), slots.transpose(3, 4))
    torch.testing.assert_close(turned, best_match_similarity(new, slots), rtol=0, atol=1e-13)


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return made


@pytest.mark.parametrize("chunk", [16, 50, 256])
def test_memory_is_bounded_by_the_chunk(chunk):
    B, K, C, H, W = 2, 3, 4, 16, 16
    P = H * W
    new, slots = (x.requires_grad_() for x in maps(B, K, C, H, W, seed=0, dtype=torch.float32))
    with Largest() as forward:
        scores = best_match_similarity(new, slots, chunk=chunk)
    with Largest() as backward:
        scores.sum().backward()
    assert forward.elements == B * K * max(chunk, C) * P
    assert backward.elements <= B * K * C * P
    with Largest() as naive:
        all_pairs(new, slots)
    assert naive.elements == B * K * P * P                           # the instrument can see what we avoid


@pytest.mark.parametrize("new, slots", [((2, 4, 3, 3), (2, 4, 3, 3)), ((4, 3, 3), (2, 5, 4, 3, 3)),
                                        ((2, 4, 3, 3), (3, 5, 4, 3, 3)), ((2, 4, 3, 3), (2, 5, 6, 3, 3))])
def test_wrong_shapes_are_named(new, slots):
    with pytest.raises(StremnError) as error:
        best_match_similarity(torch.zeros(new), torch.zeros(slots))
    message = str(error.value)
    assert str(new) in message and str(slots) in message and "expected new (B,C,H,W)" in message and "\n" not in message
