import pytest
import torch

from domainstudio.losses.transfer import DomainTransfer


def drawn(num=50, channels=4, scale=1.0, shift=0.0, seed=0):
    """Pictures whose channels are uncorrelated, but for what 50 of them happen to have."""
    noise = torch.randn(num, channels, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * torch.as_tensor(scale).view(-1, 1, 1) + torch.as_tensor(shift).view(-1, 1, 1)


def uncorrelated(channels):
    """Pictures whose channels are uncorrelated about their means, all places together."""
    source = drawn(channels=channels)
    apart = (source - source.mean(0)).movedim(1, -1)
    whitened = torch.linalg.qr(apart.flatten(0, 2)).Q.view(apart.shape)
    return source.mean(0) + (whitened * apart.numel() ** 0.5).movedim(-1, 1)


def fitted(target, source, views=None):
    transfer = DomainTransfer()
    transfer.fit(target.unsqueeze(1) if views is None else torch.stack(views, 1), source)
    return transfer


def test_pictures_of_a_domain_with_less_spread_about_another_mean_are_matched():
    """What was moved by hand, to a mean and a spread for each channel, is where it should be; elsewhere it is not."""
    source = uncorrelated(3)
    spread, mean = torch.tensor([0.1, 0.5, 0.9]).view(-1, 1, 1), torch.tensor([5.0, -9, 0]).view(-1, 1, 1)
    transfer = fitted(source * spread + mean, source)
    assert transfer.error(source * spread + mean, source).max() < 1e-6
    # A channel that is 2 too high in all places, of three: weighted by 1 - r / (1 + d).
    high = source * spread + mean
    high[:, 0] += 2
    places = high[:, 0].mean(0) - 2 - source[:, 0].mean(0)
    apart = (places.square() / source[:, 0].var(0).mean()).flatten()
    expected = (1 - 0.01 / (1 + apart)).mean() * 4 / 3
    torch.testing.assert_close(transfer.error(high, source), expected.expand(50), rtol=1e-3, atol=0)


def test_a_wider_domain_moves_the_mean_alone():
    """Twice the spread, four units away: pictures keep theirs, and count as far as they are from the target's mean."""
    source = drawn(num=200, channels=1)
    transfer = fitted(2 * drawn(num=200, channels=1, seed=1) + 4, source)
    assert transfer.error(source + 4, source).max() < 0.05
    assert transfer.weight.mean().item() == pytest.approx(1 - 4 / (1 + 16), abs=0.02)
    near = fitted(2 * drawn(num=200, channels=1, seed=1) + 1, source)
    assert near.weight.max() == 0, "the source's pictures lie nearer to that mean than the target's own"


def test_an_attribute_moves_where_it_is():
    """The target has a bar across the upper half; the lower one is as in the source."""
    source, target = drawn(num=200), drawn(num=20, seed=1)
    target[:, :, :4] += 5
    transfer = fitted(target, source)
    weight = transfer.weight.view(8, 8, 4)
    assert weight[:4].mean() > 0.8
    assert weight[4:].mean() < 0.15
    there = source.clone()
    there[:, :, :4] += 5
    assert transfer.error(there, source).mean() < 0.05 * transfer.error(source, source).mean()


def test_grey_pictures_leave_their_brightness_to_the_source():
    """The target is a function of one channel; the error of grey pictures is small, that of coloured ones is not."""
    source = drawn(channels=3, shift=[0.1, 0.2, 0.3])
    grey = source.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    transfer = fitted(grey[:10], source)
    assert (transfer.ratio < 1e-3).sum() == 2, "all but brightness"
    assert transfer.error(grey, source).max() < 0.05 * transfer.error(source, source).min()


@pytest.mark.parametrize("channels", [1, 4])
def test_the_sources_own_domain_asks_for_next_to_nothing(channels):
    source, other = drawn(channels=channels), drawn(channels=channels, seed=1)
    far = fitted(other * 0.1 + 1, source)
    assert fitted(other, source).error(source, source).max() < 0.02 * far.error(source, source).min()


def test_directions_do_not_depend_on_the_basis():
    """The same pictures in other axes of the channels: the same ratios, and the same error where axes are rotated."""
    source, target = drawn(), drawn(10, scale=[1.0, 0.2, 3, 0.5], shift=[1.0, 0, 2, -1], seed=1)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    skew = rotation * torch.tensor([1.0, 2, 3, 4]).double()

    def turned(pictures, axes):
        return torch.einsum("bchw,cd->bdhw", pictures, axes)

    plain, rotated = fitted(target, source), fitted(turned(target, rotation), turned(source, rotation))
    x = drawn(seed=7)
    torch.testing.assert_close(rotated.error(turned(x, rotation), turned(source, rotation)), plain.error(x, source))
    skewed = fitted(turned(target, skew), turned(source, skew))
    torch.testing.assert_close(skewed.ratio, plain.ratio)
    torch.testing.assert_close(skewed.weight, plain.weight)


def test_a_channel_that_never_varies_does_no_harm():
    source, target = drawn(), drawn(10, seed=1)
    source[:, 2] = target[:, 2] = 0.5
    error = fitted(target, source).error(source, source)
    assert error.isfinite().all()
    assert error.max() < 0.2


def test_one_picture_is_taken_to_vary_as_the_source_does():
    source = drawn()
    transfer = fitted(source[:1] + 5, source)
    torch.testing.assert_close(transfer.ratio, torch.ones(4).double())
    assert fitted(source[:1] * 0, source).weight.mean() < 0.05 < transfer.weight.mean()


def test_what_ten_pictures_agree_on_by_accident_is_not_asked_for():
    """Of the source's own domain, alike at neighbouring places: in some direction any ten vary a fifth as much."""

    def smooth(num, seed):
        noise = drawn(num, channels=16, seed=seed)
        return noise[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3) + 0.1 * noise

    source, own, said, weights = smooth(200, 0), [], [], []
    for seed in range(1, 6):
        target = smooth(10, seed)
        transfer = fitted(target, source)
        variance = ((target - target.mean(0)).movedim(1, -1) @ transfer.directions).square().mean((0, 1, 2)) * 10 / 9
        own.append(variance.min().item())
        said.append(transfer.ratio[0].item())
        weights.append(transfer.weight.mean().item())
    assert max(own) < 0.25
    assert sum(said) / 5 > 0.8
    assert max(weights) < 0.25, "with their own variances 0.3"


def test_a_mirror_image_is_no_other_picture():
    """Both views of a picture are left out together, so what is shown twice says what it says once."""
    source, target = drawn(), drawn(10, scale=[1.0, 0.2, 3, 0.5], seed=1)
    once, twice = fitted(target, source), fitted(target, source, [target, target])
    torch.testing.assert_close(twice.ratio, once.ratio)
    torch.testing.assert_close(twice.weight, once.weight)
    mirrored = fitted(target, source, [target, target.flip(-1)])
    torch.testing.assert_close(mirrored.target_mean.view(8, 8, 4).flip(1), mirrored.target_mean.view(8, 8, 4))


def test_more_than_ten_pictures_are_left_out_in_ten_parts():
    source, target = drawn(num=200), drawn(23, scale=[1.0, 0.2, 3, 0.5], seed=1)
    torch.testing.assert_close(
        fitted(target, source).ratio, torch.tensor([0.04, 0.25, 1.0, 9]).double(), rtol=0.15, atol=0
    )


def test_a_contraction_leaves_what_the_target_lets_vary():
    """Three uncorrelated channels, of which the target has a tenth, half, and twice the spread."""
    source = uncorrelated(3)
    transfer = fitted(source * torch.tensor([0.1, 0.5, 2]).view(-1, 1, 1) + 7, source)
    kept = transfer.contract(source)
    expected = source * torch.tensor([0.1, 0.5, 1]).double().view(-1, 1, 1)
    torch.testing.assert_close(kept, expected, rtol=2e-3, atol=0)
    grey = source.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    narrow = fitted(grey, source).contract(source)
    torch.testing.assert_close(narrow, narrow.mean(1, keepdim=True).expand_as(narrow), rtol=0, atol=1e-3)


def test_one_value_a_picture_with_its_gradient():
    source = drawn()
    transfer = fitted(drawn(10, scale=0.3, seed=1), source)
    x, y = drawn(2, seed=2), source[:2]
    torch.testing.assert_close(transfer.error(x, y)[1:], transfer.error(x[1:], y[1:]), rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(lambda x: transfer.error(x, y), x.requires_grad_())


def test_what_was_not_fitted_says_so():
    with pytest.raises(AssertionError, match="fit it first"):
        DomainTransfer().error(drawn(), drawn())
    with pytest.raises(AssertionError, match="fit it first"):
        DomainTransfer().contract(drawn())
