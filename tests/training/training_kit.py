"""What several files of this folder start from: a model with its adaptation, pictures, and short runs."""

import torch
from torch import Tensor

from domainstudio.models.adaptation import Adaptation, FullAdaptation, LoraAdaptation
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sharded import divided_as
from domainstudio.training.config import TrainConfig
from domainstudio.training.methods import METHODS, build_objective
from domainstudio.training.objective import Batch, Views, look
from domainstudio.training.optimisation import Training
from domainstudio.training.train import train

UNCONDITIONAL = [method for method in METHODS if method != "dreambooth"]
"""The methods that need no prompts."""


def adapt(model: DiffusionModel, adapter: str, seed: int = 0) -> Adaptation:
    if adapter == "full":
        return FullAdaptation(model.network)
    return LoraAdaptation(model.network, rank=4, lora_alpha=4.0, seed=seed)


def perturb(adaptation: Adaptation, std: float = 0.02) -> None:
    """Moves the student away from the source."""
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for p in adaptation.parameters():
            p.add_(divided_as(p, std * torch.randn(p.shape, generator=generator)))


def make_images(model: DiffusionModel, num: int = 6) -> Tensor:
    """(num, 3, H, W) in [-1, 1], smooth enough to have low and high frequencies."""
    blocks = torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return blocks.repeat_interleave(model.resolution // 8, 2).repeat_interleave(model.resolution // 8, 3)


def make_prior(model: DiffusionModel, num: int = 6) -> Batch:
    """Their first channel varies more than that of `make_images`, the others less."""
    samples = torch.randn(num, *model.sample_shape, generator=torch.Generator().manual_seed(2)) * 0.5
    samples[:, 0] *= 3
    return Batch(samples)


def look_at(model, adaptation, objective, num: int = 5, seed: int = 0) -> Views:
    """The views of one batch, as the loop makes them."""
    generator = torch.Generator().manual_seed(seed)
    x0 = model.codec.draw(model.codec.encode(make_images(model, num)), generator)
    prior = make_prior(model) if objective.needs_prior else None
    if objective.needs_fitting:
        assert prior is not None
        objective.fit(adaptation, x0.unsqueeze(1), prior.x0, generator)
    return look(model, adaptation, objective, Batch(x0), prior if objective.samples_each_step else None, generator)


class Log:
    """An observer that keeps every event's step and metrics."""

    def __init__(self):
        self.steps: list[int] = []
        self.metrics: list[dict[str, float]] = []

    def __call__(self, event) -> None:
        self.steps.append(event.step)
        if event.metrics:
            self.metrics.append(event.metrics)

    @property
    def losses(self) -> list[float]:
        return [metrics["loss"] for metrics in self.metrics]


def run(model, adaptation, objective="finetune", steps=2, observers=(), resume=None, **settings) -> Training:
    """A short run; `objective` may be a method's name."""
    if isinstance(objective, str):
        objective = build_objective(objective, model)
    prior = make_prior(model) if objective.needs_prior else None
    defaults = {"train_batch_size": 4, "learning_rate": 1e-3, "pair_batch_size": 4}
    config = TrainConfig(max_train_steps=steps, **{**defaults, **settings})
    return train(model, adaptation, make_images(model), objective, config, prior, observers=observers, resume=resume)


def same(one, two) -> bool:
    """Equality of nested dictionaries and lists, bit for bit in tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two
