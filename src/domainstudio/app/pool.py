"""The pool of source samples: drawn once of a source, shown in every run on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from domainstudio.app.folder import RunFolder
from domainstudio.app.recipe import Recipe
from domainstudio.data.captions import fill
from domainstudio.data.domain import to_pil
from domainstudio.evaluation.cache import TensorCache, digest
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sample import Progress, TextGuidance, decode, sample
from domainstudio.training.objective import Batch, Prompts
from domainstudio.training.processes import ALONE, Processes

POOL_SEED = 500_000
"""Added to the run's seed, so that source samples are far from those that results are sampled with."""


@dataclass(frozen=True)
class SourceSamples:
    """Pictures drawn once from the source, (M, C, h, w) in model space, with their prompts (text models alone)."""

    x0: Tensor
    student_prompts: tuple[str, ...] = ()
    source_prompts: tuple[str, ...] = ()

    def encoded(self, model: DiffusionModel) -> Batch:
        """As the loop takes them."""
        told = Prompts(model.encode_prompts(self.student_prompts), model.encode_prompts(self.source_prompts))
        return Batch(self.x0, told)


def draw_source_samples(
    folder: RunFolder,
    model: DiffusionModel,
    recipe: Recipe,
    prompts: Sequence[str],
    drawing: Progress | None,
    log: Callable[[str], None] = lambda message: None,
    processes: Processes = ALONE,
) -> SourceSamples:
    """The pool of a run: kept in its folder, as pictures too, and for later runs that would draw the same.

    `prompts` say what each is (text models alone). Each of `processes` draws a part, and calls this.
    """
    if processes.from_main(folder.prior.exists):
        x0 = load_file(folder.prior)["x0"]
    else:
        x0 = _kept_or_drawn(model, recipe, prompts, drawing, log, processes)
        device = next(model.network.parameters()).device
        images = processes.share(len(x0), lambda rows: decode(model, x0[rows.start : rows.stop], device))
        with processes.written(folder.prior_pictures) as pictures:
            for index, image in enumerate(to_pil(images)):
                image.save(pictures / f"{index:03d}.png")
        if processes.is_main:
            partial = folder.prior.with_suffix(".partial")
            save_file({"x0": x0}, partial)
            partial.rename(folder.prior)
    return told_samples(x0, recipe, prompts)


def told_samples(x0: Tensor, recipe: Recipe, prompts: Sequence[str]) -> SourceSamples:
    """Source samples (M, C, h, w) drawn of M `prompts` (text models alone), with what the student is told of each."""
    template = recipe.instance_prompt or ""
    return SourceSamples(x0, tuple(fill(template, prompt) for prompt in prompts), tuple(prompts))


def _kept_or_drawn(
    model: DiffusionModel,
    recipe: Recipe,
    prompts: Sequence[str],
    drawing: Progress | None,
    log: Callable[[str], None],
    processes: Processes,
) -> Tensor:
    """(num_class_images, C, h, w); the main process's cache decides, since others may see another."""
    guidance = TextGuidance(prompts, recipe.guidance_scale) if prompts else None
    cache, key = TensorCache(), _drawn_of(model, recipe, guidance) if processes.is_main else ()
    kept = processes.everyone(cache.find("source samples", key) if processes.is_main else None)[0]
    if kept is not None:
        log(f"the {len(kept)} source samples are those of an earlier run on this source ({cache.folder})")
        return kept
    x0 = processes.share(
        recipe.num_class_images,
        lambda rows: sample(
            model,
            model.network,
            recipe.num_class_images,
            seed=recipe.seed + POOL_SEED,
            num_inference_steps=recipe.num_inference_steps,
            progress=drawing,
            guidance=guidance,
            pictures=rows,
        ),
    )
    if processes.is_main:
        cache.keep("source samples", key, x0)
    return x0


def _drawn_of(model: DiffusionModel, recipe: Recipe, guidance: TextGuidance | None) -> tuple[str, ...]:
    """All that source samples depend on: weights, schedule, what is told, settings, and what computes them."""
    pipeline: Any = model.pipeline
    network: Any = model.network
    facts = (
        *(_public(config) for config in (network.config, pipeline.scheduler.config)),
        *(recipe.num_class_images, recipe.seed, recipe.num_inference_steps, guidance and guidance.scale),
        *(network.device.type, torch.__version__),
    )
    tensors = network.state_dict()
    if guidance is not None:
        tensors["told"] = model.encode_prompts([*guidance.prompts, guidance.negative_prompt])
    return (repr(facts), *(f"{name} {digest(tensor)}" for name, tensor in tensors.items()))


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """Without where it was read from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
