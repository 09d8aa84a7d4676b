import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from tiny_models import KINDS

from domainstudio.models.sample import decode, sample, starting_noise, through_codec


def test_a_pictures_noise_depends_on_seed_and_its_number_alone():
    few, many = starting_noise((3, 4, 4), range(2), seed=7), starting_noise((3, 4, 4), range(5), seed=7)
    assert torch.equal(few, many[:2])
    everything = torch.cat([many, starting_noise((3, 4, 4), range(5), seed=8)]).flatten(1)
    assert len(everything.unique(dim=0)) == 10


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_samples_alike_whatever_the_batch_size(models, name):
    model = models(name)
    whole = sample(model, model.network, 5, seed=3, num_inference_steps=3)
    assert whole.shape == (5, *model.sample_shape)
    assert whole.isfinite().all()
    parts = sample(model, model.network, 5, seed=3, num_inference_steps=3, batch_size=2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    fewer = sample(model, model.network, 2, seed=3, num_inference_steps=3)
    torch.testing.assert_close(fewer, whole[:2], rtol=1e-4, atol=1e-4)
    assert (sample(model, model.network, 1, seed=4, num_inference_steps=3) - whole[:1]).abs().max() > 0.01


def test_sampling_repeats_bit_for_bit_and_ignores_the_global_generator(models):
    model = models("pixel_dropout")
    first = sample(model, model.network.train(), 2, num_inference_steps=3)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(sample(model, model.network.train(), 2, num_inference_steps=3), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_put_back(models, training):
    model = models("pixel_dropout")
    modes = []
    model.network.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    sample(model, model.network.train(training), 1, num_inference_steps=2)
    assert modes == [False, False]
    assert {m.training for m in model.network.modules()} == {training}


def test_progress_counts_pictures(models):
    model, seen = models("pixel_v"), []
    sample(model, model.network, 5, num_inference_steps=1, batch_size=2, progress=lambda *now: seen.append(now))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_pixels_are_those_of_the_ddim_pipeline(models):
    model = models("pixel_v")
    pipeline = DDIMPipeline(model.network, model.pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(2 * 1_000_003 + i) for i in range(3)]
    theirs = pipeline(batch_size=3, generator=generators, num_inference_steps=6, output_type="np").images
    ours = decode(model, sample(model, model.network, 3, seed=2, num_inference_steps=6))
    assert theirs.std() > 0.05
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy() / 2 + 0.5, theirs, atol=1e-5)


def test_a_flow_follows_the_straight_line_of_a_constant_velocity(models):
    model = models("pixel_flow")

    class Constant(torch.nn.Linear):
        def forward(self, x, t, told):
            assert told is None
            return type("Output", (), {"sample": torch.full_like(x, 0.25)})

    drawn = sample(model, Constant(1, 1), 2, num_inference_steps=7)
    torch.testing.assert_close(drawn, starting_noise(model.sample_shape, range(2), 0) - 0.25)


@pytest.mark.parametrize("name", ["pixel_v", "latent_v"])
def test_decoded_pictures_are_clamped_and_in_order(models, name):
    model = models(name)
    x0 = starting_noise(model.sample_shape, range(3), 0) * 5
    pictures = decode(dataclasses.replace(model, resolution=512), x0)  # two at once
    assert pictures.shape == (3, 3, model.resolution, model.resolution)
    assert not pictures.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(pictures, model.codec.decode(x0).clamp(-1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pixel_v", "latent_v"])
def test_pictures_through_the_codec_lose_what_it_loses(models, name):
    model = models(name)
    images = torch.rand(3, 3, model.resolution, model.resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1
    redrawn = through_codec(model, images)
    assert torch.equal(redrawn, through_codec(model, images))
    assert torch.equal(redrawn, images) == (name == "pixel_v")
    if name == "latent_v":
        mean, std = model.codec.encode(images).chunk(2, dim=1)
        nearest = (model.codec.decode(mean).clamp(-1, 1) - redrawn).detach().abs().mean()
        assert nearest < 0.5 * (images - redrawn).abs().mean()
        assert std.mean() > 0
