"""Against literal loops over the definitions, and closed forms."""

import math

import pytest
import torch

from domainstudio.evaluation.coverage import coverage, density, precision, recall, vendi_score


def features(num: int, seed: int, dim: int = 6) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def literally_inside(points, centres, k) -> list[list[bool]]:
    """[point][centre], one pair at a time."""
    balls = []
    for i, centre in enumerate(centres):
        others = sorted(math.dist(centre, other) for j, other in enumerate(centres) if j != i)
        balls.append((centre, others[k - 1]))
    return [[math.dist(point, centre) <= radius for centre, radius in balls] for point in points]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_they_are_the_published_sums(k):
    generated, real = (1.3 * features(20, 0, 12)).tolist(), features(30, 1, 12).tolist()
    a, b = torch.tensor(generated), torch.tensor(real)
    in_real, in_generated = literally_inside(generated, real, k), literally_inside(real, generated, k)
    assert precision(a, b, k) == pytest.approx(sum(any(row) for row in in_real) / 20)
    assert recall(a, b, k) == pytest.approx(sum(any(row) for row in in_generated) / 30)
    assert density(a, b, k) == pytest.approx(sum(sum(row) for row in in_real) / (k * 20))
    assert coverage(a, b, k) == pytest.approx(sum(any(column) for column in zip(*in_real, strict=True)) / 30)
    assert 0 < precision(a, b, k) < 1  # these sets could tell a wrong sum from a right one
    assert recall(a, b, k) != precision(a, b, k)


def test_a_set_of_the_same_distribution_has_density_1_and_the_known_coverage():
    a, b = features(2000, 0, 3), features(2000, 1, 3)
    assert density(a, b) == pytest.approx(1, abs=0.05)
    assert coverage(a, b) == pytest.approx(1 - 2**-5, abs=0.02)


def test_a_copier_is_precise_and_covers_little():
    real = features(200, 0)
    copies = real[torch.arange(100) % 10]
    assert precision(copies, real) == 1
    assert coverage(copies, real) < 0.5
    assert recall(copies, real) < 0.2


def test_far_pictures_are_outside():
    real = features(50, 0)
    for measure in (precision, recall, density, coverage):
        assert measure(real + 1000, real) == 0


@pytest.mark.parametrize("measure", [precision, density, coverage])
def test_too_few_pictures_for_a_ball_are_refused(measure):
    with pytest.raises(ValueError, match="3 pictures have no 3-th nearest other"):
        measure(features(10, 0), features(3, 1), 3)


class TestVendi:
    def test_closed_forms(self):
        assert vendi_score(torch.eye(7)) == pytest.approx(7)
        assert vendi_score(torch.ones(7, 3)) == pytest.approx(1)
        assert vendi_score(torch.eye(4).repeat(5, 1)) == pytest.approx(4)
        cosine = 0.6  # two pictures: eigenvalues (1 ± cosine) / 2
        pair = torch.tensor([[1.0, 0.0], [cosine, 0.8]])
        shares = ((1 + cosine) / 2, (1 - cosine) / 2)
        assert vendi_score(pair) == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))

    @pytest.mark.parametrize(("num", "dim"), [(5, 12), (12, 5)])
    def test_it_is_the_entropy_of_the_table_of_cosines(self, num, dim):
        x = features(num, 0, dim).double()
        unit = x / x.norm(dim=1, keepdim=True)
        shares = [float(value) for value in torch.linalg.eigvalsh(unit @ unit.T / num) if value > 1e-12]
        assert vendi_score(x) == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))
        assert vendi_score(x) == pytest.approx(vendi_score(3 * x))  # length of features means nothing
