"""What the metric networks saw, kept on disk by the content of the pictures, so that a second look costs little."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CACHE_VARIABLE = "DOMAINSTUDIO_CACHE"
MAX_BYTES = 2**30


def digest(tensor: Tensor) -> str:
    """Of type, shape and values."""
    values = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{values.dtype} {tuple(values.shape)} ".encode())
    found.update(values.numpy().tobytes())
    return found.hexdigest()


class FeatureCache:
    """Tensors in a folder, each named by what it was computed from; the longest unused are dropped above `max_bytes`.

    A cache that cannot be read or written computes instead: it never changes a result or stops one.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES):
        """By default in the folder that `DOMAINSTUDIO_CACHE` names, or `~/.cache/domainstudio`."""
        self.folder, self.max_bytes = folder or _default_folder(), max_bytes

    def get(self, what: str, of: tuple[str, ...], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, on the CPU. `what` says which computation; `of` digests all that it depends on."""
        path = self.folder / f"{hashlib.sha256(' '.join((what, *of)).encode()).hexdigest()}.safetensors"
        with suppress(OSError, SafetensorError, KeyError):
            found = load_file(path)["features"]
            path.touch()
            return found
        computed = compute().detach().cpu().contiguous()
        with suppress(OSError, SafetensorError):
            self._keep(path, computed)
        return computed

    def _keep(self, path: Path, features: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file({"features": features}, partial)
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
