"""One model or anchor of a report, and how its numbers are read and written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from domainstudio.evaluation.watch import Reading

NOMINAL_COPY_RATE = 0.01  # what the copy threshold is meant to let through where no real pictures tell


@dataclass(frozen=True, eq=False)
class ReportEntry:
    """What a report shows of one model or anchor.

    Attributes:
        title: its name in the report, such as "Plain fine-tuning".
        note: one sentence: what it is.
        images: (N, 3, H, W) in [-1, 1]; the first ones share their noise across entries of kind result and source.
        metrics: `kid` (times 1,000), `fid`, `intra_lpips`, `copy_rate` and `unadapted_rate` (0 to 1),
            `nearest_lpips`, `copy_threshold`, `num_images`: a number or None; `<metric>_error`: its standard error;
            `reasons`: metric -> why it is None; `<metric>_protocol`: how it was found; `notes`: sentences for the
            small print.
        from_noise: whether the first images share their noise with those of other entries.
        nearest: for each image, the index of its nearest training picture; may be empty.
        distances: for each image, the LPIPS distance to that picture; may be empty.
        losses: one mapping a logged step: `step`, `loss` and the named terms.
        readings: what the watch read over training.
        previews: (step, (K, 3, H, W)) samples from fixed noise over training.
        prompted: (prompt, (K, 3, H, W)) samples of each of the prompts that all entries were asked for.
    """

    title: str
    note: str
    images: Tensor
    metrics: dict[str, Any]
    kind: Literal["result", "source", "copier", "real"] = "result"
    from_noise: bool = True
    nearest: tuple[int, ...] = ()
    distances: tuple[float, ...] = ()
    losses: tuple[dict[str, float], ...] = ()
    readings: tuple[Reading, ...] = ()
    previews: tuple[tuple[int, Tensor], ...] = ()
    prompted: tuple[tuple[str, Tensor], ...] = ()

    def __post_init__(self):
        for name in ("nearest", "distances"):
            if (given := len(getattr(self, name))) not in (0, len(self.images)):
                raise ValueError(
                    f"{self.title}: {given} {name} for {len(self.images)} images; give one an image or none"
                )

    def number(self, name: str) -> float | None:
        """The metric called `name`, or None where it was not measured or is not finite."""
        value = self.metrics.get(name)
        return float(value) if value is not None and math.isfinite(value) else None

    def error(self, name: str) -> float | None:
        """The standard error of the metric called `name`, where it is known."""
        return self.number(f"{name}_error")

    def reason(self, name: str) -> str:
        """Why the metric called `name` has no value."""
        return str(self.metrics.get("reasons", {}).get(name) or "not measured")


def find_real(entries: Sequence[ReportEntry]) -> ReportEntry | None:
    """The entry of the real held-out pictures, if there is one."""
    return next((entry for entry in entries if entry.kind == "real"), None)


def real_copy_rate(real: ReportEntry | None) -> float:
    """The share of real pictures that fall below the copy threshold."""
    rate = real.number("copy_rate") if real else None
    return NOMINAL_COPY_RATE if rate is None else rate


def is_copying(entry: ReportEntry, real: ReportEntry | None) -> bool | None:
    """Whether `entry` is closer to the training pictures than chance allows; None where that was not measured.

    Chance is the rate of the real pictures plus two standard errors for the number of images.
    """
    rate = entry.number("copy_rate")
    if rate is None:
        return None
    expected = real_copy_rate(real)
    spread = max(expected, NOMINAL_COPY_RATE) * (1 - expected)
    num_images = entry.number("num_images") or max(len(entry.images), 1)
    return rate > expected + 2 * math.sqrt(spread / num_images)


def diversity_gap(entry: ReportEntry, real: ReportEntry | None) -> float | None:
    """Intra-LPIPS minus that of the real pictures: zero is right, negative is too uniform."""
    own, wanted = entry.number("intra_lpips"), real.number("intra_lpips") if real else None
    return None if own is None or wanted is None else own - wanted


def plain(value: float) -> str:
    """A score of the size of FID: one decimal below 10, none above."""
    return f"{value:.1f}" if abs(value) < 9.95 else f"{value:,.0f}"


def percent(rate: float) -> str:
    """A rate in 0 to 1 as a percentage, one decimal where a whole number would hide it."""
    value = 100 * rate
    return (f"{value:.0f}" if value >= 10 or abs(value - round(value)) < 0.05 else f"{value:.1f}") + "\u00a0%"
