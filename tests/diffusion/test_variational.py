import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from domainstudio.diffusion.variational import (
    discretised_gaussian_nll,
    gaussian_kl,
    interpolated_log_variance,
    variational_bound,
)

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
LINEAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def rand(*shape, generator):
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


def pictures(t, generator):
    """x0 on the 8-bit grid, x_t noised to `t`, an estimate of x0, a fraction in [-1, 1]; (B, 2, 3, 3)."""
    shape = (len(t), 2, 3, 3)
    x0 = LEVELS[torch.randint(256, shape, generator=generator)]
    product = LINEAR[t].view(-1, 1, 1, 1)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    x_t = product.sqrt() * x0 + (1 - product).sqrt() * noise
    return x0, x_t, x0 + 0.05 * rand(*shape, generator=generator), rand(*shape, generator=generator)


# --- KL of two Gaussians


def test_kl_is_that_of_torch(generator):
    mean_q, log_q, mean_p, log_p = 3 * rand(4, 200, generator=generator)
    expected = kl_divergence(Normal(mean_q, (log_q / 2).exp()), Normal(mean_p, (log_p / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean_q, log_q, mean_p, log_p), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("mean_q", "std_q", "mean_p", "std_p"), [(0.3, 0.5, -0.2, 0.8), (-1, 2, 1, 1.5)])
def test_kl_is_the_integral_it_stands_for(mean_q, std_q, mean_p, std_p):
    x = torch.linspace(mean_q - 12 * std_q, mean_q + 12 * std_q, 20001, dtype=torch.float64)
    log_q, log_p = Normal(mean_q, std_q).log_prob(x), Normal(mean_p, std_p).log_prob(x)
    expected = torch.trapezoid(log_q.exp() * (log_q - log_p), x)
    values = torch.tensor([mean_q, 2 * math.log(std_q), mean_p, 2 * math.log(std_p)]).double()
    torch.testing.assert_close(gaussian_kl(*values), expected, rtol=1e-6, atol=0)  # values come from float32


def test_kl_is_zero_when_equal_and_never_negative(generator):
    mean_q, log_q, mean_p, log_p = rand(4, 500, generator=generator)
    assert gaussian_kl(mean_q, log_q, mean_q, log_q).abs().max() == 0
    assert gaussian_kl(mean_q, log_q, mean_p, log_p).min() > 0


# --- NLL of 8-bit pixels


@pytest.mark.parametrize("mean", [0.0, 0.3, LEVELS[100].item(), -0.9999, 1.0, 1.7, -30.0])
@pytest.mark.parametrize("std", [1e-6, 1e-4, 1e-3, 0.01, 0.1, 1.0, 50.0])
def test_the_256_levels_have_total_probability_one(mean, std):
    nll = discretised_gaussian_nll(LEVELS, torch.full_like(LEVELS, mean), torch.full_like(LEVELS, 2 * math.log(std)))
    assert not nll.isnan().any()
    assert nll.min() >= 0
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("mean", [-1.2, -0.5, 0.0, 0.123, 1.0])
@pytest.mark.parametrize("std", [0.01, 0.1, 1.0, 5.0])
def test_nll_is_the_literal_difference_of_cdfs(mean, std):
    nll = discretised_gaussian_nll(LEVELS, torch.full_like(LEVELS, mean), torch.full_like(LEVELS, 2 * math.log(std)))

    def cdf(x):
        return (1 + math.erf((x - mean) / (std * math.sqrt(2)))) / 2

    checked = 0
    for i, x in enumerate(LEVELS.tolist()):
        below = 0 if i == 0 else cdf(x - 1 / 255)
        above = 1 if i == 255 else cdf(x + 1 / 255)
        if above - below > 1e-6:  # otherwise the literal difference has lost its digits
            checked += 1
            assert nll[i].item() == pytest.approx(-math.log(above - below), rel=1e-8, abs=1e-9)
    assert checked


@pytest.mark.parametrize(
    ("dtype", "log_variance"),
    # The slope of log_ndtr loses its digits some 1e4 standard deviations out in float32, 1e8 in float64.
    [(torch.float32, -10.0), (torch.float64, -25.0)]
    + [(dtype, value) for dtype in (torch.float32, torch.float64) for value in (-5.0, 0.0, 5.0, 30.0)],
)
def test_values_and_gradients_are_finite_far_out_in_the_tails(dtype, log_variance):
    x = LEVELS.to(dtype).repeat(7)
    mean = torch.tensor([-50.0, -3, -1, 0.001, 1, 3, 50], dtype=dtype).repeat_interleave(256).requires_grad_()
    spread = torch.full_like(x, log_variance, requires_grad=True)
    nll = discretised_gaussian_nll(x, mean, spread)
    nll.sum().backward()
    assert nll.isfinite().all()
    assert mean.grad.isfinite().all()
    assert spread.grad.isfinite().all()


def test_far_tails_pull_towards_the_pixel():
    """Where the bare difference of CDFs is 0 - 0: 70 standard deviations out on either side."""
    x, mean = torch.zeros(2).double(), torch.tensor([-0.7, 0.7]).double().requires_grad_()
    log_variance = torch.full((2,), 2 * math.log(0.01)).double()
    nll = discretised_gaussian_nll(x, mean, log_variance)
    nll.sum().backward()
    assert nll[0].item() == pytest.approx(nll[1].item(), rel=1e-12)
    # The nearer edge decides: -log of the tail beyond z is z²/2 + log(z sqrt(2 pi)) + O(1/z²), its slope z.
    z = (0.7 - 1 / 255) / 0.01
    assert nll[0].item() == pytest.approx(z * z / 2 + math.log(z * math.sqrt(2 * math.pi)), abs=1e-3)
    assert mean.grad.tolist() == pytest.approx([-z / 0.01, z / 0.01], rel=1e-3)


def test_nll_gradients_match_finite_differences(generator):
    x = LEVELS[torch.tensor([0, 1, 90, 128, 200, 254, 255])]
    mean = (x + 0.02 * rand(7, generator=generator)).requires_grad_()
    log_variance = (-8 + rand(7, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: discretised_gaussian_nll(x, m, s), (mean, log_variance))


# --- the interpolated variance


def test_log_variance_runs_from_posterior_to_beta():
    beta, posterior = torch.tensor([0.02, 0.1]).double(), torch.tensor([0.015, 0.01]).double()

    def at(fraction):
        return interpolated_log_variance(torch.full((2, 3, 4, 4), fraction).double(), beta, posterior)

    for fraction, variance in ((-1.0, posterior), (1.0, beta), (0.0, (beta * posterior).sqrt())):
        assert at(fraction).shape == (2, 3, 4, 4)
        expected = variance.log().view(2, 1, 1, 1).expand(2, 3, 4, 4)
        torch.testing.assert_close(at(fraction), expected, rtol=1e-14, atol=0)


# --- the bound


def posterior_of_step(x0, x_t, t):
    """Mean and variance of q(x_{t-1} | x_t, x0), t > 0, by Bayes' rule from the two forward steps.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta) x_{t-1}, beta) times q(x_{t-1} | x0) = N(sqrt(abar) x0, 1 - abar).
    """
    abar = LINEAR[t - 1].item()
    beta = 1 - LINEAR[t].item() / abar
    precision = (1 - beta) / beta + 1 / (1 - abar)
    mean = (math.sqrt(1 - beta) / beta * x_t + math.sqrt(abar) / (1 - abar) * x0) / precision
    return mean, 1 / precision, beta


def literal_bound(x0, x_t, estimate, fraction, t):
    """One pixel, in bits, with plain floats."""
    estimate, v = min(max(estimate, -1), 1), (fraction + 1) / 2
    if t > 0:
        true, variance, beta = posterior_of_step(x0, x_t, t)
        mean = posterior_of_step(estimate, x_t, t)[0]
        model_variance = beta**v * variance ** (1 - v)
        kl = math.log(model_variance / variance) + (variance + (true - mean) ** 2) / model_variance - 1
        return kl / 2 / math.log(2)
    # The last step: x_0's own mean is the estimate; its posterior variance is 0, so that of t = 1 stands in.
    variance = (1 - LINEAR[0].item()) ** v * posterior_of_step(0, 0, 1)[1] ** (1 - v)

    def cdf(x):
        return (1 + math.erf((x - estimate) / math.sqrt(2 * variance))) / 2

    below = 0 if x0 < -0.999 else cdf(x0 - 1 / 255)
    above = 1 if x0 > 0.999 else cdf(x0 + 1 / 255)
    return -math.log2(above - below)


@pytest.mark.parametrize("end", [None, -1.0, 1.0])
def test_bound_is_the_literal_computation(end, generator):
    t = torch.tensor([0, 1, 2, 50, 0, 500, 999])
    x0, x_t, _, fraction = pictures(t, generator)
    x0[0, 0, 0], x0[4, 0, 0] = -1, 1  # the two open-ended levels
    estimate = x0 + 0.02 * rand(*x0.shape, generator=generator)
    estimate[3:, 1] *= 2  # and some estimates outside the range, which is clamped
    estimate[4] = x0[4]
    if end is not None:
        fraction = torch.full_like(fraction, end)
    bound = variational_bound(x0, x_t, estimate, fraction, t, LINEAR)
    assert bound.shape == t.shape
    for i, step in enumerate(t.tolist()):
        pixels = zip(*(part[i].flatten().tolist() for part in (x0, x_t, estimate, fraction)), strict=True)
        expected = [literal_bound(*pixel, step) for pixel in pixels]
        assert bound[i].item() == pytest.approx(sum(expected) / len(expected), rel=1e-7, abs=1e-10)


def test_closed_form_at_the_ends_of_the_interpolation(generator):
    t = torch.tensor([1, 50, 500, 999])
    x0, x_t, estimate, fraction = pictures(t, generator)
    estimate = estimate.clamp(-1, 1)
    before = LINEAR[t - 1]
    beta = 1 - LINEAR[t] / before
    ratio = (1 - before) / (1 - LINEAR[t])  # beta~ / beta
    # The two means differ by sqrt(abar_before) beta / (1 - abar) times the error of the estimate.
    error = (x0 - estimate).square().flatten(1).mean(1) * before * beta.square() / (1 - LINEAR[t]).square()
    for end, expected in (
        (-1.0, error / (2 * beta * ratio)),
        (1.0, (ratio - 1 - ratio.log() + error / beta) / 2),
    ):
        bound = variational_bound(x0, x_t, estimate, torch.full_like(fraction, end), t, LINEAR)
        torch.testing.assert_close(bound, expected / math.log(2), rtol=1e-8, atol=1e-14)


def test_the_variance_learns_and_the_mean_does_not(generator):
    t = torch.tensor([0, 1, 400])
    x0, x_t, estimate, fraction = pictures(t, generator)
    estimate.requires_grad_()
    fraction.requires_grad_()
    variational_bound(x0, x_t, estimate, fraction, t, LINEAR).sum().backward()
    assert estimate.grad is None
    assert (fraction.grad.abs().flatten(1).max(1).values > 0).all()


def test_bound_gradients_match_finite_differences(generator):
    t = torch.tensor([0, 1, 400])
    x0, x_t, estimate, fraction = (part[:, :1, :2, :2].contiguous() for part in pictures(t, generator))
    fraction.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: variational_bound(x0, x_t, estimate, f, t, LINEAR), fraction)


def test_an_exact_estimate_makes_the_posterior_variance_the_best(generator):
    t = torch.tensor([1, 2, 50, 200])
    x0, x_t, _, fraction = pictures(t, generator)

    def bound(value):
        return variational_bound(x0, x_t, x0, value, t, LINEAR)

    true = torch.full_like(fraction, -1).requires_grad_()
    best = bound(true)
    torch.testing.assert_close(best, torch.zeros_like(best), rtol=0, atol=1e-14)
    best.sum().backward()
    assert true.grad.abs().max() < 1e-14
    for other in (-3.0, -1.2, -0.8, 0.0, 1.0):
        assert (bound(torch.full_like(fraction, other)) > best + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_step_has_a_finite_gradient(dtype, generator):
    t = torch.arange(1000)
    x0, x_t, _, fraction = (part.to(dtype) for part in pictures(t, generator))
    fraction = (3 * fraction).requires_grad_()  # an untrained head need not stay within [-1, 1]
    wild = 10 * torch.randn(x0.shape, generator=generator, dtype=dtype)
    bound = variational_bound(x0, x_t, wild, fraction, t, LINEAR.to(dtype))
    bound.sum().backward()
    assert bound.isfinite().all()
    assert fraction.grad.isfinite().all()
