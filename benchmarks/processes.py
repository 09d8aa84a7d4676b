"""Seconds of a step, and pictures drawn a second, on several processes. Started as training is:

    accelerate launch --num_processes 2 benchmarks/processes.py
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 benchmarks/processes.py     (CPUs)

The global batch stays the same, so the steps are the same whatever the number of processes. One JSON line, from the
first process. On a busy machine read its `cpu_seconds_a_step`: what this process had to compute, waiting left out.
`held_mb` is what this process's tensors take between steps, `peak_mb` the most that they took in the last one.
"""

import argparse
import itertools
import json
import statistics
import time

import torch

from domainstudio.app.materials import open_source
from domainstudio.app.memory import Peak, standing_bytes
from domainstudio.data.domain import load_domain
from domainstudio.models.adaptation import FullAdaptation, LoraAdaptation
from domainstudio.models.sample import sample, starting_noise
from domainstudio.models.sharded import ShardedAdaptation
from domainstudio.training.config import TrainConfig
from domainstudio.training.methods import METHODS, build_objective
from domainstudio.training.objective import Batch
from domainstudio.training.processes import Processes, leave, open_accelerator
from domainstudio.training.train import StepEvent, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="studio")
    parser.add_argument("--adapter", choices=["full", "lora"], default="full")
    parser.add_argument("--fsdp", action="store_true", help="each process holds a part of the model")
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

    if args.adapter == "lora":
        adaptation = LoraAdaptation(model.network, 16, 16, 0)
    else:
        adaptation = (ShardedAdaptation if args.fsdp else FullAdaptation)(model.network)
    config = TrainConfig(args.steps + 4, args.batch_size, 1e-5, pair_batch_size=args.batch_size)
    prior, times, work = Batch(pool) if objective.needs_prior else None, [], []
    held, peak = 0, Peak(accelerator.device)

    def weigh(event: StepEvent) -> None:
        nonlocal held
        if event.step == config.max_train_steps - 1:
            held = standing_bytes(accelerator.device)
            peak.start()
        elif event.step == config.max_train_steps:
            peak.stop()

    clocks = [lambda event: times.append(time.perf_counter()), lambda event: work.append(time.process_time())]
    train(model, adaptation, images, objective, config, prior, observers=(*clocks, weigh), accelerator=accelerator)
    if processes.is_main:
        row = {"processes": processes.count, "threads": torch.get_num_threads(), "device": accelerator.device.type}
        row |= {"method": args.method, "adapter": args.adapter, "fsdp": args.fsdp, "batch": args.batch_size}
        row |= {"seconds_a_step": typical(times), "cpu_seconds_a_step": typical(work)}
        row |= {"held_mb": held // 2**20, "peak_mb": peak.bytes // 2**20}
        row |= {"drawn_a_second": round(args.num_images / drawing, 2)}
        print(json.dumps(row))
    leave()


def typical(times: list[float]) -> float:
    """The median step; the first ones warm up, the last one is weighed."""
    return round(statistics.median([b - a for a, b in itertools.pairwise(times)][3:-1]), 4)


if __name__ == "__main__":
    main()
