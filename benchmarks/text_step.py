"""Cost of a text-to-image training step beside the released code's: `python benchmarks/text_step.py --model FOLDER`.

The released arithmetic, written from its description (docs/deviations.md): two passes of the UNet over instance and
class pictures, all with gradients, the second at one noise level for all; two decodes of whole pictures in full
precision with gradients; pairs of three pictures in loops; nothing asked of the frozen source, which is loaded. Ours:
the method's own step through the training loop. Each variant runs in a process of its own, taking turns; medians of
seconds a step, and the peak of the process's memory above what it was once the models were loaded.
"""

import argparse
import copy
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date

import torch
import torch.nn.functional as F
from torch import Tensor

from domainstudio.app.materials import open_source
from domainstudio.diffusion.prediction import target, to_x0
from domainstudio.diffusion.schedule import add_noise
from domainstudio.losses.haar import high_frequency
from domainstudio.models.adaptation import FullAdaptation, LoraAdaptation
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sample import starting_noise
from domainstudio.training.binding import Binding
from domainstudio.training.methods import build_objective
from domainstudio.training.objective import Batch, Prompts
from domainstudio.training.train import TrainConfig, train

CUDA = torch.cuda.is_available()
STUDENT, CLASS = "a portrait in sks style", "a portrait"
WORD = "<ink>"


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if CUDA else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def pictures(model: DiffusionModel, num: int) -> Tensor:
    return torch.rand(num, 3, model.resolution, model.resolution) * 2 - 1


def released_steps(model: DiffusionModel, batch_size: int, count: int) -> Iterator[float]:
    """Seconds of each of `count` steps of the released arithmetic."""
    network = model.network.requires_grad_(True).train()
    unused_source = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-6)
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    encoded = model.codec.encode(pictures(model, 2 * batch_size).to(device))
    told = model.encode_prompts([STUDENT] * batch_size + [CLASS] * batch_size)
    criterion = torch.nn.KLDivLoss(reduction="mean")

    def noised(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x0 = model.codec.draw(encoded, generator)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        alpha, sigma = model.schedule.levels(t)
        x_t = add_noise(x0, noise, alpha, sigma)
        output = network(x_t, t, told).sample
        estimate = to_x0(model.prediction, output, x_t, alpha, sigma)
        return output, target(model.prediction, x0, noise, alpha, sigma), estimate

    def similarities(images: Tensor) -> Tensor:
        rows = []
        for i in range(3):
            others = [F.cosine_similarity(images[i].flatten(), images[j].flatten(), dim=0) for j in range(3) if j != i]
            rows.append(torch.softmax(torch.stack(others), 0))
        return torch.stack(rows)

    for _ in range(count):
        began = time.perf_counter()
        output, wanted, _ = noised(model.schedule.sample_t(2 * batch_size, generator).to(device))
        halves = slice(batch_size), slice(batch_size, None)
        loss = F.mse_loss(output[halves[0]], wanted[halves[0]]) + F.mse_loss(output[halves[1]], wanted[halves[1]])
        _, _, x0 = noised(model.schedule.sample_t(1, generator).expand(2 * batch_size).to(device))
        decode = model.codec.vae.decode  # the scale of the latents is not undone there
        own, others = (decode(x0[half]).sample for half in halves)
        for student, source in ((own, others), (high_frequency(own), high_frequency(others))):
            loss = loss + 100 * criterion(similarities(student).log(), similarities(source))
        loss = loss + 0.1 * F.mse_loss(high_frequency(own), high_frequency(pictures(model, batch_size).to(device)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if CUDA:
            torch.cuda.synchronize()
        yield time.perf_counter() - began
    del unused_source


def own_steps(
    model: DiffusionModel, method: str, adapter: str, space: str | None, batch_size: int, count: int
) -> Iterator[float]:
    """Seconds of each of `count` steps of one of ours, through the training loop.

    "word" and "binding" are the two kinds of steps of `studio` that learns a new word (and adapts the text encoder).
    """
    binding = None
    if method in ("word", "binding"):
        model.add_identifier(WORD)
        model = model.with_text_encoder(WORD)
        unnamed = Prompts(model.encode_prompts([WORD]), model.encode_prompts([""]))
        others = Prompts(model.encode_prompts([f"three, {WORD}"]), model.encode_prompts(["three"]))
        binding = Binding(unnamed, others) if method == "binding" else None
        method = "studio"
    settings = {} if method in ("finetune", "dreambooth") or space is None else {"space": space}
    objective = build_objective(method, model, **settings)
    prior = None
    if objective.needs_prior:
        x0 = starting_noise(model.sample_shape, range(2 * batch_size), 0).to(next(model.network.parameters()).device)
        told = Prompts(model.encode_prompts([STUDENT] * len(x0)), model.encode_prompts([CLASS] * len(x0)))
        prior = Batch(x0, told)
    told = Prompts(model.encode_prompts([STUDENT] * 10), model.encode_prompts([CLASS] * 10))
    network = model.network
    adaptation = (
        FullAdaptation(network, objective.needs_source)
        if adapter == "full"
        else LoraAdaptation(network, 16, 16, 0, "attention")
    )
    finished = []

    def watch(event) -> None:
        if CUDA:
            torch.cuda.synchronize()
        finished.append(time.perf_counter())

    config = TrainConfig(count, batch_size, 1e-5, pair_batch_size=batch_size, binding_steps=count - 1 if binding else 0)
    train(model, adaptation, pictures(model, 10), objective, config, prior, told, (watch,), binding=binding)
    yield from (after - before for before, after in itertools.pairwise(finished))


def measure(args: argparse.Namespace) -> None:
    method, adapter, space = args.one
    torch.manual_seed(0)
    model = open_source(args.model, "cuda" if CUDA else "cpu")
    before = peak_bytes()
    if method == "released":
        seconds = list(released_steps(model, args.batch_size, args.steps))
    else:
        seconds = list(own_steps(model, method, adapter, None if space == "-" else space, args.batch_size, args.steps))
    print(json.dumps({"seconds": seconds[2:], "peak_bytes": peak_bytes() - before}))


VARIANTS = [
    ("released", "full", "-"),
    ("finetune", "full", "-"),
    ("dreambooth", "full", "-"),
    ("dreambooth", "lora", "-"),
    ("domainstudio", "full", "pixel"),
    ("domainstudio", "lora", "pixel"),
    ("studio", "full", "model"),
    ("studio", "lora", "model"),
    ("studio", "lora", "crop"),
    ("studio", "lora", "pixel"),
    ("word", "lora", "model"),
    ("binding", "lora", "model"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a Stable Diffusion pipeline, as small as you like")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args)
        return
    seconds: dict[tuple[str, ...], list[float]] = {variant: [] for variant in VARIANTS}
    peaks = dict.fromkeys(VARIANTS, 0)
    for _ in range(args.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--model", args.model, "--batch-size", str(args.batch_size)]
            command += ["--steps", str(args.steps), "--one", *variant]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            seconds[variant] += result["seconds"]
            peaks[variant] = max(peaks[variant], result["peak_bytes"])
    released = statistics.median(seconds[VARIANTS[0]])
    for variant in VARIANTS:
        row = dict(zip(("method", "adapter", "space"), variant, strict=True))
        row["time_of_released"] = round(statistics.median(seconds[variant]) / released, 2)
        row["memory_of_released"] = round(peaks[variant] / peaks[VARIANTS[0]], 2)
        print(json.dumps(row | {"peak_mib": round(peaks[variant] / 2**20), "date": str(date.today())}))


if __name__ == "__main__":
    main()
