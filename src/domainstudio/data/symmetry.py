"""Whether pictures may be mirrored."""

from torch import Tensor

from domainstudio.precision import double

SYMMETRIC_BELOW = 0.05
"""Of the bundled domains, those that face both ways are at 0.00 to 0.03, those that face one way at 0.10 and 0.34."""


def asymmetry(images: Tensor) -> float:
    """How much further pictures are from each other's mirror images than from each other.

    The mean squared distance from one picture to the mirror image of another, over that to the other itself, less 1. It
    is unbiased: about 0 for pictures of a domain in which mirror images are as likely, above 0 where faces look
    one way.

    Args:
        images: (N, 3, H, W), N >= 2.

    Trap: writing covers too few pixels to be noticed.
    """
    flat, mirrored = double(images.flatten(1)), double(images.flip(-1).flatten(1))

    def mean_product(a: Tensor, b: Tensor) -> Tensor:
        """Over pairs of two different pictures."""
        products = a @ b.T
        return (products.sum() - products.trace()) / (len(a) * (len(a) - 1))

    alike = mean_product(flat, flat)
    apart = 2 * (flat.square().sum(1).mean() - alike)
    return float(2 * (alike - mean_product(flat, mirrored)) / apart) if apart > 0 else 0.0
