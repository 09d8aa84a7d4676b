"""Ten-shot benchmark on the bundled domains: `python benchmarks/fewshot.py` (resumable; `--table` writes the tables).

Every run trains with fixed seeds and is measured at several steps with its averaged weights: held-out KID, Intra-LPIPS,
copies. Anchors: the un-adapted source, a pure copier, the real held-out pictures. One JSON object a measurement is
appended to docs/benchmarks/fewshot.jsonl; what is there already is not measured again, so several processes may share
the work (`--domains ink`, `--seeds 1`, ...).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

from domainstudio.app.draw import draw_from
from domainstudio.app.materials import open_source
from domainstudio.app.recipe import build_recipe
from domainstudio.app.runs import train_run
from domainstudio.data.domain import heldout_pictures, load_domain
from domainstudio.evaluation.evaluate import Evaluation, Evaluator
from domainstudio.evaluation.protocol import Protocol
from domainstudio.models.sample import decode, sample
from domainstudio.training.train import StepEvent

RESULTS = Path(__file__).parents[1] / "docs/benchmarks/fewshot.jsonl"
NUMBERS = ("kid", "fid", "intra_lpips", "copy_rate", "nearest_lpips", "num_images", "num_reference")
ANCHORS = ("source", "copier", "real")
BASELINE, DEFAULT = "finetune", "studio"
SAMPLING_SEED, SAMPLING_STEPS = 77, 25
COPY_ALLOWANCE = 0.02
GAP_SHARE = 0.8
"""A method's distance from the real pictures' Intra-LPIPS is to be at most this share of plain fine-tuning's."""

UNWATCHED = {"watch": False, "validation_steps": 10**6, "checkpointing_steps": 10**6, "num_validation_images": 1}
"""Of runs that a benchmark looks at by itself."""

Row = dict[str, Any]


class Measurer:
    """Called by the training loop; samples and measures at the asked steps."""

    def __init__(self, model, evaluator: Evaluator, steps: list[int], num_images: int, record):
        self.model, self.evaluator, self.steps = model, evaluator, steps
        self.num_images, self.record = num_images, record
        self.started = time.perf_counter()

    def __call__(self, event: StepEvent) -> None:
        if event.step not in self.steps:
            return
        begin = time.perf_counter()
        with event.averaged() as network:
            x0 = sample(self.model, network, self.num_images, SAMPLING_SEED, SAMPLING_STEPS)
        result = numbers_of(self.evaluator.evaluate(decode(self.model, x0)))
        self.record(event.step, result, begin - self.started)
        self.started += time.perf_counter() - begin


@cache
def evaluator_of(domain: str) -> Evaluator:
    """One a process: it keeps the features of the held-out pictures."""
    training, heldout = load_domain(f"bundled:{domain}", 64).images, heldout_pictures(f"bundled:{domain}", 64)
    return Evaluator(training, heldout, Protocol())


def measure_anchor(domain: str, anchor: str, args: argparse.Namespace) -> None:
    evaluator = evaluator_of(domain)
    measures = {
        "source": lambda: evaluator.evaluate(
            draw_from(open_source("bundled:avatars"), args.num_images, SAMPLING_SEED, SAMPLING_STEPS)
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

    with tempfile.TemporaryDirectory() as folder:
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
        source = open_source("bundled:avatars")
        measurer = Measurer(source, evaluator_of(domain), at, args.num_images, record)
        train_run(recipe, observers=(measurer,))


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


def by_step(rows: list[Row], name: str) -> dict[int, list[Row]]:
    """The measurements of one method: step -> a row a seed."""
    groups = defaultdict(list)
    for row in rows:
        if row["name"] == name:
            groups[row["step"]].append(row)
    return dict(sorted(groups.items()))


def best_honest(steps: dict[int, list[Row]], real_rate: float) -> tuple[int, list[Row]] | None:
    """The step with the lowest mean held-out KID among those that do not copy."""
    honest = [(s, rows) for s, rows in steps.items() if mean_of(rows, "copy_rate") <= real_rate + COPY_ALLOWANCE]
    return min(honest, key=lambda item: mean_of(item[1], "kid"), default=None)


def verdict(rows: list[Row]) -> str:
    """What the default keeps, at each step, of its promise against plain fine-tuning's best checkpoint; one domain."""
    real, default = by_step(rows, "real"), by_step(rows, DEFAULT)
    baseline = by_step(rows, BASELINE)
    if not real or not default or not baseline:
        return ""
    wanted, rate = real[0][0]["intra_lpips"], real[0][0]["copy_rate"]
    best = best_honest(baseline, rate)
    if best is None:
        return "No checkpoint of plain fine-tuning is free of copies.\n"
    base_kid, base_gap = mean_of(best[1], "kid"), abs(mean_of(best[1], "intra_lpips") - wanted)
    lines = [
        f"Against `{BASELINE}` at its best honest step, {best[0]} (KID {base_kid:.1f}, gap to the real Intra-LPIPS "
        f"{base_gap:.3f}):\n"
    ]
    for step, own in default.items():
        kid, gap = mean_of(own, "kid"), abs(mean_of(own, "intra_lpips") - wanted)
        copies = mean_of(own, "copy_rate")
        lines.append(
            f"* `{DEFAULT}`, step {step}: KID {kid:.1f} {judged(kid <= base_kid)}; gap {gap:.3f}, {gap / base_gap:.2f} "
            f"of it {judged(gap <= GAP_SHARE * base_gap)}; copies {100 * copies:.1f} % "
            f"{judged(copies <= rate + COPY_ALLOWANCE)}"
        )
    return "\n".join(lines) + "\n"


def judged(met: bool) -> str:
    return "(met)" if met else "(MISSED)"


def tables(results: list[Row]) -> str:
    """Markdown: per domain, every method at every step, mean ± standard deviation over seeds."""
    lines = []
    for domain in sorted({row["domain"] for row in results}):
        rows = [row for row in results if row["domain"] == domain]
        lines += [
            f"\n## {domain}\n",
            "| | step | seeds | KID x10³ | FID | Intra-LPIPS | copies | training seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name in sorted(dict.fromkeys(row["name"] for row in rows), key=lambda name: (name not in ANCHORS, name)):
            for step, group in by_step(rows, name).items():
                numbers = (("kid", 1, 1), ("fid", 0, 1), ("intra_lpips", 3, 1), ("copy_rate", 1, 100))
                cells = [spread(group, key, digits, scale) for key, digits, scale in numbers]
                seconds = f"{statistics.median(r['seconds'] for r in group):.0f}" if "seconds" in group[0] else "–"
                cells[-1] += " %"
                lines.append(f"| {name} | {step or '–'} | {len(group)} | {' | '.join(cells)} | {seconds} |")
        lines += ["", verdict(rows)]
    return "\n".join(lines) + "\n"


ABLATIONS = ("studio hf_weight=0 image_weight=0", 'studio pairing="training"', "studio centre_pairs=false")
PAPER = ("domainstudio", "domainstudio_released")
NEAR_STYLE = [
    "finetune @ 50",
    *(f"{method} @ 95" for method in ("studio", *ABLATIONS)),
    *(f"{method} @ 50,100" for method in PAPER),
]
PLAN = {
    "ink": [
        "finetune @ 300,400",
        "finetune @ 500",
        "studio @ 400,500",
        *(f"{method} @ 500" for method in (*ABLATIONS, *PAPER)),
    ],
    "sunglasses": [*NEAR_STYLE, "finetune @ 75,100", "studio @ 90", "studio @ 100,125"],
    "watercolour": [*NEAR_STYLE, "finetune @ 75", "studio @ 90", "studio @ 75,100"],
}
"""What is measured where. An entry is a run of its own. Near styles take a fifth of the steps."""


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
