"""kill -9 in mid-step and in mid-save: what is left is whole, and the run goes on as if it had not been stopped."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from command_line import metrics, succeeds, tree
from killed_runs import run_killed
from safetensors.torch import load_file

from domainstudio.training.state import list_checkpoints, load_checkpoint

MOMENTS = {
    "in mid-step": {"in_step": 4},
    "at half a weight file": {"in_save_of": 4, "at_write": 1},
    "at half an optimiser file": {"in_save_of": 4, "at_write": 3},
    "before a checkpoint has its name": {"in_save_of": 4, "at_write": 9},
}
CASES = [(run, moment) for run in ("full_run", "lora_run") for moment in MOMENTS]


def assert_whole(run: Path, reference: Path) -> None:
    """Everything under a final name is what the uninterrupted run has there."""
    whole = tree(reference)
    for _, checkpoint in list_checkpoints(run):
        assert {path.name for path in checkpoint.iterdir()} == {
            path.name for path in (reference / "checkpoint-4").iterdir()
        }
        load_checkpoint(checkpoint)
    for name, content in tree(run).items():
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if not hidden and name in whole and not name.endswith(("optimizer.pt", "config.toml", "metrics.jsonl")):
            assert content == whole[name], name
    assert not (run / "pipeline").exists()


def assert_equal(value, expected) -> None:
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_equal(value[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected)
    elif isinstance(expected, list):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_equal(one, other)
    else:
        assert value == expected


@pytest.mark.parametrize(("name", "moment"), CASES)
def test_a_killed_run_ends_bit_equal(name, moment, request, tmp_path):
    reference, run = request.getfixturevalue(name), tmp_path / "run"
    argv = ["train", str(reference / "config.toml"), "--output-dir", str(run)]
    assert run_killed(argv, **MOMENTS[moment]) == -signal.SIGKILL
    assert_whole(run, reference)

    result = succeeds(*argv, "--resume-from-checkpoint", "latest")
    assert "continuing from" in result.err
    assert metrics(run) == metrics(reference)
    for file in ("pipeline/unet/diffusion_pytorch_model.safetensors", *(["lora.safetensors"] * (name == "lora_run"))):
        assert_equal(load_file(run / file), load_file(reference / file))
    for step, checkpoint in list_checkpoints(reference):
        assert_equal(vars(load_checkpoint(run / f"checkpoint-{step}")), vars(load_checkpoint(checkpoint)))
    finished, whole = tree(run), tree(reference)
    assert finished.keys() == whole.keys()
    assert all(finished[file] == whole[file] for file in whole if file.startswith("samples/"))


def test_nothing_remains_of_a_removal_that_was_killed(lora_run, tmp_path):
    run = tmp_path / "run"
    argv = ["train", str(lora_run / "config.toml"), "--output-dir", str(run)]
    at_write = next(n for n in range(11, 16) if run_killed(argv, in_save_of=4, at_write=n) and _is_removing(run))
    assert at_write
    succeeds(*argv, "--resume-from-checkpoint", "latest")
    assert tree(run).keys() == tree(lora_run).keys()


@pytest.mark.parametrize("at_write", [1, 2])
def test_a_run_killed_at_its_very_first_write_can_be_started_again(at_write, plain_run, tmp_path):
    """While config.toml is written, and before it has its name."""
    run = tmp_path / "run"
    argv = ["train", str(plain_run / "config.toml"), "--output-dir", str(run)]
    assert run_killed(argv, at_write=at_write) == -signal.SIGKILL
    assert [path.name for path in run.iterdir()] == ["config.partial"]
    succeeds(*argv, "--resume-from-checkpoint", "latest")
    assert metrics(run) == metrics(plain_run)
    assert not (run / "config.partial").exists()


def test_a_finished_run_can_be_continued_to_more_steps(plain_run, tmp_path):
    run = tmp_path / "run"
    argv = ["train", plain_run / "config.toml", "--output-dir", run, "--checkpointing-steps", "1", "--no-use-ema"]
    succeeds(*argv, "--max-train-steps", "2")
    shorter = metrics(run)
    succeeds(*argv, "--max-train-steps", "4", "--resume-from-checkpoint", "latest")
    assert metrics(run)[:2] == shorter
    straight = tmp_path / "straight"
    succeeds(*argv[:3], straight, *argv[4:], "--max-train-steps", "4")
    assert metrics(run) == metrics(straight)
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert_equal(load_file(run / weights), load_file(straight / weights))


def test_resuming_from_an_earlier_checkpoint_drops_what_follows(plain_run, tmp_path):
    run = tmp_path / "run"
    argv = ["train", plain_run / "config.toml", "--output-dir", run]
    succeeds(*argv)
    result = succeeds(*argv, "--resume-from-checkpoint", "checkpoint-2")
    assert f"continuing from {run / 'checkpoint-2'}" in result.err
    finished, whole = tree(run), tree(plain_run)
    assert finished.keys() == whole.keys()
    assert metrics(run) == metrics(plain_run)


def _is_removing(run: Path) -> bool:
    """Whether a removal has begun; else the run is cleared for the next attempt."""
    if any(run.glob(".checkpoint-*.removed")):
        return True
    shutil.rmtree(run)
    return False
