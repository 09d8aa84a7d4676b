import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import FAST, domainstudio, succeeds

import domainstudio as package
from domainstudio.app.recipe import build_recipe

# Frozen: scripts depend on these names.
RECIPE_FLAGS = [
    "--pretrained-model-name-or-path",
    "--single-file-config",
    "--instance-data-dir",
    "--output-dir",
    "--instance-prompt",
    "--class-prompt",
    "--prior-prompt",
    "--captions",
    "--subject-data-dir",
    "--subject-prompt",
    "--subject-class-prompt",
    "--train-text-encoder",
    "--method",
    "--adapter",
    "--rank",
    "--lora-alpha",
    "--lora-layers",
    "--max-train-steps",
    "--train-batch-size",
    "--gradient-accumulation-steps",
    "--gradient-checkpointing",
    "--fsdp",
    "--torch-compile",
    "--optimizer",
    "--learning-rate",
    "--lr-warmup-steps",
    "--max-grad-norm",
    "--weight-decay",
    "--use-ema",
    "--ema-decay",
    "--random-flip",
    "--pairing",
    "--centre-pairs",
    "--high-noise-weight",
    "--high-noise-focus",
    "--high-noise-mean-weight",
    "--snr-gamma",
    "--noise-offset",
    "--erase-steps",
    "--binding-steps",
    "--with-prior-preservation",
    "--prior-loss-weight",
    "--image-weight",
    "--hf-weight",
    "--hfmse-weight",
    "--feature-weight",
    "--transfer-weight",
    "--space",
    "--similarity-weight",
    "--adversarial-steps",
    "--num-class-images",
    "--nearest-class-images",
    "--pair-batch-size",
    "--resolution",
    "--seed",
    "--mixed-precision",
    "--checkpointing-steps",
    "--checkpoints-total-limit",
    "--validation-steps",
    "--num-validation-images",
    "--watch",
    "--stop-when-overfitting",
    "--validation-prompt",
    "--negative-prompt",
    "--guidance-scale",
    "--num-inference-steps",
]
OTHER_FLAGS = {
    "demo": {"--text", "--domain", "--output-dir", "--max-train-steps", "--num-images"},
    "check": {"--resolution"},
    "sample": {"--num-images", "--seed", "--output-dir", "--prompt", "--negative-prompt", "--guidance-scale"}
    | {"--style-strength", "--source-prompt"},
    "export": {"--format", "--output", "--metadata", "--no-metadata"},
    "evaluate": {"--instance-data-dir", "--reference-dir", "--num-images", "--seed", "--lpips", "--lpips-px"}
    | {"--source-dir", "--intra", "--json", "--clip", "--dino"},
    "compare": {
        "--instance-data-dir",
        "--caption",
        "--output",
        "--reference-dir",
        "--source-dir",
        "--num-images",
        "--seed",
        "--lpips",
        "--lpips-px",
        "--intra",
        "--clip",
        "--dino",
    },
}
COMMANDS = ["train", "doctor", *OTHER_FLAGS]


def offered(command: str) -> set[str]:
    """The flags that --help shows, in both spellings."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", domainstudio(command, "--help").out)) - {"--help"}


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_the_flags_of_recipes_are_frozen(command):
    switches = {"fsdp", "use-ema", "random-flip", "centre-pairs", "train-text-encoder"}
    switches |= {"gradient-checkpointing", "torch-compile", "with-prior-preservation", "watch", "stop-when-overfitting"}
    negations = {f"--no-{name}" for switch in switches for name in (switch, switch.replace("-", "_"))}
    own = [*RECIPE_FLAGS, "--resume-from-checkpoint"] if command == "train" else [*RECIPE_FLAGS, "--json"]
    assert offered(command) == {*own, *("--" + flag[2:].replace("-", "_") for flag in own), *negations}


@pytest.mark.parametrize("command", OTHER_FLAGS)
def test_the_flags_of_the_other_commands_are_frozen(command):
    assert {flag.replace("_", "-") for flag in offered(command)} == OTHER_FLAGS[command]


@pytest.mark.parametrize("argv", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_is_given_on_stdout(argv):
    result = domainstudio(*argv)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("usage: domainstudio")
    assert "%(" not in result.out


def test_help_names_every_command():
    shown = domainstudio("--help").out
    assert all(re.search(rf"^ +{command} ", shown, re.MULTILINE) for command in COMMANDS)


def test_version():
    result = domainstudio("--version")
    assert (result.code, result.out, result.err) == (0, package.__version__ + "\n", "")


def test_underscores_are_understood(tmp_path, pipelines, pictures):
    settings = {**FAST, "pretrained_model_name_or_path": pipelines("pixel_epsilon"), "instance_data_dir": pictures}
    settings |= {"output_dir": tmp_path / "run", "max_train_steps": 1, "method": "finetune", "seed": 3}
    given = [f"--{name}={value}" for name, value in settings.items() if not isinstance(value, bool)]
    succeeds("train", *given, "--no-use_ema", "--resume_from_checkpoint=latest")
    kept = build_recipe(tmp_path / "run" / "config.toml", {})
    assert (kept.seed, kept.use_ema, kept.max_train_steps) == (3, False, 1)


def test_the_console_script_shows_no_traceback(tmp_path):
    script = Path(sys.executable).with_name("domainstudio")
    done = subprocess.run([script, "check", tmp_path / "no"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'no'}: does not exist; give a folder of pictures\n"


def test_control_c_says_how_to_continue(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("domainstudio.data.check.check_folder", interrupt)
    result = domainstudio("check", tmp_path)
    assert (result.code, result.out) == (130, "")
    assert "--resume-from-checkpoint latest" in result.err
