"""Where the default teaches composition: `python benchmarks/focus.py` draws docs/focus.png and prints a row a domain.

A row of the picture: training pictures of a bundled domain, and what each place of its latents counts at high noise
(mean over channels; black 0, white .6 and more), as `studio` weights it after a look at 300 source samples.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from domainstudio.app.materials import open_source
from domainstudio.app.pool import POOL_SEED
from domainstudio.data.bundled import bundled_names
from domainstudio.data.domain import load_domain, to_pil
from domainstudio.data.symmetry import SYMMETRIC_BELOW, asymmetry
from domainstudio.losses.focus import DomainFocus
from domainstudio.models.sample import sample
from domainstudio.training.methods import STUDIO

SHEET = Path(__file__).parents[1] / "docs/focus.png"
SOURCE, NUM_SOURCE, SAMPLING_STEPS = "bundled:avatars", 300, 25
NUM_SHOWN, WHITE, GAP = 6, 0.6, 4
"""Training pictures a row; what is drawn white; pixels between pictures."""


def shown(weight: Tensor, side: int) -> Image.Image:
    """(C, h, w) in [0, 1] -> a grey picture of blocks."""
    levels = (weight.mean(0) / WHITE * 255).round().clamp(max=255).byte()
    return Image.fromarray(levels.numpy()).resize((side, side), Image.Resampling.NEAREST).convert("RGB")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    model = open_source(SOURCE)
    source = sample(model, model.network, NUM_SOURCE, POOL_SEED, SAMPLING_STEPS)
    side = model.resolution
    rows = []
    for name in bundled_names("domains"):
        images = load_domain(f"bundled:{name}", side).images
        views = [images, images.flip(-1)] if asymmetry(images) < SYMMETRIC_BELOW else [images]
        generator = torch.Generator().manual_seed(0)
        pictures = torch.stack([model.codec.draw(model.codec.encode(view), generator) for view in views], 1)
        focus = DomainFocus(STUDIO["high_noise_weight"], STUDIO["high_noise_focus"])
        focus.fit(pictures, source)
        weight = focus.weight
        print(
            f"{name}: mean {weight.mean():.3f}, nothing {(weight == 0).float().mean():.0%}, "
            f"more than twice the mean {(weight > 2 * weight.mean()).float().mean():.0%}, most {weight.max():.2f}"
        )
        rows.append([*to_pil(images[:NUM_SHOWN]), shown(weight, side)])
    width, height = (side + GAP) * len(rows[0]) + GAP, (side + GAP) * len(rows) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (GAP + column * (side + GAP), GAP + row * (side + GAP)))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
