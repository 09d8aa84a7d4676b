"""A diffusion model as the training loop sees it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from domainstudio.diffusion.prediction import Prediction, to_x0
from domainstudio.diffusion.schedule import NoiseSchedule
from domainstudio.errors import UserError
from domainstudio.models.codec import Codec, VaeCodec
from domainstudio.models.condition import Condition, TextCondition, TextDenoiser, TokenCondition
from domainstudio.models.identifier import add_identifier, train_identifier


@dataclass(frozen=True)
class Estimate:
    """What a network says about a noised picture; all (B, C, h, w) in model space."""

    output: Tensor
    x0: Tensor
    variance: Tensor | None
    """The variance half of a learned-variance network's output, about [-1, 1]."""
    features: Tensor | None = None
    """What its middle block says, (B, D, h', w'), where it was asked for."""

    def split(self, sizes: list[int]) -> "list[Estimate]":
        """Of consecutive parts of the batch."""
        columns = (self.output, self.x0, self.variance, self.features)
        parts = ([None] * len(sizes) if column is None else column.split(sizes) for column in columns)
        return [Estimate(*part) for part in zip(*parts, strict=True)]


@dataclass(frozen=True)
class DiffusionModel:
    """A loaded pipeline with the facts the loss needs. The network is passed in, so student and source share this."""

    pipeline: DiffusionPipeline
    network: nn.Module
    schedule: NoiseSchedule
    prediction: Prediction
    codec: Codec
    condition: Condition | None
    """None for unconditional models."""
    learned_variance: bool
    resolution: int
    """Side of the pictures in pixels."""
    sample_shape: tuple[int, int, int]
    """(C, h, w) of model space."""

    def add_identifier(self, word: str) -> None:
        """Teaches the model one token more, `<word>`.

        Raises:
            UserError: if it has that token already, or takes no prompts.
        """
        if not isinstance(self.condition, TextCondition):
            raise UserError(f"{word} is a word for text-to-image models; this one is unconditional")
        add_identifier(self.condition.tokenizer, self.condition.text_encoder, word)

    def with_text_encoder(self, trained_word: str | None = None) -> "DiffusionModel":
        """The same model with its text encoder within the network, so that it is adapted too.

        Args:
            trained_word: an identifier whose embedding is trained beside adapters.

        Raises:
            UserError: if it has none.
        """
        if not isinstance(self.condition, TextCondition):
            raise UserError("train_text_encoder needs a text-to-image model; this one is unconditional")
        if trained_word is not None:
            train_identifier(self.condition.tokenizer, self.condition.text_encoder, trained_word)
        device = next(self.network.parameters()).device
        network = TextDenoiser(self.network, self.condition.text_encoder)
        return replace(self, network=network, condition=TokenCondition(self.condition.tokenizer, device))

    def checkpoint_gradients(self) -> None:
        """From now on, training passes keep few activations and compute them again in the backward pass."""
        parts: list[Any] = [self.network]
        if isinstance(self.network, TextDenoiser):
            parts = [self.network.unet, self.network.text_encoder]
        # In diffusers, in transformers, and in transformers before version 5.
        names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
        for part in parts:
            next(getattr(part, name) for name in names if hasattr(part, name))()
        if isinstance(self.codec, VaeCodec):
            self.codec.checkpointing = True

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor | None:
        """What `estimate` is to be told of pictures with these prompts, (N, ...); None for unconditional models."""
        return None if self.condition is None else self.condition.encode(prompts)

    def estimate(self, network: nn.Module, x_t: Tensor, t: Tensor, told: Tensor | None = None) -> Estimate:
        """Runs `network` on x_t (B, C, h, w) at times t (B,), told what `encode_prompts` gave, (B, ...)."""
        return self.read(network(x_t, t, told).sample, x_t, t)

    def read(self, output: Tensor, x_t: Tensor, t: Tensor) -> Estimate:
        """What a network's output (B, C or 2 C, h, w) for x_t at times t says."""
        variance = None
        if self.learned_variance:
            output, variance = output.chunk(2, dim=1)
        alpha, sigma = self.schedule.levels(t)
        return Estimate(output, to_x0(self.prediction, output, x_t, alpha, sigma), variance)


@contextmanager
def middle_block(network: nn.Module) -> Iterator[list[Any]]:
    """Context with a list of what the UNet's middle block returns inside, (B, D, h', w') a pass."""
    unet = network.unet if isinstance(network, TextDenoiser) else network
    seen: list[Any] = []
    hook = unet.get_submodule("mid_block").register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()
