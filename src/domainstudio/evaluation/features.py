"""The metric networks of LPIPS (AlexNet, VGG16) and of FID and KID (Inception).

Images are (N, 3, H, W) in [-1, 1].
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainstudio.evaluation.weights import find_weights, read_arrays

Backbone = Literal["alex", "vgg"]
Progress = Callable[[str, int, int], None]

_POOL_3X3, _POOL_2X2 = nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 2)
# One row a convolution: (in, out, kernel, stride, padding, pool before it, feature taken after its ReLU).
_ALEXNET = (
    (3, 64, 11, 4, 2, None, True),
    (64, 192, 5, 1, 2, _POOL_3X3, True),
    (192, 384, 3, 1, 1, _POOL_3X3, True),
    (384, 256, 3, 1, 1, None, True),
    (256, 256, 3, 1, 1, None, True),
)
_VGG16 = tuple(
    (i, o, 3, 1, 1, _POOL_2X2 if pool else None, tap)
    for i, o, pool, tap in (
        (3, 64, False, False),
        (64, 64, False, True),
        (64, 128, True, False),
        (128, 128, False, True),
        (128, 256, True, False),
        (256, 256, False, False),
        (256, 256, False, True),
        (256, 512, True, False),
        (512, 512, False, False),
        (512, 512, False, True),
        (512, 512, True, False),
        (512, 512, False, False),
        (512, 512, False, True),
    )
)


class Lpips(nn.Module):
    """LPIPS as an embedding: `lpips(a, b) = ‖embed(a) - embed(b)‖²`, so a table of distances is one matrix product.

    Every feature map is normalised over its channels and scaled by sqrt(head weight / (h w)).

    Source: Zhang et al. 2018 (arXiv 1801.03924), version 0.1 with learned linear heads.
    Trap: LPIPS depends on the input size; always name backbone and size.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone):
        super().__init__()
        rows = _ALEXNET if backbone == "alex" else _VGG16
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, k, s, p) for i, o, k, s, p, _, _ in rows)
        self.pools = [row[5] for row in rows]
        self.taps = [row[6] for row in rows]
        widths = [row[1] for row in rows if row[6]]
        self.heads = nn.ParameterList(torch.ones(width) for width in widths)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, D) embedding."""
        h, parts, heads = (images - self.shift) / self.scale, [], iter(self.heads)
        for convolution, pool, tap in zip(self.convolutions, self.pools, self.taps, strict=True):
            h = F.relu(convolution(h if pool is None else pool(h)))
            if tap:
                unit = h / (h.square().sum(1, keepdim=True) + 1e-10).sqrt()
                head = next(heads).clamp(min=0) / (h.shape[2] * h.shape[3])
                parts.append((unit * head.sqrt().view(1, -1, 1, 1)).flatten(1))
        return torch.cat(parts, 1)


def load_lpips(backbone: Backbone) -> Lpips:
    """LPIPS with the published weights.

    Raises:
        MissingWeights: if they are not on this machine.
    """
    arrays = read_arrays(find_weights(f"lpips-{backbone}"))
    layers = arrays["AlexNet_0" if backbone == "alex" else "VGG16_0"]
    network = Lpips(backbone)
    with torch.no_grad():
        for k, convolution in enumerate(network.convolutions):
            layer = layers[f"Conv_{k}"]
            kernel, bias = torch.from_numpy(layer["kernel"]), torch.from_numpy(layer["bias"])
            convolution.load_state_dict({"weight": kernel.permute(3, 2, 0, 1), "bias": bias})
        for k, head in enumerate(network.heads):
            head.copy_(torch.from_numpy(arrays[f"NetLinLayer_{k}"]["Conv_0"]["kernel"]).flatten())
    return network


class Inception(nn.Module):
    """The 2048 pooled features of the Inception that defined FID, which is not the one torchvision ships.

    Images are resized once, straight to 299 x 299, by antialiased bicubic interpolation in floating point (the
    choice of clean-fid), then clamped to [-1, 1]. The network was trained on (byte - 128) / 128, so white is 127/128.

    Source: Heusel et al. 2017 (arXiv 1706.08500); Parmar et al. 2022 (arXiv 2104.11222) for the resizing.
    Trap: resizing, and saving as JPEG, move FID by whole points: prepare both sets alike.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        to: Any = network.to  # torch's stubs know no memory_format here
        self.network = to(memory_format=torch.channels_last)  # a sixth less time on a CPU
        for parameter in self.parameters():  # a script module has no requires_grad_
            parameter.requires_grad = False
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 2048), all >= 0."""
        if images.shape[-2:] != (299, 299):
            images = F.interpolate(images, (299, 299), mode="bicubic", antialias=True, align_corners=False)
        return self.network((images.clamp(-1, 1) + 1) * (255 / 256) - 1)


def load_inception() -> Inception:
    """The Inception of FID and KID with the published weights.

    Raises:
        MissingWeights: if they are not on this machine.
    """
    path = find_weights("inception")
    with warnings.catch_warnings():  # TorchScript is deprecated, but it is how these weights are published
        warnings.simplefilter("ignore", DeprecationWarning)
        return Inception(torch.jit.load(str(path), map_location="cpu"))


@torch.inference_mode()
def embed(
    network: nn.Module,
    images: Tensor,
    batch_size: int = 32,
    px: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """(N, 3, H, W) in [-1, 1] -> (N, D) features, computed in batches and left on the network's device.

    Args:
        network: an `Lpips`, an `Inception`, or any module of that shape.
        images: at least one.
        batch_size: memory only; the result does not depend on it.
        px: resize to px x px first (antialiased bilinear, once) if the size differs; None leaves images alone.
        progress: told (done, total) after every batch.
    """
    device = next((p.device for p in network.parameters()), images.device)
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(device, torch.float32)
        if px and batch.shape[-2:] != (px, px):
            batch = F.interpolate(batch, (px, px), mode="bilinear", antialias=True, align_corners=False)
        parts.append(network(batch))
        if progress:
            progress(min(start + batch_size, len(images)), len(images))
    return torch.cat(parts)
