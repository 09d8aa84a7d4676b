"""Opens a diffusers pipeline folder, hub name or single file as a DiffusionModel."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from torch import nn

from domainstudio.diffusion.prediction import Prediction
from domainstudio.diffusion.schedule import DiscreteSchedule, FlowSchedule, NoiseSchedule
from domainstudio.errors import UserError
from domainstudio.models.codec import Codec, PixelCodec, VaeCodec
from domainstudio.models.condition import TextCondition
from domainstudio.models.layout import keep_layout
from domainstudio.models.model import DiffusionModel
from domainstudio.quiet import quiet

_UNREADABLE = (
    *(OSError, ValueError, KeyError, AttributeError, UnpicklingError, SafetensorError),
    SingleFileComponentError,
)
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def load_model(
    name_or_path: str | Path, device: torch.device | str = "cpu", config: str | Path | None = None
) -> DiffusionModel:
    """The model at a pipeline folder, hub name or single file, in float32 and eval mode.

    Taken: unconditional pipelines, whose denoiser is a `UNet2DModel` (DDPM, DDIM: pixels) or a VAE and a `UNet2DModel`
    (LDM: latents), with a DDPM-like scheduler (epsilon, v or sample prediction) or a flow-matching one; and
    `StableDiffusionPipeline` (1.x, 2.x; epsilon and v), also as one .safetensors or .ckpt file.

    Args:
        config: of a single file, the pipeline folder or hub name whose configuration it has; diffusers guesses it from
            the weights where it is not given, and takes every 2.x file for one that predicts v.

    Raises:
        UserError: if there is no such pipeline, or it is of another kind.
    """
    name = str(name_or_path)
    is_file = Path(name).is_file()
    if config is not None and not is_file:
        raise UserError(f"config {config} is for a model in a single file; {name} has its own")
    pipeline: Any = (_open_file(name, config) if is_file else _open_pipeline(name)).to(device)
    network = getattr(pipeline, "unet", None)
    if type(pipeline).__name__ != "StableDiffusionPipeline" and not isinstance(network, UNet2DModel):
        raise UserError(
            f"{name} is a {type(pipeline).__name__}; taken are text-to-image pipelines of Stable Diffusion 1.x and 2.x "
            "(StableDiffusionPipeline) and unconditional ones, whose `unet` is a UNet2DModel (DDPMPipeline, "
            "DDIMPipeline, LDMPipeline)"
        )
    assert isinstance(network, nn.Module)
    network.requires_grad_(False).eval()
    vae = getattr(pipeline, "vqvae", None) or getattr(pipeline, "vae", None)
    for part in filter(None, (network, vae)):
        keep_layout(part)
    codec: Codec = VaeCodec(vae) if vae is not None else PixelCodec()
    text_encoder = getattr(pipeline, "text_encoder", None)
    schedule, prediction, learned_variance = _read_scheduler(pipeline.scheduler, network, name)
    shape: Any = network.config
    side, channels = shape.sample_size, shape.in_channels
    if not isinstance(side, int):
        raise UserError(f"{name}: unet sample_size is {side}; a single number is needed, for square pictures")
    factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
    return DiffusionModel(
        pipeline=pipeline,
        network=network,
        schedule=schedule,
        prediction=prediction,
        codec=codec,
        condition=None if text_encoder is None else TextCondition(pipeline.tokenizer, text_encoder),
        learned_variance=learned_variance,
        resolution=side * factor,
        sample_shape=(channels, side, side),
    )


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Writes an ordinary diffusers pipeline folder."""
    with quiet():
        pipeline.save_pretrained(folder)


def _open_pipeline(name: str) -> DiffusionPipeline:
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise UserError(f"{name} is not a diffusers pipeline folder: it has no model_index.json")
    hint = "Give a pipeline folder, a hub name, a .safetensors file, or a bundled model such as bundled:avatars"
    with _opening(name, hint):
        # The safety checker is as large as the model and looks at no picture that is only trained on. Pipelines that
        # never had one ignore these, and `quiet` keeps their remark off the terminal.
        without = {"safety_checker": None, "requires_safety_checker": False}
        return DiffusionPipeline.from_pretrained(name, dtype=torch.float32, **without)


def _open_file(name: str, config: str | Path | None) -> DiffusionPipeline:
    """A checkpoint in one file, as ComfyUI and A1111 keep them; pickles (.ckpt) are read as weights alone."""
    if Path(name).suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"{name} is not a model: give a pipeline folder, or a .safetensors or .ckpt file")
    hint = (
        "Taken are Stable Diffusion 1.x and 2.x; their configuration comes from the hub or its cache, or from the "
        "pipeline folder that single_file_config names"
    )
    with _opening(name, hint):
        from diffusers import StableDiffusionPipeline

        settings: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
        if config is not None:
            settings["config"] = str(config)
        return StableDiffusionPipeline.from_single_file(name, torch_dtype=torch.float32, **settings)


@contextmanager
def _opening(name: str, hint: str) -> Iterator[None]:
    """One clear error if what is inside fails."""
    try:
        with quiet():
            yield
    except _UNREADABLE as error:
        raise UserError(f"could not load a diffusers pipeline from {name!r}: {error}. {hint}") from error


def _read_scheduler(scheduler: Any, network: nn.Module, name: str) -> tuple[NoiseSchedule, Prediction, bool]:
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
    unclipped = {} if isinstance(model.codec, PixelCodec) else {"clip_sample": False}  # latents have no range
    return DDIMScheduler.from_config({**unclipped, **kept, "timestep_spacing": "trailing"})
