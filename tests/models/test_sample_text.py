"""Sampling from prompts: guidance, negative prompts, style guidance, and who is told what."""

import copy
import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler

from domainstudio.errors import UserError
from domainstudio.models.sample import StyleGuidance, TextGuidance, sample, starting_noise

pytest_plugins = "text_kit"

PROMPTS = ["a portrait of a woman", "a red dog", "blue hair, xyz style"]
STEPS = 5


def draw(model, guidance, num_images=3, **settings):
    return sample(model, model.network, num_images, seed=1, num_inference_steps=STEPS, guidance=guidance, **settings)


def ddim(model, output_of, num_images=3):
    """Deterministic DDIM (Song et al. 2021, eq. 12) by hand; `output_of` x_t (B, C, h, w) and t (B,) is the guided
    output."""
    scheduler = model.pipeline.scheduler
    spacing = torch.arange(STEPS, dtype=torch.float64)
    if isinstance(scheduler, DDIMScheduler):  # the model's own: "leading", from step 1 on
        times = (spacing * (1000 // STEPS) + 1).flip(0).long().tolist()
    else:  # "trailing"
        times = (1000 - spacing * 1000 / STEPS).round().long().sub(1).tolist()
    products = scheduler.alphas_cumprod.double()
    x = starting_noise(model.sample_shape, range(num_images), seed=1).double()
    for t in times:
        output = output_of(x.float(), torch.full((num_images,), t)).double()
        alpha, sigma = products[t].sqrt(), (1 - products[t]).sqrt()
        if model.prediction == "epsilon":
            x0, noise = (x - sigma * output) / alpha, output
        else:
            x0, noise = alpha * x - sigma * output, alpha * output + sigma * x
        before = products[max(t - 1000 // STEPS, 0)] if t >= 1000 // STEPS else products[0]
        x = before.sqrt() * x0 + (1 - before).sqrt() * noise
    return x.float()


def says(model, prompts, network=None):
    """The plain output with prompts, as a function of x_t and t."""
    told = model.encode_prompts(prompts)
    return lambda x, t: model.estimate(network or model.network, x, t, told).output


def disturbed(network):
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return other


def style_of(model, network, prompts, strength):
    """The style guidance away from `network`, as it was before it was adapted."""
    return StyleGuidance(dataclasses.replace(model, network=network), prompts, strength)


both = pytest.mark.parametrize("name", ["sd1_epsilon", "sd2_v"])


@both
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("negative", ["", "a man"])
@torch.no_grad()
def test_guidance_is_that_of_the_formula_and_of_diffusers(text_models, name, scale, negative):
    model = text_models(name)
    ours = draw(model, TextGuidance(PROMPTS, scale, negative))
    prompt, empty = says(model, PROMPTS), says(model, [negative] * 3)
    by_hand = ddim(model, lambda x, t: empty(x, t) + scale * (prompt(x, t) - empty(x, t)))
    torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-4)

    pipeline = model.pipeline
    if not isinstance(pipeline.scheduler, DDIMScheduler):
        settings = {"timestep_spacing": "trailing", "clip_sample": False}  # latents have no range to clip to
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    pipeline.set_progress_bar_config(disable=True)
    noise = starting_noise(model.sample_shape, range(3), seed=1)
    told = {"prompt": PROMPTS, "negative_prompt": [negative] * 3, "guidance_scale": scale}
    theirs = pipeline(**told, latents=noise, num_inference_steps=STEPS, output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_scale_one_asks_for_the_prompt_alone(text_models):
    model, asked = text_models(), []
    model.network.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    one = draw(model, TextGuidance(PROMPTS, scale=1.0))
    assert asked == [3] * STEPS
    assert torch.equal(one, draw(model, TextGuidance(PROMPTS, scale=1.0, negative_prompt="a dog")))
    asked.clear()
    draw(model, TextGuidance(PROMPTS, scale=2.0))
    assert sum(asked) == 6 * STEPS


def test_a_negative_prompt_leads_away_from_it(text_models):
    model = text_models()
    plain, negative = (draw(model, TextGuidance(PROMPTS, 4.0, words)) for words in ("", "a man"))
    assert (plain - negative).abs().max() > 1e-3
    same = draw(model, TextGuidance(["a man"], 4.0, "a man"))
    torch.testing.assert_close(same, draw(model, TextGuidance(["a man"], 1.0)), rtol=1e-4, atol=1e-4)


@both
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_style_guidance_is_that_of_the_formula(text_models, name, scale):
    model = text_models(name)
    source = disturbed(model.network)
    style = style_of(model, source, ["a portrait", "a dog", "hair"], 0.7)
    ours = draw(model, TextGuidance(PROMPTS, scale, style=style))
    prompt, empty, plain = says(model, PROMPTS), says(model, [""] * 3), says(model, style.source_prompts, source)

    def guided(x, t):
        return empty(x, t) + scale * (prompt(x, t) - empty(x, t)) + 0.7 * (prompt(x, t) - plain(x, t))

    torch.testing.assert_close(ours, ddim(model, guided), rtol=1e-4, atol=1e-4)
    assert (ours - draw(model, TextGuidance(PROMPTS, scale))).abs().max() > 1e-2


def test_a_source_that_is_the_model_pushes_nowhere(text_models):
    model = text_models()
    style = style_of(model, model.network, PROMPTS, 5.0)
    pushed = draw(model, TextGuidance(PROMPTS, 3.0, style=style))
    torch.testing.assert_close(pushed, draw(model, TextGuidance(PROMPTS, 3.0)), rtol=1e-5, atol=1e-5)


def test_one_prompt_is_meant_for_every_picture(text_models):
    model = text_models()
    source = disturbed(model.network)
    one = TextGuidance(["a dog"], 3.0, style=style_of(model, source, ["a man"], 1.0))
    each = TextGuidance(["a dog"] * 3, 3.0, style=style_of(model, source, ["a man"] * 3, 1.0))
    assert torch.equal(draw(model, one), draw(model, each))


@pytest.mark.parametrize("num", [0, 2, 4])
def test_another_number_of_prompts_is_refused(text_models, num):
    model = text_models()
    with pytest.raises(UserError, match=f"{num} prompts for 3 pictures; give one, or one a picture"):
        draw(model, TextGuidance(["a dog"] * num))
    with pytest.raises(UserError, match=f"{num} prompts for 3 pictures"):
        draw(model, TextGuidance(["a dog"], style=style_of(model, model.network, ["a dog"] * num, 1.0)))


@both
def test_a_picture_follows_from_seed_number_and_prompt_whatever_the_batch_size(text_models, name):
    model = text_models(name)
    style = style_of(model, disturbed(model.network), ["a man", "a dog", "red hair"], 0.5)
    guidance = TextGuidance(PROMPTS, 3.0, "a man", style)
    whole = draw(model, guidance)
    for size in (1, 2):
        torch.testing.assert_close(draw(model, guidance, batch_size=size), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(model, guidance), whole)
    turned = draw(model, TextGuidance(PROMPTS[::-1], 3.0, "a man", style))
    assert (turned - whole).flatten(1).abs().amax(1)[[0, 2]].min() > 1e-3


def test_a_model_with_its_text_encoder_within_draws_the_same(text_models):
    model = text_models()
    joined = model.with_text_encoder()
    guidance = TextGuidance(PROMPTS, 3.0, "a man")
    torch.testing.assert_close(draw(joined, guidance), draw(model, guidance), rtol=1e-4, atol=1e-4)


def test_prompts_are_for_text_to_image_models_and_needed_by_them(text_models, models):
    with pytest.raises(UserError, match="a text-to-image model needs a prompt"):
        draw(text_models(), None)
    with pytest.raises(UserError, match="this model takes no prompts"):
        draw(models("pixel_v"), TextGuidance(["a dog"]))
