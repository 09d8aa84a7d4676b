"""Source samples are drawn once: a later run on the same source finds them, and any other draws its own."""

import shutil
from pathlib import Path

import pytest
import torch
from command_line import FAST, flags, succeeds, tree
from safetensors.torch import load_file
from text_settings import FAST_TEXT

from domainstudio.app import pool
from domainstudio.app.folder import RunFolder
from domainstudio.app.recipe import build_recipe
from domainstudio.models.load import load_model
from domainstudio.models.sample import sample

pytest_plugins = ("text_kit",)

PROMPTS = ["a man", "a woman", "a dog", "a man"]


class Counted:
    """`sample`, with the number of its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return sample(*args, **kwargs)


@pytest.fixture
def drawing(monkeypatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(pool, "sample", counted)
    return counted


@pytest.fixture
def draw(tmp_path, pictures):
    """A run's source samples, in a new folder each time."""
    runs = iter(range(9))

    def drawn(model, prompts=(), log=lambda message: None, **settings) -> tuple[torch.Tensor, Path]:
        folder = tmp_path / f"run{next(runs)}"
        folder.mkdir()
        fast = FAST_TEXT if prompts else FAST
        given = {"instance_data_dir": str(pictures), "output_dir": str(folder)}
        recipe = build_recipe(None, {**given, **fast, **settings})
        return pool.draw_source_samples(RunFolder(folder), model, recipe, prompts, None, log).x0, folder

    return drawn


def test_a_later_run_on_the_same_source_finds_them(drawing, draw, pipelines, tmp_path):
    said = []
    first, one = draw(load_model(pipelines("latent_v")))
    moved = shutil.copytree(pipelines("latent_v"), tmp_path / "moved")
    second, other = draw(load_model(moved), log=said.append, max_train_steps=9, learning_rate=1e-3)
    assert drawing.calls == 1
    assert torch.equal(first, second)
    assert tree(one) == tree(other)
    [told] = said
    assert told.startswith("the 4 source samples are those of an earlier run on this source (")


@pytest.mark.parametrize("changed", [{"seed": 1}, {"num_class_images": 5}, {"num_inference_steps": 3}])
def test_other_settings_draw_their_own(drawing, draw, pipelines, changed):
    model = load_model(pipelines("latent_v"))
    first, _ = draw(model)
    second, folder = draw(model, **changed)
    assert drawing.calls == 2
    assert first.shape != second.shape or not torch.equal(first, second)
    assert torch.equal(load_file(RunFolder(folder).prior)["x0"], second)


def test_other_weights_draw_their_own(drawing, draw, pipelines):
    model = load_model(pipelines("latent_v"))
    draw(model)
    with torch.no_grad():
        next(model.network.parameters()).view(-1)[0] += 1e-3
    draw(model)
    assert drawing.calls == 2


def test_another_schedule_draws_its_own(drawing, draw, pipelines):
    model = load_model(pipelines("latent_v"))
    draw(model)
    model.pipeline.scheduler.register_to_config(clip_sample=not model.pipeline.scheduler.config.clip_sample)
    draw(model)
    assert drawing.calls == 2


@pytest.mark.parametrize(
    ("prompts", "settings", "calls"),
    [
        (PROMPTS, {"instance_prompt": "another xyz style"}, 1),
        (["a man", "a woman", "a cat", "a man"], {}, 2),
        (PROMPTS, {"guidance_scale": 5.0}, 2),
    ],
)
def test_of_text_models_what_is_told_counts(drawing, draw, text_models, prompts, settings, calls):
    model = text_models()
    draw(model, PROMPTS)
    draw(model, prompts, **settings)
    assert drawing.calls == calls


def test_another_text_encoder_draws_its_own(drawing, draw, text_models):
    draw(text_models(), PROMPTS)
    model = text_models()
    with torch.no_grad():
        model.pipeline.text_encoder.get_input_embeddings().weight.mul_(1.1)
    draw(model, PROMPTS)
    assert drawing.calls == 2


def test_a_run_says_where_they_come_from(pipelines, pictures, tmp_path, drawing):
    given = {"pretrained_model_name_or_path": pipelines("latent_v"), "instance_data_dir": pictures}
    one, other = (
        succeeds("train", *flags(**given, output_dir=tmp_path / name, **FAST, adapter=adapter))
        for name, adapter in (("full", "full"), ("lora", "lora"))
    )
    assert drawing.calls == 1
    assert "are those of an earlier run" not in one.err
    assert "the 4 source samples are those of an earlier run on this source" in other.err
