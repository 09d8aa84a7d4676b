"""Frozen convolutions give what they gave and keep less."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from domainstudio.models.adaptation import LoraAdaptation
from domainstudio.models.frozen import keep_no_inputs

KINDS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": (1, 0)},
    "dilated, in groups": {"kernel_size": 3, "dilation": 2, "groups": 2},
    "without bias": {"kernel_size": 1, "bias": False},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "same": {"kernel_size": 3, "padding": "same"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def seeing(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What a network makes of x, the gradient that comes back to x, and the tensors kept in between."""
    kept: list[Tensor] = []
    x = x.clone().requires_grad_(True)
    hidden = x * 2
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        y = network(hidden)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, [tensor for tensor in kept if tensor.shape == x.shape]


def pair(kind: str, frozen: bool = True) -> tuple[nn.Module, nn.Module]:
    """A convolution as PyTorch has it, and the same that is to keep no inputs."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 6, **KINDS[kind])).requires_grad_(not frozen)
    spared = copy.deepcopy(plain)
    keep_no_inputs(spared)
    return plain, spared


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))


@kinds
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_the_same(kind, autocast, x):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (y, gradient, _), (ours, own, _) = (seeing(network, x) for network in pair(kind))
    assert torch.equal(ours, y)
    assert torch.equal(own, gradient)
    assert own.dtype == gradient.dtype


@kinds
def test_nothing_is_kept_where_it_can_be_helped(kind, x):
    (_, _, kept), (_, _, spared) = (seeing(network, x) for network in pair(kind))
    helped = kind not in ("reflecting", "same")
    assert (len(spared) == 0) is helped
    assert helped is False or len(kept) > 0


def test_a_trained_convolution_is_as_before(x):
    plain, spared = pair("plain", frozen=False)
    seeing(plain, x)
    _, _, kept = seeing(spared, x)
    assert len(kept) == 1
    for theirs, ours in zip(plain.parameters(), spared.parameters(), strict=True):
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def bytes_kept(function, *given) -> tuple[Tensor, int]:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function(*given)
    return output, sum(kept.values())


def as_written(network: nn.Module) -> nn.Module:
    """A copy with PyTorch's own convolutions."""
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    return plain


@pytest.mark.parametrize("name", ["pixel_epsilon", "latent_v"])
def test_a_student_with_adapters_keeps_less(models, name):
    model = models(name)
    student = LoraAdaptation(model.network, 4, 4.0, 0, "attention").network.train()
    x = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    told = torch.tensor([10, 500, 900])
    gradients, kept = [], []
    for network in (as_written(student), student):
        output, size = bytes_kept(lambda *given, network=network: network(*given).sample, x, told)
        output.square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
        kept.append(size)
    assert kept[1] < kept[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_a_decoder_keeps_less(models):
    codec = models("latent_epsilon").codec
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    kept, gradients = [], []
    for vae in (as_written(codec.vae), codec.vae):
        latents = x0.clone().requires_grad_(True)
        output, size = bytes_kept(lambda z, vae=vae: vae.decode(z).sample, latents)
        output.square().mean().backward()
        kept.append(size)
        gradients.append(latents.grad)
    assert kept[1] < 0.8 * kept[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
