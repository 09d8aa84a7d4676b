"""The source models and example domains that come with the library, addressed as "bundled:NAME"."""

import difflib
from pathlib import Path
from typing import Literal

from domainstudio.errors import UserError

ASSETS = Path(__file__).parent.parent / "assets"
PREFIX = "bundled:"

Kind = Literal["models", "domains"]


def strip_prefix(source: str) -> str | None:
    """NAME in "bundled:NAME", or None when `source` is anything else."""
    return source.removeprefix(PREFIX) if source.startswith(PREFIX) else None


def bundled_names(kind: Kind) -> list[str]:
    """Names of what is bundled, sorted."""
    root = ASSETS / kind
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def bundled_model(name: str) -> Path:
    """Folder of a bundled source model, in diffusers' layout."""
    return _find("models", name)


def bundled_domain(name: str) -> Path:
    """Folder of a bundled domain's few training pictures."""
    return _find("domains", name) / "train"


def bundled_heldout(name: str) -> Path:
    """Zip of a bundled domain's held-out pictures, which training never sees."""
    return _find("domains", name) / "heldout.zip"


def _find(kind: Kind, name: str) -> Path:
    names = bundled_names(kind)
    if name in names:  # membership, not a path lookup: a name such as "../x" must not leave the assets
        return ASSETS / kind / name
    close = difflib.get_close_matches(name, names, n=1)
    guess = f" Did you mean {PREFIX}{close[0]}?" if close else ""
    known = ", ".join(PREFIX + other for other in names) or "none"
    raise UserError(f"{PREFIX}{name} is not among the bundled {kind}; available: {known}.{guess}")
