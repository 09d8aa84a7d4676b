"""What a text-to-image model is told of prompts."""

import pytest
import torch

from domainstudio.errors import UserError
from domainstudio.models.condition import TokenCondition, tokenize

pytest_plugins = "text_kit"

PROMPTS = ["a portrait of a woman", "red hair, xyz style", "", "a portrait of a woman"]


@pytest.mark.parametrize("name", ["sd1_epsilon", "sd2_v"])
def test_prompts_are_encoded_as_the_pipeline_does(text_models, name):
    model = text_models(name)
    theirs = [model.pipeline.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in PROMPTS]
    ours = model.encode_prompts(PROMPTS)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=0, atol=1e-6)
    assert torch.equal(ours[0], ours[3])
    assert (ours[0] - ours[1]).abs().mean() > 0.1


def test_a_prompt_is_encoded_once(text_models):
    model, read = text_models(), []
    model.condition.text_encoder.register_forward_pre_hook(lambda _, args: read.append(args[0].clone()))
    first = model.encode_prompts(PROMPTS)
    again = model.encode_prompts(["a dog", *PROMPTS])
    assert torch.equal(again[1:], first)
    expected = tokenize(model.condition.tokenizer, [*PROMPTS[:3], "a dog"])
    assert torch.equal(torch.cat(read), expected)


@pytest.mark.parametrize("with_text_encoder", [False, True])
def test_a_prompt_that_would_be_cut_off_is_refused(text_models, with_text_encoder):
    """The tiny model reads 16 tokens, of which two mark beginning and end."""
    model = text_models()
    if with_text_encoder:
        model = model.with_text_encoder()
    assert len(model.encode_prompts(["a " * 14])) == 1
    with pytest.raises(UserError, match=r"'a a .*' has 17 tokens; the model reads 16: shorten it"):
        model.encode_prompts(["a dog", "a " * 15])


@pytest.mark.parametrize("name", ["sd1_epsilon", "sd2_v"])
def test_a_denoiser_with_its_text_encoder_says_what_the_unet_says(text_models, name):
    model = text_models(name)
    x_t, t = torch.randn(4, *model.sample_shape), torch.tensor([0, 300, 600, 999])
    expected = model.estimate(model.network, x_t, t, model.encode_prompts(PROMPTS))
    joined = model.with_text_encoder()
    assert isinstance(joined.condition, TokenCondition)
    tokens = joined.encode_prompts(PROMPTS)
    assert (tokens.shape, tokens.dtype) == ((4, 16), torch.long)
    estimate = joined.estimate(joined.network, x_t, t, tokens)
    torch.testing.assert_close(estimate.output, expected.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(estimate.x0, expected.x0, rtol=1e-5, atol=1e-4)
    other = joined.estimate(joined.network, x_t, t, tokens.flip(0)).output
    assert (other - estimate.output)[1:3].abs().max() > 1e-3, "the network listens"


def test_an_unconditional_model_has_no_text_encoder_to_adapt(models):
    model = models("pixel_epsilon")
    assert model.encode_prompts(["a portrait"]) is None
    with pytest.raises(UserError, match="train_text_encoder needs a text-to-image model; this one is unconditional"):
        model.with_text_encoder()
