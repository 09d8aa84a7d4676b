"""Folders of small random pictures, written for real."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Noise = Callable[..., np.ndarray]


@pytest.fixture
def noise() -> Noise:
    """Draws (height, width, channels) of blocky random 8-bit pixels, different at every call."""
    rng = np.random.default_rng(0)

    def draw(height: int = 48, width: int = 48, channels: int = 3) -> np.ndarray:
        blocks = rng.integers(0, 256, (-(-height // 4), -(-width // 4), channels), dtype=np.uint8)
        return blocks.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]

    return draw


@pytest.fixture
def folder(tmp_path: Path, noise: Noise) -> Path:
    """A folder of four pictures without fault: 1.png, 2.png, 3.png and 10.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in (1, 2, 3, 10):
        Image.fromarray(noise()).save(folder / f"{name}.png")
    return folder
