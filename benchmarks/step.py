"""Cost of one training step: `python benchmarks/step.py`. Interleaved in one process; medians and ratios to finetune.

The same model, batch and machine for all; every step includes noising, both networks, the losses, backward, clipping,
AdamW and the weight average.
"""

import argparse
import itertools
import json
import statistics
import time

import torch

from domainstudio.app.materials import open_source
from domainstudio.data.domain import load_domain
from domainstudio.models.adaptation import FullAdaptation, LoraAdaptation
from domainstudio.models.sample import starting_noise
from domainstudio.training.methods import METHODS, build_objective
from domainstudio.training.objective import Batch
from domainstudio.training.train import TrainConfig, train

UNCONDITIONAL = [method for method in METHODS if method != "dreambooth"]


def one_variant(method: str, adapter: str, batch_size: int):
    """A function that does `count` steps and returns the seconds of each."""
    model = open_source("bundled:avatars", "cuda" if torch.cuda.is_available() else "cpu")
    images = load_domain("bundled:ink", model.resolution).images
    objective = build_objective(method, model)
    prior = Batch(starting_noise(model.sample_shape, range(20), 0)) if objective.needs_prior else None
    adaptation = FullAdaptation(model.network) if adapter == "full" else LoraAdaptation(model.network, 16, 16, 0)

    def steps(count: int) -> list[float]:
        times = []

        def watch(event) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        train(model, adaptation, images, objective, TrainConfig(count, batch_size, 1e-5), prior, observers=(watch,))
        return [b - a for a, b in itertools.pairwise(times)]

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--adapters", nargs="+", default=["full"])
    args = parser.parse_args()
    variants = {(m, a): one_variant(m, a, args.batch_size) for a in args.adapters for m in UNCONDITIONAL}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in variants}
    for round_index in range(args.rounds):
        for key, steps in variants.items():
            times = steps(3)
            seconds[key] += times[1:] if round_index else []  # the first step of each turn and the first round warm up
    baseline = statistics.median(seconds["finetune", args.adapters[0]])
    for (method, adapter), times in seconds.items():
        median = statistics.median(times)
        row = {"method": method, "adapter": adapter, "ratio_to_finetune": round(median / baseline, 2)}
        print(json.dumps(row | {"median_seconds": round(median, 4), "steps": len(times), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
