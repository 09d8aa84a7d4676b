"""Use case: what a recipe will take on this machine, measured, and what to change where that is too much."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from domainstudio.app.probe import DRAWN_STEPS, Cost, Facts, Probe, probe_apart
from domainstudio.app.recipe import Recipe
from domainstudio.errors import UserError
from domainstudio.models.sample import Progress

GB = 2**30
"""As makers of cards count."""
CARDS_GB = (6, 8, 12, 16, 24)
CONTEXT_BYTES = GB // 2
"""What CUDA itself takes of a card: an allowance, not measured."""
CPU_MARGIN = 1.1
"""Of a peak counted on the CPU, for a card's workspaces and gaps between tensors: an allowance, not measured."""
TRY_SECONDS = 180
"""How long changes are tried for; those that are left are named without numbers."""
LESS_MEMORY, LESS_TIME = 0.95, 0.85
"""A change that brings either to this share, or below, is worth a line; times vary more from one try to the next."""


@dataclass(frozen=True)
class Change:
    """Settings that differ from the recipe's. Where `tried` is true and `cost` None, memory ran out."""

    settings: dict[str, Any]
    tried: bool = False
    cost: Cost | None = None

    @property
    def title(self) -> str:
        """As one would write them into the recipe."""
        return ", ".join(f"{name} {str(value).lower()}" for name, value in self.settings.items()) or "as it is"


@dataclass(frozen=True)
class Diagnosis:
    """What was found. `as_is.cost` is None where the recipe needs more memory than this machine has."""

    recipe: Recipe
    facts: Facts
    as_is: Change
    changes: tuple[Change, ...]

    @cached_property
    def seconds(self) -> dict[str, float]:
        """The parts of a run that were measured or extrapolated, in seconds; `total` is their sum."""
        cost, recipe = self.as_is.cost, self.recipe
        if cost is None:
            return {}
        parts = {
            "loading": cost.loading_seconds,
            "source_samples": cost.source_samples_seconds,
            "steps": recipe.max_train_steps * cost.step_seconds,
            "previews": self.num_previews * cost.preview_seconds,
            "watch": cost.watch_start_seconds + self.num_previews * cost.watch_seconds,
        }
        return {**parts, "total": sum(parts.values())}

    @property
    def num_previews(self) -> int:
        """Sheets of samples in a whole run: before the first step, every validation_steps, and after the last."""
        return 1 + math.ceil(self.recipe.max_train_steps / self.recipe.validation_steps)

    def not_counted(self) -> list[str]:
        """What a run does besides."""
        left = ["writing checkpoints and results"]
        if self.recipe.erase_steps:
            left.append("how erase_steps differ from other steps")
        if self.recipe.binding_steps:
            left.append("how binding_steps differ from other steps")
        if self.recipe.stop_when_overfitting:
            left.append("an earlier end by the watch")
        return left

    def card_bytes(self, cost: Cost) -> float:
        """What a card needs to have for that."""
        if cost.reserved_bytes is not None:
            return cost.reserved_bytes + CONTEXT_BYTES
        return CPU_MARGIN * cost.peak_bytes + CONTEXT_BYTES

    def cards(self) -> dict[int, Change | None]:
        """The fewest changes with which the recipe fits on a card of so many GB; None where none that was tried do."""
        ways = sorted((self.as_is, *self.changes), key=lambda change: len(change.settings))
        return {
            size: next((way for way in ways if way.cost and self.card_bytes(way.cost) <= size * GB), None)
            for size in CARDS_GB
        }

    def helpful(self) -> list[Change]:
        """The changes that were measured to need less memory or time; all that run, where the recipe does not."""
        tried = [change for change in self.changes if change.cost is not None]
        before = self.as_is.cost
        if before is None:
            return tried

        def helps(after: Cost) -> bool:
            less_memory = after.peak_bytes <= LESS_MEMORY * before.peak_bytes
            return less_memory or after.step_seconds <= LESS_TIME * before.step_seconds

        return [change for change in tried if change.cost is not None and helps(change.cost)]

    def render(self) -> str:
        """What a terminal shows, in plain words."""
        return "\n".join((*_told_costs(self), *_told_cards(self), *_told_changes(self)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: bytes, seconds."""
        helpful = self.helpful()

        def told(change: Change) -> dict[str, Any]:
            cost = None if change.cost is None else {**asdict(change.cost), "peak_bytes": change.cost.peak_bytes}
            card = None if change.cost is None else round(self.card_bytes(change.cost))
            own = {"settings": change.settings, "tried": change.tried, "helps": change in helpful}
            return {**own, "cost": cost, "card_bytes": card}

        return {
            **asdict(self.facts),
            "recipe": told(self.as_is),
            "changes": [told(change) for change in self.changes],
            "cards": {str(size): None if way is None else way.settings for size, way in self.cards().items()},
            "num_previews": self.num_previews,
            "seconds": self.seconds,
            "not_counted": self.not_counted(),
        }


def diagnose(
    recipe: Recipe, progress: Progress | None = None, measure: Callable[[Recipe], Probe] = probe_apart
) -> Diagnosis:
    """Measures a recipe, then each change that applies to it, and those that helped together; writes nothing.

    Args:
        progress: told how many measurements are done, and of how many.
        measure: by default each in a process of its own.

    Raises:
        UserError: for what `train` would refuse, save an output_dir that is taken.
    """
    tell = progress or (lambda done, total: None)
    tell(0, 1)
    began = time.perf_counter()
    found = measure(recipe)
    took, began = time.perf_counter() - began, time.perf_counter()

    def attempt(settings: dict[str, Any]) -> list[Change]:
        if time.perf_counter() - began + took > TRY_SECONDS:
            return [Change(settings)]
        try:
            changed = Recipe.model_validate({**recipe.model_dump(), **settings})
            return [Change(settings, True, measure(changed).cost)]
        except UserError:  # such as a loss that is not finite in that precision
            return []

    options, changes = applicable(recipe, found.facts), []
    for number, settings in enumerate(options, start=1):
        tell(number, 2 + len(options))
        changes += attempt(settings)
    alone = Diagnosis(recipe, found.facts, Change({}, True, found.cost), tuple(changes))
    joined = changes if found.cost is None else alone.helpful()
    if len(joined) > 1 and all(change.tried for change in joined):
        tell(1 + len(options), 2 + len(options))
        changes += attempt({name: value for change in joined for name, value in change.settings.items()})
    tell(2 + len(options), 2 + len(options))
    return replace(alone, changes=tuple(changes))


def applicable(recipe: Recipe, facts: Facts) -> list[dict[str, Any]]:
    """The changes that the recipe does not have yet and the model has a use for; those that alter results come last."""
    options: list[dict[str, Any]] = []
    if recipe.mixed_precision == "no":
        options.append({"mixed_precision": "bf16" if facts.has_bf16 else "fp16"})
    if not recipe.gradient_checkpointing:
        options.append({"gradient_checkpointing": True})
    if smaller := _smaller_batches(recipe, facts):
        options.append(smaller)
    if facts.is_latent and facts.space != "model":
        options.append({"space": "crop" if facts.space == "pixel" else "model"})
    if recipe.adapter == "full":
        keeps_rate = recipe.learning_rate is None or recipe.optimizer == "prodigy"
        own = {} if keeps_rate else {"learning_rate": 1e-4 if facts.is_text else 1e-3}
        options.append({"adapter": "lora", **own})
    return options


def _smaller_batches(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    """Half a batch, twice as often; at least 3 pictures where they form pairs."""
    least = 3 if recipe.pairs == "training" else 1
    sizes = {"train_batch_size": max(least, recipe.train_batch_size // 2)}
    if facts.needs_prior:
        sizes["pair_batch_size"] = max(3, recipe.pair_batch_size // 2)
    changed = {name: size for name, size in sizes.items() if size < getattr(recipe, name)}
    if not changed:
        return {}
    return {**changed, "gradient_accumulation_steps": 2 * recipe.gradient_accumulation_steps}


def _told_costs(found: Diagnosis) -> list[str]:
    facts, cost, recipe = found.facts, found.as_is.cost, found.recipe
    device = facts.device if facts.device_bytes is None else f"{facts.device}, {_gb(facts.device_bytes)}"
    if cost is None:
        return [f"device   {device}", "memory   more than this machine has: it ran out"]
    ram = ""
    if cost.process_bytes is not None and not facts.is_cuda:
        ram = f"; RAM of the whole process: {_gb(cost.process_bytes)}"
    watched = " and the watch" * recipe.watch
    up_to = "up to " * (facts.least_samples < facts.most_samples)
    titles = {
        "loading": "loading",
        "source_samples": f"{up_to}{facts.most_samples} source samples",
        "steps": f"{recipe.max_train_steps} steps",
        "previews": f"{found.num_previews} previews",
        "watch": "the watch",
    }
    parts = [f"{titles[name]} {_duration(value)}" for name, value in found.seconds.items() if value and name in titles]
    kept = "; later runs find these source samples" * bool(found.seconds["source_samples"])
    steps = f"{min(DRAWN_STEPS, recipe.num_inference_steps)} of {recipe.num_inference_steps} denoising steps"
    return [
        f"device   {device}",
        f"memory   {_gb(cost.peak_bytes)} of tensors at most{ram}",
        f"         {_gb(cost.weights_bytes)} stands all along: weights, copies of them, pictures",
        f"         a step adds {_gb(max(0, cost.step_bytes - cost.weights_bytes))}, a preview{watched} "
        f"{_gb(max(0, cost.preview_bytes - cost.weights_bytes))}",
        f"a step   {_duration(cost.step_seconds)} (median of {cost.timed_steps})",
        f"in all   about {_duration(found.seconds['total'])}: {', '.join(parts)}",
        f"         drawing is reckoned from one batch in {steps}{kept}",
        f"         not counted: {', '.join(found.not_counted())}",
        *(f"note     {note}" for note in cost.notes),
    ]


def _told_cards(found: Diagnosis) -> list[str]:
    ways: dict[str, list[int]] = {}
    for size, way in found.cards().items():
        ways.setdefault("with no change tried here" if way is None else way.title, []).append(size)
    lines = [f"{', '.join(map(str, sizes))} GB: {title}" for title, sizes in reversed(ways.items())]
    allowed = "0.5 GB for CUDA itself"
    if not found.facts.is_cuda:
        allowed = f"estimated from what was counted on the CPU, with {CPU_MARGIN - 1:.0%} and {allowed} added"
    else:
        allowed = f"from what was measured, with {allowed} added"
    return [*_block("cards", lines), f"         ({allowed})"]


def _told_changes(found: Diagnosis) -> list[str]:
    helpful, left = found.helpful(), [change for change in found.changes if not change.tried]
    lines = []
    if helpful:
        shown = [found.as_is, *helpful]
        width = max(len(change.title) for change in shown)
        for change in shown:
            measured = change.cost and f"{_gb(change.cost.peak_bytes):>8}  {_duration(change.cost.step_seconds)} a step"
            lines.append(f"{change.title:{width}}  {measured or 'does not fit'}")
    elif any(change.tried for change in found.changes):
        lines.append("none of those tried takes less memory or time")
    lines += [f"{change.title}: not tried, as measuring takes long here" for change in left]
    return _block("changes", lines)


def _block(title: str, lines: list[str]) -> list[str]:
    return [f"{title if index == 0 else '':9}{line}" for index, line in enumerate(lines)]


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB" if size < 10 * GB else f"{size / GB:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
