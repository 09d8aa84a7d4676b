"""What a terminal shows: progress with the time left and the named losses, and tables of numbers."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from domainstudio.app.recipe import Recipe
from domainstudio.evaluation.entry import ReportEntry
from domainstudio.evaluation.pictures import UNASKED
from domainstudio.training.train import Observer, StepEvent


class Console:
    """Progress bars and messages on stderr, so that stdout carries results alone."""

    def __init__(self):
        self._console = rich.console.Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}", style="dim"),
            console=self._console,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Console":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def log(self, message: str) -> None:
        """One line."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def warn(self, recipe: Recipe) -> None:
        """What of a recipe has no effect."""
        for warning in recipe.warnings():
            self.log(f"warning: {warning}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Shows `done` of `total` on the bar called `what`."""
        self._show(what, done, total)

    def part(self, what: str) -> Callable[[int, int], None]:
        """`progress` for one bar."""
        return lambda done, total: self._show(what, done, total)

    def observe(self, recipe: Recipe) -> Observer:
        """A bar that follows a run's steps and names its losses."""

        def show(event: StepEvent) -> None:
            losses = "  ".join(f"{name} {value:.3g}" for name, value in event.metrics.items() if name != "grad_norm")
            self._show(f"training {recipe.method}", event.step, recipe.max_train_steps, losses)

        return show

    def _show(self, what: str, done: int, total: int, losses: str = "") -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, losses=losses)
        self._progress.update(self._tasks[what], completed=done, total=total, losses=losses)


def print_table(entries: Sequence[ReportEntry]) -> None:
    """The comparison as a table on stdout."""
    table = Table(box=rich.box.SIMPLE_HEAD, caption_justify="left", collapse_padding=True, pad_edge=False)
    table.caption = (
        "Good: low KID, Intra-LPIPS near the real pictures' own, no more copies than among them, none unadapted."
    )
    table.add_column("")
    for heading in ("KID x10³", "FID", "Intra-LPIPS", "nearest", *_RATES.values(), "of"):
        table.add_column(heading, justify="right")
    for entry in entries:
        cells = [_number(entry.number(name), digits, entry.error(name)) for name, digits in _COLUMNS]
        rates = ["–" if (rate := entry.number(name)) is None else f"{100 * rate:.1f} %" for name in _RATES]
        table.add_row(entry.title, *cells, *rates, str(entry.metrics.get("num_images", "–")))
    console = rich.console.Console()
    console.print(table)
    shown = (*(name for name, _ in _COLUMNS), *_RATES)
    reasons = [entry.metrics.get("reasons", {}) for entry in entries]
    for reason in sorted({own[name] for own in reasons for name in shown if name in own}):
        console.print(f"– {reason}", markup=False, highlight=False)


_PROTOCOLS = {
    **{"kid": "kid", "fid": "fid", "intra_lpips": "intra_lpips", "copy_rate": "copy", "nearest_lpips": "copy"},
    "unadapted_rate": "unadapted",
    **dict.fromkeys(("precision", "recall", "density", "coverage"), "coverage"),
    **{"vendi": "vendi", "cmmd": "clip", "fd_dino": "dino", "clip_image": "clip", "clip_text": "clip"},
}
"""The numbers that are printed, and whose protocol they were measured by."""
_RATES = {"copy_rate": "copies", "unadapted_rate": "unadapted"}
_COLUMNS = (("kid", 1), ("fid", 1), ("intra_lpips", 3), ("nearest_lpips", 3))


def print_evaluation(result: Mapping[str, Any]) -> None:
    """One evaluation, a line a number, with protocol or reason; a last line for what was not asked for."""
    reasons = result.get("reasons", {})
    unasked = [name for name in _PROTOCOLS if UNASKED in reasons.get(name, "")]
    for name in (*_PROTOCOLS, "num_images"):
        if name in unasked:
            continue
        note = reasons.get(name) or result.get(f"{_PROTOCOLS.get(name)}_protocol") or ""
        print(f"{name:14} {_number(result[name], 4, result.get(f'{name}_error')):>17}   {note}".rstrip())
    if unasked:
        print(f"with --clip and --dino also: {', '.join(unasked)}")


def _number(value: float | None, digits: int, error: float | None = None) -> str:
    """With its standard error, if that is known."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value:.{digits}f}" + ("" if error is None else f"±{error:.{digits}f}")
