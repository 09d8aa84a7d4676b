from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import FAST, flags, succeeds

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
    return train("plain", "pixel_dropout", method="finetune", num_class_images=100, pair_batch_size=10)
