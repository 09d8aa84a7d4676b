"""Full fine-tuning of a model whose training one device cannot hold: each of several processes holds a part of it."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from domainstudio.models.adaptation import FullAdaptation


class ShardedAdaptation(FullAdaptation):
    """All weights are trained; every process holds its part of each, and of whatever is kept for each.

    A block's weights are put together for as long as it computes, so every process has to call the networks as often as
    the others. Gradients are averaged over the processes.

    Source: Zhao et al. 2023 (arXiv 2304.11277), PyTorch's FSDP2.
    """

    def __init__(self, network: nn.Module, keep_source: bool = True):
        device = next(network.parameters()).device
        self._structure = _without_weights(network)
        super().__init__(network, keep_source)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for part in filter(None, (self.network, self._source)):
            _shard(part, mesh)

    def whole(self) -> nn.Module:
        """A copy that is in one piece, on the device."""
        network = copy.deepcopy(self._structure)
        weights = {name: in_one_piece(tensor) for name, tensor in self.network.state_dict().items()}
        network.load_state_dict(weights, assign=True)
        return network.requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the network; see `on_main`."""
        return {name: on_main(tensor) for name, tensor in super().state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Loads every tensor of the network; each process is given all of them."""
        own = self.network.state_dict()
        super().load_state({name: divided_as(own[name], tensor) for name, tensor in state.items()})


def in_one_piece(tensor: Tensor) -> Tensor:
    """A tensor that processes hold in parts, on the device; any other as it is. Every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_main(tensor: Tensor) -> Tensor:
    """A tensor that processes hold in parts: to the main one all of it, on the CPU, to the others nothing.

    Any other as it is. Every process has to ask.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else torch.empty(0)


def divided_as(held: Tensor, whole: Tensor) -> Tensor:
    """`whole`, which every process has, held in parts as `held` is, where it is."""
    here = whole.to(held.device)
    return distribute_tensor(here, held.device_mesh, held.placements) if isinstance(held, DTensor) else here


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy with parameters that have a shape and take no memory."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, empty)


def _shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Block by block: what is put together at one time is one of diffusers' blocks, and what lies outside of them."""
    for name, module in network.named_modules():
        parent, _, last = name.rpartition(".")
        if last == "mid_block" or parent.rpartition(".")[2] in ("down_blocks", "up_blocks"):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
