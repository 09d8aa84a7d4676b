"""Several processes on one run: each computes its rows of every batch, and all of them know all rows.

A loss is a function of the global batch, and so it stays: what is computed picture by picture (a network, a decoder) is
spread over the processes and put together again; all that follows is done by every process alike. docs/decisions.md.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.tensor import DTensor

from domainstudio.errors import UserError
from domainstudio.training.state import written_whole

PATIENCE = timedelta(hours=6)
"""How long a process waits for another, which may have a sheet of pictures to judge or a checkpoint to write."""
_BUCKET = 2**25
"""About how many numbers are sent at once."""
_SEED_STRIDE = 0x9E3779B97F4A7C15

T = TypeVar("T")
Event = TypeVar("Event")


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is. One alone (the default) sends nothing and copies nothing."""

    index: int = 0
    count: int = 1
    device: torch.device | str = "cpu"
    """What this process computes on, and sends from."""

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Processes":
        """Those that accelerate has joined.

        Raises:
            UserError: if they share a run in a way that is not supported, or were started and not joined.
        """
        kind = accelerator.distributed_type.value
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise UserError(
                f"the launcher asks for {kind}, which is not supported; choose multi-GPU (accelerate launch "
                "--multi_gpu) or multi-CPU, and if the model does not fit --adapter lora, or --fsdp for all weights"
            )
        started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
        if started > 1 and accelerator.num_processes == 1:
            raise UserError(
                f"{started} processes were started, but accelerate found no devices to join them on; to train on CPUs "
                "set ACCELERATE_USE_CPU=true, or start one process"
            )
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.device)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and talks."""
        return self.index == 0

    def rows(self, num: int) -> range:
        """This process's rows of a batch of `num`; the processes' shares differ by one at most."""
        return range(num * self.index // self.count, num * (self.index + 1) // self.count)

    def check_batches(self, **sizes: int) -> None:
        """Takes sizes of global batches by the names of their settings.

        Raises:
            UserError: if a process would have nothing to do.
        """
        for name, size in sizes.items():
            if size < self.count:
                raise UserError(
                    f"{name}={size} over {self.count} processes leaves some without a picture: it is the global batch; "
                    f"use {name} >= {self.count}, or start at most {size}"
                )

    def spread(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same function of a batch, each process computing its own rows alone; exact in values and gradients.

        `function` takes tensors (N, ...), N >= `count`, or None, and gives (N, ...), each row by itself. Every process
        calls with the same batch and goes on in the same way, so that each has the whole gradient of the result.
        """
        if self.count == 1:
            return function

        def spread_function(*batch: Tensor | None) -> Tensor:
            num = next(len(part) for part in batch if part is not None)
            own = (None if part is None else _OwnRows.apply(part, self) for part in batch)
            return _AllRows.apply(function(*own), num, self)  # pyright: ignore[reportReturnType]

        return spread_function

    def share(self, num: int, part: Callable[[range], Tensor]) -> Tensor:
        """Rows 0 to `num` of what `part` gives row by row, without gradients; each process asks for its own."""
        if num < self.count:  # too few to share: every process makes them all
            return part(range(num))
        return self.gather(part(self.rows(num)), num)

    def gather(self, own: Tensor, num: int) -> Tensor:
        """All `num` rows (N, ...), from each process's own ones."""
        if self.count == 1:
            return own
        rows = self.rows(num)
        whole = torch.zeros(num, *own.shape[1:], dtype=own.dtype, device=self.device)
        whole[rows.start : rows.stop] = own
        dist.all_reduce(whole)  # a row and zeros: exact, whatever the shares
        return whole.to(own.device)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Adds up what each process's rows say of the gradients of one global loss; those in parts are by then."""
        if self.count == 1:
            return
        gradients = (p.grad for p in parameters if p.grad is not None)
        for bucket in _buckets([gradient for gradient in gradients if not isinstance(gradient, DTensor)]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def everyone(self, value: T) -> list[T]:
        """What each process gives; all wait for all."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all have come here."""
        self.everyone(None)

    def from_main(self, decide: Callable[[], bool]) -> bool:
        """What the main process decides."""
        return bool(self.everyone(self.is_main and decide())[0])

    def on_main(self, action: Callable[[Event], None]) -> Callable[[Event], None]:
        """The action on the main process, nothing on others."""
        return action if self.is_main else lambda event: None

    @contextmanager
    def written(self, folder: Path) -> Iterator[Path]:
        """`written_whole` on the main process; others write into a folder that is thrown away."""
        if self.is_main:
            with written_whole(folder) as partial:
                yield partial
        else:
            with TemporaryDirectory() as scratch:
                yield Path(scratch)

    def own_seed(self, seed: int) -> int:
        """For what is random within a network (dropout): another in each process, the seed itself in the first."""
        return (seed + self.index * _SEED_STRIDE) % 2**63


ALONE = Processes()


def open_accelerator(mixed_precision: Literal["no", "fp16", "bf16"]) -> Accelerator:
    """An accelerator on the devices, and in the company, that its launcher gave it."""
    return Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def leave() -> None:
    """Ends the company of processes, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class _OwnRows(torch.autograd.Function):
    """(N, ...) -> own rows; backward, the gradients of all rows."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, processes: Processes) -> Tensor:
        ctx.processes, ctx.num = processes, len(whole)
        rows = processes.rows(len(whole))
        return whole[rows.start : rows.stop]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.gather(gradients[0], ctx.num), None


class _AllRows(torch.autograd.Function):
    """Own rows -> (N, ...); backward, own rows of the gradient, which every process has whole: nothing to add up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, num: int, processes: Processes) -> Tensor:
        ctx.rows = processes.rows(num)
        return processes.gather(own, num)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.rows.start : ctx.rows.stop], None, None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of about `_BUCKET` numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
