"""Which of a model's own pictures are most like a few pictures of another domain."""

from torch import Tensor

from domainstudio.losses.transfer import DomainTransfer
from domainstudio.precision import double

MOST_TO_CHOOSE_AMONG = 3
"""Times as many source samples as are shown."""


def nearest_first(samples: Tensor, pictures: Tensor) -> Tensor:
    """Indices (M,) of the source samples, those first that are nearest to the domain of the pictures.

    Near is a small inner product with the difference of both domains' means, each number weighted by how far it tells
    them apart beyond chance (`telling`).

    Args:
        samples: (M, ...) pictures of the source, M >= 2.
        pictures: (N, ...) of the target domain.

    Source: a linear discriminant of independent numbers.
    """
    source, target = double(samples.flatten(1)), double(pictures.flatten(1))
    separation = (source.mean(0) - target.mean(0)) * telling(source, target)
    return (source @ separation).argsort(stable=True)


def pool_size(nearest: int, samples: Tensor, pictures: Tensor, moved: bool) -> int:
    """Of how many source samples to choose the nearest: nearest (1 + 2 s), between `nearest` and three times as many.

    s is the part of what tells the domains apart that `DomainTransfer` leaves where it is,

        s = sum of t (1 - w) (m_T - m_S)² / sum of t (m_T - m_S)²,

    over places and its directions, with its weights w and t = `telling`. What is moved onto the target domain tells of
    no sample whether it could be a picture there, and to choose by it costs variety for nothing.

    Args:
        samples: (M, C, h, w) of the source, M >= 2: the first of those that there will be.
        pictures: (N, V, C, h, w) of the target domain in all views.
        moved: whether there is a transfer; without it s is 1.
    """
    most = MOST_TO_CHOOSE_AMONG * nearest
    if not moved:
        return most
    transfer = DomainTransfer()
    transfer.fit(pictures, samples)
    source, target = (double(transfer.along(side)) for side in (samples, pictures.flatten(0, 1)))
    apart = telling(source, target) * (source.mean(0) - target.mean(0)).square()
    left = (apart * (1 - double(transfer.weight))).sum() / apart.sum().clamp(min=1e-30)
    return nearest + round((most - nearest) * left.item())


def telling(one: Tensor, other: Tensor) -> Tensor:
    """How far the mean of each number tells two domains apart, beyond chance: (N, ...), (M, ...) -> (...) in [0, 1).

    max(0, d - e) / (d + v): d the squared distance of its means, v its variance within the domains, and
    e = v (1 / N + 1 / M) what so few pictures make of d by chance. Double precision; N + M >= 3.

    Source: the part of a number's variance that lies between the domains, shrunk by its own evidence, as
    `evaluation.way` uses it.
    """
    one, other = double(one), double(other)
    squares = sum((side - side.mean(0)).square().sum(0) for side in (one, other))
    within = squares / (len(one) + len(other) - 2)
    apart = (one.mean(0) - other.mean(0)).square()
    chance = within * (1 / len(one) + 1 / len(other))
    return (apart - chance).clamp(min=0) / (apart + within).clamp(min=1e-30)
