"""Measures the bundled source and draws its samples: `python sources/avatars/measure.py` (needs Node.js).

Prints KID and FID to held-out avatars beside those of real avatars to the same, and what the autoencoder alone loses;
writes docs/source-samples.png. With `--text` it draws the text-to-image source, a row a prompt, into
docs/text-source-samples.png; how well that follows its words, attributes.py says.
"""

import argparse
import json
from pathlib import Path

import torch
from attributes import given_back
from diffusers import AutoencoderKL
from domains import DOMAINS, render
from PIL import Image
from torch import Tensor, nn

from domainstudio.app.draw import draw_from
from domainstudio.app.materials import open_source
from domainstudio.data.domain import heldout_pictures, to_pil, to_tensor
from domainstudio.evaluation.features import embed, load_inception
from domainstudio.evaluation.metrics import frechet_distance, kernel_distance
from domainstudio.models.sample import TextGuidance

HERE = Path(__file__).parent
SHEET = HERE.parents[1] / "docs/source-samples.png"
TEXT_SHEET = SHEET.with_name("text-source-samples.png")
COLUMNS, ROWS, SCALE = 10, 4, 2
PROMPTS = (
    "a portrait of a woman with long red hair and round glasses",
    "a portrait of a man with short blond hair and a beard",
    "a portrait of a woman with dark skin and bobbed black hair, smiling, wearing a red hoodie",
    "a portrait of a person with a winter hat, on a green background",
    "a portrait of a man with light skin and a bald head, wearing a black blazer",
    "a picture of a blue robot with a round face and an antenna",
)
GUIDANCE = 2.0


def avatars(split: str, count: int) -> Tensor:
    """(count, 3, 64, 64) in [-1, 1]."""
    return torch.stack([to_tensor(picture, 64) for picture in render("avatars", split, count)])


def psnr(images: Tensor, others: Tensor) -> float:
    """Mean over pictures, in dB."""
    errors = ((images - others) / 2).square().flatten(1).mean(1)
    return (-10 * errors.log10()).mean().item()


def draw_sheet(images: Tensor, path: Path) -> None:
    side = images.shape[-1] * SCALE
    sheet = Image.new("RGB", (COLUMNS * side, len(images) // COLUMNS * side))
    for index, picture in enumerate(to_pil(images)):
        place = (index % COLUMNS * side, index // COLUMNS * side)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), place)
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=1_000)
    parser.add_argument("--text", action="store_true")
    args = parser.parse_args()
    if args.text:
        told = TextGuidance([prompt for prompt in PROMPTS for _ in range(COLUMNS)], GUIDANCE)
        samples = draw_from(open_source("bundled:avatars-text"), len(told.prompts), 7, 25, guidance=told)
        draw_sheet(samples, TEXT_SHEET)
        return
    model, inception = open_source("bundled:avatars"), load_inception()
    vae = model.pipeline.vqvae
    heldout, others = avatars("heldout", args.num_images), avatars("heldout2", args.num_images)
    samples = draw_from(model, args.num_images, seed=7, num_inference_steps=25)
    draw_sheet(samples[: COLUMNS * ROWS], SHEET)
    features = embed(inception, heldout)
    sets = {"samples": samples, "reconstructed": given_back(vae, others), "real": others}
    for title, images in sets.items():
        own = embed(inception, images)
        numbers = {"kid_x1000": 1e3 * kernel_distance(own, features).value, "fid": frechet_distance(own, features)}
        print(json.dumps({"set": title, "num_images": len(images)} | {k: round(v, 1) for k, v in numbers.items()}))
    measure_autoencoder(vae, inception, heldout)


def measure_autoencoder(vae: AutoencoderKL, inception: nn.Module, avatars: Tensor) -> None:
    """What it loses of each domain: PSNR, and KID of half of the held-out pictures, given back, to the other half."""
    for name in ("avatars", *DOMAINS):
        images = avatars if name == "avatars" else heldout_pictures(f"bundled:{name}", 64)
        assert images is not None
        back = given_back(vae, images)
        halves = embed(inception, back[: len(images) // 2]), embed(inception, images[len(images) // 2 :])
        kid = round(1e3 * kernel_distance(*halves).value, 1)
        print(json.dumps({"autoencoder": name, "psnr_db": round(psnr(images, back), 1), "kid_x1000": kid}), flush=True)


if __name__ == "__main__":
    main()
