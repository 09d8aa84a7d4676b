"""What a step looks at (Views) and what it minimises (Objective, a list of Terms)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from domainstudio.diffusion.prediction import target
from domainstudio.diffusion.schedule import add_noise
from domainstudio.models.adaptation import Adaptation
from domainstudio.models.model import DiffusionModel, Estimate

Pairing = Literal["none", "training", "source_samples"]


@dataclass(frozen=True)
class View:
    """One batch of noised pictures as student and source see it; tensors (B, C, h, w), levels (B,)."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    target: Tensor
    student: Estimate
    image: Tensor
    """The clean picture in the objective's space."""
    student_image: Tensor
    """The student's clean estimate in the objective's space."""
    source_image: Tensor | None
    """The source's clean estimate in the objective's space; None where no term asks for it."""

    @property
    def snr_weight(self) -> Tensor:
        """min(1, (alpha / sigma)²), (B,): an x0 term with it has no gain above 1 under any parameterisation."""
        return (self.alpha / self.sigma).square().clamp(max=1)


@dataclass(frozen=True)
class Views:
    """The training pictures, and the pictures whose pairs are compared (the same ones in the paper)."""

    training: View
    pairs: View


@dataclass(frozen=True)
class Term:
    """A named part of the loss; `loss` gives a scalar, `weight` multiplies it."""

    name: str
    weight: float
    loss: Callable[[Views], Tensor]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms, and what they have to be shown."""

    terms: tuple[Term, ...]
    pairing: Pairing = "none"
    """Pairs are formed among noised "training" pictures, or noised "source_samples" drawn once from the source."""
    space: Literal["model", "pixel"] = "model"
    """Where image terms are computed: the model's own space, or decoded pictures."""

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total, and each term's unweighted value, detached."""
        parts = {term.name: term.loss(views) for term in self.terms}
        total = torch.stack([term.weight * parts[term.name] for term in self.terms]).sum()
        return total, {name: value.detach() for name, value in parts.items()}


def look(
    model: DiffusionModel,
    adaptation: Adaptation,
    objective: Objective,
    x0: Tensor,
    prior: Tensor | None,
    generator: torch.Generator,
) -> Views:
    """Noises training pictures `x0` (B, C, h, w) and, if given, source samples `prior`; one student pass over both.

    The source sees only what pairs are formed of. `generator` is on the CPU, so a seed means the same on every device.
    """
    batches = (x0,) if prior is None else (x0, prior)
    clean = torch.cat(batches)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    t = torch.cat([model.schedule.sample_t(len(batch), generator) for batch in batches])
    pairs_start = 0 if prior is None else len(x0)
    t = t.to(clean.device)
    alpha, sigma = model.schedule.levels(t)
    x_t = add_noise(clean, noise, alpha, sigma)

    source_x0 = None
    if objective.pairing != "none":
        with adaptation.source() as source:
            source_x0 = model.estimate(source, x_t[pairs_start:], t[pairs_start:]).x0
    student = model.estimate(adaptation.network, x_t, t)
    wanted = target(model.prediction, clean, noise, alpha, sigma)

    def to_space(x: Tensor) -> Tensor:
        return model.codec.decode(x).to(x) if objective.space == "pixel" else x

    def view(rows: slice, source: Tensor | None) -> View:
        variance = None if student.variance is None else student.variance[rows]
        estimate = Estimate(student.output[rows], student.x0[rows], variance)
        return View(
            clean[rows],
            x_t[rows],
            t[rows],
            alpha[rows],
            sigma[rows],
            wanted[rows],
            estimate,
            to_space(clean[rows]),
            to_space(estimate.x0),
            None if source is None else to_space(source),
        )

    training = view(slice(len(x0)), source_x0 if prior is None else None)
    return Views(training, training if prior is None else view(slice(pairs_start, None), source_x0))


def unweighted(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Terms as plain numbers; one transfer from the device."""
    return dict(zip(parts, torch.stack(list(parts.values())).tolist(), strict=True))
