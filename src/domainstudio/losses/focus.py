"""Where a picture shows which of two domains it is of."""

import torch
from torch import Tensor

from domainstudio.precision import double


class DomainFocus:
    """What each number of a picture counts at high noise, where a network decides how a picture is composed.

    `share` of `mean_weight` goes to numbers by how far they tell the target domain from the source, the rest to all
    alike. Those are few in a near domain: what it is gets learned, and little of what ten pictures show besides.

    With m_T and m_S the means and v_T and v_S the variances of a number within both domains, it tells

        u = max(0, 1 - r v_S / (v_S + d)),

    what sets the target's pictures apart from the source's as seen from m_T, of which E_S (x - m_T)² is v_S + d and
    E_T (x - m_T)² is v_T. d is (m_T - m_S)² less what so few pictures make of it by chance, at least 0; r is v_T / v_S,
    at most 1: a domain that varies more tells by its mean alone. Ten pictures do not tell each number's variance: r is
    the mean of v_T over that of v_S, over all places of a channel.

    Source: the weights of `DomainTransfer`, along channels.
    """

    def __init__(self, mean_weight: float, share: float):
        self.mean_weight, self.share = mean_weight, share
        self.weight: Tensor | None = None
        """(C, h, w), once fitted: `mean_weight` on average, unless numbers would count more than 1: these count 1."""

    def fit(self, target: Tensor, source: Tensor) -> None:
        """To all pictures of both domains, (N, V, C, h, w) and (M, C, h, w), M >= 2; V views show one picture.

        One picture has no spread: it is taken to vary as the source does.
        """
        views, source = double(target.flatten(0, 1)), double(source)
        num, mean_t, var_s = len(target), views.mean(0), source.var(0)
        if num == 1:
            chance_t = var_t = var_s
        else:
            chance_t = double(target).mean(1).var(0) / num
            var_t = (views - mean_t).square().mean(0) + chance_t
        apart = ((mean_t - source.mean(0)).square() - chance_t - var_s / len(source)).clamp(min=0)
        mean_var_t, mean_var_s = (var.mean((-2, -1), keepdim=True) for var in (var_t, var_s))
        of_target = (mean_var_t / mean_var_s.clamp(min=1e-30)).clamp(max=1) * var_s
        of_source = var_s + apart
        told = (of_source - of_target).clamp(min=0) / of_source.clamp(min=1e-30)
        if not told.any():
            told = torch.ones_like(told)
        parts = 1 - self.share + self.share * told / told.mean()
        self.weight = (self.mean_weight * parts).clamp(max=1).to(target)
