"""Squared errors against the training pictures."""

from torch import Tensor

from domainstudio.losses.haar import high_frequency


def simple_loss(output: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """L_simple: mean squared error of the network's output, (B, ...) -> (B,) (Ho et al. 2020, eq. 14).

    `weight`, (B, ...), is of each number's square.
    """
    return (weight * (output - target).square()).flatten(1).mean(1)


def mean_error(output: Tensor, target: Tensor) -> Tensor:
    """The part of L_simple that a wrong mean makes: mean over channels of (mean of output - target)².

    (B, C, H, W) -> (B,).
    """
    return (output - target).mean((2, 3)).square().mean(1)


def high_frequency_error(x0_estimate: Tensor, x0: Tensor) -> Tensor:
    """L_hfmse: mean of (hf(x0_estimate) - hf(x0))² over each picture, (B, C, H, W) -> (B,).

    Source: DomainStudio (arXiv 2306.14153), L_hfmse.
    """
    return (high_frequency(x0_estimate) - high_frequency(x0)).square().flatten(1).mean(1)
