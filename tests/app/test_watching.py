"""A watched run: what is logged, what best/ holds, and that neither a stop nor a resumption loses it."""

import json
import shutil

import pytest
import torch
from command_line import FAST, domainstudio, flags, metrics, succeeds, tree
from diffusers import DDPMPipeline

from domainstudio.app import watching
from domainstudio.app.folder import RunFolder
from domainstudio.app.watching import read_readings
from domainstudio.data.domain import load_domain
from domainstudio.errors import MissingWeights
from domainstudio.evaluation import features, watch
from domainstudio.models.load import load_model
from domainstudio.models.lora_files import LORA_FILE
from domainstudio.models.sample import through_codec
from domainstudio.training.state import load_checkpoint

pytest_plugins = ("text_kit", "text_run_kit")
pytestmark = pytest.mark.usefixtures("stubs")
WATCHED = {"watch": True, "num_validation_images": 4, "checkpoints_total_limit": 9, "validation_steps": 1}


@pytest.fixture
def run(train) -> RunFolder:
    return RunFolder(train("watched", "pixel_dropout", checkpointing_steps=1, learning_rate=0.01, **WATCHED))


def test_every_sheet_is_read_and_logged(run):
    readings = read_readings(run)
    assert [reading.step for reading in readings] == [0, 1, 2, 3, 4]
    assert readings[0].drift == pytest.approx(0, abs=1e-6)
    assert 0 < readings[0].style_distance <= 1 + 1e-5
    assert readings[-1].drift > 0.001
    assert [record["step"] for record in metrics(run.path) if "loss" in record] == [1, 2, 3, 4]


def test_best_holds_the_result_of_the_chosen_step(run):
    chosen = watch.choose(read_readings(run))
    assert run.best.chosen_step() == chosen.step
    assert json.loads(run.best.choice.read_text()) == chosen.to_json()
    average = load_checkpoint(run.path / f"checkpoint-{chosen.step}").average
    kept = DDPMPipeline.from_pretrained(run.best.pipeline).unet
    assert all(torch.equal(a, b) for a, b in zip(average, kept.parameters(), strict=True))


def test_best_is_a_run_folder(run, tmp_path):
    succeeds("sample", run.best.path, "--num-images", 2, "--output-dir", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 2
    succeeds("compare", run.path, run.best.path, "--num-images", 4, "--output", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"step {run.best.chosen_step()} of 4, chosen by the watch" in page
    assert watch.tell(read_readings(run)).replace("%", "") in page.replace("%", "")
    assert page.count("closeness (1 is right)") >= 1


def test_the_end_says_what_happened(tmp_path, pipelines, pictures):
    given = {"pretrained_model_name_or_path": pipelines("pixel_dropout"), "instance_data_dir": pictures}
    result = succeeds("train", *flags(**given, **{**FAST, **WATCHED}, output_dir=tmp_path / "run"))
    assert watch.tell(read_readings(RunFolder(tmp_path / "run"))) in result.err
    best = RunFolder(tmp_path / "run").best
    assert f"best:   {best.path} (step {best.chosen_step()})" in result.out


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_is_read_as_if_it_had_not_been_stopped(run, tmp_path, step):
    part = tmp_path / "run"
    shutil.copytree(run.path, part)
    checkpoint = part / f"checkpoint-{step}"
    succeeds("train", part / "config.toml", "--output-dir", part, "--resume-from-checkpoint", checkpoint)
    left, right = (
        {name: data for name, data in tree(folder).items() if "optimizer" not in name and name != "config.toml"}
        for folder in (run.path, part)
    )
    left.pop("best/config.toml"), right.pop("best/config.toml")
    assert left == right


def test_a_better_checkpoint_of_another_future_is_dropped(run, tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "choose", lambda readings: readings[-1])  # the last is always the best
    part = tmp_path / "run"
    shutil.copytree(run.path, part)
    shutil.rmtree(part / "best")
    succeeds("train", part / "config.toml", "--output-dir", part, "--resume-from-checkpoint", part / "checkpoint-3")
    assert RunFolder(part).best.chosen_step() == 4
    seen = []
    monkeypatch.setattr(watching, "choose", lambda readings: seen.append(RunFolder(part).best.path.exists()))
    succeeds("train", part / "config.toml", "--output-dir", part, "--resume-from-checkpoint", part / "checkpoint-2")
    assert seen == [False, False]


def test_training_pictures_are_seen_through_the_models_codec(train, monkeypatch, pipelines, pictures):
    seen = []

    class Spy(watch.Watch):
        def __init__(self, training, source):
            seen.append(training)
            super().__init__(training, source)

    monkeypatch.setattr(watching, "Watch", Spy)
    train("latent", "latent_v", **WATCHED)
    model = load_model(pipelines("latent_v"))
    images = load_domain(pictures, model.resolution).images
    torch.testing.assert_close(seen[0], through_codec(model, images))
    assert (seen[0] - images).abs().mean() > 0.01


def test_an_overfitting_run_ends_if_it_is_asked_to(train, monkeypatch):
    monkeypatch.setattr(watching, "is_overfitting", lambda readings: len(readings) == 3)
    stopped = RunFolder(train("stopped", **WATCHED, stop_when_overfitting=True))
    assert [record["step"] for record in metrics(stopped.path) if "loss" in record] == [1, 2]
    assert stopped.has_result
    going_on = RunFolder(train("going on", **WATCHED))
    assert len(read_readings(going_on)) == 5


def test_without_weights_the_run_goes_on_unwatched(train, monkeypatch, tmp_path, pipelines, pictures):
    def missing(backbone):
        raise MissingWeights("the weights are nowhere")

    monkeypatch.setattr(features, "load_lpips", missing)
    given = {"pretrained_model_name_or_path": pipelines("pixel_epsilon"), "instance_data_dir": pictures}
    settings = {"max_train_steps": 1, "method": "finetune", "num_validation_images": 2, "num_inference_steps": 2}
    result = succeeds("train", *flags(**given, **settings, output_dir=tmp_path / "run"))
    assert "nothing watches this run for overfitting: the weights are nowhere" in result.err
    assert not (tmp_path / "run/best").exists()

    def nowhere(name):
        missing(name)

    monkeypatch.setattr("domainstudio.app.opened.find_weights", nowhere)
    stopping = flags(**given, **settings, output_dir=tmp_path / "other", stop_when_overfitting=True)
    result = domainstudio("train", *stopping)
    assert result.code == 2
    assert "the weights are nowhere" in result.err


def test_too_few_previews_leave_the_run_unwatched(tmp_path, pipelines, pictures):
    given = {"pretrained_model_name_or_path": pipelines("pixel_epsilon"), "instance_data_dir": pictures}
    settings = {"max_train_steps": 1, "method": "finetune", "num_validation_images": 1, "num_inference_steps": 2}
    result = succeeds("train", *flags(**given, **settings, output_dir=tmp_path / "run"))
    assert "nothing watches this run" in result.err
    assert "2 samples" in result.err


def test_a_lora_of_a_text_model_is_kept(train_text):
    run = RunFolder(train_text("watched", adapter="lora", **WATCHED))
    assert run.best.diffusers_lora.is_file()
    assert run.best.finished() == run.best.diffusers_lora


def test_a_lora_of_pictures_is_kept(train):
    run = RunFolder(train("watched lora", "latent_v", adapter="lora", rank=2, **WATCHED))
    assert (run.best.path / LORA_FILE).is_file()
    assert run.best.has_result


def test_stopping_needs_the_watch(tmp_path, pictures):
    result = domainstudio(
        "train",
        *flags(instance_data_dir=pictures, output_dir=tmp_path / "run", watch=False, stop_when_overfitting=True),
    )
    assert result.code == 2
    assert "needs the watch" in result.err
