"What a frame costs: formulas against torch's counter, bytes against tensors and the system."
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stremn.core import make_generator
from stremn.experiments.cost import (Sizes, affinity_bytes, count_bytes, count_flops, crossing, filled, held_bytes,
                                     linear_slots, printed_flops, read_bytes, reencoding_step, similarity_bytes,
                                     sizes_of, step_flops, steps, total_crossing, with_linear_memory)
from stremn.memory.bank import BankConfig, MemoryBank
from stremn.memory.read import affinity
from stremn.memory.similarity import best_match_similarity
from stremn.models.hub import load
from stremn.models.vos_baselines import STMBank
from stremn.train.profile import peak_bytes
from helpers import UNEQUAL_BANK
from refusals import refused



# ---- operations ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("Dk, Dv", [(16, 16), (16, 24), (33, 48)])
@pytest.mark.parametrize("backend", ["any", SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_the_counter_sees_attention(Dk, Dv, backend):
    if backend == SDPBackend.FLASH_ATTENTION and Dk != Dv:
        pytest.skip("on a CPU the fused kernel asks for equal widths")
    q, k, v = torch.randn(2, 1, 10, Dk), torch.randn(2, 1, 30, Dk), torch.randn(2, 1, 30, Dv)

    def attend():
        return F.scaled_dot_product_attention(q, k, v, scale=1.)

    def forced():
        with sdpa_kernel(backend):
            return attend()

    assert count_flops(attend if backend == "any" else forced) == 2 * 2 * 10 * 30 * (Dk + Dv)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_formulas_equal_the_counter(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    shared = data.draw(st.booleans())
    config = BankConfig(memory_channels=draw(1, 9), query_channels=draw(1, 9), key_channels=draw(1, 9),
                        value_channels=draw(1, 9), update_channels=draw(1, 9), slots=draw(2, 7), shared_keys=shared,
                        similarity=data.draw(st.sampled_from(["dot", "l2"])))
    grid, objects, gamma = (draw(1, 6), draw(1, 6)), draw(1, 3), draw(1, 7)
    T = draw(config.slots, 40)
    s, bank = sizes_of(config, grid[0] * grid[1], objects), MemoryBank(config).eval()
    for method, (work, held) in steps(bank, grid, T, gamma, objects).items():
        assert step_flops(s, method, T, gamma) == count_flops(work), method
        assert held_bytes(s, method, T, gamma) == held, method


@pytest.mark.parametrize("method", ["stm", "ours", "rule"])
def test_formulas_hold_while_the_memory_fills(method):
    bank = MemoryBank(UNEQUAL_BANK).eval()
    b = STMBank.from_bank(bank) if method == "stm" else bank
    policy = bank.policy.but("oldest" if method == "rule" else "learned")
    s, memory, x, q = sizes_of(UNEQUAL_BANK, 12), None, torch.randn(1, 6, 3, 4), torch.randn(1, 7, 3, 4)
    for t in range(12):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if memory is not None:
                b.read(memory, q)
            memory = b.write(memory, b.template(x), t, policy=policy)
        assert t == 0 or counter.get_total_flops() == step_flops(s, method, t), t


def test_printed_terms_by_hand():
    s = Sizes(pixels=10, slots=2, key=3, value=4)
    assert printed_flops(s, "stm", 50) == 2 * 10 * 100 * 7
    assert printed_flops(s, "reencode", 50) == 2 * (2 * 100 * 7 + 2 * 100 * 3 + 3 * 10 * 9)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(1, 9), st.sampled_from([16, 100, 1620]), st.sampled_from(["ours", "rule"]))
def test_crossings_are_where_the_sums_say(slots, gamma, pixels, method):
    s = Sizes(pixels=pixels, slots=slots)
    t = crossing(s, method, gamma)
    assert step_flops(s, "stm", t, gamma) > step_flops(s, method, t, gamma)
    assert t == slots or step_flops(s, "stm", t - 1, gamma) <= step_flops(s, method, t - 1, gamma)
    L = total_crossing(s, method, gamma)
    sums = [sum(step_flops(s, m, u, gamma) for u in range(1, L)) for m in ("stm", method)]
    assert sums[0] > sums[1] and L >= t


# ---- STM's memory --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gamma", [1, 2, 5])
@pytest.mark.parametrize("shared", [False, True])
def test_linear_memory_holds_what_stm_holds(gamma, shared):
    config = replace(UNEQUAL_BANK, shared_keys=shared)
    bank, memory = STMBank(config, gamma).eval(), None
    maps, queries = torch.randn(30, 2, 6, 2, 3), torch.randn(30, 1, 7, 2, 3)
    group, made = torch.zeros(2, dtype=torch.long), []
    with torch.no_grad():
        for t in range(30):
            made.append(bank.template(maps[t], queries[t], group))
            memory = bank.write(memory, made[-1], t, group)
            frames = sorted({*range(0, t + 1, gamma), t})
            assert memory.frames.tolist() == [frames] * 2 and memory.seen == t + 1
            assert memory.slots == linear_slots(t + 1, gamma)
            for part in ("key", "value"):
                stored = getattr(memory, part + "s")
                assert torch.equal(stored, torch.stack([getattr(made[f], part) for f in frames], 1))
            assert memory.updates.numel() == 0


def test_the_linear_memory_shares_weights_and_leaves_the_original_alone():
    model = load("vos-tiny").eval()
    other = with_linear_memory(model, 3)
    assert type(model.bank) is MemoryBank and type(other.bank) is STMBank and other.bank.gamma == 3
    assert all(a is b for a, b in zip(model.parameters(), other.parameters()))
    assert other.bank.apply(lambda m: None) is other.bank           # what `nn.Module.apply` returns


def test_reencoding_gives_the_answer_of_stored_projections():
    for config in (UNEQUAL_BANK, replace(UNEQUAL_BANK, shared_keys=True, similarity="l2")):
        bank, g = MemoryBank(config).eval(), make_generator(0)
        group, memory = torch.zeros(2, dtype=torch.long), None
        maps, queries = torch.randn(12, 2, 6, 3, 3, generator=g), torch.randn(12, 1, 7, 3, 3, generator=g)
        with torch.no_grad():
            for t in range(4):
                memory = bank.write(memory, bank.template(maps[t], queries[t], group), t, group)
            x, q = maps[:4].transpose(0, 1), queries[:4].transpose(0, 1) if config.shared_keys else None
            for t in range(4, 12):
                answer, x, q = reencoding_step(bank, x, q, maps[t], queries[t], t, group)
                torch.testing.assert_close(answer, bank.read(memory, queries[t], group))
                memory = bank.write(memory, bank.template(maps[t], queries[t], group), t, group)
                second = torch.stack([maps[f, i] for i, f in enumerate(memory.frames[:, 1])])
                torch.testing.assert_close(x[:, 1], second)


# ---- bytes ---------------------------------------------------------------------------------------------------------

def test_tensor_sizes():
    bank, s = MemoryBank(UNEQUAL_BANK), sizes_of(UNEQUAL_BANK, 35, 2)
    memory = filled(bank, [0, 3, 4, 9], (5, 7), 2)
    assert count_bytes(memory) == held_bytes(s, "ours", 99)
    assert count_bytes([affinity(torch.randn(2, 4, 5, 7), memory)]) == affinity_bytes(s, 4)


def test_similarity_peaks_at_its_largest_tensor():
    s = Sizes(pixels=900, slots=4, update=8)
    new, slots = torch.randn(1, 8, 30, 30), torch.randn(1, 4, 8, 30, 30)
    assert similarity_bytes(s) <= peak_bytes(lambda: best_match_similarity(new, slots)) <= 1.2 * similarity_bytes(s)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_agrees_with_the_operating_system():
    code = """
import torch
from stremn.experiments.cost import steps
from stremn.memory.bank import MemoryBank
from stremn.train.profile import peak_bytes, threads
def kept(word): return next(int(x.split()[1])*1024 for x in open("/proc/self/status") if x.startswith(word))
with threads(1):
    bank = MemoryBank(key_channels=32, value_channels=64, memory_channels=16, query_channels=16, slots=6).eval()
    work,_ = steps(bank, (32, 32), 100, methods=["stm"])["stm"]
    with torch.no_grad():
        work()
        try: open("/proc/self/clear_refs", "w").write("5")
        except OSError: print(1, 1); raise SystemExit
        before = kept("VmRSS")
        work()
        print(kept("VmHWM")-before, peak_bytes(work))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    system, ours = map(int, done.stdout.split())
    assert .9 < system / ours < 1.15, done.stdout


# ---- records, claims -----------------------------------------------------------------------------------------------

def test_what_cannot_be_counted_is_refused():
    bank = MemoryBank(UNEQUAL_BANK)
    refused("T and gamma", linear_slots, 0)
    refused("method: expected one of", step_flops, Sizes(), "best", 3)
    refused("method: expected one of", held_bytes, Sizes(), "best", 3)
    refused("stm or reencode", printed_flops, Sizes(), "ours", 3)
    refused("slots: expected a number", sizes_of, replace(UNEQUAL_BANK, slots=None), 9)
    refused("top_k", sizes_of, replace(UNEQUAL_BANK, top_k=3), 9)
    refused("locality", sizes_of, replace(UNEQUAL_BANK, locality=1.), 9)
    refused("at least as many frames as slots", steps, bank, (2, 2), 3)
    refused("method: expected one of", steps, bank, (2, 2), 9, methods=["best"])
    refused("gamma: expected 1 or more", STMBank, UNEQUAL_BANK, 0)
    refused("gamma: expected 1 or more", STMBank.from_bank, bank, gamma=0)


def test_read_bytes_count_the_mask_too():
    s = Sizes(pixels=100, key=4, value=5)
    assert read_bytes(s, 3) == 4 * 3 * 100 * 100 * 9 // 4 + 4 * 3 * 100 * 9
