"""Fused LoRA layers give what peft's give."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from domainstudio.models.adaptation import LoraAdaptation
from domainstudio.models.fused_lora import FusedConv2d, FusedLinear, fuse

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "linear without bias, of sequences": (lambda: nn.Linear(6, 8, bias=False), (3, 5, 6)),
    "convolution": (lambda: nn.Conv2d(6, 8, 3, padding=1), (3, 6, 7, 5)),
    "strided": (lambda: nn.Conv2d(6, 8, 3, stride=2), (3, 6, 9, 9)),
    "1x1 without bias": (lambda: nn.Conv2d(6, 8, 1, bias=False), (3, 6, 4, 4)),
    "channels last": (lambda: nn.Conv2d(6, 8, 3, padding=1), (3, 6, 7, 5)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def with_adapter(layer: nn.Module) -> Any:
    """`layer` with a LoRA that is not zero, as peft has it."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    network = inject_adapter_in_model(config, nn.Sequential(layer).requires_grad_(False))
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return network


def fused(network: Any) -> Any:
    ours = copy.deepcopy(network)
    fuse(ours)
    return ours


def pair(name: str) -> tuple[Any, Any, Tensor]:
    make, shape = LAYERS[name]
    theirs = with_adapter(make())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return theirs, fused(theirs), x.to(memory_format=torch.channels_last) if name == "channels last" else x


def answer(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What a network makes of x, and the gradients of x and of its parameters."""
    x = x.clone().requires_grad_(True)
    y = network(x)
    asked = [x, *(p for p in network.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), asked)]


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@layers
def test_outputs_and_gradients_are_those_of_peft(name):
    theirs, ours, x = pair(name)
    assert type(ours[0]) in (FusedLinear, FusedConv2d)
    wanted, found = answer(theirs, x), answer(ours, x)
    assert len(found) == 4
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert found[0].stride() == wanted[0].stride()


@layers
def test_in_bf16_too(name):
    theirs, ours, x = pair(name)
    exact = answer(theirs, x)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = answer(theirs, x), answer(ours, x)

    def error(answers: list[Tensor]) -> float:
        return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(answers, exact, strict=True))

    assert found[0].dtype == torch.bfloat16
    assert error(found) < max(2e-2, 1.2 * error(wanted))


@layers
def test_one_operation_adds_the_adapter(name):
    theirs, ours, x = pair(name)
    names = []
    for network in (theirs, ours):
        with torch.no_grad(), Operations() as seen:
            network(x)
        names.append(seen.names)
    assert "mul" in names[0]
    assert not {"mul", "add", "clone"} & set(names[1])
    assert sum(name in ("addmm_", "baddbmm_") for name in names[1]) == 1


@layers
def test_only_the_input_and_what_the_adapter_made_of_it_are_kept(name):
    _, ours, x = pair(name)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        y = ours(x.clone().requires_grad_(True))
    own = {tensor.untyped_storage().data_ptr() for tensor in ours.parameters()}
    sizes = {tensor.numel() for tensor in kept if tensor.untyped_storage().data_ptr() not in own}
    assert sizes == {x.numel(), y.numel() // y.shape[1 if y.dim() == 4 else -1] * 2}


@layers
def test_a_fresh_adapter_changes_no_bit(name):
    make, shape = LAYERS[name]
    layer = make()
    x = torch.randn(shape)
    expected = layer(x).detach()
    network: Any = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(layer))
    fuse(network)
    assert isinstance(network[0], FusedLinear | FusedConv2d)
    assert torch.equal(network(x).detach(), expected)


def test_off_or_merged_it_is_the_layer():
    theirs, ours, x = pair("convolution")
    layer = ours[0]
    layer.enable_adapters(False)
    assert torch.equal(ours(x), layer.get_base_layer()(x))
    layer.enable_adapters(True)
    apart = ours(x)
    layer.merge()
    torch.testing.assert_close(ours(x), apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apart, theirs(x), rtol=1e-5, atol=1e-5)


def test_weights_in_half_precision_are_left_to_peft():
    theirs = with_adapter(nn.Linear(6, 8).bfloat16())
    theirs[0].lora_A.float()
    theirs[0].lora_B.float()
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert torch.equal(fused(theirs)(x), theirs(x))


@pytest.mark.parametrize("given", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_other_paddings_are_left_to_peft(given):
    theirs = with_adapter(nn.Conv2d(6, 8, 3, **given))
    ours = fused(theirs)
    assert type(ours[0]) is lora.Conv2d
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(ours(x), theirs(x))


def test_an_input_without_gradient_gets_none():
    theirs, ours, x = pair("convolution")
    for network in (theirs, ours):
        network(x).square().sum().backward()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)


def test_convolutions_in_groups_are_left_to_peft():
    with pytest.warns(UserWarning, match="groups"):
        theirs = with_adapter(nn.Conv2d(6, 8, 3, groups=2))
    ours = fused(theirs)
    assert type(ours[0]) is lora.Conv2d
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["pixel_epsilon", "latent_v"])
def test_a_whole_student_learns_as_with_peft(models, name):
    model = models(name)
    ours = LoraAdaptation(model.network, 4, 4.0, 0).network.train()
    for parameter in ours.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    theirs = copy.deepcopy(ours)
    modules: list[Any] = list(theirs.modules())
    for layer in modules:
        if isinstance(layer, FusedLinear):
            object.__setattr__(layer, "__class__", lora.Linear)
        elif isinstance(layer, FusedConv2d):
            object.__setattr__(layer, "__class__", lora.Conv2d)
    x = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for network in (theirs, ours):
        network(x, torch.tensor([10, 500, 900])).sample.square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    assert len(gradients[0]) > 20
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
