"""Large pretrained networks that some measurements look through, where the user has them: CLIP and DINOv2."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, Dinov2Model
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from domainstudio.errors import MissingWeights, UserError
from domainstudio.quiet import quiet

CLIP = "openai/clip-vit-large-patch14-336"
"""The network that CMMD is defined with."""
DINO = "facebook/dinov2-large"
"""The network that FD-DINOv2 is defined with."""
DINO_PX = 224


class ImageEmbedding(nn.Module):
    """A vision transformer as the metrics use it. Pictures are resized to its size (antialiased bicubic, once)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, px: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network, self.px = network.eval().requires_grad_(False), px
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def prepared(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 3, px, px) as the network was trained."""
        images = (images + 1) / 2
        if images.shape[-2:] != (self.px, self.px):
            size = (self.px, self.px)
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return (images - self.mean) / self.std


class ClipImages(ImageEmbedding):
    """CLIP's picture side."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, D) of length 1."""
        return F.normalize(self.network(self.prepared(images)).image_embeds, dim=1)


class DinoImages(ImageEmbedding):
    """DINOv2's class token after the last normalisation."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, D)."""
        return self.network(self.prepared(images)).pooler_output


def load_clip_images(name_or_path: str = CLIP) -> ClipImages:
    """CLIP's picture side from a folder or the local cache of the hub; nothing is downloaded.

    Raises:
        MissingWeights: if it is not on this machine.
        UserError: if it is another kind of network.
    """
    network = _load_network(CLIPVisionModelWithProjection, name_or_path)
    return ClipImages(network, network.config.image_size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def load_dino_images(name_or_path: str = DINO) -> DinoImages:
    """DINOv2, likewise."""
    return DinoImages(_load_network(Dinov2Model, name_or_path), DINO_PX, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@torch.inference_mode()
def embed_texts(texts: Sequence[str], name_or_path: str = CLIP, batch_size: int = 32) -> Tensor:
    """CLIP's text side: (N, D) of length 1, in the space of `ClipImages`. Longer texts than it reads are cut.

    Raises:
        MissingWeights: if it is not on this machine.
    """
    network = _load_network(CLIPTextModelWithProjection, name_or_path).eval()
    tokenizer = _local(AutoTokenizer, name_or_path)
    parts = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt")
        parts.append(F.normalize(network(tokens.input_ids, tokens.attention_mask).text_embeds, dim=1))
    return torch.cat(parts)


def _load_network(kind: Any, name_or_path: str) -> Any:
    with quiet():
        network, found = _local(kind, name_or_path, output_loading_info=True)
    if missing := found["missing_keys"]:  # which would be left at random
        raise UserError(
            f"{name_or_path} is no {kind.__name__}: it lacks {len(missing)} weights, {min(missing)} among them"
        )
    return network


def _local(kind: Any, name_or_path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name_or_path, local_files_only=True, **options)
    except OSError as error:
        raise MissingWeights(
            f"{name_or_path} is not on this machine: give its folder, or fetch it with: hf download {name_or_path}"
        ) from error
