"""Where a picture shows which of two domains it is of."""

import torch
from torch import Tensor


def telling(one: Tensor, other: Tensor) -> Tensor:
    """How far each number of a picture tells two domains apart, beyond chance: (N, ...), (M, ...) -> (...) in [0, 1).

    max(0, d - e) / (d + v): d the squared distance of its means, v its variance within the domains, and
    e = v (1 / N + 1 / M) what so few pictures make of d by chance. Double precision; N + M >= 3.

    Source: the part of a number's variance that lies between the domains, shrunk by its own evidence, as
    `evaluation.way` uses it.
    """
    one, other = one.double(), other.double()
    squares = sum((side - side.mean(0)).square().sum(0) for side in (one, other))
    within = squares / (len(one) + len(other) - 2)
    apart = (one.mean(0) - other.mean(0)).square()
    chance = within * (1 / len(one) + 1 / len(other))
    return (apart - chance).clamp(min=0) / (apart + within).clamp(min=1e-30)


class DomainFocus:
    """What each number of a picture counts at high noise, where a network decides how a picture is composed.

    `share` of the weight goes to numbers by how far they tell the target domain from the source (`telling`), the rest
    to all alike. Those are few in a near domain: what it is gets learned, and little of what ten pictures show besides.
    """

    def __init__(self, share: float):
        self.share = share
        self.part: Tensor | None = None
        """(C, h, w), 1 on average."""

    def fit(self, target: Tensor, source: Tensor) -> None:
        """To all pictures of both domains, (N, C, h, w) and (M, C, h, w)."""
        told = telling(source, target)
        if not told.any():
            told = torch.ones_like(told)
        self.part = (1 - self.share + self.share * told / told.mean()).to(target)

    def weight(self, mean_weight: float) -> Tensor:
        """(C, h, w): `mean_weight` on average, but for numbers that would count more than 1, and count 1."""
        assert self.part is not None, "fit it first"
        return (mean_weight * self.part).clamp(max=1)
