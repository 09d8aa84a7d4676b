"""Use case: a run's result in the formats that other tools read."""

import shutil
from datetime import date
from pathlib import Path
from typing import Literal, get_args

from domainstudio import __version__
from domainstudio.app.draw import open_result
from domainstudio.app.folder import RunFolder
from domainstudio.app.materials import recipe_source
from domainstudio.app.recipe import Recipe
from domainstudio.errors import UserError
from domainstudio.models.identifier import EMBEDDING_FILE, read_embedding
from domainstudio.models.load import save_pipeline
from domainstudio.models.lora_files import save_kohya_lora
from domainstudio.models.model import DiffusionModel
from domainstudio.training.state import written_whole

ExportFormat = Literal["diffusers", "kohya", "merged"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)


def export_run(run: Path, format: ExportFormat, output: Path, metadata: bool = True) -> Path:
    """Writes a finished run's result to `output`.

    Args:
        format: "diffusers" is the LoRA that `load_lora_weights` reads, "kohya" the same for ComfyUI and A1111,
            "merged" a whole pipeline folder, without adapters. A new word's embedding goes beside a LoRA, into a file
            of the word's name, as it is what ComfyUI and A1111 know it by.
        metadata: whether a kohya file says what it was trained from, on and how.

    Raises:
        UserError: if the run has no result, none of that kind, or `output` is taken.
    """
    folder = RunFolder(run)
    result = folder.finished()
    if output.exists():
        raise UserError(f"{output} is there already; give another --output")
    if format == "merged":
        model = open_result(folder)
        with written_whole(output) as partial:
            save_pipeline(model.pipeline, partial)
        return output
    if result == folder.pipeline:
        raise UserError(
            f"{run} has no LoRA of a text-to-image model, which format {format} is for; its result is the pipeline "
            f"folder {result} (format merged copies it)"
        )
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: a LoRA is one file; give an --output that ends in .safetensors")
    embedding = _place_of_embedding(result.parent, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    if format == "diffusers":
        shutil.copyfile(result, partial)
    else:
        recipe = folder.recipe()
        described = describe(recipe, recipe_source(recipe), output.stem) if metadata else None
        save_kohya_lora(result, partial, recipe.rank, recipe.scale_alpha, described)
    if embedding is not None:
        shutil.copyfile(result.with_name(EMBEDDING_FILE), embedding)
    partial.replace(output)
    return output


def _place_of_embedding(result: Path, output: Path) -> Path | None:
    """Where the new word of a result goes, if it has one."""
    found = read_embedding(result)
    if found is None:
        return None
    place = output.with_name(f"{found[0].strip('<>')}.safetensors")
    if place == output or place.exists():
        raise UserError(f"{place} is where the embedding of {found[0]} goes, and taken; give another --output")
    return place


def _hints(recipe: Recipe) -> dict[str, str]:
    """How to write of what was learned, where that is a new word."""
    if recipe.identifier is None:
        return {}
    word = recipe.identifier.strip("<>")
    hints = {"modelspec.trigger_phrase": word}
    if recipe.binding_steps:
        hints["modelspec.usage_hint"] = (
            f"load the embedding {word}.safetensors beside the LoRA, and write its name into the negative prompt, too"
        )
    return hints


def describe(recipe: Recipe, model: DiffusionModel, title: str) -> dict[str, str]:
    """A LoRA's metadata: the model specification's keys (modelspec 1.0.1) and kohya's (ss_), which tools look at."""
    unet = model.pipeline.unet  # pyright: ignore[reportAttributeAccessIssue]
    second, v = unet.config.cross_attention_dim == 1024, model.prediction == "v"
    architecture = f"stable-diffusion-v2-{'768-v' if v else '512'}" if second else "stable-diffusion-v1"
    side = model.resolution
    return {
        **_hints(recipe),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.date": str(date.today()),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": model.prediction,
        "ss_base_model_version": f"sd_v2{'_v' * v}" if second else "sd_v1",
        "ss_v2": str(second),
        "ss_sd_model_name": recipe.pretrained_model_name_or_path,
        "ss_network_module": "networks.lora",
        "ss_output_name": title,
        "ss_resolution": f"({side}, {side})",
        "ss_learning_rate": f"{recipe.lr:g}",
        "ss_max_train_steps": str(recipe.max_train_steps),
        "ss_seed": str(recipe.seed),
        "ss_training_comment": f"domainstudio {__version__}, method {recipe.method}, prompt {recipe.instance_prompt}",
    }
