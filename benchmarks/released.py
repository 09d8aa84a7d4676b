"""A training step as the released code does it, for `step.py`: written from its description (docs/deviations.md).

Unconditional: one noised batch, both networks with gradients and in training mode, terms of the first three pictures in
loops; backward through both. Text-to-image: two passes of the UNet over instance and class pictures, all with
gradients, the second at one noise level for all; two decodes of whole pictures in full precision with gradients;
nothing asked of the frozen source, which is loaded.
"""

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainstudio.diffusion.prediction import target, to_x0
from domainstudio.diffusion.schedule import add_noise
from domainstudio.losses.haar import high_frequency
from domainstudio.models.codec import VaeCodec
from domainstudio.models.frozen import FrozenConv2d
from domainstudio.models.model import DiffusionModel

STUDENT, CLASS = "a portrait in sks style", "a portrait"
EMA_DECAY = 0.9999


def released_steps(model: DiffusionModel, images: Tensor, batch_size: int, learning_rate: float) -> Iterator[None]:
    """Does one step each time it is asked for the next; `images` (N, 3, H, W) are the training pictures."""
    step_of = _unconditional if model.condition is None else _text
    network = model.network.requires_grad_(True).train()
    if isinstance(model.codec, VaeCodec):  # whose convolutions are to keep what PyTorch's keep
        for module in model.codec.vae.modules():
            if isinstance(module, FrozenConv2d):
                module.__class__ = nn.Conv2d
    loss_of = step_of(model, network, images.to(next(network.parameters()).device), batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    averaged = list(network.parameters()) if model.condition is None else []
    average = [p.detach().clone() for p in averaged]
    generator = torch.Generator().manual_seed(0)
    while True:
        loss = loss_of(generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for kept, parameter in zip(average, averaged, strict=True):
                kept.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)
        loss.item()
        yield


Loss = Callable[[torch.Generator], Tensor]


def _unconditional(model: DiffusionModel, network: nn.Module, images: Tensor, batch_size: int) -> Loss:
    source = copy.deepcopy(network)
    encoded = model.codec.encode(images)

    def loss_of(generator: torch.Generator) -> Tensor:
        x0 = model.codec.draw(encoded[:batch_size], generator)
        noised = _Noised(model, x0, model.schedule.sample_t(len(x0), generator), generator)
        output, own = noised.ask(network)
        _, others = noised.ask(source)
        loss = F.mse_loss(output, noised.wanted)
        for student, reference in ((own, others), (high_frequency(own), high_frequency(others))):
            loss = loss + 4 * _divergence(student, reference)
        return loss + F.mse_loss(high_frequency(own), high_frequency(x0))

    return loss_of


def _text(model: DiffusionModel, network: nn.Module, images: Tensor, batch_size: int) -> Loss:
    unused_source = copy.deepcopy(network)
    images = images[torch.arange(batch_size) % len(images)]
    encoded = model.codec.encode(images.repeat(2, 1, 1, 1))
    told = model.encode_prompts([STUDENT] * batch_size + [CLASS] * batch_size)
    decode = model.codec.vae.decode  # the scale of the latents is not undone there

    def loss_of(generator: torch.Generator, unused: nn.Module = unused_source) -> Tensor:
        x0 = model.codec.draw(encoded, generator)
        noised = _Noised(model, x0, model.schedule.sample_t(len(x0), generator), generator)
        output, _ = noised.ask(network, told)
        loss = sum(map(F.mse_loss, output.chunk(2), noised.wanted.chunk(2)))
        again = _Noised(model, x0, model.schedule.sample_t(1, generator).expand(len(x0)), generator)
        _, estimates = again.ask(network, told)
        own, others = (decode(half).sample for half in estimates.chunk(2))
        for student, reference in ((own, others), (high_frequency(own), high_frequency(others))):
            loss = loss + 100 * _divergence(student, reference)
        return loss + 0.1 * F.mse_loss(high_frequency(own), high_frequency(images))

    return loss_of


class _Noised:
    """Pictures at noise levels, what a network is to say of them, and what it says."""

    def __init__(self, model: DiffusionModel, x0: Tensor, t: Tensor, generator: torch.Generator):
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        self.t = t.to(x0.device)
        self.prediction, (self.alpha, self.sigma) = model.prediction, model.schedule.levels(self.t)
        self.x_t = add_noise(x0, noise, self.alpha, self.sigma)
        self.wanted = target(model.prediction, x0, noise, self.alpha, self.sigma)

    def ask(self, network: nn.Module, *told: Tensor | None) -> tuple[Tensor, Tensor]:
        output = network(self.x_t, self.t, *told).sample
        return output, to_x0(self.prediction, output, self.x_t, self.alpha, self.sigma)


def _divergence(student: Tensor, source: Tensor) -> Tensor:
    """KL(source || student) of the first three pictures' similarities, mean over all of them."""
    p, q = _similarities(student), _similarities(source)
    return (q * (q / p).log()).mean()


def _similarities(images: Tensor) -> Tensor:
    rows = []
    for i in range(3):
        others = [F.cosine_similarity(images[i].flatten(), images[j].flatten(), dim=0) for j in range(3) if j != i]
        rows.append(torch.softmax(torch.stack(others), 0))
    return torch.stack(rows)
