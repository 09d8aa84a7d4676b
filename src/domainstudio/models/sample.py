"""Sampling with diffusers' schedulers: the same seed gives the same pictures, whatever the batch size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from domainstudio.errors import UserError
from domainstudio.models.codec import fitting_batch
from domainstudio.models.load import fast_scheduler
from domainstudio.models.model import DiffusionModel

Progress = Callable[[int, int], None]


def starting_noise(shape: tuple[int, ...], pictures: Sequence[int], seed: int) -> Tensor:
    """(len(pictures), *shape) standard normal on the CPU; picture i depends on (seed, i) alone."""
    generators = (torch.Generator().manual_seed(seed * 1_000_003 + i) for i in pictures)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@dataclass(frozen=True)
class TextGuidance:
    """How a text-to-image model is told what to draw."""

    prompts: Sequence[str]
    """One for all pictures, or one a picture."""
    scale: float = 7.5
    """Classifier-free guidance: empty + scale (prompt - empty), of the network's outputs; 1 is the prompt alone."""
    negative_prompt: str = ""
    """Stands in for the empty prompt."""
    style: "StyleGuidance | None" = None

    def prompts_of(self, num_images: int) -> list[str]:
        """One prompt a picture.

        Raises:
            UserError: if there are more than one, but not as many as pictures.
        """
        if len(self.prompts) not in (1, num_images):
            raise UserError(f"{len(self.prompts)} prompts for {num_images} pictures; give one, or one a picture")
        return list(self.prompts) * (1 if len(self.prompts) == num_images else num_images)


@dataclass(frozen=True)
class StyleGuidance:
    """Pushes further away from what the source draws: output + strength (output - the source's), each with its prompt.

    Source: DomainGallery (NeurIPS 2024), where it carries a style to categories that the training pictures lack.
    """

    source: DiffusionModel
    source_prompts: Sequence[str]
    strength: float


@torch.no_grad()
def sample(
    model: DiffusionModel,
    network: nn.Module,
    num_images: int,
    seed: int = 0,
    num_inference_steps: int = 25,
    batch_size: int | None = None,
    progress: Progress | None = None,
    guidance: TextGuidance | None = None,
    pictures: range | None = None,
) -> Tensor:
    """Draws clean pictures in model space with `network`, deterministically (DDIM with eta 0, or Euler for flows).

    Args:
        batch_size: memory and speed only; by default what suits the pictures' size (`fitting_batch`).
        guidance: needed by text-to-image models, and by them alone.
        pictures: which of the `num_images` to draw; by default all.

    Returns:
        (num_images, C, h, w), or as many as `pictures`, on the CPU.

    Raises:
        UserError: if `guidance` is missing or of no use, or its prompts cannot be used.
    """
    if (guidance is None) != (model.condition is None):
        raise UserError("a text-to-image model needs a prompt" if guidance is None else "this model takes no prompts")
    first, was_training = next(network.parameters()), network.training
    device = first.device
    network.eval()
    parts, wanted = [], range(num_images) if pictures is None else pictures
    for rows in torch.tensor(wanted).split(batch_size or fitting_batch(model.resolution)):
        scheduler = fast_scheduler(model)
        scheduler.set_timesteps(num_inference_steps, device=device)
        predict = _predictor(model, network, guidance, num_images, rows.tolist())
        noise = starting_noise(model.sample_shape, rows.tolist(), seed)
        x = noise.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            with torch.autocast(device.type, first.dtype, enabled=first.dtype != torch.float32):
                output = predict(x, t.expand(len(x)))
            x = scheduler.step(output.float(), t, x).prev_sample
        parts.append(x.cpu())
        if progress:
            progress(sum(map(len, parts)), len(wanted))
    network.train(was_training)
    return torch.cat(parts)


def _predictor(
    model: DiffusionModel, network: nn.Module, guidance: TextGuidance | None, num_images: int, rows: list[int]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided output of `network` for the pictures `rows`, as a function of x_t and t."""
    if guidance is None:
        return lambda x, t: model.estimate(network, x, t).output

    def told(prompts: list[str]) -> Tensor | None:
        return model.encode_prompts([prompts[row] for row in rows])

    prompts, style = told(guidance.prompts_of(num_images)), guidance.style
    empty = told([guidance.negative_prompt] * num_images) if guidance.scale != 1 else None
    of_source = replace(guidance, prompts=style.source_prompts).prompts_of(num_images) if style else []
    source_told = style.source.encode_prompts([of_source[row] for row in rows]) if style else None

    def predict(x: Tensor, t: Tensor) -> Tensor:
        output = model.estimate(network, x, t, prompts).output
        guided = output
        if empty is not None:
            without = model.estimate(network, x, t, empty).output
            guided = without + guidance.scale * (output - without)
        if style is not None:
            plain = style.source.estimate(style.source.network, x, t, source_told).output
            guided = guided + style.strength * (output - plain)
        return guided

    return predict


@torch.no_grad()
def decode(model: DiffusionModel, x0: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Model space (N, C, h, w) -> pictures (N, 3, H, W), clamped to [-1, 1], on the CPU."""
    parts = x0.split(fitting_batch(model.resolution))
    return torch.cat([model.codec.decode(part.to(device)).clamp(-1, 1).cpu() for part in parts])


def through_codec(model: DiffusionModel, images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] as the model would draw them at best: encoded and decoded again, on the CPU.

    What an autoencoder loses is missing in all that its model draws, copies of the training pictures included.
    """
    generator = torch.Generator().manual_seed(0)
    return decode(model, model.codec.draw(model.codec.encode(images), generator), images.device)
