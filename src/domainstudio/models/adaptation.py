"""Who is student and who is source: full fine-tuning keeps a frozen copy, LoRA is the source with its adapters off."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from domainstudio.errors import UserError
from domainstudio.models.condition import TextDenoiser
from domainstudio.models.frozen import keep_no_inputs
from domainstudio.models.fused_lora import fuse
from domainstudio.models.identifier import find_embedding

LoraLayers = Literal["all", "attention"]
EMBEDDING = "identifier"
"""Its place among the trained tensors."""


class Adaptation(Protocol):
    """A student network, the frozen source it came from, and what of the student is trained."""

    network: nn.Module

    def source(self) -> AbstractContextManager[nn.Module]:
        """Context with the source network: no gradients, eval mode, the original weights bit for bit."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in a fixed order."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Puts back what `state` returned."""
        ...

    def whole(self) -> nn.Module:
        """The student for those that call it alone: itself, if no process holds a part of it. Every process asks."""
        ...

    def compile(self) -> None:
        """From now on, both networks are compiled when first called, once for each shape and mode."""
        ...


class FullAdaptation:
    """All weights are trained; the source is a frozen copy (twice the weights in memory)."""

    def __init__(self, network: nn.Module, keep_source: bool = True):
        self._source = copy.deepcopy(network).requires_grad_(False).eval() if keep_source else None
        self.network = network.requires_grad_(True)

    @contextmanager
    def source(self) -> Iterator[nn.Module]:
        """The frozen copy."""
        assert self._source is not None, "built with keep_source=False"
        with torch.no_grad():
            yield self._source

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter."""
        return list(self.network.parameters())

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the network."""
        return self.network.state_dict()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Loads every tensor of the network."""
        self.network.load_state_dict(state)

    def whole(self) -> nn.Module:
        """The network."""
        return self.network

    def compile(self) -> None:
        """Student and source."""
        for network in filter(None, (self.network, self._source)):
            network.compile(dynamic=False)


class LoraAdaptation:
    """Low-rank adapters on attention and convolutions; the source is the same network with the adapters off.

    The embedding of a new word is trained beside them; the source is never told that word.

    Source: Hu et al. 2021 (arXiv 2106.09685): W + (lora_alpha / rank) B A.
    """

    def __init__(self, network: nn.Module, rank: int, lora_alpha: float, seed: int, layers: LoraLayers = "all"):
        self.rank, self.lora_alpha = rank, lora_alpha
        targets = lora_targets(network, layers)
        network.requires_grad_(False)
        devices = [p.device for p in network.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            config = LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=targets)  # pyright: ignore[reportArgumentType]
            self.network = inject_adapter_in_model(config, network)
            self.embedding = find_embedding(self.network)
            if self.embedding is not None:
                self.embedding.vector.requires_grad_(True)
            for parameter in self.parameters():
                parameter.data = parameter.data.float()  # of a network in half precision, too
        keep_no_inputs(self.network)
        fuse(self.network)
        self._every_module: list[nn.Module] = list(self.network.modules())
        self._layers = [m for m in self._every_module if isinstance(m, BaseTunerLayer)]

    @contextmanager
    def source(self) -> Iterator[nn.Module]:
        """The network with its adapters off; close it before backward()."""
        training = self.network.training
        self._switch(adapters=False, training=False)
        try:
            with torch.no_grad():
                yield self.network
        finally:
            self._switch(adapters=True, training=training)

    def _switch(self, adapters: bool, training: bool) -> None:
        """What `train()` and peft's `enable_adapters()` do: those take milliseconds, and this happens twice a step."""
        for module in self._every_module:
            object.__setattr__(module, "training", training)
        for layer in self._layers:
            object.__setattr__(layer, "_disable_adapters", not adapters)

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, and a new word's embedding."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def state(self) -> dict[str, Tensor]:
        """The adapters' tensors, under peft's names, and a new word's embedding."""
        word = {} if self.embedding is None else {EMBEDDING: self.embedding.vector}
        return {**self.layers(), **word}

    def layers(self) -> dict[str, Tensor]:
        """The adapters' tensors alone."""
        return get_peft_model_state_dict(self.network)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Loads the adapters' tensors.

        Raises:
            UserError: if they belong to another network or rank.
        """
        own = self.state()
        if {name: tensor.shape for name, tensor in state.items()} != {name: own[name].shape for name in own}:
            raise UserError("the LoRA does not fit: it has another rank, or belongs to another model")
        set_peft_model_state_dict(self.network, {name: state[name] for name in state if name != EMBEDDING})
        if self.embedding is not None:
            with torch.no_grad():
                self.embedding.vector.copy_(state[EMBEDDING])

    def whole(self) -> nn.Module:
        """The network, with its adapters."""
        return self.network

    def merged(self) -> nn.Module:
        """A plain copy for an ordinary pipeline folder: the adapters' product in the weights, peft's wrappers gone."""
        plain = copy.deepcopy(self.network)
        for name, module in list(plain.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                parent = plain.get_submodule(name.rpartition(".")[0]) if "." in name else plain
                setattr(parent, name.rpartition(".")[2], module.get_base_layer())
        if isinstance(plain, TextDenoiser) and (embedding := find_embedding(plain)) is not None:
            plain.text_encoder.set_input_embeddings(embedding.plain())  # pyright: ignore[reportCallIssue]
        return plain

    def compile(self) -> None:
        """The one network; with its adapters on and off it is compiled apart."""
        self.network.compile(dynamic=False)


def lora_targets(network: nn.Module, layers: LoraLayers) -> list[str]:
    """Names of the layers that get an adapter: of a text encoder, the projections of its attention."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]

    def wanted(name: str) -> bool:
        if name.startswith("text_encoder."):
            return ".self_attn." in name
        return not name.endswith("conv_out") and (layers == "all" or ".attentions." in name)

    return [name for name in names if wanted(name)]
