"""Fixtures of text-to-image models. A test file takes them with `pytest_plugins = "text_kit"`."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_text import TEXT_KINDS, tiny_pipeline

from domainstudio.models.load import load_model
from domainstudio.models.model import DiffusionModel


@pytest.fixture(scope="session")
def text_pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a text-to-image pipeline by name."""
    root = tmp_path_factory.mktemp("text_pipelines")

    def find(name: str) -> Path:
        if not (root / name).exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                tiny_pipeline(root / "tokenizer", *TEXT_KINDS[name]).save_pretrained(root / name)
        return root / name

    return find


@pytest.fixture(scope="session")
def text_models(text_pipelines: Callable[[str], Path]) -> Callable[[str], DiffusionModel]:
    """A fresh text-to-image model by the name of its pipeline."""
    loaded: dict[str, DiffusionModel] = {}

    def fresh(name: str = "sd1_epsilon") -> DiffusionModel:
        if name not in loaded:
            loaded[name] = load_model(text_pipelines(name))
        return copy.deepcopy(loaded[name])

    return fresh
