"""Contracts of the read: attention in numpy float64, whatever the sizes and options; safe in half precision."""
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stremn.core import StremnError, make_generator
from stremn.memory.read import affinity, as_dot_product, pixels, read
from stremn.memory.update import Memory


def memory_of(keys, values):
    "A memory of these keys and values."
    return Memory(keys, values, keys[:, :, :1], torch.arange(keys.shape[1]).repeat(len(keys), 1), keys.shape[1])


def draw(seed, dtype=torch.float32, **sizes):
    "A random query and memory of random sizes."
    gen, g = np.random.default_rng(seed), make_generator(seed)
    B, n, Dk, Dv, H, W, h, w = (sizes.get(k, int(gen.integers(1, 6)))
                                for k in ("B", "n", "Dk", "Dv", "H", "W", "h", "w"))
    return (torch.randn(B, Dk, h, w, generator=g).to(dtype),
            memory_of(torch.randn(B, n, Dk, H, W, generator=g).to(dtype),
                      torch.randn(B, n, Dv, H, W, generator=g).to(dtype)))


def judge(query, memory, similarity="dot", top_k=None, scale=None, locality=0.):
    "Attention in numpy float64, pixel by pixel; answer and weights."
    q, k, v = (x.detach().double().numpy() for x in (query, memory.keys, memory.values))
    B, n, Dk, H, W = k.shape
    P, M = q.shape[2] * q.shape[3], n * H * W
    answer, weights = np.zeros((B, v.shape[2], P)), np.zeros((B, P, M))
    scale = 1 / math.sqrt(Dk) if scale is None else scale
    for b in range(B):
        where = [(i, r, c) for i in range(n) for r in range(H) for c in range(W)]
        keys = [k[b, i, :, r, c] for i, r, c in where]
        for p in range(P):
            x = q[b, :, p // q.shape[3], p % q.shape[3]]
            likeness = np.array([x @ key if similarity == "dot" else -((x - key) ** 2).sum() for key in keys])
            apart = np.array([(p // q.shape[3] - r) ** 2 + (p % q.shape[3] - c) ** 2 for _, r, c in where])
            logits = scale * likeness - locality * apart
            e = np.exp(logits - logits.max())
            if top_k is not None:
                e[np.argsort(-logits)[top_k:]] = 0
            weights[b, p] = e / e.sum()
            answer[b, :, p] = sum(w * v[b, i, :, r, c] for w, (i, r, c) in zip(weights[b, p], where))
    return answer.reshape(B, -1, *q.shape[2:]), weights


@pytest.mark.parametrize("seed", range(12))
def test_equals_numpy_in_float64(seed):
    query, memory = draw(seed, torch.float64)
    for options in ({}, {"scale": 1.}, {"similarity": "l2"}, {"similarity": "l2", "scale": .7}, {"top_k": 1},
                    {"top_k": 3}, {"similarity": "l2", "top_k": 2, "scale": 2.}, {"top_k": 10**6}):
        answer, weights = judge(query, memory, **options)
        np.testing.assert_allclose(read(query, memory, **options).numpy(), answer, atol=1e-10)
        np.testing.assert_allclose(affinity(query, memory, **options).numpy(), weights, atol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_locality_equals_numpy_in_float64(seed):
    query, memory = draw(seed, torch.float64, H=4, W=3, h=4, w=3)
    for options in ({}, {"similarity": "l2", "scale": .7}, {"top_k": 3}, {"similarity": "l2", "top_k": 10**6}):
        for locality in (.1, 1., 30.):
            answer, weights = judge(query, memory, **options, locality=locality)
            for equal in (False, True):
                told = read(query, memory, **options, locality=locality, equal_widths=equal)
                np.testing.assert_allclose(told.numpy(), answer, atol=1e-10)
            np.testing.assert_allclose(affinity(query, memory, **options, locality=locality), weights, atol=1e-10)


@pytest.mark.parametrize("similarity", ["dot", "l2"])
@pytest.mark.parametrize("Dk, Dv", [(3, 8), (7, 8), (8, 8), (8, 3)])
def test_equal_widths_change_no_answer_and_no_gradient(similarity, Dk, Dv):
    query, memory = draw(1, torch.float64, Dk=Dk, Dv=Dv)
    given = [x.requires_grad_() for x in (query, memory.keys, memory.values)]
    both = [read(query, memory, similarity, equal_widths=wide) for wide in (False, True)]
    torch.testing.assert_close(*both)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), given) for out in both)):
        torch.testing.assert_close(a, b)


class Called(TorchDispatchMode):
    "Names of the operations that were carried out."
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("similarity", ["dot", "l2"])
@pytest.mark.parametrize("Dk, Dv", [(3, 8), (8, 8), (8, 3)])
def test_equal_widths_take_the_kernel_without_a_table(similarity, Dk, Dv):
    query, memory = draw(1, Dk=Dk, Dv=Dv)
    for wide in (False, True):
        with torch.no_grad(), Called() as called:
            read(query, memory, similarity, equal_widths=wide)
        assert any("flash" in name for name in called.names) is wide, called.names


@pytest.mark.parametrize("similarity", ["dot", "l2"])
@pytest.mark.parametrize("top_k, locality", [(None, 0.), (3, 0.), (None, .5), (3, .5)])
def test_gradients(similarity, top_k, locality):
    h, w = (2, 2) if locality else (1, 3)
    query, memory = draw(3, torch.float64, B=2, n=2, Dk=3, Dv=2, H=2, W=2, h=h, w=w)
    def f(q, k, v): return read(q, memory._replace(keys=k, values=v), similarity, top_k, locality=locality)
    inputs = [x.clone().requires_grad_() for x in (query, memory.keys, memory.values)]
    assert torch.autograd.gradcheck(f, inputs)


def test_float32_is_close_and_any_grid_is_allowed():
    for seed in range(5):
        query, memory = draw(seed, H=7, W=3, h=2, w=9)
        for similarity in ("dot", "l2"):
            np.testing.assert_allclose(read(query, memory, similarity).numpy(), judge(query, memory, similarity)[0],
                                       atol=1e-5)
            assert read(query, memory, similarity).shape == (len(query), memory.values.shape[2], 2, 9)


def test_pixels_go_slot_by_slot():
    x = torch.randn(2, 3, 4, 5, 6)
    for i, r, c in ((0, 0, 0), (2, 4, 5), (1, 3, 2)):
        assert torch.equal(pixels(x)[:, i * 30 + r * 6 + c], x[:, i, :, r, c])


def test_rows_sum_to_one_and_top_k_keeps_k():
    query, memory = draw(1, B=2, n=3, H=4, W=4, h=4, w=4)
    for similarity in ("dot", "l2"):
        for k in (None, 1, 5, 48, 100):
            w = affinity(query, memory, similarity, k)
            torch.testing.assert_close(w.sum(-1), torch.ones(2, 16))
            assert k is None or int(w.count_nonzero(-1).max()) <= k


@pytest.mark.parametrize("similarity", ["dot", "l2"])
@pytest.mark.parametrize("top_k", [None, 7])
def test_order_of_slots_and_of_pixels_does_not_matter(similarity, top_k):
    query, memory = draw(2, torch.float64, B=2, n=5, Dk=4, Dv=3, H=3, W=4)
    g, out = make_generator(0), read(query, memory, similarity, top_k)
    for _ in range(5):
        slots, rows, columns = (torch.randperm(k, generator=g) for k in (5, 3, 4))
        shuffled = memory._replace(**{x: getattr(memory, x)[:, slots][:, :, :, rows][..., columns]
                                      for x in ("keys", "values")})
        torch.testing.assert_close(read(query, shuffled, similarity, top_k), out)


def test_a_copied_slot_doubles_its_weight():
    query, memory = draw(4, torch.float64, B=1, n=3, H=3, W=3)
    once = affinity(query, memory).unflatten(-1, (3, -1)).sum(-1)
    twice = affinity(query, memory_of(*(x[:, [0, 1, 1, 2]] for x in memory[:2]))).unflatten(-1, (4, -1)).sum(-1)
    torch.testing.assert_close(twice[..., 1] + twice[..., 2], 2 * once[..., 1] / (1 + once[..., 1]))


def test_l2_is_the_distance_up_to_a_constant_a_row():
    q, k = torch.randn(2, 5, 7, dtype=torch.double), torch.randn(2, 6, 7, dtype=torch.double)
    a, b = as_dot_product(q, k, "l2")
    constant = a @ b.transpose(1, 2) + torch.cdist(q, k) ** 2
    torch.testing.assert_close(constant, q.pow(2).sum(-1, keepdim=True).expand(2, 5, 6))


def test_operations_are_those_of_appendix_a():
    for n, H, W, Dk, Dv in ((1, 4, 4, 3, 5), (6, 5, 3, 8, 8), (3, 2, 7, 4, 16)):
        query, memory = draw(0, B=2, n=n, Dk=Dk, Dv=Dv, H=H, W=W, h=H, w=W)
        for similarity, extra in (("dot", 0), ("l2", 1)):
            with FlopCounterMode(display=False) as counter:
                read(query, memory, similarity)
            assert counter.get_total_flops() == 2 * 2 * n * (H * W) ** 2 * (Dk + extra + Dv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 5])
def test_half_precision(dtype, top_k):
    for similarity in ("dot", "l2"):
        query, memory = draw(5, dtype, B=2, n=3, Dk=32, Dv=4, H=4, W=4, h=3, w=3)
        out = read(query, memory, similarity, top_k)
        want = read(query.float(), memory._replace(keys=memory.keys.float(), values=memory.values.float()), similarity,
                    top_k)
        assert out.dtype == dtype and (out.float() - want).abs().mean() < .02
        if top_k is None: # with top_k the k-th best and the next may change places in 16 bits
            torch.testing.assert_close(out.float(), want, atol=.1, rtol=.1)


def test_l2_of_long_keys_stays_finite_in_float16():
    "|k|^2 = 128*25^2 = 80,000 is beyond float16."
    query, memory = draw(6, B=1, n=2, Dk=128, Dv=3, H=2, W=2, h=2, w=2)
    memory = memory._replace(keys=(25 * memory.keys.sign()).half(), values=memory.values.half())
    out = read(memory.keys[:, 0], memory, "l2")
    torch.testing.assert_close(out, memory.values[:, 0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("top_k", [None, 3])
def test_autocast(top_k):
    query, memory = draw(7, B=1, n=2, Dk=8, Dv=8, H=3, W=3)
    for similarity in ("dot", "l2"):
        with torch.autocast("cpu", torch.bfloat16):
            out = read(query, memory, similarity, top_k)
        assert (out.float() - read(query, memory, similarity, top_k)).abs().mean() < .03


def test_scale_may_be_a_tensor_with_a_gradient():
    query, memory = draw(8, torch.float64, n=3, H=3, W=3)
    scale = torch.tensor(.8, dtype=torch.double, requires_grad=True)
    for top_k in (None, 4):
        torch.testing.assert_close(read(query, memory, top_k=top_k, scale=scale),
                                   read(query, memory, top_k=top_k, scale=.8))
    read(query, memory, scale=scale).pow(2).sum().backward()
    assert scale.grad.abs() > 0


def test_wrong_calls_are_refused_in_one_line():
    query, memory = draw(9, B=2, n=3, Dk=4, H=3, W=3)
    for call, words in ((lambda: read(query, memory, "cosine"), "similarity: expected one of dot, l2, found 'cosine'"),
                        (lambda: read(query, memory, top_k=0), "top_k: expected at least 1"),
                        (lambda: read(query[:1], memory), r"query_key: expected \(2,4,H,W\)"),
                        (lambda: read(query[:, :3], memory, "l2"), "query_key: expected"),
                        (lambda: affinity(query[0], memory), "query_key: expected")):
        with pytest.raises(StremnError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
