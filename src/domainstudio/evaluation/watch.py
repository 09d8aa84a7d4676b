"""The watch: what the pictures of each checkpoint say, with no held-out pictures, and which checkpoint to take.

It sees what every user has: pictures drawn from fixed noise at each checkpoint, the few training pictures, and what the
source drew of the same noise. How well its choice agrees with held-out pictures: docs/benchmarks/watch.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from domainstudio.errors import UserError
from domainstudio.evaluation import metrics
from domainstudio.evaluation.metrics import mean_off_diagonal, pairwise_lpips
from domainstudio.evaluation.pictures import Networks
from domainstudio.evaluation.way import Way

MAX_PX = 128
"""Side at which LPIPS looks at larger pictures."""
LEVEL = 0.03
"""Scores that differ by no more say the same: closeness of 16 new pictures has a standard error of .04 to .11, of which
checkpoints share a part, being drawn from the same noise."""
PATIENCE = 3
"""Readings without a better one after which a run is overfitting, if its pictures are also too close."""
COLLAPSED = 0.6
"""Closeness below which outputs have collapsed onto training pictures."""
CROWDED = 0.4
"""Share of the outputs that are nearest to one training picture, above which it is named."""
ARRIVED = 0.25
"""Style distance above which the style has not arrived."""
MANY_UNADAPTED = 0.1
"""Share of pictures that still look like the source's, above which it is told."""


@dataclass(frozen=True)
class Reading:
    """What the pictures of one checkpoint say.

    `closeness`: how far they are from the training pictures: mean LPIPS distance to the nearest one or its mirror
    image, over the same of each training picture to the others. 1 is right: as far from the ten as each of them from
    the other nine; towards 0 they are copies; far above 1 they are not of the domain.
    `diversity`: mean LPIPS distance between two of them, over that between two training pictures. 1 is right.
    `style_distance`: what is left of the way from the source's pictures to the training pictures (`way.Way`):
    1 before training, 0 for new pictures of the domain, and for copies. Where the source is so near that few pictures
    cannot tell, over their spread.
    `drift`: mean LPIPS distance to what the source drew of the same noise.
    `crowded`: the training pictures, counted from 1, that more than their share of the pictures are nearest to.
    `unadapted`: the share of them that look more like the source's than like the training pictures; None where these
    are so much alike that single pictures cannot be told.
    """

    step: int
    closeness: float
    diversity: float
    style_distance: float
    drift: float
    crowded: tuple[int, ...] = ()
    unadapted: float | None = None

    @property
    def score(self) -> float:
        """Lower is better: what is left of the way to the domain, or how far closeness is from where it should be,
        whichever is worse.

        Stands for held-out KID and Intra-LPIPS, which no one has at hand while training.
        """
        return max(self.style_distance, abs(1 - self.closeness))

    def to_json(self) -> dict[str, float | list[int] | None]:
        """Plain JSON, with the score."""
        return {**asdict(self), "crowded": list(self.crowded), "score": self.score}

    def curves(self) -> dict[str, float]:
        """The numbers to draw over the steps, by their titles."""
        curves = {
            "step": self.step,
            "closeness (1 is right)": self.closeness,
            "diversity (1 is right)": self.diversity,
            "style distance": self.style_distance,
            "drift": self.drift,
        }
        return curves if self.unadapted is None else {**curves, "unadapted": self.unadapted}

    @classmethod
    def from_json(cls, record: Mapping) -> "Reading":
        """What `to_json` gave, now or before `unadapted` was measured."""
        own: dict[str, Any] = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        own["crowded"] = tuple(own["crowded"])
        return cls(**own)


class Watch:
    """Reads checkpoints.

    Args:
        training: (N, 3, H, W) in [-1, 1], at least 3: the training pictures, as the model gives them back at best.
        source: (M, 3, H, W) in [-1, 1], at least 2: what the source drew of the noise that checkpoints draw from.

    Raises:
        UserError: if there are fewer.
        MissingWeights: if the LPIPS network is not on this machine.
    """

    def __init__(self, training: Tensor, source: Tensor):
        if len(training) < 3 or len(source) < 2:
            raise UserError(
                f"{len(training)} training pictures and {len(source)} samples: the watch compares distances among at "
                "least 3 training pictures and 2 samples; give more, or switch it off with watch = false"
            )
        self._networks = Networks(training, "vgg", max(32, min(MAX_PX, *training.shape[-2:])), None)
        plain, mirrored = self._networks.training_embeddings
        self._among_training = pairwise_lpips(plain, plain)
        either = torch.minimum(self._among_training, pairwise_lpips(plain, mirrored))
        self._apart = float(either.fill_diagonal_(float("inf")).min(1).values.mean())
        self._source = self._networks.embeddings(source)
        self._way = Way(plain, self._source)
        self._whole_way = max(self._way.ends)

    @torch.inference_mode()
    def read(self, step: int, images: Tensor) -> Reading:
        """What (M, 3, H, W) in [-1, 1], drawn at `step` from the noise of the source's pictures, say."""
        seen = self._networks.embeddings(images)
        among = pairwise_lpips(seen, seen)
        plain, mirrored = (pairwise_lpips(seen, target) for target in self._networks.training_embeddings)
        distances, indices = metrics.nearest(torch.minimum(plain, mirrored))
        left = self._way.left(seen, paired=True)
        share = torch.bincount(indices, minlength=len(self._among_training)) / len(images)
        return Reading(
            step,
            closeness=float(distances.mean()) / self._apart,
            diversity=mean_off_diagonal(among) / mean_off_diagonal(self._among_training),
            style_distance=max(0.0, float(left.mean())) / self._whole_way,
            drift=metrics.drift(seen, self._source),
            crowded=tuple(int(index) + 1 for index in (share > CROWDED).nonzero()),
            unadapted=self._way.ends.unadapted_rate(left),
        )


def choose(readings: Sequence[Reading]) -> Reading | None:
    """The reading of the checkpoint to take; None where there is none after the source's own.

    The latest of those whose score is level with the lowest: likeness still grows where the score no longer tells.
    """
    read = [reading for reading in readings if reading.step]
    lowest = min((reading.score for reading in read), default=0.0)
    return next((reading for reading in reversed(read) if reading.score <= lowest + LEVEL), None)


def is_overfitting(readings: Sequence[Reading]) -> bool:
    """Whether the run is past its best: `PATIENCE` readings without a better one, with pictures too close."""
    best = choose(readings)
    later = [reading for reading in readings if best is not None and reading.step > best.step]
    return len(later) >= PATIENCE and all(reading.closeness < COLLAPSED for reading in later)


def tell(readings: Sequence[Reading]) -> str:
    """What is happening, in one sentence."""
    best = choose(readings)
    if best is None:
        return "No checkpoint was looked at yet."
    last, collapse = readings[-1], _collapse(readings)
    if collapse is not None:
        return f"From step {collapse} on, outputs collapse onto {_onto(last.crowded)}; step {best.step} is the best."
    if last.style_distance > ARRIVED:
        left = f"{last.style_distance:.0%} of the way is left at step {last.step}"
        return f"The style has not arrived: {left}; take more (max_train_steps)."
    if last.unadapted is not None and last.unadapted > MANY_UNADAPTED:
        return (
            f"{last.unadapted:.0%} of the pictures still look like the source's at step {last.step}; take more "
            "(max_train_steps)."
        )
    return f"No collapse until step {last.step}; step {best.step} is the best."


def _collapse(readings: Sequence[Reading]) -> int | None:
    """The step from which on every reading was too close to the training pictures."""
    first = None
    for reading in reversed(readings):
        if reading.step == 0 or reading.closeness >= COLLAPSED:
            break
        first = reading.step
    return first


def _onto(crowded: tuple[int, ...]) -> str:
    if not crowded:
        return "the training pictures"
    names = ", ".join(str(number) for number in crowded[:-1]) + (" and " if crowded[1:] else "") + str(crowded[-1])
    return f"picture{'s' if crowded[1:] else ''} {names}"
