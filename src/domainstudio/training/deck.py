"""What batches are drawn from."""

import torch
from torch import Tensor

from domainstudio.data.batches import batch_indices
from domainstudio.data.nearness import nearest_first, pool_size
from domainstudio.models.adaptation import Adaptation
from domainstudio.models.model import DiffusionModel
from domainstudio.training.config import TrainConfig
from domainstudio.training.objective import Batch, Objective, Prompts


class Deck:
    """The training pictures, encoded once, and the source samples."""

    def __init__(
        self, model: DiffusionModel, config: TrainConfig, images: Tensor, prior: Batch | None, prompts: Prompts | None
    ):
        self.codec, self.config, self.prior = model.codec, config, prior
        self.prompts = prompts or Prompts()
        self.encoded = model.codec.encode(images)
        self.mirrored = model.codec.encode(images.flip(-1)) if config.random_flip else self.encoded
        self.shown = torch.arange(0 if prior is None else len(prior.x0))
        """Which source samples batches are drawn from."""

    def training(self, index: int, generator: torch.Generator) -> Batch:
        """The batch number `index` of training pictures."""
        rows = batch_indices(len(self.encoded), self.config.train_batch_size, self.config.seed, index)
        batch = self.encoded[rows]
        if self.config.random_flip:
            flip = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
            batch = torch.where(flip.to(batch.device), self.mirrored[rows], batch)
        return Batch(self.codec.draw(batch, generator), self.prompts[rows])

    def source_samples(self, generator: torch.Generator) -> Batch:
        """Some of them, drawn anew each time."""
        assert self.prior is not None
        chosen = self.shown[torch.randperm(len(self.shown), generator=generator)[: self.config.pair_batch_size]]
        return Batch(self.prior.x0[chosen].to(self.encoded), self.prior.prompts[chosen])

    def views(self, generator: torch.Generator) -> Tensor:
        """(N, V, C, h, w): the training pictures, and their mirror images where training shows them."""
        views = [self.codec.draw(self.encoded, generator)]
        if self.config.random_flip:
            views.append(self.codec.draw(self.mirrored, generator))
        return torch.stack(views, 1)

    def fit(self, objective: Objective, adaptation: Adaptation) -> None:
        """Fits what an objective has of both to all of both.

        As many of the source samples as it asks for are shown from then on, but one batch at least.
        """
        assert self.prior is not None
        generator = torch.Generator().manual_seed(self.config.seed)
        pictures = self.views(generator)
        samples = self.prior.x0.to(pictures)
        objective.fit(adaptation, pictures, samples, generator)
        if objective.nearest is not None and objective.nearest < len(samples):
            number = max(objective.nearest, self.config.pair_batch_size)
            self.shown = nearest_first(samples, pictures.flatten(0, 1))[:number].to(self.shown)


def samples_wanted(
    model: DiffusionModel, config: TrainConfig, images: Tensor, objective: Objective, samples: Tensor
) -> int:
    """How many source samples an objective that shows the nearest wants to choose among (`pool_size`).

    Args:
        images: (N, 3, H, W) in [-1, 1], the training pictures, where the model is.
        samples: (M, C, h, w), the first of the source samples: as many as are shown.
    """
    pictures = Deck(model, config, images, None, None).views(torch.Generator().manual_seed(config.seed))
    return pool_size(len(samples), samples.to(pictures), pictures, objective.transfer is not None)
