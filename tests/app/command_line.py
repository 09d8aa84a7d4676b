"""The real command line, in this process."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Settings of a recipe as flags."""
    given = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        given += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return given


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics(run: Path) -> list[dict[str, float]]:
    """The records of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
