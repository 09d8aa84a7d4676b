"""Between pictures in [-1, 1] and the space a diffusion model works in."""

from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from domainstudio.models.frozen import keep_no_inputs


def fitting_batch(side_px: int) -> int:
    """How many pictures of that side are encoded, drawn or decoded at once: 32 up to 128 px, 2 at 512 px."""
    return max(1, min(32, 2**19 // side_px**2))


class Codec(Protocol):
    """Pictures (N, 3, H, W) in [-1, 1] <-> model space (N, C, h, w), roughly unit variance."""

    def encode(self, images: Tensor) -> Tensor:
        """What `draw` needs of each picture, (N, ...), computed once for a whole run."""
        ...

    def draw(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """A model-space sample (N, C, h, w) of each encoded picture."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures; differentiable."""
        ...


class PixelCodec:
    """Model space is picture space."""

    def encode(self, images: Tensor) -> Tensor:
        """The pictures themselves."""
        return images

    def draw(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """The pictures themselves."""
        return encoded

    def decode(self, x0: Tensor) -> Tensor:
        """The pictures themselves."""
        return x0


class VaeCodec:
    """Latents of an autoencoder, with its scale and shift applied on encoding and undone on decoding."""

    def __init__(self, vae: AutoencoderKL | VQModel):
        self.vae: Any = vae.requires_grad_(False).eval()
        keep_no_inputs(vae)
        self.scale = float(self.vae.config.get("scaling_factor") or 1.0)
        self.shift = float(self.vae.config.get("shift_factor") or 0.0)
        self.checkpointing = False
        """Whether gradients through `decode` compute its activations twice instead of keeping them."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(N, 2C, h, w): mean and standard deviation of the posterior, in model space (VQ models: deviation 0)."""
        return torch.cat([self._posterior(part) for part in images.split(fitting_batch(images.shape[-1]))])

    def _posterior(self, images: Tensor) -> Tensor:
        encoded = self.vae.encode(images)
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean, std = encoded.latents, torch.zeros_like(encoded.latents)
        return torch.cat([(mean - self.shift) * self.scale, std * self.scale], 1)

    def draw(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """mean + std * noise."""
        mean, std = encoded.chunk(2, dim=1)
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean)

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures, about [-1, 1], not clamped."""
        latents = x0 / self.scale + self.shift
        if self.checkpointing and latents.requires_grad:
            return checkpoint(lambda z: self.vae.decode(z).sample, latents, use_reentrant=False)
        return self.vae.decode(latents).sample
