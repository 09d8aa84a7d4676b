"""Attention over pictures returns them in the layout in which it was given them."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from domainstudio.models.layout import keep_layout


def attention(**given: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(8, heads=2, dim_head=4, norm_num_groups=2, bias=True, **given)


def test_pictures_come_back_as_they_were_given():
    plain, kept = attention(residual_connection=True), attention(residual_connection=True)
    keep_layout(nn.Sequential(kept))
    x = torch.randn(2, 8, 4, 4)
    assert not plain(x).is_contiguous()
    assert kept(x).is_contiguous()
    assert torch.equal(kept(x), plain(x))
    last = x.to(memory_format=torch.channels_last)
    assert kept(last).is_contiguous(memory_format=torch.channels_last)


def test_attention_over_tokens_is_left_alone():
    layer = attention()
    keep_layout(nn.Sequential(layer))
    assert not layer._forward_hooks


@pytest.mark.parametrize("name", ["pixel_epsilon", "latent_v"])
def test_convolutions_of_a_loaded_model_see_contiguous_pictures(models, name):
    model = models(name)
    strays: list[str] = []

    def watch(name: str) -> Any:
        def look(_: nn.Module, given: tuple[Any, ...]) -> None:
            if not given[0].is_contiguous():
                strays.append(name)

        return look

    networks = [model.network] if name == "pixel_epsilon" else [model.network, model.codec.vae]
    found = [module for network in networks for module in network.modules() if isinstance(module, Attention)]
    assert found
    for network in networks:
        for path, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(watch(path))
    x = torch.randn(2, *model.sample_shape)
    model.network(x, torch.tensor([10, 500]))
    model.codec.decode(x)
    assert strays == []
