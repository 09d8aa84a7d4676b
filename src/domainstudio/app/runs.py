"""Use case: train a run, from beginning or checkpoint to its result."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from domainstudio.app.draw import validation_guidance
from domainstudio.app.folder import RunFolder, drop_what_follows, find_start
from domainstudio.app.materials import (
    TrainingPictures,
    draw_source_samples,
    open_domain,
    open_pictures,
    prior_prompts,
    recipe_source,
)
from domainstudio.app.recipe import Recipe
from domainstudio.app.watching import Watching
from domainstudio.data.captions import fill
from domainstudio.data.domain import Domain
from domainstudio.errors import UserError
from domainstudio.evaluation.watch import tell
from domainstudio.evaluation.weights import find_weights
from domainstudio.models.adaptation import Adaptation, FullAdaptation, LoraAdaptation
from domainstudio.models.condition import TextDenoiser
from domainstudio.models.load import save_pipeline
from domainstudio.models.lora_files import save_diffusers_lora, save_lora
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sample import Progress
from domainstudio.quiet import quiet
from domainstudio.training.methods import build_objective
from domainstudio.training.objective import Objective
from domainstudio.training.observers import Checkpoints, MetricsLog, SampleSheets
from domainstudio.training.processes import Processes, open_accelerator
from domainstudio.training.state import TrainState, written_whole
from domainstudio.training.train import Observer, TrainConfig, find_optimizer, train


def build_adaptation(model: DiffusionModel, recipe: Recipe, needs_source: bool) -> Adaptation:
    """Full fine-tuning (with a frozen copy only where a term looks at the source) or LoRA."""
    if recipe.adapter == "full":
        return FullAdaptation(model.network, keep_source=needs_source)
    is_text = model.condition is not None
    if is_text and recipe.mixed_precision != "no":  # the frozen weights are only ever used in that precision
        with quiet():
            model.network.to(torch.bfloat16 if recipe.mixed_precision == "bf16" else torch.float16)
    layers = recipe.lora_layers or ("attention" if is_text else "all")
    return LoraAdaptation(model.network, recipe.rank, recipe.scale_alpha, recipe.seed, layers)


def recipe_objective(recipe: Recipe, model: DiffusionModel) -> Objective:
    """What the recipe minimises.

    Raises:
        UserError: if a setting is given that the method or the model has no use for.
    """
    return build_objective(
        recipe.method,
        model,
        pairing=recipe.pairing,
        centre_pairs=recipe.centre_pairs,
        high_noise_weight=recipe.high_noise_weight,
        snr_gamma=recipe.snr_gamma,
        image_weight=recipe.image_weight,
        hf_weight=recipe.hf_weight,
        hfmse_weight=recipe.hfmse_weight,
        space=recipe.space,
        with_prior_preservation=recipe.with_prior_preservation,
        prior_loss_weight=recipe.prior_loss_weight,
    )


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
    model = recipe_source(recipe, accelerator.device)
    domain = open_domain(recipe, model)
    pictures = open_pictures(recipe, model, domain, log)
    objective = recipe_objective(recipe, model)
    config = _train_config(recipe)
    find_optimizer(recipe.optimizer)
    draws = objective.needs_prior or recipe.erase_steps > 0
    processes.check_batches(**config.batches(recipe.num_class_images if draws else None))
    prior = prior_prompts(recipe, pictures) if draws and model.condition is not None else []
    if model.condition is not None:  # prompts that cannot be used are told now
        model.encode_prompts(_all_prompts(recipe, pictures, prior))
    _begin(folder, recipe, resume, processes)
    samples = None
    if draws:  # drawn before an adapter is put into the network
        samples = draw_source_samples(folder, model, recipe, prior, drawing if processes.is_main else None, processes)
    model, adaptation = _student(model, recipe, needs_source=objective.needs_source or recipe.erase_steps > 0)
    watching = _watching(folder, model, adaptation, recipe, domain, log)
    in_main = map(processes.on_main, (*observers, *watching))
    run = train(
        model,
        adaptation,
        pictures.images,
        objective,
        config,
        prior=None if samples is None else samples.encoded(model),
        prompts=pictures.encoded(model),
        observers=(*_watchers(folder, model, adaptation, recipe, processes), *in_main),
        resume=resume,
        accelerator=accelerator,
    )
    if processes.is_main:
        with run.averaged():
            _save_result(folder, model, adaptation)
    processes.wait()
    for watch in watching:
        if watch.readings:
            log(tell(watch.readings))
    return folder


def _student(model: DiffusionModel, recipe: Recipe, needs_source: bool) -> tuple[DiffusionModel, Adaptation]:
    """The model as it is trained, and who is student and who is source in it."""
    if recipe.train_text_encoder:
        model = model.with_text_encoder()
    if recipe.gradient_checkpointing:
        model.checkpoint_gradients()
    return model, build_adaptation(model, recipe, needs_source)


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


def _all_prompts(recipe: Recipe, pictures: TrainingPictures, prior: list[str]) -> list[str]:
    """Whatever the text encoder will be asked for in a run."""
    previews = validation_guidance(recipe, recipe.num_validation_images)
    told = [fill(recipe.instance_prompt or "", prompt) for prompt in prior]
    return [
        *pictures.student_prompts,
        *pictures.source_prompts,
        *previews.prompts,
        recipe.negative_prompt,
        *prior,
        *told,
    ]


def _train_config(recipe: Recipe) -> TrainConfig:
    return TrainConfig(
        max_train_steps=recipe.max_train_steps,
        train_batch_size=recipe.train_batch_size,
        learning_rate=recipe.lr,
        lr_warmup_steps=recipe.lr_warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=recipe.weight_decay,
        use_ema=recipe.use_ema,
        random_flip=recipe.random_flip,
        pair_batch_size=recipe.pair_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        optimizer=recipe.optimizer,
        erase_steps=recipe.erase_steps,
        noise_offset=recipe.noise_offset,
        mixed_precision=recipe.mixed_precision,
        seed=recipe.seed,
    )


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
    """The watch, if the recipe wants it.

    Raises:
        MissingWeights: if it is to stop the run and cannot see.
    """
    if not recipe.watch:
        return ()
    if recipe.stop_when_overfitting:
        find_weights("lpips-vgg")

    def save(best: RunFolder) -> None:
        _save_result(best, model, adaptation)

    training = domain.images.to(next(model.network.parameters()).device)
    return (Watching(folder, training, save, recipe.stop_when_overfitting, log),)


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
