"""What benchmarks/fewshot.py measured, as tables: all of it, and how the methods stand to each other.

A method that goes on trades variety for likeness, so one number at one step says little. They are compared at equal
variety: the KID that a run has when its Intra-LPIPS falls to a level, between two checkpoints by linear interpolation.
A checkpoint is honest if it has hardly more copies than there are among real pictures.
"""

import statistics
from collections import defaultdict
from itertools import pairwise

from rows import Row, by_step, mean_of, spread

from domainstudio.evaluation.watch import MANY_UNADAPTED

ANCHORS = ("source", "copier", "real")
DEFAULT = "studio"
METHODS = (DEFAULT, "finetune", "domainstudio", "domainstudio_released", "ant")
"""ddpm_pa is domainstudio under another name."""
PAPER = "domainstudio ema_decay=0.9999"
"""The paper's recipe as published (recipes/paper.toml); `domainstudio` has its terms, averaged as all others are."""
COPY_ALLOWANCE = 0.02
LEVELS = {"real variety": 1.0, "nine tenths of it": 0.9}
"""Of the real pictures' Intra-LPIPS."""


def anchors(rows: list[Row]) -> tuple[Row, Row]:
    """Real pictures and the source, of one domain."""
    return tuple(next(row for row in rows if row["name"] == name) for name in ("real", "source"))


def at_variety(run: list[Row], level: float) -> Row | None:
    """Where Intra-LPIPS last falls below `level`, between two of the rows of `run`, by step; None if it never does."""
    for before, after in reversed(list(pairwise(run))):
        if before["intra_lpips"] >= level > after["intra_lpips"]:
            share = (before["intra_lpips"] - level) / (before["intra_lpips"] - after["intra_lpips"])
            both = {name for name in before if isinstance(after.get(name), (int, float)) and before[name] is not None}
            return {name: before[name] + share * (after[name] - before[name]) for name in both}
    return None


def runs_of(rows: list[Row], name: str) -> list[list[Row]]:
    """Those of one method in one domain, a seed each; all begin at the source."""
    _, source = anchors(rows)
    seeds = defaultdict(list)
    for row in rows:
        if row["name"] == name:
            seeds[row["seed"]].append(row)
    return [[source, *sorted(run, key=lambda row: row["step"])] for run in seeds.values()]


def equal_variety(rows: list[Row]) -> list[str]:
    """Table of one domain: each method where it has the variety of real pictures, a little less, and whatever is left
    where its KID is the lowest."""
    real, _ = anchors(rows)
    lines = [
        "At equal variety, and at the lowest KID of an honest checkpoint:\n",
        "| | "
        + " | ".join(f"KID x10³ at {name} | copies | unadapted | steps | seeds" for name in LEVELS)
        + " | lowest KID x10³ | Intra-LPIPS | copies | unadapted | steps |",
        "|---" * (6 + 5 * len(LEVELS)) + "|",
    ]
    for name in (*METHODS, PAPER):
        if not (runs := runs_of(rows, name)):
            continue
        cells = [f"`{name}`"]
        for share in LEVELS.values():
            points = [point for run in runs if (point := at_variety(run, share * real["intra_lpips"]))]
            if points:
                cells += [spread(points, "kid", 1), *shares(points), f"{mean_of(points, 'step'):.0f}"]
                cells.append(f"{len(points)} of {len(runs)}")
            else:
                cells += ["–"] * 4 + [f"0 of {len(runs)}"]
        allowed = honest(by_step(rows, name), real["copy_rate"])
        if lowest := min(allowed, key=lambda item: mean_of(item[1], "kid"), default=None):
            step, group = lowest
            cells += [spread(group, "kid", 1), spread(group, "intra_lpips", 3), *shares(group), str(step)]
        else:
            cells += ["–"] * 5
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def kid_within(rows: list[Row], name: str, gap: float) -> float | None:
    """The lowest KID at an `honest` checkpoint of a method, in one domain, with no larger gap of Intra-LPIPS.

    Where its variety is that much below the real pictures'; of a run that never falls so low, at its end.
    """
    real, source = anchors(rows)
    allowed = [row for _, group in honest(by_step(rows, name), real["copy_rate"]) for row in group]
    ends = []
    for run in runs_of([real, source, *allowed], name):
        if point := at_variety(run, real["intra_lpips"] - gap):
            ends.append(point)
        elif abs(run[-1]["intra_lpips"] - real["intra_lpips"]) <= gap:
            ends.append(run[-1])
        else:
            return None
    return mean_of(ends, "kid") if ends else None


def dominance(rows: list[Row]) -> tuple[int, list[str]]:
    """Of the other methods' honest checkpoints in one domain: how many, and which the default does not dominate."""
    real, _ = anchors(rows)
    count, undominated = 0, []
    for name in (*METHODS[1:], PAPER):
        for step, group in honest(by_step(rows, name), real["copy_rate"]):
            gap = abs(mean_of(group, "intra_lpips") - real["intra_lpips"])
            own, theirs = kid_within(rows, DEFAULT, gap), mean_of(group, "kid")
            count += 1
            if own is None or own >= theirs:
                told = "is not known" if own is None else f"{own:.1f}"
                undominated.append(f"`{name}` @ {step} ({theirs:.1f} / {gap:.3f}; `{DEFAULT}` {told})")
    return count, undominated


def seconds_of(rows: list[Row]) -> str:
    """Median; of anchors, and of runs that were interrupted, none is known."""
    known = all("seconds" in row for row in rows)
    return f"{statistics.median(row['seconds'] for row in rows):.0f}" if known else "–"


def is_honest(rows: list[Row], real_rate: float) -> bool:
    """Whether a checkpoint has hardly more copies than there are among real pictures."""
    return mean_of(rows, "copy_rate") <= real_rate + COPY_ALLOWANCE


def honest(steps: dict[int, list[Row]], real_rate: float) -> list[tuple[int, list[Row]]]:
    """The checkpoints of `by_step` that are."""
    return [(step, rows) for step, rows in steps.items() if is_honest(rows, real_rate)]


def counted(rows: list[Row]) -> list[Row]:
    """Those whose un-adapted pictures are known: not from before they were measured, and where they can be told."""
    return [row for row in rows if row.get("unadapted_rate") is not None]


def unadapted_of(rows: list[Row]) -> str:
    known = counted(rows)
    return f"{spread(known, 'unadapted_rate', 1, 100)} %" if known else "–"


def shares(rows: list[Row]) -> list[str]:
    """Cells: copies, and un-adapted pictures."""
    return [f"{spread(rows, 'copy_rate', 1, 100)} %", unadapted_of(rows)]


def leaves_many(rows: list[Row]) -> bool:
    known = counted(rows)
    return bool(known) and mean_of(known, "unadapted_rate") > MANY_UNADAPTED


def wanted(row: Row, real: Row, source: Row) -> float:
    """What held-out pictures say of a checkpoint, lower is better.

    KID over the source's, plus the distance of Intra-LPIPS from that of the real pictures, over it.
    """
    return row["kid"] / source["kid"] + abs(row["intra_lpips"] / real["intra_lpips"] - 1)


def best_of_each(rows: list[Row]) -> dict[str, tuple[int, list[Row]]]:
    """method -> step and rows of its best checkpoint that is `honest`, by `wanted`, means over seeds; of one domain."""
    real, source = anchors(rows)

    def score(group: list[Row]) -> float:
        return wanted({name: mean_of(group, name) for name in ("kid", "intra_lpips")}, real, source)

    best: dict[str, tuple[int, list[Row]]] = {}
    for name in (*METHODS, PAPER):
        if checkpoints := honest(by_step(rows, name), real["copy_rate"]):
            best[name] = min(checkpoints, key=lambda item: score(item[1]))
    return best


def best_checkpoints(rows: list[Row]) -> tuple[list[str], dict[str, bool]]:
    """One domain: a table of each method at its best honest checkpoint, and in what the default is ahead of all, if it
    was measured."""
    real, _ = anchors(rows)
    best = best_of_each(rows)

    def gap_of(group: list[Row]) -> list[Row]:
        return [{"gap": abs(row["intra_lpips"] - real["intra_lpips"])} for row in group]

    def reached(kid: float) -> str:
        """When the default first has it."""
        own = honest(by_step(rows, DEFAULT), real["copy_rate"])
        return next((f"{s} steps, {seconds_of(group)} s" for s, group in own if mean_of(group, "kid") <= kid), "–")

    lines = [
        "Each method at its best honest checkpoint, by KID over the source's plus the relative gap of Intra-LPIPS; and "
        f"the first honest checkpoint of `{DEFAULT}` that has its KID:\n",
        "| | step | seeds | KID x10³ | gap of Intra-LPIPS | copies | unadapted | training seconds | KID reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (step, group) in best.items():
        cells = [f"`{name}`", str(step), str(len(group)), spread(group, "kid", 1), spread(gap_of(group), "gap", 3)]
        cells += [*shares(group), seconds_of(group), reached(mean_of(group, "kid"))]
        lines.append(f"| {' | '.join(cells)} |")
    flattered = [f"`{name}` ({unadapted_of(group)})" for name, (_, group) in best.items() if leaves_many(group)]
    if flattered:
        lines.append(f"\nFlattered by pictures that have not left the source: {', '.join(flattered)}.")
    if DEFAULT not in best:
        return lines, {}
    found = {name: (mean_of(group, "kid"), mean_of(gap_of(group), "gap")) for name, (_, group) in best.items()}
    kid, gap = found[DEFAULT]
    others = [found[name] for name in METHODS[1:] if name in found]
    ahead = {
        "KID": all(kid < theirs for theirs, _ in others),
        "gap of Intra-LPIPS": all(gap < theirs for _, theirs in others),
    }
    return lines, ahead


def tables(results: list[Row]) -> str:
    """Markdown: per domain, every method at every step, mean ± standard deviation over seeds; and how they stand."""
    lines: list[str] = []
    won: dict[str, list[bool]] = defaultdict(list)
    total, undominated = 0, []
    for domain in sorted({row["domain"] for row in results}):
        rows = [row for row in results if row["domain"] == domain]
        told, ahead = best_checkpoints(rows)
        lines += [f"\n## {domain}\n", *equal_variety(rows), "", *told, ""]
        lines += [
            "| | step | seeds | KID x10³ | FID | Intra-LPIPS | nearest | copies | unadapted | training seconds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name in sorted(dict.fromkeys(row["name"] for row in rows), key=lambda name: (name not in ANCHORS, name)):
            for step, group in by_step(rows, name).items():
                numbers = (("kid", 1), ("fid", 0), ("intra_lpips", 3), ("nearest_lpips", 3))
                cells = [name, str(step or "–"), str(len(group))]
                cells += [*(spread(group, key, digits) for key, digits in numbers), *shares(group), seconds_of(group)]
                lines.append(f"| {' | '.join(cells)} |")
        for what, is_ahead in ahead.items():
            won[what].append(is_ahead)
        count, these = dominance(rows)
        total += count
        undominated += [f"{domain}, {told}" for told in these]
    lines.append("\n## All\n")
    lines.append(
        f"Of {total} honest checkpoints of the other methods `{DEFAULT}` dominates {total - len(undominated)}: it has "
        "a lower KID at no larger gap of Intra-LPIPS. It does not dominate (KID / gap): "
        f"{'; '.join(undominated) or 'none'}."
    )
    for what, domains in won.items():
        lines.append(f"\nBest checkpoint against best checkpoint, `{DEFAULT}` is ahead of each other method on ")
        lines[-1] += f"{sum(domains)} of {len(domains)} targets: {what}."
    return "\n".join(lines) + "\n"
