"""The loop: one for pixels and latents, full fine-tuning and LoRA, every method and parameterisation."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from domainstudio.data.batches import batch_indices, step_generator
from domainstudio.errors import UserError
from domainstudio.models.adaptation import Adaptation
from domainstudio.models.identifier import find_embedding
from domainstudio.models.model import DiffusionModel
from domainstudio.training.ant import DomainClassifier
from domainstudio.training.binding import BINDING_RATE, Binding, binding_loss
from domainstudio.training.methods import erase_identifier
from domainstudio.training.objective import Batch, Objective, Prompts, look
from domainstudio.training.processes import Processes, open_accelerator
from domainstudio.training.state import TrainState

MixedPrecision = Literal["no", "fp16", "bf16"]
OptimizerName = Literal["adamw", "adamw8bit", "prodigy"]
EMBEDDING_RATE = 5.0
"""Times the learning rate: that of a new word's embedding, whose gradients come through the whole text encoder."""


@dataclass(frozen=True)
class TrainConfig:
    """How to optimise; what to optimise is the Objective's."""

    max_train_steps: int
    train_batch_size: int
    """Of all processes together, as all sizes here."""
    learning_rate: float
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    use_ema: bool = True
    ema_decay: float | None = None
    """Of the average at every step; None: `ema_decay`, warmed up."""
    random_flip: bool = False
    pair_batch_size: int = 10
    """Source samples a step, where the objective looks at them."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged before a step. Pairs are formed within each batch, so pairwise terms mean
    what they mean without accumulation."""
    optimizer: OptimizerName = "adamw"
    erase_steps: int = 0
    """Of the first steps, how many take out of the target prompt what its identifier meant (`erase_identifier`)."""
    binding_steps: int = 0
    """Of the last steps, how many tie what was learned to its identifier (`binding_loss`)."""
    noise_offset: float = 0.0
    """Size of a constant added to each channel's noise, which lets a model change a picture's overall brightness."""
    mixed_precision: MixedPrecision = "no"
    seed: int = 0

    @property
    def learning_steps(self) -> int:
        """Those before binding."""
        return self.max_train_steps - self.binding_steps

    @property
    def asks_source(self) -> bool:
        """Whether some steps look at the source and its samples, whatever the objective does."""
        return self.erase_steps > 0 or self.binding_steps > 0

    def batches(self, num_prior: int | None) -> dict[str, int]:
        """How many pictures a batch has, by its setting; `num_prior` source samples are there to choose from."""
        pairs = {} if num_prior is None else {"pair_batch_size": min(self.pair_batch_size, num_prior)}
        return {"train_batch_size": self.train_batch_size, **pairs}


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


class Training:
    """A run in progress: student, optimiser and average, the same in every process. `train` drives it."""

    def __init__(self, adaptation: Adaptation, config: TrainConfig, accelerator: Accelerator):
        self.adaptation, self.config, self.accelerator = adaptation, config, accelerator
        self.processes = Processes.of(accelerator)
        self.parameters = adaptation.parameters()
        self.taught: list[Tensor] = []
        self.step = 0
        self._start()

    def _start(self) -> None:
        """A new optimiser, and a new average of what comes."""
        embedding, config = find_embedding(self.adaptation.network), self.config
        vector = None if embedding is None else embedding.vector
        groups = [{"params": [p for p in self.parameters if p is not vector], "scale": 1.0}]
        if vector is not None:  # Prodigy finds the rate itself, and takes one for all
            scale = 1.0 if config.optimizer == "prodigy" else EMBEDDING_RATE
            groups.append({"params": [vector], "scale": scale, "weight_decay": 0.0})
        optimizer = find_optimizer(config.optimizer)
        self.optimizer = self.accelerator.prepare_optimizer(
            optimizer(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        )
        self.average = [p.detach().clone() for p in self.parameters] if config.use_ema else []

    @property
    def is_binding(self) -> bool:
        """Whether the next step ties to the identifier what was learned."""
        return self.step >= self.config.learning_steps

    def begin_binding(self) -> None:
        """From here on the student is its average, which is what it learns from, too."""
        self._put(self.average)
        self.taught = [p.detach().clone() for p in self.parameters]
        self._start()

    def state(self) -> TrainState:
        """A snapshot that shares the tensors."""
        scaler = self.accelerator.scaler
        return TrainState(
            self.step,
            self.adaptation.state(),
            self.average,
            self.optimizer.state_dict(),
            scaler.state_dict() if scaler else {},
            self.taught,
        )

    def load(self, state: TrainState) -> None:
        """Continues from a checkpoint.

        Raises:
            UserError: if it was written with other EMA settings.
        """
        if bool(state.average) != self.config.use_ema:
            raise UserError("the checkpoint and the recipe disagree on use_ema; resume with the run's own config.toml")
        self.step = state.step
        self.adaptation.load_state(state.student)
        device = self.parameters[0].device
        self.average = [tensor.to(device) for tensor in state.average]
        self.taught = [tensor.to(device) for tensor in state.taught]
        self.optimizer.load_state_dict(state.optimizer)
        if state.scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one batch."""
        self.accelerator.backward(loss)

    @torch.no_grad()
    def update(self) -> float:
        """One optimiser step; returns the gradient norm before clipping."""
        self.processes.sum_gradients(self.parameters)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        assert norm is not None
        config = self.config
        done, steps, factor = self.step, config.learning_steps, 1.0
        if self.is_binding:
            done, steps = done - steps, config.binding_steps
            factor = BINDING_RATE * (1 - done / steps)
        rate = config.learning_rate * min(1.0, (done + 1) / max(1, config.lr_warmup_steps)) * factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)  # which older checkpoints lack
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.average:
            decay = config.ema_decay or min(ema_decay(steps), (done + 1) / (done + 11))
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.lerp_(parameter, 1 - decay)
        return norm.item()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The student, holding its averaged weights inside; its own come back after.

        A compiled one runs as it is written inside: what observers draw has other shapes, each of which would be
        compiled again.
        """
        own = [p.detach().clone() for p in self.parameters] if self.average else []
        self._put(self.average)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield self.adaptation.network
        finally:
            self._put(own)

    @contextmanager
    def before_binding(self) -> Iterator[nn.Module]:
        """The student as it was when binding began, without gradients."""
        network, own = self.adaptation.network, [p.data for p in self.parameters]
        training = network.training
        network.eval()
        self._point(self.taught)
        try:
            with torch.no_grad():
                yield network
        finally:
            self._point(own)
            torch.clear_autocast_cache()  # which knows weights by their name, not by what they hold
            network.train(training)

    def _point(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=False):
            parameter.copy_(value)


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
    deck = _Deck(model, config, images.to(device), prior, prompts)
    if objective.classifier is not None:
        deck.fit(objective.classifier, adaptation)

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


class _Deck:
    """What batches are drawn from: the training pictures, encoded once, and the source samples."""

    def __init__(
        self, model: DiffusionModel, config: TrainConfig, images: Tensor, prior: Batch | None, prompts: Prompts | None
    ):
        self.codec, self.config, self.prior = model.codec, config, prior
        self.prompts = prompts or Prompts()
        self.encoded = model.codec.encode(images)
        self.mirrored = model.codec.encode(images.flip(-1)) if config.random_flip else self.encoded

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
        chosen = torch.randperm(len(self.prior.x0), generator=generator)[: self.config.pair_batch_size]
        return Batch(self.prior.x0[chosen].to(self.encoded), self.prior.prompts[chosen])

    def fit(self, classifier: DomainClassifier, adaptation: Adaptation) -> None:
        """Fits a classifier to all of both."""
        assert self.prior is not None
        generator = torch.Generator().manual_seed(self.config.seed)
        pictures = self.codec.draw(self.encoded, generator)
        classifier.fit(adaptation, pictures, self.prior.x0.to(pictures), generator)


def ema_decay(steps: int) -> float:
    """Averages over about the last 15 % of the steps: a fixed 0.9999 would keep a short run at its source."""
    return min(0.9999, 1 - 1 / max(1.0, 0.15 * steps))


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


def find_optimizer(name: OptimizerName) -> Callable[..., torch.optim.Optimizer]:
    """The class of an optimiser.

    Raises:
        UserError: if its package is not installed.
    """
    try:
        match name:
            case "adamw":
                return partial(torch.optim.AdamW, fused=True)
            case "adamw8bit":
                from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

                return AdamW8bit
            case "prodigy":
                from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports]

                return partial(Prodigy, safeguard_warmup=True)
    except ImportError as error:
        raise UserError(
            f"optimizer {name} needs the package {error.name}: pip install 'domainstudio[optimizers]'"
        ) from error
    raise ValueError(name)


def _notify(observers: Sequence[Observer], event: StepEvent, processes: Processes) -> bool:
    """Tells the observers, up to one that stops the run; whether one did, in any process."""
    stops = False
    try:
        for observer in observers:
            observer(event)
    except StopTraining:
        stops = True
    return any(processes.everyone(stops))
