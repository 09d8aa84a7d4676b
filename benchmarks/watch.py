"""Does the watch choose well? `python benchmarks/watch.py` (resumable; `--trials`, `--table`).

Every run (methods x domains x seeds) is looked at at many steps, with its averaged weights, twice: by the watch, from
few pictures and the training pictures alone, and by held-out pictures (KID, Intra-LPIPS, copies). One JSON object a
checkpoint is appended to docs/benchmarks/watch.jsonl. `--table` says how much worse than the best checkpoint the one is
that the watch chooses, and how the two orders agree. `--trials` plants copiers and perfect samplers: sets of training
pictures through the autoencoder, and of real held-out pictures, as they are and through it, 100 of each a domain.
"""

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from fewshot import (
    COPY_ALLOWANCE,
    SAMPLING_SEED,
    SAMPLING_STEPS,
    UNWATCHED,
    Row,
    evaluator_of,
    measure_anchor,
    read_rows,
    wanted,
    write_row,
    write_tables,
)
from torch import Tensor

from domainstudio.app.materials import open_source
from domainstudio.app.recipe import build_recipe
from domainstudio.app.runs import train_run
from domainstudio.data.domain import heldout_pictures, load_domain
from domainstudio.evaluation.watch import COLLAPSED, Reading, Watch, choose
from domainstudio.models.sample import decode, sample, through_codec
from domainstudio.training.train import StepEvent

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/benchmarks/watch.jsonl"
SOURCE = "bundled:avatars"
DOMAINS = ("ink", "sunglasses", "watercolour", "grey", "smiles")
METHODS = ("finetune", "studio")
STEPS = (50, 100, 150, 200, 300, 400)
WATCH_SEED = 12_345
NUM_TRIALS = 100


def measure_run(domain: str, method: str, seed: int, args: argparse.Namespace) -> None:
    """One run, looked at at every step of STEPS; its rows are written at its end, so that a part of a run is none."""
    training, model = load_domain(f"bundled:{domain}", 64).images, open_source(SOURCE)
    evaluator = evaluator_of(domain)

    def draw(network, num: int, noise: int) -> Tensor:
        return decode(model, sample(model, network, num, noise, SAMPLING_STEPS))

    watch = Watch(through_codec(model, training), draw(model.network, args.num_watched, WATCH_SEED))
    rows = []

    def look(event: StepEvent) -> None:
        if event.step in STEPS:
            with event.averaged() as network:
                pictures = draw(network, args.num_images, SAMPLING_SEED)
                reading = watch.read(event.step, draw(network, args.num_watched, WATCH_SEED))
            found = evaluator.evaluate(pictures).to_json()
            rows.append({name: found[name] for name in ("kid", "intra_lpips", "copy_rate")} | reading.to_json())

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "instance_data_dir": f"bundled:{domain}",
            "output_dir": f"{folder}/run",
            "method": method,
            "max_train_steps": max(STEPS),
            "seed": seed,
            **UNWATCHED,
        }
        train_run(build_recipe(None, settings), observers=(look,))
    numbers = {"num_images": args.num_images, "num_watched": args.num_watched}
    for row in rows:
        write_row(args.results, {"domain": domain, "name": method, "seed": seed, "step": row["step"]}, row | numbers)


def trials(args: argparse.Namespace) -> None:
    """Planted copiers and perfect samplers, as the watch sees them."""
    model = open_source(SOURCE)
    for domain in DOMAINS:
        training, real = load_domain(f"bundled:{domain}", 64).images, heldout_pictures(f"bundled:{domain}", 64)
        assert real is not None
        generator = torch.Generator().manual_seed(1)  # other latents of the pictures than the watch's
        copies = decode(model, model.codec.draw(model.codec.encode(training), generator))
        redrawn = through_codec(model, real)
        watch = Watch(through_codec(model, training), real[: args.num_watched])
        closeness: dict[str, list[float]] = defaultdict(list)
        for _ in range(NUM_TRIALS):
            chosen = torch.randperm(len(real), generator=generator)[: args.num_watched]
            sets = {
                "copier": copies[torch.randint(len(copies), (args.num_watched,), generator=generator)],
                "sampler": real[chosen],
                "sampler, through the autoencoder": redrawn[chosen],
            }
            for name, pictures in sets.items():
                closeness[name].append(watch.read(1, pictures).closeness)
        for name, values in closeness.items():
            row = {
                "trials": len(values),
                "called_copiers": sum(value < COLLAPSED for value in values),
                "lowest_closeness": round(min(values), 3),
                "highest_closeness": round(max(values), 3),
            }
            write_row(args.results, {"domain": domain, "name": f"planted {name}", "seed": 0, "step": 0}, row)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    return statistics.correlation(*ranks)


def tables(results: list[Row]) -> str:
    """Markdown: per run the steps chosen and their KID, and the planted sets."""
    lines = [
        "\n| domain | method | seed | best, held-out: step, KID, Intra | chosen by the watch | KID over best | "
        "over lowest honest | rank correlation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    anchors = {(row["domain"], row["name"]): row for row in results if row["name"] in ("real", "source")}
    runs: dict[tuple, list[Row]] = defaultdict(list)
    for row in results:
        if row["name"] in METHODS:
            runs[row["domain"], row["name"], row["seed"]].append(row)
    ratios, honest_ratios, correlations = [], [], []
    for (domain, method, seed), rows in sorted(runs.items()):
        scores = [wanted(row, anchors[domain, "real"], anchors[domain, "source"]) for row in rows]
        best = rows[scores.index(min(scores))]
        readings = [Reading.from_json(row) for row in rows]
        reading = choose(readings)
        assert reading is not None
        chosen = rows[readings.index(reading)]
        ratios.append(chosen["kid"] / best["kid"])
        limit = anchors[domain, "real"]["copy_rate"] + COPY_ALLOWANCE
        honest_ratios.append(chosen["kid"] / min(row["kid"] for row in rows if row["copy_rate"] <= limit))
        correlations.append(rank_correlation(scores, [reading.score for reading in readings]))
        shown = [f"{row['step']}, {row['kid']:.0f}, {row['intra_lpips']:.3f}" for row in (best, chosen)]
        lines.append(
            f"| {domain} | {method} | {seed} | {shown[0]} | {shown[1]} | {ratios[-1]:.2f} | {honest_ratios[-1]:.2f} | "
            f"{correlations[-1]:.2f} |"
        )
    means = [f"{statistics.fmean(values):.3f} (at worst {max(values):.2f})" for values in (ratios, honest_ratios)]
    lines += [
        f"\nOver {len(ratios)} runs the chosen checkpoint's KID is {means[0]} of the best one's, and {means[1]} of the "
        f"lowest KID of any checkpoint with at most {COPY_ALLOWANCE:.0%} more copies than real pictures. "
        f"Rank correlation: {statistics.fmean(correlations):.2f}.",
        "\n| planted | domain | trials | called copiers | closeness |",
        "|---|---|---|---|---|",
    ]
    for row in results:
        if row["name"].startswith("planted"):
            low, high = row["lowest_closeness"], row["highest_closeness"]
            lines.append(
                f"| {row['name'][8:]} | {row['domain']} | {row['trials']} | {row['called_copiers']} | {low} to {high} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num-images", type=int, default=100, help="compared with held-out pictures")
    parser.add_argument("--num-watched", type=int, default=16, help="that the watch sees")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--trials", action="store_true", help="planted copiers and perfect samplers instead of runs")
    parser.add_argument("--table", action="store_true", help="write the tables of what was measured beside --results")
    args = parser.parse_args()
    if args.table:
        write_tables(args.results, "Does the watch choose well?", tables(read_rows(args.results)))
        return
    if args.trials:
        trials(args)
        return
    for seed in args.seeds:
        for method in args.methods:
            for domain in args.domains:
                done = {(row["domain"], row["name"], row["seed"]) for row in read_rows(args.results)}
                if (domain, "real", 0) not in done:
                    measure_anchor(domain, "real", args)
                    measure_anchor(domain, "source", args)
                if (domain, method, seed) not in done:
                    measure_run(domain, method, seed, args)


if __name__ == "__main__":
    main()
