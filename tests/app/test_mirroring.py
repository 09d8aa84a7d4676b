"""Whether training pictures are mirrored follows from them, unless it is said."""

import tomllib
from pathlib import Path

import pytest
import torch
from command_line import FAST, flags, metrics, succeeds
from text_settings import FAST_TEXT

from domainstudio.data.domain import to_pil

pytest_plugins = ("text_kit",)


@pytest.fixture(scope="module", params=[True, False], ids=["both ways", "one way"])
def faces_both_ways(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def facing(faces_both_ways, tmp_path_factory) -> Path:
    """Pictures that face both ways, or one."""
    folder = tmp_path_factory.mktemp("facing")
    pictures = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    if not faces_both_ways:
        pictures = pictures + torch.linspace(-0.5, 0.5, 32)
    for number, picture in enumerate(to_pil(pictures)):
        picture.save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def losses(facing, pipelines, tmp_path_factory):
    """Trains with some flags: what every step said, and what was told."""

    def run(*given: str):
        output = tmp_path_factory.mktemp("run") / "run"
        settings = {"pretrained_model_name_or_path": pipelines("pixel_epsilon"), "instance_data_dir": facing}
        result = succeeds("train", *flags(**settings, output_dir=output, **FAST), *given)
        return metrics(output), " ".join(result.err.split()), output

    return run


def test_what_the_pictures_say(losses, faces_both_ways):
    chosen, told, output = losses()
    said, untold, _ = losses("--random-flip" if faces_both_ways else "--no-random-flip")
    other, _, _ = losses("--no-random-flip" if faces_both_ways else "--random-flip")
    assert chosen == said != other
    assert ("mirrored at random" in told, "are not mirrored" in told) == (faces_both_ways, not faces_both_ways)
    assert "mirrored" not in untold
    asked = tomllib.loads((output / "config.toml").read_text(encoding="utf-8"))
    assert "random_flip" not in asked  # chosen again where it runs again


def test_a_text_model_mirrors_when_told_to(text_pipelines, facing, tmp_path):
    settings = {"pretrained_model_name_or_path": text_pipelines("sd1_epsilon"), "instance_data_dir": facing}
    result = succeeds("train", *flags(**settings, output_dir=tmp_path / "run", **FAST_TEXT))
    assert "mirrored" not in result.err
