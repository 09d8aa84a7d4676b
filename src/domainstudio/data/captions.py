"""Captions of the few pictures, and the prompts made of them."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from domainstudio.errors import UserError

CaptionSource = Literal["none", "files", "folder"]
CAPTION_SUFFIXES = (".txt", ".caption")
_ALTERNATIVES = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def read_captions(folder: Path, pictures: Sequence[Path], source: CaptionSource) -> list[str | None]:
    """The caption of each picture, None where it has none.

    Args:
        source: "files" are NAME.txt or NAME.caption beside a picture, and metadata.jsonl with `file_name` and `text`;
            "folder" takes the folder's own name, without a leading repeat count (`10_a red chair`).

    Raises:
        UserError: if "files" finds no caption at all, or a caption file cannot be read.
    """
    if source == "none":
        return [None] * len(pictures)
    if source == "folder":
        name = re.sub(r"^\d+_", "", folder.resolve().name).replace("_", " ").strip()
        return [name] * len(pictures)
    listed = _read_metadata(folder / "metadata.jsonl")
    captions = [_read_beside(picture) or listed.get(picture.name) for picture in pictures]
    if not any(captions):
        raise UserError(
            f"{folder}: captions are expected in files, but not one of {len(pictures)} pictures has one; write "
            'NAME.txt or NAME.caption beside each picture, or metadata.jsonl with {"file_name": "1.png", "text": "..."}'
            " a line, or leave captions out"
        )
    return captions


def fill(template: str, caption: str) -> str:
    """`template` with every {caption} replaced."""
    return template.replace("{caption}", caption)


def draw_alternatives(prompt: str, seed: int) -> str:
    """`prompt` with one of the alternatives of every {a|b|c} drawn; empty ones leave no double spaces."""
    generator = random.Random(seed)
    drawn, previous = prompt, ""
    while drawn != previous:  # innermost first, so that alternatives may hold alternatives
        previous, drawn = drawn, _ALTERNATIVES.sub(lambda match: generator.choice(match[1].split("|")), drawn)
    if drawn == prompt:
        return prompt
    return re.sub(r" +(?=[ ,.]|$)", "", drawn).strip()


def caption_table(pictures: Sequence[Path], captions: Sequence[str]) -> str:
    """A line a picture: its name, and what the student is told of it."""
    width = max(len(path.name) for path in pictures)
    return "\n".join(f"{path.name:{width}}  {text}" for path, text in zip(pictures, captions, strict=True))


def _read_beside(picture: Path) -> str | None:
    for suffix in CAPTION_SUFFIXES:
        for file in (picture.with_suffix(suffix), picture.with_name(picture.name + suffix)):
            if file.is_file():
                return _read_text(file).strip() or None
    return None


def _read_metadata(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    captions = {}
    for number, line in enumerate(_read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry["text"], str):
                raise TypeError(f"text is {entry['text']!r}")
            captions[entry["file_name"]] = entry["text"].strip()
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f'{file}, line {number}: not a JSON object with "file_name" and "text" ({error!r}); it is {line[:80]!r}'
            ) from error
    return captions


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
