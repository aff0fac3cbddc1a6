"""Contracts of the bank: storing projections changes nothing; roles, groups and policies hold with all options."""
import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import nn

from stremn.core import StremnError, make_generator
from stremn.memory.bank import BankConfig, MemoryBank, UpdatePolicy, evictable_slots, group_mean, group_rows
from stremn.memory.read import affinity, read
from stremn.memory.rules import RULES, newest, pick
from stremn.memory.similarity import best_match_similarity
from stremn.memory.update import Memory

SMALL = BankConfig(memory_channels=3, query_channels=4, key_channels=3, value_channels=2, update_channels=2)
FALSE_ALARM = 1e-6


def maps(T=30, B=1, C=3, size=2, seed=0):
    "A stream of feature maps (T,B,C,size,size)."
    return torch.randn(T, B, C, size, size, generator=make_generator(seed))


def run(bank, stream, group=None, seed=0, policy=None):
    "Frames held after each step, a list of (B,n), and the last memory."
    memory, history, g = None, [], make_generator(seed)
    with torch.no_grad():
        for t, x in enumerate(stream):
            memory = bank.write(memory, bank.template(x), t, group, g, policy)
            history.append(memory.frames)
    return history, memory


# ---- storing projections -------------------------------------------------------------------------------------------

class NaiveBank:
    "What the paper says: store X, apply Eq. 4 to X, run every slot through the heads when it is read."

    def __init__(self, bank): self.bank, self.x = bank, []

    def write(self, x, a=None):
        if a is None:
            self.x.append(x)
        else:
            self.x = [(1 - a[:, i, None, None, None]) * old + a[:, i, None, None, None] * x
                      for i, old in enumerate(self.x)]

    def read(self, query):
        b = self.bank
        def head(conv):
            return torch.stack([nn.functional.conv2d(x, conv.weight, conv.bias, padding=1) for x in self.x], 1)
        keys, values, updates = head(b.memory_key), head(b.memory_value), head(b.update_key)
        q = b.query_key(query).flatten(2)
        w = torch.einsum("bdp,bndhw->bpnhw", q, keys).div(q.shape[1] ** .5).flatten(2).softmax(-1)
        out = torch.einsum("bpm,bdm->bdp", w, values.transpose(1, 2).flatten(2)).unflatten(-1, query.shape[-2:])
        return torch.cat([out, b.query_value(query)], 1), updates


def choices_of(kind, scores):
    "Rows of a: one-hot with a soft gradient, soft, or one-hot with some rows of zeros."
    soft = scores.softmax(-1)
    hard = nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype) + (soft - soft.detach())
    return {"hard": hard, "soft": soft, "discard": hard * (torch.arange(len(hard)) % 2)[:, None]}[kind]


@pytest.mark.parametrize("kind", ["hard", "soft", "discard"])
@pytest.mark.parametrize("K, T", [(1, 4), (3, 7), (4, 12)])
def test_projections_give_the_same_values_and_gradients(kind, K, T):
    torch.manual_seed(K)
    bank, g = MemoryBank(SMALL, slots=K, pinned=0).double(), make_generator(T)
    stream = torch.randn(T, 2, 3, 3, 4, generator=g, dtype=torch.double).requires_grad_()
    query = torch.randn(2, 4, 3, 4, generator=g, dtype=torch.double).requires_grad_()
    scores = torch.randn(T, 2, K, generator=g, dtype=torch.double).requires_grad_()
    weight = torch.randn(2, 4, 3, 4, generator=g, dtype=torch.double)
    results = []
    for which in ("ours", "naive"):
        naive, memory, loss = NaiveBank(bank), None, 0.
        for t in range(T):
            a = None if t < K else choices_of(kind, scores[t])
            if which == "ours":
                policy = bank.policy.but(lambda r, a=a: a)
                memory = bank.write(memory, bank.template(stream[t]), t, policy=policy)
                answer, updates = bank.read(memory, query), memory.updates
            else:
                naive.write(stream[t], a)
                answer, updates = naive.read(query)
            loss = loss + (answer * weight).sum() + updates.pow(2).sum()     # read at every step
        weights = [p for p in bank.parameters() if p is not bank.beta]
        gradients = torch.autograd.grad(loss, [stream, query, scores, *weights])
        results.append([answer, updates, loss, *gradients])
    for ours, naive in zip(*results):
        torch.testing.assert_close(ours, naive, atol=1e-10, rtol=1e-10)
    assert K == 1 or results[0][5][K:].abs().sum() > 0                       # the choices do get a gradient


# ---- roles and policies against a simulation by hand -----------------------------------------------------------------

def by_hand(policy, stream, bank, K, pinned, latest):
    "Frames in each slot after each step of one video, with Python lists."
    with torch.no_grad():
        made = [bank.template(x) for x in stream]
    box, places = [], K if policy != "first_last" else min(K, max(2, pinned + 1))
    for t in range(len(stream)):
        if len(box) < places:
            box.append(t)
        else:
            free, asks = list(range(pinned, len(box))), t
            now = box.index(max(box))
            if latest == "held":
                asks, free = box[now], [i for i in free if i != now]
            if free:
                def alike(i, kind, asks=asks):
                    return best_match_similarity(getattr(made[asks], kind), getattr(made[box[i]], kind)[:, None]).item()
                merit = {"oldest": lambda i: -box[i], "newest": lambda i: box[i], "first_last": lambda i: box[i],
                         "most_similar": lambda i: alike(i, "key"), "learned": lambda i: alike(i, "update")}[policy]
                box[max(free, key=merit)] = asks
            if latest == "held" and len(box) > pinned:
                box[now] = t
        yield list(box)


@pytest.mark.parametrize("policy", ["oldest", "newest", "first_last", "most_similar", "learned"])
@pytest.mark.parametrize("latest", ["competes", "held"])
def test_equals_a_simulation_by_hand(policy, latest):
    for K, pinned in ((1, 0), (1, 1), (2, 1), (2, 2), (3, 0), (5, 1), (6, 3)):
        torch.manual_seed(K)
        bank = MemoryBank(SMALL, slots=K, pinned=pinned, policy=policy, latest=latest).eval()
        stream = maps(25, seed=10 * K + pinned)
        found, wanted = [h[0].tolist() for h in run(bank, stream)[0]], by_hand(policy, stream, bank, K, pinned, latest)
        assert found == list(wanted), (K, pinned)


@pytest.mark.parametrize("policy", RULES)
def test_every_combination_keeps_its_promises(policy):
    "30 frames: pinned ones stay, the newest is there, all are distinct, none too many, slots hold what they say."
    group = torch.tensor([5, 2, 5])
    for latest, pinned, K, each in itertools.product(("competes", "held"), (0, 1, 2), (1, 2, 5, None), (False, True)):
        if K is not None and K < max(1, pinned):
            continue
        bank = MemoryBank(SMALL, slots=K, pinned=pinned, latest=latest, per_object=each, policy=policy)
        stream, full = maps(30, 3, seed=1), K == pinned
        history, memory = run(bank, stream, group)
        for t, held in enumerate(history):
            assert held.shape[1] == min(t + 1, bank.policy.capacity)
            assert held[:, :pinned].tolist() == [list(range(min(pinned, t + 1)))] * 3
            assert all(len(set(row)) == len(row) and 0 <= min(row) and max(row) <= t for row in held.tolist())
            if not full and not (policy == "reservoir" and latest == "competes"):
                assert (held == t).any(1).all()
            assert each or torch.equal(held[0], held[2])
        assert memory.seen == 30
        with torch.no_grad():
            for i in range(memory.slots):                                   # what a slot holds is what it says it holds
                x = torch.stack([stream[f, b] for b, f in enumerate(memory.frames[:, i].tolist())])
                torch.testing.assert_close(memory.values[:, i], bank.memory_value(x))


@pytest.mark.parametrize("latest, n", [("competes", 4), ("held", 4)])
def test_reservoir_is_uniform_under_either_role(latest, n):
    "Competes: 3 of frames 1..8. Held: 2 of frames 1..7, and frame 8 for certain."
    V, T = 6000, 9
    bank, g = MemoryBank(SMALL, slots=n, latest=latest, policy="reservoir"), make_generator(3)
    one, memory = bank.template(torch.zeros(1, 3, 1, 1)), None
    one = type(one)(*(x.detach().expand(V, -1, -1, -1) for x in one[:3]))
    for t in range(T):
        memory = bank.write(memory, one, t, generator=g)
    held = memory.frames[:, 1:]
    counts = torch.bincount(held.flatten(), minlength=T)
    last, places = (T, n - 1) if latest == "competes" else (T - 1, n - 2)
    pvalues = [stats.binomtest(int(counts[f]), V, places / (last - 1)).pvalue for f in range(1, last)]
    assert min(pvalues) > FALSE_ALARM / len(pvalues)
    assert latest == "competes" or counts[T - 1] == V


# ---- groups --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("policy", [p for p in RULES if p not in ("random", "reservoir")])
def test_a_video_does_not_notice_the_others(policy):
    bank = MemoryBank(SMALL, slots=4, policy=policy).eval()
    for seed in range(5):
        g = make_generator(seed)
        group, stream = torch.randint(0, 3, (7,), generator=g) * 100 - 7, maps(15, 7, seed=seed)
        together, alone = run(bank, stream, group)[0], {}
        for v in group.unique().tolist():
            rows = group == v
            alone[v] = run(bank, stream[:, rows], torch.zeros(int(rows.sum()), dtype=torch.long))[0]
            assert all(torch.equal(a[rows], b) for a, b in zip(together, alone[v]))
        order = torch.randperm(7, generator=g)
        assert all(torch.equal(a[order], b) for a, b in zip(together, run(bank, stream[:, order], group[order])[0]))


def test_rows_of_a_video_decide_by_the_mean_of_their_scores():
    group, stream = torch.tensor([3, 1, 3, 3, 1]), maps(6, 5)
    bank = MemoryBank(SMALL, slots=5, beta=2.5).eval()
    memory = run(bank, stream[:5], group)[1]
    seen = {}
    policy = bank.policy.but(lambda r: seen.update(learned=r.learned()) or newest(r))
    with torch.no_grad():
        decision = bank.choose(memory, bank.template(stream[5]), 5, group, policy=policy)
    want = best_match_similarity(bank.update_key(stream[5]), memory.updates)
    torch.testing.assert_close(decision.scores, want)
    torch.testing.assert_close(seen["learned"], 2.5 * torch.stack([want[group == 1].mean(0), want[group == 3].mean(0)]))
    assert not decision.scores.requires_grad


def test_decisions_and_means_equal_loops():
    g = make_generator(0)
    for B in (1, 2, 9):
        group, x = torch.randint(-3, 3, (B,), generator=g), torch.randn(B, 4, generator=g)
        row, first = group_rows(B, group)
        for v, number in enumerate(sorted(set(group.tolist()))):
            rows = [b for b in range(B) if group[b] == number]
            assert [b for b in range(B) if row[b] == v] == rows and first[v] == rows[0]
            torch.testing.assert_close(group_mean(row, x)[v], x[rows].mean(0))
    assert [r.tolist() for r in group_rows(3, None)] == [[0, 1, 2]] * 2


def test_scores_keep_their_precision_under_autocast():
    x = torch.tensor([[.70001, .70002], [.70001, .70003]])
    with torch.autocast("cpu", torch.bfloat16):
        mean = group_mean(torch.tensor([0, 0]), x)
    assert mean.dtype == torch.float32 and mean[0, 1] > mean[0, 0]


def test_candidates():
    frames = torch.tensor([[0, 9, 4], [0, 3, 9]])
    assert evictable_slots(frames, 0).all()
    assert evictable_slots(frames, 1, "held").tolist() == [[False, False, True], [False, True, False]]


# ---- reading -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("similarity, top_k, locality", [("dot", None, 0.), ("l2", 3, 0.), ("l2", None, .5)])
def test_read_appends_the_value_of_the_query(shared, similarity, top_k, locality):
    bank = MemoryBank(SMALL, slots=3, shared_keys=shared, similarity=similarity, top_k=top_k, locality=locality)
    group, query, memory = torch.tensor([1, 0, 1]), torch.randn(2, 4, 2, 2), None
    for t, x in enumerate(maps(5, 3)):
        memory = bank.write(memory, bank.template(x, query, group), t, group)
    out = bank.read(memory, query, group)
    want = read(bank.query_key(query)[group], memory, similarity, top_k, locality=locality)
    assert torch.equal(out, torch.cat([want, bank.query_value(query)[group]], 1)) and out.shape == (3, 4, 2, 2)


def test_attention_is_counted_as_it_is_read():
    bank = MemoryBank(SMALL, slots=3, locality=.5, similarity="l2", policy="lfu")
    memory, drawn = None, torch.zeros(2, 3)
    for t, x in enumerate(maps(5, 2)):
        new = bank.template(x)
        if t == 3:
            weight = affinity(new.key, memory, "l2", locality=.5).mean(1).unflatten(-1, (3, -1)).sum(-1)
            usage = bank.choose(memory, new, t).usage
            drawn = usage[..., 0] - memory.usage[..., 0]
            torch.testing.assert_close(drawn, weight)
        memory = bank.write(memory, new, t)
    assert drawn.sum(1).tolist() == pytest.approx([1, 1])
    for bad in (-1, math.inf, math.nan):
        with pytest.raises(StremnError, match=f"locality: expected 0 or more, found {bad}"):
            replace(SMALL, locality=bad)


def test_shared_keys_come_from_the_query_encoder():
    bank, x, query = MemoryBank(SMALL, shared_keys=True), torch.randn(3, 3, 2, 2), torch.randn(2, 4, 2, 2)
    group = torch.tensor([1, 0, 1])
    assert torch.equal(bank.template(x, query, group).key, bank.query_key(query)[group])
    assert not any("memory_key" in name for name in bank.state_dict())
    with pytest.raises(StremnError, match="query_features, found None"):
        bank.template(x)


# ---- weights, noise, gradients ---------------------------------------------------------------------------------------

def test_gradient_reaches_the_update_head_only_through_an_eviction():
    for K, T, expected in ((6, 7, False), (6, 8, True), (3, 5, True), (2, 9, False), (None, 9, False)):
        torch.manual_seed(0)
        bank, memory, loss = MemoryBank(replace(SMALL, query_channels=3), slots=K, learn_beta=True), None, 0.
        for t, x in enumerate(maps(T, 2)):
            loss = loss + (bank.read(memory, x).pow(2).sum() if t else 0.)
            memory = bank.write(memory, bank.template(x), t, generator=make_generator(t))
        loss.backward()
        for p in (bank.update_key.weight, bank.beta):
            assert bool(p.grad is not None and p.grad.abs().sum() > 0) == expected, (K, T)


def test_beta_is_a_weight_only_when_asked():
    assert not MemoryBank(SMALL).beta.requires_grad and MemoryBank(SMALL, learn_beta=True, beta=3).beta.item() == 3.


@pytest.mark.parametrize("policy", ["learned", "random", "reservoir"])
def test_a_generator_decides(policy):
    bank, stream = MemoryBank(SMALL, slots=4, policy=policy, noise="always"), maps(30, 4)
    def frames(seed): return torch.stack([h for h in run(bank, stream, seed=seed)[0][4:]])
    assert torch.equal(frames(1), frames(1)) and not torch.equal(frames(1), frames(2))


def test_noise_follows_the_mode():
    stream = maps(30, 4)
    for noise, mode in itertools.product(("train", "always", "never"), (True, False)):
        bank = MemoryBank(SMALL, slots=4, noise=noise).train(mode)
        same = torch.equal(torch.stack(run(bank, stream, seed=1)[0][4:]), torch.stack(run(bank, stream, seed=2)[0][4:]))
        assert same == (noise == "never" or (noise == "train" and not mode))


def test_a_memory_is_never_changed_in_place():
    for latest in ("competes", "held"):
        bank = MemoryBank(SMALL, slots=4, latest=latest)
        memory = run(bank, maps(6))[1]
        before = copy.deepcopy(memory)
        bank.write(memory, bank.template(maps()[7]), 7)
        assert all(torch.equal(a, b) for a, b in zip(memory[:4], before[:4])) and memory.seen == before.seen


# ---- swapping and saving ---------------------------------------------------------------------------------------------

def test_policies_are_swapped_on_the_same_weights():
    bank, stream = MemoryBank(SMALL, slots=4).eval(), maps(20)
    before = {k: v.clone() for k, v in bank.state_dict().items()}
    for rule in [*RULES, lambda r: pick(r.frames % 3, r.candidates)]:
        run(bank, stream, policy=bank.policy.but(rule))
    assert all(torch.equal(bank.state_dict()[k], v) for k, v in before.items())
    assert run(bank, stream, policy=UpdatePolicy(slots=math.inf))[1].frames.tolist() == [list(range(20))]
    assert run(bank, stream, policy=UpdatePolicy("first_last"))[1].frames.tolist() == [[0, 19]]
    assert bank.policy == UpdatePolicy(slots=4)                              # the bank's own is as it was


def test_a_policy_may_be_a_module_and_stays_outside():
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, r): return newest(r)
    for bank in (MemoryBank(SMALL, slots=3, policy=Policy()), MemoryBank(SMALL, slots=3)):
        assert run(bank, maps(9), policy=bank.policy.but(Policy()))[1].frames.tolist() == [[0, 1, 8]]
        assert set(bank.state_dict()) == set(MemoryBank(SMALL).state_dict())
        queue = bank.policy.but("oldest")
        assert run(bank, maps(9), policy=queue)[1].frames.tolist() in ([[0, 7, 8]], [[0, 8, 7]])
    assert run(MemoryBank(SMALL, slots=3, policy=Policy()), maps(9))[1].frames.tolist() == [[0, 1, 8]]


def test_module_apply_still_visits_every_part():
    seen = []
    nn.Sequential(MemoryBank(SMALL)).apply(lambda m: seen.append(type(m).__name__))
    assert seen.count("Conv2d") == 5 and "MemoryBank" in seen


@pytest.mark.parametrize("policy", ["learned", "lfu"])
def test_weights_and_memory_go_through_safetensors(tmp_path, policy):
    bank = MemoryBank(SMALL, slots=4, learn_beta=True, beta=1.5, policy=policy).eval()
    stream, query = maps(20), torch.randn(1, 4, 2, 2)
    memory = run(bank, stream[:12])[1]
    save_file(bank.state_dict(), tmp_path / "weights.safetensors")
    tensors = memory._replace(seen=torch.tensor(memory.seen))._asdict()
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "memory.safetensors")
    again = MemoryBank(SMALL, slots=4, learn_beta=True, policy=policy).eval()
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    loaded = load_file(tmp_path / "memory.safetensors")
    other = Memory(**{**loaded, "seen": int(loaded["seen"])})
    with torch.no_grad():
        for t in range(12, 20):
            memory, other = (b.write(m, b.template(stream[t]), t) for b, m in ((bank, memory), (again, other)))
        assert torch.equal(bank.read(memory, query), again.read(other, query)) and other.seen == memory.seen == 20
    assert torch.equal(other.frames, memory.frames)


def test_names_of_the_weights():
    heads = ["memory_key", "memory_value", "query_key", "query_value", "update_key"]
    assert sorted(MemoryBank(SMALL).state_dict()) == ["beta", *(f"{h}.{p}" for h in heads for p in ("bias", "weight"))]


def test_a_copy_is_independent():
    bank = MemoryBank(SMALL, policy="oldest")
    twin = copy.deepcopy(bank)
    twin.policy = twin.policy.but("newest", 2)
    assert bank.policy == UpdatePolicy("oldest", 6) and twin.policy == UpdatePolicy("newest", 2)


def test_mistakes_are_refused_in_one_line():
    bank = MemoryBank(SMALL, slots=2)
    memory = run(bank, maps(4, 3))[1]
    for call, words in ((lambda: MemoryBank(SMALL, slots=0), "slots: expected at least 1, found 0"),
                        (lambda: MemoryBank(SMALL, slots=1, pinned=2),
                         "slots: expected a whole number from 2 on, .*found 1"),
                        (lambda: UpdatePolicy(slots=-1), "slots: expected a whole number from 1 on, 0 or math.inf"),
                        (lambda: UpdatePolicy(slots=True), "found True"),
                        (lambda: UpdatePolicy(slots=2.5), "found 2.5"),
                        (lambda: UpdatePolicy(slots=math.nan), "found nan"),
                        (lambda: MemoryBank(SMALL, policy="fifo"), "policy: expected one of .*, found 'fifo'"),
                        (lambda: bank.policy.but("fifo"), "policy: expected one of .*, found 'fifo'"),
                        (lambda: MemoryBank(SMALL, similarity="cosine"),
                         "similarity: expected one of dot, l2, found 'cosine'"),
                        (lambda: MemoryBank(SMALL, latest="safe"),
                         "latest: expected one of competes, held, found 'safe'"),
                        (lambda: MemoryBank(SMALL, noise="maybe"),
                         "noise: expected one of train, always, never, found 'maybe'"),
                        (lambda: MemoryBank(SMALL, pinned=-1), "pinned: expected 0 or more"),
                        (lambda: bank.choose(memory, bank.template(maps(1, 3)[0]), 4, torch.tensor([0, 1])),
                         "group: expected one video")):
        with pytest.raises(StremnError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert bank.policy == UpdatePolicy(slots=2)                              # a refused change changes nothing


# ---- attention that is counted ------------------------------------------------------------------------------------

def test_the_tallies_are_the_attention_of_every_frame_since_a_slot_was_written():
    bank, stream = MemoryBank(SMALL, slots=4, policy="lfu").eval(), maps(14)
    memory, total = None, {}
    with torch.no_grad():
        for t in range(14):
            template = bank.template(stream[t])
            if memory is not None:
                weight = affinity(template.key, memory, bank.config.similarity).double()     # (B,P,M)
                for i, f in enumerate(memory.frames[0].tolist()):
                    share = weight[0].unflatten(-1, (memory.slots, -1))[:, i].sum(-1).mean().item()
                    total[f] = total.get(f, 0.) + share
            memory = bank.write(memory, template, t)
            if memory.usage is not None:
                expected = [total.get(f, 0.) for f in memory.frames[0].tolist()]
                torch.testing.assert_close(memory.usage[0, :, 0].double(), torch.tensor(expected).double())
    assert memory.frames[0].tolist()[0] == 0 and memory.usage[0, -1, 0] >= 0


def test_nobody_pays_for_tallies_that_no_rule_asks_for():
    memory = run(MemoryBank(SMALL, slots=4, policy="oldest").eval(), maps(8))[1]
    assert memory.usage is None


def frames_over_time(rule, T=20, slots=4, **changes):
    "Frames held after each step."
    torch.manual_seed(0)
    bank = MemoryBank(memory_channels=4, query_channels=4, key_channels=3, value_channels=3, update_channels=3).eval()
    policy, memory, held = UpdatePolicy(rule, slots, **changes), None, []
    with torch.no_grad():
        for t in range(T):
            x = torch.randn(1, 4, 3, 3, generator=make_generator(t))
            memory = bank.write(memory, bank.template(x), t, policy=policy, generator=make_generator(t))
            held.append(memory.frames[0].tolist())
    return held


@pytest.mark.parametrize("every", [1, 3, 5])
def test_only_every_nth_frame_is_stored_or_moves_on(every):
    "By hand, with a queue: what is stored when the latest competes; what moves on when it is held."
    for t, frames in enumerate(frames_over_time("oldest", every=every)):
        offered = list(range(0, t + 1, every))
        assert sorted(frames) == [0, *offered[1:][-3:]]
    for t, frames in enumerate(frames_over_time("oldest", every=every, latest="held")):
        settled = list(range(0, t, every))
        latest = [t] if t else []
        assert sorted(frames) == sorted({0, *settled[1:][-2:], *latest}), t


@pytest.mark.parametrize("latest", ["competes", "held"])
@pytest.mark.parametrize("rule", ["random", "learned", "lfu", "diversity", "coverage", "reservoir"])
def test_a_stride_of_one_is_no_stride_and_others_keep_the_promises(rule, latest):
    assert frames_over_time(rule, latest=latest) == frames_over_time(rule, latest=latest, every=1)
    held = frames_over_time(rule, T=30, latest=latest, every=4)
    for t, frames in enumerate(held):
        assert len(frames) == len(set(frames)) <= 4 and frames[0] == 0
        assert all(f % 4 == 0 or f == t and latest == "held" for f in frames)
        assert latest == "competes" or t in frames


def test_a_stride_that_cannot_be_meant_is_refused():
    for every in (0, -1, 1.5, True, "2"):
        with pytest.raises(StremnError, match="every: expected a whole number from 1 on"):
            UpdatePolicy(every=every)
