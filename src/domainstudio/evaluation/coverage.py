"""How two sets of pictures cover each other, and how varied one is, as pure functions of features.

KID and FID mix two questions that these keep apart: do the pictures look real, and is everything real among them?
Sets are (N, D) features of generated and (M, D) of real pictures, each of more than k pictures. The ball of a picture
reaches to its k-th nearest other in its own set.
"""

import torch
from torch import Tensor

from domainstudio.precision import double


def precision(generated: Tensor, real: Tensor, k: int = 3) -> float:
    """Share, 0 to 1, of generated pictures that lie in the ball of any real one.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eqs. 1 and 2.
    Trap: one outlier has a large ball and lets much in; a copier's is 1.
    """
    return float(double(_inside(generated, real, k).any(dim=1)).mean())


def recall(generated: Tensor, real: Tensor, k: int = 3) -> float:
    """Share, 0 to 1, of real pictures that lie in the ball of any generated one.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eqs. 1 and 3.
    Trap: noisy pictures have large balls and score high; grows with N.
    """
    return precision(real, generated, k)


def density(generated: Tensor, real: Tensor, k: int = 5) -> float:
    """How many real balls a generated picture lies in, over k: 1 on average for pictures of the real distribution.

    Source: Naeem et al. 2020 (arXiv 2002.09797), eq. 4.
    Trap: may exceed 1, and does where pictures crowd the middle of the real ones: never read it without coverage.
    """
    return float(double(_inside(generated, real, k)).sum(dim=1).mean() / k)


def coverage(generated: Tensor, real: Tensor, k: int = 5) -> float:
    """Share, 0 to 1, of real balls that hold a generated picture; about 1 - 2^-k for N pictures of N real ones' kind.

    Source: Naeem et al. 2020 (arXiv 2002.09797), eq. 5.
    Trap: falls where fewer are generated than are real; compare only values with the same N and M.
    """
    return float(double(_inside(generated, real, k).any(dim=0)).mean())


def vendi_score(features: Tensor) -> float:
    """The effective number of different pictures, 1 (all alike) to N (nothing in common): exp of the entropy of the
    eigenvalues of K / N, with K the cosines between (N, D) features, none of which may be 0.

    Source: Friedman and Dieng 2023 (arXiv 2210.02410), definition 3.1.
    Trap: grows with N, and noise scores high: the goal is the value of as many real pictures.
    """
    unit = torch.nn.functional.normalize(double(features), dim=1)
    shares = torch.linalg.svdvals(unit).square() / len(unit)  # the eigenvalues, without forming K
    return float(torch.special.entr(shares).sum().exp())


def _inside(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """(N, M): whether each point lies in the ball of each centre."""
    points, centres = double(points), double(centres)
    if len(centres) <= k:
        raise ValueError(f"{len(centres)} pictures have no {k}-th nearest other; give more than {k}")
    others = torch.cdist(centres, centres).fill_diagonal_(float("inf"))
    return torch.cdist(points, centres) <= others.kthvalue(k, dim=1).values
