"""What a step looks at (Views) and what it minimises (Objective, a list of Terms)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domainstudio.diffusion.prediction import target, to_noise
from domainstudio.diffusion.schedule import add_noise
from domainstudio.losses.focus import DomainFocus
from domainstudio.losses.transfer import DomainTransfer
from domainstudio.models.adaptation import Adaptation
from domainstudio.models.model import DiffusionModel, Estimate, middle_block
from domainstudio.training.ant import DomainClassifier, hardest_noise

Pairing = Literal["none", "training", "source_samples"]
Space = Literal["model", "pixel", "crop"]
PriorTarget = Literal["picture", "source"]


@dataclass(frozen=True)
class Prompts:
    """What text models are told of each picture, (N, ...) as `DiffusionModel.encode_prompts` gives it; or None."""

    student: Tensor | None = None
    source: Tensor | None = None

    def __getitem__(self, rows: list[int] | Tensor) -> "Prompts":
        """Those of some of the pictures."""
        return Prompts(*(None if part is None else part[rows] for part in (self.student, self.source)))

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """The student's and the source's, of a text model."""
        assert self.student is not None
        assert self.source is not None
        return self.student, self.source


@dataclass(frozen=True)
class Batch:
    """Clean pictures in model space, (B, C, h, w), with their prompts."""

    x0: Tensor
    prompts: Prompts = Prompts()

    def every_other(self, more: "Batch") -> "Batch":
        """Half of this and half of `more`: as many rows as the larger has, where both are as large."""
        x0 = torch.cat([self.x0, more.x0])[::2]
        return Batch(
            x0, Prompts(*(torch.cat(pair)[::2] for pair in zip(self.prompts.both, more.prompts.both, strict=True)))
        )


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
    source: Estimate | None
    """None where no term asks for it."""
    to_space: Callable[[Tensor], Tensor]

    @cached_property
    def image(self) -> Tensor:
        """The clean picture in the objective's space."""
        return self.to_space(self.x0)

    @cached_property
    def student_image(self) -> Tensor:
        """The student's clean estimate in the objective's space."""
        return self.to_space(self.student.x0)

    @cached_property
    def source_image(self) -> Tensor:
        """The source's clean estimate in the objective's space."""
        assert self.source is not None, "the objective does not ask for the source here"
        return self.to_space(self.source.x0)

    @property
    def snr_weight(self) -> Tensor:
        """min(1, (alpha / sigma)²), (B,): an x0 term with it has no gain above 1 under any parameterisation."""
        return (self.alpha / self.sigma).square().clamp(max=1)


@dataclass(frozen=True)
class Views:
    """What the terms compare."""

    training: View
    """The training pictures; the student is told the target prompt."""
    pairs: View
    """The pictures whose pairs are compared: the training pictures (in the paper), or noised source samples."""
    prior: View | None
    """Noised source samples of which the student is told the source prompt, too; None where no term asks for it."""


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
    prior: PriorTarget | Literal["none"] = "none"
    """What a term holds the student to on source samples with the source prompt: the pictures, or the source model."""
    space: Space = "model"
    """Where image terms are computed: the model's own space, decoded pictures, or a decoded crop of them."""
    compares_features: bool = False
    """Whether a term looks at what the networks' middle blocks say."""
    adversarial_steps: int = 0
    """Of gradient ascent in which the training pictures' noise becomes harder to take away (`hardest_noise`)."""
    classifier: DomainClassifier | None = None
    transfer: DomainTransfer | None = None
    focus: DomainFocus | None = None
    """These three are fitted before the first step to training pictures and source samples."""
    nearest: int | None = None
    """How many of the source samples steps show: those nearest to the training pictures; None: all."""

    @property
    def needs_source(self) -> bool:
        """Whether a term looks at the frozen source."""
        return self.asks_source or self.classifier is not None

    @property
    def asks_source(self) -> bool:
        """Whether the source says, each step, what the student says."""
        return self.pairing != "none" or self.prior == "source"

    @property
    def needs_prior(self) -> bool:
        """Whether a term looks at source samples."""
        return self.samples_each_step or self.classifier is not None

    @property
    def needs_fitting(self) -> bool:
        """Whether both domains have to be known before the first step."""
        return any(part is not None for part in (self.classifier, self.transfer, self.focus, self.nearest))

    def fit(self, adaptation: Adaptation, pictures: Tensor, samples: Tensor, generator: torch.Generator) -> None:
        """To all training pictures in all views, (N, V, C, h, w), and source samples, (M, C, h, w), in model space."""
        if self.classifier is not None:
            self.classifier.fit(adaptation, pictures.flatten(0, 1), samples, generator)
        if self.transfer is not None:
            self.transfer.fit(pictures, samples)
        if self.focus is not None:
            self.focus.fit(pictures, samples)

    @property
    def samples_each_step(self) -> bool:
        """Whether a step shows any of them to the models."""
        return self.pairing == "source_samples" or self.prior != "none"

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total, and each term's unweighted value, detached."""
        parts = {term.name: term.loss(views) for term in self.terms}
        total = torch.stack([term.weight * parts[term.name] for term in self.terms]).sum()
        return total, {name: value.detach() for name, value in parts.items()}


Spread = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
"""Takes a function of a batch, row by row, to the same function computed by several processes (`Processes.spread`)."""


def estimate(
    model: DiffusionModel,
    network: nn.Module,
    x_t: Tensor,
    t: Tensor,
    told: Tensor | None,
    spread: Spread,
    with_features: bool = False,
) -> Estimate:
    """`model.estimate` of a batch that `spread` divides."""
    if not with_features:
        return model.read(spread(lambda *batch: network(*batch).sample)(x_t, t, told), x_t, t)
    shapes: list[torch.Size] = []

    def output_and_features(*batch: Tensor | None) -> Tensor:
        """(B, ...) of both, one after the other, since rows are what is divided."""
        with middle_block(network) as seen:
            both = (network(*batch).sample, seen[-1])
        shapes[:] = [part.shape[1:] for part in both]
        return torch.cat([part.flatten(1) for part in both], 1)

    rows = spread(output_and_features)(x_t, t, told).split([shape.numel() for shape in shapes], 1)
    output, features = (part.unflatten(1, shape) for part, shape in zip(rows, shapes, strict=True))
    return replace(model.read(output, x_t, t), features=features)


def look(
    model: DiffusionModel,
    adaptation: Adaptation,
    objective: Objective,
    training: Batch,
    prior: Batch | None,
    generator: torch.Generator,
    noise_offset: float = 0.0,
    spread: Spread = lambda function: function,
) -> Views:
    """Noises training pictures and, if given, source samples; one student pass over all that the objective asks for.

    Source samples are noised once, whatever they are shown for. `generator` is on the CPU, so a seed means the same on
    every device. `noise_offset` adds a constant of that size to each channel's noise. `spread` says how networks and
    decoder see the batch.
    """
    batches = (training,) if prior is None else (training, prior)
    clean = torch.cat([batch.x0 for batch in batches])
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.cat([model.schedule.sample_t(len(batch.x0), generator) for batch in batches]).to(clean.device)
    if noise_offset:
        noise += noise_offset * torch.randn(*noise.shape[:2], 1, 1, generator=generator)
    noise = noise.to(clean)
    alpha, sigma = model.schedule.levels(t)

    def run(network: nn.Module, x_t: Tensor, t: Tensor, told: Tensor | None) -> Estimate:
        return estimate(model, network, x_t, t, told, spread, objective.compares_features)

    rows = {"training": slice(len(training.x0)), "prior": slice(len(training.x0), None)}
    if objective.adversarial_steps:
        first = rows["training"]

        def error(tried: Tensor) -> Tensor:
            x_t = add_noise(clean[first], tried, alpha[first], sigma[first])
            output = run(adaptation.network, x_t, t[first], training.prompts.student).output
            said = to_noise(model.prediction, output, x_t, alpha[first], sigma[first])
            return (tried - said).square().sum((1, 2, 3))

        noise[first] = hardest_noise(error, noise[first], objective.adversarial_steps)
    x_t = add_noise(clean, noise, alpha, sigma)
    wanted = target(model.prediction, clean, noise, alpha, sigma)
    to_space = _into(objective.space, model, generator, spread)

    def estimates(network: nn.Module, asked: list[tuple[str, Tensor | None]]) -> list[Estimate]:
        """One pass over all that is asked: sets of pictures, each with its prompts."""
        parts = [rows[name] for name, _ in asked]
        prompts = [prompts for _, prompts in asked if prompts is not None]
        joined = run(
            network,
            torch.cat([x_t[part] for part in parts]),
            torch.cat([t[part] for part in parts]),
            torch.cat(prompts) if prompts else None,
        )
        return joined.split([len(clean[part]) for part in parts])

    def view(name: str, student: Estimate, source: Estimate | None) -> View:
        part = rows[name]
        return View(clean[part], x_t[part], t[part], alpha[part], sigma[part], wanted[part], student, source, to_space)

    of_source: dict[str, Estimate] = {}
    if objective.asks_source:
        asked = [("training", training.prompts.source)] if objective.pairing == "training" else []
        if prior is not None and (objective.pairing == "source_samples" or objective.prior == "source"):
            asked.append(("prior", prior.prompts.source))
        with adaptation.source() as network:
            of_source = dict(zip((name for name, _ in asked), estimates(network, asked), strict=True))

    asked = [("training", training.prompts.student)]
    if prior is not None and objective.pairing == "source_samples":
        asked.append(("prior", prior.prompts.student))
    if prior is not None and objective.prior != "none":
        asked.append(("prior", prior.prompts.source))
    views = [
        view(name, student, of_source.get(name))
        for (name, _), student in zip(asked, estimates(adaptation.network, asked), strict=True)
    ]
    pairs = views[1] if objective.pairing == "source_samples" else views[0]
    return Views(views[0], pairs, views[-1] if objective.prior != "none" else None)


def _into(
    space: Space, model: DiffusionModel, generator: torch.Generator, spread: Spread
) -> Callable[[Tensor], Tensor]:
    """From model space to where image terms are computed; one crop a step, a quarter of the side (at least 4)."""
    if space == "model":
        return lambda x: x
    window: Any = None
    if space == "crop":
        _, *sides = model.sample_shape
        lengths = [max(min(4, side), side // 4) for side in sides]
        starts = [
            int(torch.randint(side - length + 1, (), generator=generator))
            for side, length in zip(sides, lengths, strict=True)
        ]
        window = (..., *(slice(start, start + length) for start, length in zip(starts, lengths, strict=True)))
    device = next(model.network.parameters()).device.type
    # Terms are computed outside of autocast, where the decoder would fall back to full precision.
    precision = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}

    def decode(x: Tensor) -> Tensor:
        with torch.autocast(device, **precision):
            return model.codec.decode(x if window is None else x[window]).to(x)

    return spread(decode)
