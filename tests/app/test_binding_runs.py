"""Runs that learn a new word and bind what they learned to it, from the command line to every export."""

from types import SimpleNamespace

import pytest
import torch
from command_line import domainstudio, flags, succeeds
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_text import WORDS

from domainstudio.app.draw import Ask, draw_pictures, negative_prompt, open_result
from domainstudio.app.export import export_run
from domainstudio.app.folder import RunFolder
from domainstudio.app.materials import NUM_OTHERS, OTHER_WORDS, told_in_binding
from domainstudio.app.recipe import build_recipe
from domainstudio.data.domain import read_pictures
from domainstudio.errors import UserError
from domainstudio.models.identifier import EMBEDDING_FILE
from domainstudio.training.observers import read_metrics

pytest_plugins = ("text_kit", "text_run_kit")

NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
WORD = {"instance_prompt": "a portrait in <ink> style"}


@pytest.fixture(scope="module")
def bound_run(train_text):
    return train_text("bound", adapter="lora", rank=2, max_train_steps=5, checkpointing_steps=1, **WORD)


def recipe(**settings):
    return build_recipe(None, {"instance_data_dir": "x", "class_prompt": "a portrait", **settings})


def test_a_new_word_is_learned_and_bound_by_default():
    ours = recipe(**WORD, max_train_steps=300)
    assert (ours.identifier, ours.train_text_encoder, ours.binding_steps) == ("<ink>", True, 240)
    plain = recipe(instance_prompt="a portrait in sks style")
    assert (plain.identifier, plain.train_text_encoder, plain.binding_steps) == (None, False, 0)
    for settings in ({"method": "dreambooth"}, {"adapter": "full"}):
        other = recipe(**WORD, **settings)
        assert (other.train_text_encoder, other.binding_steps) == (True, 0)
    assert recipe(**WORD, binding_steps=0).binding_steps == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"instance_prompt": "a <cat> in <ink> style"}, "<cat>, <ink> are several new words"),
        ({**WORD, "class_prompt": "a <dog>"}, "<ink>, <dog> are several new words"),
        ({"instance_prompt": "a portrait", "class_prompt": "a <dog>"}, "<dog> is a new word of another prompt"),
        ({**WORD, "train_text_encoder": False}, "leave train_text_encoder at true"),
        ({"instance_prompt": "sks style", "binding_steps": 3}, "write one into instance_prompt ('sks style')"),
        ({**WORD, "max_train_steps": 9, "binding_steps": 9}, "leaves none of max_train_steps=9 to learn in"),
        ({**WORD, "stop_when_overfitting": True}, "could end the run before it is bound"),
    ],
)
def test_what_makes_no_sense_is_told(settings, told):
    with pytest.raises(UserError, match="the recipe cannot be used") as raised:
        recipe(**settings)
    assert told in str(raised.value)


@pytest.mark.parametrize(
    "prompts", [("a red dog", "picture of a woman in the blue style of dog hair in hair"), ("dog",)]
)
def test_other_prompts_are_source_prompts_with_other_words_in_them(text_models, prompts):
    model = text_models("sd1_epsilon")
    model.add_identifier("<ink>")
    limit = model.pipeline.tokenizer.model_max_length
    tells = SimpleNamespace(pipeline=model.pipeline, encode_prompts=list)
    others = told_in_binding(recipe(**WORD), tells, prompts).others
    assert len(others.student) == len(others.source) == NUM_OTHERS
    assert all(with_it == f"{plain}, <ink>" for with_it, plain in zip(others.student, others.source, strict=True))
    assert len(set(others.source)) > NUM_OTHERS // 2
    lengths = [len(text.split()) for text in others.source]
    assert min(lengths) == min(len(text.split()) for text in prompts)
    assert max(lengths) <= max(OTHER_WORDS, *(len(text.split()) for text in prompts))
    assert max(len(model.pipeline.tokenizer(text).input_ids) for text in others.student) == limit
    assert set(" ".join(others.source).split()) <= {*WORDS, *" ".join(prompts).split()}


def test_an_unconditional_model_takes_no_new_word(pipelines, pictures, tmp_path):
    given = {"pretrained_model_name_or_path": pipelines("pixel_v"), "instance_data_dir": pictures, **WORD}
    result = domainstudio("train", *flags(**given, output_dir=tmp_path / "run"))
    assert result.code == 2
    assert "<ink> is a word for text-to-image models" in result.err
    assert not (tmp_path / "run").exists()


def test_steps_before_and_after(bound_run):
    log = read_metrics(RunFolder(bound_run).metrics)
    assert ["bound" in record for record in log] == [False, True, True, True, True]
    assert RunFolder(bound_run).recipe().binding_steps == 4


def test_the_identifier_is_what_pictures_in_the_style_are_led_away_from():
    ours = recipe(**WORD, negative_prompt="blurry")
    assert negative_prompt(ours, ["a dog in <ink> style"]) == "blurry, <ink>"
    assert negative_prompt(ours, ["a dog in <ink> style", "a dog"]) == "blurry"
    assert negative_prompt(recipe(**WORD), ["<ink>"]) == "<ink>"
    assert negative_prompt(recipe(**WORD, binding_steps=0), ["<ink>"]) == ""


def test_pictures_with_and_without_the_word(bound_run):
    styled = draw_pictures(bound_run, 2, 0)
    assert torch.equal(styled, draw_pictures(bound_run, 2, 0, ask=Ask("a portrait in <ink> style")))
    assert not torch.equal(styled, draw_pictures(bound_run, 2, 0, ask=Ask("a portrait in style")))


def test_the_last_preview_is_what_users_get(bound_run):
    folder = RunFolder(bound_run)
    shown = read_pictures(folder.sheet(5))
    drawn = draw_pictures(bound_run, len(shown), folder.recipe().seed)
    assert (shown - drawn).abs().max() <= 2 / 255 + 1e-5, "but for rounding to 8 bits"


@torch.no_grad()
def drawn(pipeline):
    """Pictures (2, 16, 16, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    told = {"prompt": ["a portrait in <ink> style", "a red dog"], "negative_prompt": ["<ink>", ""]}
    return torch.from_numpy(pipeline(**told, latents=NOISE, **settings).images)


def test_every_format_gives_the_pictures_of_the_run(bound_run, text_pipelines, tmp_path):
    expected = drawn(open_result(RunFolder(bound_run)).pipeline)
    for format in ("diffusers", "kohya"):
        output = tmp_path / format / "lora.safetensors"
        succeeds("export", bound_run, "--format", format, "--output", output)
        assert {path.name for path in output.parent.iterdir()} == {"lora.safetensors", "ink.safetensors"}
        assert list(load_file(output.with_name("ink.safetensors"))) == ["<ink>"]
        pipeline = StableDiffusionPipeline.from_pretrained(text_pipelines("sd1_epsilon"))
        pipeline.load_lora_weights(output.parent, weight_name=output.name)
        pipeline.load_textual_inversion(output.with_name("ink.safetensors"))
        torch.testing.assert_close(drawn(pipeline), expected, rtol=0, atol=1e-5)
    merged = tmp_path / "merged"
    succeeds("export", bound_run, "--format", "merged", "--output", merged)
    torch.testing.assert_close(drawn(StableDiffusionPipeline.from_pretrained(merged)), expected, rtol=0, atol=1e-5)


def test_a_kohya_file_says_how_to_write_of_it(bound_run, tmp_path):
    with safe_open(export_run(bound_run, "kohya", tmp_path / "lora.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == "ink"
    assert "write its name into the negative prompt, too" in metadata["modelspec.usage_hint"]


def test_all_weights_learn_a_new_word_too(train_text):
    folder = RunFolder(train_text("all", adapter="full", method="dreambooth", learning_rate=1e-3, **WORD))
    pipeline = open_result(folder).pipeline
    tokens = pipeline.tokenizer("a portrait in <ink> style").input_ids
    assert pipeline.tokenizer.convert_tokens_to_ids("<ink>") in tokens
    assert pipeline.text_encoder.get_input_embeddings().num_embeddings > max(tokens)


def test_an_embedding_overwrites_nothing(bound_run, tmp_path):
    (tmp_path / "ink.safetensors").write_text("mine")
    for output in ("lora.safetensors", "ink.safetensors"):
        result = domainstudio("export", bound_run, "--format", "kohya", "--output", tmp_path / output)
        assert result.code == 2
        assert "ink.safetensors is" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["ink.safetensors"]
    assert (tmp_path / "ink.safetensors").read_text() == "mine"


def test_only_what_is_bound_is_judged(train_text):
    settings = {"max_train_steps": 6, "binding_steps": 3, "validation_steps": 1, "watch": True}
    folder = RunFolder(train_text("watched", adapter="lora", rank=2, num_validation_images=4, **WORD, **settings))
    read = [record["step"] for record in read_metrics(folder.metrics) if "watch" in record]
    assert read == [0, 4, 5, 6], "what it starts from, and what is bound"
    assert (folder.best.path / "lora" / EMBEDDING_FILE).exists()


def test_a_run_goes_on_within_binding(bound_run):
    folder = RunFolder(bound_run)
    whole = read_metrics(folder.metrics)
    final = load_file(folder.diffusers_lora)
    checkpoint = sorted(bound_run.glob("checkpoint-*"))[0]
    assert (checkpoint / "taught.safetensors").exists()
    succeeds("train", folder.config, "--resume-from-checkpoint", checkpoint)
    assert read_metrics(folder.metrics) == whole
    again = load_file(folder.diffusers_lora)
    assert all(torch.equal(again[name], final[name]) for name in final)
