"""Which of a model's own pictures are most like a few pictures of another domain."""

from torch import Tensor


def nearest_first(samples: Tensor, pictures: Tensor) -> Tensor:
    """Indices (M,) of the source samples, those first that are nearest to the domain of the pictures.

    Near is a small inner product with what separates the domains: of each number of a picture the difference of its
    means, times max(0, d - e) / (d + v), with d that difference squared, v the variance within the domains and
    e = v (1 / N + 1 / M) what so few pictures make of d by chance.

    Args:
        samples: (M, ...) pictures of the source, M >= 2.
        pictures: (N, ...) of the target domain.

    Source: a linear discriminant of independent numbers, each shrunk by its own evidence, as `evaluation.way` uses it.
    """
    source, target = samples.flatten(1).double(), pictures.flatten(1).double()
    apart = source.mean(0) - target.mean(0)
    squares = sum((side - side.mean(0)).square().sum(0) for side in (source, target))
    within = squares / (len(source) + len(target) - 2)
    evidence = (apart.square() - within * (1 / len(source) + 1 / len(target))).clamp(min=0)
    separation = apart * evidence / (apart.square() + within).clamp(min=1e-30)
    return (source @ separation).argsort(stable=True)
