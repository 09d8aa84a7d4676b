"""Tiny pipelines and pictures, written for real: every test starts from folders, as users do."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stub_networks import Stub
from tiny_models import PIPELINES

from domainstudio.data.domain import Domain, load_domain
from domainstudio.evaluation import features
from domainstudio.evaluation.cache import CACHE_VARIABLE
from domainstudio.models.load import load_model
from domainstudio.models.model import DiffusionModel
from domainstudio.training import ant


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


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of what is made once for many tests: a home has other things in it, and is to be left as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_shared_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What stubs see must not be taken for what networks see."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True, scope="session")
def quick_classifier() -> Iterator[None]:
    """Tests fit the classifier of method ant to fewer examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ant, "NUM_NOISINGS", 50)
        patch.setattr(ant, "FIT_STEPS", 50)
        yield


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metric networks that need no weights."""
    monkeypatch.setattr(features, "load_lpips", lambda backbone: Stub())
    monkeypatch.setattr(features, "load_inception", Stub)
