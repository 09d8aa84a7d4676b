"""What a run changes: student, optimiser and weight average."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from domainstudio.errors import UserError
from domainstudio.models.adaptation import Adaptation
from domainstudio.models.identifier import find_embedding
from domainstudio.models.sharded import ShardedAdaptation, divided_as, in_one_piece, on_main
from domainstudio.training.binding import BINDING_RATE
from domainstudio.training.config import OptimizerName, TrainConfig
from domainstudio.training.processes import Processes
from domainstudio.training.state import TrainState

EMBEDDING_RATE = 5.0
"""Times the learning rate: that of a new word's embedding, whose gradients come through the whole text encoder."""


class Training:
    """A run in progress: student, optimiser and average, the same in every process, or a part of them in each.

    `train` drives it.
    """

    def __init__(self, adaptation: Adaptation, config: TrainConfig, accelerator: Accelerator):
        self.adaptation, self.config, self.accelerator = adaptation, config, accelerator
        self.processes = Processes.of(accelerator)
        self.parameters = adaptation.parameters()
        self.taught: list[Tensor] = []
        self.step = 0
        self._start()

    def _start(self) -> None:
        """A new optimiser, and a new average of what comes."""
        embedding, config = find_embedding(self.adaptation.network), self.config
        vector = None if embedding is None else embedding.vector
        groups = [{"params": [p for p in self.parameters if p is not vector], "scale": 1.0}]
        if vector is not None:  # Prodigy finds the rate itself, and takes one for all
            scale = 1.0 if config.optimizer == "prodigy" else EMBEDDING_RATE
            groups.append({"params": [vector], "scale": scale, "weight_decay": 0.0})
        optimizer = find_optimizer(config.optimizer)
        self.optimizer = self.accelerator.prepare_optimizer(
            optimizer(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        )
        self.average = [p.detach().clone() for p in self.parameters] if config.use_ema else []

    @property
    def is_binding(self) -> bool:
        """Whether the next step ties to the identifier what was learned."""
        return self.step >= self.config.learning_steps

    def begin_binding(self) -> None:
        """From here on the student is its average, which is what it learns from, too."""
        self._put(self.average)
        self.taught = [p.detach().clone() for p in self.parameters]
        self._start()

    def state(self) -> TrainState:
        """A snapshot that shares the tensors; of a student in parts, the main process alone is given them."""
        scaler = self.accelerator.scaler
        return TrainState(
            self.step,
            self.adaptation.state(),
            [on_main(tensor) for tensor in self.average],
            _each_tensor(self.optimizer.state_dict(), lambda _, tensor: on_main(tensor)),
            scaler.state_dict() if scaler else {},
            self.taught,
        )

    def load(self, state: TrainState) -> None:
        """Continues from a checkpoint.

        Raises:
            UserError: if it was written with other EMA settings.
        """
        if bool(state.average) != self.config.use_ema:
            raise UserError("the checkpoint and the recipe disagree on use_ema; resume with the run's own config.toml")
        self.step = state.step
        self.adaptation.load_state(state.student)
        self.average, self.taught = (
            [divided_as(held, tensor) for held, tensor in zip(self.parameters, tensors, strict=True)] if tensors else []
            for tensors in (state.average, state.taught)
        )
        optimised = [p for group in self.optimizer.param_groups for p in group["params"]]

        def divided(index: int, kept: Tensor) -> Tensor:
            held = optimised[index]
            return divided_as(held, kept) if kept.shape == held.shape else kept

        self.optimizer.load_state_dict(_each_tensor(state.optimizer, divided))
        if state.scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one batch."""
        in_parts = isinstance(self.adaptation, ShardedAdaptation)
        self.accelerator.backward(loss * self.processes.count if in_parts else loss)  # parts are averaged, not added

    @torch.no_grad()
    def update(self) -> float:
        """One optimiser step; returns the gradient norm before clipping."""
        self.processes.sum_gradients(self.parameters)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        assert norm is not None
        config = self.config
        done, steps, factor = self.step, config.learning_steps, 1.0
        if self.is_binding:
            done, steps = done - steps, config.binding_steps
            factor = BINDING_RATE * (1 - done / steps)
        rate = config.learning_rate * min(1.0, (done + 1) / max(1, config.lr_warmup_steps)) * factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)  # which older checkpoints lack
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.average:
            decay = config.ema_decay or min(ema_decay(steps), (done + 1) / (done + 11))
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.lerp_(parameter, 1 - decay)
        return in_one_piece(norm).item()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The student, holding its averaged weights inside; its own come back after. Every process enters.

        A compiled one runs as it is written inside: what observers draw has other shapes, each of which would be
        compiled again.
        """
        own = [p.detach().clone() for p in self.parameters] if self.average else []
        self._put(self.average)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield self.adaptation.whole()
        finally:
            self._put(own)

    @contextmanager
    def before_binding(self) -> Iterator[nn.Module]:
        """The student as it was when binding began, without gradients."""
        network, own = self.adaptation.network, [p.data for p in self.parameters]
        training = network.training
        network.eval()
        self._point(self.taught)
        try:
            with torch.no_grad():
                yield network
        finally:
            self._point(own)
            torch.clear_autocast_cache()  # which knows weights by their name, not by what they hold
            network.train(training)

    def _point(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=False):
            parameter.copy_(value)


def _each_tensor(state: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """An optimiser's state with every tensor changed, which `change` is given after its parameter's number."""
    kept = {
        index: {name: change(index, value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": kept}


def ema_decay(steps: int) -> float:
    """Averages over about the last 15 % of the steps: a fixed 0.9999 would keep a short run at its source."""
    return min(0.9999, 1 - 1 / max(1.0, 0.15 * steps))


def find_optimizer(name: OptimizerName) -> Callable[..., torch.optim.Optimizer]:
    """The class of an optimiser.

    Raises:
        UserError: if its package is not installed.
    """
    try:
        match name:
            case "adamw":
                return partial(torch.optim.AdamW, fused=True)
            case "adamw8bit":
                from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

                return AdamW8bit
            case "prodigy":
                from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports]

                return partial(Prodigy, safeguard_warmup=True)
    except ImportError as error:
        raise UserError(
            f"optimizer {name} needs the package {error.name}: pip install 'domainstudio[optimizers]'"
        ) from error
    raise ValueError(name)
