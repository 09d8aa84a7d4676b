"""What DPMs-ANT adds to plain fine-tuning: noise that is hardest to take away, and a pull towards the target domain.

Source: Wang et al. 2024 (ICML, arXiv 2308.11948). docs/deviations.md says where this differs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainstudio.diffusion.schedule import add_noise
from domainstudio.models.adaptation import Adaptation
from domainstudio.models.model import DiffusionModel, middle_block

NUM_NOISINGS = 400
"""Of each domain's pictures, that the classifier is fitted to."""
FIT_STEPS = 200
BATCH = 50
WEIGHT_DECAY = 0.1
"""Of the classifier on standardised features, of which there are nearly as many as examples."""


def hardest_noise(error: Callable[[Tensor], Tensor], noise: Tensor, steps: int = 10, step_size: float = 0.02) -> Tensor:
    """Noise (B, C, h, w) near `noise` with a higher `error`, of mean 0 and deviation 1 in each picture.

    Gradient ascent: noise <- Norm(noise + step_size * d error / d noise). `error` gives each picture's, (B,).

    Source: Wang et al. 2024, adversarial noise selection; 10 steps of 0.02 there.
    """
    for _ in range(steps):
        noise = noise.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(error(noise).sum(), noise)
        noise = noise.detach() + step_size * gradient
        mean, deviation = noise.mean((1, 2, 3), keepdim=True), noise.std((1, 2, 3), keepdim=True)
        noise = (noise - mean) / deviation
    return noise


class DomainClassifier:
    """Tells noised pictures of the target domain from noised source samples: p(target | x_t).

    Logistic regression on what the frozen source's middle block says of x_t, averaged over places. It has no weights
    of its own to load, knows the noise level, and works in the space of any model.
    """

    def __init__(self, model: DiffusionModel):
        self.model = model
        self.adaptation: Adaptation | None = None
        self.mean = self.deviation = self.weight = torch.zeros(0)
        self.bias = torch.zeros(())

    def fit(self, adaptation: Adaptation, target: Tensor, source: Tensor, generator: torch.Generator) -> float:
        """Fits clean pictures of both domains, each (N, C, h, w) in model space, noised at random.

        Returns:
            The share of them that it tells right, where half is chance.
        """
        self.adaptation, device = adaptation, target.device
        with adaptation.source() as network:
            features = torch.cat([self._noised_features(network, part, generator) for part in (target, source)])
        labels = torch.cat([torch.ones(NUM_NOISINGS), torch.zeros(NUM_NOISINGS)]).to(device)
        self.mean, self.deviation = features.mean(0), features.std(0).clamp(min=1e-6)
        features = (features - self.mean) / self.deviation
        self.weight = torch.zeros(features.shape[1], device=device, requires_grad=True)
        self.bias = torch.zeros((), device=device, requires_grad=True)
        optimizer = torch.optim.AdamW([self.weight, self.bias], lr=0.02, weight_decay=WEIGHT_DECAY)
        for _ in range(FIT_STEPS):
            F.binary_cross_entropy_with_logits(features @ self.weight + self.bias, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.weight, self.bias = self.weight.detach(), self.bias.detach()
        return ((features @ self.weight + self.bias > 0) == labels.bool()).float().mean().item()

    def gradient(self, x_t: Tensor, t: Tensor) -> Tensor:
        """d log p(target | x_t) / d x_t for x_t (B, C, h, w) at t (B,)."""
        assert self.adaptation is not None, "fit it first"
        with self.adaptation.source() as network, torch.enable_grad():
            x_t = x_t.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.logsigmoid(self._logits(network, x_t, t)).sum(), x_t)
        return gradient.detach()

    def _logits(self, network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        features = self._features(network, x_t, t)
        return (features - self.mean) / self.deviation @ self.weight + self.bias

    def _noised_features(self, network: nn.Module, clean: Tensor, generator: torch.Generator) -> Tensor:
        rows = torch.arange(NUM_NOISINGS) % len(clean)
        t = self.model.schedule.sample_t(NUM_NOISINGS, generator).to(clean.device)
        noise = torch.randn(NUM_NOISINGS, *clean.shape[1:], generator=generator).to(clean)
        x_t = add_noise(clean[rows], noise, *self.model.schedule.levels(t))
        parts = zip(x_t.split(BATCH), t.split(BATCH), strict=True)
        return torch.cat([self._features(network, *part) for part in parts])

    def _features(self, network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, D), in full precision."""
        with middle_block(network) as seen:
            self.model.estimate(network, x_t, t)
        return seen[0].float().mean((2, 3))
