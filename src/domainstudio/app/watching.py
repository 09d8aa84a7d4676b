"""The watch during a run: it reads each sheet of samples, logs what it says, and keeps the best checkpoint's result."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from domainstudio.app.folder import RunFolder
from domainstudio.data.domain import read_pictures
from domainstudio.errors import UserError
from domainstudio.evaluation.watch import Reading, Watch, choose, is_overfitting
from domainstudio.training.observers import MetricsLog, read_metrics
from domainstudio.training.processes import ALONE, Processes
from domainstudio.training.state import written_whole
from domainstudio.training.train import StepEvent, StopTraining


class Watching:
    """An observer, after those that write the log and the sheets; called in all of `processes`, the main one reads.

    Args:
        training: (N, 3, H, W) in [-1, 1], the pictures of the style, through the model's codec.
        save_result: writes the network, as `averaged` gives it, into a run folder as its result.
        is_due: whether there is a sheet of a step.
        stops: whether to end a run that is overfitting.
        after: the last step that is not judged: a result that is not yet bound to its identifier is none.
        log: told what is worth a line.
    """

    def __init__(
        self,
        folder: RunFolder,
        training: Tensor,
        save_result: Callable[[RunFolder, nn.Module], None],
        is_due: Callable[[int], bool],
        stops: bool,
        log: Callable[[str], None],
        after: int = 0,
        processes: Processes = ALONE,
    ):
        self.is_due, self.after, self.processes = is_due, after, processes
        self.folder, self.training, self.save_result, self.stops, self.log = folder, training, save_result, stops, log
        self.watch: Watch | None = None
        self.readings: list[Reading] = []

    def __call__(self, event: StepEvent) -> None:
        """Reads the sheet of this step if there is one.

        Raises:
            StopTraining: if the run is overfitting and is to end then.
        """
        if event.metrics and not self.is_due(event.step):
            return
        reading = self._read(event) if self.processes.is_main else None
        if self.processes.from_main(lambda: reading is not None and choose(self.readings) is reading):
            with event.averaged() as network:
                if reading is not None:
                    self._keep(reading, network)
        if reading is not None:
            MetricsLog(self.folder.metrics).add(event.step, {"watch": reading.to_json()})
            if self.stops and is_overfitting(self.readings):
                raise StopTraining

    def _read(self, event: StepEvent) -> Reading | None:
        """Of the sheet of this step, if there is one that was not read before."""
        if not event.metrics:
            self._begin()
        sheet = self.folder.sheet(event.step)
        read, early = {reading.step for reading in self.readings}, 0 < event.step <= self.after
        if self.watch is None or early or event.step in read or not sheet.is_dir():
            return None
        reading = self.watch.read(event.step, self._pictures(sheet))
        self.readings.append(reading)
        return reading

    def _begin(self) -> None:
        try:
            self.watch = Watch(self.training, self._pictures(self.folder.sheet(0)))
        except UserError as reason:  # weights that are missing, or too few pictures
            self.log(f"nothing watches this run for overfitting: {reason}")
        self.readings = read_readings(self.folder)

    def _pictures(self, sheet: Path) -> Tensor:
        return read_pictures(sheet, self.training.shape[-1]).to(self.training.device)

    def _keep(self, reading: Reading, network: nn.Module) -> None:
        with written_whole(self.folder.best.path) as partial:
            shutil.copy(self.folder.config, partial)
            best = RunFolder(partial)
            best.choice.write_text(json.dumps(reading.to_json()) + "\n")
            self.save_result(best, network)


def read_readings(folder: RunFolder) -> list[Reading]:
    """What the watch logged of a run."""
    return readings_in(read_metrics(folder.metrics))


def readings_in(log: Sequence[Mapping[str, Any]]) -> list[Reading]:
    """Those among the records of metrics.jsonl."""
    return [Reading.from_json(record["watch"]) for record in log if "watch" in record]
