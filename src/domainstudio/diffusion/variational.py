"""L_vlb: one term of the variational bound, for models that also output a variance (improved DDPM)."""

import math

import torch
from torch import Tensor

from domainstudio.diffusion.schedule import over


def interpolated_log_variance(fraction: Tensor, beta: Tensor, posterior_variance: Tensor) -> Tensor:
    """log Sigma = v log beta + (1 - v) log beta~, with v = (fraction + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).

    Args:
        fraction: (B, ...) the variance half of the network's output, about [-1, 1].
        beta: (B,) noise added by this step.
        posterior_variance: (B,) beta~, variance of q(x_{t-1} | x_t, x0), positive.
    """
    v = (fraction + 1) / 2
    return v * over(beta.log(), fraction) + (1 - v) * over(posterior_variance.log(), fraction)


def gaussian_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(N(mean_q, exp log_variance_q) || N(mean_p, exp log_variance_p)), elementwise, in nats."""
    return 0.5 * (
        log_variance_p
        - log_variance_q
        - 1
        + (log_variance_q - log_variance_p).exp()
        + (mean_q - mean_p).square() * (-log_variance_p).exp()
    )


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log probability, in nats, of 8-bit pixels `x` in [-1, 1] under a Gaussian integrated over each grey level.

    The first and last level take the whole tail (Ho et al. 2020, eq. 13).
    """
    inverse_std = (-0.5 * log_variance).exp()

    def log_cdf(edge: Tensor) -> Tensor:
        return torch.special.log_ndtr(edge * inverse_std)

    upper, lower = x - mean + 1 / 255, x - mean - 1 / 255
    log_upper, log_lower = log_cdf(upper), log_cdf(lower)
    # log(CDF(upper) - CDF(lower)); in the right tail both are near 1, so the difference is taken mirrored there.
    mirrored_upper, mirrored_lower = log_cdf(-lower), log_cdf(-upper)
    right = x > mean
    high, low = torch.where(right, mirrored_upper, log_upper), torch.where(right, mirrored_lower, log_lower)
    inside = high + torch.log1p(-(low - high).exp().clamp(max=1 - torch.finfo(x.dtype).eps))
    tails = torch.where(x > 0.999, mirrored_upper, inside)
    return -torch.where(x < -0.999, log_upper, tails)


def variational_bound(
    x0: Tensor,
    x_t: Tensor,
    x0_estimate: Tensor,
    fraction: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
) -> Tensor:
    """L_vlb of each picture, (B,), in bits per dimension: KL of the true against the modelled step, at t = 0 the NLL.

    The mean is held fixed (detached), so the term trains the variance alone.

    Args:
        x0, x_t, x0_estimate: (B, C, H, W), x0 in [-1, 1].
        fraction: (B, C, H, W), see `interpolated_log_variance`.
        t: (B,) integers in [0, T).
        alphas_cumprod: (T,).

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), §3.1; DomainStudio gives it weight 0.001 per T = 1000.
    """
    products = alphas_cumprod.to(x0)
    previous = torch.cat([products.new_ones(1), products[:-1]])
    betas = 1 - products / previous
    posterior = betas * (1 - previous) / (1 - products)
    posterior[0] = posterior[1]  # beta~ is 0 at t = 0, where the log would be -inf

    beta, variance = betas[t], posterior[t]
    x0_part = previous[t].sqrt() * beta / (1 - products[t])
    x_t_part = (1 - beta).sqrt() * (1 - previous[t]) / (1 - products[t])
    mean_true = over(x0_part, x0) * x0 + over(x_t_part, x0) * x_t
    mean_model = over(x0_part, x0) * x0_estimate.detach().clamp(-1, 1) + over(x_t_part, x0) * x_t
    log_variance = interpolated_log_variance(fraction, beta, variance)
    kl = gaussian_kl(mean_true, over(variance.log(), x0).expand_as(x0), mean_model, log_variance)
    nll = discretised_gaussian_nll(x0, mean_model, log_variance)
    return torch.where(over(t == 0, x0), nll, kl).flatten(1).mean(1) / math.log(2)
