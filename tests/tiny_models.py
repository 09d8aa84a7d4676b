"""Tiny pipelines of every kind that is taken, with random weights."""

from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
)

SIDE = 16
"""Side of model space; pictures are as large in pixel models, twice as large in latent ones."""


def tiny_unet(channels: int = 3, out_channels: int | None = None, dropout: float = 0.0) -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=channels,
        out_channels=out_channels or channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        dropout=dropout,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * SIDE,
        scaling_factor=0.5,
        shift_factor=0.1,
    )


def _ddim(prediction: str) -> DDIMScheduler:
    return DDIMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")


PIPELINES = {
    "pixel_epsilon": lambda: DDPMPipeline(tiny_unet(), DDPMScheduler()),
    "pixel_learned": lambda: DDPMPipeline(tiny_unet(3, 6), DDPMScheduler(variance_type="learned_range")),
    "pixel_v": lambda: DDIMPipeline(tiny_unet(), _ddim("v_prediction")),
    "pixel_x0": lambda: DDPMPipeline(tiny_unet(), DDPMScheduler(prediction_type="sample")),
    "pixel_flow": lambda: DDPMPipeline(tiny_unet(), FlowMatchEulerDiscreteScheduler()),
    "pixel_dropout": lambda: DDPMPipeline(tiny_unet(dropout=0.2), DDPMScheduler()),
    "latent_epsilon": lambda: LDMPipeline(tiny_vae(), tiny_unet(4), _ddim("epsilon")),
    "latent_v": lambda: LDMPipeline(tiny_vae(), tiny_unet(4), _ddim("v_prediction")),
    "latent_flow": lambda: LDMPipeline(tiny_vae(), tiny_unet(4), FlowMatchEulerDiscreteScheduler()),
}

KINDS = [name for name in PIPELINES if name != "pixel_dropout"]
"""One pipeline for each kind of model."""
