"Contracts of `stremn.memory.update`: Eq. 4 against numpy loops, gradients, frames, nothing changed in place."
import numpy as np
import pytest
import torch

from stremn.core import StremnError
from stremn.memory.select import gumbel_select
from stremn.memory.similarity import best_match_similarity
from stremn.memory.update import Memory, Template, append, blend, write


def template(B, seed, H=2, W=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return Template(*(torch.randn(B, D, H, W, generator=g).to(dtype) for D in (2, 5, 3)))


def filled(B, n, dtype=torch.float32):
    memory = None
    for t in range(n):
        memory = append(memory, template(B, 1000 + t, dtype=dtype), t)
    return memory


def choice(slots, n):
    "One-hot rows from slot numbers; None discards."
    a = torch.zeros(len(slots), n)
    for b, i in enumerate(slots):
        if i is not None:
            a[b, i] = 1
    return a


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4])) and a.seen == b.seen


def copy(memory):
    return Memory(*(x.clone() for x in memory[:4]), memory.seen)


def test_filling_keeps_order_contents_and_frames():
    memory = None
    for n, t in enumerate((0, 3, 4, 9), 1):
        memory = append(memory, template(2, t), t)
        assert memory.slots == memory.seen == n
    assert memory.frames.tolist() == [[0, 3, 4, 9]] * 2 and memory.frames.dtype == torch.long
    for i, t in enumerate((0, 3, 4, 9)):
        for stored, x in zip(memory.template(torch.tensor([i, i]))[:3], template(2, t)):
            assert torch.equal(stored, x)


def test_template_reads_another_slot_in_each_row():
    memory = filled(3, 4)
    got = memory.template(torch.tensor([2, 0, 3]))
    for b, i in enumerate((2, 0, 3)):
        assert torch.equal(got.key[b], memory.keys[b, i]) and torch.equal(got.update[b], memory.updates[b, i])
        assert torch.equal(got.value[b], memory.values[b, i])


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_long_random_streams_equal_lists(seed, needs_grad):
    "A memory of tensors against a list of numpy arrays, over 60 writes with discards and rows that differ."
    rng = np.random.default_rng(seed)
    B, n = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    memory = filled(B, n)
    held = [[(t, [x[b].numpy() for x in template(B, 1000 + t)[:3]]) for t in range(n)] for b in range(B)]
    for t in range(n, n + 60):
        new = template(B, t)
        slots = [None if rng.random() < .2 else int(rng.integers(n)) for _ in range(B)]
        frames = [t + 100 * b for b in range(B)]
        memory = write(memory, new, torch.tensor(frames), choice(slots, n).requires_grad_(needs_grad))
        for b, i in enumerate(slots):
            if i is not None:
                held[b][i] = (frames[b], [x[b].numpy() for x in new[:3]])
    assert memory.seen == n + 60 and memory.frames.dtype == torch.long
    for b in range(B):
        for i, (t, maps) in enumerate(held[b]):
            assert memory.frames[b, i] == t
            for stored, x in zip((memory.keys, memory.values, memory.updates), maps):
                np.testing.assert_array_equal(stored[b, i].detach().numpy(), x)   # exactly: no trace of what was there


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_both_paths_agree_to_the_last_bit_values_and_gradients(dtype):
    old, new = filled(3, 4, dtype).values, template(3, 7, dtype=dtype).value
    upstream = torch.randn(old.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for needs in (True, False):
        o, x = old.clone().requires_grad_(), new.clone().requires_grad_()
        out = blend(o, x, choice([1, None, 3], 4).requires_grad_(needs))
        results.append((out, *torch.autograd.grad((out * upstream).sum(), (o, x))))
    for printed, selected in zip(*results):
        assert printed.dtype == dtype and torch.equal(printed, selected)
    assert torch.equal(results[0][1][0, 1], torch.zeros_like(old[0, 1]))          # what was replaced learns nothing


@pytest.mark.parametrize("seed", range(5))
def test_gradient_of_the_choice_is_an_inner_product(seed):
    B, n = 2, 3
    memory, new = filled(B, n, torch.float64), template(B, seed, dtype=torch.float64)
    a = choice([seed % n, None], n).double().requires_grad_()
    out = write(memory, new, 9, a)
    g = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in out[:3]]
    got, = torch.autograd.grad(sum((x * u).sum() for x, u in zip(out[:3], upstream)), a)
    want = np.zeros((B, n))
    for b in range(B):
        for i in range(n):
            for x, old, u in zip(new, memory[:3], upstream):
                want[b, i] += ((x[b].numpy() - old[b, i].numpy()) * u[b, i].numpy()).sum()
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-12)


def test_gradcheck():
    memory = filled(2, 3, torch.float64)
    new = template(2, 5, dtype=torch.float64)
    a = choice([1, 2], 3).double().requires_grad_()
    inputs = (memory.keys[..., :1, :2].clone().requires_grad_(), new.key[..., :1, :2].clone().requires_grad_(), a)
    assert torch.autograd.gradcheck(blend, inputs)


def test_update_keys_learn_through_the_choice_alone():
    memory, new = filled(2, 3), template(2, 5)
    U_new, U_old = new.update.clone().requires_grad_(), memory.updates.clone().requires_grad_()
    for noise in (True, False):
        a = gumbel_select(best_match_similarity(U_new, U_old), noise=noise, generator=torch.Generator().manual_seed(0))
        out = write(memory, new, 5, a)                               # neither template nor memory holds U_new or U_old
        grads = torch.autograd.grad((out.values**2).sum(), (U_new, U_old))
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def test_filling_gives_the_update_keys_no_gradient():
    new = template(2, 5)
    update = new.update.clone().requires_grad_()
    memory = append(filled(2, 2), new._replace(update=update), 2)
    assert not memory.values.requires_grad and not memory.keys.requires_grad


def test_nothing_is_changed_in_place():
    memory, new = filled(2, 3), template(2, 9)
    before, template_before = copy(memory), [x.clone() for x in new[:3]]
    for a in (choice([0, 2], 3), choice([None, None], 3), choice([1, 1], 3).requires_grad_()):
        after = write(memory, new, 9, a)
        appended = append(memory, new, 9)
        for x in (*after[:4], *appended[:4]):
            x.detach().add_(1)                                       # scribble on the results
        assert same(memory, before) and all(torch.equal(x, y) for x, y in zip(new, template_before))


def test_an_old_read_keeps_its_gradient_after_later_writes():
    first = template(1, 0)
    key = first.key.clone().requires_grad_()
    memory = append(append(None, first._replace(key=key), 0), template(1, 1), 1)
    loss = (memory.keys**2).sum()
    for t in range(2, 6):
        memory = write(memory, template(1, t), t, choice([t % 2], 2))
    loss.backward()
    torch.testing.assert_close(key.grad, 2 * key.detach())


def test_an_all_zero_row_is_the_identity_but_counts_as_seen():
    memory = filled(2, 3)
    for a in (torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)):
        after = write(memory, template(2, 9), 9, a)
        assert same(after, memory._replace(seen=memory.seen + 1))


def test_a_broken_template_that_is_discarded_leaves_no_trace_at_test_time():
    memory = filled(1, 2)
    broken = Template(*(torch.full_like(x, torch.nan) for x in template(1, 9)[:3]))
    assert same(write(memory, broken, 9, torch.zeros(1, 2)), memory._replace(seen=3))
    replaced = write(memory, broken, 9, choice([1], 2))
    assert torch.equal(replaced.keys[:, 0], memory.keys[:, 0]) and replaced.keys[:, 1].isnan().all()


@pytest.mark.parametrize("t", [7, torch.tensor(7.), torch.tensor([7]), torch.tensor([7, 7], dtype=torch.int32)])
def test_frame_numbers_come_in_any_form_and_stay_long(t):
    after = write(filled(2, 3), template(2, 9), t, choice([0, 2], 3))
    assert after.frames.tolist() == [[7, 1, 2], [0, 1, 7]] and after.frames.dtype == torch.long


def test_a_half_precision_memory_takes_a_float32_choice():
    memory = filled(2, 3, torch.bfloat16)
    for needs in (True, False):
        after = write(memory, template(2, 9, dtype=torch.bfloat16), 9, choice([0, None], 3).requires_grad_(needs))
        assert {x.dtype for x in after[:3]} == {torch.bfloat16}


def broken_template(change):
    new = template(2, 9)
    return new._replace(key=change(new.key))


@pytest.mark.parametrize("new, a, found", [
    (template(2, 9), torch.zeros(2, 4), "(2, 4)"), (template(2, 9), torch.zeros(3), "(3,)"),
    (template(1, 9), torch.zeros(2, 3), "(1, 2, 2, 3)"), (template(2, 9, H=1), torch.zeros(2, 3), "(2, 2, 1, 3)"),
    (broken_template(lambda x: x[:, :1]), torch.zeros(2, 3), "(2, 1, 2, 3)")])
def test_wrong_shapes_are_refused_not_stretched(new, a, found):
    with pytest.raises(StremnError) as error:
        write(filled(2, 3), new, 9, a)
    assert found in str(error.value) and "expected old (B,n,D,H,W)" in str(error.value) and "\n" not in str(error.value)
