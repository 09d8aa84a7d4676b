"""Use case: train a run, from beginning or checkpoint to its result."""

from collections.abc import Callable, Sequence
from pathlib import Path

from domainstudio.app.draw import validation_guidance
from domainstudio.app.folder import RunFolder, drop_what_follows, find_start
from domainstudio.app.materials import draw_source_samples
from domainstudio.app.opened import open_recipe, train_config
from domainstudio.app.recipe import Recipe
from domainstudio.app.watching import Watching
from domainstudio.data.domain import Domain
from domainstudio.errors import UserError
from domainstudio.evaluation.watch import tell
from domainstudio.models.adaptation import Adaptation, LoraAdaptation
from domainstudio.models.condition import TextDenoiser
from domainstudio.models.load import save_pipeline
from domainstudio.models.lora_files import save_diffusers_lora, save_lora
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sample import Progress, through_codec
from domainstudio.training.observers import Checkpoints, MetricsLog, SampleSheets
from domainstudio.training.processes import Processes, open_accelerator
from domainstudio.training.state import TrainState, written_whole
from domainstudio.training.train import Observer


def train_run(
    recipe: Recipe,
    resume_from_checkpoint: str | None = None,
    observers: Sequence[Observer] = (),
    drawing: Progress | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> RunFolder:
    """Runs a recipe from beginning (or checkpoint) to end and leaves a finished run folder.

    Several processes each call this; `observers`, `drawing` and `log` are called in the main one alone, which is also
    the only one that writes. The folder has to be on a disk that all of them see.

    Raises:
        UserError: for pictures, settings or folders that cannot be used; before anything is written where possible.
    """
    folder = RunFolder(Path(recipe.output_dir))
    accelerator = open_accelerator(recipe.mixed_precision)
    processes = Processes.of(accelerator)
    log = processes.on_main(log)
    resume = find_start(folder, recipe, resume_from_checkpoint, log)
    opened = open_recipe(recipe, accelerator, log)
    config = train_config(opened.recipe)
    processes.check_batches(**config.batches(recipe.num_class_images if opened.draws else None))
    _begin(folder, recipe, resume, processes)
    samples = None
    if opened.draws:  # drawn before an adapter is put into the network
        drawing = drawing if processes.is_main else None
        samples = draw_source_samples(folder, opened.model, recipe, opened.prior, drawing, processes)
    model, adaptation = opened.adapt()
    watching = _watching(folder, model, adaptation, recipe, opened.domain, log)
    in_main = map(processes.on_main, (*observers, *watching))
    observers = (*_watchers(folder, model, adaptation, recipe, processes), *in_main)
    run = opened.train(model, adaptation, config, samples, observers, resume)
    if processes.is_main:
        with run.averaged():
            _save_result(folder, model, adaptation)
    processes.wait()
    for watch in watching:
        if watch.readings:
            log(tell(watch.readings))
    return folder


def _begin(folder: RunFolder, recipe: Recipe, resume: TrainState | None, processes: Processes) -> None:
    """Makes the folder ready for the steps to come, once every process has found that they can be done.

    Raises:
        UserError: if the processes do not see the same folder.
    """
    starts = processes.everyone(resume.step if resume else 0)
    if len(set(starts)) > 1:
        raise UserError(
            f"the processes would start from different steps ({', '.join(map(str, starts))}): output_dir {folder.path} "
            "has to be on a disk that all of them see"
        )
    if not processes.is_main:
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    if resume is not None:
        drop_what_follows(folder, resume.step, recipe.max_train_steps)
    partial = folder.config.with_suffix(".partial")
    partial.write_text(recipe.to_toml(), encoding="utf-8")
    partial.replace(folder.config)


def _watchers(
    folder: RunFolder, model: DiffusionModel, adaptation: Adaptation, recipe: Recipe, processes: Processes
) -> tuple[Observer, ...]:
    num_images, last = recipe.num_validation_images, recipe.max_train_steps
    sheets = SampleSheets(
        folder.samples,
        model,
        num_images,
        recipe.validation_steps,
        last,
        recipe.seed,
        recipe.num_inference_steps,
        None if model.condition is None else validation_guidance(recipe, num_images),
        adaptation if model.condition is not None and isinstance(adaptation, LoraAdaptation) else None,
        processes,
    )
    checkpoints = Checkpoints(folder.path, recipe.checkpointing_steps, last, recipe.checkpoints_total_limit)
    return processes.on_main(MetricsLog(folder.metrics)), sheets, processes.on_main(checkpoints)


def _watching(
    folder: RunFolder,
    model: DiffusionModel,
    adaptation: Adaptation,
    recipe: Recipe,
    domain: Domain,
    log: Callable[[str], None],
) -> tuple[Watching, ...]:
    """The watch, if the recipe wants it."""
    if not recipe.watch:
        return ()

    def save(best: RunFolder) -> None:
        _save_result(best, model, adaptation)

    device = next(model.network.parameters()).device
    training = through_codec(model, domain.images.to(device)).to(device)
    after = train_config(recipe).learning_steps if recipe.binding_steps else 0
    return (Watching(folder, training, save, recipe.stop_when_overfitting, log, after),)


def _save_result(folder: RunFolder, model: DiffusionModel, adaptation: Adaptation) -> None:
    """Writes the student with the weights it has now."""
    if isinstance(adaptation, LoraAdaptation):
        if model.condition is not None:  # the LoRA is the result; `export --format merged` makes a pipeline of it
            with written_whole(folder.path / "lora") as partial:
                save_diffusers_lora(adaptation, partial)
            return
        save_lora(adaptation, folder.lora)
    merged = adaptation.merged().eval()
    modules = {"unet": merged}
    if isinstance(merged, TextDenoiser):
        modules = {"unet": merged.unet, "text_encoder": merged.text_encoder}
    students = {name: getattr(model.pipeline, name) for name in modules}
    model.pipeline.register_modules(**modules)
    with written_whole(folder.pipeline) as partial:
        save_pipeline(model.pipeline, partial)
    model.pipeline.register_modules(**students)
