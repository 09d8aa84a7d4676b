"""A run folder: where a run keeps what, and where it can be continued."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from domainstudio.app.recipe import Recipe, build_recipe
from domainstudio.errors import UserError
from domainstudio.models.lora_files import DIFFUSERS_LORA_FILE, LORA_FILE
from domainstudio.training.observers import sheet_folder
from domainstudio.training.state import (
    TrainState,
    find_checkpoint,
    load_checkpoint,
    remove_checkpoints_after,
    remove_whole,
)


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

    def sheet(self, step: int) -> Path:
        """The pictures of one step."""
        return sheet_folder(self.samples, step)

    @property
    def best(self) -> "RunFolder":
        """The checkpoint that the watch chose: a run folder with its result alone."""
        return RunFolder(self.path / "best")

    @property
    def choice(self) -> Path:
        """In `best`: the step it is of, and what the watch read there."""
        return self.path / "choice.json"

    @property
    def pipeline(self) -> Path:
        """The result, an ordinary diffusers pipeline folder."""
        return self.path / "pipeline"

    @property
    def lora(self) -> Path:
        """The adapters of an unconditional model."""
        return self.path / LORA_FILE

    @property
    def diffusers_lora(self) -> Path:
        """The adapters of a text-to-image model; with LoRA they are the result."""
        return self.path / "lora" / DIFFUSERS_LORA_FILE

    @property
    def prior(self) -> Path:
        """Source samples, in model space."""
        return self.path / "source_samples.safetensors"

    @property
    def prior_pictures(self) -> Path:
        """The same as pictures, to look at."""
        return self.path / "source_samples"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    def chosen_step(self) -> int | None:
        """In `best`: the step it is of; None in other folders."""
        return json.loads(self.choice.read_text())["step"] if self.choice.is_file() else None

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

    @property
    def has_result(self) -> bool:
        """Whether training has finished."""
        return self.diffusers_lora.is_file() or (self.pipeline / "model_index.json").is_file()

    def finished(self) -> Path:
        """The result: the pipeline's folder, or the LoRA of a text-to-image model.

        Raises:
            UserError: if training has not finished.
        """
        self.recipe()
        if not self.has_result:
            raise UserError(
                f"{self.path} has no result yet; continue it with: "
                f"domainstudio train {self.config} --resume-from-checkpoint latest"
            )
        return self.diffusers_lora if self.diffusers_lora.is_file() else self.pipeline


def find_start(folder: RunFolder, recipe: Recipe, resume: str | None, log: Callable[[str], None]) -> TrainState | None:
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
    *("validation_steps", "num_validation_images", "fsdp"),
}


def drop_what_follows(folder: RunFolder, step: int, last: int) -> None:
    """Steps after `step` are done again: checkpoints after it, and the result, are of another future."""
    remove_checkpoints_after(folder.path, step)
    if step < last:
        remove_whole(folder.pipeline)
        remove_whole(folder.diffusers_lora.parent)
    if (folder.best.chosen_step() or 0) > step:
        remove_whole(folder.best.path)
