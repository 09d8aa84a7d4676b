"""A diffusion model as the training loop sees it."""

from dataclasses import dataclass

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from domainstudio.diffusion.prediction import Prediction, to_x0
from domainstudio.diffusion.schedule import NoiseSchedule
from domainstudio.models.codec import Codec


@dataclass(frozen=True)
class Estimate:
    """What a network says about a noised picture; all (B, C, h, w) in model space."""

    output: Tensor
    x0: Tensor
    variance: Tensor | None
    """The variance half of a learned-variance network's output, about [-1, 1]."""


@dataclass(frozen=True)
class DiffusionModel:
    """A loaded pipeline with the facts the loss needs. The network is passed in, so student and source share this."""

    pipeline: DiffusionPipeline
    network: nn.Module
    schedule: NoiseSchedule
    prediction: Prediction
    codec: Codec
    learned_variance: bool
    resolution: int
    """Side of the pictures in pixels."""
    sample_shape: tuple[int, int, int]
    """(C, h, w) of model space."""

    def estimate(self, network: nn.Module, x_t: Tensor, t: Tensor) -> Estimate:
        """Runs `network` on x_t (B, C, h, w) at times t (B,)."""
        output, variance = network(x_t, t).sample, None
        if self.learned_variance:
            output, variance = output.chunk(2, dim=1)
        alpha, sigma = self.schedule.levels(t)
        return Estimate(output, to_x0(self.prediction, output, x_t, alpha, sigma), variance)
