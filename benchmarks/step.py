"""Cost of a training step, CPU or CUDA: `python benchmarks/step.py pixel|latent|text|FOLDER` (`--table`: the tables).

Variants are a method and settings of a recipe ("studio adapter=lora mixed_precision=bf16"), and are trained as a run
trains them. Each is a process of its own; they take turns for some rounds, so that whatever else the machine does meets
all of them. Of each round the median step of a variant is taken, and its ratio to that of plain fine-tuning of all
weights, and to that of the released code's arithmetic; of these, the medians. Operations, and the most memory that
tensors take at once above what they took once the model was loaded, are counted. `--count` counts alone, which other
work on the machine does not disturb.

`floor` is what `domainstudio` cannot do without: one pass of the student there and back, one of the source there;
`floor pairs` is that of `studio`, with as many source samples beside the training pictures. `word` and `binding` are
the two kinds of steps of `studio` where it learns a new word. `--parts` says where the time of a step goes.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from released import CLASS, STUDENT, released_steps
from rows import Row, read_rows, write_row, write_tables
from torch.utils.flop_counter import FlopCounterMode

from domainstudio.app.memory import Peak, standing_bytes
from domainstudio.app.opened import Opened, open_recipe, train_config
from domainstudio.app.pool import told_samples
from domainstudio.app.recipe import build_recipe
from domainstudio.models.sample import starting_noise
from domainstudio.training import train as loop
from domainstudio.training.processes import open_accelerator

RESULTS = Path(__file__).parents[1] / "docs/benchmarks/step.jsonl"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WARM_UP = 2
"""First steps of a process that are not timed."""
RELEASED, BASELINE = "released", "finetune"
UNCONDITIONAL = (
    *(RELEASED, BASELINE, "floor", "domainstudio", "floor pairs", "studio"),
    *("finetune adapter=lora", "domainstudio adapter=lora", "studio adapter=lora"),
)
TEXT = (
    *(RELEASED, "finetune adapter=full", "dreambooth adapter=full", "dreambooth", "domainstudio adapter=full"),
    *("domainstudio", "studio adapter=full", "studio", "studio space=crop", "studio space=pixel", "word", "binding"),
)
WORD = {"method": "studio", "instance_prompt": "a portrait in <ink> style"}
PSEUDO: dict[str, dict[str, Any]] = {
    RELEASED: {"method": "finetune", "adapter": "full"},
    "floor": {"method": "domainstudio", "adapter": "full"},
    "floor pairs": {"method": "studio", "adapter": "full"},
    "word": WORD,
    "binding": WORD,
}
BUNDLED = {"latent": "bundled:avatars", "text": "bundled:avatars-text"}


def settings_of(variant: str) -> dict[str, Any]:
    """Of a recipe, as flags give them."""
    if variant in PSEUDO:
        return PSEUDO[variant]
    method, *settings = variant.split()
    return {"method": method, **dict(setting.split("=", 1) for setting in settings)}


class Meter:
    """Reads the clock, the operations and the memory."""

    def __init__(self, counter: FlopCounterMode | None = None, peak: Peak | None = None) -> None:
        self.counter, self.peak = counter, peak
        self.times: list[float] = []
        self.operations: list[int] = []
        self.loaded_bytes = 0

    def loaded(self) -> None:
        if self.peak is not None:
            self.loaded_bytes = standing_bytes(DEVICE)
            self.peak.start()

    def tick(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if self.counter is not None:
            self.operations.append(self.counter.get_total_flops())

    def seconds(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.times)][WARM_UP:]


def do_steps(variant: str, args: argparse.Namespace, count: int, meter: Meter) -> None:
    prompts = {"instance_prompt": STUDENT, "class_prompt": CLASS} if args.text else {}
    batches = {"train_batch_size": args.batch_size, "pair_batch_size": args.batch_size}
    given = {
        **{"pretrained_model_name_or_path": args.folder, "instance_data_dir": "bundled:ink", "max_train_steps": count},
        **{"binding_steps": 0, "watch": False, "num_class_images": 2 * args.batch_size, **batches, **prompts},
        **settings_of(variant),
    }
    if variant == "binding":
        given["binding_steps"] = count - 1
    recipe = build_recipe(None, given)
    opened = open_recipe(recipe, open_accelerator(recipe.mixed_precision))
    meter.loaded()
    if variant == RELEASED:
        steps = released_steps(opened.model, opened.pictures.images, args.batch_size, recipe.lr)
    elif variant.startswith("floor"):
        steps = floor_steps(opened, args.batch_size, pairs=variant == "floor pairs")
    else:
        samples = None
        if opened.draws:
            noise = starting_noise(opened.model.sample_shape, range(opened.most_samples), 0)
            samples = told_samples(noise, recipe, opened.prior)
        model, adaptation = opened.adapt()
        opened.train(model, adaptation, train_config(opened.recipe), samples, (lambda event: meter.tick(),))
        return
    meter.tick()
    for _ in itertools.islice(steps, count):
        meter.tick()


def floor_steps(opened: Opened, batch_size: int, pairs: bool) -> Iterator[None]:
    """The passes of the networks alone."""
    model, adaptation = opened.adapt()
    device = opened.accelerator.device
    x = torch.randn(batch_size * (2 if pairs else 1), *model.sample_shape, device=device)
    t = model.schedule.sample_t(len(x), torch.Generator().manual_seed(0)).to(device)
    adaptation.network.train()
    while True:
        with adaptation.source() as network:
            network(x[:batch_size], t[:batch_size])
        adaptation.network(x, t).sample.square().mean().backward()
        for parameter in adaptation.parameters():
            parameter.grad = None
        yield


def measure(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One variant, in this process."""
    torch.manual_seed(0)
    meter = Meter()
    do_steps(variant, args, args.steps + WARM_UP, meter)
    return {"seconds": meter.seconds()}


def count(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """What one variant does and takes, in this process."""
    torch.manual_seed(0)
    weighing = Meter(peak=Peak(DEVICE))
    do_steps(variant, args, 2, weighing)
    weighing.peak.stop()
    result = {"bytes": weighing.peak.bytes - weighing.loaded_bytes, "operations": None}
    if "torch_compile" not in variant:
        with FlopCounterMode(display=False) as counter:
            counting = Meter(counter)
            do_steps(variant, args, 2, counting)
        result["operations"] = counting.operations[-1] - counting.operations[-2]
    return result


def parts(variant: str, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step of what it consists of: means."""
    spent: dict[str, list[float]] = defaultdict(list)
    meter = Meter()

    def timed(name: str, function: Callable) -> Callable:
        def call(*given, **named):
            began = time.perf_counter()
            result = function(*given, **named)
            spent[name].append(time.perf_counter() - began)
            return result

        return call

    with contextlib.ExitStack() as stack:

        def patch(owner: Any, attribute: str, name: str) -> None:
            stack.callback(setattr, owner, attribute, getattr(owner, attribute))
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))

        patch(loop, "look", "networks, forward")
        patch(loop.Objective, "__call__", "losses")
        patch(loop.Training, "backward", "backward")
        patch(loop.Training, "update", "clipping, optimiser, average")
        do_steps(variant, args, args.steps + WARM_UP, meter)
    found = {name: statistics.fmean(seconds[WARM_UP:]) for name, seconds in spent.items()}
    whole = statistics.fmean(meter.seconds())
    found |= {"the rest": whole - sum(found.values()), "a step": whole}
    return {name: round(1000 * seconds, 1) for name, seconds in found.items()}


def make_pixel_pipeline(folder: str) -> None:
    """An unconditional model in pixels, 64 px, random weights."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=64,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)


def variants_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Those to measure; the released step and plain fine-tuning, which the others are compared with, come first."""
    usual = TEXT if args.text else UNCONDITIONAL
    return tuple(dict.fromkeys((*usual[:2], *(args.variants or usual))))


def in_a_process(task: str, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, args.source, "--folder", args.folder, "--one", variant, "--task", task]
    command += ["--batch-size", str(args.batch_size), "--steps", str(args.steps), *(["--text"] if args.text else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare_times(args: argparse.Namespace) -> None:
    """All variants, taking turns; each is compared with what another took in the same round."""
    rounds: dict[str, list[float]] = defaultdict(list)
    released, baseline, *_ = variants = variants_of(args)
    for _, variant in itertools.product(range(args.rounds), variants):
        rounds[variant].append(statistics.median(in_a_process("measure", variant, args)["seconds"]))
    for variant, medians in rounds.items():
        row: Row = {"seconds": round(statistics.median(medians), 4), "steps": args.steps * args.rounds}
        for name, other in (("finetune", baseline), ("released", released)):
            ratios = [own / theirs for own, theirs in zip(medians, rounds[other], strict=True)]
            row[f"time_of_{name}"] = round(statistics.median(ratios), 3)
        write_row(args.results, key_of(variant, args), row)


def compare_counts(args: argparse.Namespace) -> None:
    """Operations and memory of all variants."""
    released, baseline, *_ = variants = variants_of(args)
    counted = {variant: in_a_process("count", variant, args) for variant in variants}
    for variant, found in counted.items():
        row: Row = {"mib": round(found["bytes"] / 2**20)}
        for name, other in (("finetune", baseline), ("released", released)):
            row[f"memory_of_{name}"] = round(found["bytes"] / counted[other]["bytes"], 2)
        if found["operations"]:
            row["operations_of_finetune"] = round(found["operations"] / counted[baseline]["operations"], 2)
        write_row(args.results, key_of(variant, args), row)


def key_of(variant: str, args: argparse.Namespace) -> Row:
    machine = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    return {"name": variant, "device": machine, "source": args.source, "batch": args.batch_size}


COLUMNS = {
    "time of `finetune`": "time_of_finetune",
    "operations": "operations_of_finetune",
    "memory": "memory_of_finetune",
    "time of the released step": "time_of_released",
    "memory of it": "memory_of_released",
    "seconds": "seconds",
    "MiB": "mib",
}


def tables(results: list[Row]) -> str:
    """Markdown: a table a source, device and batch, of what was measured last of each variant."""
    latest: dict[tuple, dict[str, Row]] = defaultdict(lambda: defaultdict(dict))
    for row in results:
        latest[row["source"], row["device"], row["batch"]][row["name"]].update(row)
    lines = []
    for (source, device, batch), rows in latest.items():
        versions, dates = {row["torch"] for row in rows.values()}, {row["date"] for row in rows.values()}
        lines += [
            f"\n## {source}\n",
            f"{device}, batch of {batch}, torch {', '.join(sorted(versions))}; {', '.join(sorted(dates))}\n",
            f"| | {' | '.join(COLUMNS)} |",
            f"|---|{'---|' * len(COLUMNS)}",
        ]
        for name, row in rows.items():
            lines.append(f"| `{name}` | {' | '.join(str(row.get(key, '–')) for key in COLUMNS.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="latent", help="pixel, latent, text, or a pipeline's folder")
    parser.add_argument("--text", action="store_true", help="the folder is of a text-to-image pipeline")
    parser.add_argument("--variants", nargs="+", help="instead of the usual ones of the kind of model")
    parser.add_argument("--batch-size", type=int, default=None, help="default: 10, text 4")
    parser.add_argument("--steps", type=int, default=6, help="timed in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", action="store_true", help="where the time of one step goes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the tables of what was measured beside --results")
    parser.add_argument("--count", action="store_true", help="operations and memory, no times")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=["measure", "count"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.text = args.text or args.source == "text"
    args.batch_size = args.batch_size or (4 if args.text else 10)
    if args.table:
        write_tables(args.results, "Cost of a training step", tables(read_rows(args.results)))
        return
    if args.one:
        print(json.dumps({"measure": measure, "count": count}[args.task](args.one, args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = BUNDLED.get(args.source, scratch if args.source == "pixel" else args.source)
        if args.source == "pixel":
            make_pixel_pipeline(scratch)
        if args.parts:
            for variant in args.variants or [BASELINE, "domainstudio", "studio"]:
                print(json.dumps({"name": variant} | parts(variant, args)))
            return
        if not args.count:
            compare_times(args)
        compare_counts(args)


if __name__ == "__main__":
    main()
