"""Tiny pipelines and pictures, written for real: every test starts from folders, as users do."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
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
from PIL import Image
from stub_networks import Stub

from domainstudio.data.domain import Domain, load_domain
from domainstudio.evaluation import features
from domainstudio.models.load import load_model
from domainstudio.models.model import DiffusionModel

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


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pipeline by name."""
    root = tmp_path_factory.mktemp("pipelines")

    def find(name: str) -> Path:
        if not (root / name).exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                PIPELINES[name]().save_pretrained(root / name)
        return root / name

    return find


@pytest.fixture(scope="session")
def models(pipelines: Callable[[str], Path]) -> Callable[[str], DiffusionModel]:
    """A fresh model by the name of its pipeline."""
    loaded: dict[str, DiffusionModel] = {}

    def fresh(name: str) -> DiffusionModel:
        if name not in loaded:
            loaded[name] = load_model(pipelines(name))
        return copy.deepcopy(loaded[name])

    return fresh


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten small pictures, all different."""
    folder = tmp_path_factory.mktemp("ten") / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(10):
        blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(4, axis=0).repeat(4, axis=1)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def domains(pictures: Path) -> Callable[[DiffusionModel], Domain]:
    """The ten pictures at a model's size."""
    return lambda model: load_domain(pictures, model.resolution)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metric networks that need no weights."""
    monkeypatch.setattr(features, "load_lpips", lambda backbone: Stub())
    monkeypatch.setattr(features, "load_inception", Stub)
