"""The line against its definition, its ends against new pictures, and what can be told."""

import statistics

import pytest
import torch
from torch import Tensor

from domainstudio.evaluation.way import Way

SAMPLES, SOURCE, TARGET = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (6, 5, 4))
SOURCE = SOURCE + torch.tensor([2.0, 0, 0])


def along(x, target, source) -> float:
    """Written out, a dimension at a time, in double precision."""
    total, num = 0.0, len(target) + len(source)
    for j, at in enumerate(x.double()):
        t, s = target[:, j].double(), source[:, j].double()
        apart = s.mean() - t.mean()
        within = ((t - t.mean()).square().sum() + (s - s.mean()).square().sum()) / (num - 2)
        chance = within / len(t) + within / len(s)
        weight = max(0.0, float(apart**2 - chance)) / (apart**2 + within)
        total += float(2 * weight * (at - (s.mean() + t.mean()) / 2) * apart)
    return total


def others(pictures, k):
    return torch.cat([pictures[:k], pictures[k + 1 :]])


def test_it_is_its_definition():
    target, source = TARGET, SOURCE
    way = Way(target, source)
    arrived = [along(x, others(target, i), source) for i, x in enumerate(target)]
    left_behind = [along(x, target, others(source, i)) for i, x in enumerate(source)]
    end = sum(arrived) / len(arrived)
    assert way.ends.length == pytest.approx(sum(left_behind) / len(left_behind) - end, rel=1e-5)
    assert way.ends.spread == pytest.approx(statistics.stdev(arrived) + statistics.stdev(left_behind), rel=1e-5)
    for x, found in zip(SAMPLES, way.left(SAMPLES), strict=True):
        assert float(found) == pytest.approx(along(x, target, source) - end, rel=1e-5)


def test_a_picture_of_the_noise_of_one_of_the_sources_is_not_compared_with_it():
    way, samples = Way(TARGET, SOURCE), SAMPLES[:3]
    torch.testing.assert_close(way.left(SOURCE, paired=True).mean().item(), way.ends.length)
    moved = way.left(samples, paired=True) - way.left(samples)
    for k, x in enumerate(samples):
        expected = along(x, TARGET, others(SOURCE, k)) - along(x, TARGET, SOURCE)
        assert float(moved[k]) == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-3


@pytest.mark.parametrize("num", [5, 10])
def test_its_ends_are_where_new_pictures_lie(num):
    """Of 50 dimensions one differs: on average 0 for new pictures of the target, the whole way for the source's."""
    generator, ends = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        source, target, arrived, behind = (torch.randn(num, 50, generator=generator) for _ in range(4))
        source[:, 0] += 4
        behind[:, 0] += 4
        way = Way(target, source)
        ends.append((float(way.left(arrived).mean()), float(way.left(behind).mean()), way.ends.length))
    arrived, behind, length = (sum(values) / len(ends) for values in zip(*ends, strict=True))
    assert arrived == pytest.approx(0, abs=0.05 * length)
    assert behind == pytest.approx(length, rel=0.05)


def test_it_sees_a_small_attribute_among_much_that_differs():
    """A hundredth of what varies tells the domains apart: single pictures can be told by it."""
    generator = torch.Generator().manual_seed(0)

    def drawn(num: int, has: bool) -> Tensor:
        pictures = torch.randn(num, 1000, generator=generator)
        pictures[:, :10] += 3 * has
        return pictures

    way = Way(drawn(10, True), drawn(16, False))
    assert way.ends.tells
    assert way.ends.unadapted_rate(way.left(drawn(200, True))) <= 0.03
    assert way.ends.unadapted_rate(way.left(drawn(200, False))) >= 0.97


def test_pictures_are_told_where_their_domains_lie_apart():
    way = Way(TARGET, SOURCE + 10)
    assert way.ends.tells
    left = way.left(SAMPLES)
    assert way.ends.unadapted_rate(left) == 0
    assert way.ends.unadapted_rate(torch.full((4,), way.ends.length)) == 1
    assert way.ends.unadapted_rate(way.left(SAMPLES + 10)) == 1
    near = Way(TARGET, torch.randn(5, 3, generator=torch.Generator().manual_seed(9)))
    assert not near.ends.tells
    assert near.ends.unadapted_rate(left) is None


def test_domains_without_spread_are_no_division_by_zero():
    way = Way(torch.zeros(3, 4), torch.zeros(2, 4))
    assert way.ends == (0, 0)
    assert not way.ends.tells
    assert Way(torch.zeros(3, 4), torch.ones(2, 4)).ends.length > 0


def test_they_are_told_up_to_one_in_twenty_mistakes():
    """One dimension, exact spread: both domains at +- 1 about their means, which lie twice the distance apart."""
    for apart, told in ((3.2, False), (3.5, True)):
        target = torch.tensor([[-1.0], [1.0]]).repeat(200, 1)
        assert Way(target, target + apart).ends.tells is told
