"""What watches a run: the metrics log, sample sheets and checkpoints. Each is a callable that takes a StepEvent."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from domainstudio.data.domain import to_pil
from domainstudio.models.adaptation import LoraAdaptation
from domainstudio.models.lora_files import pass_through_file
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sample import TextGuidance, decode, sample
from domainstudio.training.processes import ALONE, Processes
from domainstudio.training.state import save_checkpoint
from domainstudio.training.train import StepEvent


class MetricsLog:
    """Appends one JSON object a step to metrics.jsonl; on resuming, first drops the steps that will be done again."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, event: StepEvent) -> None:
        """Writes the step, or (at the start) cuts the log back to it."""
        if not event.metrics:
            kept = [record for record in read_metrics(self.path) if record["step"] <= event.step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
            partial.replace(self.path)
            return
        self.add(event.step, event.metrics)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one object more of a step."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def sheet_folder(samples: Path, step: int) -> Path:
    """Where the pictures of one step are."""
    return samples / f"step_{step:06d}"


class SampleSheets:
    """Writes samples/step_N/ from the same noise every time: before the first step, every `every` steps, at the end.

    Each of `processes` draws a part, so it is to be called in all of them; the main process writes.
    With `lora` (of a text-to-image model), each holds the LoRA file too, from which its pictures are drawn.
    """

    def __init__(
        self,
        folder: Path,
        model: DiffusionModel,
        num_images: int,
        every: int,
        last: int,
        seed: int,
        num_inference_steps: int,
        guidance: TextGuidance | None = None,
        lora: LoraAdaptation | None = None,
        processes: Processes = ALONE,
    ):
        self.folder, self.model = folder, model
        self.num_images, self.every, self.last = num_images, every, last
        self.seed, self.num_inference_steps = seed, num_inference_steps
        self.guidance, self.lora, self.processes = guidance, lora, processes

    def is_due(self, step: int) -> bool:
        """Whether there is a sheet of this step."""
        return _is_due(step, self.every, self.last)

    def __call__(self, event: StepEvent) -> None:
        """Samples with the averaged weights when a sheet is due."""
        folder = sheet_folder(self.folder, event.step)
        if not self.is_due(event.step) or (not event.metrics and self.processes.from_main(folder.exists)):
            return
        with event.averaged() as network, self.processes.written(folder) as sheet:
            if self.lora is not None:
                pass_through_file(self.lora, sheet)
            images = self.processes.share(self.num_images, lambda pictures: self._draw(network, pictures))
            for index, image in enumerate(to_pil(images)):
                image.save(sheet / f"{index:03d}.png")

    def _draw(self, network: nn.Module, pictures: range) -> Tensor:
        x0 = sample(
            self.model,
            network,
            self.num_images,
            self.seed,
            self.num_inference_steps,
            guidance=self.guidance,
            pictures=pictures,
        )
        return decode(self.model, x0, next(network.parameters()).device)


class Checkpoints:
    """Writes checkpoint-N/ every `every` steps and at the end, keeping the newest `total_limit`.

    To be called in all of `processes`, each of which may hold a part of the state; the main one writes.
    """

    def __init__(self, output_dir: Path, every: int, last: int, total_limit: int | None, processes: Processes = ALONE):
        self.output_dir, self.every, self.last, self.total_limit = output_dir, every, last, total_limit
        self.processes = processes

    def __call__(self, event: StepEvent) -> None:
        """Saves when a checkpoint is due."""
        if event.metrics and _is_due(event.step, self.every, self.last):
            with torch.no_grad():
                state = event.state()
                if self.processes.is_main:
                    save_checkpoint(self.output_dir, state, self.total_limit)


def _is_due(step: int, every: int, last: int) -> bool:
    """What comes every so many steps and at the end."""
    return step % every == 0 or step == last
