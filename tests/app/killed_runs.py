"""Runs that are killed at a chosen moment, each in a process of its own, which kills itself."""

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import domainstudio.training.state as state
from domainstudio.app import cli, materials
from domainstudio.training import observers
from domainstudio.training.optimisation import Training

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["domainstudio.app.cli", "domainstudio.app.runs", "domainstudio.app.console"])


def run_killed(argv: list[str], in_step: int = 0, in_save_of: int = 0, at_write: int = 0) -> int:
    """The exit code of the command line, killed in the middle of a step, or at the n-th write to disk.

    Writes are counted from the start of the checkpoint of step `in_save_of`, or from the very beginning.
    """
    child = FORKS.Process(target=_run, args=(argv, in_step, in_save_of, at_write))
    child.start()
    child.join(60)
    assert child.exitcode is not None, "hangs"
    return child.exitcode


def _run(argv: list[str], in_step: int, in_save_of: int, at_write: int) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if in_step:
        _die_in_step(in_step)
    if at_write:
        _die_at_write(in_save_of, at_write)
    sys.exit(cli.main(argv))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_step(step: int) -> None:
    """Kills the process when the gradients of `step` are there and half of the weights have moved."""
    update = Training.update

    def half_update(self: Training) -> float:
        if self.step + 1 == step:
            for parameter in self.parameters[::2]:
                parameter.data.add_(1)
            _die()
        return update(self)

    Training.update = half_update


def _die_at_write(in_save_of: int, at_write: int) -> None:
    """Kills the process at a write, flush, rename or removal; of a file that is being written, half is there."""
    writes, counting = 0, not in_save_of

    def counted(function: Callable, path_at: int | None = None) -> Callable:
        def call(*args, **settings):
            nonlocal writes
            writes += counting
            if counting and writes == at_write:
                if path_at is not None:
                    function(*args, **settings)
                    path = Path(args[path_at])
                    os.truncate(path, path.stat().st_size // 2)
                _die()
            return function(*args, **settings)

        return call

    def save(output_dir: Path, train_state: state.TrainState, total_limit: int | None = None) -> Path:
        nonlocal counting
        counting = counting or train_state.step == in_save_of
        return state_save(output_dir, train_state, total_limit)

    state_save, observers.save_checkpoint = observers.save_checkpoint, save
    state.save_file = materials.save_file = counted(state.save_file, 1)
    torch.save = counted(torch.save, 1)
    Path.write_text = counted(Path.write_text, 0)
    os.fsync, os.rename, os.replace = counted(os.fsync), counted(os.rename), counted(os.replace)
    shutil.rmtree = counted(shutil.rmtree)
