"""Domain transfer: the source's pictures are to be drawn where the pictures of the target domain lie."""

import torch
from torch import Tensor

from domainstudio.precision import double

SMALLEST_VARIANCE = 1e-6
"""Of the largest of the source's: what varies less does not vary."""
FOLDS = 10
"""In which the target's pictures are left out, at most."""


class DomainTransfer:
    """How pictures of one domain are moved to another, as far as ten pictures say where that is.

    Means m_T and m_S are pictures: of each channel at each place. In the directions f_k of channel space (length 1)
    that diagonalise both domains' covariances about their means, pooled over places, the target's variance is r_k of
    the source's, measured on pictures that are left out when mean and directions are found: in directions chosen by
    ten pictures, these agree by accident. In direction k, at each place, a picture x becomes
    m_T + sqrt(min(1, r_k)) (f_k·x - m_S), which counts

        w_k = max(0, 1 - E_T (f_k·x - m_T)² / E_S (f_k·x - m_T)²) = max(0, 1 - r_k / (1 + d_k)),

    with d_k the squared distance of the means over the source's variance: nothing where the source's pictures
    lie about the target's mean as its own do, and all where they are far from it or its own agree (grey: in all that is
    colour). What a picture shows beyond its domain's mean stays its own.

    Source: the linear colour transfer of Reinhard et al. 2001, along directions chosen from both covariances, with a
    mean for each place.
    """

    def __init__(self):
        self.directions: Tensor | None = None
        self.ratio = self.weight = self.target_mean = self.source_mean = torch.zeros(0)
        self._spread = self._contraction = torch.zeros(0)

    def fit(self, target: Tensor, source: Tensor) -> None:
        """Finds directions, means and weights of both domains' pictures, (N, V, C, h, w) and (M, C, h, w), M >= 2.

        V views show one picture of the target: itself, and its mirror image where training shows that.
        One picture has no spread: it is taken to vary as the source does.
        """
        mean_s, covariance_s = _moments(source)
        whitening = _whitening(covariance_s)
        mean_t, whiten = _diagonalise(target, whitening)
        ratio = _held_out_ratio(target, whitening)
        apart = ((mean_t - mean_s) @ whiten).square() - ratio / len(target) - 1 / len(source)  # unbiased
        weight = 1 - ratio / (1 + apart.clamp(min=0))
        directions = torch.nn.functional.normalize(whiten, dim=0)
        self.directions, self.ratio = directions.to(target), ratio.to(target)
        self.weight = weight.clamp(min=0).to(target)
        self.target_mean, self.source_mean = (mean_t @ directions).to(target), (mean_s @ directions).to(target)
        spread = ratio.clamp(max=1).sqrt()
        self._spread = spread.to(target)
        self._contraction = ((whiten * spread) @ torch.linalg.inv(whiten)).to(target)

    def contract(self, pictures: Tensor) -> Tensor:
        """What of (B, C, h, w) the target domain lets vary: direction k times sqrt(min(1, r_k)), about 0."""
        assert self.directions is not None, "fit it first"
        return (_places(pictures) @ self._contraction).mT.unflatten(2, pictures.shape[2:])

    def along(self, pictures: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h w, C): f_k·x at each place, which counts `weight` (h w, C) when it is moved."""
        assert self.directions is not None, "fit it first"
        return _places(pictures) @ self.directions

    def error(self, x: Tensor, picture: Tensor) -> Tensor:
        """How far x is from the moved picture; both (B, C, h, w) -> (B,).

        Mean over places of sum over k of w_k (f_k·x - moved f_k·picture)² / C.
        """
        moved = self.target_mean + self._spread * (self.along(picture) - self.source_mean)
        wrong = (self.along(x) - moved).square() * self.weight
        return wrong.sum(2).mean(1) / x.shape[1]


def _places(pictures: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h w, C)."""
    return pictures.flatten(2).mT


def _moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (h w, C), and covariance (C, C) about it, unbiased and pooled over places, in double precision."""
    places = double(_places(pictures))
    mean = places.mean(0)
    apart = (places - mean).flatten(0, 1)
    return mean, apart.T @ apart / (max(len(places) - 1, 1) * len(mean))


def _whitening(covariance: Tensor) -> Tensor:
    """Directions (C, C) that are uncorrelated and vary by 1."""
    variance, axes = torch.linalg.eigh(covariance)
    return axes * variance.clamp(min=max(SMALLEST_VARIANCE * variance.max().item(), 1e-12)).rsqrt()


def _diagonalise(target: Tensor, whitening: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (h w, C) of (N, V, C, h, w), and directions (C, C) in which they are uncorrelated and the source varies by
    1, from the one on in which they vary least."""
    mean, covariance_t = _moments(target.flatten(0, 1))
    if len(target) == 1:
        return mean, whitening
    _, rotation = torch.linalg.eigh(whitening.T @ covariance_t @ whitening)
    return mean, whitening @ rotation


def _held_out_ratio(target: Tensor, whitening: Tensor) -> Tensor:
    """How much (N, V, C, h, w) vary in the directions of `_diagonalise`, (C,), which those that are measured do not
    choose; their squared distance to the mean of n others is 1 + 1 / n times as large."""
    if len(target) == 1:
        return torch.ones_like(whitening[0])
    ratio = torch.zeros_like(whitening[0])
    for left_out in torch.arange(len(target)).tensor_split(min(FOLDS, len(target))):
        others = torch.ones(len(target), dtype=torch.bool).index_fill(0, left_out, False)
        mean, directions = _diagonalise(target[others], whitening)
        apart = (double(_places(target[left_out].flatten(0, 1))) - mean) @ directions
        ratio += apart.square().mean((0, 1)) / (1 + 1 / others.sum().item()) * len(left_out) / len(target)
    return ratio
