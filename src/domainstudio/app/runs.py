"""Use case: train a run, from beginning or checkpoint to its result."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from domainstudio.app.draw import validation_guidance
from domainstudio.app.folder import RunFolder, drop_what_follows, find_start
from domainstudio.app.opened import open_recipe, train_config
from domainstudio.app.pool import draw_source_samples
from domainstudio.app.recipe import Chosen, Recipe
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
    processes.check_batches(**config.batches(opened.least_samples if opened.draws else None))
    _begin(folder, recipe, opened.chosen, resume, processes)
    samples = None
    if opened.draws:  # drawn before an adapter is put into the network
        drawing = drawing if processes.is_main else None
        samples = draw_source_samples(folder, opened, drawing, log, processes)
        if processes.is_main:
            _write_config(folder, recipe, opened.chosen | opened.chosen_samples(len(samples.x0)))
    model, adaptation = opened.adapt()
    sheets = _sheets(folder, model, adaptation, recipe, processes)
    checkpoints = Checkpoints(
        folder.path, recipe.checkpointing_steps, recipe.max_train_steps, recipe.checkpoints_total_limit, processes
    )
    watching = _watching(folder, model, adaptation, recipe, opened.domain, sheets, log, processes)
    observers = (
        *(processes.on_main(MetricsLog(folder.metrics)), sheets, checkpoints),
        *map(processes.on_main, observers),
        *watching,
    )
    run = opened.train(model, adaptation, config, samples, observers, resume)
    with run.averaged() as network:
        if processes.is_main:
            _save_result(folder, model, adaptation, network)
    processes.wait()
    for watch in watching:
        if watch.readings:
            log(tell(watch.readings))
    return folder


def _begin(
    folder: RunFolder, recipe: Recipe, chosen: dict[str, Chosen], resume: TrainState | None, processes: Processes
) -> None:
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
    _write_config(folder, recipe, chosen)


def _write_config(folder: RunFolder, recipe: Recipe, chosen: dict[str, Chosen]) -> None:
    partial = folder.config.with_suffix(".partial")
    partial.write_text(recipe.to_toml(chosen), encoding="utf-8")
    partial.replace(folder.config)


def _sheets(
    folder: RunFolder, model: DiffusionModel, adaptation: Adaptation, recipe: Recipe, processes: Processes
) -> SampleSheets:
    num_images = recipe.num_validation_images
    return SampleSheets(
        folder.samples,
        model,
        num_images,
        recipe.validation_steps,
        recipe.max_train_steps,
        recipe.seed,
        recipe.num_inference_steps,
        None if model.condition is None else validation_guidance(recipe, num_images),
        adaptation if model.condition is not None and isinstance(adaptation, LoraAdaptation) else None,
        processes,
    )


def _watching(
    folder: RunFolder,
    model: DiffusionModel,
    adaptation: Adaptation,
    recipe: Recipe,
    domain: Domain,
    sheets: SampleSheets,
    log: Callable[[str], None],
    processes: Processes,
) -> tuple[Watching, ...]:
    """The watch, if the recipe wants it."""
    if not recipe.watch:
        return ()

    def save(best: RunFolder, network: nn.Module) -> None:
        _save_result(best, model, adaptation, network)

    device = next(model.network.parameters()).device
    training = through_codec(model, domain.images.to(device)).to(device)
    after = train_config(recipe).learning_steps if recipe.binding_steps else 0
    return (Watching(folder, training, save, sheets.is_due, recipe.stop_when_overfitting, log, after, processes),)


def _save_result(folder: RunFolder, model: DiffusionModel, adaptation: Adaptation, network: nn.Module) -> None:
    """Writes the student with the weights it has now: `network`, as `averaged` gives it."""
    if isinstance(adaptation, LoraAdaptation):
        if model.condition is not None:  # the LoRA is the result; `export --format merged` makes a pipeline of it
            with written_whole(folder.path / "lora") as partial:
                save_diffusers_lora(adaptation, partial)
            return
        save_lora(adaptation, folder.lora)
        network = adaptation.merged()
    modules = {"unet": network}
    if isinstance(network, TextDenoiser):
        modules = {"unet": network.unet, "text_encoder": network.text_encoder}
    students = {name: getattr(model.pipeline, name) for name in modules}
    model.pipeline.register_modules(**modules)
    with written_whole(folder.pipeline) as partial:
        save_pipeline(model.pipeline, partial)
    model.pipeline.register_modules(**students)
