"""The pool of source samples: drawn once of a source, shown in every run on it."""

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from domainstudio.app.folder import RunFolder
from domainstudio.app.materials import SourceSamples, told_samples
from domainstudio.app.opened import Opened
from domainstudio.data.domain import to_pil
from domainstudio.evaluation.cache import TensorCache, digest
from domainstudio.models.sample import Progress, TextGuidance, decode, sample
from domainstudio.training.processes import ALONE, Processes

POOL_SEED = 500_000
"""Added to the run's seed, so that source samples are far from those that results are sampled with."""


def draw_source_samples(
    folder: RunFolder,
    opened: Opened,
    drawing: Progress | None,
    log: Callable[[str], None] = lambda message: None,
    processes: Processes = ALONE,
) -> SourceSamples:
    """The pool of a run: kept in its folder, as pictures too, and for later runs that would draw the same.

    Each of `processes` draws a part, and calls this.
    """
    model = opened.model
    if processes.from_main(folder.prior.exists):
        x0 = load_file(folder.prior)["x0"]
    else:
        x0 = _kept_or_drawn(opened, drawing, log, processes)
        device = next(model.network.parameters()).device
        images = processes.share(len(x0), lambda rows: decode(model, x0[rows.start : rows.stop], device))
        with processes.written(folder.prior_pictures) as pictures:
            for index, image in enumerate(to_pil(images)):
                image.save(pictures / f"{index:03d}.png")
        if processes.is_main:
            partial = folder.prior.with_suffix(".partial")
            save_file({"x0": x0}, partial)
            partial.rename(folder.prior)
    return told_samples(x0, opened.recipe, opened.prior)


def _kept_or_drawn(
    opened: Opened, drawing: Progress | None, log: Callable[[str], None], processes: Processes
) -> Tensor:
    """(M, C, h, w), as many as the run wants; the main process's cache decides, since others may see another."""
    cache, key = TensorCache(), _drawn_of(opened) if processes.is_main else ()
    kept = processes.everyone(cache.find("source samples", key) if processes.is_main else None)[0]
    x0 = torch.empty(0, *opened.model.sample_shape) if kept is None else kept
    known = len(x0)

    def grow(number: int) -> Tensor:
        """Of `number` of them those that are missing are drawn."""
        missing = range(len(x0), number)
        return torch.cat([x0, _draw(opened, missing, drawing, processes)]) if missing else x0

    x0 = grow(opened.least_samples)
    number = processes.everyone(opened.samples_wanted(x0[: opened.least_samples]))[0]
    x0 = grow(number)
    if known < len(x0) and processes.is_main:
        cache.keep("source samples", key, x0)
    if known:
        which = f"the {number}" if number <= known else f"the first {known} of {number}"
        log(f"{which} source samples are those of an earlier run on this source ({cache.folder})")
    return x0[:number]


def _draw(opened: Opened, rows: range, drawing: Progress | None, processes: Processes) -> Tensor:
    """Those source samples, each process its part."""
    model, recipe = opened.model, opened.recipe

    def part(own: range) -> Tensor:
        return sample(
            model,
            model.network,
            opened.most_samples,
            seed=recipe.seed + POOL_SEED,
            num_inference_steps=recipe.num_inference_steps,
            progress=told,
            guidance=_guidance(opened),
            pictures=rows[own.start : own.stop],
        )

    def told(done: int, total: int) -> None:
        if drawing is not None:
            drawing(rows.start + done, rows.start + total)

    return processes.share(len(rows), part)


def _guidance(opened: Opened) -> TextGuidance | None:
    """How text models are told what to draw."""
    return TextGuidance(opened.prior, opened.recipe.guidance_scale) if opened.prior else None


def _drawn_of(opened: Opened) -> tuple[str, ...]:
    """All that source samples depend on: weights, schedule, what is told, settings, and what computes them. Their
    number is left out: more of them begin as fewer do."""
    model, recipe, guidance = opened.model, opened.recipe, _guidance(opened)
    pipeline: Any = model.pipeline
    network: Any = model.network
    facts = (
        *(_public(config) for config in (network.config, pipeline.scheduler.config)),
        *(recipe.seed, recipe.num_inference_steps, guidance and guidance.scale),
        *(network.device.type, torch.__version__),
    )
    tensors = network.state_dict()
    if guidance is not None:
        tensors["told"] = model.encode_prompts([*guidance.prompts, guidance.negative_prompt])
    return (repr(facts), *(f"{name} {digest(tensor)}" for name, tensor in tensors.items()))


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """Without where it was read from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
