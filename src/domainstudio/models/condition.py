"""What a text-to-image model is told of a picture: prompts, as its text encoder states them."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from domainstudio.errors import UserError


class Condition(Protocol):
    """Turns prompts into what the denoiser takes beside x_t and t."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(N, ...) of N prompts."""
        ...


class TextCondition:
    """The states of a frozen text encoder, (N, L, D), computed once a prompt."""

    def __init__(self, tokenizer: Any, text_encoder: nn.Module):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The last hidden states of every prompt.

        Raises:
            UserError: if a prompt is longer than the text encoder reads.
        """
        device = next(self.text_encoder.parameters()).device
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                ids = tokenize(self.tokenizer, [prompt]).to(device)
                self._known[prompt] = self.text_encoder(ids).last_hidden_state[0]
        return torch.stack([self._known[prompt] for prompt in prompts])


class TokenCondition:
    """The tokens of prompts, (N, L) integers, for a network that has its text encoder within (`TextDenoiser`)."""

    def __init__(self, tokenizer: Any, device: torch.device):
        self.tokenizer, self.device = tokenizer, device

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The padded tokens of every prompt.

        Raises:
            UserError: if a prompt is longer than the text encoder reads.
        """
        return tokenize(self.tokenizer, prompts).to(self.device)


class TextDenoiser(nn.Module):
    """A UNet and its text encoder as one network, so that both can be adapted."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Any:
        """The UNet's output for x_t (B, C, h, w), t (B,) and the tokens (B, L) of the prompts."""
        return self.unet(x_t, t, self.text_encoder(tokens).last_hidden_state)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """(N, L) tokens, padded to the length that the text encoder was trained with.

    Raises:
        UserError: if a prompt is longer than that: what is cut off would be ignored in silence.
    """
    limit = tokenizer.model_max_length
    ids = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=False).input_ids
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) > limit:
            raise UserError(f"the prompt {prompt!r} has {len(tokens)} tokens; the model reads {limit}: shorten it")
    return torch.tensor(ids)
