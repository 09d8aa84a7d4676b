"""Runs of text-to-image models, from the command line to pictures."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from command_line import domainstudio, flags, metrics, succeeds, tree
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from text_settings import FAST_TEXT, PROMPTS

from domainstudio.app import pool
from domainstudio.app.compare import NUM_PROMPTED
from domainstudio.app.draw import draw_from, open_result, prompts_of
from domainstudio.app.folder import RunFolder
from domainstudio.app.materials import TrainingPictures, open_domain, open_pictures, prior_prompts
from domainstudio.app.opened import open_recipe
from domainstudio.app.recipe import Recipe
from domainstudio.app.runs import train_run
from domainstudio.data.captions import draw_alternatives
from domainstudio.data.domain import load_domain, to_pil
from domainstudio.errors import UserError
from domainstudio.models.load import fast_scheduler, load_model
from domainstudio.models.sample import TextGuidance, decode, sample, starting_noise
from domainstudio.training.processes import open_accelerator

pytest_plugins = ("text_kit", "text_run_kit")

LORA = "lora/pytorch_lora_weights.safetensors"


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


def levels(images):
    return np.stack([np.asarray(image).astype(int) for image in to_pil(images)])


@pytest.fixture
def recipe(text_pipelines, pictures, tmp_path):
    """A recipe of a quick LoRA run, with changes."""

    def build(pipeline="sd1_epsilon", **changes) -> Recipe:
        given = {"pretrained_model_name_or_path": str(text_pipelines(pipeline)), "instance_data_dir": str(pictures)}
        given |= {"output_dir": str(tmp_path / "run"), "adapter": "lora", "rank": 2}
        return Recipe(**{**FAST_TEXT, **given, **changes})

    return build


class TestFolder:
    def test_layout(self, text_lora_run, text_full_run):
        common = {"config.toml", "metrics.jsonl", "samples", "checkpoint-2", "checkpoint-4"}
        common |= {"source_samples.safetensors", "source_samples"}
        assert {path.name for path in text_lora_run.iterdir()} == common | {"lora"}
        assert {path.name for path in text_full_run.iterdir()} == common | {"pipeline"}
        assert [path.name for path in (text_lora_run / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]

    def test_every_step_is_logged_with_its_terms(self, text_lora_run, text_full_run):
        terms = {"simple", "image", "hf", "hfmse"}
        for run, names in ((text_lora_run, terms), (text_full_run, {"simple", "prior"})):
            assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]
            assert all(record.keys() == {"step", "loss", "grad_norm"} | names for record in metrics(run))

    def test_a_run_says_where_its_result_is(self, text_lora_run, tmp_path):
        settings = flags(output_dir=tmp_path / "run", max_train_steps=1)
        line = succeeds("train", text_lora_run / "config.toml", *settings).out.splitlines()[0]
        told = line.removeprefix("result: ")
        assert told in {str(tmp_path / "run" / "lora"), str(tmp_path / "run" / LORA)}

    def test_a_full_result_is_an_ordinary_pipeline(self, text_full_run, text_pipelines):
        pipeline = StableDiffusionPipeline.from_pretrained(text_full_run / "pipeline")
        source = StableDiffusionPipeline.from_pretrained(text_pipelines("sd2_v"))
        assert pipeline.safety_checker is None
        for part, same in (("unet", False), ("text_encoder", True), ("vae", True)):
            ours, theirs = (getattr(p, part).state_dict() for p in (pipeline, source))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours) == same

    def test_a_full_run_may_adapt_the_text_encoder(self, recipe, text_pipelines):
        settings = {"adapter": "full", "method": "finetune", "train_text_encoder": True, "learning_rate": 1e-3}
        folder = train_run(recipe(**settings, class_prompt=None))
        ours, theirs = load_model(folder.pipeline).pipeline, load_model(text_pipelines("sd1_epsilon")).pipeline
        for part in ("unet", "text_encoder"):
            one, other = (getattr(p, part).state_dict() for p in (ours, theirs))
            assert one.keys() == other.keys()
            assert not all(torch.equal(one[key], other[key]) for key in one)
        assert not folder.prior.exists()
        assert not folder.prior_pictures.exists()

    def test_config_runs_again_to_the_same_lora(self, text_lora_run, tmp_path):
        succeeds("train", text_lora_run / "config.toml", "--output-dir", tmp_path / "again")
        _same_lora(text_lora_run, tmp_path / "again")
        assert metrics(text_lora_run) == metrics(tmp_path / "again")
        assert _pictures(text_lora_run / "samples") == _pictures(tmp_path / "again" / "samples")

    @pytest.mark.parametrize("name", ["text_lora_run", "text_full_run"])
    def test_a_resumed_run_is_the_uninterrupted_one(self, name, request, tmp_path, monkeypatch):
        run, again = request.getfixturevalue(name), tmp_path / "again"
        shutil.copytree(run, again)
        shutil.rmtree(again / "checkpoint-4")
        drawn = tree(again / "source_samples"), (again / "source_samples.safetensors").read_bytes()
        monkeypatch.setattr(pool, "sample", None)  # source samples are drawn once
        succeeds("train", run / "config.toml", "--output-dir", again, "--resume-from-checkpoint", "latest")
        assert metrics(run) == metrics(again)
        assert _pictures(run / "samples") == _pictures(again / "samples")
        assert drawn == (tree(again / "source_samples"), (again / "source_samples.safetensors").read_bytes())
        if name == "text_lora_run":
            _same_lora(run, again)
        else:
            assert tree(run / "pipeline") == tree(again / "pipeline")

    def test_erase_steps_come_first(self, recipe):
        folder = train_run(recipe(method="finetune", erase_steps=2))
        assert ["erase" in record for record in metrics(folder.path)] == [True, True, False, False]
        assert ["simple" in record for record in metrics(folder.path)] == [False, False, True, True]


def _pictures(folder):
    pictures = {name: content for name, content in tree(folder).items() if name.endswith(".png")}
    assert len(pictures) == 6
    return pictures


def _same_lora(one, other):
    ours, theirs = load_file(one / LORA), load_file(other / LORA)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


class TestMixedPrecision:
    @pytest.fixture(autouse=True)
    def _forget(self):
        """Accelerate keeps one precision for the whole process."""
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)

    @pytest.mark.parametrize("adapter", ["lora", "full"])
    def test_a_run_in_bf16_ends_near_that_in_float32(self, recipe, tmp_path, adapter):
        settings = {"adapter": adapter, "train_text_encoder": True, "gradient_checkpointing": True, "space": "crop"}
        settings |= {"max_train_steps": 2, "num_validation_images": 1, "learning_rate": 1e-3}
        losses, drawn = [], []
        for precision in ("no", "bf16"):
            AcceleratorState._reset_state(reset_partial_state=True)
            own = recipe(**settings, mixed_precision=precision, output_dir=str(tmp_path / precision))
            folder = train_run(own)
            losses.append([record["loss"] for record in metrics(folder.path)])
            drawn.append(pixels(folder.samples / "step_000002"))
            if adapter == "lora":
                assert {tensor.dtype for tensor in load_file(folder.diffusers_lora).values()} == {torch.float32}
            assert open_result(folder).network.dtype == torch.float32
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert losses[0] != losses[1]
        assert abs(drawn[0] - drawn[1]).mean() < 3


class TestMistakes:
    """Exit code 2, one clear message, and nothing is left that would stand in the way of the next try."""

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"instance_prompt": None}, ("is a text-to-image model", "say what your pictures are with an")),
            ({"class_prompt": None}, ("method studio draws pictures from the source", "class_prompt")),
            ({"class_prompt": None, "method": "domainstudio"}, ("method domainstudio asks the source", "class_prompt")),
            ({"class_prompt": None, "method": "finetune", "erase_steps": 1}, ("class_prompt",)),
            ({"captions": "folder"}, ("captions='folder'", "has no {caption}")),
            ({"captions": "files", "instance_prompt": "{caption}, xyz style"}, ("not one of 10 pictures has one",)),
            ({"class_prompt": None, "instance_prompt": "{caption}, xyz style"}, ("0.png has no caption",)),
            ({"instance_prompt": "a {man|woman}"}, ("cannot leave a choice", "prior_prompt")),
            ({"instance_prompt": "a " * 30}, ("has 32 tokens; the model reads 16",)),
            ({"prior_prompt": "a " * 30}, ("has 32 tokens; the model reads 16",)),
            ({"validation_prompt": "a " * 30}, ("has 32 tokens; the model reads 16",)),
            ({"negative_prompt": "a " * 30}, ("has 32 tokens; the model reads 16",)),
            ({"subject_prompt": "a dog"}, ("subject_data_dir and subject_prompt go together",)),
            ({"erase_steps": 4}, ("erase_steps=4 leaves none of max_train_steps=4",)),
            ({"snr_gamma": 5, "high_noise_weight": 0.5}, ("snr_gamma=5 and high_noise_weight=0.5",)),
            ({"method": "domainstudio_released"}, ("for unconditional models",)),
            ({"method": "dreambooth", "space": "crop"}, ("dreambooth has no space",)),
            ({"optimizer": "adamw8bit"}, ("domainstudio[optimizers]",)),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_it_is_told_and_the_next_try_works(self, text_pipelines, pictures, tmp_path, changes, told):
        given = {"pretrained_model_name_or_path": text_pipelines("sd1_epsilon"), "instance_data_dir": pictures}
        settings = {**FAST_TEXT, **given, "adapter": "lora", "output_dir": tmp_path / "run", **changes}
        result = domainstudio("train", *flags(**{name: value for name, value in settings.items() if value is not None}))
        assert (result.code, result.out) == (2, "")
        assert result.err.count("error: ") == 1
        assert all(part in result.err for part in told), result.err
        assert not (tmp_path / "run").exists()

    def test_prompts_for_an_unconditional_model(self, pipelines, pictures, tmp_path):
        given = {"pretrained_model_name_or_path": pipelines("pixel_v"), "instance_data_dir": pictures, **PROMPTS}
        result = domainstudio("train", *flags(**given, train_text_encoder=True, output_dir=tmp_path / "run"))
        assert result.code == 2
        named = "instance_prompt, class_prompt, train_text_encoder, guidance_scale"
        assert f"takes no prompts; remove {named}, or give a text-to-image model" in result.err
        assert not (tmp_path / "run").exists()


@pytest.fixture
def captioned(pictures, tmp_path):
    """Three pictures, of which two have a caption."""
    folder = tmp_path / "3_red_dog"
    folder.mkdir()
    for name in ("1.png", "2.png", "3.png"):
        shutil.copy(pictures / name, folder)
    (folder / "1.txt").write_text("a man")
    (folder / "3.txt").write_text("a woman")
    return folder


def opened_pictures(own, model, log):
    return open_pictures(own, model, open_domain(own, model), log)


class TestPrompts:
    @pytest.mark.parametrize(
        ("settings", "students", "sources"),
        [
            ({}, ["a portrait, xyz style"] * 3, ["a portrait"] * 3),
            ({"class_prompt": None}, ["a portrait, xyz style"] * 3, [""] * 3),
            (
                {"instance_prompt": "{caption}, xyz style", "captions": "files"},
                ["a man, xyz style", "a portrait, xyz style", "a woman, xyz style"],
                ["a man", "a portrait", "a woman"],
            ),
            (
                {"instance_prompt": "{caption}, xyz style", "captions": "folder", "class_prompt": None}
                | {"validation_prompt": "a man"},
                ["red dog, xyz style"] * 3,
                ["red dog"] * 3,
            ),
            ({"instance_prompt": "{caption} in xyz"}, ["a portrait in xyz"] * 3, ["a portrait"] * 3),
        ],
        ids=["plain", "no class", "files", "folder", "no captions"],
    )
    def test_what_is_told_of_each_picture_is_shown(self, recipe, text_models, captioned, settings, students, sources):
        model, log = text_models(), []
        images = load_domain(captioned, 16).images
        pictures = opened_pictures(recipe(instance_data_dir=str(captioned), **settings), model, log.append)
        assert log[0] == "\n".join(f"{i}.png  {prompt}" for i, prompt in enumerate(students, 1))
        if settings.get("captions") == "files":  # and once more without them
            assert log[1:] == ["and as often, in place of their captions: a portrait, xyz style"]
            students, sources = students + ["a portrait, xyz style"] * 3, sources + ["a portrait"] * 3
            images = torch.cat([images, images])
        assert pictures.student_prompts == tuple(students)
        assert pictures.source_prompts == tuple(sources)
        assert torch.equal(pictures.images, images)
        told = pictures.encoded(model)
        assert torch.equal(told.student, model.encode_prompts(students))
        assert torch.equal(told.source, model.encode_prompts(sources))

    def test_the_table_is_shown_on_the_command_line(self, text_pipelines, captioned, tmp_path):
        given = {"pretrained_model_name_or_path": text_pipelines("sd1_epsilon"), "instance_data_dir": captioned}
        own = {"method": "finetune", "captions": "files", "instance_prompt": "{caption}, xyz style", "adapter": "lora"}
        result = succeeds("train", *flags(**{**FAST_TEXT, **given, **own}, output_dir=tmp_path / "run"))
        assert all(f"{i}.png  {told}, xyz style" in result.err for i, told in enumerate(("a man", "a portrait"), 1))

    @pytest.mark.parametrize(("settings", "source"), [({}, "a portrait"), ({"subject_class_prompt": "a dog"}, "a dog")])
    def test_a_subject_is_learned_beside_the_style(self, recipe, text_models, captioned, pictures, settings, source):
        subject = {"subject_data_dir": str(captioned), "subject_prompt": "a xyz dog", **settings}
        both, model = recipe(**subject), text_models()
        opened = opened_pictures(both, model, lambda message: None)
        sets = [load_domain(folder, 16).images for folder in (pictures, captioned)]
        assert torch.equal(opened.images, torch.cat(sets))
        assert opened.student_prompts == ("a portrait, xyz style",) * 10 + ("a xyz dog",) * 3
        assert opened.source_prompts == ("a portrait",) * 10 + (source,) * 3

    def test_a_subject_is_shown_as_often_as_captioned_pictures(self, recipe, text_models, captioned, pictures):
        subject = {"subject_data_dir": str(pictures), "subject_prompt": "a xyz dog", "subject_class_prompt": "a dog"}
        style = {"instance_data_dir": str(captioned), "captions": "files", "instance_prompt": "{caption}, xyz style"}
        opened = opened_pictures(recipe(**subject, **style), text_models(), lambda message: None)
        assert opened.student_prompts.count("a xyz dog") == opened.source_prompts.count("a dog") == 20
        assert len(opened.images) == 2 * 13
        assert torch.equal(opened.images[:13], opened.images[13:])

    def test_a_subject_and_a_style_train_together(self, recipe, captioned, monkeypatch):
        seen, log = [], []
        from domainstudio.app import opened

        train = opened.train

        def spy(model, adaptation, images, *args, **kwargs):
            seen.append((len(images), len(kwargs["prompts"].student)))
            return train(model, adaptation, images, *args, **kwargs)

        monkeypatch.setattr(opened, "train", spy)
        subject = {"subject_data_dir": str(captioned), "subject_prompt": "a xyz dog"}
        folder = train_run(recipe(**subject), log=log.append)
        assert seen == [(13, 13)]
        assert len(log[0].splitlines()) == 13
        assert folder.finished() == folder.diffusers_lora


UNTOLD = TrainingPictures(torch.zeros(0))
"""Whose prompts are not asked for."""


class TestSourceSamples:
    def test_they_are_of_what_the_training_pictures_are_of(self, recipe, text_models, captioned):
        settings = {"instance_data_dir": str(captioned), "captions": "files", "instance_prompt": "{caption}, xyz style"}
        own = recipe(**settings, prior_prompt=None)
        pictures = opened_pictures(own, text_models(), lambda table: None)
        assert len(set(pictures.source_prompts)) > 2
        assert prior_prompts(own, pictures, 25) == [*pictures.source_prompts * 9][:25]

    def test_they_are_drawn_of_their_prompts_and_kept_as_pictures(self, text_lora_run, text_models):
        recipe, model = RunFolder(text_lora_run).recipe(), text_models()
        prompts = prior_prompts(recipe, UNTOLD, 4)
        assert set(prompts) <= {"a man", "a woman", "a dog"}
        assert len(prompts) == 4
        expected = sample(model, model.network, 4, 500_000, 2, guidance=TextGuidance(prompts, 2.0))
        x0 = load_file(text_lora_run / "source_samples.safetensors")["x0"]
        torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)
        assert np.array_equal(pixels(text_lora_run / "source_samples"), levels(decode(model, x0)))

    def test_alternatives_follow_from_seed_and_number(self, recipe):
        settings = {"prior_prompt": "a {man|woman|dog|picture}", "pair_batch_size": 3}
        one, same, other = (prior_prompts(recipe(**settings, seed=seed), UNTOLD, 60) for seed in (0, 0, 1))
        assert one == same != other
        assert set(one) == {"a man", "a woman", "a dog", "a picture"}

    @pytest.mark.parametrize(
        ("template", "students"),
        [("{caption}, xyz style", ["a man, xyz style", "a woman, xyz style"]), ("a xyz portrait", ["a xyz portrait"])],
    )
    def test_the_student_is_told_each_in_the_style(self, recipe, tmp_path, template, students):
        own = recipe(instance_prompt=template, prior_prompt="a {man|woman}", num_class_images=8)
        (tmp_path / "pool").mkdir()
        opened = open_recipe(own, open_accelerator("no"))
        samples = pool.draw_source_samples(RunFolder(tmp_path / "pool"), opened, None)
        assert samples.source_prompts == tuple(prior_prompts(own, UNTOLD, 8))
        assert set(samples.source_prompts) == {"a man", "a woman"}
        assert set(samples.student_prompts) == set(students)
        if len(students) > 1:
            assert samples.student_prompts == tuple(f"{prompt}, xyz style" for prompt in samples.source_prompts)


class TestSampling:
    def drawn(self, run, out, *arguments):
        succeeds("sample", run, "--num-images", 3, "--seed", 5, "--output-dir", out, *arguments)
        return pixels(out)

    def expected(self, run, prompts, scale=2.0, negative=""):
        model = open_result(RunFolder(run))
        return levels(draw_from(model, 3, 5, 2, guidance=TextGuidance(prompts, scale, negative)))

    @pytest.mark.parametrize(
        ("arguments", "settings"),
        [
            ([], {"prompts": ["a portrait, xyz style"]}),
            (["--prompt", "a red dog"], {"prompts": ["a red dog"]}),
            (["--prompt", "a dog", "--guidance-scale", 4.5], {"prompts": ["a dog"], "scale": 4.5}),
            (["--negative-prompt", "a man"], {"prompts": ["a portrait, xyz style"], "negative": "a man"}),
        ],
        ids=["the run's own", "prompt", "scale", "negative"],
    )
    def test_pictures_are_those_of_what_is_asked(self, text_lora_run, tmp_path, arguments, settings):
        drawn = self.drawn(text_lora_run, tmp_path / "out", *arguments)
        assert abs(drawn - self.expected(text_lora_run, **settings)).max() <= 1
        other = self.expected(text_lora_run, ["a man of the woman"], 3.0)
        assert abs(drawn - other).max() > 2, "what is asked for matters"

    @pytest.mark.parametrize("name", ["text_lora_run", "text_full_run"])
    def test_alternatives_are_drawn_for_each_picture(self, name, request, tmp_path):
        run, prompt = request.getfixturevalue(name), "{a dog|a man|red hair|blue hair}, xyz style"
        prompts = [draw_alternatives(prompt, index) for index in range(3)]
        assert len(set(prompts)) > 1
        drawn = self.drawn(run, tmp_path / "out", "--prompt", prompt)
        assert abs(drawn - self.expected(run, prompts)).max() <= 1

    @pytest.mark.parametrize("name", ["text_lora_run", "text_full_run"])
    def test_the_last_preview_is_what_the_result_draws(self, name, request, tmp_path):
        run = request.getfixturevalue(name)
        succeeds("sample", run, "--num-images", 2, "--seed", 0, "--output-dir", tmp_path / "out")
        assert abs(pixels(tmp_path / "out") - pixels(run / "samples" / "step_000004")).max() <= 1
        assert abs(pixels(tmp_path / "out") - pixels(run / "samples" / "step_000000")).max() > 2

    @torch.no_grad()
    def test_style_strength_pushes_away_from_the_source(self, text_lora_run, text_models, tmp_path):
        """The source says what it says with its own text encoder, which the run's LoRA adapted."""
        student, source = open_result(RunFolder(text_lora_run)), text_models()
        prompt, empty = student.encode_prompts(["a red dog, xyz style"] * 3), student.encode_prompts([""] * 3)
        plain, scheduler = source.encode_prompts(["a red dog"] * 3), fast_scheduler(student)
        assert (plain - student.encode_prompts(["a red dog"] * 3)).abs().max() > 0.1
        x = starting_noise(student.sample_shape, range(3), seed=5)
        scheduler.set_timesteps(2)
        for t in scheduler.timesteps:
            output, without = (student.network(x, t, told).sample for told in (prompt, empty))
            push = output - source.network(x, t, plain).sample
            x = scheduler.step(without + 2.0 * (output - without) + 1.5 * push, t, x).prev_sample
        asked = ["--prompt", "a red dog, xyz style", "--source-prompt", "a red dog", "--style-strength", 1.5]
        drawn = self.drawn(text_lora_run, tmp_path / "out", *asked)
        assert abs(drawn - levels(decode(student, x))).max() <= 1
        assert abs(drawn - self.expected(text_lora_run, ["a red dog, xyz style"])).max() > 2

    def test_style_strength_takes_the_class_prompt_of_the_run(self, text_full_run, tmp_path):
        own = self.drawn(text_full_run, tmp_path / "own", "--style-strength", 1.5)
        given = self.drawn(text_full_run, tmp_path / "given", "--style-strength", 1.5, "--source-prompt", "a portrait")
        other = self.drawn(text_full_run, tmp_path / "other", "--style-strength", 1.5, "--source-prompt", "red dog")
        assert np.array_equal(own, given)
        assert not np.array_equal(own, other)

    def test_a_pipeline_folder_has_to_be_told_what_to_draw(self, text_full_run, tmp_path):
        pipeline, out = text_full_run / "pipeline", tmp_path / "out"
        result = domainstudio("sample", pipeline, "--output-dir", out)
        assert result.code == 2
        assert "is a text-to-image model: say what to draw with --prompt" in result.err
        style = ["--prompt", "a dog", "--style-strength", 1, "--source-prompt", "a dog"]
        result = domainstudio("sample", pipeline, "--output-dir", out, *style)
        assert result.code == 2
        assert "--style-strength compares with the source model: it needs a run folder" in result.err
        assert not out.exists()
        succeeds("sample", pipeline, "--num-images", 1, "--output-dir", out, "--prompt", "a dog")
        model = load_model(pipeline)
        expected = draw_from(model, 1, 0, 25, guidance=TextGuidance(["a dog"], 7.5))
        assert abs(pixels(out) - levels(expected)).max() <= 1

    @pytest.mark.parametrize("asked", [["--prompt", "a dog"], ["--style-strength", "1"], ["--guidance-scale", "2"]])
    def test_an_unconditional_run_takes_no_prompts(self, plain_run, tmp_path, asked):
        result = domainstudio("sample", plain_run, "--output-dir", tmp_path / "out", *asked)
        assert result.code == 2
        assert "takes no prompts: it is not a text-to-image model" in result.err
        assert not (tmp_path / "out").exists()

    def test_too_long_a_prompt_is_told(self, text_lora_run, tmp_path):
        result = domainstudio("sample", text_lora_run, "--output-dir", tmp_path / "out", "--prompt", "a " * 20)
        assert result.code == 2
        assert "has 22 tokens; the model reads 16: shorten it" in result.err
        assert not (tmp_path / "out").exists()


def test_what_a_run_is_measured_of_is_known(text_lora_run, text_full_run, plain_run):
    assert prompts_of(text_lora_run, 3) == ["a portrait, xyz style"] * 3
    assert prompts_of(text_full_run / "pipeline", 3) == prompts_of(plain_run, 3) == []


def test_settings_of_text_models_survive_the_config(recipe):
    own = recipe(
        prior_prompt='a "{man|woman}"', captions="folder", negative_prompt="ä", erase_steps=2, noise_offset=0.1
    )
    path = RunFolder(Path(own.output_dir)).config
    path.parent.mkdir()
    path.write_text(own.to_toml(), encoding="utf-8")
    assert RunFolder(path.parent).recipe() == own


def test_a_recipe_names_what_is_for_text_models_alone(recipe):
    assert recipe().text_settings() == ["instance_prompt", "class_prompt", "guidance_scale"]
    with pytest.raises(UserError, match="say of what with a class_prompt"):
        prior_prompts(recipe(class_prompt=None), TrainingPictures(UNTOLD.images, ("xyz",), ("",)), 4)


@pytest.mark.usefixtures("stubs")
class TestCompare:
    def test_what_was_asked_besides_is_in_the_report(self, text_lora_run, tmp_path):
        asked = [part for caption in ("a blue dog", "a red <man>") for part in ("--caption", caption)]
        succeeds("compare", text_lora_run, "--num-images", 3, "--output", tmp_path / "report.html", *asked)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        section = page[page.index("Asked for something else") : page.index("nearest training pictures")]
        assert section.index("<h3>a blue dog</h3>") < section.index("<h3>a red &lt;man&gt;</h3>")
        assert section.count("<img") == 2 * 2 * NUM_PROMPTED  # two captions, of the source and of the run
        assert section.count("Un-adapted source</p>") == 2

    def test_captions_are_for_text_models(self, plain_run, tmp_path):
        result = domainstudio("compare", plain_run, "--caption", "a dog", "--output", tmp_path / "report.html")
        assert result.code == 2
        assert "takes no prompts; leave the captions out" in result.err
