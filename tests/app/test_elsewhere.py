"""What a graphics card would refuse, without one: the command line on a second device (elsewhere.py), and on the CPU.

There, nothing may meet that lies on two devices, randomness has to come from the CPU, and there is no float64; the
results are those of the CPU, but for the order of float32 sums.
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
    """What they print; all in one process."""
    given = {"PYTHONPATH": os.pathsep.join(sys.path), "HF_DEACTIVATE_ASYNC_LOAD": "1"}  # a thread has no modes of torch
    script = [sys.executable, str(SCRIPT), json.dumps(commands)]
    result = subprocess.run(script, env={**os.environ, **given}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def do_here(*commands: list[str]) -> str:
    return "".join(succeeds(*command).out for command in commands)


@pytest.fixture(scope="module")
def places(tmp_path_factory, pipelines, text_pipelines, pictures, heldout) -> Path:
    """Two folders of the same runs, of pictures drawn of one, and of what is measured of one: `here` and `there`; and a
    run that was begun here and continued there."""
    root = tmp_path_factory.mktemp("places")

    def training(place: str, name: str) -> list[str]:
        kind, own = RUNS[name]
        pipeline, common = (text_pipelines(kind), FAST_TEXT) if kind.startswith("sd") else (pipelines(kind), FAST)
        given = {"pretrained_model_name_or_path": pipeline, "instance_data_dir": pictures}
        return ["train", *flags(**given, output_dir=root / place / name, **{**common, **GENTLE, **own})]

    drawing = flags(prompt="a portrait, <xyz>", num_images=3)
    measuring = flags(instance_data_dir=pictures, reference_dir=heldout, num_images=6)
    with pytest.MonkeyPatch.context() as patch:
        for place, do in (("here", do_here), ("there", do_elsewhere)):
            patch.setenv(CACHE_VARIABLE, str(root / f"cache_of_{place}"))
            commands = [training(place, name) for name in RUNS]
            if place == "there":
                begun = shutil.copytree(root / "here/word", root / "continued")
                own = flags(output_dir=begun, resume_from_checkpoint="checkpoint-1")
                commands.append(["train", str(begun / "config.toml"), *own])
            commands.append(["sample", str(root / "here/word"), *drawing, *flags(output_dir=root / place / "drawn")])
            commands.append(["evaluate", str(root / "here/all_weights"), *measuring, "--json"])
            (root / place / "measured.json").write_text(do(*commands).splitlines()[-1])
    return root


@pytest.mark.parametrize("name", RUNS)
def test_a_run(places, name):
    same_run(places / "here" / name, places / "there" / name, WITHIN)


def test_a_run_is_continued(places):
    same_run(places / "continued", places / "there/word", WITHIN)


def test_a_run_is_drawn(places):
    same_pictures(places / "here/drawn", places / "there/drawn")


def test_a_run_is_measured(places):
    here, there = (json.loads((places / place / "measured.json").read_text()) for place in ("here", "there"))
    for name, ours in here.items():
        close = pytest.approx(ours, rel=1e-3, abs=1e-4) if isinstance(ours, (float, list)) else ours
        assert there[name] == close, name
