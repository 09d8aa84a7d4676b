"""Use cases on run folders: train one, sample from one. The folder's layout is known here and nowhere else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from domainstudio.app.recipe import Recipe, build_recipe
from domainstudio.data.bundled import bundled_model, strip_prefix
from domainstudio.data.domain import Domain, load_domain, to_pil
from domainstudio.errors import UserError
from domainstudio.models.adaptation import LORA_FILE, Adaptation, FullAdaptation, LoraAdaptation, save_lora
from domainstudio.models.load import load_model
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sample import Progress, decode, sample
from domainstudio.training.methods import build_objective
from domainstudio.training.observers import Checkpoints, MetricsLog, SampleSheets
from domainstudio.training.state import (
    TrainState,
    find_checkpoint,
    load_checkpoint,
    remove_checkpoints_after,
    remove_whole,
    written_whole,
)
from domainstudio.training.train import Observer, TrainConfig, Training, train


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what."""

    path: Path

    @property
    def config(self) -> Path:
        """The recipe, re-runnable as is."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """step_N/ folders of pictures."""
        return self.path / "samples"

    @property
    def pipeline(self) -> Path:
        """The result, an ordinary diffusers pipeline folder."""
        return self.path / "pipeline"

    @property
    def prior(self) -> Path:
        """Source samples that pairs are formed of."""
        return self.path / "source_samples.safetensors"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    def recipe(self) -> Recipe:
        """The run's recipe.

        Raises:
            UserError: if this is not a run folder.
        """
        if not self.config.is_file():
            raise UserError(
                f"{self.path} is not a run folder: it has no config.toml; give the output_dir of a train run"
            )
        return build_recipe(self.config, {})

    def finished(self) -> Path:
        """The result's folder.

        Raises:
            UserError: if training has not finished.
        """
        self.recipe()
        if not (self.pipeline / "model_index.json").is_file():
            raise UserError(
                f"{self.path} has no result yet; continue it with: "
                f"domainstudio train {self.config} --resume-from-checkpoint latest"
            )
        return self.pipeline


def open_source(name_or_path: str, device: torch.device | str = "cpu") -> DiffusionModel:
    """A source model by folder, hub name or `bundled:NAME`."""
    name = strip_prefix(name_or_path)
    return load_model(name_or_path if name is None else bundled_model(name), device)


def build_adaptation(model: DiffusionModel, recipe: Recipe, needs_source: bool) -> Adaptation:
    """Full fine-tuning (with a frozen copy only where a term looks at the source) or LoRA."""
    if recipe.adapter == "lora":
        return LoraAdaptation(model.network, recipe.rank, recipe.scale_alpha, recipe.seed)
    return FullAdaptation(model.network, keep_source=needs_source)


def train_run(
    recipe: Recipe,
    resume_from_checkpoint: str | None = None,
    observers: Sequence[Observer] = (),
    drawing: Progress | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> RunFolder:
    """Runs a recipe from beginning (or checkpoint) to end and leaves a finished run folder.

    Raises:
        UserError: for pictures, settings or folders that cannot be used; before anything is written where possible.
    """
    folder = RunFolder(Path(recipe.output_dir))
    resume = _find_start(folder, recipe, resume_from_checkpoint, log)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    model = open_source(recipe.pretrained_model_name_or_path, accelerator.device)
    domain = open_domain(recipe, model)
    objective = build_objective(
        recipe.method,
        model,
        pairing=recipe.pairing,
        centre_pairs=recipe.centre_pairs,
        high_noise_weight=recipe.high_noise_weight,
        image_weight=recipe.image_weight,
        hf_weight=recipe.hf_weight,
        hfmse_weight=recipe.hfmse_weight,
        space=recipe.space,
    )
    folder.path.mkdir(parents=True, exist_ok=True)
    if resume is not None:
        _drop_what_follows(folder, resume.step, recipe.max_train_steps)
    partial = folder.config.with_suffix(".partial")
    partial.write_text(recipe.to_toml(), encoding="utf-8")
    partial.replace(folder.config)
    prior = None
    if objective.pairing == "source_samples":  # drawn before an adapter is put into the network
        prior = _source_samples(folder, model, recipe, drawing)
    adaptation = build_adaptation(model, recipe, needs_source=objective.pairing != "none")
    config = TrainConfig(
        max_train_steps=recipe.max_train_steps,
        train_batch_size=recipe.train_batch_size,
        learning_rate=recipe.lr,
        lr_warmup_steps=recipe.lr_warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=recipe.weight_decay,
        use_ema=recipe.use_ema,
        random_flip=recipe.random_flip,
        pair_batch_size=recipe.pair_batch_size,
        mixed_precision=recipe.mixed_precision,
        seed=recipe.seed,
    )
    last = recipe.max_train_steps
    sheets = SampleSheets(
        folder.samples,
        model,
        recipe.num_validation_images,
        recipe.validation_steps,
        last,
        recipe.seed,
        recipe.num_inference_steps,
    )
    checkpoints = Checkpoints(folder.path, recipe.checkpointing_steps, last, recipe.checkpoints_total_limit)
    watchers = (MetricsLog(folder.metrics), sheets, checkpoints, *observers)
    run = train(model, adaptation, domain.images, objective, config, prior, watchers, resume, accelerator)
    _save_result(folder, model, run, recipe)
    return folder


def open_domain(recipe: Recipe, model: DiffusionModel) -> Domain:
    """The recipe's training pictures at the model's size.

    Raises:
        UserError: if the recipe asks for another resolution, or the pictures cannot be used.
    """
    if recipe.resolution not in (None, model.resolution):
        raise UserError(
            f"resolution={recipe.resolution}, but {recipe.pretrained_model_name_or_path} makes {model.resolution} px "
            f"pictures; leave resolution out (pictures are resized to {model.resolution} px)"
        )
    return load_domain(recipe.instance_data_dir, model.resolution)


def sample_run(run: Path, num_images: int, seed: int, output_dir: Path, progress: Progress | None = None) -> Path:
    """Writes `num_images` pictures of a finished run (or any pipeline folder) into `output_dir`.

    Raises:
        UserError: if the run has no result, or `output_dir` already holds pictures.
    """
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(f"{output_dir} is not an empty folder; give a new --output-dir, so that sets are not mixed")
    images = draw_pictures(run, num_images, seed, progress)
    output_dir.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(to_pil(images)):
        image.save(output_dir / f"{index:05d}.png")
    return output_dir


def draw_pictures(run: Path, num_images: int, seed: int, progress: Progress | None = None) -> Tensor:
    """(num_images, 3, H, W) in [-1, 1] from a finished run or a pipeline folder."""
    if (run / "model_index.json").is_file():
        pipeline, steps = run, Recipe.model_fields["num_inference_steps"].default
    else:
        folder = RunFolder(run)
        pipeline, steps = folder.finished(), folder.recipe().num_inference_steps
    return draw_from(load_model(pipeline, _device()), num_images, seed, steps, progress)


def draw_from(
    model: DiffusionModel, num_images: int, seed: int, num_inference_steps: int, progress: Progress | None = None
) -> Tensor:
    """(num_images, 3, H, W) in [-1, 1] from a loaded model."""
    x0 = sample(model, model.network, num_images, seed, num_inference_steps, progress=progress)
    return decode(model, x0, next(model.network.parameters()).device)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _find_start(folder: RunFolder, recipe: Recipe, resume: str | None, log: Callable[[str], None]) -> TrainState | None:
    """Where to continue; None to start from the beginning.

    Raises:
        UserError: if that would overwrite what is in the folder, or mix two runs.
    """
    taken = folder.path.exists()
    if folder.path.is_dir():  # a kill before the first step may have left config.partial alone
        taken = any(path.name != "config.partial" for path in folder.path.iterdir())
    if taken and (resume is None or not folder.config.is_file()):
        kind = "already holds a run" if folder.config.exists() else "is not an empty folder"
        raise UserError(
            f"output_dir {folder.path} {kind}; continue a run with --resume-from-checkpoint latest, or give a new "
            "--output-dir"
        )
    if resume is None:
        return None
    if taken:
        begun = folder.recipe().model_dump(exclude=_MAY_CHANGE)
        changed = {name: value for name, value in recipe.model_dump(include=set(begun)).items() if value != begun[name]}
        if changed:
            lines = "\n".join(f"  {name} = {begun[name]!r}, now {value!r}" for name, value in changed.items())
            raise UserError(
                f"the run in {folder.path} was begun with other settings:\n{lines}\n"
                f"continue it with {folder.config}, or give a new --output-dir"
            )
    checkpoint = find_checkpoint(folder.path, resume)
    if checkpoint is None:
        log(f"{folder.path} has no checkpoint yet: starting from the beginning")
        return None
    state = load_checkpoint(checkpoint)
    if state.step > recipe.max_train_steps:
        raise UserError(
            f"{checkpoint} is beyond max_train_steps={recipe.max_train_steps}; give {state.step} or more, or resume "
            "from an earlier checkpoint"
        )
    log(f"continuing from {checkpoint}")
    return state


_MAY_CHANGE = {
    *("output_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit"),
    *("validation_steps", "num_validation_images"),
}


def _drop_what_follows(folder: RunFolder, step: int, last: int) -> None:
    """Steps after `step` are done again: checkpoints after it, and the result, are of another future."""
    remove_checkpoints_after(folder.path, step)
    if step < last:
        remove_whole(folder.pipeline)


def _source_samples(folder: RunFolder, model: DiffusionModel, recipe: Recipe, drawing: Progress | None) -> Tensor:
    """The pool of source samples, drawn once a run, in model space."""
    if folder.prior.exists():
        return load_file(folder.prior)["x0"]
    # Seeds of the pool are far from those that results are sampled with.
    x0 = sample(
        model,
        model.network,
        recipe.num_prior_images,
        seed=recipe.seed + 500_000,
        num_inference_steps=recipe.num_inference_steps,
        progress=drawing,
    )
    partial = folder.prior.with_suffix(".partial")
    save_file({"x0": x0}, partial)
    partial.rename(folder.prior)
    return x0


def _save_result(folder: RunFolder, model: DiffusionModel, run: Training, recipe: Recipe) -> None:
    with run.averaged():
        if isinstance(run.adaptation, LoraAdaptation):
            save_lora(run.adaptation, folder.path / LORA_FILE, recipe.rank, recipe.scale_alpha)
        merged = run.adaptation.merged()
    student = model.pipeline.unet  # pyright: ignore[reportAttributeAccessIssue]
    model.pipeline.register_modules(unet=merged.eval())
    with written_whole(folder.pipeline) as partial:
        model.pipeline.save_pretrained(partial)
    model.pipeline.register_modules(unet=student)
