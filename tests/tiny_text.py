"""Tiny Stable Diffusion pipelines with random weights, of the classes of the real ones."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from domainstudio.models.adaptation import Adaptation

WORDS = ("a", "an", "of", "in", "the", "portrait", "picture", "style", "man", "woman", "dog", "red", "blue", "hair")

TEXT_KINDS = {
    "sd1_epsilon": ("epsilon", False),
    "sd1_v": ("v_prediction", False),
    "sd2_epsilon": ("epsilon", True),
    "sd2_v": ("v_prediction", True),
}
"""Name -> prediction, and whether attention projects with linear layers, as in 2.x."""


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's kind of byte-pair encoding: single letters, and WORDS as tokens of their own."""
    letters = [chr(i) for i in range(33, 127)]
    merges, tokens = [], [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = ["".join(parts[:2]), *parts[2:]]
            tokens.append(parts[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def tiny_pipeline(folder: Path, prediction: str = "epsilon", linear: bool = False) -> StableDiffusionPipeline:
    """As Stable Diffusion 1.x, or (`linear`) as 2.x, whose attention projects with linear layers."""
    tokenizer = tiny_tokenizer(folder)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=linear,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            initializer_factor=10.0,  # so that prompts matter
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    scheduler = PNDMScheduler(prediction_type=prediction, skip_prk_steps=True, **settings)
    if prediction == "v_prediction":
        scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, **settings)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def give_size(adaptation: Adaptation) -> None:
    """Makes what is trained as large as training leaves it."""
    with torch.no_grad():
        for p in adaptation.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
