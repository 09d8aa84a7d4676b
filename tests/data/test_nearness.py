import pytest
import torch

from domainstudio.data.nearness import nearest_first, pool_size, telling
from domainstudio.evaluation.way import Way


def drawn(num, seed):
    return torch.randn(num, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def with_bars():
    """Of 100 pictures every fifth has a bar across the upper half, and the next one is brighter elsewhere; ten others
    all have the bar."""
    samples, pictures = drawn(100, 0), drawn(10, 1)
    samples[::5, :, :4] += 2
    samples[1::5, :, 4:] += 2
    pictures[:, :, :4] += 2
    return samples, pictures


def test_samples_that_show_what_the_pictures_agree_on_come_first():
    samples, pictures = with_bars()
    order = nearest_first(samples, pictures)
    assert set(order[:20].tolist()) == set(range(0, 100, 5))
    assert sorted(order.tolist()) == list(range(100))


def test_the_order_is_that_of_the_way():
    """The same line, written for what counts there: where single pictures lie, and not only which is nearer."""
    samples, pictures = with_bars()
    left = Way(pictures.flatten(1).double(), samples.flatten(1).double()).left(samples.flatten(1).double())
    assert torch.equal(nearest_first(samples, pictures), left.argsort())


def test_what_never_varies_and_what_does_not_differ_tell_nothing():
    samples, pictures = with_bars()
    order = nearest_first(samples, pictures)
    more = torch.cat([samples, torch.ones(100, 1, 8, 8)], 1), torch.cat([pictures, torch.ones(10, 1, 8, 8)], 1)
    assert torch.equal(nearest_first(*more), order)
    alike = nearest_first(torch.ones(5, 3), torch.ones(4, 3))
    assert torch.equal(alike, torch.arange(5)), "in the order in which they were drawn"


def test_one_picture_is_enough():
    samples, pictures = with_bars()
    order = nearest_first(samples, pictures[:1])
    assert len(set(order[:20].tolist()) & set(range(0, 100, 5))) > 12


@pytest.mark.parametrize(
    ("shift", "spread", "expected"),
    [(1.0, 1.0, 200), (1.0, 0.5, 125), (2.0, 1.0, 140), (30.0, 1.0, 100)],
)
def test_the_less_a_transfer_moves_the_more_there_are_to_choose_among(shift, spread, expected):
    """Of a shift s and r times the variance it leaves r / (1 + s²)."""
    pictures = spread * torch.randn(1000, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    pictures[..., :4, :] += shift
    assert pool_size(100, samples, pictures, moved=True) == pytest.approx(expected, abs=4)
    assert pool_size(100, samples, pictures, moved=False) == 300


def test_where_nothing_tells_there_is_nothing_to_choose():
    assert pool_size(100, torch.ones(5, 1, 2, 2), torch.ones(4, 1, 1, 2, 2), moved=True) == 100


def shifted(num, seed, shift=0.0):
    pictures = drawn(num, seed)
    pictures[:, :, :4] += shift
    return pictures


def test_what_is_the_same_in_both_tells_next_to_nothing():
    told = telling(shifted(10, 0), shifted(300, 1))
    assert told.min() == 0
    assert told.mean() < 0.05
    assert (told == 0).double().mean() == pytest.approx(0.68, abs=0.1), "but where chance does more than on average"


@pytest.mark.parametrize(("shift", "expected"), [(1.0, 0.5), (3.0, 0.9), (100.0, 0.9999)])
def test_means_tell_as_far_as_they_differ(shift, expected):
    """A shift of s standard deviations: s² / (s² + 1)."""
    told = telling(shifted(300, 0, shift), shifted(300, 1))
    assert told[:, :4].mean().item() == pytest.approx(expected, abs=0.02)
    assert told[:, 4:].mean() < 0.01


def test_both_domains_are_alike_to_what_tells_them_apart():
    one, other = shifted(10, 0, 1.0), shifted(50, 1)
    torch.testing.assert_close(telling(one, other), telling(other, one))
    torch.testing.assert_close(telling(7 * one, 7 * other), telling(one, other))


def test_what_never_varies_tells_all_or_nothing():
    one, other = torch.ones(4, 3), torch.ones(5, 3)
    other[:, 0] = 2
    assert telling(one, other).tolist() == [1.0, 0.0, 0.0]
