import pytest
import torch

from domainstudio.losses.focus import DomainFocus, telling


def drawn(num, seed, shift=0.0):
    pictures = torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    pictures[:, :, :4] += shift
    return pictures


def test_what_is_the_same_in_both_tells_next_to_nothing():
    told = telling(drawn(10, 0), drawn(300, 1))
    assert told.min() == 0
    assert told.mean() < 0.05
    assert (told == 0).double().mean() == pytest.approx(0.68, abs=0.1), "but where chance does more than on average"


@pytest.mark.parametrize(("shift", "expected"), [(1.0, 0.5), (3.0, 0.9), (100.0, 0.9999)])
def test_what_differs_tells_as_far_as_it_does(shift, expected):
    """A shift of s standard deviations: s² / (s² + 1)."""
    told = telling(drawn(300, 0, shift), drawn(300, 1))
    assert told[:, :4].mean().item() == pytest.approx(expected, abs=0.02)
    assert told[:, 4:].mean() < 0.01


def test_both_domains_are_alike_to_it():
    one, other = drawn(10, 0, 1.0), drawn(50, 1)
    torch.testing.assert_close(telling(one, other), telling(other, one))
    torch.testing.assert_close(telling(7 * one, 7 * other), telling(one, other))


def test_what_never_varies_tells_all_or_nothing():
    one, other = torch.ones(4, 3), torch.ones(5, 3)
    other[:, 0] = 2
    assert telling(one, other).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_weight_is_what_it_was_on_average(share):
    focus = DomainFocus(share)
    focus.fit(drawn(10, 0, 1.0), drawn(300, 1))
    weight = focus.weight(0.2)
    assert weight.shape == (3, 8, 8)
    assert weight.dtype == torch.float32
    assert weight.mean().item() == pytest.approx(0.2, rel=1e-6)
    assert weight.min().item() == pytest.approx(0.2 * (1 - share), abs=1e-7)
    assert weight[:, :4].mean() > weight[:, 4:].mean() * (1 + share)


def test_no_number_counts_more_than_one():
    focus = DomainFocus(1.0)
    pictures, samples = torch.zeros(10, 1, 8, 8), torch.zeros(30, 1, 8, 8)
    pictures[:, :, 0, 0] = 1
    focus.fit(pictures, samples)
    weight = focus.weight(0.2)
    assert weight[0, 0, 0] == 1
    assert weight.sum() == 1


def test_where_nothing_tells_all_counts_alike():
    focus = DomainFocus(0.8)
    focus.fit(torch.zeros(10, 1, 4, 4), torch.zeros(30, 1, 4, 4))
    torch.testing.assert_close(focus.weight(0.2), torch.full((1, 4, 4), 0.2))
