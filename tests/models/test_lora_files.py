"""LoRA files as other tools read them: diffusers' own loader is the judge."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_text import give_size

from domainstudio.errors import UserError
from domainstudio.models.adaptation import LoraAdaptation
from domainstudio.models.load import load_model, save_pipeline
from domainstudio.models.lora_files import load_lora, save_diffusers_lora, save_kohya_lora

pytest_plugins = "text_kit"

RANK, ALPHA = 3, 5.0
PROMPTS = ["a portrait of a woman", "a red dog"]
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

parts = pytest.mark.parametrize("with_text_encoder", [False, True], ids=["unet", "both"])


def adapted(model, with_text_encoder, layers="attention", rank=RANK):
    """The model with adapters of some size in it, as training leaves them."""
    if with_text_encoder:
        model = model.with_text_encoder()
    adaptation = LoraAdaptation(model.network, rank, ALPHA, seed=0, layers=layers)
    give_size(adaptation)
    model.network.eval()
    return model, adaptation


@torch.no_grad()
def outputs(model):
    """What the denoiser says with two prompts."""
    return model.estimate(model.network, NOISE, torch.tensor([300, 700]), model.encode_prompts(PROMPTS)).output


@torch.no_grad()
def drawn(pipeline):
    """Pictures (2, 16, 16, 3) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    return torch.from_numpy(
        pipeline(PROMPTS, latents=NOISE, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    )


@pytest.mark.parametrize(
    ("name", "with_text_encoder", "layers"),
    [("sd1_epsilon", True, "attention"), ("sd2_v", False, "attention"), ("sd2_v", True, "all")],
)
def test_every_format_gives_the_same_pictures(text_models, tmp_path, name, with_text_encoder, layers):
    model, adaptation = adapted(text_models(name), with_text_encoder, layers)
    expected, plain = outputs(model), text_models(name)
    assert (expected - outputs(plain)).abs().mean() > 0.01, "the LoRA matters"

    files = [save_diffusers_lora(adaptation, tmp_path), tmp_path / "kohya.safetensors", tmp_path / "bare.safetensors"]
    save_kohya_lora(files[0], files[1], RANK, ALPHA, {"ss_seed": "1"})
    save_kohya_lora(files[0], files[2], RANK, ALPHA)
    merged = text_models(name)
    load_lora(merged, files[0])
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)
    save_pipeline(merged.pipeline, tmp_path / "merged")
    reopened = load_model(tmp_path / "merged")
    torch.testing.assert_close(outputs(reopened), expected, rtol=1e-4, atol=1e-5)

    pictures = drawn(reopened.pipeline)
    assert (pictures - drawn(plain.pipeline)).abs().mean() > 0.01
    for file in files:
        pipeline = text_models(name).pipeline
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        torch.testing.assert_close(drawn(pipeline), pictures, rtol=0, atol=1e-5)


def test_a_kohya_file_is_merged_like_any(text_models, tmp_path):
    model, adaptation = adapted(text_models(), True)
    file, merged = tmp_path / "kohya.safetensors", text_models()
    save_kohya_lora(save_diffusers_lora(adaptation, tmp_path), file, RANK, ALPHA)
    load_lora(merged, file)
    torch.testing.assert_close(outputs(merged), outputs(model), rtol=1e-4, atol=1e-5)


@parts
def test_the_adaptation_merged_is_the_lora_merged(text_models, tmp_path, with_text_encoder):
    _, adaptation = adapted(text_models(), with_text_encoder)
    merged = text_models()
    load_lora(merged, save_diffusers_lora(adaptation, tmp_path))
    ours = adaptation.merged()
    pairs = [(getattr(ours, "unet", ours), merged.pipeline.unet)]
    if with_text_encoder:
        pairs.append((ours.text_encoder, merged.pipeline.text_encoder))
    for one, other in pairs:
        theirs = other.state_dict()
        assert one.state_dict().keys() == theirs.keys(), "no adapter is left in either"
        for key, tensor in one.state_dict().items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6)


@parts
def test_the_diffusers_file_says_rank_and_alpha(text_models, tmp_path, with_text_encoder):
    _, adaptation = adapted(text_models(), with_text_encoder)
    file = save_diffusers_lora(adaptation, tmp_path)
    assert file.name == "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    prefixes = ["unet", "text_encoder"][: 1 + with_text_encoder]
    assert {key.split(".")[0] for key in settings} == set(prefixes)
    assert all((settings[f"{part}.r"], settings[f"{part}.lora_alpha"]) == (RANK, ALPHA) for part in prefixes)
    keys = load_file(file).keys()
    assert {key.split(".")[0] for key in keys} == set(prefixes)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight" in keys
    text_key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    assert (text_key in keys) == with_text_encoder


@parts
def test_the_kohya_file_has_its_names_and_an_alpha_for_each_layer(text_models, tmp_path, with_text_encoder):
    _, adaptation = adapted(text_models(), with_text_encoder)
    diffusers_file, file = save_diffusers_lora(adaptation, tmp_path), tmp_path / "kohya.safetensors"
    save_kohya_lora(diffusers_file, file, RANK, ALPHA, {"ss_seed": "7"})
    tensors, theirs = load_file(file), load_file(diffusers_file)
    layers = {key.partition(".")[0] for key in tensors}
    assert len(layers) == len(theirs) / 2
    assert tensors.keys() == {f"{x}.{y}" for x in layers for y in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert all(tensors[f"{layer}.alpha"].item() == ALPHA for layer in layers)
    down = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    q = "text_model.encoder.layers.1.self_attn.q_proj"
    known = {f"lora_unet_{down.replace('.', '_')}": f"unet.{down}"}
    if with_text_encoder:
        known["lora_te_text_model_encoder_layers_1_self_attn_q_proj"] = f"text_encoder.{q}"
    for ours, other in known.items():
        assert torch.equal(tensors[f"{ours}.lora_down.weight"], theirs[f"{other}.lora_A.weight"])
        assert torch.equal(tensors[f"{ours}.lora_up.weight"], theirs[f"{other}.lora_B.weight"])
    assert {layer.split("_")[1] for layer in layers} == ({"unet", "te"} if with_text_encoder else {"unet"})
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"ss_network_dim": "3", "ss_network_alpha": "5.0", "ss_seed": "7"}


def test_a_kohya_file_without_metadata_says_nothing(text_models, tmp_path):
    _, adaptation = adapted(text_models(), False)
    save_kohya_lora(save_diffusers_lora(adaptation, tmp_path), tmp_path / "bare.safetensors", RANK, ALPHA)
    with safe_open(tmp_path / "bare.safetensors", "pt") as opened:
        assert opened.metadata() is None


def test_a_lora_of_another_model_does_not_fit(text_models, tmp_path):
    """2.x projects with linear layers where 1.x has convolutions."""
    _, adaptation = adapted(text_models("sd2_v"), False)
    file, model = save_diffusers_lora(adaptation, tmp_path), text_models("sd1_epsilon")
    with pytest.raises(UserError, match=r"the LoRA .*pytorch_lora_weights\.safetensors does not fit the model"):
        load_lora(model, file)


@pytest.mark.parametrize("content", ["nothing", "other layers", "another kind of model", "cut off"])
def test_what_is_no_lora_of_the_model_is_told(text_models, tmp_path, content):
    _, adaptation = adapted(text_models(), False)
    file, model = save_diffusers_lora(adaptation, tmp_path), text_models()
    if content == "nothing":
        file.unlink()
    elif content in ("other layers", "another kind of model"):
        layer = "unet.elsewhere" if content == "other layers" else "transformer.blocks.0.attn.to_q"
        save_file({f"{layer}.lora_A.weight": torch.ones(3, 4), f"{layer}.lora_B.weight": torch.ones(4, 3)}, file)
    else:
        file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="does not fit the model"):
        load_lora(model, file)
