"""CLIP and DINOv2, on tiny networks of their classes with random weights, against transformers' own processors."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from domainstudio.errors import MissingWeights, UserError
from domainstudio.evaluation import foundation, metrics
from domainstudio.evaluation.evaluate import Evaluator
from domainstudio.evaluation.protocol import Protocol

TEXTS = ["a red hat", "a dog", "a"]


def pictures(num: int, seed: int, px: int = 32) -> torch.Tensor:
    return torch.rand(num, 3, px, px, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["projection_dim"] = 12
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=16, **ends, **sizes)
    vision = CLIPVisionConfig(image_size=24, patch_size=8, **sizes)
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def test_clip_pictures_and_texts_share_a_space(clip):
    model, images = CLIPModel.from_pretrained(clip).eval(), pictures(3, 0, px=24)
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (foundation.OPENAI_CLIP_MEAN, foundation.OPENAI_CLIP_STD))
    with torch.no_grad():
        expected = model(
            pixel_values=((images + 1) / 2 - mean) / std, **tokenizer(TEXTS, padding=True, return_tensors="pt")
        )
    ours, texts = foundation.load_clip_images(clip)(images), foundation.embed_texts(TEXTS, clip, batch_size=2)
    assert torch.allclose(ours, expected.image_embeds, atol=1e-5)
    assert torch.allclose(texts, expected.text_embeds, atol=1e-5)
    assert torch.allclose(ours.norm(dim=1), torch.ones(3))
    assert metrics.prompt_alignment(ours, texts) == pytest.approx(
        float(F.cosine_similarity(expected.image_embeds, expected.text_embeds).mean()), abs=1e-5
    )


def test_long_texts_are_cut(clip):
    assert torch.equal(foundation.embed_texts(["a " * 14], clip), foundation.embed_texts(["a " * 40], clip))


def test_dino_is_its_class_token(dino):
    model, images = Dinov2Model.from_pretrained(dino).eval(), pictures(2, 0, px=224)
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model(torch.from_numpy((((images + 1) / 2).numpy() - mean) / std).float()).last_hidden_state[:, 0]
    network = foundation.load_dino_images(dino)
    assert torch.allclose(network(images), expected, atol=1e-5)
    assert network.prepared(pictures(1, 0)).shape == (1, 3, 224, 224)


def test_networks_that_are_not_here_or_of_another_kind_are_told(clip, dino):
    for load in (foundation.load_clip_images, foundation.load_dino_images, lambda n: foundation.embed_texts(TEXTS, n)):
        with pytest.raises(MissingWeights, match="fetch it with: hf download nobody/nothing"):
            load("nobody/nothing")
    with pytest.raises(UserError, match="is no CLIPVisionModelWithProjection: it lacks"):
        foundation.load_clip_images(dino)


@pytest.mark.usefixtures("stubs")
def test_an_evaluation_looks_through_them_when_asked(clip, dino):
    training, reference, images = pictures(3, 0), pictures(9, 1), pictures(5, 2)
    evaluator = Evaluator(training, reference, Protocol(clip=clip, dino=dino), source=images * 0.1 - 0.9)
    prompts = ["a dog", "a cat", "a hat", "a red hat", "a"]
    measured = evaluator.evaluate(images, prompts)
    assert measured.reasons == {"density": measured.reasons["density"], "coverage": measured.reasons["density"]}
    see = foundation.load_clip_images(clip)
    ours, theirs, trained = see(images), see(reference), see(training)
    assert measured.cmmd == pytest.approx(1e3 * metrics.gaussian_distance(ours, theirs), rel=1e-4)
    assert measured.clip_image == pytest.approx(metrics.alignment(ours, trained), rel=1e-5)
    texts = foundation.embed_texts(prompts, clip)
    assert measured.clip_text == pytest.approx(metrics.prompt_alignment(ours, texts), rel=1e-4)
    see = foundation.load_dino_images(dino)
    assert measured.fd_dino == pytest.approx(metrics.frechet_distance(see(images), see(reference)), rel=1e-3)
    assert clip in measured.clip_protocol
    assert dino in measured.dino_protocol
    unprompted = evaluator.evaluate(images)
    assert (unprompted.clip_text, unprompted.cmmd) == (None, measured.cmmd)
    assert evaluator.real().cmmd != measured.cmmd
    with pytest.raises(UserError, match="4 prompts for 5 images"):
        evaluator.evaluate(images, prompts[:4])
