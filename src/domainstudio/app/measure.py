"""Use case: measure a run's samples, or pictures made by anything."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from domainstudio.app.draw import default_device, draw_pictures, draw_source, prompts_of
from domainstudio.app.folder import RunFolder
from domainstudio.app.materials import recipe_source
from domainstudio.app.recipe import Recipe
from domainstudio.data.domain import heldout_pictures, load_domain, read_pictures
from domainstudio.evaluation.cache import TensorCache
from domainstudio.evaluation.evaluate import NUM_SOURCE, Evaluation, Evaluator
from domainstudio.evaluation.protocol import Protocol
from domainstudio.models.model import DiffusionModel

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""
LANDMARK_SEED = 700_000
"""Added to the seed for the source's pictures that others are compared with: of other noise than these."""


def evaluate_pictures(
    target: Path,
    instance_data_dir: str,
    reference_dir: Path | None = None,
    num_images: int = 200,
    seed: int = 0,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    source_dir: Path | None = None,
) -> Evaluation:
    """Measures a run's samples, or a folder (or .zip) of pictures made by anything.

    Args:
        target: a finished run, a pipeline folder, or pictures.
        instance_data_dir: the training pictures, a folder or `bundled:NAME`.
        reference_dir: held-out pictures; a bundled domain brings its own.
        num_images: how many to draw from a run; a folder is taken whole.
        source_dir: what the source model draws before it is adapted; a run's source is asked by itself.
    """
    is_model = (target / "config.toml").is_file() or (target / "model_index.json").is_file()
    images = draw_pictures(target, num_images, seed, part(progress, "sampling")) if is_model else read_pictures(target)
    resolution = images.shape[-1]
    training = load_domain(instance_data_dir, resolution).images
    reference = reference_pictures(instance_data_dir, reference_dir, resolution)
    landmarks = None
    if source_dir is not None:
        landmarks = read_pictures(source_dir, resolution)
    elif (target / "config.toml").is_file():
        recipe = RunFolder(target).recipe()
        landmarks = source_landmarks(recipe_source(recipe, default_device()), recipe, seed, progress)
    evaluator = Evaluator(training, reference, protocol or Protocol(), progress, TensorCache(), landmarks)
    return evaluator.evaluate(images, prompts_of(target, num_images) if is_model else ())


def reference_pictures(instance_data_dir: str, reference_dir: Path | None, resolution: int) -> Tensor | None:
    """(M, 3, R, R) in [-1, 1]: the held-out pictures given, or those that a bundled domain brings; None without."""
    if reference_dir is not None:
        return read_pictures(reference_dir, resolution)
    return heldout_pictures(instance_data_dir, resolution)


def source_landmarks(source: DiffusionModel, recipe: Recipe, seed: int, progress: Progress | None) -> Tensor:
    """What pictures are compared with that may still look like the source's."""
    return draw_source(source, recipe, NUM_SOURCE, seed + LANDMARK_SEED, part(progress, "sampling the source"))


def part(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    """The listener to one part."""
    return None if progress is None else lambda done, total: progress(what, done, total)
