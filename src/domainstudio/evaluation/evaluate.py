"""One honest account of a set of generated images: likeness to the target, diversity, and copying, side by side.

Memory: an LPIPS-VGG embedding of one image takes 2 MB at 64 px and 32 MB at 256 px, so only those of the training
pictures (and their mirror images) are kept. Generated images are embedded in batches and reduced to distances at once;
Intra-LPIPS then embeds one cluster at a time again (about 100 MB at 64 px), which costs little beside the Inception.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from domainstudio.errors import MissingWeights, UserError
from domainstudio.evaluation import coverage, metrics
from domainstudio.evaluation.cache import TensorCache, digest
from domainstudio.evaluation.features import Progress
from domainstudio.evaluation.foundation import DINO_PX
from domainstudio.evaluation.halves import Estimate
from domainstudio.evaluation.pictures import Networks, Pictures
from domainstudio.evaluation.protocol import USUAL, Protocol

T = TypeVar("T")

SAME_PICTURE = 1e-4  # LPIPS; above the rounding of `pairwise_lpips`, far below any two different pictures
_COVERAGE = (  # with the published numbers of neighbours
    *(("precision", coverage.precision, 3), ("recall", coverage.recall, 3)),
    *(("density", coverage.density, 5), ("coverage", coverage.coverage, 5)),
)
NO_REFERENCE = (
    "KID, FID and coverage against the training pictures would reward copying: give --reference-dir with held-out "
    "pictures"
)
NO_SOURCE = (
    "which pictures still look like the source's needs pictures of the source, which a run's model gives: give "
    "--source-dir with at least two that it draws before it is adapted"
)
NUM_SOURCE = 16
"""Pictures of the source that others are compared with: more than there are training pictures, as a rule."""


Sight = Literal["inception", "clip", "dino"]
"""Whose features of `Pictures` are compared."""


class _Unmeasured(Exception):
    """A number that these pictures cannot give; the message says why and how to get it."""


@dataclass(frozen=True)
class Evaluation:
    """The numbers, each with the protocol it was measured by; a number that is None has its reason in `reasons`."""

    num_images: int
    num_reference: int
    intra_lpips: float | None  # diversity; the goal is the value of real pictures, not the highest
    intra_lpips_error: float | None  # standard error, as far as these pictures say
    nearest_lpips: float | None  # mean over images; to a training picture or its mirror image, whichever is nearer
    copy_rate: float | None  # share of images nearer to a training picture than `copy_threshold`
    copy_threshold: float | None
    kid: float | None  # x 10^3
    kid_error: float | None  # standard error, of these pictures and the reference
    fid: float | None
    precision: float | None  # do the pictures look real
    recall: float | None  # is everything real among them
    density: float | None  # 1 for the real distribution
    coverage: float | None
    unadapted_rate: float | None  # share of images that look more like the source's than like the training pictures
    vendi: float | None  # effective number of different pictures
    cmmd: float | None  # x 10^3
    fd_dino: float | None
    clip_image: float | None  # likeness to the training pictures; a copier's is the highest
    clip_text: float | None  # likeness to the prompts
    intra_lpips_protocol: str
    copy_protocol: str
    kid_protocol: str
    fid_protocol: str
    coverage_protocol: str
    unadapted_protocol: str
    vendi_protocol: str
    clip_protocol: str
    dino_protocol: str
    nearest_indices: tuple[int, ...] = ()
    nearest_distances: tuple[float, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: numbers, strings, lists, None; never NaN or infinity."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Evaluator:
    """Measures sets of images against one set of training pictures; what it learns of those and the reference is kept.

    Args:
        training: (N, 3, H, W) in [-1, 1], the few pictures trained on; the networks run on its device.
        reference: (M, 3, H, W) in [-1, 1], held-out pictures of the same domain; None leaves KID and FID out.
        protocol: how to measure.
        progress: told (stage, done, total).
        cache: keeps what the networks saw for later evaluators, on disk.
        source: (K, 3, H, W) in [-1, 1], K >= 2, what the source model draws before it is adapted; the first
            `NUM_SOURCE` are looked at. None leaves out how many pictures still look like these.

    Raises:
        UserError: if the pictures are not of that shape and range. Missing weights are no error: the numbers that
            need them are None and `reasons` says how to get them.
    """

    def __init__(
        self,
        training: Tensor,
        reference: Tensor | None,
        protocol: Protocol = USUAL,
        progress: Progress | None = None,
        cache: TensorCache | None = None,
        source: Tensor | None = None,
    ):
        _check(training, "training")
        px = protocol.lpips_px or max(32, min(256, *training.shape[-2:]))
        self.protocol = replace(protocol, lpips_px=px)
        if source is not None:
            _check(source, "source")
            source = source[:NUM_SOURCE]
        self._networks = Networks(training, protocol.lpips, px, progress, protocol.clip, protocol.dino, cache, source)
        self._training = Pictures(self._networks, training, "training pictures")
        self._reference = None
        if reference is not None:
            _check(reference, "reference")
            self._reference = Pictures(self._networks, reference, "reference pictures")

    @torch.inference_mode()
    def evaluate(self, images: Tensor, prompts: Sequence[str] = ()) -> Evaluation:
        """Measures generated images, (N, 3, H, W) in [-1, 1], with the prompt of each if there are any."""
        _check(images, "generated")
        if len(prompts) not in (0, len(images)):
            raise UserError(f"{len(prompts)} prompts for {len(images)} images; give one an image, or none")
        return self._evaluation(Pictures(self._networks, images, "generated images"), prompts)

    @torch.inference_mode()
    def copier(self, num_images: int) -> Evaluation:
        """The anchor that a perfect memoriser would score: the training pictures, repeated."""
        index = torch.arange(num_images) % len(self._training)
        return self._evaluation(Pictures(self._networks, self._training.images, self._training.title, index))

    @torch.inference_mode()
    def real(self) -> Evaluation:
        """The anchor to aim at: the held-out pictures as if generated; KID and FID between two random halves of them.

        Raises:
            UserError: without reference pictures.
        """
        if self._reference is None:
            raise UserError("the value of real pictures needs held-out pictures: give --reference-dir")
        return self._evaluation(self._reference)

    def _evaluation(self, pictures: Pictures, prompts: Sequence[str] = ()) -> Evaluation:
        reasons: dict[str, str] = {}

        def measured(name: str, measure: Callable[[], T]) -> T | None:
            try:
                return measure()
            except (MissingWeights, _Unmeasured) as why:
                reasons[name] = str(why)
                return None

        intra = measured("intra_lpips", lambda: self._intra(pictures))
        mean_nearest = measured("nearest_lpips", lambda: float(pictures.nearest[0].mean()))
        threshold = measured("copy_threshold", lambda: self._threshold[0])
        rate = measured("copy_rate", lambda: metrics.copy_rate(pictures.nearest[0], self._threshold[0]))
        unadapted = measured("unadapted_rate", lambda: self._unadapted(pictures))
        kid = measured("kid", lambda: metrics.kernel_distance(*self._compared(pictures)).times(1e3))
        fid = measured("fid", lambda: metrics.frechet_distance(*self._compared(pictures)))
        precise, recalled, dense, covered = (
            measured(name, lambda measure=measure, k=k: measure(*self._compared(pictures, k + 1), k))
            for name, measure, k in _COVERAGE
        )
        vendi = measured("vendi", lambda: coverage.vendi_score(pictures.inception))
        cmmd = measured("cmmd", lambda: 1e3 * metrics.gaussian_distance(*self._compared(pictures, seen_by="clip")))
        fd_dino = measured("fd_dino", lambda: metrics.frechet_distance(*self._compared(pictures, seen_by="dino")))
        clip_image = measured("clip_image", lambda: metrics.alignment(pictures.clip, self._training.clip))
        clip_text = measured("clip_text", lambda: self._prompt_alignment(pictures, prompts))
        distances, indices = pictures.nearest if mean_nearest is not None else (torch.empty(0), torch.empty(0))
        sets = self._sets(pictures)
        return Evaluation(
            num_images=len(pictures),
            num_reference=len(self._reference) if self._reference else 0,
            intra_lpips=intra and intra.value,
            intra_lpips_error=intra and intra.error,
            nearest_lpips=mean_nearest,
            copy_rate=rate,
            copy_threshold=threshold,
            kid=kid and kid.value,
            kid_error=kid and kid.error,
            fid=fid,
            precision=precise,
            recall=recalled,
            density=dense,
            coverage=covered,
            unadapted_rate=unadapted,
            vendi=vendi,
            cmmd=cmmd,
            fd_dino=fd_dino,
            clip_image=clip_image,
            clip_text=clip_text,
            intra_lpips_protocol=self.protocol.describe(len(pictures)),
            copy_protocol=f"{self.protocol.lpips_name} to the nearest training picture or its mirror image"
            + (f"; a copy is nearer than {self._threshold[1]}" if threshold is not None else ""),
            kid_protocol=f"KID x 10³, unbiased, whole sets: {sets}",
            fid_protocol=f"FID, bicubic to 299 px: {sets}: compare only with values measured the same way",
            coverage_protocol="Inception features, 3 neighbours for precision and recall, 5 for density and coverage: "
            + sets,
            unadapted_protocol=f"{self.protocol.lpips_name}: not half of the way from {len(self._networks.source)} of "
            f"the source's pictures to the {len(self._training)} training pictures, along what tells these apart",
            vendi_protocol=f"effective number of different pictures among {len(pictures)}, by Inception features",
            clip_protocol=f"{self.protocol.clip or 'CLIP'}; CMMD x 10³, biased, sigma 10: {sets}",
            dino_protocol=f"{self.protocol.dino or 'DINOv2'} at {DINO_PX} px, Fréchet distance: {sets}",
            nearest_indices=tuple(int(i) for i in indices),
            nearest_distances=tuple(float(d) for d in distances),
            reasons=reasons,
            notes=self._threshold[2] if threshold is not None else (),
        )

    def _intra(self, pictures: Pictures) -> Estimate:
        if len(pictures) < 2:
            raise _Unmeasured("diversity needs at least 2 images; generate more, 500 or 1,000 is usual")
        rule = self.protocol
        what = f"{self._networks.lpips_name} intra, error {rule.intra} {rule.max_per_cluster} {rule.seed}"
        of = (*pictures.content, digest(pictures.index))

        def measure() -> Tensor:
            value, error = self._measured_intra(pictures)
            return torch.tensor([value, math.nan if error is None else error], dtype=torch.float64)

        value, error = self._networks.kept(what, of, measure).tolist()
        return Estimate(value, None if math.isnan(error) else error)

    def _measured_intra(self, pictures: Pictures) -> Estimate:
        _, assignment = metrics.nearest(pictures.distances[0])  # without mirror images: the published protocols
        limit = self.protocol.max_per_cluster
        if self.protocol.intra == "crdi":
            return metrics.intra_lpips_crdi(pictures, assignment, len(self._training), limit)
        generator = torch.Generator().manual_seed(self.protocol.seed)
        value = metrics.intra_lpips_cdc(pictures, assignment, len(self._training), generator, limit)
        if value is None:
            raise _Unmeasured("no two images share a nearest training picture; generate more, 500 or 1,000 is usual")
        return value

    def _unadapted(self, pictures: Pictures) -> float:
        if len(self._networks.source) < 2:
            raise _Unmeasured(NO_SOURCE)
        if len(self._training) < 2:
            raise _Unmeasured("one training picture has no spread to tell others from: give more")
        rate = self._networks.ends.unadapted_rate(pictures.left)
        if rate is None:
            raise _Unmeasured("the source's pictures are too much like the training pictures to tell single ones apart")
        return rate

    @cached_property
    def _threshold(self) -> tuple[float, str, tuple[str, ...]]:
        """Distance of a copy, the rule it comes from, and notes on the reference."""
        notes = ()
        if self._reference:
            real = self._reference.nearest[0]
            honest = real[real > SAME_PICTURE]
            if leaked := len(real) - len(honest):
                notes = (
                    f"{leaked} reference pictures are training pictures, so KID and FID reward copying: remove them",
                )
            if len(honest):
                return metrics.copy_threshold(honest), f"all but 1 % of {len(honest)} held-out pictures", notes
        if len(self._training) < 2:
            raise _Unmeasured("one training picture has no spread to judge copies by: give --reference-dir")
        rule = f"half the median distance between neighbours among the {len(self._training)} training pictures"
        return metrics.spread_threshold(self._training.distances[1]), rule, notes

    def _sizes(self, pictures: Pictures) -> tuple[int, int]:
        """How many pictures KID, FID and coverage compare with how many."""
        if pictures is self._reference:
            return len(pictures) // 2, len(pictures) - len(pictures) // 2
        return len(pictures), len(self._reference) if self._reference else 0

    def _prompt_alignment(self, pictures: Pictures, prompts: Sequence[str]) -> float:
        features = pictures.clip
        if not prompts:
            raise _Unmeasured("these pictures were drawn of no prompt that is known")
        return metrics.prompt_alignment(features, self._networks.clip_texts(prompts))

    def _compared(self, pictures: Pictures, at_least: int = 2, seen_by: Sight = "inception") -> tuple[Tensor, Tensor]:
        """Features of the two sets that KID, FID, coverage, CMMD and FD-DINOv2 compare."""
        if self._reference is None:
            raise _Unmeasured(NO_REFERENCE)
        if min(sizes := self._sizes(pictures)) < at_least:
            raise _Unmeasured(
                f"{sizes[0]} pictures against {sizes[1]}: this needs at least {at_least} in each set, and hundreds to "
                "mean something; give more"
            )
        features = getattr(pictures, seen_by)
        if pictures is not self._reference:
            return features, getattr(self._reference, seen_by)
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(self.protocol.seed))
        return features[order[: sizes[0]]], features[order[sizes[0] :]]

    def _sets(self, pictures: Pictures) -> str:
        a, b = self._sizes(pictures)
        if pictures is self._reference:
            return f"two disjoint random halves ({a} and {b}) of the reference pictures"
        return f"{a} {pictures.title}, {b} reference pictures"


def _check(images: Tensor, title: str) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise UserError(f"the {title} pictures have shape {tuple(images.shape)}; give (N, 3, height, width), N >= 1")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1.001 and high <= 1.001):
        raise UserError(f"the {title} pictures range from {low:g} to {high:g}; scale them to [-1, 1]")
