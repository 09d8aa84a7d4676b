"""A new word: one token, trained alone, and in files as other tools read it."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import give_size

from domainstudio.errors import UserError
from domainstudio.models.adaptation import EMBEDDING, LoraAdaptation
from domainstudio.models.identifier import EMBEDDING_FILE, find_embedding, find_identifier
from domainstudio.models.load import load_model, save_pipeline
from domainstudio.models.lora_files import load_lora, pass_through_file, save_diffusers_lora, save_kohya_lora

pytest_plugins = "text_kit"

WORD = "<ink>"
PROMPTS = ["a portrait, <ink> style", "a red dog"]
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

both = pytest.mark.parametrize("name", ["sd1_epsilon", "sd2_v"])


def with_word(model):
    model.add_identifier(WORD)
    return model


def adapted(model):
    """A model with the word, adapters and embedding of some size, as training leaves them."""
    model = with_word(model).with_text_encoder(WORD)
    adaptation = LoraAdaptation(model.network, 3, 5.0, seed=0)
    give_size(adaptation)
    model.network.eval()
    return model, adaptation


@torch.no_grad()
def outputs(model, network=None):
    told = model.encode_prompts(PROMPTS)
    return model.estimate(network or model.network, NOISE, torch.tensor([300, 700]), told).output


@pytest.mark.parametrize(
    ("prompts", "word"),
    [
        (["a portrait"], None),
        (["a portrait in <ink> style", "<ink>"], "<ink>"),
        (["{caption}, <wet-ink>"], "<wet-ink>"),
        (["1 < 2 and 3 > 2", "a <b c>", "{<a|b>}"], None),
    ],
)
def test_new_words_are_found(prompts, word):
    assert find_identifier(prompts) == word


def test_two_new_words_are_refused():
    with pytest.raises(ValueError, match="<ink>, <dog> are several new words"):
        find_identifier(["a <ink> portrait", "a <dog>"])


@both
def test_a_new_word_is_one_token_that_begins_as_the_word_within(text_models, name):
    plain, model = text_models(name), text_models(name)
    model.add_identifier("<portrait>")
    tokenizer, table = model.condition.tokenizer, model.condition.text_encoder.get_input_embeddings().weight
    token = tokenizer.convert_tokens_to_ids("<portrait>")
    for prompt in ("a <portrait> of", "<portrait>, a dog", "a dog,<portrait>"):
        assert tokenizer(prompt).input_ids.count(token) == 1
    known = plain.condition.tokenizer("portrait", add_special_tokens=False).input_ids
    before = plain.condition.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(table[token], before[known].mean(0))
    assert torch.equal(table[: len(before)], before)
    prompts = ["a portrait of a woman", ""]
    assert torch.equal(model.encode_prompts(prompts), plain.encode_prompts(prompts))


def test_a_word_that_the_model_knows_is_refused(text_models):
    model = with_word(text_models())
    with pytest.raises(UserError, match="knows <ink> already"):
        model.add_identifier(WORD)


@both
def test_the_word_alone_of_all_embeddings_is_trained(text_models, name):
    model = with_word(text_models(name)).with_text_encoder(WORD)
    source = outputs(model)
    adaptation = LoraAdaptation(model.network, 3, 3.0, seed=0)
    embedding = find_embedding(adaptation.network)
    table = embedding.frozen.weight.clone()
    assert any(p is embedding.vector for p in adaptation.parameters())
    optimizer = torch.optim.SGD(adaptation.parameters(), lr=1.0)
    outputs_with_gradients = model.estimate(
        adaptation.network, NOISE, torch.tensor([300, 700]), model.encode_prompts(PROMPTS)
    ).output
    outputs_with_gradients.square().sum().backward()
    assert embedding.vector.grad.abs().sum() > 0
    optimizer.step()
    assert torch.equal(embedding.frozen.weight, table)
    with adaptation.source() as network, torch.no_grad():
        plain = model.estimate(network, NOISE, torch.tensor([300, 700]), model.encode_prompts(["a dog", ""])).output
    untouched = with_word(text_models(name))
    assert torch.equal(
        plain,
        untouched.estimate(
            untouched.network, NOISE, torch.tensor([300, 700]), untouched.encode_prompts(["a dog", ""])
        ).output,
    )
    assert source.shape == plain.shape


def test_its_state_comes_back(text_models):
    model, adaptation = adapted(text_models())
    state, expected = {name: tensor.clone() for name, tensor in adaptation.state().items()}, outputs(model)
    assert state[EMBEDDING].shape == (model.pipeline.text_encoder.config.hidden_size,)
    other = with_word(text_models()).with_text_encoder(WORD)
    fresh = LoraAdaptation(other.network, 3, 5.0, seed=1)
    fresh.load_state(state)
    other.network.eval()
    assert torch.equal(outputs(other), expected)
    torch.testing.assert_close(outputs(model, adaptation.merged().eval()), expected, rtol=1e-4, atol=1e-5)


@both
def test_every_format_gives_the_same_pictures(text_models, tmp_path, name):
    model, adaptation = adapted(text_models(name))
    expected = outputs(model)
    file = save_diffusers_lora(adaptation, tmp_path)
    assert list(load_file(tmp_path / EMBEDDING_FILE)) == [WORD]
    merged = text_models(name)
    load_lora(merged, file)
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)
    save_pipeline(merged.pipeline, tmp_path / "merged")
    reopened = load_model(tmp_path / "merged")
    torch.testing.assert_close(outputs(reopened), expected, rtol=1e-4, atol=1e-5)
    assert (expected[0] - outputs(with_word(text_models(name)))[0]).abs().mean() > 0.01, "it matters"

    save_kohya_lora(file, tmp_path / "kohya.safetensors", 3, 5.0)
    pictures = drawn(reopened.pipeline)
    for lora in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        pipeline = text_models(name).pipeline
        pipeline.load_lora_weights(tmp_path, weight_name=lora)
        pipeline.load_textual_inversion(tmp_path / EMBEDDING_FILE)
        torch.testing.assert_close(drawn(pipeline), pictures, rtol=0, atol=1e-5)


@torch.no_grad()
def drawn(pipeline):
    """Pictures (2, 16, 16, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    return torch.from_numpy(
        pipeline(PROMPTS, latents=NOISE, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    )


def test_previews_pass_through_both_files(text_models, tmp_path):
    model, adaptation = adapted(text_models())
    expected = outputs(model)
    pass_through_file(adaptation, tmp_path)
    assert torch.equal(outputs(model), expected)
    (tmp_path / EMBEDDING_FILE).unlink()
    save_diffusers_lora(adaptation, tmp_path)
    assert (tmp_path / EMBEDDING_FILE).exists()
