"""Ten-shot benchmark on the bundled domains: `python benchmarks/fewshot.py` (resumable; `--table` prints the tables).

Every run trains with fixed seeds and is measured at several steps with its averaged weights: held-out KID, Intra-LPIPS,
copies. Anchors: the un-adapted source, a pure copier, the real held-out pictures. One JSON object a measurement is
appended to docs/benchmarks/fewshot.jsonl; what is there already is not measured again.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

from domainstudio.app.recipe import Recipe, build_recipe
from domainstudio.app.runs import draw_from, open_source, train_run
from domainstudio.data.domain import heldout_pictures, load_domain
from domainstudio.evaluation.evaluate import Evaluator, Protocol
from domainstudio.models.sample import decode, sample
from domainstudio.training.train import StepEvent

RESULTS = Path(__file__).parents[1] / "docs/benchmarks/fewshot.jsonl"
NUMBERS = ("kid", "fid", "intra_lpips", "copy_rate", "nearest_lpips")
SAMPLING_SEED = 77
COPY_ALLOWANCE = 0.02


class Measurer:
    """Called by the training loop; samples and measures at the asked steps."""

    def __init__(self, model, evaluator: Evaluator, steps: list[int], num_images: int, record):
        self.model, self.evaluator, self.steps = model, evaluator, steps
        self.num_images, self.record = num_images, record
        self.started, self.paused = time.perf_counter(), 0.0

    def __call__(self, event: StepEvent) -> None:
        if event.step not in self.steps:
            return
        begin = time.perf_counter()
        with event.averaged() as network:
            x0 = sample(self.model, network, self.num_images, SAMPLING_SEED, 20)
        result = self.evaluator.evaluate(decode(self.model, x0)).to_json()
        self.record(event.step, result, begin - self.started - self.paused)
        self.paused += time.perf_counter() - begin


def name_of(method: str, settings: dict[str, Any]) -> str:
    return method + "".join(f" {key}={value}" for key, value in sorted(settings.items()))


def run(
    domain: str, method: str, settings: dict[str, Any], seed: int, steps: list[int], args: argparse.Namespace
) -> None:
    name = name_of(method, settings)
    done = {(r["domain"], r["name"], r["seed"], r["step"]) for r in read_results(args.results)}
    if all((domain, name, seed, step) in done for step in steps):
        return
    training, heldout = load_domain(f"bundled:{domain}", 64).images, heldout_pictures(f"bundled:{domain}", 64)
    evaluator = Evaluator(training, heldout, Protocol(), None)

    def record(step: int, result: dict[str, Any], seconds: float, kind: str = "result") -> None:
        row = {"domain": domain, "name": name, "seed": seed, "step": step, "kind": kind, "seconds": round(seconds, 1)}
        row |= {key: result[key] for key in (*NUMBERS, "num_images", "num_reference")} | {"date": str(date.today())}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    source = open_source("bundled:avatars")
    if method in ("source", "copier", "real"):
        measures = {
            "source": lambda: evaluator.evaluate(draw_from(source, args.num_images, SAMPLING_SEED, 20)),
            "copier": lambda: evaluator.copier(args.num_images),
            "real": evaluator.real,
        }
        record(0, measures[method]().to_json(), 0.0, "anchor")
        return
    with tempfile.TemporaryDirectory() as folder:
        recipe: Recipe = build_recipe(
            None,
            {
                "instance_data_dir": f"bundled:{domain}",
                "output_dir": f"{folder}/run",
                "method": method,
                "max_train_steps": max(steps),
                "seed": seed,
                "validation_steps": 10**6,
                "checkpointing_steps": 10**6,
                "num_validation_images": 1,
                **settings,
            },
        )
        train_run(recipe, observers=(Measurer(source, evaluator, steps, args.num_images, record),))


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_row(rows: list[dict[str, Any]], real_rate: float) -> dict[str, Any] | None:
    """Lowest held-out KID among the checkpoints that do not copy."""
    honest = [row for row in rows if row["copy_rate"] <= real_rate + COPY_ALLOWANCE]
    return min(honest, key=lambda row: row["kid"], default=None)


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown: per domain, every method at every step, mean (sd) over seeds."""
    lines = []
    for domain in dict.fromkeys(row["domain"] for row in results):
        rows = [row for row in results if row["domain"] == domain]
        lines += [
            f"\n### {domain}\n",
            "| | step | seeds | KID x10³ | Intra-LPIPS | copies | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        groups = defaultdict(list)
        for row in rows:
            groups[row["name"], row["step"]].append(row)
        for (name, step), group in groups.items():
            cells = [spread([100 * r["copy_rate"] for r in group], 1) + " %"]
            kid, intra = spread([r["kid"] for r in group], 1), spread([r["intra_lpips"] for r in group], 3)
            seconds = statistics.median(r["seconds"] for r in group)
            lines.append(f"| {name} | {step or '–'} | {len(group)} | {kid} | {intra} | {cells[0]} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    mean = statistics.mean(values)
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def parse_settings(text: str) -> tuple[str, dict[str, Any]]:
    """ "studio image_weight=0.05" -> method and settings."""
    method, *pairs = text.split()
    return method, {
        key: json.loads(value) if value[0] in "0123456789tf" else value for key, value in (p.split("=") for p in pairs)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", nargs="+", default=["ink", "sunglasses", "watercolour"])
    parser.add_argument("--methods", nargs="+", default=["finetune", "studio", "domainstudio", "domainstudio_released"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 200, 300])
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the tables of what was measured")
    args = parser.parse_args()
    if args.table:
        print(tables(read_results(args.results)))
        return
    for domain in args.domains:
        for anchor in ("source", "copier", "real"):
            run(domain, anchor, {}, 0, [0], args)
    for seed in args.seeds:
        for domain in args.domains:
            for text in args.methods:
                run(domain, *parse_settings(text), seed, args.steps, args)


if __name__ == "__main__":
    main()
