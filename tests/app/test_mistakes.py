"""What a user gets wrong: exit code 2, one message on stderr that names it, nothing on stdout, nothing harmed."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import FAST, Result, domainstudio, flags, tree
from PIL import Image


def refused(*argv: object, told: str | tuple[str, ...]) -> Result:
    result = domainstudio(*argv)
    assert result.code == 2, result
    assert result.out == ""
    message = result.err.strip()
    assert message.startswith("error: ")
    assert message.count("error: ") == 1 or "cannot be trained on" in message  # which lists the errors of files
    assert "Traceback" not in message
    for part in (told,) if isinstance(told, str) else told:
        assert part in message
    return result


@pytest.fixture
def start(tmp_path, pipelines, pictures):
    """Arguments of a run that would work, with changes."""

    def arguments(**changes: object) -> list[str]:
        given = {"pretrained_model_name_or_path": pipelines("pixel_epsilon"), "instance_data_dir": pictures}
        given["random_flip"] = False  # said, so that nothing is told of it
        return ["train", *flags(**{**FAST, **given, "output_dir": tmp_path / "run", **changes})]

    return arguments


class TestTrain:
    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path):
        yield
        assert not (tmp_path / "run").exists()

    def test_missing_folder(self, start, tmp_path):
        refused(
            *start(instance_data_dir=tmp_path / "no"), told=(f"{tmp_path / 'no'}", "does not exist", "give a folder")
        )

    def test_empty_folder(self, start, tmp_path):
        (tmp_path / "empty").mkdir()
        refused(*start(instance_data_dir=tmp_path / "empty"), told=("is empty", "at least 3 pictures"))

    def test_two_pictures(self, start, tmp_path, pictures):
        (tmp_path / "two").mkdir()
        for name in ("0.png", "1.png"):
            shutil.copy(pictures / name, tmp_path / "two")
        refused(*start(instance_data_dir=tmp_path / "two"), told=("2 usable pictures", "at least 3 pictures"))

    def test_broken_picture_is_named(self, start, tmp_path, pictures):
        folder = shutil.copytree(pictures, tmp_path / "broken")
        (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:90])
        refused(*start(instance_data_dir=folder), told=("3.png", "remove it"))

    @pytest.mark.parametrize(
        ("setting", "value", "meant"),
        [
            ("instance_data_dir", "bundled:inkk", "bundled:ink"),
            ("pretrained_model_name_or_path", "bundled:avatar", "bundled:avatars"),
        ],
    )
    def test_unknown_bundled_name(self, start, setting, value, meant):
        refused(*start(**{setting: value}), told=(f"{value} is not among", f"Did you mean {meant}?"))

    def test_folder_that_is_no_pipeline(self, start, pictures):
        refused(*start(pretrained_model_name_or_path=pictures), told=(str(pictures), "model_index.json"))

    def test_path_that_is_not_there(self, start, tmp_path):
        refused(*start(pretrained_model_name_or_path=tmp_path / "no"), told=(f"{tmp_path / 'no'}", "bundled:avatars"))

    @pytest.mark.parametrize("index", [{}, {"_class_name": "NoSuchPipeline"}])
    def test_broken_pipeline(self, start, tmp_path, pipelines, index):
        folder = shutil.copytree(pipelines("pixel_epsilon"), tmp_path / "broken")
        (folder / "model_index.json").write_text(json.dumps(index))
        refused(*start(pretrained_model_name_or_path=folder), told="could not load a diffusers pipeline")

    def test_truncated_weights(self, start, tmp_path, pipelines):
        folder = shutil.copytree(pipelines("pixel_epsilon"), tmp_path / "broken")
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        refused(*start(pretrained_model_name_or_path=folder), told="could not load a diffusers pipeline")

    def test_wrong_resolution(self, start):
        refused(*start(resolution=64), told=("resolution=64", "16 px", "leave resolution out"))

    def test_weight_that_the_method_does_not_have(self, start):
        given = start(method="finetune", hf_weight=1, num_class_images=None, pair_batch_size=10)
        refused(*given, told=("finetune has no hf_weight", "remove it"))

    def test_compiling_without_a_compiler(self, start, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CXX", "nothing++")
        told = ("torch_compile needs a C++ compiler", "leave torch_compile out")
        refused(*start(), "--torch-compile", told=told)

    def test_unknown_flag(self, start):
        refused(*start(rankk=3), told=("--rankk", "--help"))

    def test_abbreviated_flag(self, start):
        refused(*start(max_train=3), told="--max-train")

    def test_bad_number(self, start):
        refused(*start(rank="three"), told=("argument --rank:", "'three'"))

    def test_number_out_of_range(self, start):
        refused(*start(max_train_steps=0, seed=-1), told=("max_train_steps = 0", "seed = -1"))

    def test_unknown_method(self, start):
        refused(*start(method="studoi"), told=("'studoi'", "'studio'", "'finetune'"))

    def test_no_pictures_given(self):
        refused("train", told="instance_data_dir: required")

    def test_output_dir_below_a_file(self, start, tmp_path):
        (tmp_path / "file").write_text("x")
        refused(*start(output_dir=tmp_path / "file" / "run"), told=f"{tmp_path / 'file' / 'run'}")


class TestOutputDir:
    def test_of_another_run(self, start, plain_run):
        before = tree(plain_run)
        refused(*start(output_dir=plain_run), told=("already holds a run", "--resume-from-checkpoint latest"))
        assert tree(plain_run) == before

    def test_with_something_else_in_it(self, start, tmp_path, pictures):
        folder = shutil.copytree(pictures, tmp_path / "mine")
        for resume in ([], ["--resume-from-checkpoint", "latest"]):
            refused(*start(output_dir=folder), *resume, told=("is not an empty folder", "new --output-dir"))
        assert tree(folder) == tree(pictures)

    def test_that_is_a_file(self, start, tmp_path):
        (tmp_path / "file").write_text("x")
        refused(*start(output_dir=tmp_path / "file"), told="is not an empty folder")


class TestResume:
    def test_with_changed_settings(self, plain_run):
        before = tree(plain_run)
        changed = flags(seed=5, train_batch_size=4)
        told = ("begun with other settings", "seed = 0, now 5", "train_batch_size = 3, now 4", "config.toml")
        refused("train", plain_run / "config.toml", *changed, "--resume-from-checkpoint", "latest", told=told)
        assert tree(plain_run) == before

    def test_from_a_checkpoint_that_is_not_there(self, plain_run):
        told = ("checkpoint-7", "checkpoint-2, checkpoint-4", '"latest"')
        refused("train", plain_run / "config.toml", "--resume-from-checkpoint", "checkpoint-7", told=told)

    def test_from_a_broken_checkpoint(self, plain_run, tmp_path):
        run = shutil.copytree(plain_run, tmp_path / "run")
        (run / "checkpoint-4" / "state.json").unlink()
        given = ("train", run / "config.toml", "--output-dir", run, "--resume-from-checkpoint", "latest")
        refused(*given, told=("checkpoint-4 is not a usable checkpoint", "resume from another"))

    def test_to_fewer_steps_than_are_done(self, plain_run):
        before = tree(plain_run)
        given = ("train", plain_run / "config.toml", "--resume-from-checkpoint", "latest", "--max-train-steps", 3)
        refused(*given, told=("checkpoint-4", "max_train_steps=3", "give 4 or more"))
        assert tree(plain_run) == before


class TestOtherCommands:
    def test_no_command(self):
        refused(told="COMMAND")

    def test_unknown_command(self):
        refused("trian", told=("'trian'", "'train'"))

    def test_sample_into_a_folder_with_pictures(self, plain_run, pictures):
        before = tree(pictures)
        refused("sample", plain_run, "--output-dir", pictures, told=("is not an empty folder", "new --output-dir"))
        assert tree(pictures) == before

    def test_sample_into_a_file(self, plain_run, tmp_path):
        (tmp_path / "file").write_text("x")
        refused("sample", plain_run, "--output-dir", tmp_path / "file", told="is not an empty folder")

    def test_sample_from_nothing(self, tmp_path):
        refused("sample", tmp_path / "no", "--output-dir", tmp_path / "out", told="is not a run folder")

    @pytest.mark.parametrize("number", ["0", "-3", "many"])
    def test_number_of_images(self, number, plain_run, pictures, tmp_path):
        told = ("argument --num-images", number)
        refused("sample", plain_run, "--output-dir", tmp_path / "out", "--num-images", number, told=told)
        refused("evaluate", plain_run, "--instance-data-dir", pictures, "--num-images", number, told=told)
        refused("compare", plain_run, "--num-images", number, told=told)
        refused("demo", "--output-dir", tmp_path / "demo", "--num-images", number, told=told)
        assert not list(tmp_path.iterdir())

    def test_unfinished_run(self, plain_run, pictures, tmp_path):
        run = shutil.copytree(plain_run, tmp_path / "run", ignore=shutil.ignore_patterns("pipeline"))
        told = ("has no result yet", "--resume-from-checkpoint latest")
        refused("compare", run, "--output", tmp_path / "report.html", told=told)
        refused("evaluate", run, "--instance-data-dir", pictures, told=told)
        refused("sample", run, "--output-dir", tmp_path / "out", told=told)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def test_evaluate_a_folder_without_pictures(self, pictures, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        refused("evaluate", tmp_path, "--instance-data-dir", pictures, told=("holds no pictures", "at least one"))
        refused("evaluate", tmp_path / "no", "--instance-data-dir", pictures, told="does not exist")

    def test_evaluate_against_nothing(self, pictures, tmp_path):
        given = ("evaluate", pictures, "--instance-data-dir")
        refused(*given, tmp_path / "no", told="does not exist")
        refused(*given, pictures, "--reference-dir", tmp_path / "no", told="does not exist")
        refused(*given, pictures, "--lpips-px", "8", told="lpips_px=8")

    def test_compare_runs_of_different_sources(self, plain_run, lora_run, tmp_path):
        told = ("do not share pretrained_model_name_or_path", "pixel_dropout", "latent_v")
        refused("compare", plain_run, lora_run, "--output", tmp_path / "report.html", told=told)
        assert not list(tmp_path.iterdir())

    def test_compare_runs_of_different_pictures(self, plain_run, tmp_path):
        other = shutil.copytree(plain_run, tmp_path / "other")
        config = other / "config.toml"
        config.write_text(config.read_text().replace("pictures", "others"))
        refused("compare", plain_run, other, told="do not share instance_data_dir")

    def test_compare_pictures(self, plain_run, pictures, tmp_path):
        refused("compare", pictures, told="give --instance-data-dir")
        refused("compare", tmp_path, "--instance-data-dir", pictures, told="holds no pictures")
        refused("compare", pictures, "--instance-data-dir", pictures, "--caption", "a dog", told="takes no prompts")
        refused("compare", plain_run, "--instance-data-dir", tmp_path, told="leave --instance-data-dir out")

    def test_check(self, tmp_path):
        refused("check", tmp_path / "no", told="does not exist")
        refused("check", "bundled:in", told="Did you mean bundled:ink?")
        refused("check", tmp_path, "--resolution", "0", told="--resolution")


@pytest.fixture
def flawed(tmp_path: Path, pictures: Path) -> Path:
    """A folder with a truncated and a repeated picture, and a strip."""
    folder = shutil.copytree(pictures, tmp_path / "flawed")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:90])
    shutil.copy(folder / "1.png", folder / "again.png")
    Image.new("RGB", (90, 30), "red").save(folder / "strip.png")
    return folder


def test_check_names_files_and_remedies_and_changes_nothing(flawed):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in flawed.iterdir()}
    result = domainstudio("check", flawed)
    assert (result.code, result.err) == (1, "")
    *findings, summary = result.out.splitlines()
    for name, remedy in (
        ("3.png", "remove it"),
        ("again.png", "remove one of the two"),
        ("strip.png", "crop it yourself"),
    ):
        assert any(name in line and remedy in line for line in findings)
    assert "2 errors" in summary
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in flawed.iterdir()} == before


@pytest.mark.parametrize("folder", ["bundled:ink", None])
def test_check_of_good_pictures(folder, pictures):
    result = domainstudio("check", folder or pictures)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1].startswith("10 pictures usable, 0 errors")
