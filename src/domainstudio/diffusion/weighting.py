"""How much an error counts at each noise level."""

from torch import Tensor

from domainstudio.diffusion.prediction import Prediction, v_gain


def level_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor, high_noise_weight: Tensor | float) -> Tensor:
    """L_simple's weight at each noise level: from `high_noise_weight` where all is noise to 1 where all is picture.

    As alpha and sigma, (B,); or, of weights (C, h, w) of each number and levels (B, 1, 1, 1), (B, C, h, w).

    At high noise a network decides how a picture is composed, and ten pictures taught there are soon recited; at low
    noise it learns how they are drawn. An error of v or of a flow is weighted by
    w = high_noise_weight + (1 - high_noise_weight) alpha⁴ / (alpha⁴ + sigma⁴). An error of epsilon is by itself alpha²
    of the same error of v, one of x0 sigma² of it; they are weighted by min(1, w / alpha²) and min(1, w / sigma²).
    """
    picture, noise = alpha**4, sigma**4
    weight = high_noise_weight + (1 - high_noise_weight) * picture / (picture + noise)
    return (weight * v_gain(prediction, alpha, sigma).square()).clamp(max=1)


def x0_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What an error of x0 counts at each noise level, (B,), if no error of the output is to count more than itself.

    The inverse square of `_x0_gain`, at most 1: 1 for v, x0 and flows, min(1, SNR) for epsilon.
    """
    return _x0_gain(prediction, alpha, sigma).square().reciprocal().clamp(max=1)


def min_snr_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor, snr_gamma: float) -> Tensor:
    """L_simple's weight under min-SNR-gamma, (B,): min(SNR, gamma) times the error of x0 that the output's error means.

    Undefined for epsilon at alpha = 0, as x0 is.

    Source: Hang et al. 2023 (arXiv 2303.09556): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v.
    """
    snr = (alpha / sigma).square()
    return snr.clamp(max=snr_gamma) * _x0_gain(prediction, alpha, sigma).square()


def _x0_gain(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Factor (B,) from an error of the output to the error of x0 it means."""
    return sigma * v_gain(prediction, alpha, sigma)
