import numpy as np
import pytest
import torch
from command_line import FAST, metrics, succeeds, tree
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from domainstudio.app.draw import draw_from
from domainstudio.app.recipe import build_recipe
from domainstudio.data.domain import to_pil
from domainstudio.models.load import load_model
from domainstudio.models.sample import decode

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def pixels(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_layout_of_a_run(full_run, lora_run):
    names = {"config.toml", "metrics.jsonl", "samples", "checkpoint-4", "pipeline"}
    names |= {"source_samples.safetensors", "source_samples"}
    assert {path.name for path in full_run.iterdir()} == names | {"checkpoint-2"}
    assert {path.name for path in lora_run.iterdir()} == names | {"lora.safetensors"}  # checkpoints_total_limit=1
    for run in (full_run, lora_run):
        assert sorted(path.name for path in (run / "samples").iterdir()) == [
            "step_000000",
            "step_000002",
            "step_000004",
        ]
        assert sorted(path.name for path in (run / "source_samples").iterdir()) == [
            f"{index:03d}.png" for index in range(FAST["num_class_images"])
        ]


def test_source_samples_can_be_looked_at(lora_run, pipelines):
    source = load_model(pipelines("latent_v"))
    expected = to_pil(decode(source, load_file(lora_run / "source_samples.safetensors")["x0"]))
    shown = pixels(lora_run / "source_samples")
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(shown, expected, strict=True))


def test_a_run_says_where_its_result_is_and_how_to_go_on(tmp_path, lora_run):
    result = succeeds("train", lora_run / "config.toml", "--output-dir", tmp_path / "run", "--max-train-steps", "1")
    lines = result.out.splitlines()
    assert lines[0] == f"result: {tmp_path / 'run' / 'pipeline'}"
    assert lines[1].startswith(f"report: domainstudio compare {tmp_path / 'run'} ")
    assert len(lines) == 2
    assert "Expected types" not in result.err  # which diffusers says of an AutoencoderKL in `vqvae`


@pytest.mark.parametrize("name", ["full_run", "lora_run"])
def test_config_runs_again_to_the_same_weights(name, request, tmp_path):
    run = request.getfixturevalue(name)
    again = tmp_path / "again"
    succeeds("train", run / "config.toml", "--output-dir", again)
    first, second = tree(run), tree(again)
    assert first.keys() == second.keys()
    different = {file for file in first if first[file] != second[file] and not file.endswith("optimizer.pt")}
    assert different - {"lora.safetensors"} == {"config.toml"}  # safetensors shuffles metadata
    if "lora.safetensors" in first:
        one, two = (load_file(folder / "lora.safetensors") for folder in (run, again))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    recipes = [build_recipe(folder / "config.toml", {"output_dir": "same"}) for folder in (run, again)]
    assert recipes[0] == recipes[1]


def test_every_step_is_logged_with_its_terms(full_run, plain_run):
    for run, terms in ((full_run, {"simple", "image", "hf", "hfmse", "transfer"}), (plain_run, {"simple"})):
        log = metrics(run)
        assert [record["step"] for record in log] == [1, 2, 3, 4]
        assert all(record.keys() == {"step", "loss", "grad_norm"} | terms for record in log)
        assert all(np.isfinite(list(record.values())).all() for record in log)
    assert all(record["loss"] == pytest.approx(record["simple"]) for record in metrics(plain_run))


def test_the_first_sheet_is_the_source_and_all_share_their_noise(full_run, pipelines, tmp_path):
    """Sheets start from the seed's noise, so `sample` of the source with that seed gives the first one."""
    out = tmp_path / "out"
    source = load_model(pipelines("pixel_dropout"))
    expected = to_pil(draw_from(source, 2, seed=0, num_inference_steps=FAST["num_inference_steps"]))
    sheet = pixels(full_run / "samples" / "step_000000")
    assert len(sheet) == FAST["num_validation_images"]
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(sheet, expected, strict=True))
    succeeds("sample", full_run, "--num-images", "2", "--seed", "0", "--output-dir", out)
    last = pixels(full_run / "samples" / "step_000004")
    assert all(np.array_equal(a, b) for a, b in zip(pixels(out), last, strict=True))


@pytest.mark.parametrize(("name", "side"), [("full_run", 16), ("lora_run", 32)])
def test_the_result_is_an_ordinary_pipeline(name, side, request):
    pipeline = DiffusionPipeline.from_pretrained(request.getfixturevalue(name) / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.unet) is UNet2DModel
    images = pipeline(batch_size=2, num_inference_steps=2).images
    assert [image.size for image in images] == [(side, side)] * 2


def test_lora_file_is_the_difference_of_the_result_to_the_source(lora_run, pipelines):
    with safe_open(lora_run / "lora.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "rank": "2", "lora_alpha": "2"}
    lora = load_file(lora_run / "lora.safetensors")
    source, result = (load_file(folder / WEIGHTS) for folder in (pipelines("latent_v"), lora_run / "pipeline"))
    assert source.keys() == result.keys()
    changed = {name for name in source if not torch.equal(source[name], result[name])}
    assert changed
    for key in (key for key in lora if key.endswith("lora_A.weight")):
        name = key.removesuffix("lora_A.weight") + "weight"
        a, b = lora[key], lora[key.replace("lora_A", "lora_B")]
        delta = (b.flatten(1) @ a.flatten(1)).view_as(source[name])  # alpha = rank
        torch.testing.assert_close(result[name], source[name] + delta)
        changed.discard(name)
    assert not changed


def test_training_changes_the_weights(full_run, pipelines):
    source, result = (load_file(folder / WEIGHTS) for folder in (pipelines("pixel_dropout"), full_run / "pipeline"))
    assert not all(torch.equal(source[name], result[name]) for name in source)


def test_sample_draws_so_many_pictures_that_follow_from_the_seed(full_run, tmp_path):
    drawn = {}
    for name, count, seed in (("a", 5, 1), ("b", 5, 1), ("fewer", 3, 1), ("c", 5, 2)):
        out = tmp_path / name
        result = succeeds("sample", full_run, "--num-images", count, "--seed", seed, "--output-dir", out)
        assert result.out == f"{out}\n"
        assert sorted(path.name for path in out.iterdir()) == [f"{index:05d}.png" for index in range(count)]
        drawn[name] = list(tree(out).items())
    assert sorted(drawn["a"]) == sorted(drawn["b"])
    for few, many in zip(pixels(tmp_path / "fewer"), pixels(tmp_path / "a"), strict=False):
        assert abs(few.astype(int) - many.astype(int)).max() <= 1, "another batch size may round differently"
    assert not set(drawn["a"]) & set(drawn["c"])


def test_sample_takes_a_pipeline_folder(full_run, tmp_path):
    succeeds("sample", full_run / "pipeline", "--num-images", "1", "--output-dir", tmp_path / "out")
    (image,) = pixels(tmp_path / "out")
    assert image.shape == (16, 16, 3)
