"""Use case: pictures from a finished run, or from any pipeline folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from domainstudio.app.folder import RunFolder
from domainstudio.app.materials import recipe_source
from domainstudio.app.recipe import Recipe
from domainstudio.data.captions import draw_alternatives, fill
from domainstudio.data.domain import to_pil
from domainstudio.errors import UserError
from domainstudio.models.load import load_model
from domainstudio.models.lora_files import load_lora
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sample import Progress, StyleGuidance, TextGuidance, decode, sample


@dataclass(frozen=True)
class Ask:
    """What to draw with a text-to-image model; None leaves it to the run's recipe."""

    prompt: str | None = None
    """{a|b} draws one of a and b for each picture."""
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    style_strength: float = 0.0
    """Pushes further away from what the source draws (`StyleGuidance`)."""
    source_prompt: str | None = None
    """`prompt` without its style, for the source."""


def sample_run(
    run: Path, num_images: int, seed: int, output_dir: Path, progress: Progress | None = None, ask: Ask | None = None
) -> Path:
    """Writes `num_images` pictures of a finished run (or any pipeline folder) into `output_dir`.

    Raises:
        UserError: if the run has no result, or `output_dir` already holds pictures.
    """
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(f"{output_dir} is not an empty folder; give a new --output-dir, so that sets are not mixed")
    images = draw_pictures(run, num_images, seed, progress, ask)
    output_dir.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(to_pil(images)):
        image.save(output_dir / f"{index:05d}.png")
    return output_dir


def draw_pictures(
    run: Path, num_images: int, seed: int, progress: Progress | None = None, ask: Ask | None = None
) -> Tensor:
    """(num_images, 3, H, W) in [-1, 1] from a finished run or a pipeline folder.

    Raises:
        UserError: if the run has no result, or the model cannot be asked that.
    """
    if (run / "model_index.json").is_file():
        model, recipe = load_model(run, default_device()), None
        steps = Recipe.model_fields["num_inference_steps"].default
    else:
        folder = RunFolder(run)
        model, recipe = open_result(folder, default_device()), folder.recipe()
        steps = recipe.num_inference_steps
    guidance = None
    if model.condition is not None:
        guidance = _guidance(ask or Ask(), recipe, run, num_images)
    elif ask is not None and ask != Ask():
        raise UserError(f"{run} takes no prompts: it is not a text-to-image model")
    return draw_from(model, num_images, seed, steps, progress, guidance)


def draw_from(
    model: DiffusionModel,
    num_images: int,
    seed: int,
    num_inference_steps: int,
    progress: Progress | None = None,
    guidance: TextGuidance | None = None,
) -> Tensor:
    """(num_images, 3, H, W) in [-1, 1] from a loaded model."""
    x0 = sample(model, model.network, num_images, seed, num_inference_steps, progress=progress, guidance=guidance)
    return decode(model, x0, next(model.network.parameters()).device)


def draw_source(
    source: DiffusionModel, recipe: Recipe, num_images: int, seed: int, progress: Progress | None = None
) -> Tensor:
    """(num_images, 3, H, W) in [-1, 1] from the source of a recipe: what there is before it is adapted."""
    guidance = None if source.condition is None else source_guidance(recipe, num_images)
    return draw_from(source, num_images, seed, recipe.num_inference_steps, progress, guidance)


def open_result(folder: RunFolder, device: torch.device | str = "cpu") -> DiffusionModel:
    """The model a finished run made: its pipeline, or its source with the LoRA in the weights."""
    result = folder.finished()
    if result == folder.pipeline:
        return load_model(result, device)
    model = recipe_source(folder.recipe(), device)
    load_lora(model, result)
    return model


def prompts_of(run: Path, num_images: int) -> list[str]:
    """What `draw_pictures` asks a run for by itself, one a picture; empty where that is nothing, or not known."""
    folder = RunFolder(run)
    if not folder.config.is_file() or (recipe := folder.recipe()).instance_prompt is None:
        return []
    return list(validation_guidance(recipe, num_images).prompts)


def validation_guidance(recipe: Recipe, num_images: int) -> TextGuidance:
    """How previews and measurements of a text-to-image run are drawn: validation_prompt, or the instance_prompt."""
    plain = recipe.prior_prompt or recipe.class_prompt or ""
    prompt = recipe.validation_prompt or fill(recipe.instance_prompt or "", plain)
    prompts = _drawn(prompt, num_images)
    return TextGuidance(prompts, recipe.guidance_scale, negative_prompt(recipe, prompts))


def negative_prompt(recipe: Recipe, prompts: Sequence[str]) -> str:
    """The recipe's own; of a bound style, the identifier belongs to it if all prompts have it (training/binding.py)."""
    word = recipe.identifier
    if not recipe.binding_steps or word is None or not all(word in prompt for prompt in prompts):
        return recipe.negative_prompt
    return ", ".join(part for part in (recipe.negative_prompt, word) if part)


def source_guidance(recipe: Recipe, num_images: int) -> TextGuidance:
    """The same for the un-adapted source, of the class prompt."""
    prompt = recipe.prior_prompt or recipe.class_prompt or recipe.instance_prompt or ""
    return TextGuidance(_drawn(prompt, num_images), recipe.guidance_scale, recipe.negative_prompt)


def _guidance(ask: Ask, recipe: Recipe | None, run: Path, num_images: int) -> TextGuidance:
    if recipe is not None:
        recipe = recipe.model_copy(
            update={
                name: value
                for name, value in (
                    ("validation_prompt", ask.prompt),
                    ("negative_prompt", ask.negative_prompt),
                    ("guidance_scale", ask.guidance_scale),
                )
                if value is not None
            }
        )
        guidance = validation_guidance(recipe, num_images)
    elif ask.prompt is None:
        raise UserError(f"{run} is a text-to-image model: say what to draw with --prompt")
    else:
        scale = Recipe.model_fields["guidance_scale"].default if ask.guidance_scale is None else ask.guidance_scale
        guidance = TextGuidance(_drawn(ask.prompt, num_images), scale, ask.negative_prompt or "")
    if not ask.style_strength:
        return guidance
    source_prompt = ask.source_prompt or (recipe.class_prompt if recipe else None)
    if recipe is None or source_prompt is None:
        raise UserError(
            "--style-strength compares with the source model: it needs a run folder, and a --source-prompt (what to "
            "draw without its style) where the run has no class_prompt"
        )
    source = recipe_source(recipe, default_device())
    style = StyleGuidance(source, _drawn(source_prompt, num_images), ask.style_strength)
    return TextGuidance(guidance.prompts, guidance.scale, guidance.negative_prompt, style)


def _drawn(prompt: str, num_images: int) -> list[str]:
    """One prompt a picture; picture i's alternatives depend on i alone, so two models are asked for the same."""
    return [draw_alternatives(prompt, index) for index in range(num_images)]


def default_device() -> str:
    """Where pictures are drawn."""
    return "cuda" if torch.cuda.is_available() else "cpu"
