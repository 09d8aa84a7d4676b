"""What the methods draw at equal variety: `python benchmarks/pictures.py` draws docs/benchmarks/fewshot.webp.

Each method is trained (seed 0) for as many steps as leave it nine tenths of the real pictures' Intra-LPIPS, which
benchmarks/fewshot.py has measured. A column of a block is one starting noise; the first row are training pictures.
"""

import argparse

from fewshot import RESULTS, SAMPLING_SEED, SAMPLING_STEPS, SOURCE, UNWATCHED, scratch_folder
from fronts import TITLES
from PIL import Image, ImageDraw, ImageFont
from rows import Row, read_rows
from standing import DEFAULT, LEVELS, anchors, at_variety, runs_of
from torch import Tensor

from domainstudio.app.draw import draw_from
from domainstudio.app.materials import open_source
from domainstudio.app.recipe import build_recipe
from domainstudio.app.runs import train_run
from domainstudio.data.domain import load_domain, to_pil
from domainstudio.models.sample import decode, sample

SHEET = RESULTS.with_suffix(".webp")
SHOWN = {"finetune": "finetune", "domainstudio": "the paper's terms", DEFAULT: "studio"}
NUM_SHOWN, BLOCKS_A_ROW = 6, 3
SIDE, GAP, MARGIN, TITLE, LABEL = 64, 2, 18, 22, 112
"""Pixels: a picture, between pictures, between blocks, above a block, left of all."""


def steps_at_equal_variety(rows: list[Row], method: str) -> int:
    """Of seed 0 in one domain."""
    real, _ = anchors(rows)
    [run] = runs_of([row for row in rows if row["seed"] == 0], method)
    point = at_variety(run, LEVELS["nine tenths of it"] * real["intra_lpips"])
    if point is None:
        raise SystemExit(
            f"{method} has not been measured down to nine tenths of the real variety: more steps are needed"
        )
    return round(point["step"])


def drawn(domain: str, method: str, steps: int, folder: str) -> Tensor:
    """(NUM_SHOWN, 3, SIDE, SIDE) of a run of so many steps in a folder of its own, with its averaged weights."""
    pictures = []

    def look(event) -> None:
        if event.step == steps:
            with event.averaged() as network:
                x0 = sample(source, network, NUM_SHOWN, SAMPLING_SEED, SAMPLING_STEPS)
                pictures.append(decode(source, x0))

    source = open_source(SOURCE)
    settings = {"method": method, "max_train_steps": steps, "seed": 0, "instance_data_dir": f"bundled:{domain}"}
    output_dir = f"{folder}/{domain}-{method}"
    train_run(build_recipe(None, {**settings, "output_dir": output_dir, **UNWATCHED}), observers=(look,))
    return pictures[0]


def block(domain: str, rows: list[Row], source: Tensor, folder: str) -> tuple[str, list[Tensor]]:
    """Title and rows of pictures of one domain; `source` are the un-adapted source's, of the same noise."""
    steps = {method: steps_at_equal_variety(rows, method) for method in SHOWN}
    training = load_domain(f"bundled:{domain}", SIDE).images[:NUM_SHOWN]
    print(f"{domain}: {steps}", flush=True)
    title = f"{TITLES[domain]}: {', '.join(map(str, steps.values()))} steps"
    return title, [training, source, *(drawn(domain, method, count, folder) for method, count in steps.items())]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = read_rows(RESULTS)
    source = draw_from(open_source(SOURCE), NUM_SHOWN, SAMPLING_SEED, SAMPLING_STEPS)
    with scratch_folder() as folder:
        blocks = [
            block(domain, [row for row in results if row["domain"] == domain], source, folder) for domain in TITLES
        ]
    labels = ["training pictures", "source", *SHOWN.values()]
    width, height = NUM_SHOWN * (SIDE + GAP) + MARGIN, TITLE + len(labels) * (SIDE + GAP) + MARGIN
    num_rows = -(-len(blocks) // BLOCKS_A_ROW)
    sheet = Image.new("RGB", (LABEL + BLOCKS_A_ROW * width, num_rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (title, rows) in enumerate(blocks):
        left, top = LABEL + index % BLOCKS_A_ROW * width, index // BLOCKS_A_ROW * height
        pen.text((left, top + 3), title, "black", font)
        for number, (label, pictures) in enumerate(zip(labels, rows, strict=True)):
            y = top + TITLE + number * (SIDE + GAP)
            pen.text((6, y + SIDE // 2 - 8), label, "black", font)
            for column, picture in enumerate(to_pil(pictures)):
                sheet.paste(picture, (left + column * (SIDE + GAP), y))
    sheet.save(SHEET, quality=88, method=6)


if __name__ == "__main__":
    main()
