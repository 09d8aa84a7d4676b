"""The real command line, in this process."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from domainstudio.app.cli import main

FAST: dict[str, Any] = {
    "watch": False,
    **{"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 2, "train_batch_size": 3},
    **{"num_class_images": 4, "pair_batch_size": 3, "num_validation_images": 2, "num_inference_steps": 2},
}
"""Settings of a run that takes a moment."""


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int | str | None
    out: str
    err: str


def domainstudio(*argv: object) -> Result:
    """Runs a command as a shell would."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as leave:
            code = leave.code
    return Result(code, out.getvalue(), err.getvalue())


def succeeds(*argv: object) -> Result:
    """Runs a command that has to succeed."""
    result = domainstudio(*argv)
    assert result.code == 0, result.err
    return result


def flags(**settings: object) -> list[str]:
    """Settings of a recipe as flags; those that are None are left open."""
    given = []
    for name, value in settings.items():
        if value is None:
            continue
        flag = name.replace("_", "-")
        given += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return given


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics(run: Path) -> list[dict[str, float]]:
    """The records of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_run(one: Path, other: Path, within: float = 1e-5) -> None:
    """The same files with the same numbers, but for the order of float32 sums, which AdamW makes more of."""
    assert set(tree(one)) == set(tree(other))
    for file in one.rglob("*.safetensors"):
        ours, theirs = load_file(file), load_file(other / file.relative_to(one))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert (tensor - theirs[name]).abs().max() < within, (file.name, name)
    same_pictures(one, other)
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        tolerance = 1e-2 if "watch" in ours else 1e-4  # the watch sees pictures of 256 levels
        for seen in (ours, theirs):
            seen.update(seen.pop("watch", {}))
            assert seen.pop("unadapted", None) is None  # a network of noise draws what cannot be told from training
        assert ours.pop("crowded", None) == theirs.pop("crowded", None)
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-5)


def same_pictures(one: Path, other: Path) -> None:
    """Those of a folder, and of the folders in it."""
    for file in one.rglob("*.png"):
        ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in (file, other / file.relative_to(one)))
        assert np.abs(ours - theirs).max() <= 1, file
