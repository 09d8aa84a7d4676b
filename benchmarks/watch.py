"""Does the watch choose well? `python benchmarks/watch.py --table`, and `--trials`.

Every run of benchmarks/fewshot.py (methods x domains x seeds) is looked at at several steps, twice: by the watch, from
few pictures and the training pictures alone, and by held-out pictures (KID, Intra-LPIPS, copies). `--table` says how
much worse than the best checkpoint the one is that the watch chooses, and how the two orders agree. `--trials` plants
copiers and perfect samplers: sets of training pictures through the autoencoder, and of real held-out pictures, as they
are and through it, 100 of each a domain; appended to docs/benchmarks/watch.jsonl.
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import fewshot
import torch
from fewshot import NUM_WATCHED, PLAN, SOURCE
from rows import Row, read_rows, write_row, write_tables
from standing import COPY_ALLOWANCE, wanted

from domainstudio.app.materials import open_source
from domainstudio.data.domain import heldout_pictures, load_domain
from domainstudio.evaluation.watch import COLLAPSED, Reading, Watch, choose
from domainstudio.models.sample import decode, through_codec

RESULTS = fewshot.RESULTS.with_name("watch.jsonl")
NUM_TRIALS = 100
LEAST_CHECKPOINTS = 3
"""That a run needs for there to be a choice."""


def trials(args: argparse.Namespace) -> None:
    """Planted copiers and perfect samplers, as the watch sees them."""
    model = open_source(SOURCE)
    for domain in args.domains:
        training, real = load_domain(f"bundled:{domain}", 64).images, heldout_pictures(f"bundled:{domain}", 64)
        assert real is not None
        generator = torch.Generator().manual_seed(1)  # other latents of the pictures than the watch's
        copies = decode(model, model.codec.draw(model.codec.encode(training), generator))
        redrawn = through_codec(model, real)
        watch = Watch(through_codec(model, training), real[:NUM_WATCHED])
        closeness: dict[str, list[float]] = defaultdict(list)
        for _ in range(NUM_TRIALS):
            chosen = torch.randperm(len(real), generator=generator)[:NUM_WATCHED]
            sets = {
                "copier": copies[torch.randint(len(copies), (NUM_WATCHED,), generator=generator)],
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


def tables(results: list[Row], planted: list[Row]) -> str:
    """Markdown: per run of `results` the steps chosen and their KID; and the planted sets."""
    lines = [
        "\n| domain | method | seed | best, held-out: step, KID, Intra | chosen by the watch | KID over best | "
        "over lowest honest | rank correlation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    anchors = {(row["domain"], row["name"]): row for row in results if row["name"] in ("real", "source")}
    runs: dict[tuple, list[Row]] = defaultdict(list)
    for row in sorted(results, key=lambda row: row["step"]):
        if "reading" in row:
            runs[row["domain"], row["name"], row["seed"]].append(row)
    ratios, honest_ratios, correlations = [], [], []
    for (domain, method, seed), rows in sorted(runs.items()):
        if len(rows) < LEAST_CHECKPOINTS:
            continue
        scores = [wanted(row, anchors[domain, "real"], anchors[domain, "source"]) for row in rows]
        best = rows[scores.index(min(scores))]
        readings = [Reading.from_json(row["reading"]) for row in rows]
        reading = choose(readings)
        assert reading is not None
        chosen = rows[readings.index(reading)]
        ratios.append(chosen["kid"] / best["kid"])
        limit = anchors[domain, "real"]["copy_rate"] + COPY_ALLOWANCE
        lowest = min((row["kid"] for row in rows if row["copy_rate"] <= limit), default=best["kid"])
        honest_ratios.append(chosen["kid"] / lowest)
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
    for row in planted:
        low, high = row["lowest_closeness"], row["highest_closeness"]
        lines.append(
            f"| {row['name'][8:]} | {row['domain']} | {row['trials']} | {row['called_copiers']} | {low} to {high} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", nargs="+", default=list(PLAN), choices=list(PLAN))
    parser.add_argument("--runs", type=Path, default=fewshot.RESULTS, help="what benchmarks/fewshot.py measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--trials", action="store_true", help="plant copiers and perfect samplers")
    task.add_argument("--table", action="store_true", help="write the tables of what was measured beside --results")
    args = parser.parse_args()
    if args.trials:
        trials(args)
    else:
        told = tables(read_rows(args.runs), read_rows(args.results))
        write_tables(args.results, "Does the watch choose well?", told)


if __name__ == "__main__":
    main()
