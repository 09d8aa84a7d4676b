"""Noise levels: x_t = alpha x0 + sigma noise."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class NoiseSchedule(Protocol):
    """What the training loop needs to know of a forward process."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`t` (B,), as the network takes it -> alpha (B,) and sigma (B,)."""
        ...

    def sample_t(self, num: int, generator: torch.Generator) -> Tensor:
        """`num` training times, as the network takes them, on the generator's device.

        Each is uniform; together they are spread evenly over the range, which makes a batch's loss less noisy.
        """
        ...


@dataclass(frozen=True)
class DiscreteSchedule:
    """Variance-preserving steps 0..T-1: alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod).

    Source: Ho et al. 2020, eq. 4.
    """

    alphas_cumprod: Tensor
    """(T,) in (0, 1], falling."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`t` (B,) integers in [0, T) -> alpha (B,), sigma (B,)."""
        product = self.alphas_cumprod.to(t.device)[t]
        return product.sqrt(), (1 - product).sqrt()

    def sample_t(self, num: int, generator: torch.Generator) -> Tensor:
        """Integers in [0, T)."""
        steps = len(self.alphas_cumprod)
        return (spread_evenly(num, generator) * steps).long().clamp(max=steps - 1)


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: alpha = 1 - s, sigma = s for s in (0, 1); the network takes s times `num_train_timesteps`.

    Source: Liu et al. 2022 (arXiv 2209.03003); Lipman et al. 2022 (arXiv 2210.02747).
    """

    num_train_timesteps: int = 1000

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`t` (B,) in (0, num_train_timesteps) -> alpha (B,), sigma (B,)."""
        sigma = t / self.num_train_timesteps
        return 1 - sigma, sigma

    def sample_t(self, num: int, generator: torch.Generator) -> Tensor:
        """Numbers in [0, num_train_timesteps)."""
        return spread_evenly(num, generator) * self.num_train_timesteps


def spread_evenly(num: int, generator: torch.Generator) -> Tensor:
    """(num,) in [0, 1), in random order: one uniform offset, and steps of 1 / num from it, around the end.

    Source: Kingma et al. 2021 (arXiv 2107.00630), the low-discrepancy sampler of its appendix.
    """
    offset = torch.rand(1, generator=generator, device=generator.device)
    order = torch.randperm(num, generator=generator, device=generator.device)
    return (offset + order / num) % 1


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma noise, for x0 and noise (B, ...), alpha and sigma (B,)."""
    return over(alpha, x0) * x0 + over(sigma, x0) * noise


def over(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to be multiplied with `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))
