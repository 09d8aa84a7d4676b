"""Standard errors: what they say is how much a number varies from one draw of pictures to the next."""

import statistics

import pytest
import torch
from torch import Tensor

from domainstudio.evaluation import metrics
from domainstudio.evaluation.halves import NUM_HALVES, Estimate, error_of, halves, sums_over_pairs


def draw(num: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_a_half_is_half_of_the_pictures_at_random():
    for num in (8, 9):
        chosen = halves(num)
        assert chosen.shape == (num, NUM_HALVES)
        assert chosen.sum(0).tolist() == [4] * NUM_HALVES
        assert 0.3 < chosen.mean(1).min() < chosen.mean(1).max() < 0.7
    assert halves(8).equal(halves(8))


def test_sums_over_pairs_are_the_literal_sums():
    table, chosen = draw(7, 7, 0), halves(7)
    members = [half.nonzero().flatten().tolist() for half in chosen.T]
    expected = [sum(float(table[i, j]) for i in own for j in own if i != j) for own in members]
    assert sums_over_pairs(table, chosen).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_error_of_a_mean_is_the_textbook_one():
    values = draw(400, 1, 1).double()[:, 0]
    means = values @ halves(400) / 200
    assert error_of(means) == pytest.approx(float(values.std()) / 20, rel=0.2)


def agreement(estimates: list[Estimate]) -> float:
    """Of the mean error that is told, over how much the values vary."""
    return statistics.fmean(e.error for e in estimates) / statistics.stdev(e.value for e in estimates)


def test_the_error_of_kid_is_its_spread_over_draws():
    drawn = [metrics.kernel_distance(draw(60, 6, s, 0.4), draw(80, 6, 1000 + s)) for s in range(200)]
    assert agreement(drawn) == pytest.approx(1, abs=0.2)


def test_the_error_of_kid_is_too_large_where_sets_agree():
    drawn = [metrics.kernel_distance(draw(60, 6, s), draw(80, 6, 1000 + s)) for s in range(200)]
    assert 1.3 < agreement(drawn) < 2


@pytest.mark.parametrize("protocol", ["cdc", "crdi"])
def test_the_error_of_intra_lpips_is_its_spread_over_draws(protocol):
    centres = 3 * draw(5, 4, 7)

    def estimate(seed: int) -> Estimate:
        """Of 100 pictures about five centres, not equally often, that vary by more or less."""
        generator = torch.Generator().manual_seed(seed)
        cluster = torch.multinomial(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]), 100, True, generator=generator)
        pictures = centres[cluster] + (0.3 + 0.2 * cluster[:, None]) * draw(100, 4, seed)
        if protocol == "crdi":
            return metrics.intra_lpips_crdi(pictures, cluster, 5)
        return metrics.intra_lpips_cdc(pictures, cluster, 5, generator)

    assert agreement([estimate(seed) for seed in range(200)]) == pytest.approx(1, abs=0.25)


def test_too_few_pictures_have_no_error():
    assert metrics.kernel_distance(draw(3, 4, 0), draw(50, 4, 1)).error is None
    assert metrics.intra_lpips_cdc(draw(3, 4, 0), torch.zeros(3).long(), 1, torch.Generator()).error is None
    assert metrics.intra_lpips_crdi(draw(3, 4, 0), torch.arange(3), 3) == (0, None)


def test_another_unit():
    assert Estimate(2.0, 0.5).times(10) == (20, 5)
    assert Estimate(2.0, None).times(10) == (20, None)
