"""A run's result in the formats that other tools read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import domainstudio, succeeds, tree
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from domainstudio.app.draw import open_result
from domainstudio.app.export import EXPORT_FORMATS, export_run
from domainstudio.app.folder import RunFolder
from domainstudio.errors import UserError
from domainstudio.models.load import load_model

pytest_plugins = ("text_kit", "text_run_kit")

NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def drawn(pipeline):
    """Pictures (2, 16, 16, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a portrait, xyz style", "a red dog"]
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    return torch.from_numpy(pipeline(prompts, latents=NOISE, **settings).images)


def test_every_format_gives_the_pictures_of_the_run(text_lora_run, text_pipelines, tmp_path):
    """LoRA of UNet and text encoder, whose rank is not its alpha."""
    expected = drawn(open_result(RunFolder(text_lora_run)).pipeline)
    plain = drawn(StableDiffusionPipeline.from_pretrained(text_pipelines("sd1_epsilon")))
    assert (expected - plain).abs().mean() > 0.01
    for format in ("diffusers", "kohya"):
        output = tmp_path / "new" / f"{format}.safetensors"
        result = succeeds("export", text_lora_run, "--format", format, "--output", output)
        assert result.out == f"{output}\n"
        pipeline = StableDiffusionPipeline.from_pretrained(text_pipelines("sd1_epsilon"))
        pipeline.load_lora_weights(output.parent, weight_name=output.name)
        torch.testing.assert_close(drawn(pipeline), expected, rtol=0, atol=1e-5)
    merged = tmp_path / "merged"
    assert succeeds("export", text_lora_run, "--format", "merged", "--output", merged).out == f"{merged}\n"
    torch.testing.assert_close(drawn(StableDiffusionPipeline.from_pretrained(merged)), expected, rtol=0, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "merged"}, "nothing is left half written"
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"diffusers.safetensors", "kohya.safetensors"}


def test_the_diffusers_file_is_the_runs(text_lora_run, tmp_path):
    output = export_run(text_lora_run, "diffusers", tmp_path / "lora.safetensors")
    assert output.read_bytes() == RunFolder(text_lora_run).diffusers_lora.read_bytes()
    with safe_open(output, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (2, 3)
    assert (settings["text_encoder.r"], settings["text_encoder.lora_alpha"]) == (2, 3)


def test_a_kohya_file_says_what_it_is(text_lora_run, text_pipelines, tmp_path):
    output = export_run(text_lora_run, "kohya", tmp_path / "xyz.safetensors")
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    known = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "xyz",
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "epsilon",
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": str(text_pipelines("sd1_epsilon")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "3.0",
        "ss_output_name": "xyz",
    }
    assert known.items() <= metadata.items()
    assert "a portrait, xyz style" in metadata["ss_training_comment"]
    assert {value.item() for name, value in load_file(output).items() if name.endswith(".alpha")} == {3.0}


def test_a_kohya_file_says_nothing_where_that_is_asked(text_lora_run, tmp_path):
    plain, bare = (tmp_path / name for name in ("plain.safetensors", "bare.safetensors"))
    succeeds("export", text_lora_run, "--format", "kohya", "--output", plain)
    succeeds("export", text_lora_run, "--format", "kohya", "--output", bare, "--no-metadata")
    with safe_open(bare, "pt") as file:
        assert file.metadata() is None
    assert b"xyz" not in bare.read_bytes()
    ours, theirs = load_file(bare), load_file(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("format", EXPORT_FORMATS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_is_not_overwritten(text_lora_run, tmp_path, format, kind):
    taken = tmp_path / "taken.safetensors"
    if kind == "file":
        taken.write_text("precious")
    else:
        taken.mkdir()
        (taken / "note").write_text("precious")
    before = tree(tmp_path)
    result = domainstudio("export", text_lora_run, "--format", format, "--output", taken)
    assert (result.code, result.out) == (2, "")
    assert f"{taken} is there already; give another --output" in result.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_lora_is_one_file(text_lora_run, tmp_path, format):
    for name in ("lora", "lora.ckpt"):
        with pytest.raises(UserError, match=r"a LoRA is one file; give an --output that ends in \.safetensors"):
            export_run(text_lora_run, format, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ["plain_run", "lora_run", "text_full_run"])
def test_runs_without_a_lora_of_a_text_model_have_none_to_export(request, tmp_path, name, format):
    run = request.getfixturevalue(name)
    result = domainstudio("export", run, "--format", format, "--output", tmp_path / "x.safetensors")
    assert (result.code, result.out) == (2, "")
    assert f"has no LoRA of a text-to-image model, which format {format} is for" in result.err
    assert str(run / "pipeline") in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["lora_run", "text_full_run"])
def test_merged_copies_a_result_that_is_a_pipeline(request, tmp_path, name):
    run = request.getfixturevalue(name)
    export_run(run, "merged", tmp_path / "merged")
    ours, theirs = (load_model(folder).network.state_dict() for folder in (tmp_path / "merged", run / "pipeline"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("format", EXPORT_FORMATS)
def test_an_unfinished_run_and_other_folders_are_told(text_lora_run, tmp_path, format):
    unfinished = Path(shutil.copytree(text_lora_run, tmp_path / "unfinished"))
    shutil.rmtree(unfinished / "lora")
    with pytest.raises(UserError, match="has no result yet; continue it with"):
        export_run(unfinished, format, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not a run folder"):
        export_run(tmp_path, format, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
