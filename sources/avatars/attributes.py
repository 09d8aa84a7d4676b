"""Does a picture show what its prompt says? `python sources/avatars/attributes.py train|agreement` (needs Node.js).

`train` fits a small network that reads the attributes of captions.py off a picture, on labelled avatars, avatars with
sunglasses, watercolours and robots, as they are and as the bundled autoencoder gives them back, and prints its accuracy
on others. `agreement` draws pictures of random captions with a text-to-image model and prints, for each attribute, how
often that network sees what the caption says.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import Attributes, caption, part_of, read_attributes
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train import DEVICE, HERE, pictures, render_set, to_tensor

from domainstudio.app.materials import open_source
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sample import TextGuidance, decode, sample

WEIGHTS = HERE / "attributes.safetensors"
VALUES = {
    "gender": ("man", "woman"),
    "skin": ("dark", "brown", "light"),
    "hair": ("long", "long wavy", "bobbed", "big curly", "spiky", "short"),
    "hair colour": ("black", "brown", "auburn", "red", "blond", "white"),
    "headwear": (
        *("hair in a bun", "flowers in the hair", "a bald head"),
        *("a hat", "a headscarf", "a turban", "a winter hat"),
    ),
    "glasses": ("round glasses", "glasses", "sunglasses"),
    "beard": ("a beard", "a long beard", "a moustache"),
    "mouth": ("smiling", "sad", "serious", "shouting", "tongue out"),
    "eyes": ("eyes closed", "winking", "wide eyes"),
    "clothes": ("hoodie", "overalls", "blazer", "sweater", "shirt"),
    "clothes colour": ("black", "blue", "pale blue", "white", "grey", "green", "pink", "yellow", "red"),
    "background": ("blue", "purple", "pink", "orange", "green", "cream", "grey"),
    "robot colour": (
        *("orange", "blue", "grey", "brown", "turquoise"),
        *("purple", "green", "yellow", "pink", "red"),
    ),
    "robot top": ("an antenna", "a light bulb", "horns", "lights", "a pyramid", "a radar"),
    "robot face": ("round", "square"),
}
"""What an attribute can be; index 0 of the network's head is "none of them"."""
SETS = {"avatars": 40_000, "sunglasses": 8_000, "watercolour": 3_000, "robots": 10_000}
NUM_TEST = 500


OF_PICTURES = tuple(row for i, o in ((3, 32), (32, 64), (64, 128), (128, 192)) for row in ((i, o, 2), (o, o, 1)))
"""Convolutions of a reader: (in, out, stride); the last gives 192 x 4 x 4."""


class Reader(nn.Module):
    """(B, 3, 64, 64) in [-1, 1], or what else its convolutions take -> attribute -> logits over "none" and values."""

    def __init__(self, convolutions: Sequence[tuple[int, int, int]] = OF_PICTURES):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in convolutions:
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192 * 16, 256), nn.SiLU())
        self.head = nn.Linear(256, sum(1 + len(values) for values in VALUES.values()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        parts = self.head(self.body(images)).split([1 + len(values) for values in VALUES.values()], dim=1)
        return dict(zip(VALUES, parts, strict=True))


def labels_of(attributes: list[Attributes]) -> dict[str, Tensor]:
    """Attribute -> (N,) indices; 0 where a picture has none of its values."""
    return {
        name: torch.tensor([1 + values.index(a[name]) if name in a else 0 for a in attributes])
        for name, values in VALUES.items()
    }


def labelled(build: Path, name: str, count: int, split: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures of a set, (N, 64, 64, 3) bytes, with their labels."""
    stem = name if split == "train" and name in ("avatars", "robots") else f"{name}-{split}"
    render_set(build / f"{stem}.bin", name, count, split)
    render_set(build / f"{stem}.jsonl", name, count, split, px=0)
    attributes = read_attributes(build / f"{stem}.jsonl")
    return torch.from_numpy(pictures(build / f"{stem}.bin").copy()), labels_of(attributes)


def load_reader() -> Reader:
    """The trained network."""
    reader = Reader().eval()
    reader.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return reader


@torch.no_grad()
def given_back(vae: AutoencoderKL, images: Tensor, noise: float = 0.0) -> Tensor:
    """What the autoencoder makes of pictures, with noise of that deviation on their latents, as samples have."""
    parts = []
    for part in images.split(50):
        latents = vae.encode(part).latent_dist.mean
        parts.append(vae.decode(latents + noise * torch.randn_like(latents)).sample.clamp(-1, 1))
    return torch.cat(parts)


def train(vae: AutoencoderKL, build: Path, steps: int, batch_size: int = 64) -> None:
    sets = [labelled(build, name, count, "train") for name, count in SETS.items()]
    images = torch.cat([part for part, _ in sets])
    labels = {name: torch.cat([part[name] for _, part in sets]) for name in VALUES}
    torch.manual_seed(0)
    reader = Reader().to(DEVICE)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 100, 2 * (1 - step / steps))
        rows = torch.randint(len(images), (batch_size,))
        shown = to_tensor(images[rows].numpy())
        shown[: batch_size // 2] = given_back(vae, shown[: batch_size // 2], noise=0.1)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = reader(shown + 0.03 * torch.randn_like(shown))
        loss = sum(F.cross_entropy(logits[name].float(), labels[name][rows].to(DEVICE)) for name in VALUES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 199:
            print(f"reader {step + 1}/{steps} loss {loss.item():.3f} {time.strftime('%H:%M:%S')}", flush=True)
    save_file({name: tensor.half().cpu() for name, tensor in reader.state_dict().items()}, WEIGHTS)


@torch.no_grad()
def read(reader: Reader, images: Tensor) -> dict[str, Tensor]:
    """Attribute -> (N,) indices that the network sees."""
    parts = [reader(part) for part in images.split(100)]
    return {name: torch.cat([part[name].argmax(1) for part in parts]) for name in VALUES}


def accuracy(vae: AutoencoderKL, build: Path) -> None:
    """Of pictures it has not seen, those given back by the autoencoder among them."""
    reader = load_reader()
    for name in SETS:
        images, labels = labelled(build, name, NUM_TEST, "test")
        shown = to_tensor(images.numpy()).cpu()
        kinds = {"real": shown, "given back": given_back(vae, shown)}
        for kind, images in kinds.items():
            seen = read(reader, images)
            shares = {
                attribute: round((seen[attribute] == labels[attribute])[labels[attribute] > 0].float().mean().item(), 3)
                for attribute in VALUES
                if (labels[attribute] > 0).any()
            }
            print(json.dumps({"set": name, "pictures": kind, "accuracy": shares}))


def agreement(
    model: DiffusionModel, attributes: list[Attributes], prompts: list[str], scale: float, seed: int = 5
) -> dict[str, float]:
    """Attribute -> share of pictures, among those whose prompt names it, that show what it says."""
    images = decode(model, sample(model, model.network, len(prompts), seed, 25, guidance=TextGuidance(prompts, scale)))
    return agreement_of(images, attributes)


def agreement_of(images: Tensor, attributes: list[Attributes]) -> dict[str, float]:
    """The same of pictures that were drawn already; `attributes` are what their prompts name."""
    seen, wanted = read(load_reader(), images), labels_of(attributes)
    named = {name: wanted[name] > 0 for name in VALUES if (wanted[name] > 0).any()}
    return {name: (seen[name] == wanted[name])[rows].float().mean().item() for name, rows in named.items()}


def asked(build: Path, count: int, robots: int) -> list[Attributes]:
    """What random prompts name: a random half of the attributes of pictures that the model has not seen.

    Where that is nothing, nothing is asked.
    """
    portraits, machines = (
        labelled_attributes(build, name, number) for name, number in (("avatars", count), ("robots", robots))
    )
    generator = torch.Generator().manual_seed(3)
    parts = [part_of(a, (torch.rand(len(a), generator=generator) < 0.5).tolist()) for a in [*portraits, *machines]]
    return [part for part in parts if part]


def labelled_attributes(build: Path, name: str, count: int) -> list[Attributes]:
    """Of the first `count` test pictures of a set."""
    render_set(build / f"{name}-test.jsonl", name, NUM_TEST, "test", px=0)
    return read_attributes(build / f"{name}-test.jsonl")[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "accuracy", "agreement"])
    parser.add_argument("--build", type=Path, default=Path("build/avatars"))
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--model", default="bundled:avatars-text")
    parser.add_argument("--num-images", type=int, default=500, help="portraits; robots are a fifth more")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    args = parser.parse_args()
    args.build.mkdir(parents=True, exist_ok=True)
    if args.what != "agreement":
        folder = HERE.parents[1] / "src/domainstudio/assets/models/avatars"
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vqvae").float().to(DEVICE)
        if args.what == "train":
            train(vae, args.build, args.steps)
        accuracy(vae.cpu(), args.build)
        return
    attributes = asked(args.build, args.num_images, args.num_images // 5)
    shares = agreement(open_source(args.model), attributes, [caption(a) for a in attributes], args.guidance_scale)
    print(json.dumps({name: round(share, 3) for name, share in shares.items()}))


if __name__ == "__main__":
    main()
