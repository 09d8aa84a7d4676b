"""Ten-shot benchmark on the bundled domains: `python benchmarks/fewshot.py` (resumable; `--table` writes the tables).

Every run trains with fixed seeds and is measured at several steps with its averaged weights: held-out KID, Intra-LPIPS,
copies, pictures that still look like the source's; and read by the watch, which sees fewer pictures and none of those
held out (benchmarks/watch.py says how well it chooses). Anchors: the un-adapted source, a pure copier, and the pictures
held out. One JSON object a measurement is appended to docs/benchmarks/fewshot.jsonl; what is there already is not
measured again, so several processes may share the work (`--domains ink`, `--seeds 1`, ...).
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from domainstudio.app.draw import draw_from
from domainstudio.app.materials import open_source
from domainstudio.app.recipe import build_recipe
from domainstudio.app.runs import train_run
from domainstudio.data.domain import heldout_pictures, load_domain
from domainstudio.evaluation.cache import CACHE_VARIABLE
from domainstudio.evaluation.evaluate import NUM_SOURCE, Evaluation, Evaluator
from domainstudio.evaluation.protocol import Protocol
from domainstudio.evaluation.watch import MANY_UNADAPTED, Watch
from domainstudio.models.sample import decode, sample, through_codec
from domainstudio.training.train import StepEvent

RESULTS = Path(__file__).parents[1] / "docs/benchmarks/fewshot.jsonl"
NUMBERS = ("kid", "fid", "intra_lpips", "copy_rate", "nearest_lpips", "unadapted_rate", "num_images", "num_reference")
ANCHORS = ("source", "copier", "real")
DEFAULT = "studio"
METHODS = (DEFAULT, "finetune", "domainstudio", "domainstudio_released", "ant")
"""ddpm_pa is domainstudio under another name."""
PAPER = "domainstudio ema_decay=0.9999"
"""The paper's recipe as published (recipes/paper.toml); `domainstudio` has its terms, averaged as all others are."""
SOURCE = "bundled:avatars"
SAMPLING_SEED, SAMPLING_STEPS = 77, 25
WATCH_SEED, NUM_WATCHED, LANDMARK_SEED = 12_345, 16, 54_321
COPY_ALLOWANCE = 0.02

UNWATCHED = {"watch": False, "validation_steps": 10**6, "checkpointing_steps": 10**6, "num_validation_images": 1}
"""Of runs that a benchmark looks at by itself."""

Row = dict[str, Any]


class Measurer:
    """Called by the training loop; samples, measures and lets the watch read at the asked steps."""

    def __init__(self, domain: str, steps: list[int], num_images: int, record):
        self.model, self.evaluator, self.watch = open_source(SOURCE), evaluator_of(domain), watch_of(domain)
        self.steps, self.num_images, self.record = steps, num_images, record
        self.started = time.perf_counter()

    def __call__(self, event: StepEvent) -> None:
        if event.step not in self.steps:
            return
        begin = time.perf_counter()
        with event.averaged() as network:
            pictures, watched = (
                decode(self.model, sample(self.model, network, num, seed, SAMPLING_STEPS))
                for num, seed in ((self.num_images, SAMPLING_SEED), (NUM_WATCHED, WATCH_SEED))
            )
        result = numbers_of(self.evaluator.evaluate(pictures))
        reading = self.watch.read(event.step, watched)
        self.record(event.step, result | {"reading": reading.to_json()}, begin - self.started)
        self.started += time.perf_counter() - begin


@cache
def evaluator_of(domain: str) -> Evaluator:
    """One a process: it keeps the features of the held-out pictures."""
    training, heldout = load_domain(f"bundled:{domain}", 64).images, heldout_pictures(f"bundled:{domain}", 64)
    source = draw_from(open_source(SOURCE), NUM_SOURCE, LANDMARK_SEED, SAMPLING_STEPS)
    return Evaluator(training, heldout, Protocol(), source=source)


@cache
def watch_of(domain: str) -> Watch:
    """As `train` sets it up, but with noise of its own: held-out pictures judge others than those that it sees."""
    source = open_source(SOURCE)
    training = through_codec(source, load_domain(f"bundled:{domain}", 64).images)
    return Watch(training, draw_from(source, NUM_WATCHED, WATCH_SEED, SAMPLING_STEPS))


def measure_anchor(domain: str, anchor: str, args: argparse.Namespace) -> None:
    evaluator = evaluator_of(domain)
    measures = {
        "source": lambda: evaluator.evaluate(
            draw_from(open_source(SOURCE), args.num_images, SAMPLING_SEED, SAMPLING_STEPS)
        ),
        "copier": lambda: evaluator.copier(args.num_images),
        "real": evaluator.real,
    }
    write_row(args.results, {"domain": domain, "name": anchor, "seed": 0, "step": 0}, numbers_of(measures[anchor]()))


def measure_run(
    domain: str, method: str, settings: dict[str, Any], seed: int, steps: int, at: list[int], args: argparse.Namespace
) -> None:
    """Trains for `steps` and measures at the steps `at`; the averaging depends on the length of the whole run."""
    key = {"domain": domain, "name": name_of(method, settings), "seed": seed}

    def record(step: int, result: Row, seconds: float) -> None:
        write_row(args.results, {**key, "step": step, "seconds": round(seconds, 1)}, result)

    with scratch_folder() as folder:
        recipe = build_recipe(
            None,
            {
                "instance_data_dir": f"bundled:{domain}",
                "output_dir": f"{folder}/run",
                "method": method,
                "max_train_steps": steps,
                "seed": seed,
                "mixed_precision": args.mixed_precision,
                **UNWATCHED,
                **settings,
            },
        )
        measurer = Measurer(domain, at, args.num_images, record)
        train_run(recipe, observers=(measurer,))


@contextmanager
def scratch_folder() -> Iterator[str]:
    """For a run and its cache: its seconds are those of the first run on a source, which draws source samples."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {CACHE_VARIABLE: f"{folder}/cache"}):
        yield folder


def write_tables(results: Path, title: str, text: str) -> None:
    """Beside the results, with the extension .md."""
    note = f"Written by `python benchmarks/{Path(sys.argv[0]).name} --table`; how to read it: [README.md](README.md)."
    results.with_suffix(".md").write_text(f"# {title}\n\n{note}\n{text.rstrip()}\n")


def numbers_of(evaluation: Evaluation) -> Row:
    result = evaluation.to_json()
    return {name: result[name] for name in NUMBERS}


def write_row(path: Path, key: Row, result: Row) -> None:
    row = key | result | {"torch": torch.__version__, "date": str(date.today())}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def name_of(method: str, settings: dict[str, Any]) -> str:
    return method + "".join(f" {key}={value}" for key, value in sorted(settings.items()))


def parse_entry(text: str) -> tuple[str, dict[str, Any], list[int]]:
    """ "studio image_weight=0.05 @ 200,300" -> method, settings, steps to measure at."""
    entry, _, steps = text.partition("@")
    method, *pairs = entry.split()
    settings = {key: tomllib.loads(f"value = {value}")["value"] for key, value in (p.split("=") for p in pairs)}
    return method, settings, [int(step) for step in steps.split(",")]


def mean_of(rows: list[Row], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def spread(rows: list[Row], name: str, digits: int, scale: float = 1) -> str:
    values = [scale * row[name] for row in rows]
    mean = statistics.mean(values)
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def seconds_of(rows: list[Row]) -> str:
    """Median; of anchors, and of runs that were interrupted, none is known."""
    known = all("seconds" in row for row in rows)
    return f"{statistics.median(row['seconds'] for row in rows):.0f}" if known else "–"


def by_step(rows: list[Row], name: str) -> dict[int, list[Row]]:
    """The measurements of one method: step -> a row a seed."""
    groups = defaultdict(list)
    for row in rows:
        if row["name"] == name:
            groups[row["step"]].append(row)
    return dict(sorted(groups.items()))


def honest(steps: dict[int, list[Row]], real_rate: float, arrived: bool = False) -> list[tuple[int, list[Row]]]:
    """The checkpoints of `by_step` with hardly more copies than there are among real pictures.

    `arrived`: and of which it is known that few pictures have not left the source.
    """
    few_copies = [(s, rows) for s, rows in steps.items() if mean_of(rows, "copy_rate") <= real_rate + COPY_ALLOWANCE]
    return [(s, rows) for s, rows in few_copies if not arrived or (counted(rows) and not leaves_many(rows))]


def counted(rows: list[Row]) -> list[Row]:
    """Those whose un-adapted pictures are known: not from before they were measured, and where they can be told."""
    return [row for row in rows if row.get("unadapted_rate") is not None]


def unadapted_of(rows: list[Row]) -> str:
    known = counted(rows)
    return f"{spread(known, 'unadapted_rate', 1, 100)} %" if known else "–"


def shares_and_seconds(rows: list[Row]) -> list[str]:
    """Cells: copies, un-adapted pictures, training seconds."""
    return [f"{spread(rows, 'copy_rate', 1, 100)} %", unadapted_of(rows), seconds_of(rows)]


def leaves_many(rows: list[Row]) -> bool:
    known = counted(rows)
    return bool(known) and mean_of(known, "unadapted_rate") > MANY_UNADAPTED


def wanted(row: Row, real: Row, source: Row) -> float:
    """What held-out pictures say of a checkpoint, lower is better.

    KID over the source's, plus the distance of Intra-LPIPS from that of the real pictures, over it.
    """
    return row["kid"] / source["kid"] + abs(row["intra_lpips"] / real["intra_lpips"] - 1)


def best_of_each(rows: list[Row], arrived: bool = False) -> dict[str, tuple[int, list[Row]]]:
    """method -> step and rows of its best checkpoint that is `honest`, by `wanted`, means over seeds; of one domain."""
    real, source = (next((row for row in rows if row["name"] == name), None) for name in ("real", "source"))
    best: dict[str, tuple[int, list[Row]]] = {}
    if real is None or source is None:
        return best

    def score(group: list[Row]) -> float:
        return wanted({name: mean_of(group, name) for name in ("kid", "intra_lpips")}, real, source)

    for name in (*METHODS, PAPER):
        if checkpoints := honest(by_step(rows, name), real["copy_rate"], arrived):
            best[name] = min(checkpoints, key=lambda item: score(item[1]))
    return best


def comparison(rows: list[Row]) -> tuple[list[str], dict[str, bool]]:
    """One domain: a table of each method at its best honest checkpoint, and in what the default is ahead of all."""
    best = best_of_each(rows)
    if len(best) < 2 or DEFAULT not in best:
        return [], {}
    real = next(row for row in rows if row["name"] == "real")

    def gaps_of(group: list[Row]) -> list[Row]:
        return [{"gap": abs(row["intra_lpips"] - real["intra_lpips"])} for row in group]

    def standing(group: list[Row]) -> tuple[float, float]:
        return mean_of(group, "kid"), mean_of(gaps_of(group), "gap")

    own = {step: (standing(group), group) for step, group in honest(by_step(rows, DEFAULT), real["copy_rate"])}

    def first(kid: float, gap: float) -> str:
        """When the default is first as good."""
        reached = ((step, group) for step, ((k, g), group) in own.items() if k <= kid and g <= gap)
        return next((f"{step} steps, {seconds_of(group)} s" for step, group in reached), "–")

    lines = [
        "Each method at its best honest checkpoint, by KID over the source's plus the relative gap of Intra-LPIPS; and "
        f"the first honest checkpoint of `{DEFAULT}` that is no worse in KID, and in both:\n",
        "| | step | seeds | KID x10³ | gap of Intra-LPIPS | copies | unadapted | training seconds | KID reached | both "
        "reached |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = {name: standing(group) for name, (_, group) in best.items()}
    for name, (step, group) in best.items():
        kid, gap = found[name]
        cells = [f"`{name}`", str(step), str(len(group)), spread(group, "kid", 1), spread(gaps_of(group), "gap", 3)]
        cells += [*shares_and_seconds(group), first(kid, math.inf), first(kid, gap)]
        lines.append(f"| {' | '.join(cells)} |")
    (kid, gap), others = found[DEFAULT], [found[name] for name in METHODS[1:] if name in found]
    ahead = {
        "KID": all(kid < theirs for theirs, _ in others),
        "gap of Intra-LPIPS": all(gap < theirs for _, theirs in others),
        "both, at one of its honest checkpoints": all(first(*theirs) != "–" for theirs in others),
    }
    said = ", ".join(f"{what}: {'yes' if is_ahead else 'NO'}" for what, is_ahead in ahead.items())
    lines.append(f"\n`{DEFAULT}` ahead of each other method ({', '.join(METHODS[1:])}): {said}.")
    flattered = [f"`{name}` ({unadapted_of(group)})" for name, (_, group) in best.items() if leaves_many(group)]
    if flattered:
        lines.append(f"\nFlattered by pictures that have not left the source: {', '.join(flattered)}.")
    arrived, told = best_of_each(rows, arrived=True), []
    for name in dict.fromkeys(row["name"] for row in counted(rows) if row["name"] in best):
        if name not in arrived:
            told.append(f"`{name}` none")
            continue
        step, group = arrived[name]
        numbers = spread(group, "kid", 1), spread(gaps_of(group), "gap", 3), unadapted_of(group)
        told.append(f"`{name}` {' / '.join(numbers)} @ {step}")
    if told:
        lines.append(
            f"\nWith at most {MANY_UNADAPTED:.0%} of such pictures, where they were counted (KID / gap / unadapted @ "
            f"steps): {'; '.join(told)}."
        )
    return lines, ahead


def tables(results: list[Row]) -> str:
    """Markdown: per domain, every method at every step, mean ± standard deviation over seeds."""
    lines: list[str] = []
    won: dict[str, list[bool]] = defaultdict(list)
    for domain in sorted({row["domain"] for row in results}):
        rows = [row for row in results if row["domain"] == domain]
        lines += [
            f"\n## {domain}\n",
            "| | step | seeds | KID x10³ | FID | Intra-LPIPS | nearest | copies | unadapted | training seconds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name in sorted(dict.fromkeys(row["name"] for row in rows), key=lambda name: (name not in ANCHORS, name)):
            for step, group in by_step(rows, name).items():
                numbers = (("kid", 1), ("fid", 0), ("intra_lpips", 3), ("nearest_lpips", 3))
                cells = [name, str(step or "–"), str(len(group))]
                cells += [*(spread(group, key, digits) for key, digits in numbers), *shares_and_seconds(group)]
                lines.append(f"| {' | '.join(cells)} |")
        told, ahead = comparison(rows)
        lines += ["", *told]
        for what, is_ahead in ahead.items():
            won[what].append(is_ahead)
    for what, domains in won.items():
        lines.append(
            f"\n`{DEFAULT}` is ahead of each other method on {sum(domains)} of {len(domains)} targets: {what}."
        )
    return "\n".join(lines) + "\n"


ALIKE = f"{DEFAULT} high_noise_focus=0"
ALL_SHOWN = f"{ALIKE} num_class_images=100"
NO_PAIRS = f"{DEFAULT} image_weight=0 hf_weight=0"
NO_TRANSFER = f"{DEFAULT} transfer_weight=0"
PUBLISHED = f"{PAPER} @ 1000,2000,3000,4000,5000"


def plan(others: str, own: str, parts: str) -> list[str]:
    """At which steps are measured: the other methods, the default, and the default without its parts."""
    return [
        *(f"{method} @ {others}" for method in METHODS[1:]),
        f"{DEFAULT} @ {own}",
        *(f"{part} @ {parts}" for part in (ALIKE, ALL_SHOWN, NO_PAIRS, NO_TRANSFER)),
        PUBLISHED,
    ]


FAR, NEAR = "100,150,200,300,400,500", "50,75,100,150"
PLAN = {
    "ink": plan(FAR, "150,175,190,200,300", "150,200,225,300"),
    "sunglasses": plan(NEAR, "50,60,75,100,150", "75,85,100,125,150"),
    "watercolour": plan(NEAR, "75,100,125,150", "75,100,125,150"),
    "grey": plan(NEAR, "50,75,100", "50,75,100"),
    "smiles": plan(FAR, "200,250,275,300", "200,250,300"),
}
"""What is measured where. An entry is a run of its own. Near styles take a third of the steps of far ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", nargs="+", default=list(PLAN), choices=list(PLAN))
    parser.add_argument("--methods", nargs="+", help='instead of the plan: "studio image_weight=0.1 @ 200,300"')
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-images", type=int, default=150)
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the tables of what was measured beside --results")
    args = parser.parse_args()
    if args.table:
        write_tables(args.results, "Ten-shot adaptation of the bundled source", tables(read_rows(args.results)))
        return
    done = {(row["domain"], row["name"], row["seed"], row["step"]) for row in read_rows(args.results)}
    for domain in args.domains:
        for anchor in ANCHORS:
            if (domain, anchor, 0, 0) not in done:
                measure_anchor(domain, anchor, args)
    for seed in args.seeds:
        for domain in args.domains:
            for text in args.methods or PLAN[domain]:
                method, settings, steps = parse_entry(text)
                left = [step for step in steps if (domain, name_of(method, settings), seed, step) not in done]
                if left:
                    measure_run(domain, method, settings, seed, max(steps), left, args)


if __name__ == "__main__":
    main()
