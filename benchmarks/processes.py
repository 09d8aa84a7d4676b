"""Seconds of a step, and pictures drawn a second, on several processes. Started as training is:

    accelerate launch --num_processes 2 benchmarks/processes.py
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 benchmarks/processes.py     (CPUs)

The global batch stays the same, so the steps are the same whatever the number of processes. One JSON line, from the
first process. On a busy machine read its `cpu_seconds_a_step`: what this process had to compute, waiting left out.
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
from domainstudio.models.sample import sample, starting_noise
from domainstudio.training.config import TrainConfig
from domainstudio.training.methods import METHODS, build_objective
from domainstudio.training.objective import Batch
from domainstudio.training.processes import Processes, leave, open_accelerator
from domainstudio.training.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="studio")
    parser.add_argument("--adapter", choices=["full", "lora"], default="full")
    parser.add_argument("--batch-size", type=int, default=32, help="training pictures, and source samples, in all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--num-images", type=int, default=64, help="drawn with the source")
    args = parser.parse_args()
    accelerator = open_accelerator("no")
    processes = Processes.of(accelerator)
    model = open_source("bundled:avatars", accelerator.device)
    images = load_domain("bundled:ink", model.resolution).images
    objective = build_objective(args.method, model)
    pool = starting_noise(model.sample_shape, range(args.batch_size), 0)

    processes.wait()
    start = time.perf_counter()
    processes.share(args.num_images, lambda rows: sample(model, model.network, args.num_images, pictures=rows))
    drawing = time.perf_counter() - start

    adaptation = FullAdaptation(model.network) if args.adapter == "full" else LoraAdaptation(model.network, 16, 16, 0)
    config = TrainConfig(args.steps + 3, args.batch_size, 1e-5, pair_batch_size=args.batch_size)
    prior, times, work = Batch(pool) if objective.needs_prior else None, [], []
    clocks = [lambda event: times.append(time.perf_counter()), lambda event: work.append(time.process_time())]
    train(model, adaptation, images, objective, config, prior, observers=clocks, accelerator=accelerator)
    if processes.is_main:
        row = {"processes": processes.count, "threads": torch.get_num_threads(), "device": accelerator.device.type}
        row |= {"method": args.method, "adapter": args.adapter, "batch": args.batch_size}
        row |= {"seconds_a_step": typical(times), "cpu_seconds_a_step": typical(work)}
        row |= {"drawn_a_second": round(args.num_images / drawing, 2)}
        print(json.dumps(row))
    leave()


def typical(times: list[float]) -> float:
    """The median step; the first ones warm up."""
    return round(statistics.median([b - a for a, b in itertools.pairwise(times)][3:]), 4)


if __name__ == "__main__":
    main()
