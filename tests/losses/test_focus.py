import pytest
import torch

from domainstudio.losses.focus import DomainFocus


def drawn(num, seed, shift=0.0, spread=1.0):
    """(num, 3, 8, 8): the upper half shifted, the last channel wider or narrower."""
    pictures = torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    pictures[:, :, :4] += shift
    pictures[:, 2] *= spread
    return pictures


def weight(target, source, mean_weight=0.2, share=1.0):
    """Fitted to pictures of one view each."""
    focus = DomainFocus(mean_weight, share)
    focus.fit(target[:, None], source)
    return focus.weight


def told(target, source):
    """What each number is given, over what a number that tells all would be given."""
    marked = [torch.cat([pictures, torch.zeros_like(pictures[:, :1])], 1) for pictures in (target, source)]
    marked[0][:, -1] = 1.0
    given = weight(*marked, mean_weight=1e-3)
    return given[:-1] / given[-1]


@pytest.mark.parametrize(("shift", "expected"), [(1.0, 0.5), (3.0, 0.9), (100.0, 0.9999)])
def test_means_tell_as_far_as_they_differ(shift, expected):
    """A shift of s standard deviations of domains that vary alike: 1 - 1 / (1 + s²)."""
    part = told(drawn(300, 0, shift), drawn(300, 1))
    assert part[:, :4].mean().item() == pytest.approx(expected, abs=0.02)
    assert part[:, 4:].mean() < 0.03


@pytest.mark.parametrize("num", [10, 300])
def test_a_domain_that_varies_less_tells_as_much_as_it_does_not_vary(num):
    """Half of the standard deviation: 1 - 1 / 4, where the means are the same; of ten pictures, too."""
    part = told(drawn(num, 0, spread=0.5), drawn(300, 1))
    assert part[2].mean().item() == pytest.approx(0.75, abs=0.05)
    assert part[:2].mean() < 0.1


def test_a_domain_that_varies_more_tells_by_its_mean_alone():
    part = told(drawn(300, 0, shift=4.0, spread=2.0), drawn(300, 1))
    assert part[2, :4].mean().item() == pytest.approx(1 - 1 / 65, abs=0.02), "its shift is doubled, too"
    assert part[2, 4:].mean() < 0.03


def test_views_of_a_picture_are_not_pictures_more():
    target, source = drawn(10, 0, 1.0), drawn(300, 1)
    focus = DomainFocus(0.2, 1.0)
    focus.fit(target[:, None].repeat(1, 2, 1, 1, 1), source)
    torch.testing.assert_close(focus.weight, weight(target, source))


def test_views_that_say_something_else_are():
    """Two views that have nothing in common are as good as two pictures."""
    target, source = drawn(20, 0, 1.0), drawn(300, 1)
    focus = DomainFocus(0.2, 1.0)
    focus.fit(target.unflatten(0, (10, 2)), source)
    assert (focus.weight - weight(target, source)).abs().mean() < 0.01


def test_one_picture_tells_by_its_distance():
    """It is taken to vary as the source does: by 2, which makes 2 + 2 / 2 of its squared distance of 9 by chance."""
    target = torch.zeros(1, 1, 2, 2)
    target[:, :, 0] = 3.0
    source = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    part = told(target, source)
    torch.testing.assert_close(part[0, 0], torch.full((2,), 1 - 2 / (2 + 6)))
    assert part[0, 1].abs().max() == 0


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_weight_is_what_it_was_on_average(share):
    given = weight(drawn(10, 0, 1.0), drawn(300, 1), 0.2, share)
    assert given.shape == (3, 8, 8)
    assert given.dtype == torch.float32
    assert given.mean().item() == pytest.approx(0.2, rel=1e-6)
    assert given.min().item() == pytest.approx(0.2 * (1 - share), abs=1e-7)
    assert given[:, :4].mean() > given[:, 4:].mean() * (1 + share)


def test_no_number_counts_more_than_one():
    pictures, samples = torch.zeros(10, 1, 8, 8), torch.zeros(30, 1, 8, 8)
    pictures[:, :, 0, 0] = 1
    given = weight(pictures, samples)
    assert given[0, 0, 0] == 1
    assert given.sum() == 1


@pytest.mark.parametrize("varies", [0.0, 1.0])
def test_where_nothing_tells_more_than_elsewhere_all_counts_alike(varies):
    source = varies * torch.arange(30.0).view(30, 1, 1, 1).expand(-1, 1, 4, 4)
    torch.testing.assert_close(weight(source[:10], source, 0.2, 0.8), torch.full((1, 4, 4), 0.2))
