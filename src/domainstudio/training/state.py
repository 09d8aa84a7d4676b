"""Checkpoints: written whole or not at all, so a kill at any moment leaves the last good one."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from domainstudio.errors import UserError


@dataclass
class TrainState:
    """Everything a step changes: `step` counts finished steps; tensors are by parameter name."""

    step: int
    student: dict[str, Tensor]
    average: list[Tensor] = field(default_factory=list)
    """Exponential moving average of the trained parameters, in their order; empty without EMA."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    """fp16 loss scale; empty otherwise."""
    taught: list[Tensor] = field(default_factory=list)
    """The trained parameters, in their order, as they were when binding began; empty before."""


_IN_ORDER = ("average", "taught")
"""Lists of parameters."""


def save_checkpoint(output_dir: Path, state: TrainState, total_limit: int | None = None) -> Path:
    """Writes `checkpoint-N` beside the others, whole or not at all.

    With `total_limit`, the oldest checkpoints beyond it are removed, after the new one is in place.
    """
    final = output_dir / f"checkpoint-{state.step}"
    with written_whole(final) as folder:
        student = {name: tensor.contiguous().cpu() for name, tensor in state.student.items()}
        save_file(student, folder / "student.safetensors")
        for name in _IN_ORDER:
            if tensors := getattr(state, name):
                numbered = {str(i): tensor.contiguous().cpu() for i, tensor in enumerate(tensors)}
                save_file(numbered, folder / f"{name}.safetensors")
        torch.save({"optimizer": state.optimizer, "scaler": state.scaler}, folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps({"step": state.step}))
    if total_limit is not None:
        for _, path in list_checkpoints(output_dir)[:-total_limit]:
            remove_whole(path)
    return final


def load_checkpoint(path: Path) -> TrainState:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        UserError: if `path` is not a whole checkpoint.
    """
    try:
        step = json.loads((path / "state.json").read_text())["step"]
        saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        lists = {}
        for name in _IN_ORDER:
            file = path / f"{name}.safetensors"
            numbered = load_file(file) if file.exists() else {}
            lists[name] = [numbered[str(i)] for i in range(len(numbered))]
        student = load_file(path / "student.safetensors")
        return TrainState(step, student, optimizer=saved["optimizer"], scaler=saved["scaler"], **lists)
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} is not a usable checkpoint ({error}); resume from another, or start anew") from error


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of every whole checkpoint, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    return sorted(found)


def remove_checkpoints_after(output_dir: Path, step: int) -> None:
    """Removes the checkpoints after `step`, and what a kill in mid-save left of any."""
    for number, path in list_checkpoints(output_dir):
        if number > step:
            remove_whole(path)
    for leftover in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(leftover)


def find_checkpoint(output_dir: Path, which: str) -> Path | None:
    """The checkpoint that `--resume-from-checkpoint` names: "latest" (None if there is none yet), or a folder.

    Raises:
        UserError: if a named checkpoint does not exist.
    """
    checkpoints = list_checkpoints(output_dir)
    if which == "latest":
        return checkpoints[-1][1] if checkpoints else None
    for path in (output_dir / which, Path(which)):
        if path.is_dir():
            return path
    names = ", ".join(path.name for _, path in checkpoints) or "none yet"
    raise UserError(f'no checkpoint {which!r}; {output_dir} holds: {names}. Give one of them, or "latest"')


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A hidden folder to write into; on leaving, it is flushed to disk and takes the name (and place) of `folder`."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in partial.rglob("*"):
        _flush(path)
    old = _hide(folder)
    partial.rename(folder)
    _flush(folder.parent)
    _remove(old)


def remove_whole(folder: Path) -> None:
    """Removes `folder`, if there is one; hidden first, so that a kill leaves no part of it under its name."""
    _remove(_hide(folder))


def _hide(folder: Path) -> Path:
    hidden = folder.with_name(f".{folder.name}.removed")
    _remove(hidden)
    if folder.exists():
        folder.rename(hidden)
    return hidden


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
