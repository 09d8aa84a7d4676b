import torch

from domainstudio.data.nearness import nearest_first
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
