import pytest
import torch

from domainstudio.losses.colour import ColourTransfer


def drawn(num=50, channels=4, scale=1.0, shift=0.0, seed=0):
    """Pictures whose channels are uncorrelated, but for what 50 of them happen to have."""
    noise = torch.randn(num, channels, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * torch.as_tensor(scale).view(-1, 1, 1) + torch.as_tensor(shift).view(-1, 1, 1)


def fitted(target, source):
    colours = ColourTransfer()
    colours.fit(target, source)
    return colours


def test_channels_that_keep_their_spread_are_left_alone_and_the_others_move():
    """Of three channels the target has the first at a hundredth of the variance around 5, and twice the other two."""
    source = drawn(channels=3)
    target = source * torch.tensor([0.1, 2, 2]).view(-1, 1, 1) + torch.tensor([5.0, -9, 9]).view(-1, 1, 1)
    colours = fitted(target, source)
    torch.testing.assert_close(colours.ratio, torch.tensor([0.01]).double(), rtol=1e-3, atol=0)
    moved = source.clone()
    moved[:, 1:] = drawn(channels=2, seed=3)
    moved[:, 0] = target[:, 0]
    torch.testing.assert_close(colours.error(moved, source), torch.zeros(50).double(), rtol=0, atol=1e-2)
    # A channel that is 2 too high in all places, weighted by 1 - r, is one of three.
    moved[:, 0] += 2
    torch.testing.assert_close(
        colours.error(moved, source), torch.full((50,), 0.99 * 4 / 3).double(), rtol=0.02, atol=0
    )


def test_grey_pictures_leave_their_brightness_to_the_source():
    """The target is a function of one channel; the error of grey pictures is none, that of coloured ones is."""
    source = drawn(channels=3, shift=[0.1, 0.2, 0.3])
    grey = source.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    colours = fitted(grey[:10], source)
    assert (colours.ratio < 1e-3).sum() == 2, "all but brightness"
    assert colours.error(grey, source).max() < 0.02 * colours.error(source, source).min()


@pytest.mark.parametrize("channels", [1, 4])
def test_a_domain_with_the_sources_colours_asks_for_next_to_nothing(channels):
    source = drawn(channels=channels)
    other = drawn(channels=channels, seed=1)
    assert (
        fitted(other, source).error(source, source).max()
        < 0.02 * fitted(other * 0.1 + 1, source).error(source, source).min()
    )
    assert torch.equal(fitted(2 * source, source).error(other, source), torch.zeros(50).double())


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
    torch.testing.assert_close(fitted(turned(target, skew), turned(source, skew)).ratio, plain.ratio)


def test_a_channel_that_never_varies_does_no_harm():
    source, target = drawn(), drawn(10, seed=1)
    source[:, 2] = target[:, 2] = 0.5
    error = fitted(target, source).error(source, source)
    assert error.isfinite().all()
    assert error.max() < 0.2


def test_one_value_a_picture_with_its_gradient():
    source = drawn()
    colours = fitted(drawn(10, scale=0.3, seed=1), source)
    x, y = drawn(2, seed=2), source[:2]
    torch.testing.assert_close(colours.error(x, y)[1:], colours.error(x[1:], y[1:]), rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(lambda x: colours.error(x, y), x.requires_grad_())


def test_what_was_not_fitted_says_so():
    with pytest.raises(AssertionError, match="fit it first"):
        ColourTransfer().error(drawn(), drawn())
