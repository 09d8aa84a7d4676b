"""Use cases that measure: evaluate a run or a folder of pictures, compare several runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from domainstudio.app.draw import (
    default_device,
    draw_from,
    draw_pictures,
    open_result,
    prompts_of,
    source_guidance,
    validation_guidance,
)
from domainstudio.app.folder import RunFolder
from domainstudio.app.materials import open_domain, recipe_source
from domainstudio.app.recipe import Recipe
from domainstudio.app.watching import read_readings
from domainstudio.data.captions import fill
from domainstudio.data.domain import heldout_pictures, load_domain, read_pictures
from domainstudio.errors import UserError
from domainstudio.evaluation.cache import FeatureCache
from domainstudio.evaluation.entry import ReportEntry
from domainstudio.evaluation.evaluate import Evaluation, Evaluator, Protocol
from domainstudio.evaluation.report import write_report
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sample import TextGuidance
from domainstudio.training.observers import read_metrics

METHOD_TITLES = {
    "studio": ("DomainStudio", "our default: centred pairs of noised source samples, little weight on high noise"),
    "domainstudio": ("DomainStudio, paper", "the paper's objective and pairing, sum form"),
    "domainstudio_released": ("DomainStudio, released code", "the released code's arithmetic"),
    "ddpm_pa": ("DDPM-PA", "the unconditional objective under its first name"),
    "dreambooth": ("DreamBooth", "the denoising loss and prior preservation"),
    "finetune": ("Plain fine-tuning", "the denoising loss alone"),
}
NUM_PROMPTED = 8
"""Pictures of each caption that models are asked for besides."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""


@dataclass(frozen=True)
class Comparison:
    """A written report and the numbers in it."""

    report: Path
    entries: tuple[ReportEntry, ...]


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
    images = draw_pictures(target, num_images, seed, _part(progress, "sampling")) if is_model else read_pictures(target)
    resolution = images.shape[-1]
    training = load_domain(instance_data_dir, resolution).images
    reference = _reference(instance_data_dir, reference_dir, resolution)
    evaluator = Evaluator(training, reference, protocol or Protocol(), progress, FeatureCache())
    return evaluator.evaluate(images, prompts_of(target, num_images) if is_model else ())


def compare_runs(
    runs: Sequence[Path],
    output: Path,
    reference_dir: Path | None = None,
    num_images: int = 200,
    seed: int = 0,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    captions: Sequence[str] = (),
) -> Comparison:
    """Puts runs of the same source and training pictures side by side in one report, with its anchors.

    Args:
        captions: of text-to-image models, what each is asked for besides; the runs in their own style.

    Raises:
        UserError: if a run is not finished, or they do not share source and training pictures.
    """
    if not runs:
        raise UserError("compare needs at least one run folder")
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the report's file name, such as {output / 'report.html'}")
    folders = [RunFolder(run) for run in runs]
    recipes = [folder.recipe() for folder in folders]
    for name in ("pretrained_model_name_or_path", "instance_data_dir"):
        values = {_where(getattr(recipe, name)) for recipe in recipes}
        if len(values) > 1:
            raise UserError(
                f"the runs do not share {name} ({', '.join(sorted(values))}); compare runs of one source and set"
            )
    for folder in folders:
        folder.finished()
    recipe = recipes[0]
    source = recipe_source(recipe)
    if captions and source.condition is None:
        raise UserError(f"{recipe.pretrained_model_name_or_path} takes no prompts; leave the captions out")
    training = open_domain(recipe, source).images
    reference = _reference(recipe.instance_data_dir, reference_dir, source.resolution)
    evaluator = Evaluator(training, reference, protocol or Protocol(), progress, FeatureCache())

    pictures = draw_from(
        source,
        num_images,
        seed,
        recipe.num_inference_steps,
        _part(progress, "sampling the source"),
        None if source.condition is None else source_guidance(recipe, num_images),
    )
    entry = _entry("Un-adapted source", "what we started from", pictures, evaluator.evaluate(pictures), "source")
    entries = [replace(entry, prompted=_prompted(source, recipe, captions, seed, in_style=False))]
    for folder, run_recipe, title in zip(folders, recipes, _titles(folders, recipes), strict=True):
        entries.append(_run_entry(folder, run_recipe, title, evaluator, num_images, seed, progress, captions))
    copies = training.repeat(-(-num_images // len(training)), 1, 1, 1)[:num_images]
    note = "the training pictures themselves, handed back"
    entries.append(_entry("Copier", note, copies, evaluator.copier(num_images), "copier"))
    if reference is not None:
        note = "pictures of the domain that no model has seen"
        entries.append(_entry("Real held-out pictures", note, reference, evaluator.real(), "real"))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_report(
        output,
        title=f"{recipe.instance_data_dir} from {recipe.pretrained_model_name_or_path}",
        summary=f"{len(training)} training pictures, {num_images} samples of each model from the same noise.",
        training=training,
        entries=entries,
        details=_details(folders, recipes, num_images, seed),
    )
    return Comparison(output, tuple(entries))


def _run_entry(
    folder: RunFolder,
    recipe: Recipe,
    title: str,
    evaluator: Evaluator,
    num_images: int,
    seed: int,
    progress: Progress | None,
    captions: Sequence[str],
) -> ReportEntry:
    model = open_result(folder, default_device())
    pictures = draw_from(
        model,
        num_images,
        seed,
        recipe.num_inference_steps,
        _part(progress, f"sampling {title}"),
        None if model.condition is None else validation_guidance(recipe, num_images),
    )
    steps = f"{recipe.max_train_steps} steps"
    if (chosen := folder.chosen_step()) is not None:
        steps = f"step {chosen} of {recipe.max_train_steps}, chosen by the watch"
    note = f"{METHOD_TITLES[recipe.method][1]}; {recipe.adapter}, {steps}"
    evaluation = evaluator.evaluate(pictures, prompts_of(folder.path, num_images))
    entry = _entry(title, note, pictures, evaluation, "result")
    log, sheets = read_metrics(folder.metrics), sorted(folder.samples.glob("step_*"))
    previews = [(int(sheet.name.removeprefix("step_")), read_pictures(sheet)) for sheet in sheets]
    return replace(
        entry,
        losses=tuple(record for record in log if "watch" not in record),
        readings=tuple(read_readings(folder)),
        previews=tuple(previews),
        prompted=_prompted(model, recipe, captions, seed, in_style=True),
    )


def _prompted(
    model: DiffusionModel, recipe: Recipe, captions: Sequence[str], seed: int, in_style: bool
) -> tuple[tuple[str, Tensor], ...]:
    """Pictures of each caption; `in_style` says it as the run says what its training pictures are."""
    shown = []
    for caption in captions:
        told = fill(recipe.instance_prompt or "{caption}", caption) if in_style else caption
        guidance = TextGuidance([told], recipe.guidance_scale, recipe.negative_prompt)
        pictures = draw_from(model, NUM_PROMPTED, seed, recipe.num_inference_steps, guidance=guidance)
        shown.append((caption, pictures))
    return tuple(shown)


def _entry(title: str, note: str, images: Tensor, evaluation: Evaluation, kind) -> ReportEntry:
    return ReportEntry(
        title,
        note,
        images,
        evaluation.to_json(),
        kind,
        nearest=tuple(evaluation.nearest_indices),
        distances=tuple(evaluation.nearest_distances),
    )


def _reference(instance_data_dir: str, reference_dir: Path | None, resolution: int) -> Tensor | None:
    if reference_dir is not None:
        return read_pictures(reference_dir, resolution)
    return heldout_pictures(instance_data_dir, resolution)


def _where(name_or_path: str) -> str:
    """One spelling of a folder; hub names and bundled ones as they are."""
    path = Path(name_or_path).expanduser()
    return str(path.resolve()) if path.exists() else name_or_path


def _labels(folders: Sequence[RunFolder]) -> list[str]:
    """The runs' names, or their paths where two runs share a name."""
    names = [folder.path.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder.path) for folder in folders]


def _titles(folders: Sequence[RunFolder], recipes: Sequence[Recipe]) -> list[str]:
    """The method's name, and the run's where two runs share a method."""
    methods = [recipe.method for recipe in recipes]
    return [
        METHOD_TITLES[method][0] + (f" ({label})" if methods.count(method) > 1 else "")
        for label, method in zip(_labels(folders), methods, strict=True)
    ]


def _details(folders: Sequence[RunFolder], recipes: Sequence[Recipe], num_images: int, seed: int) -> dict[str, str]:
    rows = {
        "Source model": recipes[0].pretrained_model_name_or_path,
        "Training pictures": recipes[0].instance_data_dir,
        "Samples": f"{num_images} a model, seed {seed}, {recipes[0].num_inference_steps} denoising steps",
    }
    for label, recipe in zip(_labels(folders), recipes, strict=True):
        rows[f"Run {label}"] = (
            f"{recipe.method}, {recipe.adapter}, {recipe.max_train_steps} steps of {recipe.train_batch_size}, "
            f"learning rate {recipe.lr:g}, seed {recipe.seed}"
        )
    rows["Reproduce"] = " ; ".join(f"domainstudio train {folder.config} --output-dir NEW" for folder in folders)
    return rows


def _part(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
