"""Look at every file of a folder of pictures before training, and say what is wrong and what to do about it.

With about ten pictures every one counts: a picture that cannot be used stops training, it is never dropped silently.
Files are only ever read.
"""

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from domainstudio.data.repeats import Fingerprint, Likeness, find_repeats, fingerprint
from domainstudio.errors import UserError

MIN_PICTURES = 3
MIN_SIDE_PX = 32
MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000")
# Pillow takes many raw files for a TIFF and reads the thumbnail inside.
RAW_SUFFIXES = {".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".pef", ".rw2", ".raf"}
PICTURE_SUFFIXES = RAW_SUFFIXES.union(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".jp2"),
    (".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif", ".jxl", ".tga", ".ico", ".psd", ".svg", ".exr", ".hdr"),
)
SIDECAR_SUFFIXES = {".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".toml", ".xmp"}
HIDDEN_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"}

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know about one file; an error stops training, a warning may hurt it, a note is for information."""

    path: Path
    severity: Severity
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.path.name or self.path}: {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class FolderCheck:
    """What a folder holds: the usable pictures in natural order, and what was found on the way."""

    folder: Path
    images: tuple[Path, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that stop training."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether the folder can be trained on."""
        return not self.errors

    def render(self) -> str:
        """Plain text for a terminal: a line for each finding, errors first, and a summary."""
        order: tuple[Severity, ...] = ("error", "warning", "note")
        lines = [str(finding) for severity in order for finding in self.findings if finding.severity == severity]
        warned = sum(finding.severity == "warning" for finding in self.findings)
        counts = (_count(len(self.errors), "error"), _count(warned, "warning"))
        return "\n".join([*lines, f"{_count(len(self.images), 'picture')} usable, {', '.join(counts)}"])


class BadPicture(UserError):
    """A picture that cannot be used."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")
        self.finding = Finding(path, "error", problem, remedy)


class NotAPicture(BadPicture):
    """A file that no picture format recognises as its own."""


def check_folder(folder: Path, resolution: int | None = None) -> FolderCheck:
    """Check every file of `folder`, for training at `resolution` pixels when given. Sub-folders are not entered.

    Raises: UserError when `folder` is missing, not a folder or not readable.
    """
    entries = list_folder(folder)
    findings: list[Finding] = []
    prints: dict[Path, Fingerprint] = {}
    for path in entries:
        if aside := _set_aside(path):
            findings.append(aside)
            continue
        try:
            picture, remarks = _open_and_decode(path)
        except BadPicture as bad:
            findings.append(_judge(bad))
            continue
        findings += [*remarks, *_judge_size(path, picture.size, resolution)]
        prints[path] = fingerprint(picture)
    findings += [_judge_repeat(*repeat) for repeat in find_repeats(prints)]
    rejected = {finding.path for finding in findings if finding.severity == "error"}
    images = tuple(path for path in prints if path not in rejected)
    if len(images) < MIN_PICTURES:
        problem = f"has {_count(len(images), 'usable picture')}, but each is compared with at least two others"
        remedy = f"give at least {MIN_PICTURES} pictures, better about ten"
        findings.append(Finding(folder, "error", problem if entries else "is empty", remedy))
    return FolderCheck(folder, images, tuple(findings))


def read_picture(path: Path) -> Image.Image:
    """The picture as 8-bit RGB, upright, composited on white.

    Raises: UserError naming the file and a remedy when it cannot be read.
    """
    return _open_and_decode(path)[0]


def decode(stream: IO[bytes], path: Path) -> tuple[Image.Image, list[Finding]]:
    """The picture in `stream` as 8-bit RGB, upright, on white, and what was done to it; `path` only names it.

    Raises: NotAPicture when no format fits, BadPicture when the picture cannot be used.
    """
    again = "save or download it again, or remove it"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image = _open_header(stream, path)
            findings = list(_describe(image, path))
            picture, transparent = _to_rgb(ImageOps.exif_transpose(image))
        except UserError:
            raise
        except UnidentifiedImageError as reason:
            raise NotAPicture(path, "is not a picture that can be read, or its beginning is damaged", again) from reason
        except Image.DecompressionBombError as reason:
            raise _too_large(path) from reason
        except Exception as reason:  # decoders raise almost anything when a file is damaged
            problem = "is truncated: its end is missing" if "truncat" in str(reason).lower() else "is damaged"
            raise BadPicture(path, f"{problem} ({reason})", again) from reason
    if transparent:
        findings.append(Finding(path, "warning", "has transparent parts", "they will be white; fill them to choose"))
    # Damage that Pillow read past; a dict to tell each once, in order.
    complaints = dict.fromkeys(str(one.message).strip() for one in caught if issubclass(one.category, UserWarning))
    findings += [Finding(path, "warning", f"was read with a complaint ({text})", "look at it") for text in complaints]
    return picture, findings


def list_folder(folder: Path) -> list[Path]:
    """Everything in `folder` in natural order: 2.png before 10.png.

    Raises: UserError when `folder` is missing, not a folder or not readable.
    """
    if not folder.exists():
        raise UserError(f"{folder}: does not exist; give a folder of pictures")
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; give the folder that holds the pictures")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder}: may not be read; give yourself permission to read the folder")
    return sorted(folder.iterdir(), key=lambda path: natural_key(path.name))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares digits as numbers and ignores case."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def is_hidden(name: str) -> bool:
    """Whether a file name belongs to the operating system rather than to the user."""
    return name.startswith(".") or name.lower() in HIDDEN_NAMES


def has_picture_suffix(path: Path) -> bool:
    """Whether the name promises a picture, of a format that can be read or not."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _set_aside(path: Path) -> Finding | None:
    """What there is to say of an entry that is not opened."""
    if is_hidden(path.name):
        return Finding(path, "note", "is a hidden or system file", "it is ignored; nothing to do")
    if path.is_symlink() and not path.exists():
        return Finding(path, "error", "is a link to a file that does not exist", "restore that file or remove the link")
    if path.is_dir():
        return Finding(path, "warning", "is a sub-folder; pictures in it are not used", "move them up to use them")
    if not path.is_file():
        return Finding(path, "warning", "is not an ordinary file; it is not used", "remove it")
    return None


def _judge(bad: BadPicture) -> Finding:
    """The finding for a file that could not be read: an error, unless it never was meant as a picture."""
    path = bad.finding.path
    if not isinstance(bad, NotAPicture) or has_picture_suffix(path):
        return bad.finding
    if path.suffix.lower() in SIDECAR_SUFFIXES:
        advice = 'captions = "files" reads NAME.txt, NAME.caption and metadata.jsonl; else nothing to do'
        return Finding(path, "note", "is text beside the pictures", advice)
    return Finding(path, "warning", "is not a picture; it is not used", "remove it, or save it as PNG if it is one")


def _judge_size(path: Path, size: tuple[int, int], resolution: int | None) -> Iterator[Finding]:
    width, height = size
    short, long = min(size), max(size)
    if short < (resolution or MIN_SIDE_PX):
        wanted = resolution or MIN_SIDE_PX
        problem = f"is small ({width} x {height} px, short side below {wanted})"
        yield Finding(path, "warning", problem, "it will be enlarged and look soft; give a larger one")
    lost = 1 - short / long
    if lost >= 0.01:
        severity: Severity = "warning" if 3 * short < 2 * long else "note"  # more than a third, without rounding
        problem = f"is not square ({width} x {height} px): cropping to its centre loses {lost:.0%}"
        yield Finding(path, severity, problem, "crop it yourself to choose what stays")


def _judge_repeat(path: Path, earlier: Path, likeness: Likeness) -> Finding:
    if likeness == "exact":
        return Finding(path, "error", f"has exactly the same pixels as {earlier.name}", "remove one of the two")
    alike = "the mirror image of" if likeness == "mirrored" else "the same picture as"
    return Finding(path, "warning", f"is nearly {alike} {earlier.name}", "remove one of the two if they are the same")


def _open_and_decode(path: Path) -> tuple[Image.Image, list[Finding]]:
    try:
        stream = path.open("rb")
    except OSError as reason:
        problem = f"cannot be opened ({reason.strerror or reason})"
        raise BadPicture(path, problem, "give yourself permission to read it, or remove it") from reason
    with stream:
        return decode(stream, path)


def _open_header(stream: IO[bytes], path: Path) -> Image.Image:
    """The picture, not yet decoded, after what would make decoding it wrong or dangerous has been refused."""
    export = "export it as PNG or JPEG"
    if path.suffix.lower() in RAW_SUFFIXES:
        raise BadPicture(path, "is a camera's raw file, which cannot be developed here", export)
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF and others depend on how Pillow was built
    probe = Image.open(stream, formats=formats)
    if probe.width * probe.height > MAX_PIXELS:
        raise _too_large(path)
    probe.verify()  # checksums that decoding skips; afterwards the picture must be opened anew
    stream.seek(0)
    image = Image.open(stream, formats=formats)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # phones write MPO: a JPEG with a preview behind it
        raise BadPicture(path, f"holds {frames} frames or pages", "save the one that you mean as a PNG of its own")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise BadPicture(path, "has 32-bit values, for which no white is agreed", "save it with 8 or 16 bits")
    return image


def _too_large(path: Path) -> BadPicture:
    return BadPicture(path, f"has more than {MAX_PIXELS // 10**6} million pixels", "save it smaller")


def _describe(image: Image.Image, path: Path) -> Iterator[Finding]:
    """Notes that the header alone gives; asked before decoding, after which Pillow has forgotten some of them."""
    known = Image.registered_extensions().get(path.suffix.lower())
    if known != image.format and image.format != "MPO":
        yield Finding(path, "note", f"is a {image.format} picture by its content", "the name is ignored; nothing to do")
    if image.mode.startswith("I") or (image.format in ("PNG", "TIFF") and ";16" in str(getattr(image, "tile", ""))):
        yield Finding(path, "note", "has 16 bits a channel", "it will be scaled to 8 bits; nothing to do")
    if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
        yield Finding(path, "note", "is greyscale", "it will be used as RGB; nothing to do")
    if image.mode == "CMYK":
        yield Finding(
            path, "note", "has print colours (CMYK)", "it will be turned into RGB; colours may shift a little"
        )
    if image.getexif().get(0x0112, 1) in range(2, 9):
        yield Finding(
            path, "note", "is rotated or mirrored by its EXIF data", "it will be turned upright; nothing to do"
        )


def _to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """8-bit RGB on white, and whether any of it was transparent."""
    if image.mode.startswith("I"):  # convert("RGB") would clip 16 bits at 255 instead of scaling them
        levels = np.asarray(image)
        clear = image.info.get("transparency")
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"), True
    return image.convert("RGB"), False
