"""What a graphics card would refuse, without one: the command line on a second device (elsewhere.py), and on the CPU.

There, nothing may meet that lies on two devices, and randomness has to come from the CPU; the results are those of the
CPU, but for the order of float32 sums.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import FAST, flags, same_pictures, same_run, succeeds
from text_settings import FAST_TEXT
from torch.utils import backend_registration

from domainstudio.evaluation.cache import CACHE_VARIABLE
from domainstudio.training import ant

pytest_plugins = ("text_kit",)
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs torch 2.10"
)

SCRIPT = Path(__file__).parents[1] / "elsewhere.py"
GENTLE = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-4}
WITHIN = 5e-5
"""Of weights, which move by 2e-4 and more."""
RUNS = {
    "all_weights": ("latent_v", {"watch": True, "random_flip": True}),
    "lora": ("latent_flow", {"adapter": "lora", "rank": 2, "space": "crop", "feature_weight": 0.1}),
    "learned_variance": ("pixel_learned", {"method": "domainstudio"}),
    "ant": ("latent_v", {"method": "ant"}),
    "word": ("sd2_v", {"instance_prompt": "a portrait, <xyz>", "train_text_encoder": True}),
    "decoded": (
        "sd2_v",
        {"method": "domainstudio", "adapter": "full", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ),
}


def do_elsewhere(*commands: list[str]) -> str:
    """What they print."""
    given = {"PYTHONPATH": os.pathsep.join(sys.path), "HF_DEACTIVATE_ASYNC_LOAD": "1"}  # a thread has no modes of torch
    script = [sys.executable, str(SCRIPT), json.dumps(commands)]
    result = subprocess.run(script, env={**os.environ, **given}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def do_here(*commands: list[str]) -> str:
    return "".join(succeeds(*command).out for command in commands)


PLACES = {"here": do_here, "there": do_elsewhere}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pipelines, text_pipelines, pictures) -> Path:
    """The same runs in two folders, `here` and `there`."""
    root = tmp_path_factory.mktemp("runs")

    def command(place: str, name: str) -> list[str]:
        kind, own = RUNS[name]
        pipeline, common = (text_pipelines(kind), FAST_TEXT) if kind.startswith("sd") else (pipelines(kind), FAST)
        given = {"pretrained_model_name_or_path": pipeline, "instance_data_dir": pictures}
        return ["train", *flags(**given, output_dir=root / place / name, **{**common, **GENTLE, **own})]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ant, "NUM_NOISINGS", 50)  # as the script does
        patch.setattr(ant, "FIT_STEPS", 50)
        for place, do in PLACES.items():
            patch.setenv(CACHE_VARIABLE, str(root / f"cache_of_{place}"))
            do(*(command(place, name) for name in RUNS))
    return root


@pytest.mark.parametrize("name", RUNS)
def test_a_run(runs, name):
    same_run(runs / "here" / name, runs / "there" / name, WITHIN)


def test_a_run_is_continued(runs, tmp_path):
    """From a checkpoint that the CPU wrote."""
    run = shutil.copytree(runs / "here/word", tmp_path / "run")
    do_elsewhere(["train", str(run / "config.toml"), *flags(output_dir=run, resume_from_checkpoint="checkpoint-1")])
    same_run(run, runs / "there/word", WITHIN)


def test_a_run_is_drawn(runs, tmp_path):
    for place, do in PLACES.items():
        told = flags(prompt="a portrait, <xyz>", num_images=3, output_dir=tmp_path / place)
        do(["sample", str(runs / "here/word"), *told])
    same_pictures(tmp_path / "here", tmp_path / "there")


def test_a_run_is_measured(runs, pictures, heldout, tmp_path, monkeypatch):
    run, said = str(runs / "here/all_weights"), {}
    for place, do in PLACES.items():
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / place))
        told = flags(instance_data_dir=pictures, reference_dir=heldout, num_images=6)
        said[place] = json.loads(do(["evaluate", run, *told, "--json"]))
    for name, ours in said["here"].items():
        close = pytest.approx(ours, rel=1e-3, abs=1e-4) if isinstance(ours, (float, list)) else ours
        assert said["there"][name] == close, name
