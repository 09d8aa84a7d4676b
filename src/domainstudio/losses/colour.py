"""Colour transfer: the source's pictures are to be drawn in the colours of the target domain."""

import torch
from torch import Tensor

SMALLEST_VARIANCE = 1e-6
"""Of the largest of the source's: what varies less does not vary."""


class ColourTransfer:
    """How pictures of one domain are moved to the colours of another where those vary less.

    A colour is what the C channels say at one place of a picture, a point in R^C. In the directions f_k (length 1) that
    simultaneously diagonalise the covariances of both domains' colours, those vary by r_k = var_T(f_k·x) / var_S(f_k·x)
    of the source's variance. A picture's colour f_k·x becomes m_T + sqrt(r_k) (f_k·x - m_S), with m the means. Only
    directions with r_k < 1 are moved, and count 1 - r_k: in these the target pictures agree more than the source's do,
    whatever they show (grey: in all that is colour), so that ten of them say how any picture is to look.

    Source: the linear colour transfer of Reinhard et al. 2001, along directions chosen from both covariances.
    """

    def __init__(self):
        self.directions: Tensor | None = None
        self.ratio = self.target_mean = self.source_mean = torch.zeros(0)

    def fit(self, target: Tensor, source: Tensor) -> None:
        """Finds directions and colours of both domains' pictures, each (N, C, h, w)."""
        (mean_t, covariance_t), (mean_s, covariance_s) = _moments(target), _moments(source)
        variance, axes = torch.linalg.eigh(covariance_s)
        whiten = axes * variance.clamp(min=max(SMALLEST_VARIANCE * variance.max().item(), 1e-12)).rsqrt()
        ratio, rotation = torch.linalg.eigh(whiten.T @ covariance_t @ whiten)
        less = ratio < 1
        directions = torch.nn.functional.normalize(whiten @ rotation[:, less], dim=0)
        self.directions, self.ratio = directions.to(target), ratio[less].clamp(min=0).to(target)
        self.target_mean, self.source_mean = (mean_t @ directions).to(target), (mean_s @ directions).to(target)

    def error(self, x: Tensor, picture: Tensor) -> Tensor:
        """How far colours of x are from those of the moved picture; both (B, C, h, w) -> (B,).

        Mean over places of sum over k of (1 - r_k) (f_k·x - moved f_k·picture)² / C.
        """
        assert self.directions is not None, "fit it first"
        moved = self.target_mean + self.ratio.sqrt() * (_colours(picture) @ self.directions - self.source_mean)
        wrong = (_colours(x) @ self.directions - moved).square() @ (1 - self.ratio)
        return wrong.mean(1) / x.shape[1]


def _colours(pictures: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h w, C)."""
    return pictures.flatten(2).mT


def _moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of colours, in double precision, picture by picture."""
    mean = pictures.mean((0, 2, 3), dtype=torch.float64)
    centred = (colours.double() - mean for colours in _colours(pictures))
    covariance = torch.stack([colours.T @ colours / len(colours) for colours in centred]).mean(0)
    return mean, covariance
