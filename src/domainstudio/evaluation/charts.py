"""Line charts as inline SVG: colours and fonts come from the page, so one drawing serves light, dark and print."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 36
MAX_POINTS = 240
LOG_RATIO = 20  # a smooth curve that spans more than this is drawn on a log scale


def line_charts(rows: Sequence[dict[str, float]], mark: int | None = None) -> str:
    """One small chart a quantity: the total loss first, then the others, in the order of their first appearance.

    A vertical line is drawn at the step `mark`.
    """
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return "".join(_chart(name, *_series(rows, name), mark) for name in sorted(names, key=lambda name: name != "loss"))


def _series(losses: Sequence[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one quantity, each (N,)."""
    pairs = [(row.get("step", index), row[name]) for index, row in enumerate(losses) if name in row]
    finite = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
    steps, values = np.array(finite, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _chart(name: str, steps: np.ndarray, values: np.ndarray, mark: int | None) -> str:
    if not len(steps):
        return ""
    smooth = _smooth(values)
    is_log = bool(values.min() > 0 and smooth.max() / smooth.min() > LOG_RATIO)
    low, high = _range(values, smooth, is_log)
    x_low, x_high = float(steps[0]), float(max(steps[-1], steps[0] + 1))

    def x(step: np.ndarray | float) -> np.ndarray | float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: np.ndarray | float) -> np.ndarray | float:
        height = (np.log10(value) if is_log else value) - low
        return TOP + (1 - np.clip(height / (high - low), 0, 1)) * (HEIGHT - TOP - BOTTOM)

    keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int))
    raw, line = (_points(x(steps[keep]), y(series[keep])) for series in (values, smooth))
    label = f"{name} from {_tick(smooth[0])} at step {steps[0]:.0f} to {_tick(smooth[-1])} at step {steps[-1]:.0f}"
    return (
        f'<figure class="chart"><figcaption>{escape(name)}{" <small>log scale</small>" if is_log else ""}'
        f"<b>{_tick(smooth[-1])}</b></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        + "".join(_y_tick(float(y(value)), value) for value in _y_ticks(low, high, is_log))
        + "".join(_x_tick(float(x(step)), step) for step in _round_ticks(x_low, x_high, 4))
        + f'<path class="grid" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}">training step</text>'
        + ("" if mark is None else f'<path class="mark" d="M{x(mark):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        + f'<path class="raw" d="M{raw.replace(" ", "L")}"/><polyline class="line" points="{line}"/></svg></figure>'
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """(N,) moving mean over a twentieth of the run, cut off at both ends."""
    half, total, centre = len(values) // 40, np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    start, stop = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def _range(values: np.ndarray, smooth: np.ndarray, is_log: bool) -> tuple[float, float]:
    """The drawn range (in decades if log): all of the smooth curve, and the raw one without its rarest spikes."""
    low = float(min(np.quantile(values, 0.02), smooth.min()))
    high = float(max(np.quantile(values, 0.98), smooth.max()))
    if is_log:
        low, high = math.log10(low), math.log10(high)
    elif low > 0 and low < 0.5 * high:
        low = 0.0
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0 and high > 0 else low - pad), high + pad


def _round_ticks(low: float, high: float, wanted: int) -> list[float]:
    """At most about `wanted` round numbers in [low, high]."""
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _y_ticks(low: float, high: float, is_log: bool) -> list[float]:
    if not is_log:
        return _round_ticks(low, high, 4)
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [10.0**k * factor for k in decades for factor in ((1, 3) if high - low < 2.5 else (1,))]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _y_tick(y: float, value: float) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{_tick(value)}</text>'
    )


def _x_tick(x: float, value: float) -> str:
    return f'<text class="x" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{_tick(value)}</text>'


def _tick(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _points(xs: np.ndarray | float, ys: np.ndarray | float) -> str:
    pairs = [f"{x:.1f},{y:.1f}" for x, y in zip(np.atleast_1d(xs), np.atleast_1d(ys), strict=True)]
    return " ".join(pairs if len(pairs) > 1 else pairs * 2)
