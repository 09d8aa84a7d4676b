"""Sampling with diffusers' schedulers: the same seed gives the same pictures, whatever the batch size."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from domainstudio.models.load import fast_scheduler
from domainstudio.models.model import DiffusionModel

Progress = Callable[[int, int], None]


def starting_noise(shape: tuple[int, ...], num_images: int, seed: int) -> Tensor:
    """(num_images, *shape) standard normal on the CPU; picture i depends on (seed, i) alone."""
    generators = (torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(num_images))
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def sample(
    model: DiffusionModel,
    network: nn.Module,
    num_images: int,
    seed: int = 0,
    num_inference_steps: int = 25,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """Draws clean pictures in model space with `network`, deterministically (DDIM with eta 0, or Euler for flows).

    Returns:
        (num_images, C, h, w) on the CPU.
    """
    device, was_training = next(network.parameters()).device, network.training
    network.eval()
    parts = []
    for noise in starting_noise(model.sample_shape, num_images, seed).split(batch_size):
        scheduler = fast_scheduler(model)
        scheduler.set_timesteps(num_inference_steps, device=device)
        x = noise.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            output = network(x, t.expand(len(x))).sample
            if model.learned_variance:
                output = output.chunk(2, dim=1)[0]
            x = scheduler.step(output, t, x).prev_sample
        parts.append(x.cpu())
        if progress:
            progress(sum(map(len, parts)), num_images)
    network.train(was_training)
    return torch.cat(parts)


@torch.no_grad()
def decode(model: DiffusionModel, x0: Tensor, device: torch.device | str = "cpu", batch_size: int = 32) -> Tensor:
    """Model space (N, C, h, w) -> pictures (N, 3, H, W), clamped to [-1, 1], on the CPU."""
    return torch.cat([model.codec.decode(part.to(device)).clamp(-1, 1).cpu() for part in x0.split(batch_size)])
