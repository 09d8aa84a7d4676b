"""Use case: compare runs, and pictures made by anything, in one report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from domainstudio.app.draw import (
    default_device,
    draw_from,
    draw_source,
    negative_prompt,
    open_result,
    prompts_of,
    validation_guidance,
)
from domainstudio.app.folder import RunFolder
from domainstudio.app.materials import recipe_source
from domainstudio.app.measure import Progress, part, reference_pictures, source_landmarks
from domainstudio.app.recipe import Recipe
from domainstudio.app.watching import readings_in
from domainstudio.data.captions import fill
from domainstudio.data.domain import load_domain, read_pictures
from domainstudio.errors import UserError
from domainstudio.evaluation.cache import TensorCache
from domainstudio.evaluation.entry import ReportEntry
from domainstudio.evaluation.evaluate import Evaluation, Evaluator
from domainstudio.evaluation.protocol import Protocol
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
    "ant": ("DPMs-ANT", "adversarial noise, and a pull towards the domain by a classifier"),
    "finetune": ("Plain fine-tuning", "the denoising loss alone"),
}
NUM_PROMPTED = 8
"""Pictures of each caption that models are asked for besides."""


@dataclass(frozen=True)
class Comparison:
    """A written report and the numbers in it."""

    report: Path
    entries: tuple[ReportEntry, ...]


def compare(
    targets: Sequence[Path],
    output: Path,
    instance_data_dir: str | None = None,
    reference_dir: Path | None = None,
    num_images: int = 200,
    seed: int = 0,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    captions: Sequence[str] = (),
    source_dir: Path | None = None,
) -> Comparison:
    """Puts runs of one source and set, and pictures made by anything, side by side in one report, with its anchors.

    Args:
        targets: finished runs; folders or .zip files of pictures.
        instance_data_dir: the training pictures where no run says which they are.
        num_images: how many to draw from a run; pictures are taken whole.
        captions: of text-to-image models, what each is asked for besides; the runs in their own style.
        source_dir: pictures of the source where no run says which it is.

    Raises:
        UserError: if a run is not finished, runs do not share source and training pictures, or pictures cannot be read.
    """
    if not targets:
        raise UserError("compare needs at least one run, or folder of pictures")
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the report's file name, such as {output / 'report.html'}")
    runs = [RunFolder(target) for target in targets if (target / "config.toml").is_file()]
    recipes = _shared(runs, instance_data_dir)
    instance_data_dir = recipes[0].instance_data_dir if runs else instance_data_dir
    if instance_data_dir is None:
        raise UserError("no run says which the training pictures are: give --instance-data-dir")
    source = recipe_source(recipes[0], default_device()) if runs else None
    if captions and (source is None or source.condition is None):
        told = recipes[0].pretrained_model_name_or_path if runs else "a folder of pictures"
        raise UserError(f"{told} takes no prompts; leave the captions out")
    resolution, sets = None if source is None else source.resolution, dict[Path, Tensor]()
    for target in targets:
        if RunFolder(target) not in runs:
            sets[target] = read_pictures(target, resolution)
            resolution = sets[target].shape[-1]  # without a model, the first set's
    assert resolution is not None
    training = load_domain(instance_data_dir, resolution).images
    reference = reference_pictures(instance_data_dir, reference_dir, resolution)
    if source_dir is not None:
        landmarks = read_pictures(source_dir, resolution)
    else:
        landmarks = None if source is None else source_landmarks(source, recipes[0], seed, progress)
    evaluator = Evaluator(training, reference, protocol or Protocol(), progress, TensorCache(), landmarks)

    by = _Measuring(evaluator, num_images, seed, progress, captions)
    entries = []
    if source is not None:
        entries.append(_source_entry(source, recipes[0], by))
    about = dict(zip(runs, zip(recipes, _titles(runs, recipes), strict=True), strict=True))
    for target in targets:
        if (run := RunFolder(target)) in about:
            entries.append(_run_entry(run, *about[run], by))
        else:
            pictures = sets[target]
            note = f"{len(pictures)} pictures, however they were made"
            entry = _entry(_label(target, targets), note, pictures, evaluator.evaluate(pictures), "result")
            entries.append(replace(entry, from_noise=False))
    entries += _anchors(evaluator, training, reference, num_images if runs else len(next(iter(sets.values()))))
    title, summary = str(instance_data_dir), f"{len(training)} training pictures"
    if runs:
        title += f" from {recipes[0].pretrained_model_name_or_path}"
        summary += f", {num_images} samples of each model from the same noise"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_report(
        output,
        title=title,
        summary=f"{summary}.",
        training=training,
        entries=entries,
        details=_details(runs, recipes, num_images, seed) if runs else {},
    )
    return Comparison(output, tuple(entries))


def _shared(runs: Sequence[RunFolder], instance_data_dir: str | None) -> list[Recipe]:
    """The recipes of finished runs that have source and training pictures in common."""
    recipes = [run.recipe() for run in runs]
    for name in ("pretrained_model_name_or_path", "instance_data_dir"):
        values = {_where(getattr(recipe, name)) for recipe in recipes}
        if len(values) > 1:
            raise UserError(
                f"the runs do not share {name} ({', '.join(sorted(values))}); compare runs of one source and set"
            )
    for run in runs:
        run.finished()
    if runs and instance_data_dir is not None and _where(instance_data_dir) != _where(recipes[0].instance_data_dir):
        raise UserError(
            f"the runs were trained on {recipes[0].instance_data_dir}, not on {instance_data_dir}; leave "
            "--instance-data-dir out"
        )
    return recipes


def _anchors(evaluator: Evaluator, training: Tensor, reference: Tensor | None, num_images: int) -> list[ReportEntry]:
    """What is worst and what is best: the training pictures handed back, and real pictures."""
    copies = training.repeat(-(-num_images // len(training)), 1, 1, 1)[:num_images]
    note = "the training pictures themselves, handed back"
    anchors = [_entry("Copier", note, copies, evaluator.copier(num_images), "copier")]
    if reference is not None:
        note = "pictures of the domain that no model has seen"
        anchors.append(_entry("Real held-out pictures", note, reference, evaluator.real(), "real"))
    return anchors


def _label(target: Path, targets: Sequence[Path]) -> str:
    """A folder's name, or its path where another has the same name."""
    return target.name if [other.name for other in targets].count(target.name) == 1 else str(target)


@dataclass(frozen=True)
class _Measuring:
    """How every model of a comparison is drawn from and measured."""

    evaluator: Evaluator
    num_images: int
    seed: int
    progress: Progress | None
    captions: Sequence[str]


def _source_entry(source: DiffusionModel, recipe: Recipe, by: _Measuring) -> ReportEntry:
    pictures = draw_source(source, recipe, by.num_images, by.seed, part(by.progress, "sampling the source"))
    entry = _entry("Un-adapted source", "what we started from", pictures, by.evaluator.evaluate(pictures), "source")
    return replace(entry, prompted=_prompted(source, recipe, by.captions, by.seed, in_style=False))


def _run_entry(folder: RunFolder, recipe: Recipe, title: str, by: _Measuring) -> ReportEntry:
    model = open_result(folder, default_device())
    pictures = draw_from(
        model,
        by.num_images,
        by.seed,
        recipe.num_inference_steps,
        part(by.progress, f"sampling {title}"),
        None if model.condition is None else validation_guidance(recipe, by.num_images),
    )
    steps = f"{recipe.max_train_steps} steps"
    if (chosen := folder.chosen_step()) is not None:
        steps = f"step {chosen} of {recipe.max_train_steps}, chosen by the watch"
    note = f"{METHOD_TITLES[recipe.method][1]}; {recipe.adapter}, {steps}"
    evaluation = by.evaluator.evaluate(pictures, prompts_of(folder.path, by.num_images))
    entry = _entry(title, note, pictures, evaluation, "result")
    log, sheets = read_metrics(folder.metrics), sorted(folder.samples.glob("step_*"))
    previews = [(int(sheet.name.removeprefix("step_")), read_pictures(sheet)) for sheet in sheets]
    return replace(
        entry,
        losses=tuple(record for record in log if "watch" not in record),
        readings=tuple(readings_in(log)),
        previews=tuple(previews),
        prompted=_prompted(model, recipe, by.captions, by.seed, in_style=True),
    )


def _prompted(
    model: DiffusionModel, recipe: Recipe, captions: Sequence[str], seed: int, in_style: bool
) -> tuple[tuple[str, Tensor], ...]:
    """Pictures of each caption; `in_style` says it as the run says what its training pictures are."""
    shown = []
    for caption in captions:
        told = fill(recipe.instance_prompt or "{caption}", caption) if in_style else caption
        negative = negative_prompt(recipe, [told]) if in_style else recipe.negative_prompt
        guidance = TextGuidance([told], recipe.guidance_scale, negative)
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
