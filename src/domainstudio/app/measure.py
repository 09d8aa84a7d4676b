"""Use case: measure a run's samples, or pictures made by anything."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from domainstudio.app.draw import draw_pictures, prompts_of
from domainstudio.data.domain import heldout_pictures, load_domain, read_pictures
from domainstudio.evaluation.cache import FeatureCache
from domainstudio.evaluation.evaluate import Evaluation, Evaluator
from domainstudio.evaluation.protocol import Protocol

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""


def evaluate_pictures(
    target: Path,
    instance_data_dir: str,
    reference_dir: Path | None = None,
    num_images: int = 200,
    seed: int = 0,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a run's samples, or a folder (or .zip) of pictures made by anything.

    Args:
        target: a finished run, a pipeline folder, or pictures.
        instance_data_dir: the training pictures, a folder or `bundled:NAME`.
        reference_dir: held-out pictures; a bundled domain brings its own.
        num_images: how many to draw from a run; a folder is taken whole.
    """
    is_model = (target / "config.toml").is_file() or (target / "model_index.json").is_file()
    images = draw_pictures(target, num_images, seed, part(progress, "sampling")) if is_model else read_pictures(target)
    resolution = images.shape[-1]
    training = load_domain(instance_data_dir, resolution).images
    reference = reference_pictures(instance_data_dir, reference_dir, resolution)
    evaluator = Evaluator(training, reference, protocol or Protocol(), progress, FeatureCache())
    return evaluator.evaluate(images, prompts_of(target, num_images) if is_model else ())


def reference_pictures(instance_data_dir: str, reference_dir: Path | None, resolution: int) -> Tensor | None:
    """(M, 3, R, R) in [-1, 1]: the held-out pictures given, or those that a bundled domain brings; None without."""
    if reference_dir is not None:
        return read_pictures(reference_dir, resolution)
    return heldout_pictures(instance_data_dir, resolution)


def part(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    """The listener to one part."""
    return None if progress is None else lambda done, total: progress(what, done, total)
