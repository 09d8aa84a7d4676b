from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import FAST, flags, succeeds
from PIL import Image

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def train(tmp_path_factory, pipelines, pictures) -> Train:
    """Trains a tiny pipeline through the command line; the finished run folder."""

    def run(name: str, pipeline: str = "pixel_epsilon", **settings: object) -> Path:
        folder = tmp_path_factory.mktemp("runs") / name
        given = {"pretrained_model_name_or_path": pipelines(pipeline), "instance_data_dir": pictures}
        succeeds("train", *flags(**given, output_dir=folder, **{**FAST, **settings}))
        return folder

    return run


@pytest.fixture(scope="session")
def full_run(train: Train) -> Path:
    return train("full", "pixel_dropout", random_flip=True)


@pytest.fixture(scope="session")
def lora_run(train: Train) -> Path:
    return train("lora", "latent_v", adapter="lora", rank=2, checkpoints_total_limit=1)


@pytest.fixture(scope="session")
def plain_run(train: Train) -> Path:
    return train("plain", "pixel_dropout", method="finetune", num_class_images=None, pair_batch_size=10)


@pytest.fixture(scope="session")
def heldout(tmp_path_factory) -> Path:
    """Twelve pictures of no one else's."""
    folder = tmp_path_factory.mktemp("heldout")
    for index, levels in enumerate(np.random.default_rng(7).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(levels.repeat(4, axis=0).repeat(4, axis=1)).save(folder / f"{index}.png")
    return folder
