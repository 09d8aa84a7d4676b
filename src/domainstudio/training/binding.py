"""Binding: a style, once learned, is tied to its identifier, and everything else goes back to the source.

In the last steps of a run the student learns from two teachers what depends on the identifier: told a target prompt it
is to say what it said itself before these steps, told the source prompt what the source says, of the same noised
picture. What is not in the prompt but the identifier can then make the difference, and nothing is learned from the
training pictures themselves any more, so nothing more of them is recited.

The empty prompt, which guidance starts from, stays the source's; its counterpart in the style is the identifier alone,
the negative prompt of what is drawn in the style. Otherwise guidance of scale w would add the style w times.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from domainstudio.diffusion.schedule import add_noise
from domainstudio.losses.reconstruction import simple_loss
from domainstudio.models.adaptation import Adaptation
from domainstudio.models.model import DiffusionModel
from domainstudio.training.objective import Batch, Prompts, Spread, estimate

UNNAMED_SHARE = OTHER_SHARE = 0.2
"""Of a batch, how many pictures are told by the identifier alone (or nothing), and by words that do not fit them."""
HOLD_WEIGHT = 2.0
"""Of what the source says, beside what was learned."""
BINDING_RATE = 2.0
"""Times the run's own learning rate, at first; it falls to 0."""


@dataclass(frozen=True)
class Binding:
    """What pictures are told, with and without the identifier (`Prompts.student`, `Prompts.source`).

    Args:
        unnamed: of one row: the identifier alone, and the empty prompt.
        others: of K rows: prompts that do not fit the pictures.
    """

    unnamed: Prompts
    others: Prompts

    def told(self, prompts: Prompts, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The prompts of a batch, with and without the identifier, (B, ...) each; some replaced by those above."""
        own, num_others = torch.stack(prompts.both), len(self.others.both[0])
        num = own.shape[1]
        chance = torch.rand(num, generator=generator)
        strangers = torch.stack(self.others[torch.randint(num_others, (num,), generator=generator)].both)
        chance = chance.to(own.device).view(-1, *(1,) * (own.ndim - 2))
        fitting = torch.where(chance < UNNAMED_SHARE + OTHER_SHARE, strangers, own)
        told = torch.where(chance < UNNAMED_SHARE, torch.stack(self.unnamed.both), fitting)
        return told[0], told[1]


def binding_loss(
    model: DiffusionModel,
    adaptation: Adaptation,
    taught: Callable[[], AbstractContextManager[nn.Module]],
    binding: Binding,
    batch: Batch,
    generator: torch.Generator,
    noise_offset: float = 0.0,
    spread: Spread = lambda function: function,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(student(target) - taught(target))² + 2 (student(source) - source(source))², means over pictures and numbers.

    Args:
        taught: context with the network as it was before binding, without gradients.
        batch: clean pictures in model space, (B, C, h, w), with both their prompts.

    Returns:
        The loss, and its two parts with `bound`: which part of the teachers' difference is the student's, 0 to 1.
    """
    target, plain = binding.told(batch.prompts, generator)
    noise = torch.randn(batch.x0.shape, generator=generator)
    if noise_offset:
        noise += noise_offset * torch.randn(*noise.shape[:2], 1, 1, generator=generator)
    t = model.schedule.sample_t(len(noise), generator).to(batch.x0.device)
    alpha, sigma = model.schedule.levels(t)
    x_t = add_noise(batch.x0, noise.to(batch.x0), alpha, sigma)

    def output(network: nn.Module, x_t: Tensor, t: Tensor, told: Tensor | None) -> Tensor:
        return estimate(model, network, x_t, t, told, spread).output.float()

    with adaptation.source() as network:
        of_source = output(network, x_t, t, plain)
    with taught() as network:
        of_taught = output(network, x_t, t, target)
    both = output(adaptation.network, torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([target, plain]))
    with_it, without = both.chunk(2)
    bind, hold = simple_loss(with_it, of_taught).mean(), simple_loss(without, of_source).mean()
    wanted, made = of_taught - of_source, (with_it - without).detach()
    bound = (wanted * made).sum() / wanted.square().sum().clamp(min=1e-12)
    return bind + HOLD_WEIGHT * hold, {"bind": bind.detach(), "hold": hold.detach(), "bound": bound}
