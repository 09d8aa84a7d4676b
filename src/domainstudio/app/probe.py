"""What a recipe costs: some real steps, and some drawing, without a run folder.

`python -m domainstudio.app.probe` measures the recipe on stdin (JSON) and prints JSON lines, so that each measurement
has a process, and a card, of its own, and one that runs out of memory ends alone.
"""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from domainstudio.app.draw import validation_guidance
from domainstudio.app.materials import SourceSamples, told_samples
from domainstudio.app.memory import Peak, process_peak_bytes, standing_bytes
from domainstudio.app.opened import Opened, open_recipe, train_config
from domainstudio.app.pool import POOL_SEED
from domainstudio.app.recipe import Recipe
from domainstudio.errors import UserError, message_of
from domainstudio.evaluation.watch import Watch
from domainstudio.models.codec import VaeCodec, fitting_batch
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sample import TextGuidance, decode, sample
from domainstudio.training.processes import open_accelerator
from domainstudio.training.train import StepEvent, StopTraining

LEAST_STEPS, MOST_STEPS, TIMED_SECONDS = 2, 20, 2.0
"""Steps that are timed, after one to warm up: until so much time has gone by."""
DRAWN_STEPS = 4
"""Denoising steps in which pictures are drawn, after one to warm up; all of them are alike."""


@dataclass(frozen=True)
class Facts:
    """What a recipe turns out to be on this machine."""

    device: str
    is_cuda: bool
    device_bytes: int | None
    """Of the card; None on the CPU."""
    has_bf16: bool
    is_text: bool
    is_latent: bool
    needs_prior: bool
    """Whether a step looks at source samples."""
    space: str
    """Of the image terms."""
    least_samples: int
    most_samples: int
    """Source samples that a run draws."""


@dataclass
class Cost:
    """What was measured; peaks are in bytes, of tensors, all told."""

    weights_bytes: int = 0
    """Before the first step: weights, the copies of them that a run keeps, pictures, prompts, the watch."""
    step_bytes: int = 0
    preview_bytes: int = 0
    """Of a preview and the watch's look at it."""
    source_samples_bytes: int = 0
    reserved_bytes: int | None = None
    """CUDA: the peak of what its allocator took from the card."""
    process_bytes: int | None = None
    """Linux: the most RAM of the measuring process, libraries and all."""
    loading_seconds: float = 0.0
    source_samples_seconds: float = 0.0
    """All that there may be; extrapolated from one batch in a few denoising steps."""
    step_seconds: float = 0.0
    timed_steps: int = 0
    preview_seconds: float = 0.0
    """One sheet; extrapolated likewise."""
    watch_start_seconds: float = 0.0
    watch_seconds: float = 0.0
    """One look."""
    notes: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """The most at any time."""
        return max(self.step_bytes, self.preview_bytes, self.source_samples_bytes)


@dataclass(frozen=True)
class Probe:
    """`cost` is None where memory ran out."""

    facts: Facts
    cost: Cost | None


Tell = Callable[[Facts], None]


def probe(recipe: Recipe, tell: Tell = lambda facts: None) -> Probe:
    """Measures in this process; `tell` hears the facts before anything large is done. Writes nothing.

    Raises:
        UserError: as training would, and if memory does not hold the model.
    """
    gc.collect()  # what is left of others must not go, and be missed, meanwhile
    cost, began = Cost(), time.perf_counter()
    standing = 0 if torch.cuda.is_available() else standing_bytes(torch.device("cpu"))
    try:
        opened = open_recipe(recipe, open_accelerator(recipe.mixed_precision))
    except torch.OutOfMemoryError as error:
        raise _too_large(recipe) from error
    cost.loading_seconds = time.perf_counter() - began
    facts = _facts(opened)
    tell(facts)
    try:
        samples = _source_samples(opened, cost) if opened.draws else None
        model, adaptation = opened.adapt()
        steps = _Steps(opened, model, cost)
        config = replace(train_config(opened.recipe), max_train_steps=MOST_STEPS + 1, erase_steps=0, binding_steps=0)
        opened.train(model, adaptation, config, samples if opened.objective.needs_prior else None, (steps,))
    except torch.OutOfMemoryError:
        return Probe(facts, None)
    for name in ("weights_bytes", "step_bytes", "preview_bytes", "source_samples_bytes"):
        setattr(cost, name, max(0, getattr(cost, name) - standing))
    if facts.is_cuda:
        cost.reserved_bytes = torch.cuda.max_memory_reserved()
    cost.process_bytes = process_peak_bytes()
    return Probe(facts, cost)


def _too_large(recipe: Recipe) -> UserError:
    return UserError(
        f"memory ran out while {recipe.pretrained_model_name_or_path} was read; free some, or use a larger machine"
    )


def _facts(opened: Opened) -> Facts:
    device, is_cuda = opened.accelerator.device, opened.accelerator.device.type == "cuda"
    threads = torch.get_num_threads()
    return Facts(
        torch.cuda.get_device_name(device) if is_cuda else f"CPU, {threads} thread{'s' * (threads > 1)}",
        is_cuda,
        torch.cuda.get_device_properties(device).total_memory if is_cuda else None,
        not is_cuda or torch.cuda.is_bf16_supported(including_emulation=False),
        opened.model.condition is not None,
        isinstance(opened.model.codec, VaeCodec),
        opened.objective.needs_prior,
        opened.objective.space,
        opened.least_samples,
        opened.most_samples,
    )


def _source_samples(opened: Opened, cost: Cost) -> SourceSamples:
    """One batch of source samples, in few denoising steps, standing in for all that there may be."""
    recipe, model, number = opened.recipe, opened.model, opened.most_samples

    def told(count: int) -> TextGuidance | None:
        return TextGuidance(opened.prior[:count], recipe.guidance_scale) if opened.prior else None

    with Peak(opened.accelerator.device) as peak:
        x0, _, cost.source_samples_seconds = _draw(model, model.network, recipe, number, POOL_SEED, told)
    cost.source_samples_bytes = peak.bytes
    return told_samples(x0[torch.arange(number) % len(x0)], recipe, opened.prior)


def _draw(
    model: DiffusionModel,
    network: nn.Module,
    recipe: Recipe,
    number: int,
    seed: int,
    told: Callable[[int], TextGuidance | None],
) -> tuple[Tensor, Tensor, float]:
    """One batch in model space and as pictures, and the seconds that `number` would take in all denoising steps."""
    count = min(number, fitting_batch(model.resolution))
    steps = min(DRAWN_STEPS, recipe.num_inference_steps)

    def drawn(num_inference_steps: int) -> Tensor:
        return sample(model, network, count, recipe.seed + seed, num_inference_steps, guidance=told(count))

    device = next(network.parameters()).device
    decode(model, drawn(1), device)
    began = time.perf_counter()
    x0 = drawn(steps)
    denoised = time.perf_counter()
    images = decode(model, x0, device)
    seconds = (denoised - began) * recipe.num_inference_steps / steps + time.perf_counter() - denoised
    return x0, images, seconds * number / count


class _Steps:
    """An observer that times steps, then a preview, and ends the run."""

    def __init__(self, opened: Opened, model: DiffusionModel, cost: Cost):
        self.opened, self.model, self.cost = opened, model, cost
        self.device = opened.accelerator.device
        self.peak, self.watch = Peak(self.device), None
        self.seconds: list[float] = []

    def __call__(self, event: StepEvent) -> None:
        """Counts memory from the second step on (the first makes the optimiser's state); times it and the next ones."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if event.step == 0:
            self._begin()
        elif event.step == 1:
            self.peak.start()
        else:
            self.seconds.append(now - self.began)
            if event.step == 2:
                self.peak.stop()
            done = sum(self.seconds) >= TIMED_SECONDS and len(self.seconds) >= LEAST_STEPS
            if done or len(self.seconds) == MOST_STEPS:
                self._end(event)
                raise StopTraining
        self.began = time.perf_counter()

    def _begin(self) -> None:
        if self.opened.recipe.watch:
            training, began = self.opened.domain.images.to(self.device), time.perf_counter()
            try:
                self.watch = Watch(training, _as_many(training, self.opened.recipe.num_validation_images))
            except UserError as reason:
                self.cost.notes.append(f"nothing will watch this run for overfitting: {reason}")
            self.cost.watch_start_seconds = time.perf_counter() - began
        self.cost.weights_bytes = standing_bytes(self.device)

    def _end(self, event: StepEvent) -> None:
        cost, recipe = self.cost, self.opened.recipe
        cost.step_bytes, cost.timed_steps = self.peak.bytes, len(self.seconds)
        cost.step_seconds = statistics.median(self.seconds)

        def told(count: int) -> TextGuidance | None:
            return validation_guidance(recipe, count) if self.model.condition is not None else None

        with event.averaged() as network, Peak(self.device) as peak:
            _, images, cost.preview_seconds = _draw(self.model, network, recipe, recipe.num_validation_images, 0, told)
            if self.watch is not None:
                began = time.perf_counter()
                self.watch.read(event.step, _as_many(images, recipe.num_validation_images).to(self.device))
                cost.watch_seconds = time.perf_counter() - began
        cost.preview_bytes = peak.bytes


def _as_many(images: Tensor, number: int) -> Tensor:
    return images[torch.arange(number) % len(images)]


def probe_apart(recipe: Recipe) -> Probe:
    """`probe` in a process of its own.

    Raises:
        UserError: as `probe`.
    """
    command = [sys.executable, "-P", "-m", "domainstudio.app.probe"]
    done = subprocess.run(command, input=recipe.model_dump_json(), capture_output=True, text=True)
    told: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        told |= json.loads(line)
    if "error" in told:
        raise UserError(told["error"])
    # -9 is how a system ends what takes all its memory.
    if "facts" in told and (done.returncode == -9 or "cost" in told):
        cost = told.get("cost")
        return Probe(Facts(**told["facts"]), None if cost is None else Cost(**cost))
    if done.returncode == -9:
        raise _too_large(recipe)
    raise RuntimeError(f"measuring ended with {done.returncode}:\n{done.stderr}")


def main() -> None:
    """The child of `probe_apart`."""

    def tell(**told: object) -> None:
        print(json.dumps(told), file=out, flush=True)

    out = sys.stdout
    with redirect_stdout(sys.stderr):
        try:
            result = probe(Recipe.model_validate_json(sys.stdin.read()), lambda facts: tell(facts=asdict(facts)))
            tell(cost=None if result.cost is None else asdict(result.cost))
        except (UserError, OSError) as error:
            tell(error=message_of(error))


if __name__ == "__main__":
    main()
