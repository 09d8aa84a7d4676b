"""Where the default teaches composition: `python benchmarks/focus.py` draws docs/focus.png and prints a row a domain.

A row of the picture: training pictures of a bundled domain, and what each place of its latents counts at high noise
(mean over channels; black 0, white .6 and more), as `studio` weights it after a look at 300 source samples.
"""

import argparse
from pathlib import Path

from PIL import Image
from torch import Tensor

from domainstudio.app.opened import open_recipe, train_config
from domainstudio.app.pool import POOL_SEED
from domainstudio.app.recipe import build_recipe
from domainstudio.data.bundled import bundled_names
from domainstudio.data.domain import to_pil
from domainstudio.models.sample import sample
from domainstudio.training.deck import Deck
from domainstudio.training.objective import Batch
from domainstudio.training.processes import open_accelerator

SHEET = Path(__file__).parents[1] / "docs/focus.png"
NUM_SHOWN, WHITE, GAP = 6, 0.6, 4
"""Training pictures a row; what is drawn white; pixels between pictures."""


def shown(weight: Tensor, side: int) -> Image.Image:
    """(C, h, w) in [0, 1] -> a grey picture of blocks."""
    levels = (weight.mean(0) / WHITE * 255).round().clamp(max=255).byte()
    return Image.fromarray(levels.numpy()).resize((side, side), Image.Resampling.NEAREST).convert("RGB")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows, source = [], None
    for name in bundled_names("domains"):
        recipe = build_recipe(None, {"instance_data_dir": f"bundled:{name}", "watch": False})
        opened = open_recipe(recipe, open_accelerator(recipe.mixed_precision))
        model, images = opened.model, opened.pictures.images
        if source is None:  # the same for all
            seed = recipe.seed + POOL_SEED
            source = sample(model, model.network, opened.most_samples, seed, recipe.num_inference_steps)
        model, adaptation = opened.adapt()
        Deck(model, train_config(opened.recipe), images, Batch(source), None).fit(opened.objective, adaptation)
        assert opened.objective.focus is not None
        weight = opened.objective.focus.weight
        assert weight is not None
        print(
            f"{name}: mean {weight.mean():.3f}, nothing {(weight == 0).float().mean():.0%}, "
            f"more than twice the mean {(weight > 2 * weight.mean()).float().mean():.0%}, most {weight.max():.2f}"
        )
        rows.append([*to_pil(images[:NUM_SHOWN]), shown(weight, model.resolution)])
    side = model.resolution
    width, height = (side + GAP) * len(rows[0]) + GAP, (side + GAP) * len(rows) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (GAP + column * (side + GAP), GAP + row * (side + GAP)))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
