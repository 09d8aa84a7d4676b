"""LoRA layers that compute weight and adapter together, there and back; the weight is frozen."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from domainstudio.models.frozen import has_plain_padding

ADAPTER = "default"
"""peft's name of an adapter that was given none."""

Gradients = tuple[Tensor | None, ...]


class _Rows(torch.autograd.Function):
    """x Wᵀ + bias + scale (x Aᵀ) Bᵀ, (..., in) -> (..., out), with A (rank, in) and B (out, rank)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.flatten(0, -2)
        low = rows @ a.T
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.shape, ctx.scale = x.shape, scale
        return linear(rows, weight, bias).addmm_(low, b.T, alpha=scale).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Gradients:
        (into_y,), (rows, low, weight, a, b) = grad_outputs, ctx.saved_tensors
        into_y = into_y.flatten(0, -2)
        into_low = (into_y @ b).mul_(ctx.scale)
        into_x = (into_y @ weight).addmm_(into_low, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return into_x, None, None, into_low.T @ rows, (into_y.T @ low).mul_(ctx.scale), None


class _Places(torch.autograd.Function):
    """W * x + bias + scale B (A * x), (N, in, H, W) -> (N, out, H', W'); B (out, rank, 1, 1) acts at each place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, *how: Any
    ) -> Tensor:
        y, low = conv2d(x, weight, bias, *how), conv2d(x, a, None, *how)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale, ctx.how = scale, how
        b = b.flatten(1)
        if y.is_contiguous():
            y.flatten(2).baddbmm_(b.expand(len(x), -1, -1), low.flatten(2), alpha=scale)
        else:  # channels last
            rows, low_rows = (each.permute(0, 2, 3, 1) for each in (y, low))
            rows.view(-1, len(b)).addmm_(low_rows.flatten(0, 2), b.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Gradients:
        (into_y,), (x, low, weight, a, b), how = grad_outputs, ctx.saved_tensors, ctx.how
        places = into_y.flatten(2)
        into_low = b.flatten(1).T.expand(len(x), -1, -1).bmm(places).mul_(ctx.scale).view(low.shape)
        into_b = (places @ low.flatten(2).mT).sum(0).mul_(ctx.scale).view(b.shape)
        asked = ctx.needs_input_grad[0]
        into_x, into_a = _convolution_backward(into_low, x, a, how, asked, True)
        if asked:
            into_x += _convolution_backward(into_y, x, weight, how, True, False)[0]
        return into_x, None, None, into_a, into_b, None, *[None] * len(how)


def _convolution_backward(into_y: Tensor, x: Tensor, weight: Tensor, how: Any, for_x: bool, for_weight: bool) -> Any:
    """Gradients of a convolution's input and weight in one call, which `torch.nn.grad` computes apart."""
    masks = [for_x, for_weight, False]
    return torch.ops.aten.convolution_backward(into_y, x, weight, None, *how, False, [0, 0], 1, masks)[:2]


class FusedLinear(lora.Linear):
    """W x + scale B A x, (..., in) -> (..., out)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: D102
        if _is_off(self):
            return self.base_layer(x)
        if not _can_fuse(self, x):
            return super().forward(x, *args, **kwargs)
        return _Rows.apply(*_parts(self, x))  # pyright: ignore


class FusedConv2d(lora.Conv2d):
    """W * x + scale B A * x, (N, in, H, W) -> (N, out, H', W')."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: D102
        if _is_off(self):
            return self.base_layer(x)
        if not _can_fuse(self, x):
            return super().forward(x, *args, **kwargs)
        layer: Any = self.base_layer
        return _Places.apply(*_parts(self, x), layer.stride, layer.padding, layer.dilation)  # pyright: ignore


def _is_off(layer: Any) -> bool:
    """Whether the layer is what it was without an adapter."""
    return layer.disable_adapters and not layer.merged


def _can_fuse(layer: Any, x: Tensor) -> bool:
    """Whether the adapter, which is on, is apart from the weight and computes in the weight's precision."""
    same = layer.lora_A[ADAPTER].weight.dtype == layer.base_layer.weight.dtype
    known = same or torch.is_autocast_enabled(x.device.type)
    return known and not layer.merged and not torch.compiler.is_compiling()


def _parts(layer: Any, x: Tensor) -> tuple[Any, ...]:
    """x, W, its bias, A, B, the scale; in autocast's precision where that is on."""
    base, a, b = layer.base_layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    tensors = (x, base.weight, base.bias, a, b)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    return *tensors, layer.scaling[ADAPTER]


def fuse(network: nn.Module) -> None:
    """From now on, peft's LoRA layers in `network` compute weight and adapter in one operation of autograd's.

    It writes the adapter's part onto the weight's, there and back, and keeps nothing but x and A x. Outputs and
    gradients stay the same but for the last digits. Of peft's own linear layers and 2D convolutions with frozen
    weights, one adapter and no dropout; others (of quantised weights, in groups, padded otherwise than with zeros)
    stay as they are.
    """
    for layer in network.modules():
        if type(layer) is lora.Linear:
            layer.__class__ = FusedLinear
        elif type(layer) is lora.Conv2d and layer.base_layer.groups == 1 and has_plain_padding(layer.base_layer):
            layer.__class__ = FusedConv2d
