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
from domainstudio.app.opened import Opened, open_recipe
from domainstudio.app.recipe import build_recipe
from domainstudio.models.load import load_model
from domainstudio.models.sample import sample
from domainstudio.training.processes import open_accelerator

pytest_plugins = ("text_kit",)

PROMPTS = ["a man", "a woman", "a dog", "a man"]


class Counted:
    """`sample`, with the number of its calls and which pictures they were to draw."""

    def __init__(self):
        self.calls, self.pictures = 0, []

    def __call__(self, *args, **kwargs):
        self.calls += 1
        self.pictures.append(kwargs["pictures"])
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
        numbers = recipe.class_images(None)
        opened = Opened(recipe, {}, None, model, None, None, None, list(prompts), *numbers)
        return pool.draw_source_samples(RunFolder(folder), opened, None, log).x0, folder

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


@pytest.mark.parametrize("changed", [{"seed": 1}, {"num_inference_steps": 3}])
def test_other_settings_draw_their_own(drawing, draw, pipelines, changed):
    model = load_model(pipelines("latent_v"))
    first, _ = draw(model)
    second, folder = draw(model, **changed)
    assert drawing.calls == 2
    assert not torch.equal(first, second)
    assert torch.equal(load_file(RunFolder(folder).prior)["x0"], second)


def test_a_larger_pool_begins_as_a_smaller_one(drawing, draw, pipelines):
    model, said = load_model(pipelines("latent_v")), []
    first, _ = draw(model)
    more, folder = draw(model, num_class_images=6, log=said.append)
    fewer, _ = draw(model, num_class_images=5, log=said.append)
    assert drawing.pictures == [range(4), range(4, 6)]
    assert torch.equal(more[:4], first)
    assert torch.equal(more[:5], fewer)
    torch.testing.assert_close(more, sample(model, model.network, 6, pool.POOL_SEED, FAST["num_inference_steps"]))
    assert len(list(RunFolder(folder).prior_pictures.iterdir())) == 6
    assert [told[:39] for told in said] == [
        "the first 4 of 6 source samples are tho",
        "the 5 source samples are those of an ea",
    ]


def test_as_many_are_drawn_as_the_domains_ask_for(drawing, pipelines, pictures, tmp_path):
    """What its first ones say: of 3 that are shown, 3 to 9."""
    given = {"pretrained_model_name_or_path": pipelines("pixel_epsilon"), "instance_data_dir": pictures}
    left_open = {name: value for name, value in FAST.items() if name != "num_class_images"}
    settings = flags(**given, output_dir=tmp_path / "run", **left_open, nearest_class_images=3)
    succeeds("train", *settings)
    folder = RunFolder(tmp_path / "run")
    samples = load_file(folder.prior)["x0"]
    recipe = folder.recipe()
    opened = open_recipe(recipe, open_accelerator("no"))
    number = opened.samples_wanted(samples[:3])
    assert 3 < number < 9, "else this tests nothing"
    assert len(samples) == number
    assert drawing.pictures == [range(3), range(3, number)]
    assert recipe.num_class_images is None
    assert f"# num_class_images = {number}  #" in folder.config.read_text()
    begun = folder.config.read_text()
    succeeds("train", *settings, *flags(resume_from_checkpoint="latest"))
    assert folder.config.read_text() == begun


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({}, (100, 300)),
        ({"pairing": "source_samples"}, (100, 300)),
        ({"num_class_images": 50}, (50, 50)),
        ({"pairing": "training"}, (0, 0)),
        ({"method": "ant"}, (100, 100)),
        ({"method": "domainstudio", "pairing": "source_samples"}, (100, 100)),
        ({"method": "finetune"}, (0, 0)),
    ],
)
def test_methods_ask_for_as_many_as_they_choose_among(pipelines, pictures, settings, numbers):
    given = {"pretrained_model_name_or_path": str(pipelines("pixel_epsilon")), "instance_data_dir": str(pictures)}
    opened = open_recipe(build_recipe(None, {**given, **settings}), open_accelerator("no"))
    assert (opened.least_samples, opened.most_samples) == numbers


def test_text_models_show_all(text_pipelines, pictures):
    given = {"pretrained_model_name_or_path": str(text_pipelines("sd1_epsilon")), "instance_data_dir": str(pictures)}
    prompts = {"instance_prompt": "a portrait in xyz style", "class_prompt": "a portrait"}
    opened = open_recipe(build_recipe(None, {**given, **prompts}), open_accelerator("no"))
    assert (opened.least_samples, opened.most_samples, len(opened.prior)) == (100, 100, 100)


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
