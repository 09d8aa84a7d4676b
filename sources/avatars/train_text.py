"""Trains the bundled text-to-image source: `python sources/avatars/train_text.py all` (resumes; uses a GPU if any).

The result is an ordinary Stable Diffusion pipeline of 64 px: the codec of the bundled avatar source, with a decoder
trained further to know robots too; a text encoder and a conditional UNet, trained together on captioned avatars
(4 in 5 pictures) and robots. Captions name a random part of what is in the picture; one in ten is empty, for
classifier-free guidance. The UNet's convolutions begin as those of the avatar source.

The denoising loss hardly rewards small things (a mouth is one latent of 64), and by itself never found their words. So
a small network that reads attributes off latents says how well the clean estimate shows what the caption names, in the
last tenth of the steps with less weight, so that the picture is left to the denoising loss. It is not the network that
attributes.py measures with, which looks at pictures.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from attributes import Reader, labels_of
from captions import Attributes, caption, part_of, read_attributes
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from train import (
    DEVICE,
    HERE,
    draw_latents,
    fit,
    new_scheduler,
    noiser,
    pictures,
    polish_decoder,
    posteriors,
    render,
    render_set,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SETS = {"avatars": 40_000, "robots": 10_000}
ROBOT_SHARE = 0.2
EMPTY_SHARE = 0.1
MAX_TOKENS = 48
HINT_WEIGHT, HINTED, HINT_AFTER = 0.15, 0.9, 0.03
OF_LATENTS = ((16, 128, 1), (128, 128, 1), (128, 192, 2))
"""Convolutions of the reader of (B, 16, 8, 8) scaled latents, which may be noisy or blurred."""
START, END = "<|startoftext|>", "<|endoftext|>"


def new_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 3),  # the number of heads, by diffusers' misnomer: 64 wide
    )
    for name, module in unet.named_modules():
        if name.endswith("proj_out"):  # attention begins as nothing, so that the convolutions are worth what they were
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_tokenizer(texts: list[str], folder: Path) -> CLIPTokenizer:
    """CLIP's kind of byte-pair encoding, learned from the captions: each of their words is one token, any text some."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    characters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        show_progress=False,
        initial_alphabet=sorted(characters),
        end_of_word_suffix="</w>",
        min_frequency=1,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in state["merges"]]
    words = [*sorted(characters), *(f"{c}</w>" for c in sorted(characters)), *("".join(m.split(" ")) for m in merges)]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*words, START, END]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS, pad_token=END
    )


def sampled_part(attributes: Attributes) -> Attributes | None:
    """A random part of the attributes, or, one time in ten, not even what it is; drawn from torch's generator."""
    share, *draws = torch.rand(2 + len(attributes)).tolist()
    if draws.pop() < EMPTY_SHARE:
        return None
    return part_of(attributes, [draw < share for draw in draws])


@torch.no_grad()
def encode(vae: AutoencoderKL, build: Path) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of the pictures of both sets, in their order."""
    path = build / "latents_text.pt"
    if not path.exists():
        means, stds = zip(*(posteriors(vae, pictures(build / f"{name}.bin")) for name in SETS), strict=True)
        torch.save((torch.cat(means), torch.cat(stds)), path)
    return torch.load(path, weights_only=True)


Draw = Callable[[], tuple[Tensor, list[Attributes]]]
"""A batch of scaled latents with all that is in them."""


def batches_of(
    latents: tuple[Tensor, Tensor], scale: float, attributes: dict[str, list[Attributes]], batch_size: int
) -> Draw:
    """Avatars and a share of robots, at random."""
    known = [*attributes["avatars"], *attributes["robots"]]
    num_avatars, num_robots = len(attributes["avatars"]), len(attributes["robots"])

    def draw() -> tuple[Tensor, list[Attributes]]:
        rows = torch.randint(num_avatars, (batch_size,))
        robots = num_avatars + torch.randint(num_robots, (batch_size,))
        rows = torch.where(torch.rand(batch_size) < ROBOT_SHARE, robots, rows)
        return draw_latents(*latents, rows, scale), [known[row] for row in rows.tolist()]

    return draw


def train_reader(reader: Reader, draw: Draw, args: argparse.Namespace) -> None:
    def loss(_: float) -> Tensor:
        x0, attributes = draw()
        noise = 0.7 * torch.rand(len(x0), 1, 1, 1, device=DEVICE) * torch.randn_like(x0)
        logits, labels = reader(x0 + noise), labels_of(attributes)
        return torch.stack([F.cross_entropy(logits[name].float(), labels[name].to(DEVICE)) for name in labels]).sum()

    fit("reader", reader, list(reader.parameters()), loss, args.reader_steps, 1.5e-3, args.build)
    reader.requires_grad_(False).eval()


def misread(reader: Reader, x0: Tensor, named: list[Attributes]) -> Tensor:
    """Mean cross-entropy of what was named, rare attributes counting as much as common ones."""
    labels, logits = labels_of(named), reader(x0)
    errors = [
        F.cross_entropy(logits[name][rows].float(), wanted[rows].to(DEVICE))
        for name, wanted in labels.items()
        if len(rows := wanted.nonzero().flatten())
    ]
    return torch.stack(errors).mean() if errors else x0.new_zeros(())


def train_networks(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    reader: Reader,
    draw: Draw,
    args: argparse.Namespace,
) -> None:
    noised = noiser()

    def loss(done: float) -> Tensor:
        x0, attributes = draw()
        named = [sampled_part(part) for part in attributes]
        texts = ["" if part is None else caption(part) for part in named]
        tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        states = text_encoder(tokens.input_ids.to(DEVICE)).last_hidden_state
        batch = noised(x0)
        output = unet(batch.x_t, batch.t, states).sample
        hint = misread(reader, batch.estimate(output), [part or {} for part in named])
        return batch.error(output) + (HINT_WEIGHT if done < HINTED else HINT_AFTER) * hint

    networks = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    fit("text", networks, list(networks.parameters()), loss, args.steps, args.lr, args.build)


def main() -> None:
    models_folder = HERE.parents[1] / "src/domainstudio/assets/models"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["networks", "decoder", "all"])
    parser.add_argument("--build", type=Path, default=Path("build/avatars"))
    parser.add_argument("--source", type=Path, default=models_folder / "avatars", help="begin with its codec and UNet")
    parser.add_argument("--out", type=Path, default=models_folder / "avatars-text")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--reader-steps", type=int, default=2_000)
    parser.add_argument("--decoder-steps", type=int, default=4_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=6e-4)
    args = parser.parse_args()
    args.build.mkdir(parents=True, exist_ok=True)
    render(args.build)
    for name, count in SETS.items():
        render_set(args.build / f"{name}.bin", name, count, "train")
        render_set(args.build / f"{name}.jsonl", name, count, "train", px=0)
    attributes = {name: read_attributes(args.build / f"{name}.jsonl") for name in SETS}
    vae = AutoencoderKL.from_pretrained(args.source, subfolder="vqvae").to(DEVICE)
    scale = vae.config.scaling_factor
    texts = [caption(a) for name in SETS for a in attributes[name]]
    tokenizer = train_tokenizer(texts, args.build / "tokenizer")
    torch.manual_seed(0)
    unet, text_encoder = new_unet(), new_text_encoder(tokenizer)
    unet.load_state_dict(UNet2DModel.from_pretrained(args.source, subfolder="unet").state_dict(), strict=False)
    unet.to(DEVICE), text_encoder.to(DEVICE)
    if args.stage in ("networks", "all"):
        draw = batches_of(encode(vae, args.build), scale, attributes, args.batch_size)
        reader = Reader(OF_LATENTS).to(DEVICE)
        train_reader(reader, draw, args)
        train_networks(unet, text_encoder, tokenizer, reader, draw, args)
    if args.stage in ("decoder", "all"):
        polish_decoder(vae, args.build, args.decoder_steps, "decoder_text", ("robots",))
    if args.stage == "all":
        pipeline = StableDiffusionPipeline(
            vae=vae.half(),
            text_encoder=text_encoder.half(),
            tokenizer=tokenizer,
            unet=unet.half(),
            scheduler=new_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(args.out)


if __name__ == "__main__":
    main()
