"""How far pictures are on the way from a source to a target domain, as far as a few pictures of both say."""

from statistics import NormalDist
from typing import NamedTuple, Self

import torch
from torch import Tensor

from domainstudio.precision import double


class Ends(NamedTuple):
    """How far apart both ends of a `Way` are, and how certain they are."""

    length: float
    """What is left for the source."""
    spread: float
    """Of pictures of both domains: the sum of their standard deviations."""

    MISTAKEN = 0.05
    """Share of known pictures taken for those of the other side, above which no single picture is told."""

    @property
    def tells(self) -> bool:
        """Whether both domains are far enough apart for their spread (normal) that single pictures can be told."""
        return 0 < self.length >= NormalDist().inv_cdf(1 - self.MISTAKEN) * self.spread

    def unadapted_rate(self, left: Tensor) -> float | None:
        """Share (0 to 1) of pictures with more than half of the way left: they look more like the source's.

        None where single pictures cannot be told.
        """
        return float(double(left > self.length / 2).mean()) if self.tells else None


class Way:
    """The way from a source to a target domain, along a line through their mean embeddings.

    What is left of it for a picture x is, up to a constant, 2 sum over j of

        w_j (x - (m_S + m_T) / 2)_j (m_S - m_T)_j,    w_j = max(0, d_j - e_j) / (d_j + v_j),

    with means m, d_j = (m_S - m_T)_j², v_j the variance within both domains, and e_j = v_j (1 / M + 1 / K), what so few
    pictures make of d_j by chance: a dimension counts by how far it tells the domains apart, so that a small attribute
    is seen where it is, and not what else differs among pictures. Both ends are where pictures lie that are left out
    when the line is found.

    Args:
        target: (M, D) embeddings, M >= 2.
        source: (K, D), K >= 2.

    Source: a linear discriminant of independent dimensions, each shrunk by its own evidence.
    Trap: below 0 for copies, which are further along than new pictures of the target: they share its accidents.
    """

    def __init__(self, target: Tensor, source: Tensor):
        self._target, self._source = _Side.of(target), _Side.of(source)
        self._line = _Line.between(self._target, self._source)
        arrived = torch.stack([_Line.between(self._target.without(x), self._source).along(x) for x in target])
        left_behind = torch.stack([self._line_without(x).along(x) for x in source])
        self._end = arrived.mean()
        self.ends = Ends(float(left_behind.mean() - self._end), float(arrived.std() + left_behind.std()))
        self._pictures = source

    def left(self, pictures: Tensor, paired: bool = False) -> Tensor:
        """What is left for each of N pictures, (N,): on average 0 for new ones of the target, `ends.length` for the
        source's.

        Args:
            pictures: (N, D) embeddings.
            paired: picture i is of the same noise as the source's i-th, which is left out for it; N <= K.
        """
        if not paired:
            return self._line.along(pictures) - self._end
        pairs = zip(pictures, self._pictures[: len(pictures)], strict=True)
        return torch.stack([self._line_without(own).along(x) for x, own in pairs]) - self._end

    def _line_without(self, own: Tensor) -> "_Line":
        """As if this one of the source's pictures were not known."""
        return _Line.between(self._target, self._source.without(own))


class _Side(NamedTuple):
    """Mean (D,) of N pictures, and their squared deviations from it, summed, (D,)."""

    num: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, pictures: Tensor) -> Self:
        mean = pictures.mean(0)
        return cls(len(pictures), mean, (pictures - mean).square().sum(0))

    def without(self, picture: Tensor) -> Self:
        """The others, if this is one of them."""
        others = self.num - 1
        apart = picture - self.mean
        squares = (self.squares - apart.square() * (self.num / others)).clamp(min=0)
        return type(self)(others, self.mean - apart / others, squares)


class _Line(NamedTuple):
    """The middle of both means (D,), and the weighted direction (D,) from the target to the source."""

    middle: Tensor
    direction: Tensor

    @classmethod
    def between(cls, target: _Side, source: _Side) -> Self:
        apart = source.mean - target.mean
        within = (target.squares + source.squares) / (target.num + source.num - 2)
        chance = within * (1 / target.num + 1 / source.num)
        weight = (apart.square() - chance).clamp(min=0) / (apart.square() + within).clamp(min=1e-30)
        return cls((target.mean + source.mean) / 2, 2 * weight * apart)

    def along(self, pictures: Tensor) -> Tensor:
        """Where (..., D) lie, from the target on; the middle is 0."""
        return (pictures - self.middle) @ self.direction
