import dataclasses
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel

from domainstudio.diffusion.schedule import DiscreteSchedule, FlowSchedule
from domainstudio.errors import UserError
from domainstudio.models.codec import PixelCodec, VaeCodec
from domainstudio.models.load import fast_scheduler, load_model

FACTS = {
    "pixel_epsilon": ("epsilon", PixelCodec, False),
    "pixel_learned": ("epsilon", PixelCodec, True),
    "pixel_v": ("v", PixelCodec, False),
    "pixel_x0": ("x0", PixelCodec, False),
    "pixel_flow": ("flow", PixelCodec, False),
    "pixel_dropout": ("epsilon", PixelCodec, False),
    "latent_epsilon": ("epsilon", VaeCodec, False),
    "latent_v": ("v", VaeCodec, False),
    "latent_flow": ("flow", VaeCodec, False),
}


@pytest.mark.parametrize("name", FACTS)
def test_each_kind_of_pipeline_is_recognised(pipelines, name):
    model = load_model(str(pipelines(name)))
    prediction, codec, learned = FACTS[name]
    assert (model.prediction, type(model.codec), model.learned_variance) == (prediction, codec, learned)
    assert isinstance(model.schedule, FlowSchedule if prediction == "flow" else DiscreteSchedule)
    latent = codec is VaeCodec
    assert (model.resolution, model.sample_shape) == ((32, (4, 16, 16)) if latent else (16, (3, 16, 16)))
    encoded = model.codec.encode(torch.zeros(2, 3, model.resolution, model.resolution))
    assert model.codec.draw(encoded, torch.Generator()).shape == (2, *model.sample_shape)


@pytest.mark.parametrize("name", ["pixel_dropout", "latent_v"])
def test_a_loaded_model_is_frozen_float32_and_in_eval_mode(pipelines, name):
    network = load_model(pipelines(name)).network
    assert not network.training
    assert {(p.requires_grad, p.dtype) for p in network.parameters()} == {(False, torch.float32)}


def test_loading_leaves_progress_bars_and_logging_as_they_were(pipelines):
    from diffusers.utils import logging

    logger = logging.get_logger("diffusers.pipelines.pipeline_loading_utils")
    level, bars = logger.level, logging.is_progress_bar_enabled()
    load_model(pipelines("latent_v"))
    assert (logger.level, logging.is_progress_bar_enabled()) == (level, bars)


@pytest.fixture
def folder(pipelines, tmp_path) -> Path:
    """A pipeline to spoil."""
    return Path(shutil.copytree(pipelines("pixel_epsilon"), tmp_path / "spoiled"))


def _edit(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_without_an_index_is_named(tmp_path):
    with pytest.raises(UserError, match=r"not a diffusers pipeline folder.*model_index\.json"):
        load_model(tmp_path)


def test_a_missing_name_is_told_with_what_is_allowed(tmp_path):
    with pytest.raises(UserError, match=r"no_such_model.*pipeline folder, a hub name"):
        load_model(tmp_path / "no_such_model")


@pytest.mark.parametrize("index", ["{", json.dumps({"_class_name": "NoSuchPipeline", "_diffusers_version": "0.40"})])
def test_an_unusable_index_is_told(folder, index):
    (folder / "model_index.json").write_text(index)
    with pytest.raises(UserError, match="could not load a diffusers pipeline"):
        load_model(folder)


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_a_missing_part_is_told(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match="could not load a diffusers pipeline"):
        load_model(folder)


def test_cut_off_weights_are_told(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not load a diffusers pipeline"):
        load_model(folder)


@pytest.mark.parametrize("scheduler", ["ScoreSdeVeScheduler", "EDMEulerScheduler"])
def test_an_unsupported_scheduler_is_named_with_the_supported_ones(folder, scheduler):
    getattr(diffusers, scheduler)().save_pretrained(folder / "scheduler")
    _edit(folder / "model_index.json", scheduler=["diffusers", scheduler])
    with pytest.raises(UserError, match=rf"{scheduler}.*not supported; use.*DDIM.*FlowMatchEuler"):
        load_model(folder)


def test_an_unsupported_prediction_is_named(folder):
    _edit(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    with pytest.raises(UserError, match="prediction_type='flow_prediction' is not supported"):
        load_model(folder)


def test_a_denoiser_of_another_kind_is_named(tmp_path, models):
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        num_layers=1,
        sample_size=4,
        norm_num_groups=4,
        num_embeds_ada_norm=2,
    )
    DiTPipeline(transformer, models("latent_epsilon").codec.vae, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a DiTPipeline.*UNet2DModel"):
        load_model(tmp_path)


def test_oblong_models_are_refused(folder):
    _edit(folder / "unet" / "config.json", sample_size=[16, 24])
    with pytest.raises(UserError, match=r"sample_size is \[16, 24\]; a single number"):
        load_model(folder)


@pytest.mark.parametrize("name", [name for name, facts in FACTS.items() if facts[0] != "flow"])
def test_clean_estimates_are_those_of_the_diffusers_scheduler(models, name):
    model = models(name)
    scheduler = type(model.pipeline.scheduler).from_config(model.pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    model = dataclasses.replace(model, schedule=DiscreteSchedule(scheduler.alphas_cumprod))
    network, times = model.network.double(), [999, 0, 420, 37]
    x_t = torch.randn(4, *model.sample_shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        estimate = model.estimate(network, x_t, torch.tensor(times))
        raw = network(x_t, torch.tensor(times)).sample
    for i, t in enumerate(times):
        step = scheduler.step(raw[i : i + 1], t, x_t[i : i + 1])
        torch.testing.assert_close(estimate.x0[i : i + 1], step.pred_original_sample, rtol=1e-9, atol=1e-9)
    halves = [estimate.output] if estimate.variance is None else [estimate.output, estimate.variance]
    assert torch.equal(torch.cat(halves, 1), raw)


@pytest.mark.parametrize("name", ["pixel_flow", "latent_flow"])
def test_a_flows_clean_estimate_is_one_euler_step_to_the_end(models, name):
    model = models(name)
    x_t = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    levels = [0.9, 0.25, 0.01]
    with torch.no_grad():
        estimate = model.estimate(model.network, x_t, torch.tensor(levels) * 1000)
    for i, level in enumerate(levels):
        scheduler = fast_scheduler(model)
        scheduler.set_timesteps(sigmas=[level])
        end = scheduler.step(estimate.output[i : i + 1], scheduler.timesteps[0], x_t[i : i + 1]).prev_sample
        torch.testing.assert_close(estimate.x0[i : i + 1], end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FACTS)
def test_the_fast_scheduler_has_the_models_noise_levels_and_prediction(models, name):
    model = models(name)
    own, fast = model.pipeline.scheduler, fast_scheduler(model)
    assert fast is not own
    if model.prediction != "flow":
        assert isinstance(fast, diffusers.DDIMScheduler)
        assert torch.equal(fast.alphas_cumprod, own.alphas_cumprod)
        for setting in ("prediction_type", "clip_sample"):
            assert fast.config[setting] == own.config[setting]
        fast.set_timesteps(10)
        assert fast.timesteps[0] == 999, "sampling starts at the noisiest level"
