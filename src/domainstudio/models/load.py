"""Opens a diffusers pipeline folder, hub name or `bundled:NAME` as a DiffusionModel."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.utils import logging as diffusers_logging

from domainstudio.diffusion.prediction import Prediction
from domainstudio.diffusion.schedule import DiscreteSchedule, FlowSchedule, NoiseSchedule
from domainstudio.errors import UserError
from domainstudio.models.codec import Codec, PixelCodec, VaeCodec
from domainstudio.models.model import DiffusionModel

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def load_model(name_or_path: str | Path, device: torch.device | str = "cpu") -> DiffusionModel:
    """The model at a pipeline folder or hub name, in float32 and eval mode.

    Taken: pipelines whose denoiser is a `UNet2DModel` (DDPM, DDIM: pixels) or a VAE and a `UNet2DModel` (LDM: latents),
    with a DDPM-like scheduler (epsilon, v or sample prediction) or a flow-matching one.

    Raises:
        UserError: if there is no such pipeline, or it is of another kind.
    """
    pipeline = _open_pipeline(str(name_or_path)).to(device)
    network = getattr(pipeline, "unet", None)
    if not isinstance(network, UNet2DModel):
        raise UserError(
            f"{name_or_path} is a {type(pipeline).__name__}; this version adapts unconditional pipelines, whose `unet` "
            "is a UNet2DModel (DDPMPipeline, DDIMPipeline, LDMPipeline)"
        )
    network.requires_grad_(False).eval()
    vae = getattr(pipeline, "vqvae", None) or getattr(pipeline, "vae", None)
    codec: Codec = VaeCodec(vae) if vae is not None else PixelCodec()
    schedule, prediction, learned_variance = _read_scheduler(pipeline.scheduler, network, str(name_or_path))
    config: Any = network.config
    side, channels = config.sample_size, config.in_channels
    if not isinstance(side, int):
        raise UserError(f"{name_or_path}: unet sample_size is {side}; a single number is needed, for square pictures")
    factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
    return DiffusionModel(
        pipeline=pipeline,
        network=network,
        schedule=schedule,
        prediction=prediction,
        codec=codec,
        learned_variance=learned_variance,
        resolution=side * factor,
        sample_shape=(channels, side, side),
    )


def _open_pipeline(name: str) -> DiffusionPipeline:
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise UserError(f"{name} is not a diffusers pipeline folder: it has no model_index.json")
    # diffusers logs a type mismatch for an AutoencoderKL in LDMPipeline's `vqvae` slot, which its code accepts.
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        return DiffusionPipeline.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, AttributeError) as error:  # the last two: a class missing or unknown
        raise UserError(
            f"could not load a diffusers pipeline from {name!r}: {error}. Give a pipeline folder, a hub name, or a "
            "bundled model such as bundled:avatars"
        ) from error
    finally:
        logger.setLevel(level)
        if bars:
            diffusers_logging.enable_progress_bar()


def _read_scheduler(scheduler: Any, network: UNet2DModel, name: str) -> tuple[NoiseSchedule, Prediction, bool]:
    config: Any = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowSchedule(config.num_train_timesteps), "flow", False
    prediction = _PREDICTIONS.get(config.get("prediction_type", "epsilon"))
    if prediction is None or not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"{name}: scheduler {type(scheduler).__name__} with prediction_type="
            f"{config.get('prediction_type')!r} is not supported; use a DDPM or DDIM scheduler with epsilon, "
            "v_prediction or sample, or FlowMatchEulerDiscreteScheduler"
        )
    shape: Any = network.config
    learned = shape.out_channels == 2 * shape.in_channels
    return DiscreteSchedule(scheduler.alphas_cumprod.float()), prediction, learned


def fast_scheduler(model: DiffusionModel) -> Any:
    """A deterministic sampler: the model's own scheduler if that is DDIM or flow, else DDIM with its noise levels."""
    scheduler: Any = model.pipeline.scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler | DDIMScheduler):
        return type(scheduler).from_config(scheduler.config)
    kept = {k: v for k, v in scheduler.config.items() if k in DDIMScheduler().config and not k.startswith("_")}
    return DDIMScheduler.from_config({**kept, "timestep_spacing": "trailing"})
