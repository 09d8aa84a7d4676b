"""Frozen convolutions that gradients go through: what they saw need not be kept for the way back."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input


class _FrozenConvolution(torch.autograd.Function):
    """A convolution with a gradient for its input alone, which needs the weight and not the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.how = x.shape, x.dtype, how
        return conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = grad_outputs, ctx.saved_tensors
        into = conv2d_input(ctx.shape, weight.to(gradient.dtype), gradient, *ctx.how)
        return into.to(ctx.dtype), *[None] * (2 + len(ctx.how))


class FrozenConv2d(nn.Conv2d):
    """Any convolution; as long as its weight is frozen it keeps no input. Compiled, it is as PyTorch has it."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or not has_plain_padding(self) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super()._conv_forward(input, weight, bias)
        how = self.stride, self.padding, self.dilation, self.groups
        return _FrozenConvolution.apply(input, weight, bias, *how)  # pyright: ignore[reportReturnType]


def has_plain_padding(convolution: Any) -> bool:
    """Whether it pads with as many zeros as a number says, which the convolution itself does."""
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def keep_no_inputs(network: nn.Module) -> None:
    """From now on, the frozen convolutions of `network` keep nothing of what they see, in training.

    PyTorch keeps the input of every convolution for its weight's gradient, of frozen ones too. Outputs and gradients
    stay the same.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = FrozenConv2d
