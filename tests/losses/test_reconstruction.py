import pytest
import torch

from domainstudio.losses.reconstruction import high_frequency_error, mean_error, simple_loss


def test_simple_loss_by_hand():
    output = torch.tensor([[[[1.0, 2], [3, 4]]], [[[0, 0], [0, 1]]]]).double()
    target = torch.tensor([[[[1.0, 0], [3, 1]]], [[[0, 0], [0, 1]]]]).double()
    assert simple_loss(output, target).tolist() == [(4 + 9) / 4, 0]


def test_mean_error_by_hand():
    output = torch.tensor([[[[1.0, 2], [3, 4]], [[0, 0], [0, 8]]]]).double()
    assert mean_error(output, torch.zeros_like(output)).tolist() == [(2.5**2 + 2**2) / 2]
    assert mean_error(output, output - 3).tolist() == [9]


def test_the_mean_error_is_the_part_of_simple_loss_that_moving_channels_takes_away():
    output, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = output - (output - target).mean((2, 3), keepdim=True)
    torch.testing.assert_close(mean_error(output, target), simple_loss(output, target) - simple_loss(moved, target))
    torch.testing.assert_close(mean_error(moved, target), torch.zeros(3).double())


def test_high_frequency_error_by_hand():
    """The kernel is ½ [[-1, -1], [-1, 3]], so the picture [[1, 2], [3, 4]] has hf = (-1 - 2 - 3 + 12) / 2 = 3."""
    x0 = torch.zeros(2, 1, 2, 4).double()
    estimate = x0.clone()
    estimate[0, 0, :, :2] = torch.tensor([[1, 2], [3, 4]])
    estimate[1] = 7  # a constant has no detail
    assert high_frequency_error(estimate, x0).tolist() == [9 / 2, 0]
    assert high_frequency_error(x0, estimate).tolist() == [9 / 2, 0]


def test_high_frequency_error_ignores_brightness():
    x0, estimate = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = high_frequency_error(estimate, x0)
    assert error.shape == (3,)
    torch.testing.assert_close(high_frequency_error(estimate + 2, x0 - 1), error)


@pytest.mark.parametrize("loss", [simple_loss, mean_error, high_frequency_error])
def test_one_value_a_picture_with_its_gradient(loss):
    x, y = torch.randn(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(loss(x, x), torch.zeros(2).double())
    torch.testing.assert_close(loss(x, y)[1:], loss(x[1:], y[1:]), rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), y))
