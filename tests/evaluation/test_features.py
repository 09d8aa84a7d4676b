from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from domainstudio.errors import MissingWeights
from domainstudio.evaluation.features import Backbone, Lpips, embed, load_inception, load_lpips
from domainstudio.evaluation.metrics import pairwise_lpips
from domainstudio.evaluation.weights import SETUP, find_weights

HEADS = Path(torchmetrics.__file__).parent / "functional/image/lpips_models"


def need(name: str) -> None:
    try:
        find_weights(name)
    except MissingWeights:
        pytest.skip(f"the {name} weights are not installed: {SETUP}")


def pictures(num: int, px: int, seed: int = 0) -> Tensor:
    coarse = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (px, px), mode="bilinear")


def literal_lpips(network: Lpips, a: Tensor, b: Tensor) -> float:
    """The published formula: unit features, squared difference, weighted channels, mean over places, sum of layers."""
    taps: list[list[Tensor]] = []
    for image in (a, b):
        h, maps = (image[None] - network.shift) / network.scale, []
        for convolution, pool, tap in zip(network.convolutions, network.pools, network.taps, strict=True):
            h = F.relu(convolution(pool(h) if pool else h))
            maps += [h[0]] if tap else []
        taps.append(maps)
    total = 0.0
    for x, y, head in zip(*taps, network.heads, strict=True):
        x, y = (m / (m.square().sum(0, keepdim=True).sqrt() + 1e-10) for m in (x, y))
        total += float(((x - y).square() * head.view(-1, 1, 1)).sum(0).mean())
    return total


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_embedding_distance_is_lpips(backbone: Backbone):
    torch.manual_seed(0)
    network = Lpips(backbone)
    for head in network.heads:
        head.copy_(torch.rand_like(head))
    a, b = pictures(2, 64, seed=1), pictures(2, 64, seed=2)
    expected = torch.tensor([[literal_lpips(network, x, y) for y in b] for x in a])
    torch.testing.assert_close(pairwise_lpips(embed(network, a), embed(network, b)), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_published_lpips(backbone: Backbone):
    need(f"lpips-{backbone}")
    network = load_lpips(backbone)
    heads = torch.load(HEADS / f"{backbone}.pth", map_location="cpu", weights_only=True)
    for k, head in enumerate(network.heads):
        torch.testing.assert_close(head.data, heads[f"lin{k}.model.1.weight"].flatten())
    image = pictures(1, 64)
    faint = (image + 0.02 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    same, near, far = pairwise_lpips(embed(network, image), embed(network, torch.cat([image, faint, -image])))[0]
    assert same < 1e-4 < near < far


def test_inception_features():
    need("inception")
    inception, images = load_inception(), pictures(3, 48)
    features = embed(inception, images, batch_size=2)
    assert features.shape == (3, 2048)
    assert features.dtype == torch.float32
    assert float(features.min()) >= 0
    assert torch.linalg.vector_norm(features[0] - features[1]) > 1  # the pictures are told apart
    torch.testing.assert_close(embed(inception, images, batch_size=3), features, rtol=1e-4, atol=1e-4)


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return images.mean((2, 3))


def test_embed_batches_resizes_and_tells():
    images, told = pictures(5, 16), []
    whole = embed(Mean(), images)
    torch.testing.assert_close(whole, images.mean((2, 3)))
    parts = embed(Mean(), images, batch_size=2, progress=lambda done, total: told.append((done, total)))
    assert torch.equal(parts, whole)
    assert told == [(2, 5), (4, 5), (5, 5)]
    sizes = []
    network = nn.Identity()
    network.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[-2:])))
    embed(network, images, px=8)
    embed(network, images, px=16)
    assert sizes == [(8, 8), (16, 16)]
    stripes = torch.ones(1, 3, 16, 16)
    stripes[..., ::2] = -1  # an antialiased resize averages them; a plain one picks them
    assert embed(nn.Identity(), stripes, px=4).abs().max() < 0.2
