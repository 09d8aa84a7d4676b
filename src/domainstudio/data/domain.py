"""A target domain: the few pictures as one tensor, and the way between pictures and tensors."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from domainstudio.data.bundled import bundled_domain, bundled_heldout, strip_prefix
from domainstudio.data.check import (
    NotAPicture,
    check_folder,
    decode,
    has_picture_suffix,
    is_hidden,
    list_folder,
    natural_key,
    read_picture,
)
from domainstudio.errors import UserError


@dataclass(frozen=True, eq=False)
class Domain:
    """The few pictures of a target domain.

    `images` is (N, 3, H, W) in [-1, 1]; `paths[i]` is the file that `images[i]` was read from.
    """

    name: str
    images: Tensor
    paths: tuple[Path, ...]


def to_tensor(image: Image.Image, resolution: int) -> Tensor:
    """(3, resolution, resolution) in [-1, 1] from an RGB picture: its centre square, resized once with Lanczos.

    A square picture of the right size is not resampled, so that its 8-bit values survive exactly.
    """
    assert image.mode == "RGB", image.mode
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side != resolution:
        square = square.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """RGB pictures from (N, 3, H, W) in [-1, 1], rounded to 8 bits; what lies outside the range is clamped."""
    levels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return [Image.fromarray(pixels) for pixels in levels.byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def read_pictures(source: Path, resolution: int | None = None) -> Tensor:
    """(N, 3, R, R) in [-1, 1], N >= 1, from a folder or a .zip of pictures, in natural order.

    R is `resolution`, or the short side of the first picture. Sets to be measured are not checked for duplicates
    and the like, which may be what is measured.

    Raises: UserError when `source` has no pictures or one of them cannot be read.
    """
    pictures = _zip_pictures(source) if source.is_file() else _folder_pictures(source)
    tensors = []
    for picture in pictures:
        resolution = resolution or min(picture.size)
        tensors.append(to_tensor(picture, resolution))
    if not tensors:
        raise UserError(f"{source}: holds no pictures; give a folder or a .zip with at least one")
    return torch.stack(tensors)


def load_domain(source: str | Path, resolution: int) -> Domain:
    """The checked pictures of a folder, or of "bundled:NAME", as a Domain of (N, 3, resolution, resolution).

    Raises: UserError with every error found, when anything in the folder stops training.
    """
    bundled = strip_prefix(str(source))
    folder = Path(source).expanduser() if bundled is None else bundled_domain(bundled)
    check = check_folder(folder, resolution)
    if not check.ok:
        lines = "\n".join(f"  {finding}" for finding in check.errors)
        raise UserError(f"{folder}: these pictures cannot be trained on as they are\n{lines}")
    images = torch.stack([to_tensor(read_picture(path), resolution) for path in check.images])
    return Domain(bundled or folder.resolve().name, images, check.images)


def heldout_pictures(source: str | Path, resolution: int) -> Tensor | None:
    """(N, 3, resolution, resolution) in [-1, 1]: the held-out pictures of "bundled:NAME"; None for a folder."""
    bundled = strip_prefix(str(source))
    return None if bundled is None else read_pictures(bundled_heldout(bundled), resolution)


def _folder_pictures(folder: Path) -> Iterator[Image.Image]:
    for path in list_folder(folder):
        if is_hidden(path.name) or path.is_dir():
            continue
        try:
            yield read_picture(path)
        except NotAPicture:
            if has_picture_suffix(path):
                raise


def _zip_pictures(file: Path) -> Iterator[Image.Image]:
    try:
        with zipfile.ZipFile(file) as archive:
            for member in sorted(archive.infolist(), key=lambda member: natural_key(member.filename)):
                path = Path(member.filename)
                if member.is_dir() or any(is_hidden(part) for part in path.parts):
                    continue
                with archive.open(member) as stream:
                    try:
                        yield decode(stream, file / path)[0]
                    except NotAPicture:
                        if has_picture_suffix(path):
                            raise
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as reason:  # the last two: encryption
        raise UserError(f"{file}: is not a readable .zip ({reason}); give a folder or a .zip of pictures") from reason
