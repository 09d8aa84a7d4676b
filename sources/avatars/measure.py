"""Measures the bundled source and draws its samples: `python sources/avatars/measure.py` (needs Node.js).

Prints KID and FID to held-out avatars beside those of real avatars to the same, and what the autoencoder alone loses;
writes docs/source-samples.png.
"""

import argparse
import json
from pathlib import Path

import torch
from domains import render
from PIL import Image
from torch import Tensor

from domainstudio.app.draw import draw_from
from domainstudio.app.materials import open_source
from domainstudio.data.domain import heldout_pictures, to_pil, to_tensor
from domainstudio.evaluation.features import embed, load_inception
from domainstudio.evaluation.metrics import frechet_distance, kernel_distance
from domainstudio.models.model import DiffusionModel

HERE = Path(__file__).parent
SHEET = HERE.parents[1] / "docs/source-samples.png"
COLUMNS, ROWS, SCALE = 10, 4, 2


def avatars(split: str, count: int) -> Tensor:
    """(count, 3, 64, 64) in [-1, 1]."""
    return torch.stack([to_tensor(picture, 64) for picture in render("avatars", split, count)])


@torch.no_grad()
def reconstruct(model: DiffusionModel, images: Tensor) -> Tensor:
    """What the autoencoder gives back of (N, 3, H, W)."""
    means = [model.codec.encode(part).chunk(2, 1)[0] for part in images.split(50)]
    return torch.cat([model.codec.decode(mean).clamp(-1, 1) for mean in means])


def psnr(images: Tensor, others: Tensor) -> float:
    """Mean over pictures, in dB."""
    errors = ((images - others) / 2).square().flatten(1).mean(1)
    return (-10 * errors.log10()).mean().item()


def draw_sheet(images: Tensor, path: Path) -> None:
    side = images.shape[-1] * SCALE
    sheet = Image.new("RGB", (COLUMNS * side, ROWS * side))
    for index, picture in enumerate(to_pil(images[: COLUMNS * ROWS])):
        place = (index % COLUMNS * side, index // COLUMNS * side)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), place)
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=1_000)
    args = parser.parse_args()
    model, inception = open_source("bundled:avatars"), load_inception()
    heldout, others = avatars("heldout", args.num_images), avatars("heldout2", args.num_images)
    samples = draw_from(model, args.num_images, seed=7, num_inference_steps=25)
    draw_sheet(samples, SHEET)
    features = embed(inception, heldout)
    sets = {"samples": samples, "reconstructed": reconstruct(model, others), "real": others}
    for title, images in sets.items():
        own = embed(inception, images)
        numbers = {"kid_x1000": 1e3 * kernel_distance(own, features), "fid": frechet_distance(own, features)}
        print(json.dumps({"set": title, "num_images": len(images)} | {k: round(v, 1) for k, v in numbers.items()}))
    for name in ("avatars", "sunglasses", "watercolour", "ink"):
        images = heldout if name == "avatars" else heldout_pictures(f"bundled:{name}", 64)
        assert images is not None
        print(json.dumps({"autoencoder_psnr": name, "db": round(psnr(images, reconstruct(model, images)), 1)}))


if __name__ == "__main__":
    main()
