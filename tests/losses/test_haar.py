import pytest
import pywt
import torch

from domainstudio.losses.haar import high_frequency


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def detail_of_pywt(x):
    """LH + HL + HH under L = [1, 1] / sqrt(2), H = [-1, 1] / sqrt(2), from PyWavelets' bands.

    PyWavelets convolves, which mirrors its filter [-1, 1] / sqrt(2): its high-pass gives (x[2i] - x[2i + 1]) / sqrt(2),
    ours (x[2i + 1] - x[2i]) / sqrt(2). So each H changes the sign: once in the two mixed bands, twice, hence not at
    all, in HH. The low-pass is symmetric.
    """
    _, (high_rows, high_columns, high_both) = pywt.dwt2(x.numpy(), "haar")
    return torch.from_numpy(-high_rows - high_columns + high_both)


def test_the_signs_of_pywt_are_those_accounted_for():
    low, high = pywt.dwt([3.0, 7.0], "haar")
    assert low == pytest.approx([10 / 2**0.5])
    assert high == pytest.approx([-4 / 2**0.5])


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 2, 2), (3, 4, 6, 10), (2, 2, 10, 4)])
def test_equals_the_three_detail_bands_of_pywt(shape):
    x = randn(*shape)
    assert high_frequency(x).shape == (*shape[:2], shape[2] // 2, shape[3] // 2)
    torch.testing.assert_close(high_frequency(x), detail_of_pywt(x), rtol=0, atol=1e-14)


def test_equals_the_bands_written_out():
    low, high = (torch.tensor(taps).double() / 2**0.5 for taps in ([1, 1], [-1, 1]))
    x = randn(2, 3, 6, 8)
    blocks = x.unfold(2, 2, 2).unfold(3, 2, 2)  # (..., 2 rows, 2 columns)
    bands = [torch.einsum("...rc,r,c->...", blocks, r, c) for r, c in ((low, high), (high, low), (high, high))]
    torch.testing.assert_close(high_frequency(x), sum(bands), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 7), (7, 5), (3, 3)])
def test_an_odd_last_row_or_column_is_left_out(height, width):
    x = randn(2, 3, height, width)
    even = x[:, :, : height // 2 * 2, : width // 2 * 2]
    assert torch.equal(high_frequency(x), high_frequency(even))
    torch.testing.assert_close(high_frequency(x), detail_of_pywt(even), rtol=0, atol=1e-14)


def test_a_constant_picture_has_no_detail():
    x = torch.tensor([0.7, -1, 3]).double().view(1, 3, 1, 1).expand(2, 3, 6, 6)
    assert high_frequency(x).abs().max() < 1e-15


def test_linear():
    x, y = randn(2, 2, 3, 8, 8)
    expected = 2.5 * high_frequency(x) - 0.3 * high_frequency(y)
    torch.testing.assert_close(high_frequency(2.5 * x - 0.3 * y), expected, rtol=0, atol=1e-13)


def test_channels_and_pictures_do_not_mix():
    x = randn(3, 4, 6, 6)
    for i in range(3):
        for c in range(4):
            alone = high_frequency(x[i : i + 1, c : c + 1])[0, 0]
            torch.testing.assert_close(high_frequency(x)[i, c], alone, rtol=0, atol=1e-14)


def test_keeps_the_dtype_and_lets_the_gradient_through():
    assert high_frequency(randn(1, 3, 4, 4).float()).dtype == torch.float32
    assert torch.autograd.gradcheck(high_frequency, randn(2, 2, 4, 4).requires_grad_())
