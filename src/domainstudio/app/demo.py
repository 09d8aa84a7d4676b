"""Use case: the demonstration, plain fine-tuning against DomainStudio on a bundled domain."""

from collections.abc import Callable, Sequence
from pathlib import Path

from domainstudio.app.compare import METHOD_TITLES, Comparison, Progress, compare_runs
from domainstudio.app.folder import RunFolder
from domainstudio.app.recipe import Recipe, build_recipe
from domainstudio.app.runs import train_run
from domainstudio.errors import UserError
from domainstudio.training.train import Observer

METHODS_SHOWN = ("finetune", "studio")


def run_demo(
    output_dir: Path,
    domain: str = "bundled:ink",
    max_train_steps: int = 500,
    num_images: int = 64,
    observers: Callable[[Recipe], Sequence[Observer]] = lambda recipe: (),
    progress: Progress | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> Comparison:
    """Plain fine-tuning against DomainStudio on a bundled domain, from the bundled source, with a report.

    Finished runs in `output_dir` with the same recipe are kept, so that a second call only measures again.
    """
    runs = []
    for method in METHODS_SHOWN:
        run = output_dir / method
        settings = {
            "instance_data_dir": domain,
            "output_dir": str(run),
            "method": method,
            "max_train_steps": max_train_steps,
            "validation_steps": max(1, max_train_steps // 4),
            "checkpointing_steps": max(1, max_train_steps // 2),
            "num_validation_images": 4,
        }
        recipe = build_recipe(None, settings)
        log(f"training {METHOD_TITLES[method][0]} on {domain}, {max_train_steps} steps")
        if not _is_finished(run, recipe):
            resume = "latest" if run.is_dir() and any(run.iterdir()) else None
            train_run(recipe, resume, observers(recipe), _drawing(progress), log)
        runs.append(run)
    return compare_runs(runs, output_dir / "report.html", num_images=num_images, progress=progress)


def _drawing(progress: Progress | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress("drawing source samples", done, total)


def _is_finished(run: Path, recipe: Recipe) -> bool:
    folder = RunFolder(run)
    if not folder.config.is_file():
        return False
    if folder.recipe() != recipe:
        raise UserError(f"{run} holds a run with other settings; give a new --output-dir, or remove it")
    return folder.has_result
