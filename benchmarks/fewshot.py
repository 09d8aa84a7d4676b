"""Ten-shot benchmark on the bundled domains: `python benchmarks/fewshot.py` (resumable; `--table`: tables and picture).

Every run trains with fixed seeds and is measured at several steps with its averaged weights: held-out KID, Intra-LPIPS,
copies, pictures that still look like the source's; and read by the watch, which sees fewer pictures and none of those
held out (benchmarks/watch.py says how well it chooses). Anchors: the un-adapted source, a pure copier, and the pictures
held out. One JSON object a measurement is appended to docs/benchmarks/fewshot.jsonl; what is there already is not
measured again, so several processes may share the work (`--domains ink`, `--seeds 1`, ...).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fronts
from rows import Row, name_of, parse_entry, read_rows, write_row, write_tables
from standing import ANCHORS, DEFAULT, METHODS, PAPER, tables

from domainstudio.app.draw import draw_from
from domainstudio.app.materials import open_source
from domainstudio.app.recipe import build_recipe
from domainstudio.app.runs import train_run
from domainstudio.data.domain import heldout_pictures, load_domain
from domainstudio.evaluation.cache import CACHE_VARIABLE
from domainstudio.evaluation.evaluate import NUM_SOURCE, Evaluation, Evaluator
from domainstudio.evaluation.protocol import Protocol
from domainstudio.evaluation.watch import Watch
from domainstudio.models.sample import decode, sample, through_codec
from domainstudio.training.train import StepEvent

RESULTS = Path(__file__).parents[1] / "docs/benchmarks/fewshot.jsonl"
NUMBERS = (
    *("kid", "fid", "intra_lpips", "copy_rate", "nearest_lpips", "unadapted_rate", "num_images", "num_reference"),
    *("kid_error", "intra_lpips_error"),
)
SOURCE = "bundled:avatars"
SAMPLING_SEED, SAMPLING_STEPS = 77, 25
WATCH_SEED, NUM_WATCHED, LANDMARK_SEED = 12_345, 16, 54_321

UNWATCHED = {"watch": False, "validation_steps": 10**6, "checkpointing_steps": 10**6, "num_validation_images": 1}
"""Of runs that a benchmark looks at by itself."""


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


def numbers_of(evaluation: Evaluation) -> Row:
    result = evaluation.to_json()
    return {name: result[name] for name in NUMBERS}


OF_300 = f"{DEFAULT} num_class_images=300"
"""The default with as many source samples on every target; its parts were measured so."""
ALIKE = f"{OF_300} high_noise_focus=0"
ALL_SHOWN = f"{DEFAULT} high_noise_focus=0 num_class_images=100"
NO_PAIRS = f"{OF_300} image_weight=0 hf_weight=0"
NO_TRANSFER = f"{OF_300} transfer_weight=0"
PUBLISHED = f"{PAPER} @ 1000,2000,3000,4000,5000"


def plan(others: str, own: str, parts: str) -> list[str]:
    """At which steps are measured: the other methods, the default, and the default without its parts."""
    return [
        *(f"{method} @ {others}" for method in METHODS[1:]),
        f"{DEFAULT} @ {own}",
        *(f"{part} @ {parts}" for part in (OF_300, ALIKE, ALL_SHOWN, NO_PAIRS, NO_TRANSFER)),
        PUBLISHED,
    ]


FAR, NEAR = "100,150,200,300,400,500", "25,35,50,75,100,150"
PLAN = {
    "ink": [
        *plan(FAR, "150,175,200,225,250,300,400", "150,200,225,300"),
        *("finetune @ 125,200", "domainstudio @ 250,400", "ant @ 450"),
    ],
    "sunglasses": plan(NEAR, "25,35,50,60,75,100,150", "75,85,100,125,150"),
    "watercolour": plan(NEAR, "25,50,75,100,125,150,200,250", "75,100,125,150"),
    "grey": plan(NEAR, "25,35,50,75,100,125,150", "50,75,100"),
    "smiles": plan(FAR, "175,200,225,250,275,300,325", "200,250,300"),
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
    parser.add_argument("--table", action="store_true", help="write tables and picture of what was measured")
    args = parser.parse_args()
    if args.table:
        results = read_rows(args.results)
        write_tables(args.results, "Ten-shot adaptation of the bundled source", tables(results))
        fronts.draw(results, args.results.with_suffix(".svg"))
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
