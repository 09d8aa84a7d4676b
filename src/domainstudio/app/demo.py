"""Use case: the demonstration, plain fine-tuning or DreamBooth against DomainStudio on a bundled domain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainstudio.app.compare import METHOD_TITLES, Comparison, compare
from domainstudio.app.folder import RunFolder
from domainstudio.app.measure import Progress
from domainstudio.app.recipe import Recipe, build_recipe
from domainstudio.app.runs import train_run
from domainstudio.errors import UserError
from domainstudio.training.train import Observer


@dataclass(frozen=True)
class Demo:
    """What is shown: the methods, their common settings, and what the results are asked for besides."""

    max_train_steps: dict[str, int]
    """Of each method."""
    domain: str
    output_dir: Path
    settings: dict[str, Any] = field(default_factory=dict)
    domain_settings: dict[str, Any] = field(default_factory=dict)
    """Of `domain` alone, not of another that is asked for."""
    captions: tuple[str, ...] = ()


PICTURES = Demo({"finetune": 400, "studio": 300}, "bundled:ink", Path("demo"))
TEXT = Demo(
    {"dreambooth": 100, "studio": 300},
    "bundled:watercolour",
    Path("demo-text"),
    settings={
        "pretrained_model_name_or_path": "bundled:avatars-text",
        "instance_prompt": "{caption}, <pyramid>",
        "class_prompt": "a portrait of a person",
        "lora_layers": "all",
        "learning_rate": 1e-3,
        "train_batch_size": 10,
        "pair_batch_size": 10,
        "guidance_scale": 2.0,
    },
    domain_settings={"captions": "files"},
    captions=(  # none of the ten training pictures shows any of these
        "a portrait of a woman with big curly red hair and round glasses",
        "a portrait of a man with a turban, smiling",
        "a portrait of a person with flowers in the hair, wearing a green hoodie",
        "a portrait of a man with short black hair and a moustache",
    ),
)


def run_demo(
    shown: Demo,
    output_dir: Path | None = None,
    domain: str | None = None,
    max_train_steps: int | None = None,
    num_images: int = 64,
    observers: Callable[[Recipe], Sequence[Observer]] = lambda recipe: (),
    progress: Progress | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> Comparison:
    """Trains each method on a bundled domain, from the bundled source, and compares them in a report.

    Finished runs in `output_dir` with the same recipe are kept, so that a second call only measures again.
    """
    runs, output_dir = [], output_dir or shown.output_dir
    for method, own_steps in shown.max_train_steps.items():
        run, steps = output_dir / method, max_train_steps or own_steps
        settings = {
            "instance_data_dir": domain or shown.domain,
            "output_dir": str(run),
            "method": method,
            "max_train_steps": steps,
            "validation_steps": max(1, steps // 4),
            "checkpointing_steps": max(1, steps // 2),
            "num_validation_images": 8,
            **shown.settings,
            **(shown.domain_settings if domain in (None, shown.domain) else {}),
        }
        recipe = build_recipe(None, settings)
        log(f"training {METHOD_TITLES[method][0]} on {recipe.instance_data_dir}, {steps} steps")
        if not _is_finished(run, recipe):
            resume = "latest" if run.is_dir() and any(run.iterdir()) else None
            train_run(recipe, resume, observers(recipe), _drawing(progress), log)
        runs.append(run)
    return compare(runs, output_dir / "report.html", num_images=num_images, progress=progress, captions=shown.captions)


def _drawing(progress: Progress | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress("drawing source samples", done, total)


def _is_finished(run: Path, recipe: Recipe) -> bool:
    folder = RunFolder(run)
    if not folder.config.is_file():
        return False
    if folder.recipe() != recipe:
        raise UserError(f"{run} holds a run with other settings; give a new --output-dir, or remove it")
    return folder.has_result
