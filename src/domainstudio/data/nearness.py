"""Which of a model's own pictures are most like a few pictures of another domain."""

from torch import Tensor

from domainstudio.losses.focus import telling


def nearest_first(samples: Tensor, pictures: Tensor) -> Tensor:
    """Indices (M,) of the source samples, those first that are nearest to the domain of the pictures.

    Near is a small inner product with the difference of both domains' means, each number weighted by how far it tells
    them apart (`telling`).

    Args:
        samples: (M, ...) pictures of the source, M >= 2.
        pictures: (N, ...) of the target domain.

    Source: a linear discriminant of independent numbers.
    """
    source, target = samples.flatten(1).double(), pictures.flatten(1).double()
    separation = (source.mean(0) - target.mean(0)) * telling(source, target)
    return (source @ separation).argsort(stable=True)
