"""LoRA layers that add what their adapter says in the product that computes it."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

ADAPTER = "default"
"""peft's name of an adapter that was given none."""


class FusedLinear(lora.Linear):
    """W x + scale B A x, (..., in) -> (..., out)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: D102
        if not _can_fuse(self, x):
            return super().forward(x, *args, **kwargs)
        return _add_rows(*_parts(self, x))


class FusedConv2d(lora.Conv2d):
    """W * x + scale B A * x, (N, in, H, W) -> (N, out, H', W'); B is a matrix at each place."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: D102
        if not _can_fuse(self, x):
            return super().forward(x, *args, **kwargs)
        y, low, weight, scale = _parts(self, x)
        if y.is_contiguous():
            return torch.baddbmm(y.flatten(2), weight.expand(len(x), -1, -1), low.flatten(2), alpha=scale).view(y.shape)
        channels_last = (0, 2, 3, 1)  # as pictures lie behind attention
        return _add_rows(y.permute(channels_last), low.permute(channels_last), weight, scale).permute(0, 3, 1, 2)


def _can_fuse(layer: Any, x: Tensor) -> bool:
    """Whether the adapter is on, apart from the weight, and computes in the weight's precision."""
    same = layer.lora_A[ADAPTER].weight.dtype == layer.get_base_layer().weight.dtype
    return not (layer.disable_adapters or layer.merged) and (same or torch.is_autocast_enabled(x.device.type))


def _parts(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """W x, A x, B as a matrix, the scale."""
    matrix = layer.lora_B[ADAPTER].weight.flatten(1)
    return layer.base_layer(x), layer.lora_A[ADAPTER](x), matrix, layer.scaling[ADAPTER]


def _add_rows(y: Tensor, low: Tensor, weight: Tensor, scale: float) -> Tensor:
    """y + scale weight low: (..., out), (..., rank), (out, rank) -> (..., out)."""
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), weight.T, alpha=scale).view(y.shape)


def fuse(network: nn.Module) -> None:
    """From now on, peft's LoRA layers in `network` take one operation where they took three: B, the scale, the sum.

    Outputs and gradients stay the same but for the last digits. Of peft's own linear layers and 2D convolutions, with
    one adapter and no dropout; others (of quantised weights, in groups) stay as they are.
    """
    for layer in network.modules():
        if type(layer) is lora.Linear:
            layer.__class__ = FusedLinear
        elif type(layer) is lora.Conv2d and layer.base_layer.groups == 1:
            layer.__class__ = FusedConv2d
