"""How much memory tensors take: on CUDA as its allocator counts them, on the CPU counted the same way here.

A process's own peak is no substitute: it cannot be set back, and holds libraries, pages that malloc keeps after tensors
are gone, and buffers that a card does not need.
"""

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.distributed.tensor import DTensor

from domainstudio.errors import UserError


def standing_bytes(device: torch.device) -> int:
    """What all tensors on `device` take now. Of a DTensor the part that is here is a tensor of its own.

    Raises:
        UserError: on devices other than CPU and CUDA.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        raise UserError(f"memory can be measured on CPU and CUDA; this device is {device.type}")
    kinds = ((thing, type(thing)) for thing in gc.get_objects())
    tensors = (thing for thing, kind in kinds if issubclass(kind, Tensor) and kind is not DTensor)
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Peak:
    """The most that tensors on a device took at once, in bytes, between `start` and `stop`; also a context."""

    bytes = 0

    def __init__(self, device: torch.device):
        self.device = device
        self._before = 0
        self._allocations: profile | None = None

    def start(self) -> None:
        """Counts from now on; on the CPU one at a time."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self._before = standing_bytes(self.device)
        self._allocations = profile(profile_memory=True)
        self._allocations.__enter__()

    def stop(self) -> None:
        """Sets `bytes`."""
        if self._allocations is None:
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._allocations.__exit__(None, None, None)
        assert self._allocations.kineto_results is not None
        events: list[Any] = [event for event in self._allocations.kineto_results.events() if event.name() == "[memory]"]
        now = self.bytes = self._before
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.bytes = max(self.bytes, now)

    def __enter__(self) -> "Peak":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def process_peak_bytes() -> int | None:
    """The most RAM this process has held; None where the system (other than Linux) does not say.

    `ru_maxrss` would start from what the parent process held.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
