"""The loop: one for pixels and latents, full fine-tuning and LoRA, every method and parameterisation."""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from domainstudio.data.batches import step_generator
from domainstudio.errors import UserError
from domainstudio.models.adaptation import Adaptation
from domainstudio.models.model import DiffusionModel
from domainstudio.training.binding import Binding, binding_loss
from domainstudio.training.config import TrainConfig
from domainstudio.training.deck import Deck
from domainstudio.training.methods import erase_identifier
from domainstudio.training.objective import Batch, Objective, Prompts, look
from domainstudio.training.optimisation import Training
from domainstudio.training.processes import Processes, open_accelerator
from domainstudio.training.state import TrainState


@dataclass(frozen=True)
class StepEvent:
    """A finished step, or the start (step 0, no metrics). Observers may sample inside `averaged()`."""

    step: int
    metrics: dict[str, float]
    state: Callable[[], TrainState]
    averaged: Callable[[], AbstractContextManager[nn.Module]]
    """Context with the student holding its averaged weights (the weights a result has)."""


Observer = Callable[[StepEvent], None]


class StopTraining(Exception):
    """Raised by an observer to end the run with the step just done."""


def train(
    model: DiffusionModel,
    adaptation: Adaptation,
    images: Tensor,
    objective: Objective,
    config: TrainConfig,
    prior: Batch | None = None,
    prompts: Prompts | None = None,
    observers: Sequence[Observer] = (),
    resume: TrainState | None = None,
    accelerator: Accelerator | None = None,
    binding: Binding | None = None,
) -> Training:
    """Minimises `objective` on the training pictures.

    Everything random in a step follows from (seed, step), so a resumed run is the uninterrupted one, and several
    processes (each calls this with the same arguments) make the steps that one would.

    Args:
        images: (N, 3, H, W) in [-1, 1], the training pictures.
        prior: M source samples in model space with their prompts, where the objective looks at such.
        prompts: of the training pictures, where the model takes any.
        observers: called before the first step and after every one; one that raises StopTraining ends the run there,
            in all processes.
        binding: what pictures are told in `binding_steps`.

    Raises:
        UserError: if the loss stops being finite, the objective needs source samples and has none, or there are more
            processes than pictures in a batch.
    """
    erasing = erase_identifier(model) if config.erase_steps else None
    if (objective.needs_prior or config.asks_source) != (prior is not None):
        given = "given" if prior is not None else "missing"
        raise UserError(f"pairing {objective.pairing!r}, prior {objective.prior!r}, and source samples {given}")
    accelerator = accelerator or open_accelerator(config.mixed_precision)
    run = Training(adaptation, config, accelerator)
    processes, device = run.processes, accelerator.device
    processes.check_batches(**config.batches(None if prior is None else len(prior.x0)))
    if resume is not None:
        run.load(resume)
    deck = Deck(model, config, images.to(device), prior, prompts)
    if objective.needs_fitting:
        deck.fit(objective, adaptation)

    def learned(minimised: Objective, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        samples = deck.source_samples(generator) if minimised.samples_each_step else None
        with accelerator.autocast():
            views = look(model, adaptation, minimised, batch, samples, generator, config.noise_offset, processes.spread)
        return minimised(views)  # in full precision: the pairwise terms are smaller than bf16's rounding

    def bound(batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        assert binding is not None, "binding_steps without what pictures are told in them"
        mixed = batch.every_other(deck.source_samples(generator))
        with accelerator.autocast():
            taught, spread = run.before_binding, processes.spread
            return binding_loss(model, adaptation, taught, binding, mixed, generator, config.noise_offset, spread)

    adaptation.network.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        stopped = _notify(observers, StepEvent(run.step, {}, run.state, run.averaged), processes)
        while run.step < config.max_train_steps and not stopped:
            generator = step_generator(config.seed, run.step)
            torch.manual_seed(processes.own_seed(generator.initial_seed()))  # dropout draws from the global generator
            minimised = erasing if erasing and run.step < config.erase_steps else objective
            if run.is_binding and not run.taught:
                run.begin_binding()
            parts = []
            for part in range(config.gradient_accumulation_steps):
                batch = deck.training(run.step * config.gradient_accumulation_steps + part, generator)
                loss, terms = bound(batch, generator) if run.is_binding else learned(minimised, batch, generator)
                parts.append({"loss": loss.detach(), **terms})
                run.backward(loss / config.gradient_accumulation_steps)
            metrics = _means(parts)
            _check_finite(metrics, run.step + 1, config)
            metrics["grad_norm"] = run.update()
            stopped = _notify(observers, StepEvent(run.step, metrics, run.state, run.averaged), processes)
    return run


def _means(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Over a step's batches, as numbers. The host waits for the device here, when all passes are under way."""
    rows = torch.stack([torch.stack(list(part.values())) for part in parts]).tolist()
    return dict(zip(parts[0], map(statistics.fmean, zip(*rows, strict=True)), strict=True))


def _check_finite(metrics: dict[str, float], step: int, config: TrainConfig) -> None:
    if not math.isfinite(metrics["loss"]):
        raise UserError(
            f"the loss is {metrics['loss']} at step {step} ({metrics}); lower the learning_rate "
            f"(now {config.learning_rate:g}) or the weights, or use mixed_precision no or bf16"
        )


def _notify(observers: Sequence[Observer], event: StepEvent, processes: Processes) -> bool:
    """Tells the observers, up to one that stops the run; whether one did, in any process."""
    stops = False
    try:
        for observer in observers:
            observer(event)
    except StopTraining:
        stops = True
    return any(processes.everyone(stops))
