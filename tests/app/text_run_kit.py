"""Runs of tiny text-to-image models. A test file takes them with `pytest_plugins = ("text_kit", "text_run_kit")`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import flags, succeeds
from text_settings import FAST_TEXT


@pytest.fixture(scope="session")
def train_text(tmp_path_factory, text_pipelines, pictures) -> Callable[..., Path]:
    """Trains a tiny text-to-image pipeline through the command line; the finished run folder."""

    def run(name: str, pipeline: str = "sd1_epsilon", **settings: object) -> Path:
        folder = tmp_path_factory.mktemp("runs") / name
        given = {"pretrained_model_name_or_path": text_pipelines(pipeline), "instance_data_dir": pictures}
        succeeds("train", *flags(**given, output_dir=folder, **{**FAST_TEXT, **settings}))
        return folder

    return run


@pytest.fixture(scope="session")
def text_lora_run(train_text) -> Path:
    """Our default with a LoRA on UNet and text encoder."""
    settings = {"adapter": "lora", "rank": 2, "lora_alpha": 3.0, "train_text_encoder": True}
    return train_text("text_lora", **settings, prior_prompt="a {man|woman|dog}")


@pytest.fixture(scope="session")
def text_full_run(train_text) -> Path:
    """DreamBooth of all weights."""
    return train_text("text_full", "sd2_v", adapter="full", method="dreambooth", learning_rate=1e-3)
