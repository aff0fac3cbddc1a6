"""Contracts of fusion: Eqs. 6-12 in both printings, who receives what, and a bank that without it is a memory bank."""
import copy
import itertools
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stremn.core import StremnError, make_generator
from stremn.memory.bank import BankConfig, MemoryBank
from stremn.memory.fusion import (
    PRINTINGS, FeatureBank, Fusion, FusionBank, FusionConfig, fam, fuse, target_slots, with_fusion,
)
from stremn.memory.rules import RULES
from stremn.memory.similarity import best_match_similarity
from stremn.models.vos import VOSConfig, VOSModel

SMALL = BankConfig(memory_channels=3, query_channels=4, key_channels=3, value_channels=2, update_channels=2, slots=4)
TARGETS = ("least_similar", "most_similar", "all")


def randn(*shape, seed=0):
    "Normal numbers in double precision."
    return torch.randn(*shape, generator=make_generator(seed), dtype=torch.double)


# ---- FAM -----------------------------------------------------------------------------------------------------------

def eq7(x, y, scale=1.):
    "Eq. 7 with Python loops."
    out = torch.empty_like(x)
    for b in range(len(x)):
        stored = y[b].flatten(1).T
        for r, c in itertools.product(range(x.shape[2]), range(x.shape[3])):
            weight = torch.stack([torch.exp(scale * torch.dot(x[b, :, r, c], q)) for q in stored])
            out[b, :, r, c] = sum(w * q for w, q in zip(weight, stored)) / weight.sum()
    return out


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (2, 3, 2, 3, 3, 2), (1, 5, 4, 4, 1, 2), (3, 2, 1, 5, 2, 2)])
@pytest.mark.parametrize("scale", [None, .5, 4., 0.])
def test_fam_equals_loops(shape, scale):
    B, C, H, W, h, w = shape
    x, y = randn(B, C, H, W), randn(B, C, h, w, seed=1)
    torch.testing.assert_close(fam(x, y, scale), eq7(x, y, 1. if scale is None else scale), atol=1e-12, rtol=1e-12)


def test_fam_gradients_and_limits():
    x, y = randn(1, 2, 2, 2).requires_grad_(), randn(1, 2, 1, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: fam(x, y, 2.), (x, y))
    mean = y.flatten(2).mean(2)[:, :, None, None].expand_as(x)
    torch.testing.assert_close(fam(x, y, 0.), mean)                          # no scale: the mean of y
    nearest = torch.einsum("bcp,bcq->bpq", x.flatten(2), y.flatten(2)).argmax(-1)
    copied = torch.stack([m[:, i] for m, i in zip(y.flatten(2), nearest)]).unflatten(-1, (2, 2))
    torch.testing.assert_close(fam(x, y, 1e6), copied)                       # a large one: a copy of the best match
    order = torch.randperm(3, generator=make_generator(2))
    torch.testing.assert_close(fam(x, y), fam(x, y[..., order]))             # the pose of y does not matter
    torch.testing.assert_close(fam(x.flip(-1), y), fam(x, y).flip(-1))       # the pose of x is the pose of the answer


def test_fam_stays_inside_y_and_survives_half_precision():
    x, y = randn(2, 6, 5, 5), randn(2, 6, 4, 4, seed=1)
    low, high = (f(y, (2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    assert ((fam(x, y) >= low - 1e-12) & (fam(x, y) <= high + 1e-12)).all()
    for dtype in (torch.float16, torch.bfloat16):
        a, b = x.to(dtype), y.to(dtype)
        assert (fam(a, b).double() - fam(a.double(), b.double())).abs().max() < .05


def test_fam_errors():
    for x, y in ((randn(1, 2, 3, 3), randn(1, 3, 3, 3)), (randn(2, 2, 3, 3), randn(1, 2, 3, 3)),
                 (randn(2, 3, 3), randn(2, 3, 3))):
        with pytest.raises(StremnError, match="fam: expected x"):
            fam(x, y)


# ---- the gates -----------------------------------------------------------------------------------------------------

def printed(name, i, j, f, g, h, scale=1.):
    "Eqs. 6-12 (main text), 1-7 (supplement), line by line; mended: the main text with the supplement's Eq. 3."
    def cat(*maps): return torch.cat(maps, 1)
    if name == "supplement":
        r = torch.sigmoid(f(cat(i, eq7(i, j, scale))))                       # (3) with X_j^A = FAM(X_i, X_j)
        a = eq7(i, r * i, scale)                                             # (5)
        z = torch.sigmoid(h(cat(a, i)))                                      # (6)
    else:
        r = torch.sigmoid(f(cat(i, eq7(i, i if name == "main" else j, scale))))  # (6), (8)
        a = eq7(j, r * i, scale)                                             # (9), (10)
        z = torch.sigmoid(h(cat(a, j)))                                      # (11)
    return (1 - z) * j + z * torch.tanh(g(cat(a, j))), r, z                  # (12)


@pytest.mark.parametrize("printing", PRINTINGS)
@pytest.mark.parametrize("scale", [None, 3.])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_fusion_equals_the_printed_lines(printing, scale, kernel):
    torch.manual_seed(kernel)
    net = Fusion(3, printing=printing, scale=scale, kernel=kernel).double()
    i, j = randn(2, 3, 4, 3), randn(2, 3, 4, 3, seed=1)
    for ours, theirs in zip(net(i, j), printed(printing, i, j, net.f, net.g, net.h, scale or 1.)):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_printings_differ():
    torch.manual_seed(0)
    convs = [nn.Conv2d(6, 3, 3, padding=1).double() for _ in range(3)]
    i, j = randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    out = [fuse(i, j, *convs, name).target for name in PRINTINGS]
    assert min((a - b).abs().max() for a, b in itertools.combinations(out, 2)) > 1e-4
    one = [fuse(i, i, *convs, name).target for name in PRINTINGS]    # a template fused into its own copy: no difference
    torch.testing.assert_close(one[0], one[1])
    torch.testing.assert_close(one[0], one[2])


@pytest.mark.parametrize("printing", PRINTINGS)
def test_fusion_gradients(printing):
    torch.manual_seed(0)
    net = Fusion(2, printing=printing).double()
    i, j = randn(1, 2, 2, 3).requires_grad_(), randn(1, 2, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, j: net(i, j).target, (i, j))
    net(i, j).target.pow(2).sum().backward()
    assert all(w.grad.abs().sum() > 0 for w in net.parameters())


def test_limits_of_the_gate():
    i, j = 3 * randn(2, 3, 4, 4), 3 * randn(2, 3, 4, 4, seed=1)
    shut, wide = (Fusion(3, gate_bias=b).double() for b in (-40., 40.))
    for net in (shut, wide):
        nn.init.zeros_(net.h.weight)
    torch.testing.assert_close(shut(i, j).target, j)                         # shut: the identity
    assert wide(i, j).target.abs().max() <= 1                                # open: nothing beyond tanh
    born = [Fusion(16)(*torch.randn(2, 8, 16, 8, 8, generator=make_generator(s))).z.mean() for s in range(3)]
    assert max(abs(z - .5) for z in born) < .1


def test_operations_are_the_formula():
    for C, side, k in ((4, 4, 3), (4, 8, 1), (16, 8, 3)):
        net, x = Fusion(C, kernel=k), torch.zeros(1, C, side, side)
        with FlopCounterMode(display=False) as counter:
            net(x, x)
        P = side * side
        assert counter.get_total_flops() == 8 * P**2 * C + 12 * C**2 * k**2 * P


def test_config_errors():
    for change, words in (({"target": "nearest"}, "target: expected one of .*, found 'nearest'"),
                          ({"printing": "errata"}, "printing: expected one of"),
                          ({"kernel": 2}, "kernel: expected an odd size, found 2")):
        with pytest.raises(StremnError, match=words):
            FusionConfig(**change)
    with pytest.raises(StremnError, match="fuse: expected two maps of one shape"):
        Fusion(2)(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))
    with pytest.raises(StremnError, match="shared_keys=True"):
        FusionBank(SMALL, shared_keys=True).template(torch.zeros(1, 3, 2, 2))
    assert [f.name for f in fields(FusionConfig)][:2] == ["target", "printing"]


# ---- targets -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pinned", [0, 1, 2])
def test_targets_equal_a_search_by_hand(target, pinned):
    g = make_generator(pinned)
    for n in (1, 2, 3, 5):
        maps = torch.randn(6, n, 3, 2, 2, generator=g)
        gone = F.one_hot(torch.randint(0, n, (6,), generator=g), n).bool()
        gone[-1] = False                                                     # one row deletes nothing
        found = target_slots(maps, gone, pinned, target)
        for row in range(6):
            others = [j for j in range(pinned, n) if not gone[row, j]] if gone[row].any() else []
            wanted = set(others)
            if others and target != "all":
                i = gone[row].int().argmax()
                alike = {j: best_match_similarity(maps[row:row+1, i], maps[row:row+1, j, None]).item() for j in others}
                wanted = {(max if target == "most_similar" else min)(alike, key=alike.get)}
            assert set(found[row].nonzero()[:, 0].tolist()) == wanted, (n, row)


# ---- the bank ------------------------------------------------------------------------------------------------------

def outcome(bank, T=9, seed=0):
    "A stream of three rows of two videos: frames held, scores, answers, and the gradients of maps and heads."
    g, memory, answers, scores, group = make_generator(seed), None, [], [], torch.tensor([5, 2, 5])
    mine, query = randn(T, 3, 3, 3, 4, seed=1).requires_grad_(), randn(T, 6, 4, 3, 4, seed=2).requires_grad_()
    for t in range(T):
        if t:
            answers.append(bank.read(memory, query[t], group))
        template = bank.template(mine[t], query[t], group)
        decision = bank.choose(memory, template, t, group, g)
        scores.append(decision.scores)
        memory = bank.commit(memory, template, t, decision)
    answers = torch.stack(answers)
    heads = [w for n, w in bank.named_parameters() if not n.startswith("fusion") and w.requires_grad]
    gradients = torch.autograd.grad(answers.pow(2).sum(), [mine, query, *heads], allow_unused=True)
    return memory, scores, [answers, *(torch.zeros(1) if x is None else x for x in gradients)]


@pytest.mark.parametrize("policy", RULES)
@pytest.mark.parametrize("shared, latest", [(False, "competes"), (True, "competes"), (True, "held")])
def test_without_fusion_it_is_a_memory_bank(policy, shared, latest):
    torch.manual_seed(0)
    plain = MemoryBank(SMALL, shared_keys=shared, latest=latest, policy=policy).double()
    bank = with_fusion(plain)
    bank.fusing = False
    (m, s, a), (m_, s_, b) = outcome(plain), outcome(bank)
    assert torch.equal(m.frames, m_.frames) and m.seen == m_.seen and bank.openness is None
    for x, y in zip([*a, *(x for x in s if x is not None)], [*b, *(x for x in s_ if x is not None)]):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)
    shown = bank.project(m_)
    for x, y in zip(m[:3], shown[:3]):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
    bare = FeatureBank(plain.config).double()                              # the naive bank of `memory.bank`, as a class
    bare.load_state_dict(plain.state_dict())
    torch.testing.assert_close(outcome(bare)[2][0], a[0], atol=1e-10, rtol=1e-10)


def test_a_shut_gate_is_a_memory_bank():
    torch.manual_seed(0)
    plain = MemoryBank(SMALL, shared_keys=True, policy="oldest").double()
    bank = with_fusion(plain, FusionConfig(target="all", gate_bias=-60., into_pinned=True))
    nn.init.zeros_(bank.fusion.h.weight)
    torch.testing.assert_close(outcome(bank)[2], outcome(plain)[2], atol=1e-10, rtol=1e-10)
    assert 0 < bank.openness < 1e-20 and bank.change < 1e-12


def by_hand(bank, stream, query, K):
    "One row under policy A with Python lists of stacked maps; targets and Eqs. 6-12 written on their own."
    c, box, frames = bank.fusion.config, [], []
    stack = [torch.cat([q, x], 1) if bank.config.shared_keys else x for q, x in zip(query, stream)]
    low = 0 if c.into_pinned else bank.config.pinned
    for t, new in enumerate(stack):
        if len(box) < K:
            box.append(new)
            frames.append(t)
            continue
        i = min(range(bank.config.pinned, K), key=frames.__getitem__)
        others = [j for j in range(low, K) if j != i]
        if others and c.target != "all":
            alike = {j: best_match_similarity(box[i], box[j][:, None]).item() for j in others}
            others = [(max if c.target == "most_similar" else min)(alike, key=alike.get)]
        old = list(box)
        for j in others:
            box[j] = printed(c.printing, old[i], old[j], bank.fusion.f, bank.fusion.g, bank.fusion.h, c.scale or 1.)[0]
        box[i], frames[i] = new, t
    return torch.stack(box, 1), frames


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shared, into_pinned, printing",
                         [(False, False, "main"), (True, True, "supplement"), (True, False, "mended")])
def test_bank_equals_a_simulation_by_hand(target, shared, into_pinned, printing):
    torch.manual_seed(1)
    config = FusionConfig(target=target, into_pinned=into_pinned, printing=printing)
    for K in (2, 3, 5):
        bank = FusionBank(SMALL, config, shared_keys=shared, slots=K, policy="oldest").double()
        stream, query, memory = randn(8, 1, 3, 2, 3, seed=3), randn(8, 1, 4, 2, 3, seed=4), None
        with torch.no_grad():
            for t in range(8):
                memory = bank.write(memory, bank.template(stream[t], query[t]), t)
            box, frames = by_hand(bank, stream, query, K)
        assert memory.frames[0].tolist() == frames
        torch.testing.assert_close(torch.cat([memory.keys, memory.values], 2), box, atol=1e-12, rtol=1e-12)


def test_nobody_to_fuse_into():
    bank, memory = FusionBank(SMALL, slots=2, policy="oldest"), None
    for t in range(5):
        memory = bank.write(memory, bank.template(torch.randn(2, 3, 2, 2)), t)
    assert memory.frames.tolist() == [[0, 4]] * 2 and bank.openness is None and bank.change is None


def test_a_refused_newcomer_is_not_fused():
    bank, memory = FusionBank(SMALL, slots=3, policy=lambda r: torch.zeros_like(r.frames, dtype=torch.float)), None
    for t in range(5):
        before, memory = memory, bank.write(memory, bank.template(torch.randn(2, 3, 2, 2)), t)
    assert torch.equal(before.values, memory.values) and bank.openness is None


@pytest.mark.parametrize("policy", RULES)
def test_every_policy_with_fusion_keeps_the_promises(policy):
    "Frames as without fusion; the pinned slot and the newcomer are what they were, to the bit."
    for latest, target in itertools.product(("competes", "held"), TARGETS):
        torch.manual_seed(0)
        bank = FusionBank(SMALL, FusionConfig(target=target), latest=latest, policy=policy).eval()
        stream, memory, g = torch.randn(12, 2, 3, 2, 2, generator=make_generator(1)), None, make_generator(2)
        with torch.no_grad():
            for t, x in enumerate(stream):
                memory = bank.write(memory, bank.template(x), t, torch.zeros(2).long(), g)
                assert torch.equal(memory.values[:, 0], stream[0])
                for row, slot in (memory.frames == t).nonzero().tolist():
                    assert torch.equal(memory.values[row, slot], x[row])
                assert all(len(set(f)) == len(f) for f in memory.frames.tolist()) and memory.seen == t + 1
        assert memory.values.isfinite().all() and (bank.openness is None or 0 < bank.openness < 1)


def test_rows_do_not_mix():
    torch.manual_seed(0)
    bank, stream = FusionBank(SMALL, policy="oldest").double().eval(), randn(9, 3, 3, 3, 3)
    def run(maps):
        memory = None
        with torch.no_grad():
            for t, x in enumerate(maps):
                memory = bank.write(memory, bank.template(x), t)
        return memory.values
    together, apart = run(stream), torch.cat([run(stream[:, i:i+1]) for i in range(3)])
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=1e-12)


# ---- in a network --------------------------------------------------------------------------------------------------

TINY = VOSConfig(widths=(6, 8), decoder_width=6, bank=BankConfig(
    memory_channels=8, query_channels=8, key_channels=4, value_channels=5, update_channels=4, slots=3, similarity="l2",
    shared_keys=True))


def clip(V=2, T=7, O=2):
    g = make_generator(3)
    first = torch.randint(0, O + 1, (V, 16, 20), generator=g)
    return torch.rand(V, T, 3, 16, 20, generator=g), first, torch.tensor([[True, True], [True, False]])


@pytest.mark.parametrize("shared", [True, False])
def test_in_the_vos_model(shared):
    "Assigned to model.bank: off, the network is the same; on, gradients reach it; the state dict says what was added."
    torch.manual_seed(0)
    model = VOSModel(replace(TINY, bank=replace(TINY.bank, shared_keys=shared))).double()
    frames, first, valid = clip()
    frames = frames.double()
    before = model(frames, first, valid, make_generator(0))
    plain = model.bank
    model.bank = with_fusion(plain)
    model.bank.fusing = False
    torch.testing.assert_close(model(frames, first, valid, make_generator(0)), before, atol=1e-9, rtol=1e-9)
    model.bank.fusing = True
    out = model(frames, first, valid, make_generator(0))
    assert (out - before).abs().max() > 1e-4 and 0 < model.bank.openness < 1 and model.bank.change > 0
    out.pow(2).mean().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in model.bank.fusion.parameters())
    added = {f"bank.fusion.{c}.{w}" for c in "fgh" for w in ("weight", "bias")}
    assert {k for k in model.state_dict() if k.startswith("bank.fusion")} == added
    assert set(model.state_dict()) - added == set(VOSModel(model.config).state_dict())


def test_what_a_checkpoint_holds():
    "Numbers for the log are no weights; a copy is a copy; weights survive a round trip, policy and slots too."
    torch.manual_seed(0)
    plain = MemoryBank(SMALL, slots=3, policy="random").eval()
    plain.policy = plain.policy.but("newest", 5)
    bank = with_fusion(plain, FusionConfig(printing="supplement"))
    assert (bank.policy.slots, bank.policy.rule, bank.training) == (5, "newest", False)
    assert all(torch.equal(v, bank.state_dict()[k]) for k, v in plain.state_dict().items())
    bank.openness = .3
    again = with_fusion(bank, bank.fusion.config)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in bank.state_dict().items()) and again.openness is None
    twin = copy.deepcopy(bank)
    assert twin.openness == .3 and list(twin.state_dict()) == list(bank.state_dict())
    back = MemoryBank(bank.config)
    assert back.load_state_dict(bank.state_dict(), strict=False).missing_keys == []
    visited = []
    bank.apply(lambda m: visited.append(type(m).__name__))
    assert visited[-1] == "FusionBank" and "Fusion" in visited


def test_mixed_precision():
    torch.manual_seed(0)
    bank, memory = FusionBank(SMALL, shared_keys=True, slots=3, policy="oldest"), None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for t in range(5):
            memory = bank.write(memory, bank.template(torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4)), t)
        out = bank.read(memory, torch.randn(2, 4, 4, 4))
    assert memory.values.dtype == torch.float32 and out.isfinite().all() and 0 < bank.openness < 1


def test_no_model_imports_it():
    "The negative result is a lecture and a study, not a part of the system."
    package = Path(__file__).parents[1] / "stremn"
    folders = ("data", "memory", "nets", "models", "metrics", "train", "vos", "prediction")
    parts = [p for folder in folders for p in (package / folder).rglob("*.py")]
    parts += [package / name for name in ("__init__.py", "losses.py")]
    parts.remove(package / "memory" / "__init__.py")                         # a door: it names it and imports it late
    lines = [(p.name, line) for p in parts for line in p.read_text(encoding="utf-8").splitlines()]
    assert [name for name, line in lines if "import" in line and "fusion" in line.split("import")[0]] == []
    program = ("import sys, stremn.memory, stremn.vos.stream, stremn.vos.train; "
               "sys.exit('stremn.memory.fusion' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", program], cwd=package.parent).returncode == 0
