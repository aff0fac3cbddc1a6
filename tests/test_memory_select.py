"Contracts of `stremn.memory.select`: exact one-hot rows, soft gradients, honest chances."
import numpy as np
import pytest
import torch
from scipy import stats

from stremn.core import StremnError
from stremn.memory.select import gumbel_noise, gumbel_select

FALSE_ALARM = 1e-6  # probability that a correct sampler fails one statistical test, over the choice of seed


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def softmax(scores):
    e = np.exp(np.asarray(scores, dtype=np.float64) - np.max(scores))
    return e / e.sum()


def is_one_hot(a):
    "Equal bits, not equal up to rounding."
    want = torch.nn.functional.one_hot(a.argmax(-1), a.shape[-1]).to(a.dtype)
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[a.dtype]
    return torch.equal(a.detach().view(bits), want.view(bits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("K", [1, 2, 6])
@pytest.mark.parametrize("tau", [1e-3, 1., 1e6])
def test_rows_are_one_hot_to_the_bit(dtype, K, tau):
    scores = (2 * torch.rand(20_000, K, generator=generator()) - 1).to(dtype).requires_grad_()
    for noise in (True, False):
        a = gumbel_select(scores, tau, noise, generator(1))
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and a.shape == scores.shape
        assert is_one_hot(a)


def test_one_hundred_thousand_rows_and_the_brackets_matter():
    scores = torch.rand(100_000, 5, generator=generator())
    a = gumbel_select(scores, generator=generator(1))
    assert is_one_hot(a)
    soft = torch.softmax(scores + gumbel_noise(scores, generator(1)), -1)
    assert not is_one_hot(a + soft - soft)                           # so the check above can fail


@pytest.mark.parametrize("tau", [.05, .5, 1., 3., 50.])
@pytest.mark.parametrize("noise", [True, False])
def test_gradient_is_that_of_the_soft_choice(tau, noise):
    scores = torch.randn(200, 4, dtype=torch.float64, generator=generator(2)).requires_grad_()
    upstream = torch.randn(200, 4, dtype=torch.float64, generator=generator(3))
    g = gumbel_noise(scores, generator(4)) if noise else 0.
    soft = torch.softmax((scores + g) / tau, -1)
    want, = torch.autograd.grad((soft * upstream).sum(), scores)
    got, = torch.autograd.grad((gumbel_select(scores, tau, noise, generator(4)) * upstream).sum(), scores)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    a = soft.detach().numpy()                                        # and that of the formula, without autograd
    by_hand = a * (upstream.numpy() - (a * upstream.numpy()).sum(-1, keepdims=True)) / tau
    np.testing.assert_allclose(got.numpy(), by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [1e-6, 1e-2, 7., 1e8, 1e30])
def test_the_temperature_never_changes_the_choice(tau):
    scores = torch.rand(50_000, 5, generator=generator(5))
    at_one = gumbel_select(scores, generator=generator(6))
    assert torch.equal(gumbel_select(scores, tau, generator=generator(6)), at_one)


@pytest.mark.parametrize("scores", [[.9, .5, .1, -.3], [0., 0., 0.], [1., -1.], [-1., -1., -1., -1., 1.],
                                    [3., 0., -2.]])
def test_frequencies_match_the_softmax(scores):
    n = 60_000
    drawn = gumbel_select(torch.tensor([scores]).expand(n, -1), generator=generator(7)).sum(0).double().numpy()
    expected = n * softmax(scores)
    statistic = ((drawn - expected)**2 / expected).sum()
    assert statistic < stats.chi2.isf(FALSE_ALARM, len(scores) - 1)
    if max(scores) > min(scores):                                    # a sampler that halved the scores would be caught
        wrong = n * softmax(np.array(scores) / 2)
        assert ((drawn - wrong)**2 / wrong).sum() > stats.chi2.isf(FALSE_ALARM, len(scores) - 1)


def test_rows_are_drawn_independently():
    a = gumbel_select(torch.zeros(60_000, 2), generator=generator(8))[:, 0]
    agree = int((a[1:] == a[:-1]).sum())
    assert stats.binomtest(agree, len(a) - 1, .5).pvalue > FALSE_ALARM


def test_noise_follows_the_gumbel_law():
    draws = gumbel_noise(torch.empty(100_000), generator(9)).numpy()
    assert stats.kstest(draws, stats.gumbel_r.cdf).pvalue > FALSE_ALARM
    assert stats.kstest(draws + .05, stats.gumbel_r.cdf).pvalue < FALSE_ALARM
    assert np.isfinite(draws).all()


@pytest.mark.parametrize("spread, share", [(.1, .2101), (.5, .2528)])
def test_how_random_the_papers_choice_is(spread, share):
    "Five slots, scores evenly spread: the likeliest slot is drawn little more often than by chance."
    scores = spread * torch.linspace(-.5, .5, 5)
    n = 40_000
    top = int(gumbel_select(scores.expand(n, -1), generator=generator(10))[:, -1].sum())
    assert abs(softmax(scores.numpy())[-1] - share) < 1e-3
    assert stats.binomtest(top, n, softmax(scores.numpy())[-1]).pvalue > FALSE_ALARM


def test_the_generator_is_the_only_source_of_noise():
    scores = torch.rand(500, 5, generator=generator())
    torch.manual_seed(0)
    first = gumbel_select(scores, generator=generator(11))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, gumbel_select(scores, generator=generator(11)))
    assert not torch.equal(first, gumbel_select(scores, generator=generator(12)))
    torch.manual_seed(0)
    gumbel_select(scores, generator=generator(11))
    assert torch.equal(torch.get_rng_state(), state)                 # the global generator was not touched
    torch.manual_seed(3)
    one = gumbel_select(scores)
    torch.manual_seed(3)
    assert torch.equal(one, gumbel_select(scores))                   # without one, the global generator decides


def test_without_noise_it_is_the_arg_max_and_draws_nothing():
    scores, g = torch.randn(1000, 6, generator=generator(13)), generator(14)
    state = g.get_state()
    assert torch.equal(gumbel_select(scores, noise=False, generator=g).argmax(-1), scores.argmax(-1))
    assert torch.equal(g.get_state(), state)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("tau", [.1, 1., 10.])
def test_masked_slots_are_never_chosen_and_never_learn(noise, tau):
    scores = torch.randn(20_000, 5, generator=generator(15))
    mask = torch.rand(20_000, 5, generator=generator(16)) < .5
    mask[torch.arange(20_000), torch.randint(5, (20_000,), generator=generator(17))] = False   # one candidate at least
    leaf = scores.clone().requires_grad_()
    a = gumbel_select(leaf.masked_fill(mask, -torch.inf), tau, noise, generator(18))
    assert (a[mask] == 0).all() and is_one_hot(a)
    grad, = torch.autograd.grad((a * scores).sum(), leaf)
    assert grad.isfinite().all() and (grad[mask] == 0).all() and (grad != 0).any()


def test_nobody_to_choose_is_loud():
    assert gumbel_select(torch.full((1, 3), -torch.inf), noise=False).isnan().all()


def test_extreme_scores_stay_finite():
    scores = torch.tensor([[1e30, -1e30, 0.]], requires_grad=True)
    a = gumbel_select(scores, generator=generator())
    a[0, 0].backward()
    assert a.tolist() == [[1., 0., 0.]] and scores.grad.isfinite().all()


@pytest.mark.parametrize("shape, tau", [((5,), 1.), ((2, 3, 4), 1.), ((2, 3), 0.), ((2, 3), -1.),
                                        ((2, 3), float("nan"))])
def test_wrong_arguments_are_named(shape, tau):
    with pytest.raises(StremnError) as error:
        gumbel_select(torch.zeros(shape), tau)
    assert "expected scores (B,K) and tau>0" in str(error.value) and str(shape) in str(error.value)
    assert f"tau={tau}" in str(error.value)


def test_scores_are_left_alone():
    scores = torch.rand(10, 4)
    before = scores.clone()
    gumbel_select(scores, generator=generator())
    assert torch.equal(scores, before)
