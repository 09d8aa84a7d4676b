"""Attention over pictures that hands them on as it got them."""

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


def keep_layout(network: nn.Module) -> None:
    """From now on, attention over pictures in `network` returns them in the layout in which it was given them.

    diffusers gives them back with channels last in memory, so that the convolutions behind bring their whole weights
    (and in training those weights' gradients) into that layout in every pass. Numbers stay the same but for the last
    digits.
    """
    for module in network.modules():
        if isinstance(module, Attention) and module.residual_connection:
            module.register_forward_hook(_as_given)


def _as_given(attention: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.contiguous() if all(x.is_contiguous() for x in given[:1]) else output
