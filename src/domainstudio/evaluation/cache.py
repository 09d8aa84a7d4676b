"""What was computed once, kept on disk by the content of what it was computed from."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CACHE_VARIABLE = "DOMAINSTUDIO_CACHE"
MAX_BYTES = 2**30


def digest(tensor: Tensor) -> str:
    """Of type, shape and values."""
    values = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{values.dtype} {tuple(values.shape)} ".encode())
    found.update(values.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


class TensorCache:
    """Tensors in a folder, each named by what it was computed from; the longest unused are dropped above `max_bytes`.

    A cache that cannot be read or written computes instead: it never changes a result or stops one.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES):
        """By default in the folder that `DOMAINSTUDIO_CACHE` names, or `~/.cache/domainstudio`."""
        self.folder, self.max_bytes = folder or _default_folder(), max_bytes

    def get(self, what: str, of: tuple[str, ...], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, on the CPU. `what` says which computation; `of` digests all that it depends on."""
        found = self.find(what, of)
        if found is None:
            found = compute().detach().cpu().contiguous()
            self.keep(what, of, found)
        return found

    def find(self, what: str, of: tuple[str, ...]) -> Tensor | None:
        """What was kept of it, if it was."""
        path = self._path(what, of)
        with suppress(OSError, SafetensorError, KeyError):
            found = load_file(path)["tensor"]
            path.touch()
            return found
        return None

    def keep(self, what: str, of: tuple[str, ...], tensor: Tensor) -> None:
        """For `find`; the longest unused make room."""
        with suppress(OSError, SafetensorError):
            self._write(self._path(what, of), tensor)

    def _path(self, what: str, of: tuple[str, ...]) -> Path:
        return self.folder / f"{hashlib.sha256(' '.join((what, *of)).encode()).hexdigest()}.safetensors"

    def _write(self, path: Path, tensor: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file({"tensor": tensor}, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        files = sorted(self.folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > self.max_bytes:
                file.unlink(missing_ok=True)


def _default_folder() -> Path:
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    try:
        return Path.home() / ".cache/domainstudio"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "domainstudio"
