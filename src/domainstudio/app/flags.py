"""Flags that commands share: a recipe's settings, and how pictures are measured."""

import argparse
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


def option(parser: argparse._ActionsContainer, flag: str, **settings: Any) -> None:
    """A flag that is also understood with underscores, as the diffusers examples spell theirs."""
    parser.add_argument(*dict.fromkeys((flag, "--" + flag[2:].replace("-", "_"))), **settings)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small; give 1 or more")
    return value


positive.__name__ = "int"  # which argparse puts into "invalid int value"


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a recipe setting; a flag that is not given leaves the recipe's value."""
    from domainstudio.app.recipe import TEXT_DEFAULTS, Recipe

    for name, field in Recipe.model_fields.items():
        kind, described = _plain_type(field.annotation), field.description or ""
        if not field.is_required() and field.default not in (None, "") and "default: " not in described:
            of_text = f", text models {TEXT_DEFAULTS[name]}" if name in TEXT_DEFAULTS else ""
            described += f" (default: {field.default}{of_text})"
        settings: dict[str, Any] = {"default": None, "dest": name, "help": described}
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            settings |= {"choices": get_args(kind)}
        else:
            settings |= {"type": kind, "metavar": "N" if kind is int else "X" if kind is float else "NAME"}
        option(parser, flag, **settings)


def _plain_type(annotation: Any) -> Any:
    """The type without `| None`."""
    if isinstance(annotation, types.UnionType) or get_origin(annotation) not in (None, Literal):
        return next(part for part in get_args(annotation) if part is not types.NoneType)
    return annotation


def add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    """Against what, with how many pictures and by which protocol is measured."""
    option(
        parser, "--reference-dir", type=Path, help="held-out pictures: folder or .zip (bundled domains bring theirs)"
    )
    unadapted = "what the source model draws before it is adapted: folder or .zip (a run's source is asked by itself)"
    option(parser, "--source-dir", type=Path, help=unadapted)
    option(parser, "--num-images", type=positive, default=200, help="samples drawn of a run (default: %(default)s)")
    option(parser, "--seed", type=int, default=0)
    parser.add_argument("--lpips", choices=["vgg", "alex"], default="vgg", help="LPIPS backbone")
    option(
        parser,
        "--lpips-px",
        type=int,
        default=None,
        help="side at which LPIPS looks; default: the pictures', at most 256",
    )
    parser.add_argument("--intra", choices=["cdc", "crdi"], default="cdc", help="protocol of Intra-LPIPS")
    theirs = "folder or hub name on this machine; default: the published one"
    parser.add_argument("--clip", nargs="?", const="", metavar="NAME", help=f"CMMD and CLIP alignment ({theirs})")
    parser.add_argument("--dino", nargs="?", const="", metavar="NAME", help=f"FD-DINOv2 ({theirs})")
